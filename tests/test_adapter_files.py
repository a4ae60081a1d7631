from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from raise_env.adapter_files import adapter_settings, content_hash, read_adapter, starting_form
from raise_env.base_model import BaseModel
from raise_env.config import EnvConfig, LoraSettings
from raise_env.errors import ModelError, SettingError

FORMS = [
    LoraSettings(),
    LoraSettings(r=3, lora_alpha=5, target_modules=("q_proj", "v_proj"), use_rslora=True),
    LoraSettings(use_dora=True, lora_dropout=0.1),
]


@pytest.fixture
def folder(base, tmp_path):
    """A good folder, to be spoilt."""
    base.save_adapter(base.initial_parameters(0), tmp_path)
    return tmp_path


def change(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


@pytest.mark.parametrize("lora", FORMS, ids=["plain", "few modules", "dora"])
def test_read_adapter__what_peft_wrote__comes_back(lora, tmp_path):
    base = BaseModel("tiny", lora, device="cpu")
    adapter = torch.randn(base.num_parameters)
    base.save_adapter(adapter, tmp_path)
    settings = adapter_settings(tmp_path)
    assert (settings.r, settings.lora_alpha, settings.use_dora) == (lora.r, lora.lora_alpha, lora.use_dora)
    assert settings.use_rslora == lora.use_rslora
    assert settings.lora_dropout == 0, "it is there to be scored"
    again = BaseModel("tiny", settings, device="cpu")
    assert torch.equal(read_adapter(tmp_path, again), adapter)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peft_type": "IA3"}, r"peft_type is 'IA3'; expected 'LORA'"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is .* does not compute.*merge_and_unload"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"bias": "all"}, "bias"),
    ],
)
def test_adapter_settings__what_cannot_be_scored__is_refused_by_name(folder, values, said):
    change(folder, **values)
    with pytest.raises(ValueError, match=said):
        adapter_settings(folder)


def test_adapter_settings__no_folder__says_what_is_expected(tmp_path):
    with pytest.raises(ModelError, match=r"adapter_config\.json.*save_pretrained"):
        adapter_settings(tmp_path / "nowhere")


def test_read_adapter__weights_that_do_not_fit__are_named(base, folder):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[0]
    save_file({**weights, name: torch.zeros(8, 9)}, path)
    with pytest.raises(ModelError, match=r"does not fit the model 'tiny'.*has shape \(8, 9\); expected \(8, \d+\)"):
        read_adapter(folder, base)
    save_file({key: value for key, value in weights.items() if key != name}, path)
    with pytest.raises(ModelError, match=rf"1 of {len(weights)} matrices are not in it, such as {name}"):
        read_adapter(folder, base)
    save_file({**weights, "other.lora_A.weight": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match=r"have no place in the model, such as other\.lora_A"):
        read_adapter(folder, base)


def test_read_adapter__pickled_weights__are_not_opened(base, folder):
    path = folder / "adapter_model.safetensors"
    path.rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"pickle and never opened"):
        read_adapter(folder, base)


# To go on from


def settings_of(**lora):
    return LoraSettings(**{"r": 4, "target_modules": ("q_proj", "v_proj"), **lora})


@pytest.fixture
def stored(tmp_path):
    """An adapter of rank 4 on two modules a layer."""
    base = BaseModel("tiny", settings_of(), device="cpu")
    base.save_adapter(base.initial_parameters(0), tmp_path / "stored")
    return tmp_path / "stored"


@pytest.mark.parametrize("asked", [LoraSettings(), LoraSettings(lora_dropout=0.1), settings_of()])
def test_starting_form__an_adapter_to_go_on_from__has_its_form(stored, asked):
    form = starting_form(EnvConfig(adapter=str(stored), lora=asked))
    assert (form.r, set(form.target_modules)) == (4, {"q_proj", "v_proj"})
    assert form.lora_dropout == asked.lora_dropout


def test_starting_form__another_form_asked_for__refused(stored):
    with pytest.raises(SettingError, match=r"lora asks for r=8, lora_alpha=32.*has r=4.*leave lora out"):
        starting_form(EnvConfig(adapter=str(stored), lora=LoraSettings(lora_alpha=32)))


def test_starting_form__none_to_go_on_from__as_asked_for():
    assert starting_form(EnvConfig(lora=LoraSettings(r=2))) == LoraSettings(r=2)


def test_content_hash__other_weights__another(stored):
    before = content_hash(stored)
    weights = load_file(stored / "adapter_model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, stored / "adapter_model.safetensors")
    assert content_hash(stored) != before


def test_content_hash__no_weights__model_error(stored):
    (stored / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors"):
        content_hash(stored)
