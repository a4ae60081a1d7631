"""From the lines of results.jsonl to summary.json, and from that to tables.

Nothing is run here and nothing is hidden: what is missing is counted where it is left out, and every number has its
interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from . import markdown
from .report import format_table
from .significance import PairedTest, holm, paired_test
from .statistics import (
    Interval,
    beside_marks,
    bootstrap_interval,
    improvement_intervals,
    interquartile_mean,
    mean_interval,
    on_scale,
    overall_mean,
    profile_bands,
)

__all__ = [
    "PARTS",
    "RANDOM",
    "SHARES",
    "SUMMARY_VERSION",
    "markdown_table",
    "markdown_tables",
    "number_or_none",
    "reason_missing",
    "summarise",
    "text_tables",
    "unscaled_told",
]

SUMMARY_VERSION = 2

#: The agents that are 0 and 1 on the normalised scale.
RANDOM = "random"
ORACLE = "oracle"

#: A task has a scale where the oracle is ahead of random with a smaller p, by Student's one-sided test for pairs.
CLEAR_WAY = 0.025

#: What a run's cost is made of.
PARTS = ("features", "preparation", "learning", "final")

#: Shares of the test set that are summarised beside the loss, by their names in results.jsonl, in words.
SHARES = {"test_accuracy": "right answers", "test_choice_probability": "P of the right choice"}

#: Thresholds of a performance profile, evenly spaced over what all agents scored but for the worst and best 1%.
NUM_THRESHOLDS = 101

_NOTHING = "\N{EN DASH}"

#: Stands beside the name of an agent of whose runs some are missing.
_MARK = "*"

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
    scaled = _scaled(losses)
    on_scaled = {agent: runs[:, scaled] for agent, runs in losses.items()}
    beside, num_missing = _beside_marks(on_scaled), {agent: _num_missing(runs) for agent, runs in on_scaled.items()}
    pairs = _pairs(losses)
    differences = _differences(losses, tasks, reference)
    return {
        "schema_version": SUMMARY_VERSION,
        "tasks": list(tasks),
        "agents": list(agents),
        "seeds": list(seeds),
        "metric": metric,
        "reference": reference,
        "normalised": _normalised(beside, num_missing),
        "normalised_tasks": [tasks[place] for place in scaled],
        "per_task": _per_task(losses, tasks),
        **{
            share: _per_task({agent: _runs(results, agent, tasks, seeds, share) for agent in agents}, tasks)
            for share in SHARES
        },
        "against_random": {agent: others[RANDOM] for agent, others in pairs.items() if RANDOM in others},
        "pairs": pairs,
        "profiles": _profiles(beside, num_missing),
        "differences": differences,
        "detectable": {task: _detectable(tests) for task, tests in differences.items()},
        "cost": {agent: _costs([line for line in results if line["agent"] == agent]) for agent in agents},
        "diverged": {task: {agent: _divergences(results, task, agent) for agent in agents} for task in tasks},
        "missing": _missing(results, tasks, agents, seeds, metric),
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


def _scaled(losses: Mapping[str, np.ndarray]) -> list[int]:
    """Return the places of the tasks that have a scale: those on which the oracle is clearly ahead of random.

    Elsewhere the way between the two, which all scores are divided by, is mostly noise, and may have the wrong sign.
    """
    if RANDOM not in losses or ORACLE not in losses:
        return []
    places = []
    for place, way in enumerate((losses[RANDOM] - losses[ORACLE]).T):
        known = way[~np.isnan(way)]
        if len(known) > 1 and known.mean() > stats.t.isf(CLEAR_WAY, len(known) - 1) * stats.sem(known):
            places.append(place)
    return places


def _beside_marks(losses: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return each agent's whole runs beside random's and the oracle's; nothing where no task has a scale.

    The marks are means over the seeds that both have: `_scaled` has seen that way, and no other.
    """
    if not any(runs.shape[1] for runs in losses.values()):
        return {}
    alone = np.isnan(losses[RANDOM]) | np.isnan(losses[ORACLE])
    marks = [np.where(alone, np.nan, losses[mark]) for mark in (RANDOM, ORACLE)]
    return {agent: beside_marks(runs, *marks) for agent, runs in losses.items()}


