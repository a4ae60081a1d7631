"""The figures of a benchmark: where agents stand, how often they get how far, what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from raise_env.render import INK, MUTED, PAPER, RULE

from .plots import LEFT, Plot, add_axes, agent_dashes, label_ends, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["cost_plot", "profile_plot", "returns_plot", "scores_plot"]

_LINE = 19.0  # height of an agent's line, points

#: Scores below this are drawn at the edge: one agent far off would flatten all others.
_LOWEST = -1.25

_PHI_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)

#: More bands than this only hide each other.
_MAX_BANDS = 6


def scores_plot(scores: Mapping[str, Mapping[str, float]], colours: Mapping[str, str]) -> Plot:
    """Plot each agent's score over all tasks with its interval, the best at the top.

    Args:
        scores: Agent -> "iqm", "low", "high": where random is 0 and the oracle 1.
        colours: Agent -> colour.
    """
    order = sorted(scores, key=lambda agent: scores[agent]["iqm"])
    height = 52 + _LINE * len(order)

    def draw(figure: Figure, narrow: bool) -> None:
        axes = add_axes(figure, left=112 if narrow else 132, right=14, top=24, bottom=26)
        for line, agent in enumerate(order):
            _draw_interval(axes, line, scores[agent], colours[agent])
        axes.set_ylim(-0.6, len(order) - 0.4)
        axes.set_yticks(range(len(order)), [_short(agent, 18 if narrow else 22) for agent in order])
        axes.tick_params(axis="y", labelsize=9, labelcolor=INK)
        axes.grid(axis="y", visible=False)
        _mark_scale(axes)

    text = "Normalised interquartile mean over all tasks with its 95% interval, by agent; random is 0, the oracle 1."
    return Plot("scores", text, draw, height, height)


def _draw_interval(axes: Axes, line: int, score: Mapping[str, float], colour: str) -> None:
    value = score["iqm"]
    if value < _LOWEST:
        # At the left edge, wherever the axis will begin.
        axes.annotate(
            f"◂ {value:.1f}",
            (0, line),
            (3, 0),
            axes.get_yaxis_transform(),
            "offset points",
            va="center",
            fontsize=8.5,
            color=colour,
        )
        return
    if score["low"] is not None and score["high"] is not None:
        axes.plot([max(score["low"], _LOWEST), score["high"]], [line, line], color=colour, linewidth=2.2, alpha=0.45)
    axes.plot([value], [line], "o", color=colour, markersize=6)


def _mark_scale(axes: Axes) -> None:
    """Draw the lines of random and the oracle, and let the axis hold both."""
    low, high = axes.get_xlim()
    axes.set_xlim(max(min(low, -0.1), _LOWEST), max(high, 1.1))
    for place, name in ((0.0, "random"), (1.0, "oracle")):
        axes.axvline(place, color=RULE, linewidth=1.2, zorder=0)
        axes.annotate(
            name, (place, 1), (0, 4), ("data", "axes fraction"), "offset points", ha="center", fontsize=8.5, color=MUTED
        )


def profile_plot(profiles: Mapping[str, Mapping[str, Sequence[float]]], colours: Mapping[str, str]) -> Plot:
    """Plot for each agent the share of its runs that score above each threshold; few have a band of 95%.

    Args:
        profiles: Agent -> "thresholds", "share", "low", "high".
        colours: Agent -> colour.
    """

    def draw(figure: Figure, narrow: bool) -> None:
        axes = add_axes(figure, left=LEFT, right=92 if narrow else 128, top=24, bottom=34)
        title(axes, "Share of runs that score higher")
        ends, dashes, last = [], agent_dashes(colours), 1.0
        for agent, profile in profiles.items():
            x, share = np.array(profile["thresholds"]), np.array(profile["share"], dtype=np.float64)
            low, high = (np.array(profile[name], dtype=np.float64) for name in ("low", "high"))
            if len(profiles) <= _MAX_BANDS:
                axes.fill_between(x, low, high, color=colours[agent], alpha=0.1, linewidth=0)
            axes.plot(x, share, color=colours[agent], linewidth=1.6, linestyle=dashes[agent])
            ends.append((agent, float(np.mean(share[x >= _LOWEST])), colours[agent], False))
            last = float(x[-1])
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlim(max(axes.get_xlim()[0], _LOWEST), last)
        axes.set_xlabel("normalised score", fontsize=9, color=MUTED)
        # All curves end near 0: names stand in the order of the areas below them, without a value.
        label_ends(axes, ends, dashes, 12 if narrow else 16, with_value=False)

    text = "Performance profile: the share of all runs above each normalised score, by agent."
    height = max(285.0, 60 + 12 * len(profiles))
    return Plot("profiles", text, draw, height, height)


def cost_plot(scores: Mapping[str, Mapping[str, float]], phi: Mapping[str, float], colours: Mapping[str, str]) -> Plot:
    """Plot each agent's score against all that a run of it costs, on a logarithmic scale.

    Args:
        scores: As for `scores_plot`.
        phi: Agent -> Phi of a run, features, preparation, learning and final run together.
        colours: Agent -> colour.
    """
    known = [agent for agent in scores if phi.get(agent)]
    shown = [agent for agent in known if scores[agent]["iqm"] >= _LOWEST]
    below = [(agent, phi[agent], scores[agent]["iqm"], colours[agent]) for agent in known if agent not in shown]

    def draw(figure: Figure, narrow: bool) -> None:
        axes = add_axes(figure, left=LEFT, right=30 if narrow else 14, top=24, bottom=34)
        title(axes, "Normalised score")
        axes.set_xscale("log")
        axes.axvline(1.0, color=RULE, linewidth=1.2, zorder=0)
        for agent in shown:
            axes.plot([phi[agent]], [scores[agent]["iqm"]], "o", color=colours[agent], markersize=6, zorder=3)
        axes.update_datalim([(phi[agent], scores[shown[0]]["iqm"]) for agent in known if shown])
        axes.margins(x=0.16, y=0.1)
        axes.autoscale_view()
        ticks = [tick for tick in _PHI_TICKS if _within(tick, axes.get_xlim())]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        _name_points(axes, [(agent, phi[agent], scores[agent]["iqm"], colours[agent]) for agent in shown])
        _name_below(axes, below, 2 if narrow else 4)
        axes.set_xlabel("Phi of a run: 1 is a fine-tune on the whole pool", fontsize=9, color=MUTED)

    text = "Normalised score against the cost of a run in Phi, by agent."
    return Plot("cost", text, draw, 340, 340)


def _name_below(axes: Axes, points: Sequence[tuple[str, float, float, str]], names_wide: int) -> None:
    """Write under the points who scores below them, one above the other where they cost about the same."""
    left, right = axes.get_xlim()
    width = np.log(right / left) / names_wide
    levels: list[int] = []
    for place, (_, x, _, _) in enumerate(points):
        levels.append(sum(abs(np.log(other / x)) < width for _, other, _, _ in points[:place]))
    low, high = axes.get_ylim()
    axes.set_ylim(low - (high - low) * 0.05 * (max(levels, default=-1) + 1), high)
    for (name, x, y, colour), level in zip(points, levels, strict=True):
        axes.annotate(
            f"▾ {_short(name, 16)} {y:.1f}",
            (x, 0),
            (0, 8 + 12 * level),
            axes.get_xaxis_transform(),
            "offset points",
            ha="center",
            va="center",
            fontsize=8.5,
            color=colour,
        )


def _within(value: float, ends: tuple[float, float]) -> bool:
    return ends[0] <= value <= ends[1]


def _name_points(axes: Axes, points: Sequence[tuple[str, float, float, str]]) -> None:
    """Write each point's name beside it, moved up or down where it would lie on another's."""
    taken: list[tuple[float, float, float]] = []
    for name, x, y, colour in sorted(points, key=lambda point: -point[2]):
        place = axes.transData.transform((x, y)) * 72 / axes.figure.dpi
        width, short = 5.2 * min(len(name), 16), _short(name, 16)
        left, low = place[0] + 6, place[1]
        while any(abs(low - other) < 10 and left < end and start < left + width for start, end, other in taken):
            low -= 2.5
        taken.append((left, left + width, low))
        axes.annotate(
            short,
            (x, y),
            (6, low - place[1]),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=colour,
            bbox={"facecolor": PAPER, "alpha": 0.6, "linewidth": 0, "pad": 0.5},
        )


def returns_plot(name: str, returns: Mapping[str, np.ndarray], colours: Mapping[str, str]) -> Plot:
    """Plot the mean return of each learning episode over seeds, by agent, along the share of its learning.

    Args:
        name: File name without its ending.
        returns: Agent -> returns, shape (seeds, episodes); NaN where a seed has fewer.
        colours: Agent -> colour.
    """

    def draw(figure: Figure, narrow: bool) -> None:
        axes = add_axes(figure, left=LEFT, right=92 if narrow else 128, top=24, bottom=34)
        title(axes, "Return of learning episodes, mean over seeds")
        ends, dashes = [], agent_dashes(colours)
        for agent, table in returns.items():
            mean = np.nanmean(table, axis=0)
            share = np.arange(1, len(mean) + 1) / len(mean)
            axes.plot(share, mean, "o", linestyle=dashes[agent], color=colours[agent], linewidth=1.6, markersize=3)
            ends.append((agent, float(mean[-1]), colours[agent], False))
        axes.set_xlabel("share of its learning", fontsize=9, color=MUTED)
        label_ends(axes, ends, dashes, 12 if narrow else 16)

    return Plot(name, f"Return of learning episodes for {', '.join(returns)}.", draw, 230, 230)


def _short(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else f"{text[: max_chars - 1]}…"
