"""Agents by name: what the command line and the benchmark take."""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from raise_env.config import REWARDS
from raise_env.errors import RecordError, SettingError, suggestion
from raise_env.foreign_files import read_json
from raise_env.rewards import load_reward

from .base import Agent
from .rollout import agents_code

__all__ = [
    "AGENTS",
    "FunctionAgent",
    "agent_name",
    "files_digest",
    "learning_episodes",
    "load_selector",
    "make_agent",
    "reward_digest",
    "selector_digest",
    "selector_folder",
    "source_digest",
]

#: The agents that have a name of their own, and where they live.
AGENTS = {
    "random": "baselines:RandomAgent",
    "full": "baselines:FullAgent",
    "ifd": "baselines:IfdAgent",
    "quality": "baselines:QualityAgent",
    "deita": "coverage:DeitaAgent",
    "self_paced": "online:SelfPacedAgent",
    "loss_high": "online:HighLossAgent",
    "loss_low": "online:LowLossAgent",
    "diversity": "coverage:DiversityAgent",
    "greedy": "online:GreedyAgent",
    "less": "influence:LessAgent",
    "greats": "influence:GreatsAgent",
    "oracle": "oracle:OracleAgent",
    "raise_ppo": "raise_ppo:RaisePpo",
    "raise_fork": "raise_fork:RaiseFork",
    "placebo": "placebo:PlaceboFork",
}

logger = logging.getLogger(__name__)

#: Episodes that an agent learns for which has no number of its own.
DEFAULT_EPISODES = 8

_FORMS = ("placebo:AGENT", "selector:DIR", "my_module:name")

#: What stands before a colon and is no module.
_KINDS = ("selector", "sb3", "placebo", "quality")

#: What an agent that does not learn may have.
_ACTING = ("predict", "action_space", "check", "begin", "prepare", "run_settings")


