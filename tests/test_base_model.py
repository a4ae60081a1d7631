from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from raise_env import base_model
from raise_env.base_model import BaseModel, load_tokenizer, model_folder, own_modes, resolve_device
from raise_env.config import LoraSettings
from raise_env.encoding import Batch, Encoder
from raise_env.errors import ModelError, SettingError

BROKEN = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "torn config": lambda folder: (folder / "config.json").write_text("{"),
    "unknown kind": lambda folder: (folder / "config.json").write_text('{"model_type": "no_such_kind"}'),
    "torn weights": lambda folder: (folder / "model.safetensors").write_bytes(b"torn"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "some weights only": lambda folder: save_file({"model.norm.weight": torch.ones(128)}, folder / "model.safetensors"),
    "other sizes": lambda folder: (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"intermediate_size": 352', '"intermediate_size": 353')
    ),
    "torn tokenizer": lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {'),
    "foreign tokenizer": lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {}}'),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
}


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(model_folder("tiny"), tmp_path / "model"))


@pytest.mark.parametrize("fault", BROKEN)
def test_base_model__broken_folder__is_named_with_what_was_expected(folder, fault):
    BROKEN[fault](folder)
    with pytest.raises(ModelError, match=r"(?s)/model.*[Ee]xpected"):
        BaseModel(str(folder), LoraSettings())


def test_base_model__weights_in_pickle__are_not_unpacked(folder):
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("the checkpoint was run",)

    (folder / "model.safetensors").unlink()
    torch.save({"weight": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        BaseModel(str(folder), LoraSettings())


def test_base_model__code_of_its_own__is_not_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('the code was run')")
    with pytest.raises(ModelError):
        BaseModel(str(folder), LoraSettings())


def test_base_model__no_place_for_lora__says_so():
    with pytest.raises(ModelError, match="LoRA cannot be put on 'tiny'"):
        BaseModel("tiny", LoraSettings(target_modules=("no_such_layer",)))


@pytest.mark.parametrize("source", ["no/such/folder", "./none", "/none", "~/none", "a\\b"])
def test_model_folder__path_that_is_not_there__is_said(source):
    with pytest.raises(ModelError, match="no such folder"):
        model_folder(source)


def test_model_folder__a_file__is_said(folder):
    with pytest.raises(ModelError, match="is a file"):
        model_folder(str(folder / "config.json"))


def test_model_folder__neither_path_nor_known__is_a_hub_id(folder):
    assert model_folder("owner/name") == "owner/name"
    assert model_folder(str(folder)) == str(folder)
    assert (Path(model_folder("tiny")) / "config.json").is_file()


def test_load_tokenizer__hub_out_of_reach__is_said():
    with pytest.raises(ModelError, match="no-such-owner/no-such-model"):
        load_tokenizer("no-such-owner/no-such-model")


def test_load_tokenizer__no_end_token__says_what_to_set(folder):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["eos_token"]
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="eos_token"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "cpu:x"])
def test_resolve_device__not_here__is_said(device):
    with pytest.raises(SettingError, match=device):
        resolve_device(device)


def test_resolve_device__torch_says_why_at_length__is_one_sentence_of_it(monkeypatch):
    def absent(*_args, **_kwargs):
        raise RuntimeError("Could not run it on 'MPS'. This could be because. If you are.\nMore")

    monkeypatch.setattr(torch, "empty", absent)
    with pytest.raises(SettingError, match=r"cannot be used here: Could not run it on 'MPS'\. Expected 'auto'"):
        resolve_device("mps")


def test_resolve_device__auto__is_one_that_works():
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")


def saved_bytes(model, batch, adapters):
    """Bytes that are kept for the backward pass, with the losses and the gradient that they lead to."""
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    adapters = adapters.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses, _ = model.token_losses(batch, adapters)
    (gradient,) = torch.autograd.grad(losses.sum(), adapters)
    return sum(kept.values()), losses.detach(), gradient


