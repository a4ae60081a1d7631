"""The figures of a report: each drawn once by matplotlib, for a wide page, a phone, and as a file.

Inside a page a figure is SVG whose text is set in the page's font and whose colours are the page's own
variables, so that it follows the reader into dark mode; beside it the same drawing is saved as PNG. What
belongs to the learned selector is always in `ACCENT`, random choice is always grey.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from raise_env.config import REWARDS
from raise_env.render import ACCENT, CLASS_COLOURS, INK, MUTED, PAPER, RULE, class_colour, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "LEFT",
    "Plot",
    "add_axes",
    "agent_colours",
    "agent_dashes",
    "dev_curves_plot",
    "integer_ticks",
    "label_ends",
    "learning_plot",
    "selection_plot",
    "title",
]

#: What matplotlib takes for a line: a name, or where its dashes begin and how long they are.
LineStyle: TypeAlias = str | tuple[float, tuple[float, ...]]

_ORACLE = "#009e73"
_OTHERS = ("#0072b2", "#b5538c", "#8c6d31", "#7a5195", "#2f8f9d", "#a8760a", "#b3392f", "#647418", "#3f4fb0")

#: Line styles of the agents that share a colour, in turn, and what stands behind the name for each.
_DASHES: dict[LineStyle, str] = {"-": "", (0, (5, 1.5)): " ╌", (0, (1.5, 1.2)): " ┈"}

#: The page's colours: CSS name -> (on white, on black).
COLOURS: Mapping[str, tuple[str, str]] = {
    "paper": (PAPER, "#15181c"),
    "ink": (INK, "#e4e7eb"),
    "muted": (MUTED, "#98a1ac"),
    "rule": (RULE, "#30363d"),
    "accent": (ACCENT, "#ff8b42"),
    "oracle": (_ORACLE, "#2cc295"),
    **{
        f"other-{index}": pair
        for index, pair in enumerate(
            zip(
                _OTHERS,
                (
                    *("#4ea3e0", "#e08bbd", "#c2a05f", "#b08bd0", "#5cc0ce", "#d9ab3a"),
                    *("#ef7d72", "#b4c853", "#8f9cf5"),
                ),
                strict=True,
            )
        )
    },
    **{
        f"class-{index}": pair
        for index, pair in enumerate(
            zip(
                CLASS_COLOURS,
                ("#6d9fd4", "#d3c55e", "#cf6fa3", "#4fb062", "#7ad3f2", "#f2899a", "#8f80d8", "#aaaaaa"),
                strict=True,
            )
        )
    },
}

_WIDE_PT, _NARROW_PT = 648.0, 268.0

#: Room for tick labels, points.
LEFT = 32.0
_LABEL_GAP_PT = 11.5


@dataclass(frozen=True, slots=True, eq=False)
class Plot:
    """One figure.

    Args:
        name: File name without its ending.
        description: What it shows, for readers who cannot see it.
        draw: Draws onto an empty figure; the second argument says whether it is the narrow form.
        height: Height in points of the wide form.
        narrow_height: Height in points of the narrow form.
    """

    name: str
    description: str
    draw: Callable[[Figure, bool], None]
    height: float = 250.0
    narrow_height: float = 230.0

    def png(self) -> bytes:
        """Return the wide form as PNG, 200 pixels an inch: sharp on a dense screen."""
        from matplotlib.transforms import Bbox

        margin = 0.2
        page = Bbox.from_extents(-margin, -margin, _WIDE_PT / 72 + margin, self.height / 72 + margin)
        return self._save(False, "png", dpi=200, bbox_inches=page)

    def svg(self, narrow: bool) -> str:
        """Return SVG to put into a page: no header, no size of its own, colours as CSS variables."""
        text = self._save(narrow, "svg").decode()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = text.replace("xlink:href", "href")
        text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
        text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
        text = re.sub(r' (xmlns(:xlink)?|version)="[^"]*"', "", text)
        for name, (light, _) in COLOURS.items():
            text = text.replace(light, f"var(--{name})")
        return text

    def _save(self, narrow: bool, kind: str, **options: Any) -> bytes:
        import matplotlib
        from matplotlib import style
        from matplotlib.figure import Figure

        width, height = (_NARROW_PT, self.narrow_height) if narrow else (_WIDE_PT, self.height)
        # The salt makes SVG ids repeatable, and different in each figure of a page.
        own: Any = {"svg.fonttype": "none", "svg.hashsalt": f"{self.name}{narrow}", "text.parse_math": False}
        with style.context("default"), matplotlib.rc_context(own):
            figure = Figure(figsize=(width / 72, height / 72), facecolor=PAPER if kind == "png" else "none")
            self.draw(figure, narrow)
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None, **options)
        return buffer.getvalue()


def agent_colours(names: Sequence[str], learned: str | None) -> dict[str, str]:
    """Return each agent's colour: the learned selector's and random's are fixed, others take turns."""
    fixed = {"random": MUTED, "oracle": _ORACLE}
    if learned is not None:
        fixed[learned] = ACCENT
    others = [name for name in names if name not in fixed]
    turns = {name: _OTHERS[index % len(_OTHERS)] for index, name in enumerate(others)}
    return {name: fixed.get(name) or turns[name] for name in names}


