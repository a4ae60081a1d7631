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
    beside_marks,
    bootstrap_interval,
    correlation,
    improvement_intervals,
    interquartile_mean,
    mean_interval,
    on_scale,
    overall_mean,
    paired_difference,
    performance_profile,
    probability_of_improvement,
    profile_bands,
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


def test_on_scale__numbers_by_hand__each_task_by_its_own_marks():
    losses = np.array([[0.5, 10.0], [0.2, 30.0]])
    random, oracle = np.array([[0.6, 20.0], [0.4, 20.0]]), np.array([[0.2, 5.0], [0.0, 15.0]])
    np.testing.assert_allclose(on_scale(beside_marks(losses, random, oracle)), [[0.0, 1.0], [0.75, -1.0]])
    np.testing.assert_allclose(on_scale(beside_marks(random, random, oracle)).mean(axis=0), 0.0, atol=1e-12)


def test_beside_marks__missing_runs__marks_are_the_means_of_all_that_are_there():
    scores = np.array([[2.0], [np.nan], [3.0]])
    random, oracle = np.array([[0.0], [1.0], [2.0]]), np.array([[np.nan], [3.0], [7.0]])
    runs = beside_marks(scores, random, oracle)
    assert runs.shape == (2, 1, 3)
    # Seeds 0 and 2; their marks have the means of three runs and of two.
    np.testing.assert_allclose(runs[..., 1].mean(axis=0), [1.0])
    np.testing.assert_allclose(runs[..., 2].mean(axis=0), [5.0])
    np.testing.assert_allclose(runs[1, 0, 1] - runs[0, 0, 1], 2.0)
    np.testing.assert_allclose(on_scale(runs)[:, 0], [0.25, 0.5])
    assert beside_marks(np.full((3, 1), np.nan), random, oracle).shape == (0, 1, 3)


@pytest.mark.parametrize("one", [[[2.0, 1.0]], [[3.0, np.nan]]])
def test_beside_marks__marks_that_are_alike_or_missing__are_refused(one):
    with pytest.raises(ValueError, match="no scale"):
        beside_marks(np.zeros((1, 2)), np.array([[1.0, 1.0]]), np.array(one))


def test_bootstrap_interval__runs_beside_their_marks__are_drawn_together():
    rng = np.random.default_rng(0)
    random, oracle = rng.normal(1.0, 0.3, size=(8, 3)), rng.normal(0.0, 0.1, size=(8, 3))

    def width(scores):
        found = bootstrap_interval(lambda runs: overall_mean(on_scale(runs)), beside_marks(scores, random, oracle))
        return found.half_width

    # The mean of random rows is 0 in each resample, however far it moves; what has nothing to do with it moves.
    assert width(random) == pytest.approx(0.0, abs=1e-12)
    assert width(random.mean() + rng.permuted(random - random.mean(), axis=0)) > 0.05


def test_interval_of_the_normalised_score__simulated__holds_the_truth():
    rng, held = np.random.default_rng(1), []
    for seed in range(300):
        ours, random, oracle = (rng.normal(mean, sd, (10, 4)) for mean, sd in ((0.5, 0.1), (1.0, 0.25), (0.0, 0.05)))
        runs = beside_marks(ours, random, oracle)
        drawn = bootstrap_interval(lambda runs: overall_mean(on_scale(runs)), runs, seed=seed)
        held.append(drawn.low <= 0.5 <= drawn.high)  # with the marks as they are, 80 of 100 do
    assert np.mean(held) == pytest.approx(0.95, abs=0.03)


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
    # 1 of 27 resamples is all of one value: far more than is left on either side.
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


def test_bootstrap_interval__forty_runs__scipys_percentiles_of_the_expanded_levels(monkeypatch):
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", 20_000)
    runs = np.random.default_rng(2).gamma(2.0, size=40)
    # Hesterberg's levels: t for 39 degrees of freedom is 2.022691; Phi(-sqrt(40 / 39) 2.022691) is 0.02025.
    level = 1 - 2 * 0.02025
    resampled = stats.bootstrap(
        (runs,), np.mean, n_resamples=20_000, method="percentile", confidence_level=level, rng=0
    )
    interval = bootstrap_interval(overall_mean, runs[:, None])
    np.testing.assert_allclose([interval.low, interval.high], resampled.confidence_interval, rtol=0.01)


