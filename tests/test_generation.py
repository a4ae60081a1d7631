from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from data_files import write_rows
from peft import PeftModel
from transformers import AutoModelForCausalLM

from raise_env.base_model import BaseModel, model_folder
from raise_env.config import LoraSettings
from raise_env.encoding import Encoder
from raise_env.generation import answer
from raise_env.pool import Instruction

QUESTIONS = ["What is the capital of Ruritania?", "2 + 2?", "Name a colour that is not blue, and one that is."]


@pytest.fixture(
    scope="module", params=[{}, {"use_dora": True}, {"lora_dropout": 0.1}], ids=["plain", "dora", "dropout"]
)
def own_base(request):
    return BaseModel("tiny", LoraSettings(**request.param), device="cpu")


@pytest.fixture(scope="module")
def prompts(base):
    encoder = Encoder(base.tokenizer, 256)
    texts = [encoder.prompt_text(Instruction(question, "")) for question in QUESTIONS]
    return [np.array(tokens) for tokens in base.tokenizer(texts, add_special_tokens=False)["input_ids"]]


def strong_adapter(base):
    """An adapter that says something else than the base model does."""
    generator = torch.Generator().manual_seed(3)
    return 0.05 * torch.randn(base.num_parameters, generator=generator)


def generated_by_peft(base, adapter, prompt, folder, number):
    base.save_adapter(adapter, folder)
    causal = AutoModelForCausalLM.from_pretrained(model_folder("tiny"), trust_remote_code=False)
    model = PeftModel.from_pretrained(causal, str(folder)).eval()
    ids = torch.from_numpy(prompt)[None]
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=number, do_sample=False, use_cache=True
    )
    return output[0, len(prompt) :].tolist()


def test_generate__several_prompts__are_pefts_tokens(own_base, prompts, tmp_path):
    adapter = strong_adapter(own_base)
    found = own_base.generate(prompts, adapter[None], 40)
    assert found == [generated_by_peft(own_base, adapter, prompt, tmp_path, 40) for prompt in prompts]
    assert found != own_base.generate(prompts, None, 40)
    if own_base.stackable:
        with own_base.merged(adapter):
            assert found == own_base.generate(prompts, None, 40)


def test_generate__with_activation_checkpointing__is_the_same(base, prompts):
    other = BaseModel("tiny", LoraSettings(), device="cpu", activation_checkpointing=True)
    adapter = strong_adapter(base)
    assert other.generate(prompts, adapter[None], 40) == base.generate(prompts, adapter[None], 40)
    layers = [module for module in other.peft_model.modules() if type(module).__name__ == "LlamaDecoderLayer"]
    assert all(layer.training for layer in layers), "and checkpointing goes on"


def test_generate__a_stop__ends_its_row_alone(base, prompts):
    adapter = strong_adapter(base)
    whole = base.generate(prompts, adapter[None], 60)
    texts = [base.tokenizer.decode(tokens) for tokens in whole]
    stop = texts[0][20:24]
    stopped = base.generate(prompts, adapter[None], 60, [stop])
    for tokens, text, part in zip(whole, texts, stopped, strict=True):
        place = text.find(stop)
        assert part == (tokens if place < 0 else tokens[: place + len(stop)]), "a token is a character here"


def test_generate__nothing_else__is_changed(base, prompts):
    before, state = base.base_checksum(), torch.get_rng_state()
    base.generate(prompts, strong_adapter(base)[None], 5)
    assert base.base_checksum() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_answer__any_batching__is_cut_at_the_first_stop(base, prompts, monkeypatch):
    adapter = strong_adapter(base)[None]
    texts = [base.tokenizer.decode(t, skip_special_tokens=True) for t in base.generate(prompts, adapter, 128)]
    stop = texts[1][10:13]
    monkeypatch.setattr("raise_env.generation.STOPS", (stop,))
    together, num_tokens = answer(base, prompts, adapter)
    monkeypatch.setattr("raise_env.generation.GENERATION_BATCH_TOKENS", 1)
    assert (together, num_tokens) == answer(base, prompts, adapter)
    assert together == [text.split(stop)[0] for text in texts]
    assert sum(map(len, prompts)) < num_tokens <= sum(map(len, prompts)) + 3 * 128


def test_answer__long_prompt__loses_its_beginning(base, prompts, monkeypatch):
    seen = []
    monkeypatch.setattr(base, "generate", lambda cut, *_: seen.extend(cut) or [[1]] * len(cut))
    long = np.arange(3, 200)
    answer(base, [long, prompts[1]], None)
    assert [tokens.tolist() for tokens in seen] == [long[-128:].tolist(), prompts[1].tolist()]


def test_warn_of_cut__prompts_that_do_not_fit__are_counted(base, prompts, caplog):
    from raise_env.generation import warn_of_cut

    with caplog.at_level(logging.WARNING, logger="raise_env"):
        warn_of_cut(base, [*prompts, np.arange(128)], "dev")
        assert not caplog.messages
        warn_of_cut(base, [*prompts, np.arange(129)], "dev")
    assert caplog.messages == ["1 of 4 dev prompts lose their beginning: 128 tokens fit beside an answer of up to 128"]


def test_env__answered_prompts_that_do_not_fit__are_told_of_once_for_each_set(
    embedded_env, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("raise_env.learner.answer", lambda _, prompts, adapters: (["#### 1"] * len(prompts), 1))

    def rows(name, number, length):
        said = [{"prompt": f"{name} {place} {'x' * length}", "response": f"#### {place}"} for place in range(number)]
        return str(write_rows(tmp_path / f"{name}.jsonl", said))

    files = {"pool": rows("pool", 16, 9), "dev": rows("dev", 3, 150), "test": rows("test", 2, 150)}
    env = embedded_env(**files, pool_size=2000, num_dev=None, num_test=None, budget=12, reward="flexible_match")
    with caplog.at_level(logging.WARNING, logger="raise_env.generation"):
        env.reset(seed=0)
        env.reset(seed=1)
        env.step(np.array([1, 0] * 8))
    assert [message.partition(" prompts")[0] for message in caplog.messages] == ["3 of 3 dev", "2 of 2 test"]
