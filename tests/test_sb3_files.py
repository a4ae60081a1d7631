"""What Stable-Baselines3 saved is read, and nothing in it is run."""

from __future__ import annotations

import base64
import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, PPO

from raise_env import PickOne, TopKScores
from raise_env.agents.sb3 import Sb3Agent, SubsetPolicy
from raise_env.agents.sb3_files import SavedModel
from raise_env.errors import RecordError
from raise_env.testing import toy_env

SMALL = {"net_arch": [4]}


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "it ran")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model as SB3 saves it."""
    path = tmp_path / "ppo.zip"
    PPO(SubsetPolicy, toy_env(), policy_kwargs={"subset_size": 5, **SMALL}, device="cpu").save(path)
    return path


def changed(path: Path, **members: bytes | None) -> Path:
    """Put other content into members of the archive; None takes one out."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    content |= {name.replace("_pth", ".pth"): value for name, value in members.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in content.items():
            if value is not None:
                archive.writestr(name, value)
    return path


def notes(path: Path, **entries: Any) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return json.dumps({**json.loads(archive.read("data")), **entries}).encode()


def as_pth(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("algorithm", "policy", "wrap", "form"),
    [
        (PPO, SubsetPolicy, lambda env: env, "subset"),
        (PPO, "MlpPolicy", lambda env: env, "multibinary"),
        (PPO, "MlpPolicy", TopKScores, "scores"),
        (A2C, "MlpPolicy", PickOne, "pick"),  # its policy_kwargs hold an optimiser's class, and so are a pickle
    ],
)
def test_saved_model__each_action_space__is_read(
    algorithm: Any, policy: Any, wrap: Any, form: str, tmp_path: Path
) -> None:
    policy_kwargs = {**SMALL, **({"subset_size": 5} if form == "subset" else {})}
    model = algorithm(policy, wrap(toy_env()), policy_kwargs=dict(policy_kwargs), device="cpu")
    model.save(tmp_path / "model.zip")
    saved = SavedModel.read(tmp_path / "model.zip")

    assert (saved.action_form, saved.num_candidates, saved.num_features) == (form, 32, 39)
    assert saved.policy_kwargs == policy_kwargs
    torch.testing.assert_close(saved.weights, dict(model.policy.state_dict()))


def test_saved_model__pickles_in_data__are_never_opened(saved: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    evil = base64.b64encode(pickle.dumps(Evil(mark))).decode()
    with zipfile.ZipFile(saved) as archive:
        before = json.loads(archive.read("data"))
    poisoned = {
        name: {**value, ":serialized:": evil} if isinstance(value, dict) and ":serialized:" in value else value
        for name, value in before.items()
    }
    changed(saved, data=json.dumps({**poisoned, "_extra": {":type:": "x", ":serialized:": evil}}).encode())

    assert sum(evil in str(value) for value in poisoned.values()) > 3
    assert Sb3Agent("PPO", load=saved).model is not None
    assert not mark.exists()
    pickle.loads(base64.b64decode(evil))
    assert mark.exists()  # that is what would have happened


@pytest.mark.parametrize("kind", ["pickle", "torch", "torch among weights"])
def test_saved_model__pickle_in_place_of_weights__is_not_run(kind: str, saved: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    evil = Evil(mark)
    content = pickle.dumps(evil) if kind == "pickle" else as_pth(evil if kind == "torch" else {"weight": evil})
    with pytest.raises(RecordError, match=r"ppo\.zip: cannot be read: policy\.pth holds no plain weights"):
        SavedModel.read(changed(saved, policy_pth=content))

    assert not mark.exists()


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"data": None}, "There is no item named 'data'"),
        ({"policy_pth": None}, "There is no item named 'policy.pth'"),
        ({"data": b"{"}, "Expecting property name"),
        ({"data": b"[]"}, "list indices"),
        ({"data": b"[" * 100_000}, "nested too deeply"),
        ({"data": b'"\xff"'}, "codec can't decode"),
        ({"data": b'{"observation_space": {"_shape": [0, 39]}}'}, r"its observations have shape \(0, 39\)"),
        ({"data": b'{"observation_space": {"_shape": [1000000000, 39]}}'}, "its observations have shape"),
        ({"data": b'{"observation_space": {"_shape": null}}'}, "not iterable"),
        ({"data": b"{}"}, "missing: observation_space"),
        ({"policy_pth": b""}, "policy.pth holds no plain weights"),
        ({"policy_pth": as_pth([1, 2])}, "something other than tensors"),
        ({"policy_pth": as_pth({"weight": 1})}, "something other than tensors"),
        ({"policy_pth": as_pth({"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan])})}, "not finite: b"),
    ],
)
def test_saved_model__broken_content__is_a_record_error(members: dict[str, Any], words: str, saved: Path) -> None:
    with pytest.raises(RecordError, match=rf"ppo\.zip: cannot be read: .*{words}.*model\.save\(\) writes"):
        SavedModel.read(changed(saved, **members))


@pytest.mark.parametrize("content", [None, b"", b"no archive"])
def test_saved_model__no_archive__is_a_record_error(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "ppo.zip"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecordError, match=r"ppo\.zip: cannot be read: .*(No such file|not a zip file)"):
        SavedModel.read(path)


def test_saved_model__archive_cut_short__is_a_record_error(saved: Path) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: len(content) // 2])
    with pytest.raises(RecordError, match="not a zip file"):
        SavedModel.read(saved)


def test_saved_model__of_another_environment__is_a_record_error(tmp_path: Path) -> None:
    PPO("MlpPolicy", gym.make("CartPole-v1"), device="cpu").save(tmp_path / "cart.zip")
    with pytest.raises(RecordError, match="for a model of this environment"):
        SavedModel.read(tmp_path / "cart.zip")


def test_saved_model__other_action_space__is_a_record_error(saved: Path) -> None:
    space = {":type:": str(type(spaces.MultiDiscrete([2]))), ":serialized:": ""}
    with pytest.raises(RecordError, match="missing: MultiDiscrete"):
        SavedModel.read(changed(saved, data=notes(saved, action_space=space, policy_kwargs={})))


def test_saved_model__policy_that_only_a_pickle_could_tell__says_what_to_do(tmp_path: Path) -> None:
    model = PPO("MlpPolicy", toy_env(), policy_kwargs={"activation_fn": torch.nn.SiLU, **SMALL}, device="cpu")
    model.save(tmp_path / "ppo.zip")
    with pytest.raises(RecordError, match=r"made with activation_fn=.*SiLU.*--agent my_module:model"):
        SavedModel.read(tmp_path / "ppo.zip")