def test_bootstrap_interval__several_tasks__degrees_of_freedom_of_what_each_adds(monkeypatch):
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", 40_000)
    spread = np.linspace(-1, 1, 6)
    alike = np.stack([spread, spread[::-1], np.roll(spread, 2)], axis=1)
    one = alike * [1.0, 1e-3, 1e-3]
    # Resampled means are nearly normal, of variance (1/6) mean(spread^2) / 3 for three tasks alike, a third of that
    # again for one of three. Their degrees of freedom are 15 and 5, and t is 2.131450 and 2.570582.
    deviation = np.sqrt((spread**2).mean() / 6)
    half = bootstrap_interval(overall_mean, alike).half_width
    assert half == pytest.approx(np.sqrt(6 / 5) * 2.131450 * deviation / np.sqrt(3), rel=0.03)
    half = bootstrap_interval(overall_mean, one).half_width
    assert half == pytest.approx(np.sqrt(6 / 5) * 2.570582 * deviation / 3, rel=0.08)  # one task has light tails


def test_bootstrap_interval__one_run__has_no_ends():
    interval = bootstrap_interval(overall_mean, np.array([[3.0, 5.0]]))
    assert interval.value == 4.0
    assert np.isnan([interval.low, interval.high]).all()


def normal(rng, shape):
    return rng.normal(size=shape)


def skewed(rng, shape):
    return (rng.gamma(4.0, size=shape) - 4) / 2  # skewness 1


def unequal(rng, shape):
    return rng.normal(size=shape) * np.geomspace(1, 10, shape[-1])


@pytest.mark.parametrize(
    ("draw", "num_runs", "num_tasks"),
    [
        (normal, 10, 1),
        (unequal, 10, 4),
        pytest.param(normal, 5, 4, marks=pytest.mark.slow),
        pytest.param(skewed, 10, 4, marks=pytest.mark.slow),
    ],
)
def test_bootstrap_interval__many_worlds__holds_the_truth_in_95_of_100(draw, num_runs, num_tasks, monkeypatch):
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", 1000)
    rng = np.random.default_rng(0)
    worlds = [draw(rng, (num_runs, num_tasks)) for _ in range(1000)]
    # Each with resamples of its own: what is odd in those of one seed would not average out.
    intervals = [bootstrap_interval(overall_mean, runs, seed=seed) for seed, runs in enumerate(worlds)]
    assert 0.93 <= np.mean([i.low <= 0 <= i.high for i in intervals]) <= 0.97
    percentiles = [np.quantile(resampled_means(runs, rng), [0.025, 0.975]) for runs in worlds[:400]]
    assert np.mean([low <= 0 <= high for low, high in percentiles]) < 0.93  # what it is there to mend


def resampled_means(runs, rng):
    places = rng.integers(len(runs), size=(400, *runs.shape))
    return np.take_along_axis(runs[None], places, axis=1).mean(axis=(1, 2))


def test_bootstrap_interval__many_worlds__holds_the_interquartile_mean_in_95_of_100(monkeypatch):
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", 1000)
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(interquartile_mean, normal(rng, (10, 2)), seed=seed) for seed in range(1000)]
    assert 0.93 <= np.mean([i.low <= 0 <= i.high for i in intervals]) <= 0.97


# All pairs


def test_improvement_intervals__two_agents__those_of_the_plain_bootstrap():
    rng = np.random.default_rng(0)
    scores = {"a": rng.normal(size=(6, 3)), "b": rng.normal(size=(8, 3)) + 0.3, "c": rng.normal(size=(6, 3))}
    intervals = improvement_intervals(scores)
    assert set(intervals) == set(itertools.permutations("abc", 2))
    for (one, other), interval in intervals.items():
        slow = bootstrap_interval(probability_of_improvement, scores[one], scores[other])
        assert interval.value == pytest.approx(slow.value)
        np.testing.assert_allclose([interval.low, interval.high], [slow.low, slow.high], atol=0.02)


def test_improvement_intervals__ties__count_as_half():
    runs = np.array([[1.0], [2.0], [2.0]])
    assert improvement_intervals({"a": runs, "b": runs})["a", "b"].value == 0.5
    constant = improvement_intervals({"a": np.ones((3, 1)), "b": np.ones((3, 1))})["a", "b"]
    assert constant == Interval(0.5, 0.5, 0.5)


def test_improvement_intervals__all_apart__still_leave_a_doubt():
    apart = improvement_intervals({"a": np.arange(5.0)[:, None] + 10, "b": np.arange(5.0)[:, None]})
    interval = apart["a", "b"]
    # Newcombe's equation at the end: d^2 = z^2 d (1 - d) (1 + 4 (d / (1 + d) + (1 - d) / (2 - d))) / 25, d = 1 - low.
    distance = 1 - interval.low
    shared = 1 + 4 * (distance / (1 + distance) + (1 - distance) / (2 - distance))
    assert 0.3 < distance < 0.4
    assert distance**2 == pytest.approx(1.959964**2 * distance * (1 - distance) * shared / 25, rel=1e-6)
    assert interval.high == 1.0
    assert (apart["b", "a"].low, apart["b", "a"].high) == (0.0, distance)
    # Over four tasks of the same kind, half as far.
    tasks = {"a": np.arange(20.0).reshape(5, 4) + 100, "b": np.arange(20.0).reshape(5, 4)}
    assert 1 - improvement_intervals(tasks)["a", "b"].low == pytest.approx(distance / 2)


