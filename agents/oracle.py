"""The policy that reads what is hidden: an upper mark for the embedded tasks, and not a method."""

from __future__ import annotations

from collections import Counter

import numpy as np

from raise_env import RaiseSelectEnv
from raise_env.errors import SettingError
from raise_env.tiny.task import TASKS

from .baselines import PoolScoreAgent, times_taken

__all__ = ["OracleAgent"]

#: By what a row is worth less for each row about the same fact that was taken before it.
SEEN_FACT = 0.25


class OracleAgent(PoolScoreAgent):
    """Takes the rows that are worth most by their hidden labels, those of equal worth at random.

    On most tasks these are clean rows of the target skills, then clean rows of others, then the rest. Otherwise:

    - `redundancy`: of these, rows about facts that were not trained on yet; a row about one that was is worth a quarter.
    - `curriculum`: rows that bring the content until `recipes.SWITCH` of the episode is used up, then those that bring
      the form.
    - `thrift`: clean rows of the target skills alone: fewer than `batch_size` or none where there are no more.
    - `shift`: clean rows of the target skills about facts as hard as the test set's before easy ones.

    Raises:
        SettingError: On `prepare`: the pool has no hidden labels.
    """

    def score_pool(self, world: RaiseSelectEnv, seed: int) -> np.ndarray:
        """Return what each row is worth at the start."""
        del seed
        pool = world.assets.pool
        # A file's own columns of these names would be no labels of this task.
        if not world.config.is_embedded or not all({"skill", "corruption"} <= set(row.fields) for row in pool):
            raise SettingError(
                f"the oracle reads the hidden labels of embedded tasks; {pool.source} has none. Name another agent."
            )
        return np.array([_worth(world, row, 0.0) for row in range(len(pool))])

    def scores(self, observation: np.ndarray) -> np.ndarray:
        """Return what each candidate is worth now; those trained on already lie below all others.

        Raises:
            RuntimeError: `begin` was not called.
        """
        del observation
        world = self._require_begun()
        candidates = world.candidates
        worths = _fresh(world, np.array([_worth(world, row, world.progress) for row in candidates]))
        # More than any row is worth: what was trained on comes last.
        scores = worths - 10.0 * times_taken(world)[candidates] + self._ranks[candidates] / (10.0 * len(self._ranks))
        return np.where(worths > 0, scores, -np.inf) if TASKS[world.config.task].is_sparing else scores


def _worth(world: RaiseSelectEnv, row: int, progress: float) -> float:
    task = TASKS[world.config.task]
    return task.worth(world.assets.pool[row].fields, task.target_skills, progress)


def _fresh(world: RaiseSelectEnv, worths: np.ndarray) -> np.ndarray:
    """Return the candidates' worths, less where their fact was trained on before, or a better candidate is about it."""
    pool = world.assets.pool
    if "fact" not in pool[0].fields:
        return worths
    seen = Counter(pool[row].fields["fact"] for row in np.repeat(np.arange(len(pool)), times_taken(world)))
    worths = worths.copy()
    for place in np.argsort(-worths, kind="stable"):
        fact = pool[world.candidates[place]].fields["fact"]
        worths[place] *= SEEN_FACT ** seen[fact]
        seen[fact] += 1
    return worths
