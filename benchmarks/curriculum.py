"""Whether a static choice can win on the task `curriculum`: every mixture of its two kinds of rows, and every order.

    python benchmarks/curriculum.py --seeds 10 --out docs/tasks

A static choice is the same function of the row at every step. Rows of a kind are alike to training, so what it comes to
is the share of its batches that brings the content (target skills, wrapped answers); the rest brings the form (other
skills, bare answers). Mixtures of 0 to 8 rows of 8 are held against orders that switch once from the first kind to the
second. Writes curriculum.json and, beside it, curriculum.svg: ten seeds take about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from raise_env import RaiseSelectEnv
from raise_env.agents.statistics import mean_interval, paired_difference
from raise_env.tiny.recipes import STAGES

#: From the step, and the horizon, to how many rows of the batch bring the content.
Rule = Callable[[int, int], int]

BATCH_SIZE = 8

#: Rows of 8 that bring the content, in a static choice; and shares of the episode after which an order switches.
MIXTURES, SWITCHES = range(9), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


def mixture(num_content: int) -> Rule:
    """Return the static choice of so many rows for the content at every step."""
    return lambda _step, _horizon: num_content


def order(switch: float) -> Rule:
    """Return the choice of content alone before a share of the episode, and of form alone after it."""
    return lambda step, horizon: BATCH_SIZE if step < switch * horizon else 0


def final_loss(rule: Rule, seed: int, **settings: Any) -> float:
    """Return the test loss after an episode in which rows of each kind are taken at random from the whole pool."""
    plain = {"num_candidates": "all", "batch_size": BATCH_SIZE, **settings}
    env = RaiseSelectEnv(**{"task": "curriculum", "score_every": 1000, "seed_model": seed, **plain})
    env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    stages = np.array([env.assets.pool[int(row)].fields["stage"] for row in env.candidates])
    content, form = (np.flatnonzero(stages == stage) for stage in STAGES)
    for step in range(env.config.horizon):
        num_content = rule(step, env.config.horizon)
        action = np.zeros(len(stages), dtype=np.int8)
        action[rng.choice(content, num_content, replace=False)] = 1
        action[rng.choice(form, BATCH_SIZE - num_content, replace=False)] = 1
        env.step(action)
    return env.evaluate("test").loss


def losses(rules: Sequence[Rule], seeds: Sequence[int], **settings: Any) -> np.ndarray:
    """Return the final test losses, shape (rules, seeds)."""
    found = np.zeros((len(rules), len(seeds)))
    for column, seed in enumerate(seeds):  # all of one seed after each other: they share what is loaded
        found[:, column] = [final_loss(rule, seed, **settings) for rule in rules]
    return found


def summary(static: np.ndarray, dynamic: np.ndarray) -> dict[str, Any]:
    """Return the losses and the paired difference of the best static choice and the best order, each by its mean."""
    best_static, best_dynamic = static[static.mean(axis=1).argmin()], dynamic[dynamic.mean(axis=1).argmin()]
    gap = paired_difference(best_static, best_dynamic)
    return {
        "static": {f"{number}/{BATCH_SIZE}": row.tolist() for number, row in zip(MIXTURES, static, strict=True)},
        "dynamic": {str(switch): row.tolist() for switch, row in zip(SWITCHES, dynamic, strict=True)},
        "static - dynamic": {"mean": gap.value, "low": gap.low, "high": gap.high},
    }


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the figure: the test loss of every mixture and of every order, with 95% intervals."""
    plt.rcParams["svg.hashsalt"] = "curriculum"
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    labels = {"static": "share of content rows in every batch", "dynamic": "switch from content to form after"}
    for axis, (name, label) in zip(axes, labels.items(), strict=True):
        intervals = [mean_interval(np.array(values)) for values in found[name].values()]
        means = np.array([interval.value for interval in intervals])
        half = means - [interval.low for interval in intervals]
        axis.errorbar(range(len(means)), means, half, marker="o", capsize=3)
        axis.set_xticks(range(len(means)), list(found[name]))
        axis.set(xlabel=label, title=name)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test loss, nats a token")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Measure, write the numbers and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    arguments = parser.parse_args()
    seeds = range(arguments.seeds)
    static = losses([mixture(number) for number in MIXTURES], seeds)
    found = summary(static, losses([order(switch) for switch in SWITCHES], seeds))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "curriculum.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found, arguments.out / "curriculum.svg")
    print(found["static - dynamic"])


if __name__ == "__main__":
    main()
