"""From the lines of results.jsonl to summary.json, and from that to tables.

Nothing is run here and nothing is hidden: what is missing is counted, and every mean has its interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .report import format_table
from .statistics import (
    Interval,
    bootstrap_interval,
    interquartile_mean,
    mean_interval,
    normalise,
    overall_mean,
    paired_difference,
    probability_of_improvement,
)

__all__ = ["PARTS", "RANDOM", "SHARES", "SUMMARY_VERSION", "markdown_tables", "summarise", "text_tables"]

SUMMARY_VERSION = 1

#: The agents that are 0 and 1 on the normalised scale.
RANDOM = "random"
ORACLE = "oracle"

#: What a run's cost is made of; features have no seconds, for they may come from the cache.
PARTS = ("features", "preparation", "learning", "final")

#: Shares of the test set that are summarised beside the loss, by their names in results.jsonl, in words.
SHARES = {"test_accuracy": "right answers", "test_choice_probability": "P of the right choice"}

_NOTHING = "\N{EN DASH}"

#: A header and its rows.

_Table = tuple[list[str], list[list[str]]]


def summarise(
    results: Sequence[Mapping[str, Any]],
    tasks: Sequence[str],
    agents: Sequence[str],
    seeds: Sequence[int],
    reference: str,
) -> dict[str, Any]:
    """Return what summary.json holds; docs/files.md says what its fields mean.

    Args:
        results: Lines of results.jsonl, in any order.
        tasks: Tasks to be summarised, in order; likewise `agents` and `seeds`.
        agents: Names in the results' field "agent".
        seeds: Seeds of the runs.
        reference: The agent from which the paired differences are taken.
    """
    metric = "test_loss" if any(line["test_loss"] is not None for line in results) else "dev_loss"
    losses = {agent: _runs(results, agent, tasks, seeds, metric) for agent in agents}
    return {
        "schema_version": SUMMARY_VERSION,
        "tasks": list(tasks),
        "agents": list(agents),
        "seeds": list(seeds),
        "metric": metric,
        "reference": reference,
        "normalised": _normalised(losses),
        "per_task": _per_task(losses, tasks),
        **{
            share: _per_task({agent: _runs(results, agent, tasks, seeds, share) for agent in agents}, tasks)
            for share in SHARES
        },
        "against_random": _against_random(losses),
        "differences": _differences(losses, tasks, reference),
        "cost": {agent: _costs([line for line in results if line["agent"] == agent]) for agent in agents},
        "missing": _missing(results, tasks, agents, seeds),
    }


def _per_task(scores: Mapping[str, np.ndarray], tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {
        task: {agent: _spread(runs[:, place]) for agent, runs in scores.items()} for place, task in enumerate(tasks)
    }


def _runs(
    results: Iterable[Mapping[str, Any]], agent: str, tasks: Sequence[str], seeds: Sequence[int], field: str
) -> np.ndarray:
    """Return an agent's scores, shape (seeds, tasks); NaN where a run is missing, failed or diverged."""
    runs = np.full((len(seeds), len(tasks)), np.nan)
    for line in results:
        if line["agent"] == agent and line.get(field) is not None:
            runs[seeds.index(line["seed"]), tasks.index(line["task"])] = line[field]
    return runs


def _whole(runs: np.ndarray) -> np.ndarray:
    """Return the runs of those seeds that have one in every task."""
    return np.asarray(runs[~np.isnan(runs).any(axis=1)])


def _normalised(losses: Mapping[str, np.ndarray]) -> dict[str, dict[str, float | None]]:
    """Return each agent's interquartile mean between random and oracle; nothing where one of the two is missing."""
    if RANDOM not in losses or ORACLE not in losses:
        return {}
    try:
        scores = {agent: normalise(runs, losses[RANDOM], losses[ORACLE]) for agent, runs in losses.items()}
    except ValueError:
        return {}
    whole = {agent: _whole(runs) for agent, runs in scores.items()}
    return {
        agent: _named(bootstrap_interval(interquartile_mean, runs), "iqm") for agent, runs in whole.items() if len(runs)
    }


def _against_random(losses: Mapping[str, np.ndarray]) -> dict[str, dict[str, float | None]]:
    whole = {agent: -_whole(runs) for agent, runs in losses.items()}  # higher is better
    random = whole.pop(RANDOM, np.zeros((0, 1)))
    return {
        agent: _named(bootstrap_interval(probability_of_improvement, runs, random), "probability_of_improvement")
        for agent, runs in whole.items()
        if len(runs) and len(random)
    }


def _differences(
    losses: Mapping[str, np.ndarray], tasks: Sequence[str], reference: str
) -> dict[str, dict[str, dict[str, float | None]]]:
    if reference not in losses:
        return {}
    others = [agent for agent in losses if agent != reference]
    return {
        task: {
            agent: _named(paired_difference(losses[agent][:, place], losses[reference][:, place]), "mean")
            for agent in others
        }
        for place, task in enumerate(tasks)
    }


def _spread(values: np.ndarray) -> dict[str, float | int | None]:
    """Return mean, standard deviation and both intervals of one task's runs, shape (seeds,)."""
    values = values[~np.isnan(values)]
    student = mean_interval(values)
    drawn = bootstrap_interval(overall_mean, values[:, None]) if len(values) else student
    return {
        "mean": _number(student.value),
        "std": _number(float(values.std(ddof=1))) if len(values) > 1 else None,
        "low": _number(drawn.low),
        "high": _number(drawn.high),
        "half_width": _number(student.half_width),
        "num_runs": len(values),
    }


