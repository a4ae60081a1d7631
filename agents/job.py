"""One run of a benchmark: an entry learns and makes a final run, and what that came to and cost.

Everything in a run follows from its `Job`, and it computes in one thread: wherever and whenever it is made, its numbers
are the same. What it leaves goes back to whoever asked for it as plain data, for that may be another machine.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from raise_env import RaiseSelectEnv
from raise_env.errors import RaiseEnvError
from raise_env.files import scratch_folder
from raise_env.lazy import FeatureUse
from raise_env.record import EpisodeRecord
from raise_env.side_by_side import one_thread

from .catalogue import make_agent, selector_digest, source_digest
from .rollout import run_episode
from .runs import FINAL_SEED, Clock, final_environment, final_scores, hardware_name, phi_tokens, without_test
from .summary import PARTS, SHARES

__all__ = ["OWN_TASK", "Entry", "Job", "Outcome", "check_line", "failed", "run_job"]

#: The name in the results of a pool of one's own, which is no embedded task.
OWN_TASK = "own"

#: Agents that look at neither the observation nor the pool's features; others may say so by `uses_features = False`.
_WITHOUT_FEATURES = frozenset(
    {"random", "full", "quality", "oracle", "self_paced", "loss_high", "loss_low", "greedy", "less", "greats"}
)

#: What a line of results.jsonl says of the cost.
COSTS = ("phi", "phi_parts", "tokens", "seconds")
_BY_PART = ("phi_parts", "tokens", "seconds")

#: How far Phi may be from the sum of its parts, as a share: what adding them in another order makes.
_SUM_TOLERANCE = 1e-6

#: The numbers of a line of results.jsonl, and those of them that every run has that did not fail.
_FIELDS = (
    "dev_loss",
    "test_loss",
    *SHARES,
    "diverged",
    "diverged_episodes",
    *COSTS,
    "episode_returns",
    "rows",
    "updates",
)
_NEEDED = ("phi", "phi_parts", "seconds")
_KNOWN = ("dev_loss", "test_loss", "diverged", "error")

#: The parts that costs are told by; features have no seconds in files of old.
_PARTS_OF = {"phi_parts": set(PARTS), "seconds": set(PARTS) - {"features"}, "tokens": set(PARTS)}

#: No number of a run is larger; means and squares of what is not are finite.
_LARGEST = 1e100


@dataclass(frozen=True, slots=True)
class Entry:
    """Who takes part, and how: a row of the results.

    Attributes:
        agent: The agent's name.
        arguments: Its own settings.
        episodes: Episodes to learn for, if it learns.
        settings: Environment keywords of this row alone.
    """

    agent: str
    arguments: dict[str, Any] = field(default_factory=dict)
    episodes: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the entry as run.json keeps it; of what has learned, and of one's own code, also which it is.

        Raises:
            RaiseEnvError: The selector cannot be read, or there is no such agent.
        """
        digests = {"selector": selector_digest(self.agent, self.arguments), "source": source_digest(self.agent)}
        return {**asdict(self), **{name: digest for name, digest in digests.items() if digest is not None}}


@dataclass(frozen=True, slots=True)
class Job:
    """One run: an entry learns and makes a final run, on one task with one seed.

    Attributes:
        task: The task's name.
        label: The entry's name.
        seed: What the adapter, the agent's learning and the candidates are drawn from.
        entry: Who learns and acts.
        settings: The environment's keywords, all of them.
    """

    task: str
    label: str
    seed: int
    entry: Entry
    settings: dict[str, Any]

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells runs apart."""
        return self.task, self.label, self.seed


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run leaves.

    Attributes:
        line: Its line of results.jsonl.
        record: Its final run; None where it failed.
        selector: What was learned: the files of its folder, by name.
    """

    line: dict[str, Any]
    record: EpisodeRecord | None = None
    selector: dict[str, bytes] = field(default_factory=dict)


def run_job(job: Job) -> Outcome:
    """Make one run and return what it leaves; of one that failed, the reason."""
    try:
        with one_thread():
            outcome = _run(job)
            _check_writable(outcome)
    except Exception as error:
        # An agent may be anyone's code, and one that fails is a result like any other: the rest goes on.
        return failed(job, _reason(error))
    return outcome


def failed(job: Job, reason: str) -> Outcome:
    """Return what a run leaves that came to nothing."""
    return Outcome(_line(job, error=reason))


def _check_writable(outcome: Outcome) -> None:
    """Refuse what could not be written or read again: an agent's own numbers, such as its returns, may be anything."""
    check_line(outcome.line)
    if outcome.record is not None:
        outcome.record.to_json()


