"""The results of a benchmark for people: one page that opens from disk, its figures as PNG, their data as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from raise_env.record import EpisodeRecord

from .bench_plots import cost_plot, profile_plot, returns_plot, scores_plot
from .page import NOTHING, css, divergences_told, inline, load_template, pairs, write_files
from .plots import COLOURS, Plot, agent_colours, dev_curves_plot
from .summary import ORACLE, PARTS, RANDOM, SHARES, unscaled_told

__all__ = ["headline", "write_bench_report"]

#: Agents that choose nothing by a method: the marks of the scale, and training on all rows.
_NO_METHODS = (RANDOM, ORACLE, "full")


def write_bench_report(
    folder: Path,
    summary: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    records: Sequence[tuple[str, EpisodeRecord]],
    state: Mapping[str, Any],
) -> None:
    """Write report.html, results.csv, and plots/*.png with plots/*.csv; each appears whole or not at all.

    Args:
        folder: Where to write.
        summary: What summary.json holds.
        lines: Of results.jsonl.
        records: The final runs, each with its task.
        state: What run.json holds.

    Raises:
        OutputError: The folder or a file in it cannot be written.
    """
    colours = agent_colours(summary["agents"], _best(summary))
    over_all = dict(_plots_over_all(summary, colours))
    of_tasks = {task: dict(_plots_of_task(task, summary, lines, records, colours)) for task in summary["tasks"]}
    files = {"results.csv": _csv([_flat(line) for line in lines])}
    for plots in (over_all, *of_tasks.values()):
        for plot, rows in plots.values():
            files[f"plots/{plot.name}.png"] = plot.png()
            files[f"plots/{plot.name}.csv"] = _csv(rows)
    page = load_template("bench.html.jinja", escapes=True).render(
        title="Which agent chooses best",
        script=None,
        script_hash=None,
        colours=COLOURS,
        date=str(state.get("start", ""))[:10],
        headline=headline(summary) + _told_divergences(summary),
        tiles=_tiles(summary, lines, state),
        plots={
            name: inline(over_all[name][0]) if name in over_all else None for name in ("scores", "profiles", "cost")
        },
        agents=_agent_rows(summary, colours),
        unscaled=unscaled_told(summary) if summary["normalised"] else "",
        parts=PARTS,
        tasks=[_task(task, summary, of_tasks[task], colours) for task in summary["tasks"]],
        reference=summary["reference"],
        metric=summary["metric"].replace("_", " "),
        missing=summary["missing"],
        num_runs=len(lines),
        settings=pairs({**state.get("plan", {}).get("settings", {}), "seeds": len(summary["seeds"])}),
        machine=pairs({"hardware": _hardware(lines, state), **state.get("versions", {})}),
    )
    write_files(folder, {**files, "report.html": page.encode()})


def headline(summary: Mapping[str, Any]) -> str:
    """Return the result in a sentence."""
    best, scores = _best(summary), summary["normalised"]
    where = _count(len(summary["tasks"]), "task") + " and " + _count(len(summary["seeds"]), "seed")
    if best is None:
        return f"{where[0].upper()}{where[1:]}; nothing to compare yet."
    if best not in scores:
        metric = summary["metric"].replace("_", " ")
        place = "the lowest" if len(summary["tasks"]) == 1 else "the best mean rank by"
        return f"Over {where}, {best} had {place} {metric}."
    where = _count(len(summary["normalised_tasks"]), "task") + " and " + _count(len(summary["seeds"]), "seed")
    score = scores[best]
    ends = "" if score["low"] is None else f" (95% interval {score['low']:.0%} to {score['high']:.0%})"
    others = [agent for agent in scores if agent not in _NO_METHODS]
    ahead = [agent for agent in others if (scores[agent]["low"] or 0) > 0]
    return (
        f"Over {where}, {best} came {score['iqm']:.0%} of the way from random rows to the oracle{ends}; "
        f"the intervals of {len(ahead)} of {len(others)} agents lie above random rows."
    )


def _told_divergences(summary: Mapping[str, Any]) -> str:
    """Return a sentence on runs whose loss stopped being finite, empty without any."""
    counts = [count for agents in summary["diverged"].values() for count in agents.values()]
    return divergences_told(sum(c["learning"] for c in counts), sum(c["final"] for c in counts))


def _best(summary: Mapping[str, Any]) -> str | None:
    """Return the agent that did best, but for the marks of the scale and the reference, which choose nothing."""
    scores = summary["normalised"]
    agents = [agent for agent in summary["agents"] if agent not in _NO_METHODS]
    if scores:
        return max((agent for agent in agents if agent in scores), key=lambda agent: scores[agent]["iqm"], default=None)
    # Losses of different tasks cannot be added up; ranks can. Whoever lacks a task is last in it.
    ranks, there = dict.fromkeys(agents, 0), set()
    for losses in summary["per_task"].values():
        means = {agent: _number(losses[agent], "mean", math.inf) for agent in agents}
        there |= {agent for agent, mean in means.items() if mean < math.inf}
        for agent, mean in means.items():
            ranks[agent] += sum(other < mean for other in means.values())
    return min((agent for agent in agents if agent in there), key=lambda agent: ranks[agent], default=None)


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _tiles(
    summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], state: Mapping[str, Any]
) -> list[dict[str, str]]:
    best = _best(summary)
    done = [line for line in lines if line["error"] is None]
    tiles = []
    if best is not None and best in summary["normalised"]:
        tiles.append({"label": "Best agent", "value": f"{summary['normalised'][best]['iqm']:.2f}", "note": best})
    if best is not None and summary["cost"][best]["phi"]["total"] is not None:
        note = f"a run of {best}, learning included"
        tiles.append({"label": "Its cost", "value": f"{summary['cost'][best]['phi']['total']:.2f} Φ", "note": note})
    missing = len(summary["missing"])
    tiles.append(
        {"label": "Runs", "value": f"{len(done):,}", "note": f"{missing} missing" if missing else "none missing"}
    )
    if "seconds" in state:
        hours = state["seconds"]["runs"] / 3600
        tiles.append({"label": "Computed", "value": f"{hours:.1f} h", "note": "all runs together, one thread each"})
    return tiles


def _agent_rows(summary: Mapping[str, Any], colours: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the table over all tasks, the best first."""
    scores, chances, costs = summary["normalised"], summary["against_random"], summary["cost"]
    order = sorted(summary["agents"], key=lambda agent: -_number(scores.get(agent), "iqm", -math.inf))
    return [
        {
            "name": agent,
            "best": agent == _best(summary),
            "colour": css(colours[agent]),
            "score": _with_ends(scores.get(agent), "iqm"),
            "chance": _with_ends(chances.get(agent), "probability_of_improvement"),
            "phi": [_text(costs[agent]["phi"][part]) for part in (*PARTS, "total")],
            "seconds": _text(costs[agent]["seconds"]["total"], "{:,.0f}"),
            "missing": sum(run["agent"] == agent for run in summary["missing"]),
        }
        for agent in order
    ]


def _task(
    task: str, summary: Mapping[str, Any], plots: Mapping[str, tuple[Plot, Any]], colours: Mapping[str, str]
) -> dict[str, Any]:
    """Return what the page says of one task: its table, the lowest loss first, and its figures."""
    losses = summary["per_task"][task]
    shares = [share for share in SHARES if any(losses_of["num_runs"] for losses_of in summary[share][task].values())]
    rows = []
    for agent in sorted(summary["agents"], key=lambda agent: _number(losses[agent], "mean", math.inf)):
        test = summary["differences"].get(task, {}).get(agent, {})
        rows.append(
            {
                "name": agent,
                "best": agent == _best(summary),
                "colour": css(colours[agent]),
                "runs": losses[agent]["num_runs"],
                "missing": 0,  # said by the number of runs
                "loss": _with_half(losses[agent], 1, "{:.3f}"),
                "shares": [_with_half(summary[share][task][agent], 100, "{:.1f}", "%") for share in shares],
                "difference": _with_ends(test, "mean", "{:+.3f}"),
                "p": _p(test.get("p_adjusted")),
            }
        )
    figures = {name: inline(plots[name][0]) if name in plots else None for name in ("curves", "returns")}
    return {"name": task, "rows": rows, "shares": [SHARES[share] for share in shares], "plots": figures}


# --- Figures --------------------------------------------------------------------------------------------------


def _plots_over_all(
    summary: Mapping[str, Any], colours: Mapping[str, str]
) -> Iterator[tuple[str, tuple[Plot, list[dict[str, Any]]]]]:
    """Yield the figures over all tasks by name, each with its data."""
    scores, profiles = summary["normalised"], summary["profiles"]
    if not scores:
        return
    yield "scores", (scores_plot(scores, colours), [{"agent": agent, **score} for agent, score in scores.items()])
    rows = [
        {"agent": agent, "threshold": threshold, "share": share, "low": low, "high": high}
        for agent, own in profiles.items()
        for threshold, share, low, high in zip(own["thresholds"], own["share"], own["low"], own["high"], strict=True)
    ]
    yield "profiles", (profile_plot(profiles, colours), rows)
    phi = {agent: summary["cost"][agent]["phi"]["total"] for agent in scores}
    points = [{"agent": agent, "phi": phi[agent], "iqm": scores[agent]["iqm"]} for agent in scores]
    yield "cost", (cost_plot(scores, phi, colours), points)


def _plots_of_task(
    task: str,
    summary: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    records: Sequence[tuple[str, EpisodeRecord]],
    colours: Mapping[str, str],
) -> Iterator[tuple[str, tuple[Plot, list[dict[str, Any]]]]]:
    """Yield one task's figures by name, each with its data."""
    own = [record for of_task, record in records if of_task == task]
    # One that diverged ends with the score of an earlier step, which would look as if it had held it.
    whole = [record for record in own if not record.diverged]
    curves = {agent: [r.dev_scores for r in whole if r.agent == agent] for agent in summary["agents"]}
    curves = {agent: seeds for agent, seeds in curves.items() if seeds}
    if curves:
        # One that goes on for long, as full does, is a line at its end.
        horizon = int(np.median([len(seed) - 1 for seeds in curves.values() for seed in seeds]))
        reward = str(own[0].env["kwargs"].get("reward", "loss"))
        plot = dev_curves_plot(curves, _best(summary), horizon, reward)
        height = max(plot.height, 60 + 12.0 * len(curves))
        rows = [
            {"agent": record.agent, "seed": record.seed, "step": step, "dev_score": score}
            for record in own
            for step, score in enumerate(record.dev_scores)
        ]
        yield "curves", (replace(plot, name=f"curves_{task}", height=height, narrow_height=height), rows)
    of_task = [line for line in lines if line["task"] == task and line.get("episode_returns")]
    returns = {
        agent: _table([line["episode_returns"] for line in of_task if line["agent"] == agent])
        for agent in summary["agents"]
        if any(line["agent"] == agent for line in of_task)
    }
    if returns:
        rows = [
            {"agent": line["agent"], "seed": line["seed"], "episode": episode, "return": value}
            for line in of_task
            for episode, value in enumerate(line["episode_returns"], start=1)
        ]
        yield "returns", (returns_plot(f"returns_{task}", returns, colours), rows)


def _table(rows: Sequence[Sequence[float]]) -> np.ndarray:
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
    return table


# --- Text -----------------------------------------------------------------------------------------------------


def _hardware(lines: Sequence[Mapping[str, Any]], state: Mapping[str, Any]) -> str:
    """Return what the runs were made on, each with how many of them; lines of old do not say it, but run.json does."""
    of_old = state.get("machine", {}).get("processor")
    names = Counter(line.get("hardware") or of_old for line in lines if line.get("error") is None)
    names.pop(None, None)
    return ", ".join(names if len(names) == 1 else (f"{name} ({_count(num, 'run')})" for name, num in names.items()))


def _flat(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of results.jsonl with its costs as columns of their own."""
    flat = {name: value for name, value in line.items() if name not in ("phi_parts", "tokens", "seconds")}
    flat.pop("episode_returns", None)
    for kind in ("phi_parts", "tokens", "seconds"):
        costs = line.get(kind) or {}
        flat |= {f"{kind.removesuffix('_parts')}_{part}": costs.get(part) for part in PARTS}
    return flat


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    buffer = io.StringIO(newline="")
    if rows:
        writer = csv.DictWriter(buffer, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return buffer.getvalue().encode()


def _number(values: Mapping[str, Any] | None, name: str, otherwise: float) -> float:
    value = None if values is None else values.get(name)
    return otherwise if value is None else float(value)


def _text(value: float | None, form: str = "{:.2f}") -> str:
    return NOTHING if value is None else form.format(value)


def _with_ends(interval: Mapping[str, Any] | None, name: str, form: str = "{:.2f}") -> dict[str, str]:
    """Return a value and its interval's ends as two texts."""
    if not interval or interval.get(name) is None:
        return {"value": NOTHING, "ends": ""}
    ends = [interval["low"], interval["high"]]
    return {
        "value": form.format(interval[name]),
        "ends": "" if None in ends else f"{form.format(ends[0])} to {form.format(ends[1])}",
    }


def _with_half(spread: Mapping[str, Any], factor: float, form: str, unit: str = "") -> dict[str, str]:
    if spread["mean"] is None:
        return {"value": NOTHING, "half": ""}
    half = spread["half_width"]
    return {
        "value": form.format(factor * spread["mean"]) + unit,
        "half": "" if half is None else f"± {form.format(factor * half)}",
    }


def _p(value: float | None) -> str:
    return "" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"
