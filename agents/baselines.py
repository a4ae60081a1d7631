"""The methods that RAISE is compared with: each scores the pool's rows once and takes the best on offer."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import gymnasium as gym
import numpy as np

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
    rows are taken once each, as a method that selects before training would have it.
    """

    def __init__(self, batch_size: int | None = None) -> None:
        super().__init__(batch_size)
        self._pool_scores: np.ndarray | None = None

    def begin(self, env: gym.Env[Any, Any], seed: int) -> None:
        """Score the environment's pool."""
        super().begin(env, seed)
        self._pool_scores = self.score_pool(env)

    def scores(self, observation: np.ndarray) -> np.ndarray:
        """Return the scores of the candidates; those trained on already lie below all others.

        Raises:
            RuntimeError: `begin` was not called.
        """
        candidates = self._require_begun().candidates
        assert self._pool_scores is not None
        scores = self._pool_scores[candidates]
        times_taken = np.rint(np.expm1(observation[:, -1]))
        return np.asarray(scores - (np.ptp(self._pool_scores) + 1.0) * times_taken)

    @abstractmethod
    def score_pool(self, env: gym.Env[Any, Any]) -> np.ndarray:
        """Return a score for each pool row, shape (pool,); higher is taken first."""


class IfdAgent(PoolScoreAgent):
    """Takes the rows whose answer is least helped by its instruction: instruction-following difficulty.

    IFD(x, y) = exp(L(y|x)) / exp(L(y)), the ratio of the answer's perplexity with the instruction to the one without
    (Li et al. 2024, "From Quantity to Quality", NAACL, eq. 4). Rows above 1, where the instruction hinders,
    count as mismatched and come last, as in the paper. The perplexities are the auxiliary model's; the
    paper's is warmed up on a few rows likewise.
    """

    def score_pool(self, env: gym.Env[Any, Any]) -> np.ndarray:
        """Return IFD; where it is above 1, minus its logarithm, which keeps the order and cannot overflow."""
        features = world_of(env).assets.features
        gap = np.float64(features.log_p_response) - features.log_p_response_given_prompt
        gap = np.nan_to_num(gap)  # NaN: rows that are never offered, as nothing of their response fits
        return np.where(gap <= 0.0, np.exp(np.minimum(gap, 0.0)), -gap)