def agent_dashes(colours: Mapping[str, str]) -> dict[str, LineStyle]:
    """Return each agent's line style: where more agents than colours share one, the later ones are dashed."""
    seen, in_turn = Counter[str](), list(_DASHES)
    styles: dict[str, LineStyle] = {}
    for name, colour in colours.items():
        styles[name] = in_turn[seen[colour] % len(in_turn)]
        seen[colour] += 1
    return styles


# --- Dev curves -----------------------------------------------------------------------------------------------


def dev_curves_plot(
    curves: Mapping[str, Sequence[Sequence[float]]], learned: str | None, horizon: int, reward: str
) -> Plot:
    """Plot the dev score after each step: an agent's mean over seeds, and a band from its lowest to its highest.

    Args:
        curves: Agent -> for each seed the dev scores, the first before any update. A seed that ended early
            (its budget was used up) keeps its last score; one that is not finite is left out; an agent that goes
            on past the horizon (a fine-tune on all the data) becomes a line at its last score.
        learned: The agent to draw attention to.
        horizon: Steps that the axis spans.
        reward: What the score is; "loss" is drawn as the loss itself, so that lower is better.
    """
    colours = agent_colours(list(curves), learned)
    dashes = agent_dashes(colours) | {"oracle": (0, (4, 2))}
    sign = -1.0 if reward == "loss" else 1.0
    stacks = {name: sign * _stack(seeds, horizon + 1) for name, seeds in curves.items()}
    table = {name: stack for name, stack in stacks.items() if len(stack)}

    def draw(figure: Figure, narrow: bool) -> None:
        axes = add_axes(figure, left=LEFT, right=84 if narrow else 118, top=24, bottom=34)
        title(axes, _score_title(reward, narrow))
        ends = [
            _draw_agent(axes, name, stack, horizon, (colours[name], dashes[name]), name == learned)
            for name, stack in table.items()
        ]
        axes.set_xlim(0, max(horizon, 1))
        # Of whoever trains for longer only the end is drawn; its many scores would outweigh all others.
        drawn = [stack if stack.shape[1] <= horizon + 1 else stack[:, -1:] for stack in table.values()]
        axes.set_ylim(*_curve_range(drawn))
        integer_ticks(axes, 4 if narrow else 8)
        axes.set_xlabel("step", fontsize=9, color=MUTED)
        label_ends(axes, ends, dashes, 13 if narrow else 18)

    names = ", ".join(table)
    return Plot("dev_curves", f"Dev score after each step for {names}.", draw, height=285, narrow_height=250)


