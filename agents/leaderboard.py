"""The leaderboard: folders of `bench`, held against their records, and what stands put together into one table.

Only runs whose episodes were recorded count, each with the settings of its task alone, all tasks and all seeds of an
agent, or none of it. What a final run scored, and took at least, is checked by replaying it; what learning cost is as
the folder claims.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from raise_env.config import EnvConfig
from raise_env.errors import SettingError, suggestion
from raise_env.tiny.task import TASKS

from .markdown import escaped
from .runs import Reporter, Silent
from .summary import ORACLE, RANDOM, markdown_table, reason_missing, summarise
from .validation import Recorded, by_record, check_cost, check_results, read_bench, replay_all

__all__ = ["Board", "Entrant", "leaderboard", "markdown_board"]

_NOTHING = "\N{EN DASH}"


@dataclass(slots=True)
class Entrant:
    """An agent of one folder.

    Attributes:
        agent: Its name in its folder.
        label: Its name on the board.
        folder: Where its runs are.
        lines: Its lines of results.jsonl.
        recorded: Its records.
        settings: Settings in which its runs differ from their task; where there are any, it is a reference.
        faults: What is wrong with its runs.
        num_replayed: Records that were made again, and came out as recorded.
    """

    agent: str
    label: str
    folder: Path
    lines: list[dict[str, Any]] = field(default_factory=list)
    recorded: list[Recorded] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    num_replayed: int = 0

    @property
    def hindrances(self) -> list[str]:
        """Why it is not ranked; empty if it is."""
        return [*self.faults, *([f"settings of its own: {', '.join(self.settings)}"] if self.settings else [])]


@dataclass(frozen=True, slots=True)
class Board:
    """Who is ranked, with what summary.json would hold of them, and who is not.

    Attributes:
        ranked: The best first.
        references: Runs that stand, in settings of their own.
        unranked: With runs at fault.
        summary: Of the ranked.
        notes: What else is to be told.
    """

    ranked: list[Entrant]
    references: list[Entrant]
    unranked: list[Entrant]
    summary: dict[str, Any]
    notes: list[str]


def leaderboard(
    folders: Sequence[Path],
    tasks: Sequence[str],
    num_seeds: int,
    *,
    replays: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    reporter: Reporter | None = None,
) -> Board:
    """Check folders of `bench` and rank the agents whose runs stand.

    Args:
        folders: What `bench` wrote; random and the oracle, the marks of the scale, are those of the first that has
            them.
        tasks: Tasks that an agent must have run.
        num_seeds: Seeds 0, 1, ... that it must have run on each.
        replays: Records of each agent that are made again, drawn at random; None: all.
        seed: What they are drawn from: whoever submits must not know it.
        workers: Processes side by side.
        reporter: Where progress is shown.

    Raises:
        SettingError: A task is unknown, or a folder named twice; none has valid runs of random and of the oracle, or
            the two cannot be told apart.
        RecordError: A folder lacks results or records, or they cannot be read.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise SettingError("\n".join(f"unknown task {task!r}: {suggestion(task, TASKS)}" for task in unknown))
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise SettingError("a folder is named twice: name each once.")
    entrants = list(_entrants(folders, tasks, num_seeds))
    _require_marks(entrants, tasks, num_seeds)
    _replay(entrants, replays, np.random.default_rng(seed), workers, reporter or Silent())
    _require_marks(entrants, tasks, num_seeds)
    ranked = [entrant for entrant in entrants if not entrant.hindrances]
    lines = [{**line, "agent": entrant.label} for entrant in ranked for line in entrant.lines]
    labels = [entrant.label for entrant in ranked]
    summary = summarise(lines, tasks, labels, range(num_seeds), RANDOM)
    scores = summary["normalised"]
    if not scores:
        raise SettingError(
            f"on none of the tasks {', '.join(tasks)} is the oracle clearly ahead of random rows: there is no scale to "
            "rank by. Take other tasks, or more seeds."
        )
    ranked.sort(key=lambda entrant: -scores[entrant.label]["iqm"])
    references = [entrant for entrant in entrants if entrant.settings and not entrant.faults]
    return Board(ranked, references, [own for own in entrants if own.faults], summary, _alike(ranked))


def _entrants(folders: Iterable[Path], tasks: Sequence[str], num_seeds: int) -> Iterable[Entrant]:
    taken: set[str] = set()
    for folder in folders:
        lines, recorded = read_bench(folder)
        wanted = {(task, seed) for task in tasks for seed in range(num_seeds)}
        faults = check_results(lines, recorded)
        for agent in dict.fromkeys(line["agent"] for line in lines):
            names = (f"{agent} ({folder.name}{f' {number}' if number > 1 else ''})" for number in itertools.count(1))
            label = next(name for name in itertools.chain([agent], names) if name not in taken)
            taken.add(label)
            entrant = Entrant(agent, label, folder)
            entrant.lines = [
                line for line in lines if line["agent"] == agent and (line["task"], line["seed"]) in wanted
            ]
            keys = {(line["task"], line["agent"], line["seed"]) for line in entrant.lines}
            entrant.recorded = [own for own in recorded if own.key in keys]
            entrant.settings = sorted({name for own in entrant.recorded for name in _own_settings(own)})
            entrant.faults = _faults(entrant, wanted, faults)
            yield entrant


