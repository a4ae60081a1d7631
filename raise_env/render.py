"""Pictures of a running episode: a few lines for a terminal, or an image.

Both are drawn from a `RenderView`, plain numbers that the environment hands over, so that a picture can be
made and tested without a model. Matplotlib is imported on the first image and never through pyplot; its
settings are put back: drawing inside a training loop leaves the user's own figures as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "ACCENT",
    "CLASS_COLOURS",
    "INK",
    "MUTED",
    "PAPER",
    "RULE",
    "RenderView",
    "class_colour",
    "plain_axes",
    "render_ansi",
    "render_rgb_array",
]

INK = "#23272e"
MUTED = "#69707a"
RULE = "#dfe2e6"
PAPER = "#ffffff"

#: The one colour for what a selector does; Okabe and Ito's vermilion.
ACCENT = "#d55e00"

#: Instruction classes, in order: Paul Tol's bright scheme, made to be told apart by colour-blind readers.
CLASS_COLOURS = ("#4477aa", "#ccbb44", "#aa3377", "#228833", "#66ccee", "#ee6677", "#332288", "#999999")

_SPARKS = "▁▂▃▄▅▆▇█"
_COLUMNS = 80
_WIDTH_IN, _HEIGHT_IN, _DPI = 8.0, 6.0, 100

# More dots than this are too small to see; more class names than this do not fit beside them.
_MAX_DOTS = 256
_MAX_BANDS = 12
_MAX_LINES = 12


@dataclass(frozen=True, slots=True, eq=False)
class RenderView:
    """What a picture shows: an episode so far, and its last step.

    Args:
        step: Steps taken, from 0 to `horizon`.
        horizon: T, at most so many steps an episode.
        budget_left: Instructions that may still be trained on.
        dev_scores: (step + 1,) dev score after each step, the first before any update; higher is better.
            Values that are not finite leave a gap.
        score_name: What the dev score is, with its unit; a few words.
        num_classes: C, the number of classes.
        offered_classes: (N,) class of each of the last step's candidates, -1 where a row is padding. Before
            the first step either the candidates now offered or nothing, shape (0,).
        taken_mask: (N,) which of them were trained on.
        taken_history: (step, C) how many instructions of each class each step trained on.
        last_reward: Reward of the last step, None before the first.
    """

    step: int
    horizon: int
    budget_left: int
    dev_scores: Sequence[float]
    score_name: str
    num_classes: int
    offered_classes: npt.NDArray[np.int64]
    taken_mask: npt.NDArray[np.bool_]
    taken_history: npt.NDArray[np.int64]
    last_reward: float | None

    def __post_init__(self) -> None:
        assert self.taken_mask.shape == self.offered_classes.shape
        assert self.taken_history.ndim == 2
        assert self.taken_history.shape[1] == self.num_classes

    def count_offered(self) -> npt.NDArray[np.int64]:
        """Return how many of the last step's candidates were of each class, (C,)."""
        return self._count(self.offered_classes >= 0)

    def count_taken(self) -> npt.NDArray[np.int64]:
        """Return how many of them were trained on, by class, (C,)."""
        return self._count(self.taken_mask & (self.offered_classes >= 0))

    def _count(self, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        return np.bincount(self.offered_classes[mask], minlength=self.num_classes).astype(np.int64)


def class_colour(index: int) -> str:
    """Return the colour of a class, "#rrggbb"; colours come round again after the eighth."""
    return CLASS_COLOURS[index % len(CLASS_COLOURS)]


def plain_axes(axes: Axes, grid: bool = True) -> None:
    """Give axes this package's look: little ink, no box, and no colour left to the user's own style."""
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(RULE)
        spine.set_linewidth(1.0)
    axes.tick_params(colors=MUTED, labelcolor=MUTED, labelsize=9, length=0, pad=5, which="both")
    axes.set_axisbelow(True)
    axes.grid(False)
    if grid:
        axes.grid(True, axis="y", color=RULE, linewidth=0.8, linestyle="-")


# --- Text -----------------------------------------------------------------------------------------------------


def render_ansi(view: RenderView) -> str:
    """Return a few lines of text, at most 80 columns wide, in plain Unicode without colour codes.

    A class's bar has a block for each of its candidates in the last step (or fewer, where they do not fit):
    full ones were taken, shaded ones were not.
    """
    reward = "" if view.last_reward is None else f"   reward {view.last_reward:+.4f}"
    lines = [_clip(f"step {view.step}/{view.horizon}   budget left {view.budget_left}{reward}"), _score_line(view)]
    offered, taken = view.count_offered(), view.count_taken()
    if not offered.any():
        return "\n".join([*lines, "no candidates yet"])
    shown = np.flatnonzero(offered)
    label_width = len(str(shown[:_MAX_LINES].max()))
    blocks = min(40, int(offered.max()))
    for index in shown[:_MAX_LINES]:
        bar = _bar(int(offered[index]), int(taken[index]), blocks, int(offered.max()))
        lines.append(f"class {index:>{label_width}}  {bar}  {taken[index]} of {offered[index]} taken")
    if len(shown) > _MAX_LINES:
        rest = shown[_MAX_LINES:]
        lines.append(f"and {len(rest)} more classes  {taken[rest].sum()} of {offered[rest].sum()} taken")
    return "\n".join(lines)


def _score_line(view: RenderView) -> str:
    first, last = view.dev_scores[0], view.dev_scores[-1]
    change = f"{first:.4f}" if len(view.dev_scores) == 1 else f"{first:.4f} -> {last:.4f}"
    name = _clip(view.score_name, 32)
    return _clip(f"{name}  {change}  {_sparkline(view.dev_scores, _COLUMNS - len(name) - len(change) - 4)}")


def _sparkline(values: Sequence[float], width: int) -> str:
    """Return one block for each value, or for `width` of them evenly spread; a space where one is not finite."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) > width:
        array = array[np.linspace(0, len(array) - 1, max(width, 1)).round().astype(np.int64)]
    finite = array[np.isfinite(array)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
    top = len(_SPARKS) - 1
    levels = np.full(len(array), top // 2) if high <= low else (array - low) / (high - low) * top
    return "".join(
        _SPARKS[round(float(level))] if math.isfinite(value) else " "
        for level, value in zip(levels, array, strict=True)
    )


def _bar(offered: int, taken: int, blocks: int, most: int) -> str:
    scale = blocks / most
    full = min(blocks, max(math.ceil(taken * scale), 0))
    return ("█" * full).ljust(round(offered * scale), "░").ljust(blocks)


def _clip(text: str, width: int = _COLUMNS) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


# --- Image ----------------------------------------------------------------------------------------------------


def render_rgb_array(view: RenderView) -> npt.NDArray[np.uint8]:
    """Return the picture of an episode so far, (600, 800, 3) uint8.

    Above, the dev score against the horizon. Below to the left the last step's candidates, a dot each (bars
    where they are many), filled where trained on; to the right everything trained on so far, by class, against
    the budget. The same view gives the same pixels, whatever style the user's matplotlib is set to.
    """
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context("default"):
        figure = Figure(figsize=(_WIDTH_IN, _HEIGHT_IN), dpi=_DPI, facecolor=PAPER)
        canvas = FigureCanvasAgg(figure)
        _draw_title(figure, view)
        _draw_scores(_add_panel(figure, (0.09, 0.505, 0.85, 0.325), _clip(view.score_name)), view)
        _draw_candidates(_add_panel(figure, (0.09, 0.085, 0.38, 0.29), "Candidates, filled where taken"), view)
        _draw_taken(_add_panel(figure, (0.57, 0.085, 0.37, 0.29), "Trained on so far, by class"), view)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba(), dtype=np.uint8)
    return pixels[:, :, :3].copy()


def _draw_title(figure: Figure, view: RenderView) -> None:
    figure.text(0.09, 0.934, f"Step {view.step} of {view.horizon}", fontsize=17, color=INK, weight="bold")
    facts = f"{view.budget_left:,} left to train on"
    if view.last_reward is not None:
        facts = f"last reward {_minus(f'{view.last_reward:+.4f}')}   ·   {facts}"
    figure.text(0.94, 0.937, facts, fontsize=11, color=MUTED, ha="right")


def _add_panel(figure: Figure, rect: tuple[float, float, float, float], title: str) -> Axes:
    axes = figure.add_axes(rect)
    plain_axes(axes)
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, pad=9, parse_math=False)
    return axes


def _draw_scores(axes: Axes, view: RenderView) -> None:
    from matplotlib.ticker import MaxNLocator

    scores = np.asarray(view.dev_scores, dtype=np.float64)
    steps = np.arange(len(scores))
    good = np.isfinite(scores)
    axes.set_xlim(0, max(view.horizon, 1))
    axes.set_ylim(*_padded_range(scores[good]))
    axes.plot(steps, np.where(good, scores, np.nan), color=ACCENT, linewidth=2.2, solid_capstyle="round")
    if good.any():
        _mark_last(axes, int(steps[good][-1]), float(scores[good][-1]), view.horizon)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("step", fontsize=9, color=MUTED)


def _mark_last(axes: Axes, step: int, score: float, horizon: int) -> None:
    axes.plot(step, score, "o", color=ACCENT, markersize=7, markeredgecolor=PAPER, markeredgewidth=1.5, clip_on=False)
    late = step > 0.8 * horizon
    axes.annotate(
        _minus(f"{score:.3f}"),
        (step, score),
        xytext=(-2 if late else 9, -15 if late else -4),
        textcoords="offset points",
        ha="right" if late else "left",
        fontsize=10,
        color=INK,
        annotation_clip=False,
    )


def _padded_range(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return limits with room around the values, and a range to stand in where they do not span one."""
    if not len(values):
        return -1.0, 1.0
    low, high = float(values.min()), float(values.max())
    span = high - low
    if span < 1e-9:
        span = max(abs(high), 1.0) * 0.5
    return low - 0.22 * span, high + 0.12 * span


