"""The results of a run for people: one page that opens from disk, its figures as files, a table for a terminal.

The page is a single file without a reference to anything outside it. What a pool's rows say is untrusted:
the template escapes every value, and the page's own policy lets no script run but the one it came with.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from raise_env.render import class_colour

from .catalogue import agent_name
from .contrast import Trait, Word
from .page import NOTHING, TEMPLATES, css, inline, load_template, pairs, write_files
from .plots import COLOURS, Plot, agent_colours, dev_curves_plot, learning_plot, selection_plot

if TYPE_CHECKING:
    from .statistics import Interval

__all__ = [
    "MAX_ROWS",
    "Selection",
    "WantedText",
    "format_table",
    "results_table",
    "write_report",
]

#: Rows shown on the page; selected.jsonl has them all.
MAX_ROWS = 200

_SHORT_CHARS = 240
_LONG_CHARS = 4000

#: A row of the pool with the selector's score: score, class, prompt, response.
WantedText = tuple[float, int, str, str]


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """The rows that the final run trained on, in order, beside the pool that they come from.

    Args:
        steps: (m,) step of each row, from 1.
        classes: (m,) class of each row, in [0, num_classes).
        pool_ids: (m,) place of each row in the pool; a row trained on twice is there twice.
        num_classes: C, the number of classes.
        pool_class_counts: (C,) how many of the pool's rows each class has.
        texts: (step, class, prompt, response) of the rows to show; the first 200 are.
        scores: (m,) the selector's score of each row at the start of a run, in standard deviations over the pool; empty
            where it has none.
        labels: Name of a column that says what kind of row each is -> its value for each of the m rows.
        pool_label_counts: Name of such a column -> value -> how many of the pool's rows have it.
        are_labels_hidden: Whether these are the labels of an embedded task, which no selector sees.
        traits: How the rows differ from the pool in length and difficulty.
        words: The words that are more frequent in them than in the pool, and those that are less.
        wanted: (score, class, prompt, response) of the rows that the selector wants most, best first, and least.
    """

    steps: npt.NDArray[np.int64]
    classes: npt.NDArray[np.int64]
    pool_ids: npt.NDArray[np.int64]
    num_classes: int
    pool_class_counts: npt.NDArray[np.int64]
    texts: Sequence[tuple[int, int, str, str]] = ()
    scores: Sequence[float] = ()
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    pool_label_counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    are_labels_hidden: bool = False
    traits: Sequence[Trait] = ()
    words: tuple[Sequence[Word], Sequence[Word]] = ((), ())
    wanted: tuple[Sequence[WantedText], Sequence[WantedText]] = ((), ())

    def count_by_step(self, num_steps: int) -> npt.NDArray[np.int64]:
        """Return how many rows of each class each step trained on, (max(num_steps, last step), C)."""
        num_steps = max(num_steps, int(self.steps.max(initial=0)))
        counts = np.zeros((num_steps, self.num_classes), dtype=np.int64)
        np.add.at(counts, (self.steps - 1, self.classes), 1)
        return counts


# --- Text -----------------------------------------------------------------------------------------------------


def format_table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Return a table as plain text: columns two spaces apart, numbers to the right, no trailing spaces.

    Args:
        rows: Cells by row, each as long as the header; shown by `str`, a float with four significant digits.
        header: Names of the columns.
    """
    table = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *table, strict=True)]
    right = [all(_is_numeric(cell) for cell in column) for column in zip(*table, strict=True)] or [False] * len(widths)
    lines = []
    for line in [list(header), ["-" * width for width in widths], *table]:
        cells = zip(line, widths, right, strict=True)
        lines.append("  ".join(cell.rjust(width) if side else cell.ljust(width) for cell, width, side in cells))
    return "\n".join(line.rstrip() for line in lines)


