from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from raise_env.base_model import BaseModel, load_tokenizer, model_folder, resolve_device
from raise_env.config import LoraSettings
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


def test_resolve_device__auto__is_one_that_works():
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")
