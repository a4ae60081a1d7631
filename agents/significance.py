"""Whether a difference between paired runs is more than chance, how large it is, and how many runs would show it.

The test is Student's for pairs: its p is below 0.05 just where the interval of `statistics.paired_difference` leaves
zero out. Of several tests `holm` adjusts p, and no interval; power is then that of the strictest of them. Tests by rank
or sign cannot go below p = 0.0625 with five pairs, whatever the runs show. Pure functions over one number a run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

from .statistics import CONFIDENCE, Interval, paired_difference

__all__ = ["LEVEL", "POWER", "PairedTest", "detectable_effect", "holm", "paired_test", "pairs_needed", "power_of"]

#: The chance of finding a difference where there is none.
LEVEL = 1 - CONFIDENCE

#: The chance of seeing a difference that is there, for which runs are counted.
POWER = 0.8

#: More pairs than this are as good as never.
MOST_PAIRS = 1_000_000


@dataclass(frozen=True, slots=True)
class PairedTest:
    """What paired runs say of a difference; NaN, or None for a count, where there are too few.

    Attributes:
        difference: The mean difference with Student's interval; `num_missing` counts the pairs left out.
        p: Two-sided, of Student's test for pairs.
        effect_size: The mean difference in standard deviations of the differences (Cohen's d_z).
        pairs_needed: Pairs with which an effect of this size would be seen with a chance of `POWER`; None where
            `MOST_PAIRS` would not do.
        detectable: The smallest difference that these pairs would have shown with a chance of `POWER`.
        num_pairs: How many pairs there are.
    """

    difference: Interval
    p: float
    effect_size: float
    pairs_needed: int | None
    detectable: float
    num_pairs: int


def paired_test(values: np.ndarray, reference: np.ndarray, num_tests: int = 1) -> PairedTest:
    """Return what the pairs say.

    Args:
        values: One for each run, shape (num_runs,).
        reference: Those of the same runs with something else, shape (num_runs,); NaN in either leaves the pair out.
        num_tests: How many tests this one is adjusted with. Power is that at the first step of Holm's rule, where p has
            to be below 5% / `num_tests`; p itself is not adjusted here.
    """
    difference = paired_difference(values, reference)
    pairs = (values - reference)[np.isfinite(values - reference)]
    if len(pairs) < 2:
        return PairedTest(difference, np.nan, np.nan, None, np.nan, len(pairs))
    spread = float(pairs.std(ddof=1))
    if spread == 0:  # deterministic agents: the difference is exact, and so is that there is none
        return PairedTest(difference, float(difference.value == 0), np.nan, None, 0.0, len(pairs))
    effect = difference.value / spread
    p = float(2 * stats.t.sf(abs(effect) * np.sqrt(len(pairs)), len(pairs) - 1))
    level = LEVEL / num_tests
    detectable = detectable_effect(len(pairs), level) * spread
    return PairedTest(difference, p, effect, pairs_needed(effect, level), detectable, len(pairs))


def holm(p_values: np.ndarray) -> np.ndarray:
    """Return p adjusted by Holm's step-down rule: below 0.05, the chance of any false finding among all is below 5%.

    Holm 1979, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6. It
    supposes nothing of how the tests hang together, which all have the reference in common.

    Args:
        p_values: Shape (num_tests,); NaN is no test, and stays.
    """
    adjusted = np.full(len(p_values), np.nan)
    tests = np.flatnonzero(~np.isnan(p_values))
    order = tests[np.argsort(p_values[tests], kind="stable")]
    steps = p_values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def power_of(effect_size: float, num_pairs: int, level: float = LEVEL) -> float:
    """Return the chance that so many pairs show an effect of so many standard deviations.

    Args:
        effect_size: The mean difference in standard deviations of the differences.
        num_pairs: At least 2.
        level: What p has to be below.
    """
    freedom = num_pairs - 1
    limit = stats.t.isf(level / 2, freedom)
    shift = abs(effect_size) * np.sqrt(num_pairs)
    # The noncentral t's distribution function; the lower end counts for tiny effects. SciPy gives NaN for tails below
    # some 1e-20.
    below, wrong_sign = np.nan_to_num(special.nctdtr(freedom, shift, [limit, -limit]), nan=0.0)
    return float(1 - below + wrong_sign)


def pairs_needed(effect_size: float, level: float = LEVEL) -> int | None:
    """Return how many pairs show an effect of this size with a chance of `POWER`; None where `MOST_PAIRS` do not.

    Args:
        effect_size: The mean difference in standard deviations of the differences.
        level: What p has to be below.
    """
    if not abs(effect_size) > 0 or power_of(effect_size, MOST_PAIRS, level) < POWER:
        return None
    few, enough = 1, 2
    while power_of(effect_size, enough, level) < POWER:
        few, enough = enough, min(2 * enough, MOST_PAIRS)
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if power_of(effect_size, middle, level) >= POWER else (middle, enough)
    return enough


def detectable_effect(num_pairs: int, level: float = LEVEL) -> float:
    """Return the smallest effect, in standard deviations, that so many pairs show with a chance of `POWER`.

    Args:
        num_pairs: At least 2.
        level: What p has to be below.
    """
    # With two pairs and one test it is 11.5, and it falls from there with more pairs, and grows with more tests.
    return float(optimize.brentq(lambda effect: power_of(effect, num_pairs, level) - POWER, 0.0, 1e5))