def test_base_model__activation_checkpointing__same_numbers_for_less_memory():
    lora = LoraSettings(r=4)
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(3, 259, size=(4, 40)))
    is_label = torch.zeros(4, 40, dtype=torch.bool)
    is_label[:, -5:] = True
    is_label[2:, -9:] = True
    batch = Batch(ids, is_label)
    plain, lean = BaseModel("tiny", lora), BaseModel("tiny", lora, activation_checkpointing=True)
    adapters = torch.randn(2, plain.num_parameters, generator=torch.Generator().manual_seed(0)) * 0.1
    before = torch.get_rng_state()
    expected, found = saved_bytes(plain, batch, adapters), saved_bytes(lean, batch, adapters)
    assert found[0] < 0.5 * expected[0]
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-6, atol=1e-6)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("lora", [LoraSettings(use_dora=True), LoraSettings(lora_dropout=0.1)])
def test_base_model__activation_checkpointing_of_other_layers__is_refused(lora):
    with pytest.raises(SettingError, match="plain LoRA layers"):
        BaseModel("tiny", lora, activation_checkpointing=True)


@pytest.mark.parametrize(("capabilities", "num_warnings"), [({"avx2": True}, 1), ({"avx512_bf16": True}, 0), ({}, 1)])
def test_base_model__bfloat16__warns_once_where_it_is_slow(monkeypatch, caplog, capabilities, num_warnings):
    base_model._warn_of_slow_bfloat16.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    for _ in range(2):
        BaseModel("tiny", LoraSettings(), dtype="bfloat16", device="cpu")
    assert sum("bfloat16" in record.message for record in caplog.records) == num_warnings
    BaseModel("tiny", LoraSettings(), device="cpu")
    assert len(caplog.records) == num_warnings


def test_base_model__four_bits_without_bitsandbytes__says_what_to_install(monkeypatch):
    monkeypatch.setattr(base_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"needs bitsandbytes.*pip install bitsandbytes"):
        BaseModel("tiny", LoraSettings(), dtype="nf4", device="cpu")


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: raise-env[quant]")
def test_base_model__four_bits__trains_and_scores_as_peft_does(embedded_env, tmp_path):
    folder = str(tmp_path / "model")  # whose widths are multiples of bitsandbytes' 64
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=259, **sizes)).save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    env = embedded_env(model=folder, dtype="nf4", device="cpu")
    _, info = env.reset(seed=0)
    weights = dict(env.assets.learner.base.peft_model.named_parameters())
    packed = [value for name, value in weights.items() if "base_layer" in name]
    assert {value.dtype for value in packed} == {torch.uint8}
    before = env.dev_scores[0]
    whole = embedded_env(model=folder, device="cpu")
    whole.reset(seed=0)
    assert before == pytest.approx(whole.dev_scores[0], abs=0.5)  # rounded, and still the same model
    action = info["action_mask"].astype(np.int8)
    action[4:] = 0
    env.step(action)
    env.save_adapter(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings)
    plain = PeftModel.from_pretrained(plain, str(tmp_path)).train()  # else bitsandbytes rounds to bfloat16 on a CPU
    sums, count = 0.0, 0
    encoder = Encoder(env.assets.learner.base.tokenizer, 256)
    for tokens, is_label in (encoder.encode([row]).row(0) for row in env.assets.data.dev):
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        labels = torch.where(torch.from_numpy(is_label), ids[0], -100)[None]
        with torch.no_grad():
            sums += plain(input_ids=ids, labels=labels).loss.item() * int(is_label.sum())
        count += int(is_label.sum())
    assert -sums / count == pytest.approx(env.dev_scores[-1], abs=1e-4)


