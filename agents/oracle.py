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
        if not world.config.is_embedded:
            raise SettingError("the oracle reads the hidden labels of embedded tasks; this pool has none.")
        targets = TASKS[world.config.task].target_skills
        clean = np.array([row.fields["corruption"] == CLEAN for row in world.assets.pool])
        target = np.array([row.fields["skill"] in targets for row in world.assets.pool])
        return clean * (1.0 + target)
