"""The reference is PEFT's own model, whole: it computes every position of every layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from raise_env.base_model import BaseModel, model_folder
from raise_env.config import LoraSettings
from raise_env.encoding import Batch
from raise_env.errors import ModelError
from raise_env.label_positions import LAST_LAYERS, LabelPositions

WORDS = {"vocab_size": 259, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {**WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
GPT2_SIZES = {**WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
LLAMA_SIZES = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
FORMS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**LLAMA_SIZES),
    "mistral": MistralConfig(**LLAMA_SIZES),
    "qwen2": Qwen2Config(**{**LLAMA_SIZES, "vocab_size": 260}),  # transformers gives its tokenizers one token more
    "qwen3": Qwen3Config(**LLAMA_SIZES),
    "gemma": GemmaConfig(**LLAMA_SIZES),
    "gpt2": GPT2Config(**GPT2_SIZES),
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
    "phi": PhiConfig(**SIZES, intermediate_size=48),  # of a form that is not known: all of it is computed
}


@pytest.fixture(scope="module", params=FORMS)
def folder(request, tmp_path_factory):
    """A small model of each form with random weights, as transformers saves it."""
    path = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        causal = AutoModelForCausalLM.from_config(FORMS[request.param])
        for value in causal.parameters():  # far from the small ones of a first start, where everything looks alike
            value.data += 0.2 * torch.randn_like(value)
    causal.save_pretrained(path)
    AutoTokenizer.from_pretrained(model_folder("tiny")).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return BaseModel(str(folder), LoraSettings(r=4, lora_alpha=8), device="cpu")


def random_batch(num_rows=4, length=12, seed=0):
    """Rows of several lengths whose last tokens, of several numbers, are labels."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 259, size=(num_rows, length))
    is_label = np.zeros((num_rows, length), dtype=bool)
    for row in range(num_rows):
        end = length - row
        is_label[row, end - 1 - row % 3 : end] = True
        ids[row, end:] = 0
    return Batch(torch.from_numpy(ids), torch.from_numpy(is_label))


def random_adapters(model, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, model.num_parameters, generator=generator) * 0.1


def plain_losses(folder, model, adapter, batch):
    """Each label's loss and its sum's gradient in the adapter, by PEFT's model over every position."""
    causal = AutoModelForCausalLM.from_pretrained(folder)
    transposed = causal.config.model_type == "gpt2"
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", fan_in_fan_out=transposed)
    peft_model = get_peft_model(causal, lora).eval()
    names = [name for name, value in peft_model.named_parameters() if value.requires_grad]
    shapes = [dict(peft_model.named_parameters())[name].shape for name in names]
    parts = adapter.split([shape.numel() for shape in shapes])
    state = {n.replace(".default", ""): p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
    set_peft_model_state_dict(peft_model, state)
    logits = peft_model(input_ids=batch.input_ids).logits[:, :-1][batch.is_label[:, 1:]]
    losses = nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    losses.sum().backward()
    parameters = dict(peft_model.named_parameters())
    return losses.detach(), torch.cat([parameters[name].grad.flatten() for name in names])


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT asks by the old name
def test_base_model__each_form__losses_and_gradients_are_those_of_the_whole_model(folder, model):
    batch, adapters = random_batch(), random_adapters(model, 1)
    expected, expected_gradient = plain_losses(folder, model, adapters[0], batch)
    assert expected.std() > 0.1, "the model tells positions apart"
    adapters.requires_grad_()
    losses, _ = model.token_losses(batch, adapters)
    (gradient,) = torch.autograd.grad(losses.sum(), adapters)
    torch.testing.assert_close(losses.detach(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient[0], expected_gradient, rtol=1e-4, atol=1e-5 * expected_gradient.abs().max())
    with model.merged(adapters[0].detach()), torch.no_grad():
        torch.testing.assert_close(model.token_losses(batch, None)[0], expected, rtol=1e-5, atol=1e-5)


def test_base_model__adapters_of_unequal_label_counts__each_as_by_itself(model):
    batch, adapters = random_batch(), random_adapters(model, 2)
    halves = [Batch(batch.input_ids[part], batch.is_label[part]) for part in (slice(0, 2), slice(2, 4))]
    assert halves[0].is_label.sum() != halves[1].is_label.sum()

    def gradient_of(batch, adapters):
        adapters = adapters.clone().requires_grad_()
        losses, _ = model.token_losses(batch, adapters)
        (gradient,) = torch.autograd.grad(losses.sum(), adapters)
        return losses.detach(), gradient

    together = gradient_of(batch, adapters)
    apart = [gradient_of(half, adapters[None, place]) for place, half in enumerate(halves)]
    torch.testing.assert_close(together[0], torch.cat([losses for losses, _ in apart]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[1], torch.cat([gradient for _, gradient in apart]), rtol=1e-4, atol=1e-4)


def test_base_model__hidden_states__are_those_of_every_position(folder, model):
    batch = random_batch()
    causal = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = causal.get_decoder()(input_ids=batch.input_ids).last_hidden_state
        _, hidden = model.hidden_states(batch, None)
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)


def test_base_model__a_last_hidden_layer_that_is_not_found__is_told(tmp_path, monkeypatch):
    causal = AutoModelForCausalLM.from_config(FORMS["llama"])
    monkeypatch.setattr(type(causal), "get_decoder", lambda self: nn.Identity())
    causal.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_folder("tiny")).save_pretrained(tmp_path)
    model = BaseModel(str(tmp_path), LoraSettings(r=4, lora_alpha=8), device="cpu")
    with pytest.raises(ModelError, match=r"last hidden layer cannot be found.*Name another auxiliary_model"):
        model.hidden_states(random_batch(), None)


@pytest.mark.parametrize("form", [form for form in FORMS if form in LAST_LAYERS])
def test_label_positions__known_forms__compute_fewer_positions(form):
    causal = AutoModelForCausalLM.from_config(FORMS[form])
    path, names = LAST_LAYERS[form]
    last = causal.get_submodule(path)[-1].get_submodule(names[-1])
    seen, forward = [], last.forward

    def spied(x):
        seen.append(x.numel() // x.shape[-1])
        return forward(x)

    last.forward = spied
    positions = LabelPositions(causal)
    batch = random_batch()
    with positions.only(batch.keep, 1):
        causal(input_ids=batch.input_ids)
    causal(input_ids=batch.input_ids)
    assert seen == [int(batch.is_label.sum()), batch.input_ids.numel()]


def test_label_positions__forms_that_are_known__are_all_tested():
    assert set(LAST_LAYERS) < set(FORMS)


def test_label_positions__most_positions_are_read__computes_them_all():
    positions = LabelPositions(AutoModelForCausalLM.from_config(FORMS["llama"]))
    with positions.only(torch.ones(2, 5, dtype=torch.bool), 1):
        assert positions.choice is None
    with pytest.raises(KeyError), positions.only(torch.eye(5, dtype=torch.bool), 1):
        raise KeyError
    assert positions.choice is None, "an error within leaves nothing behind"
