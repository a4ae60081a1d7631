"""Reference values are published ones, worked out by hand, or SciPy's own functions."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from raise_env.agents.significance import detectable_effect, holm, paired_test, pairs_needed, power_of


def test_paired_test__numbers__are_scipys():
    rng = np.random.default_rng(0)
    values, reference = rng.normal(size=8), rng.normal(size=8)
    expected, test = stats.ttest_rel(values, reference), paired_test(values, reference)
    assert test.p == pytest.approx(expected.pvalue)
    assert test.effect_size * np.sqrt(8) == pytest.approx(expected.statistic)
    interval = expected.confidence_interval()
    assert (test.difference.low, test.difference.high) == pytest.approx((interval.low, interval.high))
    assert test.num_pairs == 8


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0, 1.5])
def test_paired_test__p_and_interval__never_disagree(shift):
    rng = np.random.default_rng(1)
    for _ in range(50):
        test = paired_test(rng.normal(size=5) + shift, np.zeros(5))
        assert (test.p < 0.05) == (test.difference.low > 0 or test.difference.high < 0)


def test_paired_test__a_pair_with_a_gap__is_left_out_and_counted():
    test = paired_test(np.array([1.0, 2.0, np.nan, 4.0]), np.array([0.0, 0.0, 0.0, np.nan]))
    assert (test.num_pairs, test.difference.num_missing, test.difference.value) == (2, 2, 1.5)


def test_paired_test__one_pair__is_no_test():
    test = paired_test(np.array([1.0]), np.array([0.0]))
    assert test.difference.value == 1.0
    assert np.isnan([test.p, test.effect_size, test.detectable]).all()
    assert test.pairs_needed is None


@pytest.mark.parametrize(("shift", "p"), [(0.0, 1.0), (0.5, 0.0)])
def test_paired_test__the_same_difference_in_each_pair__is_certain(shift, p):
    values = np.array([1.0, 2.0, 4.0])
    test = paired_test(values + shift, values)
    assert (test.difference.value, test.p, test.detectable) == (shift, p, 0.0)


def test_holm__four_tests__by_hand():
    # In order 0.005 x 4 = 0.02, 0.01 x 3 = 0.03, 0.03 x 2 = 0.06, 0.04 x 1 = 0.04, which cannot be below 0.06.
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])


def test_holm__large_and_missing_p__stay_within_one_and_do_not_count():
    np.testing.assert_array_equal(holm(np.array([0.9, np.nan, 0.8])), [1.0, np.nan, 1.0])
    np.testing.assert_array_equal(holm(np.array([0.02, np.nan])), [0.02, np.nan])
    assert len(holm(np.array([]))) == 0


def test_holm__true_nulls__hardly_ever_find_anything():
    rng = np.random.default_rng(0)
    smallest = [np.min(holm(p)) for p in rng.random((4000, 6))]
    assert np.mean(np.array(smallest) < 0.05) == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize(("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_pairs_needed__cohens_effects__published_counts(effect, pairs):
    # G*Power's for a two-sided t test of matched pairs, alpha 0.05, power 0.8.
    assert pairs_needed(effect) == pairs_needed(-effect) == pairs


@pytest.mark.parametrize(("effect", "pairs"), [(0.0, None), (np.nan, None), (1e-4, None), (1e6, 2)])
def test_pairs_needed__effects_of_nothing_and_of_all__are_answered(effect, pairs):
    assert pairs_needed(effect) == pairs


def test_power_of__published_and_simulated_values__are_met():
    assert power_of(0.5, 34) == pytest.approx(0.8078, abs=1e-4)
    assert power_of(0.0, 10) == pytest.approx(0.05)
    assert power_of(100.0, 2) == pytest.approx(1.0)
    draws = np.random.default_rng(0).normal(1.0, 1.0, size=(20_000, 6))
    assert power_of(1.0, 6) == pytest.approx((stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05).mean(), abs=0.01)


@pytest.mark.parametrize("num_pairs", [2, 3, 5, 10, 1000])
def test_detectable_effect__any_number_of_pairs__has_that_power(num_pairs):
    assert power_of(detectable_effect(num_pairs), num_pairs) == pytest.approx(0.8)


def test_paired_test__of_several__power_is_that_of_a_stricter_level():
    values, reference = np.array([1.0, 2.0, 3.0, 4.5, 5.0]), np.zeros(5)
    one, of_ten = paired_test(values, reference), paired_test(values, reference, num_tests=10)
    assert (one.p, one.difference, one.effect_size) == (of_ten.p, of_ten.difference, of_ten.effect_size)
    spread = values.std(ddof=1)
    assert power_of(of_ten.detectable / spread, 5, 0.005) == pytest.approx(0.8)
    assert power_of(one.effect_size, of_ten.pairs_needed, 0.005) >= 0.8
    assert power_of(one.effect_size, of_ten.pairs_needed - 1, 0.005) < 0.8
    draws = np.random.default_rng(0).normal(2.0, 1.0, size=(20_000, 6))
    simulated = (stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.005).mean()
    assert power_of(2.0, 6, 0.005) == pytest.approx(simulated, abs=0.01)
