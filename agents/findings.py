"""From the runs of an audit to audit.json, and from that to tables.

Nothing is run here. Losses are lower where they are better; a difference is the first minus the second.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from raise_env.record import EpisodeRecord

from .significance import PairedTest, holm, paired_test
from .statistics import CONFIDENCE, Interval, correlation, mean_interval
from .summary import RANDOM, markdown_table, number_or_none, reason_missing

__all__ = [
    "ADAPTER",
    "AUDIT_VERSION",
    "ORDER",
    "ROWS",
    "audit_tables",
    "draws_of",
    "findings_of",
    "length_of",
    "placebo_of",
    "shares_adapter",
]

AUDIT_VERSION = 1

#: Sources of noise, as they are named in the results.
ADAPTER = "first adapter"
ORDER = "order of the steps"
ROWS = "random rows"

#: A run of the audit: its line of results.jsonl, and its record where it did not fail.
Run = tuple[Mapping[str, Any], EpisodeRecord | None]


def draws_of(agent: str) -> str:
    """Return the name of the runs of an agent of which only the offered candidates differ."""
    return f"candidates offered to {agent}"


def shares_adapter(label: str) -> bool:
    """Return whether runs of noise of this name all begin from the adapter of seed 0, whatever their own seed is."""
    return label in (ORDER, ROWS) or label.startswith(draws_of(""))


def length_of(agent: str, episodes: int) -> str:
    """Return the name of an agent that learned for another number of episodes."""
    return f"{agent} after {episodes}"


def placebo_of(agent: str) -> str:
    """Return the name of an agent's placebo."""
    return f"placebo:{agent}"


def findings_of(
    runs: Sequence[Run],
    noise: Sequence[Run],
    probes: Sequence[Mapping[str, Any]],
    tasks: Sequence[str],
    agents: Sequence[str],
    learners: Mapping[str, Mapping[str, int]],
    num_seeds: int,
) -> dict[str, Any]:
    """Return what audit.json holds; docs/files.md says what its fields mean.

    Args:
        runs: Of the agents, of other lengths of learning and of placebos.
        noise: Runs that differ in one thing.
        probes: Lines of rewards.jsonl.
        tasks: Tasks to tell of; likewise `agents`.
        agents: Names in the results' field "agent".
        learners: For each agent that learns, its rows in the results with their numbers of episodes.
        num_seeds: Seeds of the runs.
    """
    metric = "test_loss" if any(line["test_loss"] is not None for line, _ in runs) else "dev_loss"
    labels = list(dict.fromkeys([*agents, *itertools.chain(*learners.values()), *map(placebo_of, learners)]))
    by_task = {task: _Task(task, runs, noise, probes, num_seeds, metric) for task in tasks}
    return {
        "schema_version": AUDIT_VERSION,
        "tasks": list(tasks),
        "agents": list(agents),
        "seeds": list(range(num_seeds)),
        "metric": metric,
        "noise": {name: task.noise(agents) for name, task in by_task.items()},
        "gap": {name: task.gaps(labels, learners) for name, task in by_task.items()},
        "rewards": {name: task.rewards(agents) for name, task in by_task.items()},
        "placebo": {name: task.placebos(learners) for name, task in by_task.items()},
        "missing": [
            {"task": line["task"], "agent": line["agent"], "seed": line["seed"], "reason": reason}
            for line, _ in [*runs, *noise]
            if (reason := reason_missing(line, metric)) is not None
        ],
    }


