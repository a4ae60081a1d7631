"""What many runs say together: means, differences and chances, each with the interval that its runs allow.

Pure functions over arrays with a row for each run and a column for each task. Runs of one row belong together: they
began from the same adapter and were offered the same candidates. The aggregates over tasks, and resampling the runs of
each task by themselves, are those of Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical
Precipice", NeurIPS. What the bootstrap is to be put on takes any number of such arrays at once, in leading dimensions.

Percentiles of few resampled runs lie too close together: of ten runs, 95% percentiles hold the truth in 90 of 100
draws, of five in 83. Here they are taken further out (Hesterberg 2015, "What Teachers Should Know About the Bootstrap",
The American Statistician 69, section 4.1): by as much as Student's interval is wider than the normal one, with degrees
of freedom that fit what each task's runs contribute (Satterthwaite 1946). docs/statistics.md has what that was measured
to give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

__all__ = [
    "CONFIDENCE",
    "NUM_RESAMPLES",
    "Interval",
    "beside_marks",
    "bootstrap_interval",
    "correlation",
    "improvement_intervals",
    "interquartile_mean",
    "mean_interval",
    "on_scale",
    "overall_mean",
    "paired_difference",
    "performance_profile",
    "probability_of_improvement",
    "profile_bands",
]

CONFIDENCE = 0.95

#: Times that the bootstrap draws the runs anew: the ends of its intervals then hold to about two digits.
NUM_RESAMPLES = 5000


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


def beside_marks(scores: np.ndarray, zero: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Return whole runs beside those of both marks with the same seed, shape (num_whole, num_tasks, 3), for `on_scale`.

    Intervals of normalised scores are drawn from these: the marks are means of few runs, so the scale is uncertain too,
    and the runs of one seed have much in common.

    Args:
        scores: Shape (num_runs, num_tasks); rows with a NaN are left out. Higher or lower may be better, as long as all
            three are alike.
        zero: The runs whose mean is 0, such as random's, shape (num_runs, num_tasks); NaN where there is none.
        one: The runs whose mean is 1, such as the oracle's, likewise.

    Raises:
        ValueError: In some task the two marks have the same mean, or no run.
    """
    low, high = _task_means(zero), _task_means(one)
    if not np.all(np.abs(high - low) > 0):  # NaN fails too
        raise ValueError("the marks of 0 and 1 have the same mean, or no run, in some task: there is no scale.")
    whole = ~np.isnan(scores).any(axis=1)
    marks = [_with_mean(runs[whole], mean) for runs, mean in ((zero, low), (one, high))]
    return np.stack([scores[whole], *marks], axis=-1)