class FunctionAgent:
    """A plain function as an agent.

    Args:
        choose: Takes an observation, shape (rows, 39), and returns a 0/1 choice, shape (rows,).
        arguments: Keywords for every call.

    Raises:
        SettingError: The function cannot be called so.
    """

    def __init__(self, choose: Callable[..., np.ndarray], **arguments: Any) -> None:
        try:
            inspect.signature(choose).bind(None, **arguments)
        except (TypeError, ValueError) as error:  # a ValueError: some builtins do not tell what they take
            raise SettingError(
                f"{choose!r} cannot be called with an observation and the settings {arguments}: {error}."
            ) from error
        self._choose = choose
        self._arguments = arguments

    def predict(
        self,
        observation: np.ndarray,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,  # noqa: ARG002 (Stable-Baselines3's signature)
        deterministic: bool = True,  # noqa: ARG002
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return what the function chooses; `state` is passed through."""
        return self._choose(observation, **self._arguments), state


def make_agent(name: str, arguments: Mapping[str, Any] | None = None) -> Agent:
    """Return the agent that a name stands for.

    Args:
        name: One of `AGENTS`; "quality:COLUMN"; "sb3:CLASS" for a class of stable-baselines3 or sb3-contrib;
            "placebo:AGENT" for one that learns from rewards that are not its own; "selector:DIR" for a learned
            selector; "my_module:name" for one's own: a class, an object with `predict`, or a function as for
            `FunctionAgent`.
        arguments: The agent's own settings.

    Raises:
        SettingError: There is no such agent, or it does not take such settings.
        AgentError: One's own module or class failed while it was loaded or built.
        RecordError: The selector's folder cannot be read.
    """
    arguments = arguments or {}
    kind, _, rest = name.partition(":")
    if kind == "selector" and rest:
        if arguments:
            raise SettingError(
                f"agent {name!r} brings the settings that it learned with and takes no others; got "
                f"{', '.join(arguments)}. Leave them out, or let a new agent learn with them."
            )
        return load_selector(rest)
    if kind == "sb3" and rest:
        from .sb3 import Sb3Agent

        return _build(Sb3Agent, name, {"algorithm": rest, **arguments})
    if kind == "placebo" and rest:
        return _placebo(rest, arguments)
    if kind == "quality" and rest:
        return make_agent("quality", {"column": rest, **arguments})
    if name in AGENTS:
        module, _, entry = AGENTS[name].partition(":")
        return _build(getattr(importlib.import_module(f".{module}", __package__), entry), name, arguments)
    if kind and rest:
        return _own_agent(name, arguments)
    raise SettingError(f"unknown agent {name!r}: {suggestion(name, _known_names())}")


def _placebo(name: str, arguments: Mapping[str, Any]) -> Agent:
    """Return the agent of that name, learning from rewards that are not its own."""
    from .placebo import Placebo

    # What it learns from is no reward of steps.
    return make_agent("placebo", arguments) if name == "raise_fork" else Placebo(make_agent(name, arguments))


def learning_episodes(name: str, arguments: Mapping[str, Any] | None = None) -> int:
    """Return for how many episodes an agent learns where nobody says: 0 for a selector that has learned, or none does.

    Args:
        name: As for `make_agent`.
        arguments: As for `make_agent`.

    Raises:
        RaiseEnvError: As `make_agent`.
    """
    if name.startswith("selector:"):
        return 0
    agent = make_agent(name, arguments)
    return int(getattr(agent, "default_episodes", DEFAULT_EPISODES)) if hasattr(agent, "learn") else 0


def load_selector(folder: str | Path) -> Agent:
    """Load a selector that `raise-env train` or an agent's `save` wrote; nothing in it is run.

    Args:
        folder: The selector's folder, or that of the run that holds it.

    Raises:
        RecordError: It is not a selector, or one for other features.
    """
    from .raise_fork import RaiseFork
    from .raise_ppo import RaisePpo
    from .sb3 import Sb3Agent

    folder = selector_folder(folder)
    try:
        kind = read_json(folder / "config.json").get("agent", "")
    except (OSError, ValueError, AttributeError):
        kind = ""  # whoever reads it says what is wrong with it
    if str(kind).startswith("sb3"):
        return Sb3Agent.load(folder)
    return RaisePpo.load(folder) if kind == "raise_ppo" else RaiseFork.load(folder)


def selector_folder(folder: str | Path) -> Path:
    """Return the selector's own folder, given that or the folder of the run that learned it."""
    folder = Path(folder)
    is_run = not (folder / "config.json").is_file() and (folder / "selector").is_dir()
    return folder / "selector" if is_run else folder


def selector_digest(name: str, arguments: Mapping[str, Any] | None = None) -> str | None:
    """Return a short digest of the files that an agent has learned by, which tells it from others; else None.

    These are those of "selector:DIR", and what an "sb3:CLASS" is to `load`.

    Args:
        name: As for `make_agent`.
        arguments: As for `make_agent`.

    Raises:
        RecordError: A file cannot be read.
    """
    kind, _, rest = name.removeprefix("placebo:").partition(":")
    load = (arguments or {}).get("load")
    try:
        if kind == "selector":
            folder = selector_folder(rest)
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            return files_digest((path.relative_to(folder).as_posix(), path) for path in files)
        if kind == "sb3" and load is not None:
            return files_digest([(Path(load).name, Path(load))])
    except OSError as error:
        raise RecordError(f"agent {name!r}: what it has learned cannot be read ({error}).") from error
    return None


def source_digest(name: str) -> str | None:
    """Return a short digest of the code of an agent of one's own, "my_module:name"; None for all others.

    It is of the file of the module, and of that which defines the class or function, where it is another. What these
    import is not in it.

    Raises:
        RaiseEnvError: As `make_agent`, where there is no such agent.
    """
    own = name.removeprefix("placebo:")
    module, _, entry = own.partition(":")
    is_ours = own in AGENTS or module in _KINDS or module.partition(".")[0] == __name__.partition(".")[0]
    return None if is_ours or not (module and entry) else _code_digest(module, _imported(own))


def reward_digest(reward: str) -> str | None:
    """Return the same of the code of a reward of one's own, "my_module:function"; None for all others.

    Raises:
        RewardError: There is no such function.
    """
    if reward in REWARDS:
        return None
    load_reward(reward)
    module, _, entry = reward.partition(":")
    return _code_digest(module, getattr(sys.modules[module], entry))


def _code_digest(module: str, found: Any) -> str | None:
    """Return a digest of the files of a module and of what was found in it; None where there are none to read."""
    kind = found if isinstance(found, type) or inspect.isfunction(found) else type(found)
    files = dict.fromkeys(path for thing in (sys.modules[module], kind) if (path := _source_file(thing)) is not None)
    return files_digest((path.name, path) for path in files) if files else None


def files_digest(files: Iterable[tuple[str, Path]]) -> str:
    """Return a short digest of some files, each with the name that it counts under.

    Raises:
        OSError: One cannot be read.
    """
    digest = hashlib.sha256()
    for name, path in files:
        with path.open("rb") as file:
            digest.update(f"{name}\0".encode())
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def agent_name(name: str) -> str:
    """Return the short name under which an agent's results are listed."""
    return "selector" if name.startswith("selector:") else name


def _known_names() -> list[str]:
    """Return every name that `make_agent` takes."""
    from .sb3 import PRESETS

    return [*AGENTS, *(f"sb3:{algorithm}" for algorithm in PRESETS), *_FORMS]


def _own_agent(name: str, arguments: Mapping[str, Any]) -> Agent:
    """Return what a module of the user's own calls by that name, made into an agent."""
    found = _imported(name)
    if isinstance(found, type):
        return _build(found, name, arguments)
    if not callable(getattr(found, "predict", None)):
        if not callable(found):
            raise SettingError(
                f"agent {name!r} is {type(found).__name__}, which has no predict(observation, ...); expected a class "
                "or an object that has, as Stable-Baselines3's models do, or a function that chooses."
            )
        return _build(FunctionAgent, name, {"choose": found, **arguments})
    if arguments:
        raise SettingError(
            f"agent {name!r} is there already, built by its module, and takes no settings; got "
            f"{', '.join(arguments)}. Set them in the module, or name the class instead."
        )
    return _acting(found, name)


def _acting(found: Any, name: str) -> Agent:
    """Return the agent; without its `learn` where that is another's, as that of SB3's models, which counts steps.

    One that learns is a copy: what it learned in one run must not be there in the next. One that cannot be copied, as
    it has learned already and holds on to its environment, acts as it is.
    """
    learn = getattr(found, "learn", None)
    if learn is None:
        return cast(Agent, found)
    acting = SimpleNamespace(**{part: getattr(found, part) for part in _ACTING if hasattr(found, part)})
    try:
        inspect.signature(learn).bind(None, 1, seed=0, progress=None)
    except TypeError:
        return cast(Agent, acting)
    try:
        return cast(Agent, copy.deepcopy(found))
    except Exception as error:  # whatever the object's own code raises
        message = (
            "agent %r cannot be copied (%s), so it acts as it is and does not learn: name its class to have it learn"
        )
        logger.warning(message, name, error)
        return cast(Agent, acting)


def _imported(name: str) -> Any:
    module, _, entry = name.partition(":")
    where = "the working folder and the installed packages"
    hint = f" Leave out the ending: {module.removesuffix('.py')}:{entry}." if module.endswith(".py") else ""
    with agents_code(f"agent {name!r}, importing {module!r}"):
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # the module is there, and one that it imports is not
            raise SettingError(f"agent {name!r}: there is no module {error.name!r} in {where}.{hint}") from error
    if not hasattr(found, entry):
        names = [known for known in vars(found) if not known.startswith("_")]
        raise SettingError(f"agent {name!r}: the module {module!r} has no {entry!r}: {suggestion(entry, names)}")
    return getattr(found, entry)


def _source_file(thing: Any) -> Path | None:
    """Return the file that a module, class or function is written in; None where there is none to read."""
    try:
        path = inspect.getsourcefile(thing)
    except TypeError:  # it is built in
        return None
    return Path(path) if path is not None and Path(path).is_file() else None


def _build(factory: Callable[..., object], name: str, arguments: Mapping[str, Any]) -> Agent:
    """Return what the factory makes of the arguments, if it takes them and makes an agent."""
    known: list[str] = []
    try:
        signature = inspect.signature(factory)
        known = list(signature.parameters)
        signature.bind(**arguments)
    except (TypeError, ValueError) as error:  # a ValueError: some builtins do not tell what they take
        hint = f" Known: {', '.join(known)}." if known else ""
        raise SettingError(f"agent {name!r} does not take these settings: {error}.{hint}") from error
    with agents_code(f"agent {name!r}, building it"):
        agent = factory(**arguments)
    if not isinstance(agent, Agent):
        raise SettingError(f"agent {name!r} has no predict(observation, ...); expected one, as Stable-Baselines3's.")
    return agent