def _score_title(reward: str, narrow: bool) -> str:
    if reward == "loss":
        return "Dev loss, nats per response token" + ("" if narrow else " (lower is better)")
    if reward == "choice_probability":
        return "Mean probability of the right choice"
    named = reward.replace("_", " ") if reward in REWARDS else None
    return f"Dev {named}, share of dev rows" if named else f"Dev score, {reward}"[: 44 if narrow else 90]


def _stack(seeds: Sequence[Sequence[float]], min_length: int) -> npt.NDArray[np.float64]:
    """Return the finite curves as rows of one array, short ones drawn out at their last value."""
    finite = [np.asarray(seed, dtype=np.float64) for seed in seeds if len(seed) and np.isfinite(seed).all()]
    length = max([min_length, *map(len, finite)])
    padded = [np.pad(seed, (0, length - len(seed)), mode="edge") for seed in finite]
    return np.stack(padded) if padded else np.empty((0, length))


def _draw_agent(
    axes: Axes, name: str, table: npt.NDArray[np.float64], horizon: int, look: tuple[str, LineStyle], strong: bool
) -> tuple[str, float, str, bool]:
    """Draw one agent's curves; return its label: text, value, colour, and whether it is the strong one."""
    colour, dash = look
    width, order = (2.4, 4) if strong else (1.5, 3)
    mean = table.mean(axis=0)
    label = (name, float(mean[-1]), colour, strong)
    if len(mean) > horizon + 1:
        axes.axhline(float(mean[-1]), color=colour, linewidth=width, linestyle=(0, (1, 2)), zorder=order)
        return label
    steps = np.arange(len(mean))
    if len(table) > 1:
        alpha = 0.18 if strong else 0.10
        axes.fill_between(steps, *_ends(table), color=colour, alpha=alpha, linewidth=0, zorder=order - 2)
    axes.plot(steps, mean, color=colour, linewidth=width, linestyle=dash, zorder=order, solid_capstyle="round")
    return label


def _ends(table: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    return table.min(axis=0), table.max(axis=0)


def _curve_range(tables: Sequence[npt.NDArray[np.float64]]) -> tuple[float, float]:
    """Return limits that hold every curve, save where one that went astray would flatten all the others."""
    if not tables:
        return -1.0, 1.0
    values = np.concatenate([table.ravel() for table in tables])
    starts = np.concatenate([table[:, 0] for table in tables])
    spread = float(np.ptp(np.append(np.quantile(values, [0.1, 0.9]), starts)))
    middle = float(np.median(values))
    low, high = max(float(values.min()), middle - 2 * spread), min(float(values.max()), middle + 2 * spread)
    room = 0.06 * max(high - low, 1e-3)
    return low - room, high + room


def label_ends(
    axes: Axes,
    ends: Sequence[tuple[str, float, str, bool]],
    dashes: Mapping[str, LineStyle],
    max_chars: int,
    with_value: bool = True,
) -> None:
    """Write each curve's name, and its last value, beside its end, moved apart where they would touch."""
    height = axes.get_window_extent().height * 72 / axes.figure.dpi
    low, high = axes.get_ylim()
    shown = sorted(ends, key=lambda end: end[1])
    wanted = [min(max((value - low) / (high - low), 0.0), 1.0) * height for _, value, _, _ in shown]
    for (name, value, colour, strong), y in zip(shown, _spread(wanted, _LABEL_GAP_PT, height), strict=True):
        short = name if len(name) <= max_chars else f"{name[: max_chars - 1]}…"
        short += _DASHES.get(dashes[name], "")
        axes.annotate(
            f"{short}  {value:.2f}" if with_value else short,
            (1, y / height),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=colour,
            weight="bold" if strong else "normal",
            annotation_clip=False,
        )


def _spread(wanted: Sequence[float], gap: float, top: float) -> list[float]:
    """Return ascending heights at least `gap` apart, near those wanted; below `top` as long as they fit."""
    placed: list[float] = []
    for height in wanted:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    limit = top
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], limit)
        limit = placed[index] - gap
    return placed


# --- Learning -------------------------------------------------------------------------------------------------


