"""A reward of one's own: a function of an `Evaluation` that weighs dev rows by one of their columns.

`evaluation.rows` are the dev rows in the order of the numbers beside them, so that any column can tell what a row is
worth. Here a plural counts twenty times as much as anything else. From this folder, `raise-env train --out run --reward
custom_reward:plurals_first` learns a selector for it.

What one sees: how many of the rows that a greedy agent trains on ask for a plural, with the mean dev loss as reward and
with this one; it tries the same batches from the same candidates. `--fast` only shows that everything works.
"""

import sys

import numpy as np

from raise_env import Evaluation, RaiseSelectEnv
from raise_env.agents import run_episode
from raise_env.agents.online import GreedyAgent

WEIGHTS = {"plural": 20.0}


def plurals_first(evaluation: Evaluation) -> float:
    """Return minus the loss in nats per response token, each dev row weighed by its skill."""
    weights = np.array([WEIGHTS.get(row.fields["skill"], 1.0) for row in evaluation.rows])
    return -float(weights @ evaluation.row_losses / (weights @ evaluation.row_tokens))


if __name__ == "__main__":
    settings = {"horizon": 20, "batch_size": 2}
    if "--fast" in sys.argv:
        settings = {"horizon": 2, "num_dev": 16, "num_test": 8, "pool_size": 100, "auxiliary_updates": 2}
    for reward in ("loss", "custom_reward:plurals_first"):
        env = RaiseSelectEnv(**settings, reward=reward)
        record = run_episode(env, GreedyAgent(num_tries=32), seed=1, name="greedy")
        skills = [env.assets.pool[row].fields["skill"] for rows in record.actions for row in rows]
        print(f"reward {reward}: {skills.count('plural')} of {len(skills)} rows ask for a plural")
