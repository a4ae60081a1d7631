"""The policy that reads what is hidden: an upper mark for the embedded tasks, and not a method."""

from __future__ import annotations

import numpy as np

from raise_env import RaiseSelectEnv
from raise_env.errors import SettingError
from raise_env.tiny.task import CLEAN, TASKS

from .baselines import PoolScoreAgent

__all__ = ["OracleAgent"]


class OracleAgent(PoolScoreAgent):
    """Takes clean rows of the target skills at random, then clean rows of others, then the rest.

    Raises:
        SettingError: On `prepare`: the pool has no hidden labels.
    """

    def score_pool(self, world: RaiseSelectEnv, seed: int) -> np.ndarray:
        """Return 2 for clean rows of target skills, 1 for other clean rows, 0 for the rest."""
        del seed
        pool = world.assets.pool
        # A file's own columns of these names would be no labels of this task.
        if not world.config.is_embedded or not all({"skill", "corruption"} <= set(row.fields) for row in pool):
            raise SettingError(
                f"the oracle reads the hidden labels of embedded tasks; {pool.source} has none. Name another agent."
            )
        targets = TASKS[world.config.task].target_skills
        clean = np.array([row.fields["corruption"] == CLEAN for row in pool])
        target = np.array([row.fields["skill"] in targets for row in pool])
        return clean * (1.0 + target)