def learning_plot(returns: Sequence[float], greedy: Sequence[float], random_return: float | None, reward: str) -> Plot:
    """Plot the return of each episode that the selector learned from and, where known, how it does when greedy.

    Args:
        returns: Return of each episode, in order; a return is the gain in dev score from first step to last.
        greedy: Dev score at the end of an episode played without exploration, after each learning episode
            (one more value: also before the first); empty where not measured.
        random_return: Mean return of random choice, a line to compare with.
        reward: What the score is, as in `dev_curves_plot`.
    """

    def draw(figure: Figure, narrow: bool) -> None:
        if not len(greedy):
            _draw_returns(add_axes(figure, LEFT, 14, 24, 34), returns, random_return)
        elif narrow:
            _draw_returns(add_axes(figure, LEFT, 14, 24, 264), returns, random_return)
            _draw_greedy(add_axes(figure, LEFT, 14, 254, 34), greedy, len(returns), reward)
        else:
            _draw_returns(add_axes(figure, LEFT, 346, 24, 34), returns, random_return)
            _draw_greedy(add_axes(figure, 330 + LEFT, 14, 24, 34), greedy, len(returns), reward)

    text = "Return of each learning episode" + (", and the greedy selector's dev score." if len(greedy) else ".")
    return Plot("learning", text, draw, height=230, narrow_height=460 if len(greedy) else 220)


