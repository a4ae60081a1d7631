"""Agents by name: what the command line and the benchmark take."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raise_env.errors import SettingError, suggestion

from .base import Agent

__all__ = ["AGENTS", "agent_name", "load_selector", "make_agent"]

#: The agents that have a name of their own, and where they live.
AGENTS = {
    "random": "baselines:RandomAgent",
    "full": "baselines:FullAgent",
    "ifd": "baselines:IfdAgent",
    "quality": "baselines:QualityAgent",
    "deita": "baselines:DeitaAgent",
    "self_paced": "baselines:SelfPacedAgent",
    "loss_high": "baselines:HighLossAgent",
    "loss_low": "baselines:LowLossAgent",
    "diversity": "baselines:DiversityAgent",
    "greedy": "baselines:GreedyAgent",
    "less": "influence:LessAgent",
    "greats": "influence:GreatsAgent",
    "oracle": "oracle:OracleAgent",
    "raise_ppo": "raise_ppo:RaisePpo",
    "raise_fork": "raise_fork:RaiseFork",
}

_FORMS = ("sb3:CLASS", "selector:DIR", "package.module:Class")


def make_agent(name: str, arguments: Mapping[str, Any] | None = None) -> Agent:
    """Return the agent that a name stands for.

    Args:
        name: One of `AGENTS`; "sb3:CLASS" for a class of stable-baselines3 or sb3-contrib; "selector:DIR" for a
            learned selector; "package.module:Class" for one's own.
        arguments: The agent's own settings.

    Raises:
        SettingError: There is no such agent, or it does not take such settings.
        RecordError: The selector's folder cannot be read.
    """
    kind, colon, rest = name.partition(":")
    if kind == "selector" and rest:
        return load_selector(rest)
    if kind == "sb3" and rest:
        from .sb3 import Sb3Agent

        return Sb3Agent(rest, **(arguments or {}))
    if name in AGENTS:
        module, _, entry = AGENTS[name].partition(":")
        return _build(getattr(importlib.import_module(f".{module}", __package__), entry), name, arguments)
    if colon and rest:
        return _build(_own_class(kind, rest, name), name, arguments)
    raise SettingError(f"unknown agent {name!r}: {suggestion(name, [*AGENTS, *_FORMS])}")


def load_selector(folder: str | Path) -> Agent:
    """Load a selector that `raise-env train` or an agent's `save` wrote; nothing in it is run.

    Args:
        folder: The selector's folder, or that of the run that holds it.

    Raises:
        RecordError: It is not a selector, or one for other features.
    """
    import json

    from .raise_fork import RaiseFork
    from .sb3 import Sb3Agent

    folder = Path(folder)
    if not (folder / "config.json").is_file() and (folder / "selector").is_dir():
        folder = folder / "selector"
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("agent", "")
    except (OSError, ValueError, AttributeError, RecursionError):
        kind = ""
    if str(kind).startswith("sb3"):
        return Sb3Agent.load(folder)
    return RaiseFork.load(folder)


def agent_name(name: str) -> str:
    """Return the short name under which an agent's results are listed."""
    return "selector" if name.startswith("selector:") else name


def _own_class(module: str, entry: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), entry)
    except (ImportError, AttributeError) as error:
        raise SettingError(f"agent {name!r} cannot be loaded: {error}. Expected an importable module:Class.") from error


def _build(factory: Any, name: str, arguments: Mapping[str, Any] | None) -> Agent:
    try:
        agent = factory(**(arguments or {}))
    except TypeError as error:
        raise SettingError(f"agent {name!r} does not take these settings: {error}.") from error
    if not isinstance(agent, Agent):
        raise SettingError(f"agent {name!r} has no predict(observation, ...); expected one, as Stable-Baselines3's.")
    return agent