def _draw_candidates(axes: Axes, view: RenderView) -> None:
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
    num_offered = int(view.count_offered().sum())
    if not num_offered:
        _say(axes, "none yet")
    elif num_offered <= _MAX_DOTS:
        _draw_dots(axes, view)
    else:
        _draw_bars(axes, view)


def _draw_dots(axes: Axes, view: RenderView) -> None:
    """Draw a dot for each candidate: a band for each class, or one block of all where the classes are many."""
    real = view.offered_classes >= 0
    classes, taken = view.offered_classes[real], view.taken_mask[real]
    order = np.argsort(classes, kind="stable")
    classes, taken = classes[order], taken[order]
    box = axes.get_window_extent()
    x, y, pitch = _dot_positions(classes, view.num_classes, box.width, box.height)
    points = 72.0 / _DPI
    size = (0.64 * pitch * points) ** 2
    axes.set_xlim(0, box.width)
    axes.set_ylim(box.height, 0)
    empty = [class_colour(int(index)) for index in classes[~taken]]
    full = [class_colour(int(index)) for index in classes[taken]]
    axes.scatter(x[~taken], y[~taken], s=size, facecolors="none", edgecolors=empty, linewidths=0.9, alpha=0.6)
    axes.scatter(x[taken], y[taken], s=size, facecolors=full, edgecolors=full, linewidths=0.9)
    if view.num_classes <= _MAX_BANDS:
        centres = (np.arange(view.num_classes) + 0.5) * box.height / view.num_classes
        _label_classes(axes, view, centres)