def test_improvement_intervals__one_run__has_no_ends():
    interval = improvement_intervals({"a": np.array([[2.0]]), "b": np.array([[1.0], [3.0]])})["a", "b"]
    assert interval.value == 0.5
    assert np.isnan([interval.low, interval.high]).all()


@pytest.mark.parametrize(  # the truth is Phi(shift / sqrt(2))
    ("shift", "truth"), [pytest.param(0.0, 0.5, marks=pytest.mark.slow), (1.0, 0.7602)]
)
def test_improvement_intervals__many_worlds__hold_the_truth_in_95_of_100(shift, truth, monkeypatch):
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", 1000)
    rng = np.random.default_rng(0)
    worlds = [{"a": rng.normal(size=(10, 4)) + shift, "b": rng.normal(size=(10, 4))} for _ in range(1000)]
    intervals = [improvement_intervals(scores, seed)["a", "b"] for seed, scores in enumerate(worlds)]
    assert 0.93 <= np.mean([i.low <= truth <= i.high for i in intervals]) <= 0.97


# Profiles


def test_performance_profile__two_runs_of_two_tasks__by_hand():
    scores = np.array([[0.0, 1.0], [0.5, 2.0]])
    np.testing.assert_array_equal(
        performance_profile(scores, np.array([-1.0, 0.0, 0.5, 1.5, 2.0])), [1.0, 0.75, 0.5, 0.25, 0.0]
    )
    both = performance_profile(np.stack([scores, scores + 1]), np.array([0.5]))
    np.testing.assert_array_equal(both, [[0.5], [1.0]])


def test_profile_bands__several_runs__are_those_of_the_bootstrap_at_each_threshold():
    scores, thresholds = np.random.default_rng(0).normal(size=(6, 2)), np.array([-5.0, 0.0, 1.0])
    share, low, high = profile_bands(scores, thresholds)
    np.testing.assert_array_equal(share, performance_profile(scores, thresholds))
    assert (low[0], high[0]) == (1.0, 1.0)
    for place in (1, 2):
        slow = bootstrap_interval(lambda s, t=thresholds[place]: (s > t).mean(axis=(-2, -1)), scores)
        np.testing.assert_allclose([low[place], high[place]], [slow.low, slow.high])
    assert np.isnan(profile_bands(scores[:1], thresholds)[1]).all()


def test_profile_bands__runs_beside_their_marks__marks_are_drawn_too():
    rng = np.random.default_rng(0)
    scores, random, oracle = (rng.normal(mean, 0.3, size=(6, 2)) for mean in (0.5, 1.0, 0.0))
    runs, thresholds = beside_marks(scores, random, oracle), np.array([0.3, 0.6])
    share, low, high = profile_bands(runs, thresholds, on_scale)
    np.testing.assert_array_equal(share, performance_profile(on_scale(runs), thresholds))
    for place, threshold in enumerate(thresholds):
        slow = bootstrap_interval(lambda r, t=threshold: (on_scale(r) > t).mean(axis=(-2, -1)), runs)
        np.testing.assert_allclose([low[place], high[place]], [slow.low, slow.high])


# Correlation


def test_correlation__numbers__are_scipys():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=20), rng.normal(size=20)
    second += first
    expected = stats.pearsonr(first, second)
    interval = correlation(first, second)
    assert interval.value == pytest.approx(expected.statistic)
    np.testing.assert_allclose([interval.low, interval.high], expected.confidence_interval())
    by_rank = correlation(first, second, ranks=True)
    assert by_rank.value == pytest.approx(stats.spearmanr(first, second).statistic)
    # Bonett and Wright: the half width on Fisher's scale is 1.96 sqrt((1 + r^2 / 2) / 17).
    half = 1.959964 * np.sqrt((1 + by_rank.value**2 / 2) / 17)
    assert (np.arctanh(by_rank.high) - np.arctanh(by_rank.low)) / 2 == pytest.approx(half, rel=1e-6)


@pytest.mark.parametrize("second", [np.ones(5), np.ones(1)])
def test_correlation__without_variation__is_not_a_number(second):
    assert np.isnan(correlation(np.arange(float(len(second))), second).value)
