from __future__ import annotations

import math
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest

from raise_env.render import CLASS_COLOURS, RenderView, class_colour, render_ansi, render_rgb_array


def make_view(step=2, num_classes=2, num_candidates=8, taken=(0, 5), **changes):
    """An episode of two classes: rows 0-3 of class 0, rows 4-7 of class 1, one of each taken."""
    mask = np.zeros(num_candidates, dtype=bool)
    mask[list(taken) if step else []] = True
    history = np.zeros((step, num_classes), dtype=np.int64)
    history[:, 0] = 1
    values = {
        "step": step,
        "horizon": 10,
        "budget_left": 20 - step,
        "dev_scores": [-4.0 + index for index in range(step + 1)],
        "score_name": "-loss, nats per token",
        "num_classes": num_classes,
        "offered_classes": np.repeat(np.arange(num_classes), num_candidates // num_classes),
        "taken_mask": mask,
        "taken_history": history,
        "last_reward": 1.0 if step else None,
    }
    return RenderView(**{**values, **changes})


EMPTY = {"offered_classes": np.empty(0, dtype=np.int64), "taken_mask": np.empty(0, dtype=bool)}
VIEWS = {
    "start": make_view(0),
    "start without candidates": make_view(0, **EMPTY),
    "middle": make_view(),
    "end": make_view(10, budget_left=10),
    "budget spent": make_view(10, budget_left=0),
    "one class": make_view(num_classes=1, num_candidates=32),
    "many candidates": make_view(num_classes=4, num_candidates=2000),
    "many classes": make_view(num_classes=32, num_candidates=128),
    "many classes and candidates": make_view(num_classes=32, num_candidates=1024),
    "diverged": make_view(dev_scores=[-4.0, -3.0, -math.inf]),
    "never finite": make_view(dev_scores=[math.nan] * 3),
    "constant": make_view(dev_scores=[0.5] * 3),
    "huge budget": make_view(budget_left=10**6),
    "odd name": make_view(score_name="$x_{ <script> " * 20),
    "huge scores": make_view(dev_scores=[-1e30, -1e29, -1e28]),
    "long": make_view(300, horizon=300),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_render_ansi__any_episode__fits_into_eighty_columns(view):
    lines = render_ansi(view).split("\n")
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 15
    assert "\x1b" not in "".join(lines)


def test_render_ansi__two_classes__shows_counts_that_were_given():
    text = render_ansi(make_view(taken=(0, 1, 5)))
    assert text.split("\n") == [
        "step 2/10   budget left 18   reward +1.0000",
        "-loss, nats per token  -4.0000 -> -2.0000  ▁▅█",
        "class 0  ██░░  2 of 4 taken",
        "class 1  █░░░  1 of 4 taken",
    ]


def test_render_ansi__nothing_offered__says_so():
    assert render_ansi(VIEWS["start without candidates"]).endswith("no candidates yet")


def test_render_ansi__padding__is_not_counted():
    classes = np.array([0, 0, 0, -1, 1, 1, -1, -1])
    assert "class 1  █░   1 of 2 taken" in render_ansi(make_view(offered_classes=classes))


def test_render_ansi__score_not_finite__leaves_a_gap():
    assert render_ansi(make_view(dev_scores=[-4.0, math.nan, -2.0])).split("\n")[1].endswith("▁ █")


def test_render_ansi__few_taken_of_very_many__still_shows_a_block():
    view = make_view(num_classes=1, num_candidates=5000, taken=(0,))
    assert f"class 0  █{'░' * 39}  1 of 5000 taken" in render_ansi(view)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_render_rgb_array__any_episode__is_a_picture(view):
    pixels = render_rgb_array(view)
    assert pixels.shape == (600, 800, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags["C_CONTIGUOUS"]
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert len(np.unique(pixels)) > 20


def count_pixels(pixels, colour):
    rgb = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return int((pixels == rgb).all(axis=2).sum())


def test_render_rgb_array__same_view__same_pixels():
    np.testing.assert_array_equal(render_rgb_array(make_view()), render_rgb_array(make_view()))


@pytest.mark.parametrize("num_candidates", [8, 800])
def test_render_rgb_array__class_taken__is_filled_in_its_colour(num_candidates):
    size = {"num_candidates": num_candidates, "taken_history": np.zeros((2, 2), dtype=np.int64)}
    none = render_rgb_array(make_view(taken=(), **size))
    of_first = render_rgb_array(make_view(taken=range(4), **size))
    of_second = render_rgb_array(make_view(taken=range(num_candidates - 4, num_candidates), **size))
    for index, strong in ((0, of_first), (1, of_second)):
        colour = class_colour(index)
        weak = of_second if index == 0 else of_first
        assert count_pixels(strong, colour) > count_pixels(none, colour) + 50
        assert count_pixels(weak, colour) == count_pixels(none, colour)


def test_render_rgb_array__padding__is_not_drawn():
    real = {"offered_classes": np.array([0, 0, 1]), "taken_mask": np.array([True, False, False])}
    padded = {"offered_classes": np.array([0, 0, 1, -1]), "taken_mask": np.array([True, False, False, False])}
    np.testing.assert_array_equal(render_rgb_array(make_view(**real)), render_rgb_array(make_view(**padded)))


def test_render_rgb_array__cumulative_counts__grow_with_the_history():
    one = make_view(2, taken=())
    more = make_view(2, taken=(), taken_history=np.array([[4, 0], [4, 0]]), budget_left=12)
    few, many = (count_pixels(render_rgb_array(view), class_colour(0)) for view in (one, more))
    assert many > 2 * few


def test_render_rgb_array__user_style__neither_matters_nor_changes():
    plain = render_rgb_array(make_view())
    loud = {"axes.facecolor": "black", "font.size": 30, "axes.titleweight": "bold", "lines.marker": "x"}
    with mpl.rc_context(loud):
        before = dict(mpl.rcParams)
        np.testing.assert_array_equal(render_rgb_array(make_view()), plain)
        assert dict(mpl.rcParams) == before


def test_render__imported_and_used__loads_matplotlib_late_and_pyplot_never():
    code = (
        "import sys, numpy as np; from raise_env.render import RenderView, render_rgb_array;"
        "assert 'matplotlib' not in sys.modules;"
        "none = np.empty(0, dtype=np.int64);"
        "render_rgb_array(RenderView(0, 1, 1, [0.0], '', 1, none, none.astype(bool), np.empty((0, 1), int), None));"
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_render_view__mask_of_another_length__is_refused():
    with pytest.raises(AssertionError):
        make_view(taken_mask=np.zeros(3, dtype=bool))


def test_class_colour__ninth_class__comes_round():
    assert class_colour(len(CLASS_COLOURS)) == class_colour(0)
    assert len(set(CLASS_COLOURS)) == len(CLASS_COLOURS)
