"""The methods that RAISE is compared with: each scores the pool's rows once and takes the best on offer."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import gymnasium as gym
import numpy as np

from raise_env import RaiseSelectEnv

from .base import BatchAgent, world_of

__all__ = ["IfdAgent", "PoolScoreAgent", "RandomAgent"]


class RandomAgent(BatchAgent):
    """Takes rows at random: what every method has to beat."""

    def scores(self, observation: np.ndarray) -> np.ndarray:
        """Return random numbers, from the seed that `begin` gave.

        Raises:
            RuntimeError: `begin` was not called.
        """
        self._require_begun()
        return self._rng.random(len(observation))


class PoolScoreAgent(BatchAgent):
    """Base of baselines that score every pool row once, before training.

    Rows that were trained on in this episode come after all others, so that with the whole pool on offer the best
    rows are taken once each, as a method that selects before training would have it. Rows of equal score come in
    random order.
    """

    def __init__(self, batch_size: int | None = None) -> None:
        super().__init__(batch_size)
        self._scored: object = None  # the assets whose pool was scored
        self._pool_scores = np.zeros(0)  # (pool,)
        self._ranks = np.zeros(0, dtype=np.int64)  # (pool,)

    def prepare(self, env: gym.Env[Any, Any], seed: int) -> None:
        """Score the environment's pool: done once, however many episodes follow."""
        world = world_of(env)
        self._pool_scores = self.score_pool(world, seed)
        self._scored = world.assets

    def begin(self, env: gym.Env[Any, Any], seed: int) -> None:
        """Rank the pool's rows, once they are scored."""
        super().begin(env, seed)
        if self._scored is not self._require_begun().assets:
            self.prepare(env, seed)
        order = np.lexsort((self._rng.random(len(self._pool_scores)), self._pool_scores))
        self._ranks = np.argsort(order)

    def scores(self, observation: np.ndarray) -> np.ndarray:
        """Return the ranks of the candidates; those trained on already lie below all others.

        Raises:
            RuntimeError: `begin` was not called.
        """
        candidates = self._require_begun().candidates
        times_taken = np.rint(np.expm1(observation[:, -1]))
        return np.asarray(self._ranks[candidates] - len(self._ranks) * times_taken)

    @abstractmethod
    def score_pool(self, world: RaiseSelectEnv, seed: int) -> np.ndarray:
        """Return a score for each pool row, shape (pool,); higher is taken first. NaN is not allowed."""


class IfdAgent(PoolScoreAgent):
    """Takes the rows whose answer is least helped by its instruction: instruction-following difficulty.

    IFD(x, y) = exp(L(y|x)) / exp(L(y)), the ratio of the answer's perplexity with the instruction to the one without
    (Li et al. 2024, "From Quantity to Quality", NAACL, eq. 4). Rows above 1, where the instruction hinders,
    count as mismatched and come last, as in the paper. The perplexities are the auxiliary model's; the
    paper's is warmed up on a few rows likewise.
    """

    def score_pool(self, world: RaiseSelectEnv, seed: int) -> np.ndarray:
        """Return IFD; where it is above 1, minus its logarithm, which keeps the order and cannot overflow."""
        del seed
        features = world.assets.features
        gap = np.float64(features.log_p_response) - features.log_p_response_given_prompt
        gap = np.nan_to_num(gap)  # NaN: rows that are never offered, as nothing of their response fits
        return np.where(gap <= 0.0, np.exp(np.minimum(gap, 0.0)), -gap)
