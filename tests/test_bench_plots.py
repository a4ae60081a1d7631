from __future__ import annotations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from raise_env.agents.bench_plots import cost_plot, profile_plot, scores_plot

SCORES = {
    agent: {"iqm": iqm, "low": iqm - 0.1, "high": iqm + 0.1}
    for agent, iqm in {"oracle": 1.0, "random": 0.0, "ifd": -3.3, "deita": -1.6}.items()
}
PHI = {"oracle": 0.2, "random": 0.2, "ifd": 0.5, "deita": 0.5}
COLOURS = dict.fromkeys(SCORES, "#0072b2")


def visible(plot, narrow):
    """Return the texts that lie within the axes, each with its box on the page."""
    figure = Figure(figsize=((268 if narrow else 648) / 72, plot.height / 72))
    canvas = FigureCanvasAgg(figure)
    plot.draw(figure, narrow)
    canvas.draw()
    (axes,) = figure.axes
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    frame = axes.get_window_extent()
    return {text: box for text, box in boxes.items() if box.overlaps(frame)}


@pytest.mark.parametrize("narrow", [False, True])
def test_scores_plot__far_below_random__is_told_at_the_edge(narrow):
    assert {"◂ -3.3", "◂ -1.6"} <= set(visible(scores_plot(SCORES, COLOURS), narrow))


@pytest.mark.parametrize("narrow", [False, True])
def test_cost_plot__far_below_random__is_named_under_the_points(narrow):
    texts = visible(cost_plot(SCORES, PHI, COLOURS), narrow)
    assert {"▾ ifd -3.3", "▾ deita -1.6"} <= set(texts)
    low, others = texts["▾ ifd -3.3"], texts["▾ deita -1.6"]
    assert not low.overlaps(others)
    assert not any(box.overlaps(texts["random"]) for box in (low, others))


def test_profile_plot__far_below_random__does_not_flatten_the_rest():
    profile = {"thresholds": [-4.0, 0.0, 1.0], "share": [1.0, 0.5, 0.0], "low": [1, 0, 0], "high": [1, 1, 0]}
    figure = Figure()
    profile_plot({"ours": profile}, {"ours": "#0072b2"}).draw(figure, False)
    assert figure.axes[0].get_xlim()[0] == -1.25


def test_profile_plot__a_colour_that_two_agents_share__lines_differ_and_names_stand_alone():
    profile = {"thresholds": [0.0, 1.0], "share": [1.0, 0.0], "low": [1, 0], "high": [1, 0]}
    figure = Figure()
    profile_plot({"ours": profile, "less": profile}, {"ours": "#0072b2", "less": "#0072b2"}).draw(figure, False)
    (axes,) = figure.axes
    first, second = axes.get_lines()
    assert first.get_linestyle() != second.get_linestyle()
    assert {"ours", "less ╌"} < {text.get_text() for text in axes.texts}
    assert axes.get_xlim()[1] == 1.0
