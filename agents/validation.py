"""What `validate` does: make recorded episodes again, and hold a benchmark's results against its records.

A record that was tampered with is found by replaying it: another reward, score or action gives other numbers, other
rows or weights another content hash. A line of results.jsonl is found by its record, which it must agree with, and a
line that was taken out by the record that is left.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from raise_env.config import EnvConfig
from raise_env.errors import RaiseEnvError, RecordError
from raise_env.foreign_files import check_inside, numbered_lines, parse_json
from raise_env.record import TOLERANCE, Difference, EpisodeRecord, made_again, read_records
from raise_env.side_by_side import one_thread

from .findings import shares_adapter
from .job import OWN_TASK, check_line
from .run_folder import read_json
from .runs import FINAL_SEED, PHI_EPOCHS
from .spread import spread
from .summary import PARTS

__all__ = [
    "Recorded",
    "Replayed",
    "by_record",
    "check_cost",
    "check_results",
    "is_of_audit",
    "read_bench",
    "read_recorded",
    "replay_all",
]


#: How far one number may be from another, as a share, that is the same but for the order of sums.
_SAME_SHARE = 1e-6


@dataclass(frozen=True, slots=True)
class Recorded:
    """A record, and where it stands: "FILE, record N"."""

    where: str
    record: EpisodeRecord

    @property
    def key(self) -> tuple[str, str, int]:
        """Task, agent and seed of the benchmark's run that it would be of."""
        kwargs = self.record.env["kwargs"]
        task = OWN_TASK if "pool" in kwargs else kwargs.get("task", EnvConfig().task)
        return task, self.record.agent, self.record.seed - FINAL_SEED

    def __str__(self) -> str:
        return f"{self.where} ({self.record.agent}, seed {self.record.seed})"


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of making an episode again.

    Attributes:
        recorded: Which.
        difference: The first thing that was not as recorded, or None.
        distance: The largest of any number from the recorded one.
        tokens: Token forwards of its steps; whoever chose them may have taken more.
        tokens_per_phi: Those of one Phi there.
    """

    recorded: Recorded
    difference: Difference | None
    distance: float
    tokens: int
    tokens_per_phi: int


@dataclass(frozen=True, slots=True)
class _Replay:
    recorded: Recorded
    tolerance: float
    dev_loss: float | None
    overrides: dict[str, Any] = field(default_factory=dict)
    in_one_thread: bool = False


def read_recorded(path: Path) -> list[Recorded]:
    """Return a file's records.

    Raises:
        RecordError: It cannot be read, holds none, or a line is no record.
    """
    return [Recorded(f"{path}, record {n}", record) for n, record in enumerate(read_records(path), start=1)]


def replay_all(
    recorded: Sequence[Recorded],
    lines: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    *,
    tolerance: float = TOLERANCE,
    device: str = "auto",
    reward: str | None = None,
    allowed: Collection[str] = (),
    workers: int | None = None,
    in_one_thread: bool = False,
) -> Iterator[Replayed]:
    """Make recorded episodes again, those of one environment after each other: they share what is loaded.

    Args:
        recorded: What to replay.
        lines: Lines of results, as `by_record` gives them: a dev loss that their record does not tell is compared too.
        tolerance: How far a number may be from the recorded one, as a share of the score.
        device: Where to replay.
        reward: The reward function that records may run, "module:function".
        allowed: What records may open, as for `raise_env.record.replay`.
        workers: Processes side by side.
        in_one_thread: Compute as a benchmark's runs do, so that their numbers are equal to the bit.

    Raises:
        RecordError: A record asks for a function or a file that it is not allowed.
        RaiseEnvError: An environment cannot be made here.
    """
    in_order = sorted(recorded, key=lambda own: json.dumps(own.record.env, sort_keys=True))
    pieces = []
    for own in in_order:
        known = {"reward": reward} if reward is not None and own.record.env["kwargs"].get("reward") == reward else {}
        overrides = {"device": device, "allowed": tuple(allowed), **known}
        dev_loss = None if _tells_dev_loss(own.record) else lines.get(own.where, {}).get("dev_loss")
        pieces.append(_Replay(own, tolerance, dev_loss, overrides, in_one_thread or workers not in (None, 1)))
    yield from spread(_replay, pieces, workers)


def _replay(piece: _Replay) -> Replayed:
    own = piece.recorded
    with one_thread() if piece.in_one_thread else nullcontext():
        again = made_again(own.record, piece.tolerance, dev_loss=piece.dev_loss, **piece.overrides)
    return Replayed(own, again.difference, again.distance, again.tokens, PHI_EPOCHS * 3 * again.pool_tokens)


def _read_results(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a results.jsonl.

    Raises:
        RecordError: It cannot be read, or a line is not what a run leaves.
    """
    lines = []
    try:
        for number, text in numbered_lines(path):
            try:
                line = parse_json(text)
                check_line(line)
            except ValueError as error:
                raise RecordError(f"{path}, line {number}: {error}; expected what a run of `bench` left.") from error
            lines.append(line)
    except (OSError, ValueError) as error:
        if isinstance(error, RaiseEnvError):
            raise
        raise RecordError(f"{path}: cannot be read ({error}); expected the results of a benchmark.") from error
    return lines


