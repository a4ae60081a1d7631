"""The policy that reads what is hidden: an upper mark for the embedded tasks, and not a method."""

from __future__ import annotations

from collections import Counter

import numpy as np

from raise_env import EnvConfig, RaiseSelectEnv
from raise_env.errors import SettingError
from raise_env.pool import Pool
from raise_env.tiny.task import TASKS

from .base import best_rows
from .baselines import PoolScoreAgent, times_taken

__all__ = ["OracleAgent"]

#: What a row loses for each time that it was trained on, more than any row is worth; and, on `redundancy`, for each row
#: about the same fact, as much as a row can be worth.
REPEATED, SEEN = 10.0, 2.0


class OracleAgent(PoolScoreAgent):
    """Takes the rows that are worth most by their hidden labels, those of equal worth at random.

    On most tasks these are clean rows of the target skills, then clean rows of others, then the rest. Otherwise:

    - `redundancy`: rows about facts that were trained on least often so far, and of those the ones worth most.
    - `curriculum`: rows that bring the content until `recipes.SWITCH` of the episode is used up, then those that bring
      the form.
    - `thrift`: clean rows of the target skills alone: fewer than `batch_size` or none where there are no more.
    - `shift`: as on most, where the target skills are those of the test set; dev asks two of them more than the others.

    Args:
        batch_size: Rows to take; None: what the environment is made for.

    Raises:
        SettingError: On `check` and `prepare`: the pool has no hidden labels.
    """

    def __init__(self, batch_size: int | None = None) -> None:
        super().__init__(batch_size)  # the task alone says which rows are not worth taking: there is no `least`

    def check(self, config: EnvConfig, pool: Pool, episodes: int) -> None:
        """Refuse a pool without hidden labels."""
        del episodes
        _require_labels(config, pool)

    def score_pool(self, world: RaiseSelectEnv, seed: int) -> np.ndarray:
        """Return what each row is worth at the start."""
        del seed
        pool = world.assets.pool
        _require_labels(world.config, pool)
        return np.array([_worth(world, row, 0.0) for row in range(len(pool))])

    def scores(self, observation: np.ndarray) -> np.ndarray:
        """Return what each candidate is worth now; those trained on already lie below all others.

        Raises:
            RuntimeError: `begin` was not called.
        """
        del observation
        world = self._require_begun()
        candidates = world.candidates
        worths = np.array([_worth(world, int(row), world.progress) for row in candidates])
        if "fact" in world.assets.pool[0].fields:
            before = SEEN * _times_seen(world, worths)
        else:
            before = REPEATED * times_taken(world)[candidates]
        # A tenth is less than what sets two rows apart: luck decides between equal ones.
        scores = worths - before + self._ranks[candidates] / (10 * len(self._ranks))
        return np.where(worths > 0, scores, -np.inf) if TASKS[world.config.task].is_sparing else scores

    def _choose(self, scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return a 0/1 choice of the best rows; at once where later steps have other scores."""
        if TASKS[self._require_begun().config.task].is_live:
            return best_rows(scores, mask, self._num_wanted)
        return super()._choose(scores, mask)


def _require_labels(config: EnvConfig, pool: Pool) -> None:
    # A file's own columns of these names would be no labels of this task.
    if not config.is_embedded or not all({"skill", "corruption"} <= set(row.fields) for row in pool):
        raise SettingError(
            f"the oracle reads the hidden labels of embedded tasks; {pool.source} has none. Name another agent."
        )


def _worth(world: RaiseSelectEnv, row: int, progress: float) -> float:
    task = TASKS[world.config.task]
    return task.worth(world.assets.pool[row].fields, task.target_skills, progress)


def _times_seen(world: RaiseSelectEnv, worths: np.ndarray) -> np.ndarray:
    """Return how many rows about each candidate's fact were trained on, or are worth more here, shape (candidates,)."""
    facts = [world.assets.pool[int(row)].fields["fact"] for row in world.candidates]
    seen = Counter(world.assets.pool[int(row)].fields["fact"] for step in world.history for row in step.selected)
    times = np.zeros(len(worths))
    for place in np.argsort(-worths, kind="stable"):
        times[place] = seen[facts[place]]
        seen[facts[place]] += 1
    return times
