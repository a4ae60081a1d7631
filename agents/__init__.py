"""Who acts in RaiseSelect-v0: selection policies, how they learn, and how they are compared."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Agent
    from .baselines import IfdAgent, RandomAgent
    from .catalogue import load_selector, make_agent
    from .oracle import OracleAgent
    from .raise_fork import RaiseFork
    from .raise_ppo import RaisePpo
    from .rollout import run_episode
    from .sb3 import Sb3Agent, SubsetPolicy
    from .sb3_vector import StackedVecEnv
    from .subset import SubsetLaw

__all__ = [
    "Agent",
    "IfdAgent",
    "OracleAgent",
    "RaiseFork",
    "RaisePpo",
    "RandomAgent",
    "Sb3Agent",
    "StackedVecEnv",
    "SubsetLaw",
    "SubsetPolicy",
    "load_selector",
    "make_agent",
    "run_episode",
]

_HOMES = {
    "Agent": "base",
    "IfdAgent": "baselines",
    "OracleAgent": "oracle",
    "RaiseFork": "raise_fork",
    "RaisePpo": "raise_ppo",
    "RandomAgent": "baselines",
    "Sb3Agent": "sb3",
    "StackedVecEnv": "sb3_vector",
    "SubsetLaw": "subset",
    "SubsetPolicy": "sb3",
    "load_selector": "catalogue",
    "make_agent": "catalogue",
    "run_episode": "rollout",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
