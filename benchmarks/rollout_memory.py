"""What it takes to keep the rollouts of RAISE's algorithm 1 where the whole pool is on offer.

    python benchmarks/rollout_memory.py --num-rows 1000000

The paper names this memory as its limit, at 200,000 rows. Here nothing is trained: made-up static columns, random
choices, and the two places that keep rollouts, `raise_ppo`'s `Rollout` and `LeanRolloutBuffer` for Stable-Baselines3.
What is kept is held against what was shown, to the bit; where it differs nothing is reported and the status is 1.
"""

from __future__ import annotations

import argparse
import resource
import tracemalloc

import numpy as np
import torch
from gymnasium import spaces
from measure import machine, require_equal, table
from scipy import sparse

from raise_env.agents.class_law import BatchLaw
from raise_env.agents.networks import AcquisitionFunction, Critic
from raise_env.agents.raise_ppo import NUM_ROUNDS, Rollout
from raise_env.agents.sb3_buffer import LeanRolloutBuffer
from raise_env.features import NUM_FEATURES

#: Steps of a round, as in the paper; rows and classes of a batch, this project's defaults.
NUM_STEPS, BATCH_SIZE, NUM_CLASSES = 75, 8, 4

MEGABYTE = 2**20


class Episode:
    """A made-up episode: one observation that changes in place, as a million rows take 156 MB."""

    def __init__(self, columns: np.ndarray, rng: np.random.Generator) -> None:
        self.observation = np.zeros((len(columns), NUM_FEATURES), dtype=np.float32)
        self.observation[:, 2:-1] = columns
        self._rng = rng
        self._counts = np.zeros(len(columns), dtype=np.int32)

    def step(self, number: int) -> np.ndarray:
        """Show a step and return the places drawn in it."""
        drawn = self._rng.choice(len(self._counts), BATCH_SIZE, replace=False)
        self.observation[:, :2] = self._rng.random(), number / NUM_STEPS
        self.observation[:, -1] = np.log1p(self._counts)
        self._counts[drawn] += 1
        return drawn


def rollout_of(
    columns: np.ndarray, candidates: np.ndarray, classes: np.ndarray, rng: np.random.Generator
) -> tuple[Rollout, np.ndarray]:
    """Return a round in the form that raise_ppo keeps it, and its last observation."""
    episode = Episode(columns, rng)
    stages, counts, kinds = [], [], []
    for number in range(NUM_STEPS):
        drawn = episode.step(number)
        stages.append(episode.observation[0, :2].copy())
        counts.append(sparse.csr_array(episode.observation[None, :, -1]))
        chosen = np.zeros((1, len(columns)), dtype=np.int8)
        chosen[0, drawn] = 1
        kinds.append(sparse.csr_array(chosen))
    rollout = Rollout(
        candidates=[candidates] * NUM_STEPS,
        classes=classes,
        stage=np.stack(stages),
        times_selected=sparse.vstack(counts, format="csr"),
        kinds=sparse.vstack(kinds, format="csr"),
        rewards=np.zeros(NUM_STEPS, dtype=np.float32),
    )
    return rollout, episode.observation


def fill(buffer: LeanRolloutBuffer, columns: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Put a round into the buffer and return its last observation."""
    episode, one = Episode(columns, rng), torch.zeros(1)
    for number in range(NUM_STEPS):
        action = np.zeros((1, len(columns)), dtype=np.float32)
        action[0, episode.step(number)] = 1
        buffer.add(episode.observation[None], action, np.zeros(1), np.zeros(1), one, one)
    return episode.observation


def learn_from(rollout: Rollout, columns: np.ndarray) -> None:
    """Put one step of the whole pool through both networks, forward and backward."""
    rows = torch.from_numpy(rollout.observations(columns, slice(0, 1)))
    scores = AcquisitionFunction(NUM_FEATURES)(rows)
    law = BatchLaw(scores, rollout.classes, rollout.mask, BATCH_SIZE, NUM_CLASSES)
    drawn = law.sample(torch.Generator().manual_seed(0))
    (law.log_prob(drawn) + Critic(NUM_FEATURES)(rows, torch.from_numpy(rollout.mask))).sum().backward()


def traced() -> float:
    """Return what is allocated now, in MB; torch's tensors are not traced, and none is kept."""
    return tracemalloc.get_traced_memory()[0] / MEGABYTE


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-rows", type=int, default=1_000_000, help="N, rows of the pool")
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS, help="K, rounds to keep")
    arguments = parser.parse_args()
    num_rows, num_rounds = arguments.num_rows, arguments.rounds
    rng = np.random.default_rng(0)
    columns = rng.standard_normal((num_rows, NUM_FEATURES - 3), dtype=np.float32)
    candidates = np.arange(num_rows)
    classes = candidates % NUM_CLASSES

    learn_from(rollout_of(columns, candidates, classes, rng)[0], columns)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    tracemalloc.start()

    before = traced()
    rollouts, shown = [], np.zeros(0)
    for _ in range(num_rounds):
        rollout, shown = rollout_of(columns, candidates, classes, rng)
        rollouts.append(rollout)
        shown = shown[:, -1].copy()
    kept = traced() - before
    last = rollouts[-1].observations(columns, slice(NUM_STEPS - 1, NUM_STEPS))[0]
    require_equal("raise_ppo's last observation", last[:, -1], shown, 0.0)
    require_equal("raise_ppo's static columns", last[:, 2:-1], columns, 0.0)
    del last

    space = spaces.Box(-np.inf, np.inf, (num_rows, NUM_FEATURES), np.float32)
    before = traced()
    buffer = LeanRolloutBuffer(NUM_STEPS, space, spaces.MultiBinary(num_rows), device="cpu")
    whole = fill(buffer, columns, rng)
    of_buffer = traced() - before - whole.nbytes / MEGABYTE
    rebuilt = next(sample for sample in buffer.get(1) if sample.observations[0, 0, 1] == whole[0, 1]).observations[0]
    require_equal("SB3's last observation", rebuilt.numpy(), whole, 0.0)
    del rebuilt, whole, buffer, space
    tracemalloc.stop()

    dense = NUM_STEPS * num_rows * NUM_FEATURES * 4 / MEGABYTE
    static = columns.nbytes / MEGABYTE
    print(f"N = {num_rows:,} rows, T = {NUM_STEPS} steps of {BATCH_SIZE} rows, K = {num_rounds} rounds\n")
    rows = [
        {"kept": "raise_ppo, K rounds", "MB": f"{kept:,.1f}", "as observations, MB": f"{num_rounds * dense:,.0f}"},
        {"kept": "SB3 buffer, one round", "MB": f"{of_buffer:,.1f}", "as observations, MB": f"{dense:,.0f}"},
        {"kept": "static columns, once", "MB": f"{static:,.1f}", "as observations, MB": ""},
        {
            "kept": "whole process at the peak of a gradient step",
            "MB": f"{peak:,.0f}",
            "as observations, MB": "",
        },
    ]
    print(table(rows))
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