def _normalised(runs: Mapping[str, np.ndarray], num_missing: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Return each agent's interquartile mean between random and the oracle; what marks the scale is drawn anew too."""
    return {
        agent: _named(bootstrap_interval(_scaled_iqm, whole), "iqm", num_missing[agent])
        for agent, whole in runs.items()
        if len(whole)
    }


def _scaled_iqm(runs: np.ndarray) -> np.ndarray:
    return interquartile_mean(on_scale(runs))


def _profiles(runs: Mapping[str, np.ndarray], num_missing: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Return each agent's performance profile, all over the same thresholds."""
    there = {agent: whole for agent, whole in runs.items() if len(whole)}
    if not there:
        return {}
    low, high = np.quantile(np.concatenate([on_scale(whole).ravel() for whole in there.values()]), [0.01, 0.99])
    thresholds = np.linspace(min(low, 0.0), max(high, 1.0), NUM_THRESHOLDS)
    profiles: dict[str, dict[str, Any]] = {}
    for agent, whole in there.items():
        bands = zip(("share", "low", "high"), profile_bands(whole, thresholds, on_scale), strict=True)
        values = {name: [number_or_none(value) for value in band] for name, band in bands}
        profiles[agent] = {"thresholds": thresholds.tolist(), **values, "num_missing": num_missing[agent]}
    return profiles


def _pairs(losses: Mapping[str, np.ndarray]) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Return the chance that a run of one agent has a lower loss than one of the other, for all pairs."""
    whole = {agent: -_whole(runs) for agent, runs in losses.items()}  # higher is better
    there = {agent: runs for agent, runs in whole.items() if len(runs)}
    pairs: dict[str, dict[str, dict[str, float | int | None]]] = {agent: {} for agent in there}
    intervals = improvement_intervals(there)
    for agent in there:
        for other in there:
            if agent != other:
                num_missing = _num_missing(losses[agent]) + _num_missing(losses[other])
                pairs[agent][other] = _named(intervals[agent, other], "probability_of_improvement", num_missing)
    return pairs


def _num_missing(runs: np.ndarray) -> int:
    """Return how many runs do not count: those of seeds that lack one in some task."""
    return int(runs.size - _whole(runs).size)


def _differences(
    losses: Mapping[str, np.ndarray], tasks: Sequence[str], reference: str
) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Return the paired tests of each task; p, and what could be shown, is that of all the comparisons of that task."""
    if reference not in losses:
        return {}
    others, found = [agent for agent in losses if agent != reference], {}
    for place, task in enumerate(tasks):
        own = losses[reference][:, place]
        num_tests = sum(bool((~np.isnan(losses[agent][:, place] - own)).sum() > 1) for agent in others)
        tests = {agent: paired_test(losses[agent][:, place], own, num_tests) for agent in others}
        adjusted = holm(np.array([test.p for test in tests.values()]))
        found[task] = {agent: _tested(test, p) for (agent, test), p in zip(tests.items(), adjusted, strict=True)}
    return found


def _tested(test: PairedTest, adjusted: float) -> dict[str, float | int | None]:
    return {
        **_named(test.difference, "mean", test.difference.num_missing),
        "p": number_or_none(test.p),
        "p_adjusted": number_or_none(adjusted),
        "effect_size": number_or_none(test.effect_size),
        "seeds_needed": test.pairs_needed,
        "detectable": number_or_none(test.detectable),
        "num_pairs": test.num_pairs,
    }


def _detectable(tests: Mapping[str, Mapping[str, Any]]) -> dict[str, float | int | None]:
    """Return the difference that a task's runs could have shown, that of the median agent."""
    there = [test["detectable"] for test in tests.values() if test["detectable"] is not None]
    num_pairs = [test["num_pairs"] for test in tests.values()]
    return {
        "difference": float(np.median(there)) if there else None,
        "num_seeds": min(num_pairs, default=0),
    }


def _spread(values: np.ndarray) -> dict[str, float | int | None]:
    """Return mean, standard deviation and both intervals of one task's runs, shape (seeds,)."""
    num_missing = int(np.isnan(values).sum())
    values = values[~np.isnan(values)]
    student = mean_interval(values)
    drawn = bootstrap_interval(overall_mean, values[:, None]) if len(values) else student
    return {
        "mean": number_or_none(student.value),
        "std": number_or_none(float(values.std(ddof=1))) if len(values) > 1 else None,
        "low": number_or_none(drawn.low),
        "high": number_or_none(drawn.high),
        "half_width": number_or_none(student.half_width),
        "num_runs": len(values),
        "num_missing": num_missing,
    }


def _costs(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Return the means over an agent's runs of what each part cost."""
    done = [line for line in lines if line["phi"] is not None]
    phi = {part: _mean([line["phi_parts"][part] for line in done]) for part in PARTS}
    # Lines of earlier versions have neither tokens nor the seconds of features.
    tokens = {part: _mean([line["tokens"][part] for line in done if line.get("tokens")]) for part in PARTS}
    seconds = {part: _mean([line["seconds"][part] for line in done if part in line["seconds"]]) for part in PARTS}
    return {
        "phi": {**phi, "total": _mean([line["phi"] for line in done])},
        "tokens": {**tokens, "total": _mean([sum(line["tokens"].values()) for line in done if line.get("tokens")])},
        "seconds": {**seconds, "total": _mean([sum(line["seconds"].values()) for line in done])},
    }


def _divergences(results: Iterable[Mapping[str, Any]], task: str, agent: str) -> dict[str, int]:
    """Return how often an agent's loss stopped being finite: in episodes of learning, and in final runs."""
    own = [line for line in results if (line["task"], line["agent"]) == (task, agent)]
    # Lines of earlier versions do not tell of learning.
    in_learning = sum(line.get("diverged_episodes") or 0 for line in own)
    return {"learning": in_learning, "final": sum(bool(line["diverged"]) for line in own)}


def reason_missing(line: Mapping[str, Any], metric: str) -> str | None:
    """Return why no mean of the metric holds a run, None where it has a result."""
    if line["error"] is not None or line["diverged"]:
        return "diverged" if line["error"] is None else str(line["error"])
    # A test row may have no finite loss though all dev rows have.
    return f"no finite {metric.replace('_', ' ')}" if line[metric] is None else None


def _missing(
    results: Iterable[Mapping[str, Any]],
    tasks: Sequence[str],
    agents: Sequence[str],
    seeds: Sequence[int],
    metric: str,
) -> list[dict[str, Any]]:
    """Return the runs that no mean holds, with the reason."""
    lines = {(line["task"], line["agent"], line["seed"]): line for line in results}
    missing = []
    for task in tasks:
        for agent in agents:
            for seed in seeds:
                line = lines.get((task, agent, seed))
                reason = "not run" if line is None else reason_missing(line, metric)
                if reason is not None:
                    missing.append({"task": task, "agent": agent, "seed": seed, "reason": reason})
    return missing


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _named(interval: Interval, name: str, num_missing: int) -> dict[str, float | int | None]:
    ends = {"low": number_or_none(interval.low), "high": number_or_none(interval.high)}
    return {name: number_or_none(interval.value), **ends, "num_missing": num_missing}


def number_or_none(value: float) -> float | None:
    """Return the number as JSON can hold it, which has no NaN."""
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
        table = markdown_table(header, rows)
        parts.append(f"### {markdown.escaped(title)}\n\n{table}" if title else table)
    return "\n\n".join([*parts, "\n".join(map(markdown.escaped, _legend(summary).splitlines()))])


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as Markdown, all columns but the first to the right."""
    return markdown.table(header, rows, ["---"] + ["---:"] * (len(header) - 1))


def _legend(summary: Mapping[str, Any]) -> str:
    """Return what the tables' signs mean."""
    lines = ["\N{PLUS-MINUS SIGN} is half of Student's 95% interval over the runs, [] a 95% interval."]
    if any(_p_values(summary, task) for task in summary["tasks"]):
        lines.append(
            f"p: that the loss differs from that of {summary['reference']}, in pairs of one seed; adjusted for as many "
            "comparisons as the table has (Holm)."
        )
    if summary["missing"]:
        lines.append(f"{_MARK} runs are missing: the means of this agent are over those that are left.")
    scale = f"Normalised: 0 is random, 1 the oracle.{unscaled_told(summary)} " if summary["normalised"] else ""
    return "\n".join([*lines, f"{scale}One Phi is three epochs over the pool; seconds are those of one run."])


def unscaled_told(summary: Mapping[str, Any]) -> str:
    """Return a sentence on the tasks that are in no normalised score, empty where all are."""
    # Summaries of earlier versions do not tell, and left none out.
    scaled = summary.get("normalised_tasks", summary["tasks"])
    without = [task for task in summary["tasks"] if task not in scaled]
    if not without:
        return ""
    return f" Left out: {', '.join(without)}, where the oracle is not clearly ahead of random rows."


def _marked(summary: Mapping[str, Any], agent: str) -> str:
    """Return an agent's name, marked where some of its runs are in no mean."""
    return f"{agent} {_MARK}" if any(run["agent"] == agent for run in summary["missing"]) else agent


def _p_values(summary: Mapping[str, Any], task: str) -> dict[str, float]:
    """Return the adjusted p of each agent that has one."""
    tests = summary["differences"].get(task, {})
    return {agent: test["p_adjusted"] for agent, test in tests.items() if test.get("p_adjusted") is not None}


def _tables(summary: Mapping[str, Any]) -> dict[str, _Table]:
    """Return tables by title: a single one of one task; else one for each task, and one over all."""
    tasks = summary["tasks"]
    header, cells = _shared_columns(summary)
    if len(tasks) == 1:
        own, rows = _task_table(summary, tasks[0])
        tables = {"": (own + header, [row + cells[row[0]] for row in rows])}
    else:
        scores = summary["normalised"]
        order = sorted(summary["agents"], key=lambda agent: -scores[agent]["iqm"] if agent in scores else math.inf)
        overall = (["agent", *header], [[agent, *cells[agent]] for agent in order])
        tables = {**{task: _task_table(summary, task) for task in tasks}, "all tasks": overall}
    return {
        title: (header, [[_marked(summary, agent), *row] for agent, *row in rows])
        for title, (header, rows) in tables.items()
    }


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
    if p_values := _p_values(summary, task):
        header.append("p")
        columns.append([_p_text(p_values[agent]) if agent in p_values else "" for agent in agents])
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


def _p_text(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _text(value: float | None, form: str) -> str:
    return _NOTHING if value is None else form.format(value)


def _first(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value