def _with_mean(runs: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return some of a mark's runs, moved so that their mean is that of all, which also stands for what is missing."""
    filled = np.where(np.isnan(runs), mean, runs)
    return np.asarray(filled - filled.mean(axis=0) + mean if len(filled) else filled)


def on_scale(runs: np.ndarray) -> np.ndarray:
    """Return scores between the means of both marks, 0 and 1, task by task, shape (..., num_runs, num_tasks).

    Args:
        runs: As `beside_marks` returns them, or drawn from that, shape (..., num_runs, num_tasks, 3).
    """
    low, high = (runs[..., place].mean(axis=-2, keepdims=True) for place in (1, 2))
    return np.asarray((runs[..., 0] - low) / (high - low))


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


def performance_profile(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return the share of all runs of all tasks that score above each threshold, shape (..., num_thresholds).

    Agarwal et al. 2021, section 4.2: every task counts alike, as each has as many runs.

    Args:
        scores: Higher is better, shape (..., num_runs, num_tasks).
        thresholds: Shape (num_thresholds,).
    """
    return np.asarray((scores[..., None] > thresholds).mean(axis=(-3, -2)))


def bootstrap_interval(statistic: Callable[..., np.ndarray], *samples: np.ndarray, seed: int = 0) -> Interval:
    """Return a statistic with its 95% interval from a stratified bootstrap: the runs of each task are drawn anew.

    The ends are expanded percentiles of the statistic over the resamples.

    Args:
        statistic: Takes as many arrays as there are samples, with leading dimensions, and returns one number for each.
        samples: Each of shape (num_runs, num_tasks), or (num_runs, num_tasks, ...) where numbers of one run stay
            together; all of them whole. They are resampled independently of each other.
        seed: What the resamples are drawn from.
    """
    value = float(statistic(*samples))
    if min(len(sample) for sample in samples) < 2:
        return Interval(value, np.nan, np.nan)
    rng = np.random.default_rng(seed)
    places = [_drawn(sample.shape[:2], rng) for sample in samples]
    resampled = (_taken(sample, drawn) for sample, drawn in zip(samples, places, strict=True))
    return Interval(value, *_expanded_ends(statistic(*resampled), [_counts(drawn) for drawn in places]))


def improvement_intervals(scores: Mapping[str, np.ndarray], seed: int = 0) -> dict[tuple[str, str], Interval]:
    """Return `probability_of_improvement` of each over each other, by (who, over whom), with bootstrap intervals.

    Where every run of one lies above every run of the other, in each task, resampled runs never differ, and the
    bootstrap would claim certainty after two runs. There the ends are Newcombe's (2006, "Confidence intervals for an
    effect size measure based on the Mann-Whitney statistic, part 2", Statistics in Medicine 25, method 5), put together
    over tasks by the distances from the estimates (Zou and Donner 2008, Statistics in Medicine 27).

    Args:
        scores: By name, higher is better, each of shape (num_runs, num_tasks), whole, with at least one run.
        seed: What the resamples are drawn from.
    """
    counts = {
        name: _counts(_drawn(runs.shape, np.random.default_rng([seed, place])))
        for place, (name, runs) in enumerate(scores.items())
    }
    names, intervals = list(scores), {}
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            found = _improvement(scores[one], scores[other], counts[one], counts[other])
            intervals[one, other] = found
            intervals[other, one] = Interval(1 - found.value, 1 - found.high, 1 - found.low)
    return intervals


def profile_bands(
    runs: np.ndarray,
    thresholds: np.ndarray,
    scores_of: Callable[[np.ndarray], np.ndarray] = np.asarray,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `performance_profile` with the ends of its 95% intervals, each of shape (num_thresholds,).

    Intervals are of one threshold at a time, from the bootstrap; NaN with a single run.

    Args:
        runs: Scores, higher is better, shape (num_runs, num_tasks), whole; or what `scores_of` makes scores of.
        thresholds: Shape (num_thresholds,).
        scores_of: Of resampled runs, such as `on_scale` of those that `beside_marks` returns.
        seed: What the resamples are drawn from.
    """
    share = performance_profile(scores_of(runs), thresholds)
    if len(runs) < 2:
        return share, np.full(len(share), np.nan), np.full(len(share), np.nan)
    drawn = _drawn(runs.shape[:2], np.random.default_rng(seed))
    scores, counts = scores_of(_taken(runs, drawn)), _counts(drawn)
    # One threshold after another: all at once would take as many times the memory.
    ends = np.array([_expanded_ends((scores > one).mean(axis=(-2, -1)), [counts]) for one in thresholds])
    return share, ends[:, 0], ends[:, 1]


def correlation(first: np.ndarray, second: np.ndarray, *, ranks: bool = False) -> Interval:
    """Return Pearson's or Spearman's correlation with a 95% interval.

    The interval is Fisher's, on the scale of the inverse hyperbolic tangent; for ranks its variance is that of Bonett
    and Wright 2000 ("Sample size requirements for estimating Pearson, Kendall and Spearman correlations", Psychometrika
    65). NaN where one of the two does not vary, and for the ends with fewer than four pairs.

    Args:
        first: Shape (num_pairs,).
        second: Shape (num_pairs,).
        ranks: Spearman's instead of Pearson's.
    """
    if ranks:
        first, second = stats.rankdata(first), stats.rankdata(second)
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return Interval(np.nan, np.nan, np.nan)
    value = float(np.clip(np.corrcoef(first, second)[0, 1], -1, 1))
    if len(first) < 4:
        return Interval(value, np.nan, np.nan)
    if abs(value) == 1:
        return Interval(value, value, value)
    spread = np.sqrt((1 + (value**2 / 2 if ranks else 0)) / (len(first) - 3))
    reach = stats.norm.ppf((1 + CONFIDENCE) / 2) * spread
    return Interval(value, float(np.tanh(np.arctanh(value) - reach)), float(np.tanh(np.arctanh(value) + reach)))


def _drawn(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Return which runs each resample holds in each task, shape (NUM_RESAMPLES, num_runs, num_tasks)."""
    return rng.integers(shape[0], size=(NUM_RESAMPLES, *shape))


def _taken(sample: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Return the runs that each resample holds, shape (NUM_RESAMPLES, num_runs, num_tasks, ...)."""
    places = drawn.reshape(drawn.shape + (1,) * (sample.ndim - 2))
    return np.take_along_axis(sample[None], places, axis=1)


def _counts(drawn: np.ndarray) -> np.ndarray:
    """Return how often each resample holds each run, shape (NUM_RESAMPLES, num_tasks, num_runs)."""
    num_resamples, num_runs, num_tasks = drawn.shape
    cells = np.arange(num_resamples)[:, None, None] * num_tasks + np.arange(num_tasks)
    counts = np.bincount((cells * num_runs + drawn).ravel(), minlength=num_resamples * num_tasks * num_runs)
    return counts.reshape(num_resamples, num_tasks, num_runs).astype(float)


def _expanded_ends(values: np.ndarray, counts: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the percentiles of resampled values that make a 95% interval.

    With n runs of one task they are those of the levels Phi(-+ sqrt(n / (n - 1)) t), t being Student's for n - 1
    degrees of freedom. With several tasks the factor and the degrees of freedom are those of what each task's runs add
    to the variance, as the resamples show it.

    Args:
        values: Of the statistic, shape (NUM_RESAMPLES,).
        counts: For each sample, how often each resample holds each run, shape (NUM_RESAMPLES, num_tasks, num_runs).
    """
    parts = np.concatenate([_variances(values, sample) for sample in counts])
    sizes = np.concatenate([np.full(sample.shape[1], sample.shape[2]) for sample in counts])
    if not parts.sum() > 0:
        return float(values.min()), float(values.max())
    whole = parts * sizes / (sizes - 1)
    freedom = parts.sum() ** 2 / (parts**2 / (sizes - 1)).sum()
    reach = np.sqrt(whole.sum() / parts.sum()) * stats.t.ppf((1 + CONFIDENCE) / 2, freedom)
    low, high = np.quantile(values, stats.norm.cdf([-reach, reach]))
    return float(low), float(high)


def _variances(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return what the runs of each task add to the variance of resampled values, shape (num_tasks,).

    It is the infinitesimal jackknife after a bootstrap, less what chance adds (Efron 2014, "Estimation and accuracy
    after model selection", JASA 109, section 4; Wager, Hastie and Efron 2014 for the correction).
    """
    num_runs = counts.shape[2]
    influence = np.tensordot(values - values.mean(), counts, axes=(0, 0)) / len(values)  # (tasks, runs)
    by_chance = values.var() / len(values) * (num_runs - 1)
    return np.asarray(np.maximum((influence**2).sum(axis=1) - by_chance, 0))


def _improvement(
    scores: np.ndarray, reference: np.ndarray, counts: np.ndarray, reference_counts: np.ndarray
) -> Interval:
    """Return the probability of improvement with its interval; counts are of the resamples of each."""
    ours, theirs = scores.T[:, :, None], reference.T[:, None, :]
    wins = (ours > theirs) + 0.5 * (ours == theirs)  # (tasks, runs, runs of the reference)
    by_task = wins.mean(axis=(1, 2))
    value = float(by_task.mean())
    if min(len(scores), len(reference)) < 2:
        return Interval(value, np.nan, np.nan)
    # What the statistic is over resampled runs, without making them: runs weigh as often as they were drawn.
    drawn = (np.matmul(counts.swapaxes(0, 1), wins) * reference_counts.swapaxes(0, 1)).sum(axis=(0, 2)) / wins.size
    if np.ptp(drawn) < 1e-12 and np.isin(by_task, (0.0, 1.0)).any():
        return Interval(value, *_separated_ends(by_task, len(scores), len(reference)))
    return Interval(value, *_expanded_ends(drawn, [counts, reference_counts]))


def _separated_ends(by_task: np.ndarray, num_runs: int, num_reference: int) -> tuple[float, float]:
    """Return the ends where all runs of each task with a chance of 0 or 1 are apart."""
    z = stats.norm.ppf((1 + CONFIDENCE) / 2)

    def excess(distance: float) -> float:
        pairs = (num_runs + num_reference) / 2 - 1
        shared = 1 + pairs * (distance / (1 + distance) + (1 - distance) / (2 - distance))
        return float(distance - z**2 * (1 - distance) * shared / (num_runs * num_reference))

    distance = optimize.brentq(excess, 0.0, 1.0)
    value = by_task.mean()
    below, above = (distance * np.sqrt((by_task == end).sum()) / len(by_task) for end in (1.0, 0.0))
    return float(max(value - below, 0)), float(min(value + above, 1))


def _task_means(scores: np.ndarray) -> np.ndarray:
    """Return the mean of each task's runs, missing ones left out, shape (num_tasks,); NaN without any."""
    counts = (~np.isnan(scores)).sum(axis=0)
    sums = np.nansum(scores, axis=0)
    return np.asarray(np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0))