def _run(job: Job) -> Outcome:
    env = RaiseSelectEnv(**job.settings)
    agent: Any = make_agent(job.entry.agent, job.entry.arguments)
    costs: dict[str, tuple[float, int]] = {}
    selector: dict[str, bytes] = {}
    use = FeatureUse(env.assets.features)
    env.reset(seed=job.seed)
    clock = Clock(env)
    if job.entry.episodes and hasattr(agent, "learn"):
        world = without_test(env)
        world.reset(seed=job.seed)
        agent.learn(world, job.entry.episodes, seed=job.seed)
        selector = _saved(agent)
    seconds, tokens, divergences = clock.lap()
    costs["learning"] = seconds, tokens
    env = final_environment(env, agent)
    env.reset(seed=job.seed)
    clock = Clock(env)
    if hasattr(agent, "prepare"):
        agent.prepare(env, job.seed)
    costs["preparation"] = clock.lap()[:2]
    record = run_episode(env, agent, seed=FINAL_SEED + job.seed, name=job.label)
    costs["final"] = clock.lap()[:2]
    costs["features"] = use.cost() if _uses_features(agent, job.entry.agent) else (0.0, 0)
    line = _line(
        job,
        **_scores(record, env),
        **_cost(costs, phi_tokens(env)),
        diverged_episodes=divergences,
        episode_returns=_returns(agent),
        rows=len({row for step in record.actions for row in step}),
        updates=sum(bool(step) for step in record.actions),
        hardware=hardware_name(env),
    )
    return Outcome(line, record, selector)


def _returns(agent: Any) -> list[float] | None:
    """Return what the episodes brought that an agent learned from, where it keeps that."""
    returns = getattr(agent, "episode_returns", None)
    return [float(value) for value in returns] if returns else None


def _saved(agent: Any) -> dict[str, bytes]:
    """Return what an agent saves, if it does."""
    if not hasattr(agent, "save"):
        return {}
    with scratch_folder() as beside:
        folder = beside / "selector"
        agent.save(folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _cost(costs: Mapping[str, tuple[float, int]], tokens_per_phi: int) -> dict[str, Any]:
    """Return the cost of each part, seconds and token forwards, in the terms of results.jsonl."""
    tokens = {part: costs[part][1] for part in PARTS}
    phi = {part: count / tokens_per_phi for part, count in tokens.items()}
    seconds = {part: costs[part][0] for part in PARTS}
    return {"phi": sum(phi.values()), "phi_parts": phi, "tokens": tokens, "seconds": seconds}


def _scores(record: EpisodeRecord, env: RaiseSelectEnv) -> dict[str, Any]:
    diverged = record.diverged
    scores = final_scores(record, env)
    return {
        "dev_loss": None if diverged else env.evaluate("dev").loss,  # also where the reward is something else
        "test_loss": scores.get("test_loss"),
        **{name: scores.get(name) for name in SHARES},
        "diverged": diverged,
    }


def _line(job: Job, **values: Any) -> dict[str, Any]:
    """Return a line of results.jsonl; what is not given is null."""
    empty = dict.fromkeys((*_FIELDS, "hardware", "error"))
    return {"task": job.task, "agent": job.label, "seed": job.seed, **empty, **values}


def check_line(line: Any) -> None:
    """Check that a line of anyone's results.jsonl has the form that `run_job` gives it.

    Raises:
        ValueError: A field is missing, or holds something else; a cost is below 0, or Phi not the sum of its parts.
    """
    if not isinstance(line, dict):
        raise ValueError("it is no object")
    for name, kind in (("task", str), ("agent", str), ("seed", int)):
        if not isinstance(line.get(name), kind) or isinstance(line[name], bool):
            raise ValueError(f"the field {name!r} is {str(line.get(name))[:60]!r}")
    if line.get("error") is not None:
        if not isinstance(line["error"], str):
            raise ValueError(f"the field 'error' is {str(line['error'])[:60]!r}")
        return
    lacking = [name for name in _NEEDED if line.get(name) is None] + [name for name in _KNOWN if name not in line]
    if lacking:
        raise ValueError(f"it lacks the field {lacking[0]!r}")
    if not isinstance(line.get("hardware"), (str, NoneType)):
        raise ValueError(f"the field 'hardware' is {str(line['hardware'])[:60]!r}")
    for name in _FIELDS:
        value = line.get(name)
        numbers: list[Any] = [value]
        if name in _BY_PART and isinstance(value, dict) and set(value) >= _PARTS_OF.get(name, set()):
            numbers = list(value.values())
        elif name == "episode_returns" and isinstance(value, list):
            numbers = value
        elif value is None or (name in _BY_PART and value is not None):
            numbers = [] if value is None else [None]
        if not all(map(_is_number, numbers)) or (name in COSTS and any(number < 0 for number in numbers)):
            raise ValueError(f"the field {name!r} is {str(value)[:60]!r}")
    total = sum(line["phi_parts"].values())
    if not math.isclose(line["phi"], total, rel_tol=_SUM_TOLERANCE):
        raise ValueError(f"the field 'phi' is {line['phi']}, and its parts add up to {total}")


def _is_number(value: object) -> bool:
    """Return whether a value is a number that can be reckoned with; a truth value counts as one."""
    return isinstance(value, (int, float)) and abs(value) <= _LARGEST


def _reason(error: Exception) -> str:
    """Return what went wrong: a message made for users as it is, anything else with the place that raised it."""
    if isinstance(error, RaiseEnvError) and str(error):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"


def _uses_features(agent: object, name: str) -> bool:
    return bool(getattr(agent, "uses_features", name.partition(":")[0] not in _WITHOUT_FEATURES))
