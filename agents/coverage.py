"""Baselines that want rows unlike those already taken: k-centre and DEITA.

Both measure likeness by the observation's 32 semantic columns, standardised over the pool: an embedding by the
auxiliary model, where the papers use larger ones.
"""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

from raise_env import EnvConfig, RaiseSelectEnv
from raise_env.env import StepRecord
from raise_env.errors import SettingError
from raise_env.features import FEATURE_NAMES, NUM_SEMANTIC, StaticFeatures
from raise_env.pool import Pool

from .base import BatchAgent
from .baselines import PoolScoreAgent, column_values, require_all_features, times_taken

__all__ = ["DeitaAgent", "DiversityAgent"]

#: Place of the response's length among the columns that never change, which begin with the observation's third.
_RESPONSE_LENGTH = FEATURE_NAMES.index("response_length") - 2


class DiversityAgent(BatchAgent):
    """Takes the candidates farthest from everything trained on so far: k-centre greedy.

    Sener and Savarese 2018 (ICLR), algorithm 1, with Euclidean distance over the 32 semantic columns: each pick is the
    candidate whose nearest centre is farthest, and becomes a centre itself. Centres are the rows trained on in this
    episode; the first is drawn at random, as are ties. With the whole pool on offer, what was taken after any step is
    the algorithm's own choice of so many rows.

    Raises:
        SettingError: On `check`: features are lazy.
    """

    is_live: ClassVar[bool] = True

    def __init__(self, batch_size: int | None = None) -> None:
        super().__init__(batch_size)
        self._points = np.zeros((0, NUM_SEMANTIC))  # (pool, 32)
        self._distances = np.zeros(0)  # (pool,), squared, to the nearest row trained on
        self._seen: list[StepRecord] = []  # steps whose rows are among the centres

    def check(self, config: EnvConfig, pool: Pool, episodes: int) -> None:
        """Refuse features that are not there for all rows."""
        del pool, episodes
        require_all_features(config)

    def begin(self, env: gym.Env[Any, Any], seed: int) -> None:
        """Forget all centres."""
        super().begin(env, seed)
        self._points = _embeddings(self._require_begun().assets.features)
        self._forget_centres()

    def scores(self, observation: np.ndarray) -> np.ndarray:
        """Return 1 for the batch's rows, 0 for the others.

        Raises:
            RuntimeError: `begin` was not called.
        """
        world = self._require_begun()
        self._add_centres(world)
        mask, points = world.action_masks(), self._points[world.candidates]
        distances = np.where(mask, self._distances[world.candidates], -np.inf)
        scores = np.zeros(len(observation))
        for _ in range(min(self._num_wanted, int(mask.sum()))):
            pick = self._rng.choice(np.flatnonzero(distances == distances.max()))
            scores[pick] = 1.0
            distances = np.minimum(distances, _squared_distances(points, points[pick]))
            distances[pick] = -np.inf
        return scores

    def _add_centres(self, world: RaiseSelectEnv) -> None:
        # One pass over the pool for each row trained on since the last step, and none for those before.
        history = world.history
        if history[: len(self._seen)] != self._seen:  # some were undone: their rows are centres no longer
            self._forget_centres()
        for step in history[len(self._seen) :]:
            for row in step.selected:
                self._distances = np.minimum(self._distances, _squared_distances(self._points, self._points[row]))
        self._seen = history

    def _forget_centres(self) -> None:
        self._distances = np.full(len(self._points), np.inf)
        self._seen = []