def test_base_model__tokenizer_of_a_larger_vocabulary__model_error(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    for num_words in (258, 259):
        with torch.random.fork_rng(devices=[]):
            LlamaForCausalLM(LlamaConfig(vocab_size=num_words, **sizes)).save_pretrained(tmp_path)
        load_tokenizer("tiny").save_pretrained(tmp_path)
        if num_words == 259:
            BaseModel(str(tmp_path), LoraSettings(), device="cpu")
        else:
            with pytest.raises(ModelError, match=r"tokens up to number 258, and the model knows 258.*do not belong"):
                BaseModel(str(tmp_path), LoraSettings(), device="cpu")


def test_save_adapter__names_of_modules__are_in_the_order_of_the_alphabet(embedded_env, tmp_path):
    learner = embedded_env().assets.learner
    learner.save_adapter(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(config["target_modules"]) > 2
    assert config["target_modules"] == sorted(config["target_modules"]), "sets differ from process to process"


def rows_of_labels(*counts, length=12):
    """Rows of random tokens, each with so many labels at its end."""
    ids = torch.from_numpy(np.random.default_rng(1).integers(3, 259, size=(len(counts), length)))
    is_label = torch.zeros(len(counts), length, dtype=torch.bool)
    for row, count in enumerate(counts):
        is_label[row, length - count :] = True
    return Batch(ids, is_label)


def test_token_losses__lora_on_the_head__is_that_of_each_adapter_alone():
    model = BaseModel("tiny", LoraSettings(r=2, target_modules=("q_proj", "lm_head")))
    adapter = torch.randn(1, model.num_parameters, generator=torch.Generator().manual_seed(0)) * 0.1
    assert not model.stackable, "the head gets labels alone, and each adapter has another number of them"
    batch = rows_of_labels(3, 5)
    losses, _ = model.token_losses(batch, adapter)
    rows = [Batch(batch.input_ids[row, None], batch.is_label[row, None]) for row in range(2)]
    alone = torch.cat([model.token_losses(row, adapter)[0] for row in rows])
    torch.testing.assert_close(losses, alone, atol=1e-5, rtol=1e-5)


def test_initial_parameters__dora_after_something_was_saved__are_the_first_again(tmp_path):
    model = BaseModel("tiny", LoraSettings(r=2, use_dora=True))
    first = model.initial_parameters(0)
    model.save_adapter(first + 0.5, tmp_path)
    assert torch.equal(model.initial_parameters(0), first)


def test_base_model__checkpointing_of_layers_that_read_their_own_dropout__drops_nothing(tmp_path):
    form = OPTConfig(
        vocab_size=259,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
        dropout=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        OPTForCausalLM(form).save_pretrained(tmp_path)
    load_tokenizer("tiny").save_pretrained(tmp_path)
    plain, lean = (BaseModel(str(tmp_path), LoraSettings(r=2), activation_checkpointing=on) for on in (False, True))
    adapter = torch.randn(1, plain.num_parameters, generator=torch.Generator().manual_seed(0)) * 0.1
    batch = rows_of_labels(4, 6)
    expected, found = saved_bytes(plain, batch, adapter), saved_bytes(lean, batch, adapter)
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(lean.token_losses(batch, adapter)[0], expected[1], rtol=1e-5, atol=1e-5)


def test_base_model__loading_and_new_adapters__seed_no_generator_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("each GPU's generator was seeded"))
    BaseModel("tiny", LoraSettings(r=2), device="cpu").initial_parameters(3)


def test_own_modes__two_that_overlap__float32_until_the_last_has_left():
    torch.set_default_dtype(torch.float64)
    try:
        one, other = own_modes(), own_modes()  # as in two threads, for the default is of the process
        one.__enter__()
        other.__enter__()
        one.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.float32
        other.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_base_model__made_in_inference_mode__can_be_trained_outside():
    with torch.inference_mode():
        model = BaseModel("tiny", LoraSettings())
        adapter = model.initial_parameters(seed=0)
    assert not any(value.is_inference() for value in (adapter, *model.peft_model.parameters()))