def read_bench(folder: Path) -> tuple[list[dict[str, Any]], list[Recorded]]:
    """Return the lines and the records of a benchmark's folder.

    Raises:
        RecordError: One of the two files cannot be read, or is a link to elsewhere.
    """
    results, episodes = folder / "results.jsonl", folder / "episodes.jsonl"
    if not results.exists():
        within = [path for path in (episodes, folder / "runs", folder / "noise") if path.exists()]  # of other commands
        hint = f" There is {' and '.join(map(str, within))}, which `validate` takes by name." if within else ""
        raise RecordError(f"{results} is not there; expected the folder of a benchmark.{hint}")
    for path in (results, episodes):
        try:
            check_inside(path, folder)
        except ValueError as error:
            raise RecordError(f"{path}: {error}; expected a file of the folder itself.") from error
    return _read_results(results), read_recorded(episodes)


def is_of_audit(folder: Path) -> bool:
    """Return whether a benchmark's folder says that it is one of the two within an audit's.

    Raises:
        RecordError: Its run.json cannot be read.
    """
    path = folder / "run.json"
    return path.exists() and read_json(path).get("command") == "audit"


def check_results(
    lines: Sequence[Mapping[str, Any]], recorded: Sequence[Recorded], *, of_audit: bool = False
) -> dict[tuple[str, str, int], str]:
    """Return what is wrong with each run, by task, agent and seed; runs that stand are left out.

    Nothing is replayed: a line stands if it is the only one of its run, and there is one record of it, which says what
    the line says. A run that failed has a line and no record.

    Args:
        lines: Of results.jsonl; those of failed runs need no record.
        recorded: Of episodes.jsonl.
        of_audit: Whether they are of an audit, whose runs of noise differ in one thing: by their names they begin from
            the adapter of seed 0. All other runs begin from that of their own seed.
    """
    records: dict[tuple[str, str, int], list[Recorded]] = {}
    for own in recorded:
        records.setdefault(own.key, []).append(own)
    faults: dict[tuple[str, str, int], str] = {}
    counts, done = Counter(map(_key, lines)), {_key(line): line for line in lines if line.get("error") is None}
    for key, line in done.items():
        found = records.get(key, [])
        if counts[key] != 1:
            faults[key] = f"{counts[key]} lines; expected one"
        elif len(found) != 1:
            faults[key] = f"{len(found)} records; expected one"
        else:
            begins_from = 0 if of_audit and shares_adapter(line["agent"]) else line["seed"]
            fault = _disagreement({**line, "seed": begins_from}, found[0].record)
            if fault is not None:
                faults[key] = f"{fault} ({found[0].where})"
    for key, found in records.items():
        if key not in done:
            faults[key] = (
                f"no line without an error; expected one, as there is a record ({found[0].where}). If the benchmark "
                "was interrupted, --resume makes that run again"
            )
    return faults


def by_record(lines: Iterable[Mapping[str, Any]], recorded: Iterable[Recorded]) -> dict[str, Mapping[str, Any]]:
    """Return the line of results of each record that has one, by where the record stands."""
    by_key = {_key(line): line for line in lines if line.get("error") is None}
    return {own.where: by_key[own.key] for own in recorded if own.key in by_key}


def check_cost(line: Mapping[str, Any], replayed: Replayed) -> str | None:
    """Return what is wrong with the cost that a line of results claims, or None: it is at least that of the replay.

    What learning and preparation cost, and what anything cost in seconds, no record tells.
    """
    for name in ("phi_parts", "tokens", "seconds"):
        unknown = sorted(set(line.get(name) or {}) - set(PARTS))
        if unknown:
            return f"{name} has the part {unknown[0]!r}; expected {', '.join(PARTS)}"
    tokens = line.get("tokens") or {part: phi * replayed.tokens_per_phi for part, phi in line["phi_parts"].items()}
    for part, phi in line["phi_parts"].items():
        expected = tokens[part] / replayed.tokens_per_phi
        if not math.isclose(phi, expected, rel_tol=_SAME_SHARE):
            return f"phi of {part} is {phi}; its tokens make {expected}"
    if tokens["final"] < replayed.tokens * (1 - _SAME_SHARE):
        return f"tokens of the final run are {tokens['final']:.0f}; making its steps again took {replayed.tokens}"
    return None


def _key(line: Mapping[str, Any]) -> tuple[str, str, int]:
    return line["task"], line["agent"], line["seed"]


def _disagreement(line: Mapping[str, Any], record: EpisodeRecord) -> str | None:
    """Return the first thing in which a line of results does not say what its record says, or None."""
    kwargs, final = record.env["kwargs"], record.final
    said: dict[str, Any] = {"seed": kwargs.get("seed_model", EnvConfig().seed_model)}
    said |= {"rows": len({row for step in record.actions for row in step}), "updates": sum(map(bool, record.actions))}
    said |= {"diverged": record.diverged, "test_loss": final.get("test_loss")}
    shares = {
        "test_accuracy": final.get("test_accuracy", final.get("test_exact_match")),
        "test_choice_probability": final.get("test_choice_probability"),
    }
    said |= {name: value for name, value in shares.items() if line.get(name) is not None}
    if record.diverged:
        said["dev_loss"] = None
    elif _tells_dev_loss(record):
        said["dev_loss"] = -record.dev_scores[-1]
    for name, value in said.items():
        if line.get(name) != value:
            return f"{name} is {line.get(name)!r}; its record says {value!r}"
    if line["dev_loss"] is None and not record.diverged:
        return "dev_loss is None; expected a number, as the run did not diverge"
    return None


def _tells_dev_loss(record: EpisodeRecord) -> bool:
    """Return whether a record's scores are dev losses; elsewhere only a replay tells them."""
    return bool(record.env["kwargs"].get("reward", EnvConfig().reward) == "loss")