def _draw_returns(axes: Axes, returns: Sequence[float], random_return: float | None) -> None:
    values = np.asarray(returns, dtype=np.float64)
    episodes = np.arange(1, len(values) + 1)
    title(axes, "Return of each episode (gain in dev score)")
    axes.plot(episodes, values, "o", color=ACCENT, markersize=4.5, alpha=0.55, markeredgewidth=0, zorder=3)
    window = max(3, len(values) // 8)
    if len(values) >= 2 * window:
        axes.plot(episodes, _moving_mean(values, window), color=ACCENT, linewidth=2.2, zorder=4)
    if random_return is not None and np.isfinite(random_return):
        axes.axhline(random_return, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=2)
        axes.annotate(
            "random choice",
            (0, random_return),
            xycoords=("axes fraction", "data"),
            xytext=(3, -11),
            textcoords="offset points",
            fontsize=8.5,
            color=MUTED,
            bbox={"facecolor": PAPER, "alpha": 0.75, "linewidth": 0, "pad": 1},
            zorder=5,
        )
    _episode_axis(axes, 1, len(values))
    axes.margins(y=0.18)


def _draw_greedy(axes: Axes, greedy: Sequence[float], num_episodes: int, reward: str) -> None:
    values = np.asarray(greedy, dtype=np.float64) * (-1.0 if reward == "loss" else 1.0)
    first = 0 if len(values) == num_episodes + 1 else 1
    episodes = np.linspace(first, max(num_episodes, first + len(values) - 1), len(values))
    what = "loss" if reward == "loss" else "score"
    title(axes, f"Dev {what} at the end, without exploration")
    axes.plot(episodes, values, "o-", color=ACCENT, markersize=4.5, linewidth=2.2, markeredgewidth=0, zorder=3)
    _episode_axis(axes, first, max(num_episodes, first + len(values) - 1))
    axes.margins(y=0.18)


def _episode_axis(axes: Axes, first: int, last: int) -> None:
    room = 0.04 * max(last - first, 1)
    axes.set_xlim(first - room, last + room)
    axes.set_xlabel("learning episode", fontsize=9, color=MUTED)
    integer_ticks(axes, 6)


def _moving_mean(values: npt.NDArray[np.float64], window: int) -> npt.NDArray[np.float64]:
    """Return the mean over a window about each value, cut off at both ends."""
    half = window // 2
    return np.array([np.nanmean(values[max(0, index - half) : index + half + 1]) for index in range(len(values))])


# --- Selection ------------------------------------------------------------------------------------------------


def selection_plot(counts: npt.NDArray[np.int64], pool_counts: npt.NDArray[np.int64]) -> Plot:
    """Plot how many rows of each class each step trained on, beside the shares over all steps and in the pool.

    Args:
        counts: (T, C) rows trained on by step and class.
        pool_counts: (C,) rows of the pool by class.
    """
    num_classes = counts.shape[1]
    line = 13  # height of one line of the legend, which has `columns` classes a line

    def draw(figure: Figure, narrow: bool) -> None:
        right, columns = (78, 4) if narrow else (96, 8)
        top = 32 + line * -(-num_classes // columns)
        steps = add_axes(figure, LEFT, right, top, 34)
        _draw_stairs(steps, counts, 4 if narrow else 8)
        bars = add_axes(figure, figure.get_figwidth() * 72 - right + 14, 2, top, 34)
        _draw_share_bars(bars, counts.sum(axis=0), pool_counts)
        _class_legend(figure, num_classes, columns, line)

    text = "Rows trained on at each step, by class, beside their shares over all steps and in the pool."
    return Plot("selection", text, draw, 222 + line * -(-num_classes // 8), 225 + line * -(-num_classes // 4))


def _draw_stairs(axes: Axes, counts: npt.NDArray[np.int64], num_ticks: int) -> None:
    title(axes, "Rows trained on at each step")
    num_steps, num_classes = counts.shape
    edges = np.arange(num_steps + 1) + 0.5
    stairs = np.vstack([counts, counts[-1:]]).T
    colours = [class_colour(index) for index in range(num_classes)]
    axes.stackplot(edges, stairs, step="post", colors=colours, edgecolor=PAPER, linewidth=0.6)
    axes.set_xlim(0.5, num_steps + 0.5)
    axes.set_ylim(0, max(float(counts.sum(axis=1).max()), 1.0) * 1.02)
    integer_ticks(axes, num_ticks)
    axes.set_xlabel("step", fontsize=9, color=MUTED)


def _draw_share_bars(axes: Axes, counts: npt.NDArray[np.int64], pool_counts: npt.NDArray[np.int64]) -> None:
    """Draw two columns of shares, each adding up to the whole height."""
    table = np.stack([counts, pool_counts]).astype(np.float64)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1.0)
    below = np.zeros(2)
    for index in range(shares.shape[1]):
        axes.bar([0, 1], shares[:, index], 0.74, below, color=class_colour(index), edgecolor=PAPER, linewidth=0.6)
        below += shares[:, index]
    axes.grid(False)
    axes.set_yticks([])
    axes.set_ylim(0, 1.02)
    axes.set_xlim(-0.5, 1.5)
    axes.set_xticks([0, 1], ["all steps", "pool"])
    axes.tick_params(labelsize=8.5)


def _class_legend(figure: Figure, num_classes: int, columns: int, line: float) -> None:
    width, height = figure.get_figwidth() * 72, figure.get_figheight() * 72
    pitch = min(width / columns, 64.0)
    for index in range(num_classes):
        x, y = pitch * (index % columns), height - 9 - line * (index // columns)
        figure.text(x / width, y / height, "■", fontsize=9, color=class_colour(index), va="center")
        figure.text((x + 11) / width, y / height, f"class {index}", fontsize=9, color=MUTED, va="center")


# --- Common ---------------------------------------------------------------------------------------------------


def add_axes(figure: Figure, left: float, right: float, top: float, bottom: float) -> Axes:
    """Add axes of this package's look with margins in points."""
    width, height = figure.get_figwidth() * 72, figure.get_figheight() * 72
    rect = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    axes = figure.add_axes(rect)
    plain_axes(axes)
    return axes


def title(axes: Axes, text: str) -> None:
    """Write what the vertical axis shows above it, flush with the tick labels."""
    axes.annotate(text, (0, 1), (-LEFT, 10), "axes fraction", "offset points", fontsize=9, color=MUTED)


def integer_ticks(axes: Axes, count: int) -> None:
    """Put about so many ticks on whole numbers of the horizontal axis."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(count, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5))