def results_table(report: Mapping[str, Any]) -> tuple[list[list[str]], list[str]]:
    """Return a report's results as `format_table`'s arguments: the base model, then each agent.

    Args:
        report: What report.json holds.
    """
    metrics = _metrics(report)
    rows = [["base model", "", *(_value(metric, report["base"].get(metric)) for metric in metrics)]]
    for name in _order(report):
        agent = report["agents"][name]
        intervals = [_interval(agent.get(metric, ())) for metric in metrics]
        seeds = max((len(agent.get(metric, ())) for metric in metrics), default=0)
        rows.append([name, str(seeds), *map(_interval_text, metrics, intervals)])
    return rows, ["agent", "seeds", *(_metric_name(metric).lower() for metric in metrics)]


def _interval(values: Sequence[float | None]) -> Interval:
    """Return the mean of a few runs with its interval; None stands for a run that diverged."""
    from .statistics import mean_interval  # half a second, for scipy's sake

    return mean_interval(np.array(values, dtype=np.float64))


def _is_numeric(text: str) -> bool:
    """Return whether a cell holds a number, maybe with its interval or unit, or nothing."""
    return not text or text[0].isdigit() or (text[0] in f"+-{NOTHING}" and not text[1:2].isalpha())


def _interval_text(metric: str, interval: Interval) -> str:
    mean = _value(metric, interval.value)
    text = f"{mean} {_half(metric, interval)}".rstrip()
    return f"{text} ({interval.num_missing} diverged)" if interval.num_missing else text


def _half(metric: str, interval: Interval) -> str:
    """Return the interval's half width as text; nothing for a single seed. A share's is in percentage points."""
    return f"± {_value(metric, interval.half_width).rstrip('%')}" if interval.has_ends else ""


def _value(metric: str, value: float | None) -> str:
    """Return a metric's value as text: shares in per cent, everything else with three decimals."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{100 * value:.1f}%" if _is_share(metric) else f"{value:.3f}"


def _is_share(metric: str) -> bool:
    return metric.endswith(("accuracy", "accuracy_norm", "choice_probability", "exact_match", "flexible_match"))


def _metric_name(metric: str) -> str:
    return metric.replace("_", " ").capitalize()


def _metrics(report: Mapping[str, Any]) -> list[str]:
    """Return the names of what was measured: dev loss, test loss and test accuracy first."""
    found = [*report["base"], *(metric for agent in report["agents"].values() for metric in agent)]
    first = [metric for metric in ("dev_loss", "test_loss", "test_accuracy") if metric in found]
    return list(dict.fromkeys([*first, *found]))


def _learned(report: Mapping[str, Any]) -> str | None:
    """Return the name of the learned selector among a report's agents."""
    names = report["agents"]
    asked = agent_name(str(report.get("settings", {}).get("agent", "")))  # the settings have a selector's folder too
    if asked in names:
        return asked
    return next((name for name in names if name.startswith(("raise_", "selector", "sb3:"))), None)


def _order(report: Mapping[str, Any]) -> list[str]:
    """Return the agents as the table lists them: random, the learned selector, then the others as they came."""
    names = list(report["agents"])
    first = [name for name in ("random", _learned(report)) if name in names]
    return list(dict.fromkeys([*first, *names]))


# --- Files ----------------------------------------------------------------------------------------------------


def write_report(
    folder: Path,
    report: Mapping[str, Any],
    episodes: Sequence[Mapping[str, Any]] = (),
    selection: Selection | None = None,
) -> None:
    """Write report.html and plots/*.png; each file appears whole or not at all.

    Args:
        folder: Where to write; made where it does not exist.
        report: What report.json holds: `base` and `agents`; and, as far as known, `cost`, `settings`,
            `headline`, `learning`, `curves`, `machine`, `date`. A part that is missing is a section left out.
        episodes: Episode records, listed on the page; they give the dev curves where the report has none.
        selection: What the final run trained on; None leaves the section out.

    Raises:
        OutputError: The folder or a file in it cannot be written.
    """
    plots = _plots(report, episodes, selection)
    files = {f"plots/{plot.name}.png": plot.png() for plot in plots.values()}
    files["report.html"] = _page(report, episodes, selection, plots).encode()
    write_files(folder, files)