def _dot_positions(
    classes: npt.NDArray[np.int64], num_classes: int, width: float, height: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float]:
    """Return the dots' centres and pitch in pixels, for classes in ascending order."""
    counts = np.bincount(classes, minlength=num_classes)
    if num_classes > _MAX_BANDS:
        counts = np.array([len(classes)])
    band = height / len(counts)
    within = np.concatenate([np.arange(count) for count in counts])
    pitch, rows = _grid(int(counts.max()), width, 0.92 * band)
    columns = math.ceil(int(counts.max()) / rows)
    bands = np.repeat(np.arange(len(counts)), counts)
    x = (within % columns + 0.5) * pitch
    y = (bands + 0.5) * band + (within // columns - (rows - 1) / 2) * pitch
    return x, y, pitch


def _grid(count: int, width: float, height: float) -> tuple[float, int]:
    """Return a pitch, in pixels, and a number of rows at which `count` dots fit into the rectangle.

    Among pitches near the largest the one with the fewest rows wins: a line is easier to read than a block.
    """
    pitches = [min(width / math.ceil(count / rows), height / rows, 24.0) for rows in range(1, count + 1)]
    return next((pitch, rows) for rows, pitch in enumerate(pitches, 1) if pitch >= 0.8 * max(pitches))


def _draw_bars(axes: Axes, view: RenderView) -> None:
    """Draw for each class what was offered as a pale bar and what was taken as a strong one over it."""
    offered, taken = view.count_offered(), view.count_taken()
    rows = np.arange(view.num_classes)
    colours = [class_colour(index) for index in range(view.num_classes)]
    axes.set_xlim(0, float(offered.max()) * 1.32)
    axes.set_ylim(view.num_classes - 0.5, -0.5)
    axes.barh(rows, offered, height=0.62, color=colours, alpha=0.25, linewidth=0)
    axes.barh(rows, taken, height=0.62, color=colours, linewidth=0)
    if view.num_classes > _MAX_BANDS:
        return
    for row in rows:
        text = f" {taken[row]:,} of {offered[row]:,}"
        axes.text(float(offered[row]), float(row), text, va="center", fontsize=9, color=MUTED)
    _label_classes(axes, view, rows.astype(np.float64))


def _label_classes(axes: Axes, view: RenderView, centres: npt.NDArray[np.float64]) -> None:
    axes.set_yticks(centres, [f"class {index}" for index in range(view.num_classes)])


def _draw_taken(axes: Axes, view: RenderView) -> None:
    from matplotlib.ticker import MaxNLocator

    counts = np.cumsum(view.taken_history, axis=0, dtype=np.int64)
    total = int(counts[-1].sum()) if len(counts) else 0
    axes.set_xlim(0, max(view.horizon, 1))
    axes.set_ylim(0, _taken_limit(view, total))
    if total:
        edges = np.arange(len(counts) + 1)
        stairs = np.vstack([counts, counts[-1:]]).T  # (C, steps + 1): the last step is as wide as the others
        colours = [class_colour(index) for index in range(view.num_classes)]
        axes.stackplot(edges, stairs, step="post", colors=colours, linewidth=0)
    else:
        _say(axes, "none yet")
    budget = total + view.budget_left
    if budget <= axes.get_ylim()[1]:
        axes.axhline(budget, color=MUTED, linewidth=1.0, linestyle=(0, (3, 3)))
        label = f"budget {budget:,}"
        axes.annotate(label, (0, budget), (2, 4), textcoords="offset points", fontsize=9, color=MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_xlabel("step", fontsize=9, color=MUTED)


def _taken_limit(view: RenderView, total: int) -> float:
    """Return the top of the count axis: the budget, unless at this pace the episode ends far below it."""
    budget = total + view.budget_left
    projected = total * view.horizon / view.step if view.step else budget
    return 1.18 * max(min(budget, 1.5 * projected), total, 1)


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=10, color=MUTED)


def _minus(text: str) -> str:
    """Return a written number with the minus sign that the axes use."""
    return text.replace("-", "\N{MINUS SIGN}")
