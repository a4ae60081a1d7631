"""Many environments over one base model against the ways to step as many separate ones.

    python benchmarks/vector.py --repeats 5

All sides take the same random batches in eight environments from the same seeds; where the rewards of two sides differ
by more than 1e-5, nothing is reported and the status is 1. Sides take turns. What runs in this process has as many
threads of torch as there are cores; several processes have one each. Processes are forked when model, pool and features
are loaded, which is the best case for them: their start costs nothing, and they share what they only read. Memory is
what a side adds with its first step: PSS of this process and all below it.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded, here and in the processes that are started

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from measure import alternate, machine, memory_bytes, require_equal, speedups, table, with_spread
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from raise_env import RaiseSelectEnv

NUM_ENVS = 8

#: The default environment with half of its dev rows, so that all sides together take about a minute.
SETTINGS: dict[str, Any] = {"num_dev": 32, "device": "cpu"}

Step = Callable[[np.ndarray], np.ndarray]


class Shared(gym.Env[Any, Any]):
    """Some of the environments, one after the other, as one: what a process has to do where there are fewer."""

    def __init__(self, count: int) -> None:
        torch.set_num_threads(1)
        self.envs = [RaiseSelectEnv(**SETTINGS) for _ in range(count)]
        single = self.envs[0]
        shape = single.observation_space.shape
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (count, *shape), np.float32)
        self.action_space = gym.spaces.MultiBinary((count, shape[0]))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Reset all, from seeds that count up from the first's."""
        del options
        first = None if seed is None else seed * len(self.envs)
        observations = [
            env.reset(seed=None if first is None else first + place)[0] for place, env in enumerate(self.envs)
        ]
        return np.stack(observations), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Step all; the rewards are in the info."""
        results = [env.step(part) for env, part in zip(self.envs, action, strict=True)]
        rewards = np.array([result[1] for result in results])
        return np.stack([result[0] for result in results]), float(rewards.sum()), False, False, {"rewards": rewards}


def make_side(kind: str, num_processes: int) -> tuple[Step, Callable[[], None]]:
    """Return a function that takes actions, shape (8, N), and gives rewards, and one that closes; both reset to 0."""
    makers = [functools.partial(RaiseSelectEnv, **SETTINGS)] * NUM_ENVS
    if kind in ("make_vec", "SyncVectorEnv"):
        vector = gym.make_vec("RaiseSelect-v0", NUM_ENVS, **SETTINGS) if kind == "make_vec" else SyncVectorEnv(makers)
        vector.reset(seed=0)
        return lambda actions: vector.step(actions)[1], vector.close
    if kind == "DummyVecEnv":
        dummy = DummyVecEnv(makers)
        dummy.seed(0)
        dummy.reset()
        return lambda actions: dummy.step(actions)[1], dummy.close
    count = NUM_ENVS // num_processes
    parts = [functools.partial(Shared, count)] * num_processes
    shape = (num_processes, count, -1)
    if kind == "AsyncVectorEnv":
        others = AsyncVectorEnv(parts, context="fork")
        others.reset(seed=0)
        return lambda actions: others.step(actions.reshape(shape))[-1]["rewards"].ravel(), others.close
    processes = SubprocVecEnv(parts, start_method="fork")
    processes.seed(0)
    processes.reset()

    def step(actions: np.ndarray) -> np.ndarray:
        return np.concatenate([info["rewards"] for info in processes.step(actions.reshape(shape))[-1]])

    return step, processes.close


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side, a step of all environments each")
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4, 8], help="numbers of processes to try")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="rows of an update: small ones gain by going together"
    )
    arguments = parser.parse_args()
    SETTINGS["batch_size"] = arguments.batch_size
    torch.set_num_threads(1)
    counts: Sequence[int] = [count for count in arguments.processes if NUM_ENVS % count == 0]
    kinds = [("make_vec", 0), ("SyncVectorEnv", 0), ("DummyVecEnv", 0)]
    kinds += [(kind, count) for count in counts for kind in ("AsyncVectorEnv", "SubprocVecEnv")]

    warm = RaiseSelectEnv(**SETTINGS)
    warm.reset(seed=0)
    size, batch = warm.config.num_candidates, warm.config.batch_size
    choices = np.tile(np.arange(size) < batch, (arguments.repeats + 1, NUM_ENVS, 1))
    choices = np.random.default_rng(0).permuted(choices, axis=-1).astype(np.int8)
    warm.step(choices[0, 0])
    loaded = memory_bytes()

    steps: dict[str, Step] = {}
    closes, memory = [], {}
    rewards: dict[str, list[np.ndarray]] = {}

    def turn(name: str) -> None:
        torch.set_num_threads(1 if "process" in name else os.cpu_count() or 1)
        rewards[name].append(np.asarray(steps[name](choices[len(rewards[name])]), dtype=np.float64))
        torch.set_num_threads(1)  # before the next processes are forked

    for kind, count in kinds:
        name = kind if count == 0 else f"{kind}, {count} process{'es' if count > 1 else ''}"
        before = memory_bytes()
        steps[name], close = make_side(kind, count)
        closes.append(close)
        rewards[name] = []
        turn(name)
        memory[name] = memory_bytes() - before
    seconds = alternate({name: functools.partial(turn, name) for name in steps}, arguments.repeats, warmups=0)
    for close in closes:
        close()
    for name, found in rewards.items():
        require_equal(f"rewards of {name} and of make_vec", found, rewards["make_vec"])
    ratios = speedups(seconds, "SyncVectorEnv")
    rows = [
        {
            "side": name,
            "steps/s, of SyncVectorEnv's (IQR)": with_spread(ratios[name]),
            "steps/s": f"{NUM_ENVS / np.median(seconds[name]):.1f}",
            "memory it adds, MB": f"{memory[name] / 2**20:,.0f}",
        }
        for name in steps
    ]
    print(f"{NUM_ENVS} environments, {arguments.repeats} turns of a step of each. Before, this process holds")
    print(f"{loaded / 2**20:,.0f} MB: libraries, model, pool and features.\n")
    print(table(rows))
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