def _costs(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Return the means over an agent's runs of what each part cost."""
    done = [line for line in lines if line["phi"] is not None]
    phi = {part: _mean([line["phi_parts"][part] for line in done]) for part in PARTS}
    seconds = {part: _mean([line["seconds"][part] for line in done]) for part in PARTS[1:]}
    return {
        "phi": {**phi, "total": _mean([line["phi"] for line in done])},
        "seconds": {**seconds, "total": _mean([sum(line["seconds"].values()) for line in done])},
    }


def _missing(
    results: Iterable[Mapping[str, Any]], tasks: Sequence[str], agents: Sequence[str], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Return the runs that no mean holds, with the reason."""
    lines = {(line["task"], line["agent"], line["seed"]): line for line in results}
    missing = []
    for task in tasks:
        for agent in agents:
            for seed in seeds:
                line = lines.get((task, agent, seed))
                reason = "not run" if line is None else line["error"] or ("diverged" if line["diverged"] else None)
                if reason is not None:
                    missing.append({"task": task, "agent": agent, "seed": seed, "reason": reason})
    return missing


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _named(interval: Interval, name: str) -> dict[str, float | None]:
    return {name: _number(interval.value), "low": _number(interval.low), "high": _number(interval.high)}


def _number(value: float) -> float | None:
    # JSON has no NaN.
    return float(value) if math.isfinite(value) else None


# Tables


def text_tables(summary: Mapping[str, Any]) -> str:
    """Return the results for a terminal."""
    parts = [
        (f"{title}\n\n" if title else "") + format_table(rows, header)
        for title, (header, rows) in _tables(summary).items()
    ]
    return "\n\n".join([*parts, _legend(summary)])


def markdown_tables(summary: Mapping[str, Any]) -> str:
    """Return the results as Markdown."""
    parts = []
    for title, (header, rows) in _tables(summary).items():
        lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
        table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
        parts.append(f"### {title}\n\n{table}" if title else table)
    return "\n\n".join([*parts, _legend(summary)])


def _legend(summary: Mapping[str, Any]) -> str:
    """Return what the tables' signs mean."""
    intervals = "\N{PLUS-MINUS SIGN} is half of Student's 95% interval over the runs, [] a 95% interval."
    scale = "Normalised: 0 is random, 1 the oracle. " if summary["normalised"] else ""
    return f"{intervals}\n{scale}One Phi is three epochs over the pool; seconds are those of one run."


def _tables(summary: Mapping[str, Any]) -> dict[str, _Table]:
    """Return tables by title: a single one of one task; else one for each task, and one over all."""
    tasks = summary["tasks"]
    if len(tasks) == 1:
        header, rows = _task_table(summary, tasks[0])
        more, cells = _shared_columns(summary)
        return {"": (header + more, [row + cells[row[0]] for row in rows])}
    header, cells = _shared_columns(summary)
    scores = summary["normalised"]
    order = sorted(summary["agents"], key=lambda agent: -scores[agent]["iqm"] if agent in scores else math.inf)
    overall = (["agent", *header], [[agent, *cells[agent]] for agent in order])
    return {**{task: _task_table(summary, task) for task in tasks}, "all tasks": overall}


def _task_table(summary: Mapping[str, Any], task: str) -> _Table:
    """Return one task's table, the lowest loss first."""
    losses = summary["per_task"][task]
    agents = sorted(summary["agents"], key=lambda agent: _first(losses[agent]["mean"], math.inf))
    header = ["agent", "runs", summary["metric"].replace("_", " ")]
    columns = [agents, [str(losses[a]["num_runs"]) for a in agents], [_with_half(losses[a], "{:.3f}") for a in agents]]
    # The difference to random is what the normalised score says already.
    if summary["reference"] != RANDOM and task in summary["differences"]:
        differences = summary["differences"][task]
        header.append(f"difference to {summary['reference']}")
        columns.append([_with_ends(differences.get(agent), "mean", "{:+.3f}") for agent in agents])
    for share, words in SHARES.items():
        spreads = summary.get(share, {}).get(task, {})
        if any(spreads[agent]["num_runs"] for agent in spreads):
            header.append(words)
            columns.append([_with_half(spreads[agent], "{:.1%}") for agent in agents])
    return header, [list(row) for row in zip(*columns, strict=True)]


def _shared_columns(summary: Mapping[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the columns over all tasks: names, and cells by agent."""
    scores, cost = summary["normalised"], summary["cost"]
    header = ["normalised IQM"] if scores else []
    header += [f"Phi: {PARTS[0]}", *PARTS[1:-1], "total", "seconds"]
    cells = {}
    for agent in summary["agents"]:
        phi = [_text(cost[agent]["phi"][part], "{:.2f}") for part in (*PARTS[:-1], "total")]
        own = [_with_ends(scores.get(agent), "iqm", "{:.2f}")] if scores else []
        cells[agent] = [*own, *phi, _text(cost[agent]["seconds"]["total"], "{:.1f}")]
    return header, cells


def _with_half(spread: Mapping[str, Any], form: str) -> str:
    """Return a mean with half its 95% interval; of a share, both in per cent."""
    half = spread["half_width"]
    return _text(spread["mean"], form) + ("" if half is None else f" ± {form.format(half).rstrip('%')}")


def _with_ends(interval: Mapping[str, Any] | None, name: str, form: str) -> str:
    if interval is None:
        return ""
    ends = [interval["low"], interval["high"]]
    return _text(interval[name], form) + ("" if None in ends else f" [{', '.join(map(form.format, ends))}]")


def _text(value: float | None, form: str) -> str:
    return _NOTHING if value is None else form.format(value)


def _first(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value
