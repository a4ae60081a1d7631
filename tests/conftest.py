"""What the tests share: a cache of their own, the small embedded environment, and the real data beside the project."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Read when the hub's library is imported: a test that needs the hub says so by its marker and undoes this.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from raise_env.env import RaiseSelectEnv
from raise_env.pool import draw_candidates
from raise_env.testing import ToyAssets

EmbeddedEnv = Callable[..., RaiseSelectEnv]


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of computed features: new in every session, so that no test passes by what an older one left."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("RAISE_ENV_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def small_settings() -> dict[str, Any]:
    """Settings of the embedded environment that make it small, with something left to do for every part of it."""
    return {
        "pool_size": 64,
        "num_candidates": 16,
        "num_classes": 2,
        "batch_size": 4,
        "horizon": 3,
        "budget": 48,
        "num_dev": 8,
        "num_test": 8,
        "auxiliary_updates": 2,
    }


@pytest.fixture(scope="session")
def embedded_env(small_settings: dict[str, Any]) -> EmbeddedEnv:
    """Return a function that makes a small environment of the embedded model; they all share one base."""

    def make(**settings: Any) -> RaiseSelectEnv:
        return RaiseSelectEnv(**{**small_settings, **settings})

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Return a function that writes a file, byte by byte as given, and returns its path."""

    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "models").is_dir():
        pytest.skip(f"real models and data are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def base(embedded_env: EmbeddedEnv) -> Any:
    """The embedded base model with its LoRA layers."""
    return embedded_env().assets.learner.base


#: Agents that use the hooks of final runs and of learning.
OWN_AGENT = """
import numpy as np
from raise_env.agents.baselines import RandomAgent
from raise_env.agents.base import world_of

class Prepares(RandomAgent):
    calls = []
    def prepare(self, env, seed):
        self.calls.append(seed)
        world_of(env).row_losses([0, 1, 2])

class OwnRuns(RandomAgent):
    worlds = []
    def run_settings(self, config, num_rows):
        return {"num_candidates": "all", "horizon": config.horizon - 1, "budget": num_rows // 8, **self.more}
    def begin(self, env, seed):
        super().begin(env, seed)
        self.worlds.append(env)
    more = {}

class OwnRate(OwnRuns):
    worlds = []
    more = {"learning_rate": 1e-3}

class Learns(RandomAgent):
    def learn(self, env, episodes, seed=0, progress=None):
        for episode in range(episodes):
            env.reset(seed=seed + episode)
            env.probe(np.eye(16)[:4])
            env.step(np.eye(16)[0])
        return self


class Watches(RandomAgent):
    infos = []

    def learn(self, env, episodes, seed=0, progress=None):
        env.reset(seed=seed)
        for _ in range(env.unwrapped.config.horizon):
            self.infos.append(env.step(np.eye(16)[0])[4])
        return self
"""


@pytest.fixture
def own_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the user's own with such agents."""
    (tmp_path / "own_agent.py").write_text(OWN_AGENT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_agent", raising=False)
    return importlib.import_module("own_agent")


@pytest.fixture
def rare_class(monkeypatch):
    """Let some of the last class be offered, now more and now fewer: so it is with lazy features and a rare class."""

    def draw(assets, num_candidates, rng):
        candidates, classes = draw_candidates(assets.members, num_candidates, rng)
        candidates[rng.integers(num_candidates * 3 // 4, num_candidates) :] = -1
        return candidates, classes

    monkeypatch.setattr(ToyAssets, "draw", draw)
