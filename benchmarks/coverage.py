"""How often the 95% intervals of agents/statistics.py hold the truth, on made-up results whose truth is known.

    python benchmarks/coverage.py --draws 1000

It prints the tables of docs/statistics.md: one row for each law that results are drawn from, number of seeds and number
of tasks. Beside each interval of this project is the plain percentile bootstrap from the same resamples. It takes
about three quarters of an hour on one core.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator

import numpy as np
from scipy import stats

from raise_env.agents.statistics import (
    Interval,
    beside_marks,
    bootstrap_interval,
    improvement_intervals,
    interquartile_mean,
    mean_interval,
    on_scale,
    overall_mean,
    paired_difference,
    probability_of_improvement,
)

NUM_RUNS = (5, 10)
NUM_TASKS = (1, 4, 10)
SHIFTS = (0.0, 1.0, 2.0, 3.0)

#: True normalised scores, and the standard deviations of the runs of an agent, random and the oracle where the way from
#: random to the oracle is 1: about what they are on the embedded tasks.
SCORES = (0.1, 0.5, 0.9)
SPREADS = (0.1, 0.25, 0.05)

#: Runs that the truth is taken from where no formula gives it.
NUM_TRUTH = 400_000

Draw = Callable[[np.random.Generator, int, int], np.ndarray]


def normal(rng: np.random.Generator, num_runs: int, num_tasks: int) -> np.ndarray:
    """Return standard normal results, shape (num_runs, num_tasks)."""
    return rng.normal(size=(num_runs, num_tasks))


def unequal(rng: np.random.Generator, num_runs: int, num_tasks: int) -> np.ndarray:
    """Return normal results whose deviation grows tenfold from the first task to the last."""
    return rng.normal(size=(num_runs, num_tasks)) * np.geomspace(1, 10, num_tasks)


def skewed(rng: np.random.Generator, num_runs: int, num_tasks: int) -> np.ndarray:
    """Return results of skewness 1, mean 0 and variance 1."""
    return (rng.gamma(4.0, size=(num_runs, num_tasks)) - 4) / 2


def exponential(rng: np.random.Generator, num_runs: int, num_tasks: int) -> np.ndarray:
    """Return results of skewness 2, mean 0 and variance 1."""
    return rng.exponential(size=(num_runs, num_tasks)) - 1


def heavy(rng: np.random.Generator, num_runs: int, num_tasks: int) -> np.ndarray:
    """Return results by Student's t for three degrees of freedom: now and then one far out."""
    return rng.standard_t(3, size=(num_runs, num_tasks))


LAWS: dict[str, Draw] = {
    "normal": normal,
    "unequal variances": unequal,
    "skewness 1": skewed,
    "skewness 2": exponential,
    "heavy tails": heavy,
}


def percentiles(statistic: Callable[..., np.ndarray], *samples: np.ndarray, seed: int) -> Interval:
    """Return the plain percentile bootstrap's interval, for comparison."""
    rng = np.random.default_rng(seed)
    drawn = [np.take_along_axis(s[None], rng.integers(len(s), size=(2000, *s.shape)), axis=1) for s in samples]
    low, high = np.quantile(statistic(*drawn), [0.025, 0.975])
    return Interval(float(statistic(*samples)), float(low), float(high))


def holds(interval: Interval, truth: float) -> bool:
    """Return whether the truth lies within the ends."""
    return interval.low - 1e-12 <= truth <= interval.high + 1e-12


