"""What many runs say together: means, differences and chances, each with the interval that its runs allow.

Pure functions over arrays with a row for each run and a column for each task. Runs of one row belong together: they
began from the same adapter and were offered the same candidates. The aggregates over tasks, and their intervals from
resampled runs, are those of Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical
Precipice", NeurIPS. What the bootstrap is to be put on takes any number of such arrays at once, in leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

__all__ = [
    "CONFIDENCE",
    "NUM_RESAMPLES",
    "Interval",
    "bootstrap_interval",
    "interquartile_mean",
    "mean_interval",
    "normalise",
    "overall_mean",
    "paired_difference",
    "probability_of_improvement",
]

CONFIDENCE = 0.95

#: Times that the bootstrap draws the runs anew: the ends of its intervals then hold to about two digits.
NUM_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A number estimated from runs, with the ends of its interval; NaN where there are too few runs.

    `num_missing` runs have no finite value and were left out: what is left flatters whoever they belong to, so whoever
    shows the number says so.
    """

    value: float
    low: float
    high: float
    num_missing: int = 0

    @property
    def has_ends(self) -> bool:
        """Whether there were runs enough for an interval."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high))

    @property
    def half_width(self) -> float:
        """Half the distance between the ends."""
        return (self.high - self.low) / 2


def mean_interval(values: np.ndarray) -> Interval:
    """Return the mean with Student's 95% interval, as if the values were drawn from a normal distribution.

    Args:
        values: One for each run, shape (num_runs,); one that is not finite, or missing, is left out and counted.
    """
    finite = values[np.isfinite(values)]
    num_missing = len(values) - len(finite)
    if len(finite) < 2:
        return Interval(float(finite[0]) if len(finite) else np.nan, np.nan, np.nan, num_missing)
    mean = float(finite.mean())
    half = float(stats.sem(finite) * stats.t.ppf((1 + CONFIDENCE) / 2, len(finite) - 1))
    return Interval(mean, mean - half, mean + half, num_missing)


def paired_difference(values: np.ndarray, reference: np.ndarray) -> Interval:
    """Return the mean of values - reference with its 95% interval, run by run: what both share falls out.

    Args:
        values: One for each run, shape (num_runs,).
        reference: Those of the same runs with something else, shape (num_runs,); NaN in either leaves the pair out.
    """
    return mean_interval(values - reference)


def normalise(scores: np.ndarray, zero: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Return scores on a scale on which the runs of `zero` have mean 0 and those of `one` mean 1, task by task.

    Args:
        scores: Shape (num_runs, num_tasks); higher or lower may be better, as long as all three are alike.
        zero: The lower mark's, such as random's, shape (any number of runs, num_tasks).
        one: The upper mark's, such as the oracle's, likewise.

    Raises:
        ValueError: In some task the two marks have the same mean, or no run.
    """
    low, high = _task_means(zero), _task_means(one)
    if not np.all(np.abs(high - low) > 0):  # NaN fails too
        raise ValueError("the marks of 0 and 1 have the same mean, or no run, in some task: there is no scale.")
    return np.asarray((scores - low) / (high - low))


def overall_mean(scores: np.ndarray) -> np.ndarray:
    """Return the mean of all runs of all tasks, shape (...).

    Args:
        scores: Shape (..., num_runs, num_tasks).
    """
    return np.asarray(scores.mean(axis=(-2, -1)))


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Return the mean of the middle half of all runs of all tasks, shape (...): robust as a median, and steadier.

    Args:
        scores: Shape (..., num_runs, num_tasks).
    """
    return np.asarray(stats.trim_mean(scores.reshape(*scores.shape[:-2], -1), 0.25, axis=-1))


def probability_of_improvement(scores: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the chance that a run scores higher than one of the reference in a task drawn at random, shape (...).

    Equal scores count as half (Agarwal et al. 2021, section 4): in each task it is Mann and Whitney's U over the
    number of pairs.

    Args:
        scores: Higher is better, shape (..., num_runs, num_tasks).
        reference: Shape (..., any number of runs, num_tasks).
    """
    ours, theirs = scores[..., :, None, :], reference[..., None, :, :]
    return np.asarray(((ours > theirs) + 0.5 * (ours == theirs)).mean(axis=(-3, -2, -1)))


def bootstrap_interval(statistic: Callable[..., np.ndarray], *samples: np.ndarray, seed: int = 0) -> Interval:
    """Return a statistic with its 95% interval from a stratified bootstrap: the runs of each task are drawn anew.

    The ends are percentiles of the statistic over the resamples (Agarwal et al. 2021, section 4). With few runs
    such intervals are too narrow: five runs vary less among themselves than the world they come from.

    Args:
        statistic: Takes as many arrays as there are samples, with leading dimensions, and returns one number for each.
        samples: Each of shape (num_runs, num_tasks), all of them whole; they are resampled independently.
        seed: What the resamples are drawn from.
    """
    value = float(statistic(*samples))
    if min(len(sample) for sample in samples) < 2:
        return Interval(value, np.nan, np.nan)
    rng = np.random.default_rng(seed)
    values = statistic(*(_resampled(sample, rng) for sample in samples))
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(value, float(low), float(high))


def _resampled(sample: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the runs of each task drawn anew, shape (NUM_RESAMPLES, num_runs, num_tasks)."""
    places = rng.integers(len(sample), size=(NUM_RESAMPLES, *sample.shape))
    return np.asarray(np.take_along_axis(sample[None], places, axis=1))


def _task_means(scores: np.ndarray) -> np.ndarray:
    """Return the mean of each task's runs, missing ones left out, shape (num_tasks,); NaN without any."""
    counts = (~np.isnan(scores)).sum(axis=0)
    sums = np.nansum(scores, axis=0)
    return np.asarray(np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0))