def _plots(
    report: Mapping[str, Any], episodes: Sequence[Mapping[str, Any]], selection: Selection | None
) -> dict[str, Plot]:
    settings, learning = report.get("settings", {}), report.get("learning", {})
    reward, curves = str(settings.get("reward", "loss")), _curves(report, episodes)
    lengths = [len(seed) - 1 for seeds in curves.values() for seed in seeds]
    horizon = int(settings.get("horizon") or max(lengths, default=0))
    plots = []
    if max(lengths, default=0) > 0:
        plots.append(dev_curves_plot(curves, _learned(report), horizon, reward))
    if learning.get("episode_returns"):
        greedy = learning.get("greedy_dev_scores") or []
        by_chance = _mean_return(curves.get("random", ()), learning.get("num_steps"))
        plots.append(learning_plot(learning["episode_returns"], greedy, by_chance, reward))
    if selection is not None and len(selection.steps):
        plots.append(selection_plot(selection.count_by_step(horizon), selection.pool_class_counts))
    return {plot.name: plot for plot in plots}


def _curves(
    report: Mapping[str, Any], episodes: Sequence[Mapping[str, Any]]
) -> Mapping[str, Sequence[Sequence[float]]]:
    """Return dev scores by agent and seed, in the table's order, from the report or else from the episodes."""
    found: dict[str, list[Sequence[float]]] = {name: list(seeds) for name, seeds in report.get("curves", {}).items()}
    if not found:
        for episode in episodes:
            found.setdefault(str(episode["agent"]), []).append(episode["dev_scores"])
    return {name: found[name] for name in dict.fromkeys([*_order(report), *found]) if found.get(name)}


def _mean_return(seeds: Sequence[Sequence[float]], num_steps: int | None = None) -> float | None:
    """Return the mean gain over so many first steps, or over all: what learning episodes are compared with."""
    gains = [seed[min(num_steps or len(seed), len(seed) - 1)] - seed[0] for seed in seeds if len(seed) > 1]
    return _interval(gains).value if gains else None


# --- Page -----------------------------------------------------------------------------------------------------


def _page(
    report: Mapping[str, Any],
    episodes: Sequence[Mapping[str, Any]],
    selection: Selection | None,
    plots: Mapping[str, Plot],
) -> str:
    from markupsafe import Markup

    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    return load_template("report.html.jinja", escapes=True).render(
        title="Which instructions to train on",
        date=report.get("date"),
        headline=report.get("headline"),
        colours=COLOURS,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        learning_steps=report.get("learning", {}).get("num_steps"),
        plots={name: inline(plots.get(name)) for name in ("dev_curves", "learning", "selection")},
        results=_results(report),
        tiles=_tiles(report, selection),
        selection=_selection(selection) if "selection" in plots and selection is not None else None,
        costs=_costs(report.get("cost", {})),
        episodes=_episodes(episodes),
        settings=pairs(report.get("settings", {})),
        machine=pairs(report.get("machine", {})),
    )