class _Task:
    """The runs of one task."""

    def __init__(
        self,
        name: str,
        runs: Sequence[Run],
        noise: Sequence[Run],
        probes: Sequence[Mapping[str, Any]],
        num_seeds: int,
        metric: str,
    ) -> None:
        self._runs = [run for run in runs if run[0]["task"] == name and run[0]["seed"] < num_seeds]
        self._noise = [run for run in noise if run[0]["task"] == name]
        self._probes = [line for line in probes if line["task"] == name]
        self._num_seeds = num_seeds
        self._metric = metric

    def noise(self, agents: Sequence[str]) -> dict[str, dict[str, float | int | None]]:
        """Return the spread of the loss by what alone differs, then that of agents' runs, in which all of it does."""
        sources = [ADAPTER, ORDER, ROWS, *map(draws_of, agents)]
        spreads = {
            source: [line[self._metric] for line, _ in self._noise if line["agent"] == source] for source in sources
        }
        spreads |= {f"all of it, {agent}": self._losses(agent, self._metric).tolist() for agent in agents}
        return {source: _spread(values, self._num_seeds) for source, values in spreads.items()}

    def gaps(self, labels: Sequence[str], learners: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, Any]]:
        """Return how much better each row of the results does on dev than on test."""
        if self._metric != "test_loss":
            return {}
        episodes = {label: count for rows in learners.values() for label, count in rows.items()}
        base = [line["base"]["test_loss"] - line["base"]["dev_loss"] for line in self._probes]
        first = float(np.mean(base)) if base else float("nan")
        gaps = {label: self._losses(label, "test_loss") - self._losses(label, "dev_loss") for label in labels}
        found = {}
        for label, values in gaps.items():
            beyond = paired_test(values, gaps[RANDOM])
            found[label] = {
                "episodes": episodes.get(label),
                "gap": _interval(mean_interval(values)),
                # What the dev set gained beyond the test set: the gap that there was before any step falls out.
                "gain_gap": _interval(mean_interval(values - first)),
                "against_random": None if label == RANDOM else _test(beyond),
            }
        return found

    def rewards(self, agents: Sequence[str]) -> dict[str, Any]:
        """Return what rewards tell: of the test score, of other states, of the other half of the dev set."""
        names = {**{agent: [agent] for agent in agents}, "all": list(agents)}
        return {
            "sum_and_test": {name: self._sum_and_test(members) for name, members in names.items()},
            "replayed": {name: self._replayed(members) for name, members in names.items()},
            "halves": {name: self._halves(name) for name in names},
        }

    def placebos(self, learners: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, Any]]:
        """Return agent against random, placebo against random and agent against placebo, p adjusted for all of them."""
        pairs = {
            (agent, name): pair
            for agent in learners
            for name, pair in {
                "agent_against_random": (agent, RANDOM),
                "placebo_against_random": (placebo_of(agent), RANDOM),
                "agent_against_placebo": (agent, placebo_of(agent)),
            }.items()
        }
        tests = {
            key: paired_test(self._losses(one, self._metric), self._losses(other, self._metric))
            for key, (one, other) in pairs.items()
        }
        adjusted = holm(np.array([test.p for test in tests.values()]))
        found: dict[str, dict[str, Any]] = {agent: {} for agent in learners}
        for ((agent, name), test), p in zip(tests.items(), adjusted, strict=True):
            found[agent][name] = {**_test(test), "p_adjusted": number_or_none(float(p))}
        return found

    def _losses(self, label: str, field: str) -> np.ndarray:
        """Return one number a seed, NaN where there is none."""
        values = np.full(self._num_seeds, np.nan)
        for line, _ in self._runs:
            if line["agent"] == label and line[field] is not None:
                values[line["seed"]] = line[field]
        return values

    def _sum_and_test(self, agents: Sequence[str]) -> dict[str, float | int | None]:
        """Return the correlation over runs between the sum of an episode's rewards and the test score after it."""
        labels = {*agents, *map(draws_of, agents)}
        records = [record for line, record in [*self._runs, *self._noise] if line["agent"] in labels]
        scored = [r for r in records if r is not None and r.test_score is not None]
        sums, tests = (np.array(v) for v in ([sum(r.rewards) for r in scored], [r.test_score for r in scored]))
        return {**_interval(correlation(sums, tests), "correlation"), "num_runs": len(scored)}

    def _replayed(self, agents: Sequence[str]) -> dict[str, Any]:
        """Return the rank correlation between the rewards that the same rows get in different runs at the same step."""
        rewards = [
            {
                state["step"]: [reward for agent in agents for reward in state["rewards"][agent]]
                for state in line["states"]
            }
            for line in self._probes
        ]
        steps = sorted(set().union(*rewards))  # a run that ended early has other steps than the rest
        ranks = np.full((len(steps), len(rewards), len(rewards)), np.nan)
        for place, step in enumerate(steps):
            there = [run for run, own in enumerate(rewards) if step in own]
            for one, other in itertools.combinations(there, 2):
                found = correlation(np.array(rewards[one][step]), np.array(rewards[other][step]), ranks=True).value
                ranks[place, one, other] = ranks[place, other, one] = found
        by_step = {str(step): mean for step, own in zip(steps, ranks, strict=True) if np.isfinite(mean := _mean(own))}
        pairs = np.array([[_mean(of_pair) for of_pair in row] for row in ranks.transpose(1, 2, 0)])
        return {**_interval(_over_pairs(pairs), "correlation"), "by_step": by_step}

    def _halves(self, name: str) -> dict[str, float | int | None]:
        """Return how far halves of the dev set agree, and what share of a reward's spread is the choice of dev rows."""
        found = [[state["halves"][name] for state in line["states"]] for line in self._probes]
        known = [[value for value in values if value is not None] for values in found]
        interval = _of_correlations(mean_interval(np.array([np.mean(values) for values in known if values])))
        # Spearman and Brown: what the whole set would agree on with another one of its size.
        whole = 2 * interval.value / (1 + interval.value) if interval.value > -1 else float("nan")
        return {**_interval(interval, "correlation"), "dev_share": number_or_none(1 - whole)}


