from __future__ import annotations

import math

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from raise_env.agents.plots import COLOURS, agent_colours, agent_dashes, dev_curves_plot, learning_plot, selection_plot
from raise_env.render import ACCENT, MUTED

CURVES = {"random": [[-4.0, -3.0, -2.0], [-4.0, -2.0, -1.0]], "raise_fork": [[-4.0, -1.0, -0.5]]}


def draw(plot, narrow=False):
    figure = Figure(figsize=(6, 3))
    plot.draw(figure, narrow)
    return figure


def curves_plot(curves=CURVES, horizon=2, reward="loss"):
    return dev_curves_plot(curves, "raise_fork", horizon, reward)


def lines_of(plot):
    return {line.get_color(): line for axes in draw(plot).axes for line in axes.lines}


def labels_of(plot):
    return [text.get_text() for axes in draw(plot).axes for text in axes.texts]


def test_dev_curves_plot__loss__draws_mean_over_seeds_with_sign_turned():
    lines = lines_of(curves_plot())
    np.testing.assert_allclose(lines[MUTED].get_ydata(), [4.0, 2.5, 1.5])
    np.testing.assert_allclose(lines[ACCENT].get_ydata(), [4.0, 1.0, 0.5])
    assert lines[ACCENT].get_linewidth() > lines[MUTED].get_linewidth()


def test_dev_curves_plot__accuracy__is_drawn_as_it_is():
    lines = lines_of(curves_plot({"raise_fork": [[0.1, 0.5]]}, 1, "accuracy"))
    np.testing.assert_allclose(lines[ACCENT].get_ydata(), [0.1, 0.5])


def test_dev_curves_plot__seed_that_ended_early__keeps_its_last_score():
    lines = lines_of(curves_plot({"raise_fork": [[-4.0, -2.0], [-4.0, -3.0, -1.0, -1.0]]}, 3))
    np.testing.assert_allclose(lines[ACCENT].get_ydata(), [4.0, 2.5, 1.5, 1.5])


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_dev_curves_plot__seed_that_diverged__is_left_out(bad):
    lines = lines_of(curves_plot({"raise_fork": [[-4.0, bad], [-4.0, -1.0]], "random": [[-4.0, bad]]}, 1))
    np.testing.assert_allclose(lines[ACCENT].get_ydata(), [4.0, 1.0])
    assert MUTED not in lines


def test_dev_curves_plot__longer_than_horizon__becomes_a_line_at_its_end():
    lines = lines_of(curves_plot({**CURVES, "full": [[-4.0, -2.0, -1.0, -0.3]]}))
    full = lines[agent_colours([*CURVES, "full"], "raise_fork")["full"]]
    np.testing.assert_allclose(full.get_ydata(), [0.3, 0.3])


def test_dev_curves_plot__far_longer_than_horizon__leaves_the_others_their_range():
    long = [[-4.0] * 500 + [-0.3]]
    low, high = draw(curves_plot({**CURVES, "full": long})).axes[0].get_ylim()
    assert low < 0.3
    assert high > 4.0


def test_dev_curves_plot__close_ends__labels_are_apart_and_in_order():
    curves = {f"agent{index}": [[-4.0, -1.0 - 0.001 * index]] for index in range(5)}
    (axes,) = draw(curves_plot(curves, 1)).axes
    heights = [text.xy[1] for text in axes.texts if text.get_text().startswith("agent")]
    gaps = np.diff(heights) * axes.get_window_extent().height * 72 / axes.figure.dpi
    assert len(gaps) == 4
    assert (gaps > 11).all()


def test_learning_plot__greedy_scores__share_the_episode_axis():
    figure = draw(learning_plot([1.0, 2.0, 3.0], [-4.0, -3.0, -2.0, -1.0], 1.5, "loss"))
    returns, greedy = figure.axes
    np.testing.assert_allclose(returns.lines[0].get_xydata(), [[1, 1], [2, 2], [3, 3]])
    np.testing.assert_allclose(greedy.lines[0].get_xydata(), [[0, 4], [1, 3], [2, 2], [3, 1]])


def test_learning_plot__no_random_agent__draws_no_reference():
    assert "random choice" in labels_of(learning_plot([1.0], [], 1.5, "loss"))
    assert "random choice" not in labels_of(learning_plot([1.0], [], None, "loss"))


def test_selection_plot__counts__bars_are_shares():
    counts = np.array([[1, 1], [2, 0]])
    _, shares = draw(selection_plot(counts, np.array([10, 30]))).axes
    np.testing.assert_allclose([bar.get_height() for bar in shares.patches], [0.75, 0.25, 0.25, 0.75])


@pytest.mark.parametrize(
    "plot",
    [
        curves_plot(),
        learning_plot([1.0, 2.0], [-1.0, -2.0], 1.0, "loss"),
        selection_plot(np.ones((3, 20), dtype=np.int64), np.ones(20, dtype=np.int64)),
    ],
    ids=lambda plot: plot.name,
)
@pytest.mark.parametrize("narrow", [False, True])
def test_plot__svg__follows_the_page_and_repeats(plot, narrow):
    svg = plot.svg(narrow)
    assert svg.startswith("<svg")
    assert "http" not in svg
    assert "var(--muted)" in svg
    assert not any(light in svg for light, _ in COLOURS.values())
    assert " width=" not in svg[: svg.index(">")]
    assert svg == plot.svg(narrow)
    assert svg != plot.svg(not narrow)


def test_plot__png__is_twice_the_page_and_repeats():
    png = curves_plot().png()
    width = int.from_bytes(png[16:20], "big")
    assert png.startswith(b"\x89PNG")
    assert width == pytest.approx(200 * (648 / 72 + 0.4), abs=2)
    assert png == curves_plot().png()


def test_plot__user_style__neither_matters_nor_changes():
    plain = curves_plot().svg(False)
    with mpl.rc_context({"font.size": 30, "axes.grid": True, "svg.fonttype": "path"}):
        before = dict(mpl.rcParams)
        assert curves_plot().svg(False) == plain
        assert dict(mpl.rcParams) == before


def test_plot__agent_name_with_markup__is_escaped():
    svg = curves_plot({"<script>$x_{": [[-4.0, -1.0]]}, 1).svg(False)
    assert "<script" not in svg
    assert "&lt;script&gt;$x_{" in svg


def test_agent_colours__fixed_roles__are_never_given_to_others():
    colours = agent_colours(["random", "ifd", "less", "raise_fork", "oracle"], "raise_fork")
    assert colours["random"] == MUTED
    assert colours["raise_fork"] == ACCENT
    assert len(set(colours.values())) == 5


def test_agent_colours__twelve_agents__none_shares_its_colour():
    names = ["random", "oracle", *(f"agent {number}" for number in range(10))]
    assert len(set(agent_colours(names, "agent 3").values())) == len(names)


def test_agent_dashes__more_agents_than_colours__no_two_look_alike():
    names = ["random", "oracle", *(f"agent {number}" for number in range(20))]
    colours = agent_colours(names, "agent 3")
    dashes = agent_dashes(colours)
    assert len({(colours[name], dashes[name]) for name in names}) == len(names)
    assert {dashes[name] for name in names[:11]} == {"-"}
