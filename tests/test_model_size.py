import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from raise_env import EnvConfig
from raise_env.base_model import BaseModel, model_folder
from raise_env.config import LoraSettings
from raise_env.errors import ModelError
from raise_env.model_size import has_weights, matrix_rate, save_stand_in, size_of


@pytest.fixture
def shapes_alone(tmp_path):
    """The embedded model's folder without its weights."""
    folder = tmp_path / "shapes"
    shutil.copytree(model_folder("tiny"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return str(folder)


@pytest.mark.parametrize("modules", ["all-linear", ("q_proj", "v_proj"), r".*\.(q|v)_proj"])
def test_size_of__embedded_model__is_that_of_the_loaded_one(modules):
    lora = LoraSettings(r=4, target_modules=modules)
    size = size_of(EnvConfig(lora=lora), "tiny")
    base = BaseModel("tiny", lora, device="cpu")
    causal = AutoModelForCausalLM.from_pretrained(model_folder("tiny"))
    assert size.num_parameters == sum(value.numel() for value in causal.parameters())
    assert size.num_adapter == base.num_parameters
    assert (size.hidden_dim, size.num_words) == (base.hidden_dim, causal.config.vocab_size)
    embedding = causal.get_input_embeddings().weight.numel()
    norms = sum(value.numel() for name, value in causal.named_parameters() if "norm" in name)
    assert size.num_matrix == size.num_parameters - norms - (0 if causal.config.tie_word_embeddings else embedding)


def test_size_of__gpt2__counts_its_transposed_layers(tmp_path):
    form = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=259, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(form).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_folder("tiny")).save_pretrained(tmp_path)
    lora = LoraSettings(r=2)
    assert size_of(EnvConfig(lora=lora), str(tmp_path)).num_adapter == BaseModel(str(tmp_path), lora).num_parameters


def test_size_of__config_of_no_language_model__model_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelError, match="not that of a causal language model"):
        size_of(EnvConfig(), str(tmp_path))


def test_has_weights__folder_without_them__false(shapes_alone):
    assert has_weights("tiny")
    assert has_weights("someone/model-on-the-hub")
    assert not has_weights(shapes_alone)


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_save_stand_in__takes_the_same_tokens(shapes_alone, tmp_path, has_tokenizer):
    if not has_tokenizer:
        for path in Path(shapes_alone).glob("*token*"):
            path.unlink()
    assert save_stand_in(shapes_alone, tmp_path / "model") == has_tokenizer
    base = BaseModel(str(tmp_path / "model"), LoraSettings(), device="cpu")
    assert len(base.tokenizer) == len(AutoTokenizer.from_pretrained(model_folder("tiny")))


def test_matrix_rate__twice_the_width__is_a_rate_and_not_a_time(monkeypatch):
    monkeypatch.setattr("raise_env.model_size._RATE_SECONDS", 0.05)
    size = size_of(EnvConfig(), "tiny")
    assert 1e8 < matrix_rate(EnvConfig(device="cpu"), size) < 1e14
