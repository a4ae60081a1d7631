"""Instruction selection during fine-tuning as a Gymnasium environment.

Importing this package registers `RaiseSelect-v0` and loads nothing heavy: models and libraries come with the
first reset, and the names below when they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from .version import __version__

if TYPE_CHECKING:
    from .config import EnvConfig
    from .env import RaiseSelectEnv, Snapshot
    from .errors import RaiseEnvError
    from .rewards import Evaluation
    from .wrappers import PickOne, TopKScores

__all__ = [
    "EnvConfig",
    "Evaluation",
    "PickOne",
    "RaiseEnvError",
    "RaiseSelectEnv",
    "Snapshot",
    "TopKScores",
    "__version__",
]

_HOMES = {
    "EnvConfig": "config",
    "Evaluation": "rewards",
    "PickOne": "wrappers",
    "RaiseEnvError": "errors",
    "RaiseSelectEnv": "env",
    "Snapshot": "env",
    "TopKScores": "wrappers",
}

gym.register(
    id="RaiseSelect-v0",
    entry_point="raise_env.env:RaiseSelectEnv",
    vector_entry_point="raise_env.vector:RaiseSelectVectorEnv",
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
