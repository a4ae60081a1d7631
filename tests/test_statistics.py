"""Reference values are worked out by hand or from tables, not with the functions under test."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from scipy import stats

from raise_env.agents import statistics
from raise_env.agents.statistics import (
    Interval,
    bootstrap_interval,
    interquartile_mean,
    mean_interval,
    normalise,
    overall_mean,
    paired_difference,
    probability_of_improvement,
)

# Mean


def test_mean_interval__numbers_by_hand__are_students():
    # 1, 2, 3: standard error 1 / sqrt(3); t for 2 degrees of freedom is 4.302653.
    interval = mean_interval(np.array([1.0, 2.0, 3.0]))
    assert interval.value == 2.0
    assert interval.half_width == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)
    assert (interval.low + interval.high) / 2 == pytest.approx(2.0)


def test_mean_interval__runs_that_diverged__are_left_out_and_counted():
    interval = mean_interval(np.array([1.0, np.nan, 2.0, 3.0, -np.inf]))
    assert interval == dataclasses.replace(mean_interval(np.array([1.0, 2.0, 3.0])), num_missing=2)


@pytest.mark.parametrize(("values", "mean"), [([], np.nan), ([np.nan], np.nan), ([4.0], 4.0)])
def test_mean_interval__too_few_runs__has_no_ends(values, mean):
    np.testing.assert_array_equal(
        [getattr(mean_interval(np.array(values)), name) for name in ("value", "low", "high")], [mean, np.nan, np.nan]
    )


def test_mean_interval__many_samples__holds_the_truth_in_95_of_100():
    rng = np.random.default_rng(0)
    held = [abs(i.value - 3.0) <= i.half_width for i in (mean_interval(rng.normal(3, 2, 5)) for _ in range(2000))]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)


def test_paired_difference__numbers_by_hand__what_both_share_falls_out():
    shared = np.array([0.0, 100.0, -50.0])
    interval = paired_difference(shared + np.array([1.0, 2.0, 3.0]), shared)
    assert interval.value == pytest.approx(2.0)
    assert interval.half_width == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)
    with_a_gap = paired_difference(np.array([1.0, 2.0, np.nan, 3.0]), np.array([0.0, 0.0, 0.0, 0.0]))
    assert with_a_gap.value == pytest.approx(2.0)


# Over tasks


def test_normalise__numbers_by_hand__each_task_by_its_own_marks():
    losses = np.array([[0.5, 10.0], [0.2, 30.0]])
    random, oracle = np.array([[0.6, 20.0], [0.4, 20.0]]), np.array([[0.1, 10.0]])
    np.testing.assert_allclose(normalise(losses, random, oracle), [[0.0, 1.0], [0.75, -1.0]])
    np.testing.assert_allclose(normalise(random, random, oracle).mean(axis=0), 0.0, atol=1e-12)


def test_normalise__missing_runs__stay_missing_and_do_not_move_the_marks():
    random = np.array([[1.0], [np.nan], [3.0]])
    np.testing.assert_array_equal(normalise(random, random, np.array([[4.0]])), [[-0.5], [np.nan], [0.5]])


@pytest.mark.parametrize("one", [[[2.0, 1.0]], [[3.0, np.nan]]])
def test_normalise__marks_that_are_alike_or_missing__are_refused(one):
    with pytest.raises(ValueError, match="no scale"):
        normalise(np.zeros((1, 2)), np.array([[1.0, 1.0]]), np.array(one))


def test_interquartile_mean__numbers_by_hand__middle_half_of_all():
    scores = np.array([[-100.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 1000.0]])
    assert interquartile_mean(scores) == 3.5  # 2, 3, 4, 5
    assert interquartile_mean(np.array([[7.0]])) == 7.0
    np.testing.assert_array_equal(interquartile_mean(np.stack([scores, 2 * scores])), [3.5, 7.0])


def test_probability_of_improvement__numbers_by_hand__ties_are_half():
    scores = np.array([[1.0, 5.0], [2.0, 5.0]])
    reference = np.array([[1.0, 1.0], [3.0, 1.0], [0.0, 1.0]])
    # First task: 1 against 1, 3, 0 gives 0.5, 0, 1; 2 against them 1, 0, 1: 3.5 of 6. Second: always.
    assert probability_of_improvement(scores, reference) == pytest.approx((3.5 / 6 + 1) / 2)
    both = probability_of_improvement(np.stack([scores, scores]), np.stack([reference, reference + 10]))
    np.testing.assert_allclose(both, [(3.5 / 6 + 1) / 2, 0.0])


def test_probability_of_improvement__one_task__is_mann_and_whitneys():
    rng = np.random.default_rng(0)
    scores, reference = rng.integers(0, 9, (7, 1)) * 1.0, rng.integers(0, 9, (5, 1)) * 1.0
    u = stats.mannwhitneyu(scores[:, 0], reference[:, 0]).statistic
    assert probability_of_improvement(scores, reference) == pytest.approx(u / 35)


# The bootstrap


def test_bootstrap_interval__three_runs__the_percentiles_of_all_27_resamples():
    runs = np.array([[0.0], [1.0], [5.0]])
    means = sorted(np.mean(draw) for draw in itertools.product([0.0, 1.0, 5.0], repeat=3))
    interval = bootstrap_interval(overall_mean, runs)
    assert interval.value == 2.0
    # 1 of 27 resamples is all of one value: more than 2.5 in 100 on either side.
    assert (interval.low, interval.high) == (means[0], means[-1]) == (0.0, 5.0)


def test_bootstrap_interval__tasks__are_strata():
    runs = np.array([[0.0, 100.0], [0.0, 100.0], [0.0, 100.0]])
    assert bootstrap_interval(overall_mean, runs) == Interval(50.0, 50.0, 50.0)


def test_bootstrap_interval__tasks__are_drawn_independently():
    runs = np.array([[0.0, 1.0], [1.0, 0.0]])
    assert bootstrap_interval(overall_mean, runs) != Interval(0.5, 0.5, 0.5)


def test_bootstrap_interval__two_samples__are_both_drawn_anew():
    better, worse = np.array([[2.0], [4.0], [6.0], [8.0]]), np.array([[1.0], [3.0], [5.0], [7.0]])
    interval = bootstrap_interval(probability_of_improvement, better, worse)
    assert interval.value == 10 / 16
    assert 0 <= interval.low < 0.4
    assert 0.85 < interval.high <= 1
    only_one = bootstrap_interval(lambda scores: probability_of_improvement(scores, worse), better)
    assert only_one.high - only_one.low < interval.high - interval.low


def test_bootstrap_interval__same_seed__same_ends_and_no_global_generator(monkeypatch):
    runs = np.random.default_rng(1).normal(size=(6, 2))
    state = str(np.random.get_state())  # noqa: NPY002 - that it is untouched is what is tested
    assert bootstrap_interval(overall_mean, runs) == bootstrap_interval(overall_mean, runs)
    assert bootstrap_interval(overall_mean, runs, seed=1) != bootstrap_interval(overall_mean, runs)
    assert str(np.random.get_state()) == state  # noqa: NPY002


def test_bootstrap_interval__many_runs__agrees_with_scipys(monkeypatch):
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", 20_000)
    runs = np.random.default_rng(2).gamma(2.0, size=40)
    expected = stats.bootstrap((runs,), np.mean, n_resamples=20_000, method="percentile", rng=0).confidence_interval
    interval = bootstrap_interval(overall_mean, runs[:, None])
    np.testing.assert_allclose([interval.low, interval.high], expected, rtol=0.02)


def test_bootstrap_interval__one_run__has_no_ends():
    interval = bootstrap_interval(overall_mean, np.array([[3.0, 5.0]]))
    assert interval.value == 4.0
    assert np.isnan([interval.low, interval.high]).all()
