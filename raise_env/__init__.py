"""Instruction selection during fine-tuning as a Gymnasium environment.

Importing this package registers `RaiseSelect-v0`, and an id for each family of embedded tasks, and loads nothing
heavy: models and libraries come with the first reset, and the names below when they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from .config import ENV_IDS
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

for _id, _task in ENV_IDS.items():
    gym.register(
        id=_id,
        entry_point="raise_env.env:RaiseSelectEnv",
        vector_entry_point="raise_env.vector:RaiseSelectVectorEnv",
        kwargs={} if _task == "default" else {"task": _task},
    )


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
