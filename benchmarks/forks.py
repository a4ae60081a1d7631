"""Eight forks of one moment, stepped together, one by one, and probed: what each way of comparing actions costs.

    python benchmarks/forks.py --repeats 5

All sides try the same eight random batches from the same state. Where the gains that they find differ by more than
1e-5, nothing is reported and the status is 1. `probe` scores on a part of the dev rows, the same for all eight; its
scores on all rows are what is compared.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from measure import alternate, machine, require_equal, speedups, table, with_spread

from raise_env import RaiseSelectEnv
from raise_env.env import Snapshot
from raise_env.vector import RaiseSelectVectorEnv

NUM_FORKS = 8

#: Dev rows that probes of raise_fork are scored on.
NUM_PROBED = 32


def moment() -> RaiseSelectEnv:
    """Return the default environment a few steps into an episode."""
    env = RaiseSelectEnv(device="cpu")
    env.reset(seed=0)
    for batch in batches(env, 3, seed=1):
        env.step(batch)
    return env


def batches(env: RaiseSelectEnv, count: int, seed: int) -> np.ndarray:
    """Return random batches, shape (count, num_candidates), int8."""
    size = env.config.num_candidates
    choices = np.tile(np.arange(size) < env.config.batch_size, (count, 1))
    return np.random.default_rng(seed).permuted(choices, axis=1).astype(np.int8)


def one_by_one(envs: Sequence[RaiseSelectEnv], start: Snapshot, actions: np.ndarray) -> np.ndarray:
    """Step environments of their own from one state, and return the rewards."""
    rewards = []
    for env, action in zip(envs, actions, strict=True):
        env.restore(start)
        rewards.append(env.step(action)[1])
    return np.array(rewards)


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch's threads, for every side")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    env = moment()
    start, actions = env.snapshot(), batches(env, NUM_FORKS, seed=2)
    separate = [RaiseSelectEnv(device="cpu") for _ in range(NUM_FORKS)]
    for other in separate:
        other.reset(seed=0)
    found: dict[str, np.ndarray] = {}
    now = env.dev_scores[-1]

    def side(name: str, gains: Callable[[], np.ndarray]) -> Callable[[], None]:
        def run() -> None:
            found[name] = gains()

        return run

    plain, stacked = "8 environments, one by one", "fork(8) stepped together"
    probed, sampled = "probe, all dev rows", f"probe, {NUM_PROBED} dev rows"
    sides = {
        plain: side(plain, lambda: one_by_one(separate, start, actions)),
        stacked: side(stacked, lambda: RaiseSelectVectorEnv.over(env.fork(NUM_FORKS)).step(actions)[1]),
        probed: side(probed, lambda: env.probe(actions) - now),
        sampled: side(sampled, lambda: env.probe(actions, NUM_PROBED)),
    }
    seconds = alternate(sides, arguments.repeats)
    for name in (stacked, probed):
        require_equal(f"gains of {name!r} and of {plain!r}", found[name], found[plain])
    ratios = speedups(seconds, plain)
    spread = found[plain].std()
    error = (found[sampled] - found[sampled].mean() - found[plain] + found[plain].mean()).std()
    rows = [
        {"side": name, "times as fast (IQR)": with_spread(ratios[name]), "ms": f"{1e3 * np.median(seconds[name]):,.0f}"}
        for name in sides
    ]
    print(f"One update and its dev score for {NUM_FORKS} batches from one state, {arguments.repeats} turns.\n")
    print(table(rows))
    print(
        f"\nOn {NUM_PROBED} dev rows the gains' differences are off by {error:.1e}; on all they spread by {spread:.1e}."
    )
    print(machine())


if __name__ == "__main__":
    main()
