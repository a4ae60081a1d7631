"""A run's folder and its run.json: what was asked for, how far it has come, and whether it may go on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import raise_env
from raise_env.errors import DataError, OutputError, RecordError, SettingError
from raise_env.files import clear_unfinished, clear_unfinished_beside, write_json
from raise_env.foreign_files import check_inside, check_regular, numbered_lines, parse_json
from raise_env.foreign_files import read_json as read_any_json
from raise_env.record import EpisodeRecord, versions

from .catalogue import files_digest

__all__ = ["RunFolder", "read_json", "whole_lines", "whole_records"]

RUN_VERSION = 1

#: What a piece of a run costs, each in `costs` by piece and in a field of its own in sum.
_KINDS_OF_COST = ("seconds", "phi_tokens", "divergences")

#: What runs leave that is added to, or gone on with: those that learn one selector, and all others.
_ONE_RUN = ("train", "finetune", "demo")
_OF_ONE = ("episodes.jsonl", "learning/steps.jsonl", "learning/episode-*")
_OF_MANY = ("results.jsonl", "episodes.jsonl", "rewards.jsonl")

#: What plans of old do not say, by the first or last part of its name.
_NOT_SAID_OF_OLD = ("selector", "selectors", "source", "sources")

#: What is said where one of those differs that are digests of code.
_CODE_HAS_CHANGED = (
    " A source is a digest of an agent's code, or a reward's: put that back as it was, or start anew elsewhere."
)

logger = logging.getLogger(__name__)


class RunFolder:
    """The folder of a command that takes long; as a context it notes how the work ended.

    Whoever has one holds the folder (`raise_env.files.held`).

    Attributes:
        folder: Where everything is written.
        state: What run.json holds.
    """

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        self.folder = folder
        self.state = state

    @classmethod
    def open(
        cls,
        folder: Path,
        command: str,
        plan: Mapping[str, Any],
        resume: bool,
        grown: Callable[[dict[str, Any]], dict[str, Any]] = lambda before: before,
    ) -> RunFolder:
        """Begin a run in a folder that is held, or go on with the one that is there.

        Args:
            folder: Where everything is written.
            command: The name of what is done.
            plan: What was asked for, as JSON.
            resume: Go on with a run of the same plan.
            grown: Returns what the earlier plan would be with what may have been added to it since.

        Raises:
            OutputError: The folder holds a run and `resume` is False, or what a run left without its run.json.
            RecordError: run.json cannot be read.
            SettingError: The run was begun with another plan, or by another command.
        """
        path = folder / "run.json"
        _refuse_results_alone(folder, command)
        if path.exists() and not resume:
            how = "" if command == "demo" else ", or add --resume to go on with it"  # a demo begins anew each time
            raise OutputError(f"{str(folder)!r} holds a run already: name another folder{how}.")
        if path.exists():
            clear_unfinished(folder)
            state = read_json(path)
            _check_state(state, path)
            before = {"command": state.get("command"), **grown(state["plan"])}
            _check_same(before, {"command": command, **plan}, path)
            state |= {"status": "running", "plan": dict(plan)}
        else:
            clear_unfinished_beside(path)  # nothing else is written before it
            begun = {"command": command, "plan": dict(plan), "versions": versions(), "code": _own_code()}
            state = {"schema_version": RUN_VERSION, "status": "running", "start": _now(), **begun}
        return cls(folder, state)

    def __enter__(self) -> RunFolder:
        self.note()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        ended = "done" if kind is None else "failed"
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        # Where the disk is full, that is what the user shall hear of.
        with contextlib.nullcontext() if kind is None else contextlib.suppress(OutputError):
            self.note(status="interrupted" if interrupted else ended, end=_now())

    def check_versions(self) -> None:
        """Refuse to go on with other versions than the run was begun with, and warn of other code of the same version.

        Raises:
            SettingError: The versions differ from those noted.
        """
        versions_then, versions_now = self.state["versions"], versions()
        changed = [f"{name} {then}, now {now}" for name, then, now in _differences(versions_then, versions_now)]
        if changed:
            raise SettingError(
                f"{self.folder / 'run.json'}: the run was begun with {'; '.join(changed)}: what is added to it would "
                "not be what it would have been. Install those versions, or start anew in another folder."
            )
        if self.state.get("code", (code := _own_code())) != code:  # of old it was not noted
            logger.warning(
                "%s: the code of raise-env has changed since the run was begun, its version has not: what is added may "
                "not be what it would have been",
                self.folder / "run.json",
            )

    def check_content(self, content: Mapping[str, Any]) -> None:
        """Refuse to go on with other data or another model than the run was begun with.

        Raises:
            DataError: The content hashes differ from those noted.
        """
        before = self.state.get("content", content)
        different = [name for name in {**before, **content} if before.get(name) != content.get(name)]
        if different:
            raise DataError(
                f"{self.folder / 'run.json'}: since the run was begun, the content of {', '.join(different)} has "
                "changed. Resume it with what it was begun with, or start anew in another folder."
            )

    def note(self, **values: Any) -> None:
        """Add to run.json."""
        self.state.update(values)
        write_json(self.folder / "run.json", self.state)

    def book(
        self,
        part: str,
        number: int,
        seconds: float,
        tokens: int,
        divergences: int = 0,
        groups: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """Note what a piece of a part of the run has cost.

        Made again after an interruption, a piece costs the same tokens, which are booked once, and the longer of both
        times: what an interrupted process did may be there again in no time.

        Args:
            part: Such as "learning".
            number: Which piece of it, such as an episode.
            seconds: The time that it took.
            tokens: Its token forwards.
            divergences: Its episodes that ended because the loss stopped being finite.
            groups: What the run has used of lazy features, this piece included: `FeatureUse.groups`.
        """
        costs = self.state.setdefault("costs", {}).setdefault(part, {})
        before = costs.get(str(number), {}).get("seconds", 0.0)
        costs[str(number)] = {"seconds": max(before, seconds), "phi_tokens": tokens, "divergences": divergences}
        self.state.setdefault("feature_groups", {}).update(groups)
        for kind in _KINDS_OF_COST:
            self.state.setdefault(kind, {})[part] = sum(cost[kind] for cost in costs.values())
        self.note()


def read_json(path: Path) -> dict[str, Any]:
    """Read an object that an earlier run wrote.

    Raises:
        RecordError: The file cannot be read, leads out of its folder, or holds something else.
    """
    try:
        value = read_any_json(path, inside=path.parent)
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: cannot be read ({error}); expected what an earlier run wrote.") from error
    if not isinstance(value, dict):
        raise RecordError(f"{path}: holds {type(value).__name__}; expected an object.")
    return value


def whole_records(path: Path) -> list[EpisodeRecord]:
    """Return a file's episode records, up to the first line that a crash has torn; none where there is no file.

    Raises:
        RecordError: As `whole_lines`.
    """
    records: list[EpisodeRecord] = []
    for number, line in _texts(path):
        try:
            record = EpisodeRecord.from_json(line, f"{path}, line {number}")
            record.to_json()  # what cannot be written again, such as NaN, no run has written
        except (RecordError, ValueError):
            break
        records.append(record)
    return records


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file, one a line, up to the first that a crash has torn; none where there is no file.

    Raises:
        RecordError: The path is that of something other than a file of its folder.
    """
    lines: list[dict[str, Any]] = []
    for _, text in _texts(path):
        try:
            line = parse_json(text)
        except ValueError:
            break
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file as far as they are text."""
    if not path.exists():
        return
    try:
        check_inside(path, path.parent)
        check_regular(path)
        lines = numbered_lines(path)
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: cannot be read ({error}); expected what an earlier run wrote.") from error
    while True:
        try:
            line = next(lines, None)
        except (OSError, ValueError):
            return
        if line is None:
            return
        yield line


def _refuse_results_alone(folder: Path, command: str) -> None:
    """Refuse to add to results, or to go on with learning, of which nothing says how they were made."""
    names = _OF_ONE if command in _ONE_RUN else _OF_MANY
    alone = list(dict.fromkeys(path.relative_to(folder).parts[0] for name in names for path in folder.glob(name)))
    if alone and not (folder / "run.json").exists():
        raise OutputError(
            f"{str(folder)!r} holds {' and '.join(alone)} without the run.json that says how they were made: name "
            "another folder, or put run.json back."
        )


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    different = {
        name: f"{name}: then {then!r}, now {this!r}"
        for name, then, this in _differences(before, now)
        if then is not None or {name.partition(".")[0], name.rpartition(".")[2]}.isdisjoint(_NOT_SAID_OF_OLD)
    }
    if different:
        is_of_code = any({"source", "sources"} & set(name.split(".")) for name in different)
        raise SettingError(
            f"{path}: the run was begun with other settings ({'; '.join(different.values())}). Resume it with those."
            f"{_CODE_HAS_CHANGED if is_of_code else ''}"
        )


def _own_code() -> str:
    """Return a short digest of this package's sources, which a version in development does not tell apart."""
    roots = {"": Path(raise_env.__file__).parent, "agents/": Path(__file__).parent}  # the second may lie in the first
    files = {f"{at}{path.relative_to(root)}": path for at, root in roots.items() for path in root.rglob("*.py")}
    return files_digest(sorted(files.items()))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, old and new value of what differs; of mappings within, their own entries."""
    for name in {**before, **now}:
        then, this = before.get(name), now.get(name)
        if isinstance(then, dict) and isinstance(this, dict):
            yield from ((f"{name}.{inner}", a, b) for inner, a, b in _differences(then, this))
        elif then != this:
            yield name, then, this


def _check_state(state: Mapping[str, Any], path: Path) -> None:
    """Refuse a run.json whose parts have another form than those that are gone on with.

    Raises:
        RecordError: It is so.
    """
    objects = ("plan", "versions", "content", "costs", "feature_groups", *_KINDS_OF_COST)
    faults = [name for name in objects if not _is_object(state, name)]
    plan = state.get("plan")
    if isinstance(plan, dict):
        entries, num_seeds = plan.get("entries", {}), plan.get("num_seeds", 0)
        if not isinstance(entries, dict) or not isinstance(num_seeds, int):
            faults.append("plan")
    numbers = ("feature_groups", *_KINDS_OF_COST)
    faults += [name for name in numbers if not faults and not _are_numbers(state.get(name, {}).values())]
    if not faults and not all(map(_is_costs_of_part, state.get("costs", {}).values())):
        faults.append("costs")
    returns = state.get("episode_returns", [])
    if not isinstance(returns, list) or not _are_numbers(returns):
        faults.append("episode_returns")
    if not isinstance(state.get("start"), str):
        faults.append("start")
    if faults:
        raise RecordError(f"{path}: the field {faults[0]!r} is not as promised; expected what an earlier run wrote.")


def _is_costs_of_part(part: object) -> bool:
    """Return whether each piece of a part has each kind of cost."""
    if not isinstance(part, dict):
        return False
    kinds = [[piece.get(kind) for kind in _KINDS_OF_COST] for piece in part.values() if isinstance(piece, dict)]
    return len(kinds) == len(part) and all(map(_are_numbers, kinds))


def _are_numbers(values: Iterable[object]) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


def _is_object(state: Mapping[str, Any], name: str) -> bool:
    """Return whether a part of run.json is an object; what is noted in the course of a run may be missing."""
    return isinstance(state.get(name, None if name in ("plan", "versions") else {}), dict)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