def _results(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result table: its columns, and a row for the base model and each agent."""
    metrics, names, learned = _metrics(report), _order(report), _learned(report)
    colours = agent_colours(names, learned)
    table = {name: [_interval(report["agents"][name].get(metric, ())) for metric in metrics] for name in names}
    strip_metric = "test_loss" if "test_loss" in metrics else metrics[0] if metrics else ""
    strips = _strips({name: table[name][metrics.index(strip_metric)] for name in names} if metrics else {})
    rows = [
        {
            "name": name,
            "learned": name == learned,
            "colour": css(colours[name]),
            "seeds": max((len(report["agents"][name].get(metric, ())) for metric in metrics), default=0),
            "cells": [_cell(metric, interval) for metric, interval in zip(metrics, table[name], strict=True)],
            "strip": strips.get(name),
        }
        for name in names
    ]
    columns = [{"name": _metric_name(metric), "unit": _unit(metric)} for metric in metrics]
    base = [_value(metric, report["base"].get(metric)) for metric in metrics]
    return {"columns": columns, "base": base, "rows": rows, "strip_name": _metric_name(strip_metric)}


def _cell(metric: str, interval: Interval) -> dict[str, str]:
    note = f"{interval.num_missing} diverged, left out" if interval.num_missing else ""
    ends = f"{_value(metric, interval.low)} to {_value(metric, interval.high)}" if interval.has_ends else ""
    return {"mean": _value(metric, interval.value), "half": _half(metric, interval), "ends": ends, "note": note}


def _unit(metric: str) -> str:
    if metric.endswith("loss"):
        return "nats per response token, lower is better"
    return "share of rows, higher is better" if _is_share(metric) else ""


def _strips(intervals: Mapping[str, Interval]) -> dict[str, dict[str, float]]:
    """Return where each agent's mean and interval lie, in per cent of a scale that all of them share.

    Empty where there is nothing to compare, or no interval to compare it by.
    """
    ends = [
        value
        for interval in intervals.values()
        for value in (interval.value, interval.low, interval.high)
        if math.isfinite(value)
    ]
    if len(intervals) < 2 or not any(interval.has_ends for interval in intervals.values()) or max(ends) <= min(ends):
        return {}
    low, span = min(ends), max(ends) - min(ends)

    def place(value: float, instead: float) -> float:
        return round(4 + 92 * ((value if math.isfinite(value) else instead) - low) / span, 2)

    return {
        name: {
            "mean": place(interval.value, low),
            "low": place(interval.low, interval.value),
            "high": place(interval.high, interval.value),
        }
        for name, interval in intervals.items()
        if math.isfinite(interval.value)
    }


def _tiles(report: Mapping[str, Any], selection: Selection | None) -> list[dict[str, str]]:
    """Return the few numbers that stand at the top of the page: label, value, and what to compare it with."""
    learned, agents, base = _learned(report), report["agents"], report["base"]
    tiles = []
    for metric in ("test_loss", "test_accuracy") if learned else ():
        if metric in agents[learned]:
            others = [(name, _interval(agents[name].get(metric, ())).value) for name in ("random",) if name in agents]
            others += [("base model", base[metric])] if metric in base else []
            note = ", ".join(f"{name} {_value(metric, value)}" for name, value in others)
            value = _value(metric, _interval(agents[learned][metric]).value)
            tiles.append({"label": _metric_name(metric), "value": value, "note": note})
    if selection is not None and len(selection.steps):
        distinct, pool = len(np.unique(selection.pool_ids)), int(selection.pool_class_counts.sum())
        note = f"{distinct:,} different ones, {distinct / max(pool, 1):.1%} of a pool of {pool:,}"
        tiles.append({"label": "Rows trained on", "value": f"{len(selection.steps):,}", "note": note})
    total = report.get("cost", {}).get("phi", {}).get("total")
    if total is not None:
        tiles.append({"label": "Cost", "value": f"{total:.3g} Φ", "note": "one Φ is a fine-tune on the whole pool"})
    return tiles


def _selection(selection: Selection) -> dict[str, Any]:
    classes = Counter(int(index) for index in selection.classes)
    pool = {index: int(count) for index, count in enumerate(selection.pool_class_counts)}
    repeats = Counter(int(index) for index in selection.pool_ids)
    class_rows = [{**row, "colour": css(class_colour(row["value"]))} for row in _shares(classes, pool)]
    groups = [{"name": "class", "rows": class_rows}]
    for name, values in sorted(selection.labels.items(), key=lambda item: len(set(item[1]))):
        counts = Counter(str(value) for value in values)
        groups.append({"name": name, "rows": _shares(counts, selection.pool_label_counts.get(name, {}))})
    return {
        "groups": groups,
        "count": len(selection.steps),
        "distinct": len(repeats),
        "most_repeated": max(repeats.values(), default=0),
        "are_labels_hidden": selection.are_labels_hidden,
        "traits": [_trait(trait) for trait in selection.traits],
        "words": [(name, words) for name, words in zip(("more", "fewer"), selection.words, strict=True) if words],
        "wanted": [
            {"name": name, "rows": [{**_row(0, *entry[1:]), "score": f"{entry[0]:+.1f}"} for entry in rows]}
            for name, rows in zip(("most", "least"), selection.wanted, strict=True)
            if rows
        ],
        "has_scores": len(selection.scores) > 0,
        "rows": _shown_rows(selection),
    }


def _shown_rows(selection: Selection) -> list[dict[str, Any]]:
    scores = [f"{score:+.1f}" for score in selection.scores[:MAX_ROWS]] or [NOTHING] * MAX_ROWS
    return [{**_row(*entry), "score": score} for entry, score in zip(selection.texts[:MAX_ROWS], scores, strict=False)]


def _trait(trait: Trait) -> dict[str, str]:
    return {
        "name": trait.name,
        "unit": trait.unit,
        "chosen": f"{trait.chosen:.3g}",
        "pool": f"{trait.pool:.3g}",
        "difference": f"{trait.difference:+.2f}",
    }


def _shares(counts: Mapping[Any, int], pool: Mapping[Any, int]) -> list[dict[str, Any]]:
    """Return for each value its share of the rows trained on and of the pool, in per cent, and their scale."""
    total, pool_total = max(sum(counts.values()), 1), sum(pool.values())
    rows = []
    for value in dict.fromkeys([*pool, *counts]):
        share = 100 * counts.get(value, 0) / total
        pool_share = 100 * pool.get(value, 0) / pool_total if pool_total else None
        rows.append({"value": value, "count": counts.get(value, 0), "share": share, "pool": pool_share})
    most = max((max(row["share"], row["pool"] or 0) for row in rows), default=0) or 1
    for row in rows:
        row["width"], row["pool_width"] = 100 * row["share"] / most, 100 * (row["pool"] or 0) / most
        row["colour"] = "var(--accent)"
    return rows


def _row(step: int, index: int, prompt: str, response: str) -> dict[str, Any]:
    return {
        "step": step,
        "class": index,
        "colour": css(class_colour(index)),
        "prompt": _shorten(prompt),
        "response": _shorten(response),
    }


def _shorten(text: str) -> dict[str, str]:
    """Return a text as what is shown at once and what unfolds; what is longer still is cut off."""
    if len(text) <= _SHORT_CHARS:
        return {"short": text, "rest": ""}
    cut = text.rfind(" ", _SHORT_CHARS // 2, _SHORT_CHARS)
    cut = _SHORT_CHARS if cut < 0 else cut
    left = len(text) - _LONG_CHARS
    return {"short": text[:cut], "rest": text[cut:_LONG_CHARS] + (f" … {left:,} more characters" if left > 0 else "")}


def _costs(cost: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Return the cost table's rows: the part, then Phi, tokens and seconds, empty where not measured."""
    kinds = {"phi": lambda value: f"{value:.3g}", "tokens": lambda value: f"{value:,.0f}", "seconds": duration}
    parts = list(dict.fromkeys(part for kind in kinds for part in cost.get(kind, {})))
    parts.sort(key=lambda part: part == "total")
    rows = []
    for part in parts:
        values = [(cost.get(kind, {}).get(part), text) for kind, text in kinds.items()]
        rows.append([part.replace("_", " "), *("" if value is None else text(value) for value, text in values)])
    return rows


def duration(seconds: float) -> str:
    """Return a time as one reads it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _episodes(episodes: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return a line for each record: agent, seed, steps, rows, return, last dev score, test score."""
    rows = []
    for episode in episodes:
        scores, test = episode["dev_scores"], episode.get("test_score")
        numbers = [sum(episode["rewards"]), scores[-1], math.nan if test is None else test]
        counts = [len(episode["actions"]), sum(len(action) for action in episode["actions"])]
        texts = [f"{value:.3f}" if math.isfinite(value) else NOTHING for value in numbers]
        rows.append([str(episode["agent"]), str(episode["seed"]), *map(str, counts), *texts])
    return rows