def coverage_of_means(draw: Draw, num_runs: int, num_tasks: int, num_draws: int) -> dict[str, float]:
    """Return the share of draws whose intervals hold the mean, the paired difference, or the interquartile mean."""
    rng = np.random.default_rng(0)
    many = draw(rng, NUM_TRUTH // num_tasks, num_tasks)
    middle = float(interquartile_mean(many))
    held: dict[str, list[bool]] = {}
    for seed in range(num_draws):
        runs = draw(rng, num_runs, num_tasks)
        if num_tasks == 1:
            reference = draw(rng, num_runs, num_tasks)
            held.setdefault("Student", []).append(holds(mean_interval(runs[:, 0]), 0.0))
            difference = paired_difference(runs[:, 0] + 0.5 * reference[:, 0], reference[:, 0])
            held.setdefault("paired", []).append(holds(difference, 0.0))
        held.setdefault("mean", []).append(holds(bootstrap_interval(overall_mean, runs, seed=seed), 0.0))
        held.setdefault("mean, plain", []).append(holds(percentiles(overall_mean, runs, seed=seed), 0.0))
        held.setdefault("IQM", []).append(holds(bootstrap_interval(interquartile_mean, runs, seed=seed), middle))
        held.setdefault("IQM, plain", []).append(holds(percentiles(interquartile_mean, runs, seed=seed), middle))
    return {name: float(np.mean(values)) for name, values in held.items()}


def coverage_of_improvement(shift: float, num_runs: int, num_tasks: int, num_draws: int) -> dict[str, float]:
    """Return the share of draws whose intervals hold the probability of improvement of normal results so far apart."""
    rng = np.random.default_rng(0)
    truth = float(stats.norm.cdf(shift / np.sqrt(2)))
    held: dict[str, list[bool]] = {"here": [], "plain": []}
    for seed in range(num_draws):
        scores = {"a": normal(rng, num_runs, num_tasks) + shift, "b": normal(rng, num_runs, num_tasks)}
        held["here"].append(holds(improvement_intervals(scores, seed)["a", "b"], truth))
        held["plain"].append(holds(percentiles(probability_of_improvement, *scores.values(), seed=seed), truth))
    return {"truth": truth, **{name: float(np.mean(values)) for name, values in held.items()}}


def coverage_of_scores(score: float, num_runs: int, num_tasks: int, num_draws: int) -> dict[str, float]:
    """Return the share of draws whose intervals hold a normalised score, of normal results."""
    rng = np.random.default_rng(0)
    held: dict[str, list[bool]] = {"here": [], "fixed": []}
    for seed in range(num_draws):
        means = zip((score, 0.0, 1.0), SPREADS, strict=True)
        runs = beside_marks(*(rng.normal(mean, spread, size=(num_runs, num_tasks)) for mean, spread in means))
        drawn = bootstrap_interval(lambda runs: interquartile_mean(on_scale(runs)), runs, seed=seed)
        held["here"].append(holds(drawn, score))
        held["fixed"].append(holds(bootstrap_interval(interquartile_mean, on_scale(runs), seed=seed), score))
    return {name: float(np.mean(values)) for name, values in held.items()}


def tables(num_draws: int) -> Iterator[str]:
    """Yield the lines of all tables as they are measured."""
    yield "| true score | seeds | tasks | here | marks held fixed |"
    yield "|---:|---:|---:|---:|---:|"
    for score, num_runs, num_tasks in itertools.product(SCORES, NUM_RUNS, (1, 8)):
        found = coverage_of_scores(score, num_runs, num_tasks, num_draws)
        yield f"| {score} | {num_runs} | {num_tasks} | {100 * found['here']:.1f} | {100 * found['fixed']:.1f} |"
    yield ""
    names = ("Student", "paired", "mean", "mean, plain", "IQM", "IQM, plain")
    yield "| law | seeds | tasks | " + " | ".join(names) + " |"
    yield "|---|---:|---:|" + "---:|" * len(names)
    for law, num_runs, num_tasks in itertools.product(LAWS, NUM_RUNS, NUM_TASKS):
        if law == "unequal variances" and num_tasks == 1:
            continue
        shares = coverage_of_means(LAWS[law], num_runs, num_tasks, num_draws)
        cells = [f"{100 * shares[name]:.1f}" if name in shares else "" for name in names]
        yield f"| {law} | {num_runs} | {num_tasks} | " + " | ".join(cells) + " |"
    yield ""
    yield "| true probability | seeds | tasks | here | plain |"
    yield "|---:|---:|---:|---:|---:|"
    for shift, num_runs, num_tasks in itertools.product(SHIFTS, NUM_RUNS, NUM_TASKS):
        found = coverage_of_improvement(shift, num_runs, num_tasks, num_draws)
        here, plain = (f"{100 * found[name]:.1f}" for name in ("here", "plain"))
        yield f"| {found['truth']:.3f} | {num_runs} | {num_tasks} | {here} | {plain} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=1000)
    for line in tables(parser.parse_args().draws):
        print(line, flush=True)


if __name__ == "__main__":
    main()