def _require_marks(entrants: Sequence[Entrant], tasks: Sequence[str], num_seeds: int) -> None:
    """Name random and the oracle, the marks of the scale, in the first folder that has them; SettingError without."""
    for mark in (RANDOM, ORACLE):
        of_mark = [entrant for entrant in entrants if entrant.agent == mark]
        whole = next((entrant for entrant in of_mark if not entrant.hindrances), None)
        named = next((entrant for entrant in of_mark if entrant.label == mark), None)
        if whole is not None and named is not None:
            named.label, whole.label = whole.label, mark
    missing = {RANDOM, ORACLE} - {entrant.label for entrant in entrants if not entrant.hindrances}
    if missing:
        reasons = "; ".join(f"{own.label}: {own.hindrances[0]}" for own in entrants if own.label in missing)
        raise SettingError(
            f"no folder has valid runs of {' and '.join(sorted(missing))}, between which the scale is"
            f"{f' ({reasons})' if reasons else ''}. Add a folder that has them on {', '.join(tasks)}, with {num_seeds} "
            "seeds."
        )


def _faults(entrant: Entrant, wanted: set[tuple[str, int]], faults: Mapping[tuple[str, str, int], str]) -> list[str]:
    """Return what is wrong with an agent's runs, as far as that is seen without replaying them."""
    found = []
    scored = [line for line in entrant.lines if reason_missing(line, "test_loss") is None]
    if len(scored) < len(entrant.lines):
        found.append("runs that failed or diverged, or without a finite test loss")
    done = {(line["task"], line["seed"]) for line in scored}
    if done != wanted:
        found.append(f"{len(wanted - done)} of {len(wanted)} runs are missing")
    for task, seed in dict.fromkeys((line["task"], line["seed"]) for line in entrant.lines):
        fault = faults.get((task, entrant.agent, seed))
        if fault is not None:
            found.append(f"{task}, seed {seed}: {fault}")
    return found


def _own_settings(recorded: Recorded) -> set[str]:
    """Return the settings in which a run differs from its task."""
    kwargs = EnvConfig.from_kwargs(recorded.record.env["kwargs"]).to_kwargs()
    return set(kwargs) - {"task", "seed_model"}


def _replay(
    entrants: Iterable[Entrant], replays: int | None, rng: np.random.Generator, workers: int | None, reporter: Reporter
) -> None:
    """Make records again, and note what does not come out as recorded."""
    owners, drawn = {}, []
    lines: dict[str, Mapping[str, Any]] = {}
    for entrant in entrants:
        if entrant.hindrances:
            continue
        lines |= by_record(entrant.lines, entrant.recorded)
        count = len(entrant.recorded) if replays is None else min(replays, len(entrant.recorded))
        for place in rng.choice(len(entrant.recorded), count, replace=False):
            own = entrant.recorded[place]
            owners[own.where] = entrant
            drawn.append(own)
    with reporter.task("replaying", len(drawn)) as show:
        for done, replayed in enumerate(replay_all(drawn, lines, workers=workers, in_one_thread=True), start=1):
            where = replayed.recorded.where
            fault = replayed.difference or check_cost(lines[where], replayed)
            if fault is None:
                owners[where].num_replayed += 1
            else:
                owners[where].faults.append(f"{where}: {fault}")
            show(done)


def _alike(entrants: Sequence[Entrant]) -> list[str]:
    """Return who took the same rows as another agent, step by step: it may be that one under another name."""
    takers: dict[Any, list[Entrant]] = {}
    for entrant in entrants:
        for own in entrant.recorded:
            rows = tuple(tuple(sorted(step)) for step in own.record.actions)
            takers.setdefault((own.key[0], own.key[2], rows), []).append(entrant)
    together = Counter(
        (one.label, other.label)
        for group in takers.values()
        for one, other in itertools.combinations(group, 2)
        if one.agent != other.agent
    )
    sizes = {entrant.label: len(entrant.recorded) for entrant in entrants}
    return [
        f"{one} and {other} took the same rows at each step in {count} of {sizes[one]} runs."
        for (one, other), count in together.items()
    ]


def markdown_board(board: Board) -> str:
    """Return the board as Markdown: a table of the ranked, and below it who is not, and why."""
    scores, chances, costs = (board.summary[name] for name in ("normalised", "against_random", "cost"))
    rows = []
    for place, entrant in enumerate(board.ranked, start=1):
        label, cost = entrant.label, costs[entrant.label]
        chance = chances.get(label)
        rows.append(
            [
                str(place),
                label,
                _with_ends(scores[label], "iqm"),
                _NOTHING if chance is None else _with_ends(chance, "probability_of_improvement"),
                f"{cost['phi']['learning'] + cost['phi']['preparation'] + cost['phi']['features']:.2f}",
                f"{cost['phi']['final']:.2f}",
                f"{cost['seconds']['total']:.0f}",
                f"{entrant.num_replayed} of {len(entrant.recorded)}",
            ]
        )
    header = ["", "agent", "normalised IQM", "P(better than random)", "Phi before", "Phi final", "seconds", "replayed"]
    parts = [markdown_table(header, rows)]
    if board.references:
        own = [[entrant.label, entrant.folder.name, ", ".join(entrant.settings)] for entrant in board.references]
        parts.append("References, not ranked:\n\n" + markdown_table(["agent", "folder", "settings of its own"], own))
    if board.unranked:
        reasons = [
            [entrant.label, entrant.folder.name, "; ".join(entrant.hindrances[:3])] for entrant in board.unranked
        ]
        parts.append("Not ranked:\n\n" + markdown_table(["agent", "folder", "why"], reasons))
    parts += map(escaped, board.notes)
    return "\n\n".join(parts)


def _with_ends(interval: Mapping[str, Any], name: str) -> str:
    ends = "" if None in (interval["low"], interval["high"]) else f" [{interval['low']:.2f}, {interval['high']:.2f}]"
    return f"{interval[name]:.2f}{ends}"
