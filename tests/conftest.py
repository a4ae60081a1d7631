"""What the tests share: a cache of their own, the small embedded environment, and the real data beside the project."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Read when the hub's library is imported: a test that needs the hub says so by its marker and undoes this.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from raise_env.env import RaiseSelectEnv

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