class DeitaAgent(PoolScoreAgent):
    """Takes complex rows with good responses, unless one like them was taken: DEITA (Liu et al. 2024, ICLR, section 3).

    A row's score is complexity times quality. Going through the candidates by falling score, a row is passed over if
    the cosine between it and any row taken in this episode, or before it in this batch, is above the threshold (the
    paper's Repr Filter). If too few are left, the best of those passed over fill the batch. With the whole pool on
    offer the rows of an episode are DEITA's own choice, in random order.

    The paper's two scorers are language models trained on ChatGPT's rankings. Their scores, or any other, can be given
    as columns of the pool. Without them the auxiliary model stands in, a deviation from the paper: complexity is
    minus log p(y|x) of the whole response in nats, so that a long and surprising one counts; quality is the gain in
    its mean log-probability, nats per token, that the prompt brings. Each of the two enters as its rank in the pool,
    for a gain can be negative, and a product must rise with both.

    Args:
        complexity: Column of complexity scores, numbers of at least 0; None: by the auxiliary model.
        quality: Column of quality scores, likewise.
        threshold: The highest cosine between two rows that are both taken; the paper's 0.9.
        batch_size: Rows to take; None: what the environment is made for.

    Raises:
        SettingError: The threshold is no cosine; on `check`: features are lazy.
        DataError: On `check` and `prepare`: a row has no finite number of at least 0 in a column that was named.
    """

    def __init__(
        self,
        complexity: str | None = None,
        quality: str | None = None,
        threshold: float = 0.9,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(batch_size)
        if not isinstance(threshold, (int, float)) or not -1.0 <= threshold <= 1.0:
            raise SettingError(f"deita: threshold is {threshold!r}; expected a cosine, from -1 to 1.")
        self.complexity = complexity
        self.quality = quality
        self.threshold = threshold
        self._directions = np.zeros((0, NUM_SEMANTIC))  # (pool, 32), of length 1

    def check(self, config: EnvConfig, pool: Pool, episodes: int) -> None:
        """Refuse features that are not there for all rows, and a pool without the scores that were named."""
        del episodes
        require_all_features(config)
        for column in filter(None, (self.complexity, self.quality)):
            _scores_in(pool, column)

    def begin(self, env: gym.Env[Any, Any], seed: int) -> None:
        """Rank the pool's rows, once they are scored."""
        super().begin(env, seed)
        points = _embeddings(self._require_begun().assets.features)
        self._directions = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)

    def scores(self, observation: np.ndarray) -> np.ndarray:
        """Return the ranks of the candidates: below all others those trained on already, next those passed over.

        Raises:
            RuntimeError: `begin` was not called.
        """
        world = self._require_begun()
        by_score = super().scores(observation)
        return np.asarray(by_score + len(self._ranks) * self._unlike_others(world, by_score))

    def score_pool(self, world: RaiseSelectEnv, seed: int) -> np.ndarray:
        """Return complexity times quality."""
        del seed
        features = world.assets.features
        given, alone = features.log_p_response_given_prompt, features.log_p_response
        nats = -given * np.expm1(features.raw[:, _RESPONSE_LENGTH])
        return np.asarray(self._signal(world, self.complexity, nats) * self._signal(world, self.quality, given - alone))

    @staticmethod
    def _signal(world: RaiseSelectEnv, column: str | None, estimate: np.ndarray) -> np.ndarray:
        return _rank_shares(estimate) if column is None else _scores_in(world.assets.pool, column)

    def _unlike_others(self, world: RaiseSelectEnv, by_score: np.ndarray) -> np.ndarray:
        """Return which candidates pass the filter, no more than the budget could buy, shape (candidates,), bool."""
        candidates, taken = world.candidates, np.flatnonzero(times_taken(world))
        others = np.zeros((len(taken) + max(self._num_wanted, world.budget_left), NUM_SEMANTIC))
        others[: len(taken)] = self._directions[taken]
        num_others = len(taken)
        kept = np.zeros(len(candidates), dtype=bool)
        for place in np.argsort(-by_score, kind="stable"):
            direction = self._directions[candidates[place]]
            nearest = (others[:num_others] @ direction).max(initial=-1.0)
            if candidates[place] >= 0 and nearest <= self.threshold:
                others[num_others] = direction
                kept[place] = True
                num_others += 1
            if num_others == len(others):
                break
        return kept


def _scores_in(pool: Pool, column: str) -> np.ndarray:
    return column_values(pool, column, minimum=0.0)


def _embeddings(features: StaticFeatures) -> np.ndarray:
    return features.columns[:, -NUM_SEMANTIC:].astype(np.float64)


def _squared_distances(points: np.ndarray, centre: np.ndarray) -> np.ndarray:
    return np.asarray(((points - centre) ** 2).sum(axis=1))


def _rank_shares(values: np.ndarray) -> np.ndarray:
    """Return each value's rank from 1, equal ones alike, over the highest rank; shape (rows,).

    NaN counts as the highest value: only rows that are never offered have it.
    """
    places = np.unique(values, return_inverse=True)[1] + 1
    return np.asarray(places / places.max())
