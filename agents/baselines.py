"""What RAISE is compared with that never looks at the model in training: all rows, random ones, the best by a score."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from typing import Any

import gymnasium as gym
import numpy as np

from raise_env import EnvConfig, RaiseSelectEnv
from raise_env.errors import DataError, SettingError
from raise_env.pool import Pool

from .base import BatchAgent, world_of

__all__ = [
    "FullAgent",
    "IfdAgent",
    "PoolScoreAgent",
    "QualityAgent",
    "RandomAgent",
    "column_values",
    "require_all_features",
    "times_taken",
]


class RandomAgent(BatchAgent):
    """Takes rows at random: what every method has to beat."""

    def scores(self, observation: np.ndarray) -> np.ndarray:
        """Return random numbers, from the seed that `begin` gave.

        Raises:
            RuntimeError: `begin` was not called.
        """
        self._require_begun()
        return self._rng.random(len(observation))


class FullAgent(BatchAgent):
    """Trains on the whole pool for some epochs: the reference that selection is held against, and not a selector.

    Every epoch is a new random order in batches of `batch_size`, the last one smaller; each row is taken exactly once
    an epoch. Rows that are never offered, as nothing of their response fits, are left out. What it costs is its own:
    its runs have a longer horizon and a larger budget than those of the others, which `run_settings` gives.

    Args:
        epochs: Passes over the pool; RAISE compares with three (Lv et al. 2025, section 5).
        learning_rate: AdamW's at the start of its runs; None: as in the other runs, though what suits forty updates
            may be too much for thousands. A rate of its own means that features and model are made ready anew.
        batch_size: Rows of an update; None: what the environment is made for.

    Raises:
        SettingError: `epochs` is no number of epochs. On `begin`: the environment does not offer the whole pool, or not
            for so long.
    """

    def __init__(self, epochs: int = 3, learning_rate: float | None = None, batch_size: int | None = None) -> None:
        super().__init__(batch_size)
        if not isinstance(epochs, int) or epochs < 1:
            raise SettingError(f"full: epochs is {epochs!r}; expected a whole number of at least 1.")
        self.epochs = epochs
        self.learning_rate = learning_rate
        self._batches: list[np.ndarray] = []

    def run_settings(self, config: EnvConfig, num_rows: int) -> dict[str, Any]:
        """Return the environment's keywords that a run of this agent needs; the dev set is scored at its end alone.

        Args:
            config: The settings of the other agents' runs.
            num_rows: Rows of the pool that can be offered.
        """
        horizon = self.epochs * math.ceil(num_rows / (self.batch_size or config.batch_size))
        budget = self.epochs * num_rows
        settings = {"num_candidates": "all", "horizon": horizon, "budget": budget, "score_every": horizon}
        return settings if self.learning_rate is None else {**settings, "learning_rate": self.learning_rate}

    def begin(self, env: gym.Env[Any, Any], seed: int) -> None:
        """Put the pool into the batches of all epochs."""
        super().begin(env, seed)
        world = self._require_begun()
        offered = np.concatenate(world.assets.members)
        orders = [self._rng.permutation(offered) for _ in range(self.epochs)]
        size = self._num_wanted
        self._batches = [order[start : start + size] for order in orders for start in range(0, len(order), size)]
        self._check_room(world.config, len(offered))

    def scores(self, observation: np.ndarray) -> np.ndarray:
        """Return 1 for the rows of this step's batch, 0 for the others; all 0 once every epoch is over.

        Raises:
            RuntimeError: `begin` was not called.
        """
        del observation
        world = self._require_begun()
        step = world.num_steps
        batch = self._batches[step] if step < len(self._batches) else np.zeros(0, dtype=np.int64)
        return np.isin(world.candidates, batch).astype(np.float64)

    def _choose(self, scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
        # No filling up: the last batch of an epoch is what is left of it.
        return (mask & (scores > 0)).astype(np.int8)

    def _check_room(self, config: EnvConfig, num_rows: int) -> None:
        horizon, budget = len(self._batches), self.epochs * num_rows
        if config.num_candidates == "all" and config.horizon >= horizon and config.total_budget >= budget:
            return
        raise SettingError(
            f"full trains on all {num_rows} rows in {self.epochs} epochs: it needs num_candidates='all', "
            f"horizon={horizon} and budget={budget}; found num_candidates={config.num_candidates!r}, "
            f"horizon={config.horizon} and budget={config.total_budget}. FullAgent.run_settings gives these settings."
        )


class PoolScoreAgent(BatchAgent):
    """Base of baselines that score every pool row once, before training.

    Rows that were trained on in this episode come after all others, so that with the whole pool on offer the best
    rows are taken once each, as a method that selects before training would have it. Rows of equal score come in
    random order.

    Args:
        batch_size: Rows to take; None: what the environment is made for.
        least: Rows that score below it are never taken, so that a step may take fewer rows, or none; None: all may be.

    Raises:
        SettingError: `least` is no finite number.
    """

    def __init__(self, batch_size: int | None = None, least: float | None = None) -> None:
        super().__init__(batch_size)
        if least is not None and (not isinstance(least, (int, float)) or not math.isfinite(least)):
            raise SettingError(f"least is {least!r}; expected a finite score that a row must have to be taken.")
        self.least = least
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
        del observation
        world = self._require_begun()
        scores = self._ranks - len(self._ranks) * times_taken(world)
        if self.least is not None:
            scores = np.where(self._pool_scores >= self.least, scores, -np.inf)
        return np.asarray(scores[world.candidates])

    @abstractmethod
    def score_pool(self, world: RaiseSelectEnv, seed: int) -> np.ndarray:
        """Return a score for each pool row, shape (pool,); higher is taken first. NaN is not allowed."""


class IfdAgent(PoolScoreAgent):
    """Takes the rows whose answer is least helped by its instruction: instruction-following difficulty.

    IFD(x, y) = L(y|x) / L(y), the ratio of the answer's mean loss with the instruction to the one without (Li et al.
    2024, "From Quantity to Quality", NAACL, eq. 4). Rows above 1, where the instruction hinders, are mismatched:
    the paper drops them, here they come last, the least hindered first. The losses are the auxiliary model's, warmed
    up on a few random rows; the paper warms its model up on a few rows of each cluster.

    Raises:
        SettingError: On `check`: features are lazy.
    """

    def check(self, config: EnvConfig, pool: Pool, episodes: int) -> None:
        """Refuse features that are not there for all rows."""
        del pool, episodes
        require_all_features(config)

    def score_pool(self, world: RaiseSelectEnv, seed: int) -> np.ndarray:
        """Return IFD, or minus IFD where it is above 1."""
        del seed
        features = world.assets.features
        loss = -np.float64(features.log_p_response)
        # NaN: rows that are never offered, as nothing of their response fits.
        ifd = np.nan_to_num(-np.float64(features.log_p_response_given_prompt) / np.maximum(loss, 1e-6))
        return np.asarray(np.where(ifd <= 1.0, ifd, -ifd))


class QualityAgent(PoolScoreAgent):
    """Takes rows that a strong language model has rated highly: AlpaGasus (Chen et al. 2024, ICLR).

    The paper keeps the rows rated at least 4.5 of 5 and trains on all of them. So rows at or above the threshold count
    alike here and come in random order; where the offer holds too few of them, the next best rated follow.

    Args:
        column: The pool's column that holds the ratings, such as "rating" of the embedded task.
        threshold: The least rating of a good row, in the column's own scale.
        batch_size: Rows to take; None: what the environment is made for.
        least: The least rating of a row that is taken at all; the paper's rule is the threshold itself.

    Raises:
        SettingError: No column was named, or the threshold is no finite number.
        DataError: On `check` and `prepare`: a row of the pool has no finite number in that column.
    """

    def __init__(
        self,
        column: str | None = None,
        threshold: float = 4.5,
        batch_size: int | None = None,
        least: float | None = None,
    ) -> None:
        super().__init__(batch_size, least)
        if not column:
            raise SettingError("quality reads ratings from a column of the pool: name it, quality:COLUMN.")
        if not isinstance(threshold, (int, float)) or not math.isfinite(threshold):
            raise SettingError(f"quality: threshold is {threshold!r}; expected a finite number.")
        self.column = column
        self.threshold = threshold

    def check(self, config: EnvConfig, pool: Pool, episodes: int) -> None:
        """Refuse a pool without ratings."""
        del config, episodes
        column_values(pool, self.column)

    def score_pool(self, world: RaiseSelectEnv, seed: int) -> np.ndarray:
        """Return the ratings, cut off at the threshold; at `least` where that is higher, or no row would reach it."""
        del seed
        ceiling = self.threshold if self.least is None else max(self.threshold, self.least)
        return np.asarray(np.minimum(column_values(world.assets.pool, self.column), ceiling))


def require_all_features(config: EnvConfig) -> None:
    """Refuse settings under which features are known of those rows alone that are offered.

    Raises:
        SettingError: They are such.
    """
    if config.lazy_features:
        raise SettingError(
            "it looks at all rows of the pool, and lazy_features computes the features of those alone that are "
            "offered. Leave lazy_features out, or take another agent."
        )


def times_taken(world: RaiseSelectEnv) -> np.ndarray:
    """Return how often each pool row was trained on in this episode, shape (pool,), int64."""
    taken = [step.selected for step in world.history]
    rows = np.concatenate(taken) if taken else np.zeros(0, dtype=np.int64)
    return np.bincount(rows, minlength=len(world.assets.pool))


def column_values(pool: Pool, column: str, *, minimum: float = -math.inf) -> np.ndarray:
    """Return the numbers in a column of the pool, shape (pool,), float64; text that spells a number is one.

    Args:
        pool: The rows.
        column: The column's name.
        minimum: The least value that is allowed.

    Raises:
        DataError: A row lacks the column, or has something else in it than a finite number of at least `minimum`.
    """
    values = np.zeros(len(pool))
    bound = "" if minimum == -math.inf else f" of at least {minimum:g}"
    for index, row in enumerate(pool):
        where = f"{pool.source}, {pool.place(index)}"
        if column not in row.fields:
            columns = ", ".join(repr(name) for name in row.fields) or "none"
            raise DataError(
                f"{where}: found no field {column!r} among {columns}; expected a finite number{bound} in it. "
                "Name a column that every row of the pool has."
            )
        number = _number(row.fields[column])
        if number is None or number < minimum:
            raise DataError(
                f"{where}, field {column!r}: found {_shown(row.fields[column])}; expected a finite number{bound}. "
                f"Mend or remove such rows, or name another of the columns {', '.join(map(repr, row.fields))}."
            )
        values[index] = number
    return values


def _number(value: object) -> float | None:
    """Return a finite number, or None for what is none; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:60]}..."