def _spread(values: Sequence[float | None], num_seeds: int) -> dict[str, float | int | None]:
    """Return the standard deviation with its interval, and the differences that are above it.

    Two single runs differ by less than `single` in 95 of 100 cases where only this is between them, two means over
    `num_seeds` runs by less than `means`; Student's t makes up for a deviation that is itself estimated.
    """
    there = np.array([value for value in values if value is not None and np.isfinite(value)])
    count = {"num_runs": len(there), "num_missing": len(values) - len(there)}
    if len(there) < 2:
        return {**dict.fromkeys(("std", "low", "high", "single", "means")), **count}
    std, freedom = float(there.std(ddof=1)), len(there) - 1
    low, high = std * np.sqrt(freedom / stats.chi2.ppf([(1 + CONFIDENCE) / 2, (1 - CONFIDENCE) / 2], freedom))
    single = std * float(np.sqrt(2) * stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
    means = single / float(np.sqrt(num_seeds))
    return {"std": std, "low": float(low), "high": float(high), "single": single, "means": means, **count}


def _mean(values: np.ndarray) -> float:
    """Return the mean of what is finite, NaN of nothing."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _over_pairs(pairs: np.ndarray) -> Interval:
    """Return the mean correlation over pairs of runs, with its 95% interval over runs: pairs share them.

    It is the jackknife's. Leaving one of n runs out moves the mean of all pairs so far that its pseudo-value is as far
    from that mean as the mean of its own pairs is, times 2 (n - 1) / (n - 2).

    Args:
        pairs: Shape (num_runs, num_runs), symmetric; NaN where there is none.
    """
    of_runs = np.array([mean for row in pairs if np.isfinite(mean := _mean(row))])
    count, mean = len(of_runs), _mean(pairs)
    if count < 3:
        return Interval(mean, np.nan, np.nan)
    return _of_correlations(mean_interval(mean + 2 * (count - 1) / (count - 2) * (of_runs - of_runs.mean())))


def _of_correlations(interval: Interval) -> Interval:
    """Return a mean of correlations with ends that are correlations too: as long as they were on Fisher's scale."""
    if not interval.has_ends or abs(interval.value) == 1:
        return interval
    reach = interval.half_width / (1 - interval.value**2)  # the scale's slope
    low, high = np.tanh(np.arctanh(interval.value) + np.array([-reach, reach]))
    return Interval(interval.value, float(low), float(high), interval.num_missing)


def _interval(interval: Interval, name: str = "mean") -> dict[str, float | int | None]:
    value, low, high = map(number_or_none, (interval.value, interval.low, interval.high))
    return {name: value, "low": low, "high": high, "num_missing": interval.num_missing}


def _test(test: PairedTest) -> dict[str, float | int | None]:
    p, effect = number_or_none(test.p), number_or_none(test.effect_size)
    return {**_interval(test.difference), "p": p, "effect_size": effect, "num_pairs": test.num_pairs}


# Tables


def audit_tables(found: Mapping[str, Any]) -> str:
    """Return the findings as Markdown."""
    parts = []
    for task in found["tasks"]:
        parts += [
            f"## {task}",
            _noise_table(found["noise"][task], found["metric"].replace("_", " "), len(found["seeds"])),
            _gap_table(found["gap"][task]),
            _rewards_table(found["rewards"][task]),
            _placebo_table(found["placebo"][task], found["metric"].replace("_", " ")),
        ]
    for run in found["missing"]:
        parts.append(f"Missing: {run['task']}, {run['agent']}, seed {run['seed']}: {run['reason'].splitlines()[0]}")
    return "\n\n".join(part for part in parts if part)


def _noise_table(noise: Mapping[str, Mapping[str, Any]], metric: str, num_seeds: int) -> str:
    header = ["what differs", "runs", f"spread of the {metric}", "two runs", f"two means of {num_seeds}"]
    rows = [
        [
            source,
            str(spread["num_runs"]) + (" *" if spread["num_missing"] else ""),
            _with_ends(spread, "std", "{:.4f}"),
            _text(spread["single"], "{:.4f}"),
            _text(spread["means"], "{:.4f}"),
        ]
        for source, spread in noise.items()
    ]
    words = "Two runs, or means, that differ by less cannot be told from two of the same. *: runs are missing."
    return f"### Noise floor\n\n{markdown_table(header, rows)}\n\n{words}"


def _gap_table(gaps: Mapping[str, Mapping[str, Any]]) -> str:
    if not gaps:
        return ""
    header = ["agent", "episodes", "test - dev loss", "dev gain - test gain", "beyond random's", "p"]
    rows = [
        [
            label,
            _text(gap["episodes"], "{}"),
            _with_ends(gap["gap"], "mean", "{:.4f}") + (" *" if gap["gap"]["num_missing"] else ""),
            _with_ends(gap["gain_gap"], "mean", "{:+.4f}"),
            _with_ends(gap["against_random"], "mean", "{:+.4f}"),
            _text((gap["against_random"] or {}).get("p"), "{:.3f}"),
        ]
        for label, gap in gaps.items()
    ]
    return f"### From dev to test\n\n{markdown_table(header, rows)}"


def _rewards_table(rewards: Mapping[str, Any]) -> str:
    header = ["runs of", "runs", "sum of rewards and test score", "one step's reward, in another run"]
    header += ["by the other half of the dev set", "the choice of dev rows"]
    rows = [
        [
            name,
            str(own["num_runs"]),
            _with_ends(own, "correlation", "{:.2f}"),
            _with_ends(rewards["replayed"][name], "correlation", "{:.2f}"),
            _with_ends(rewards["halves"][name], "correlation", "{:.2f}"),
            _text(rewards["halves"][name]["dev_share"], "{:.0%}"),
        ]
        for name, own in rewards["sum_and_test"].items()
    ]
    words = (
        "Correlations over runs, then of ranks over batches tried from one state; at last what share of the spread "
        "among batches is the choice of dev rows."
    )
    return f"### Rewards\n\n{markdown_table(header, rows)}\n\n{words}"


def _placebo_table(placebos: Mapping[str, Mapping[str, Any]], metric: str) -> str:
    if not placebos:
        return ""
    header = ["agent", "compared", f"difference in {metric}", "p, adjusted", "effect size"]
    rows = [
        [
            agent,
            name.replace("_", " "),
            _with_ends(test, "mean", "{:+.4f}") + (" *" if test["num_missing"] else ""),
            _text(test["p_adjusted"], "{:.3f}"),
            _text(test["effect_size"], "{:+.1f}"),
        ]
        for agent, tests in placebos.items()
        for name, test in tests.items()
    ]
    return f"### Placebo\n\n{markdown_table(header, rows)}"


def _with_ends(interval: Mapping[str, Any] | None, name: str, form: str) -> str:
    if interval is None or interval[name] is None:
        return ""
    ends = [interval["low"], interval["high"]]
    return form.format(interval[name]) + ("" if None in ends else f" [{', '.join(map(form.format, ends))}]")


def _text(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
