"""What an agent is: anything with `predict`, in Stable-Baselines3's own form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np

from raise_env import EnvConfig, RaiseSelectEnv
from raise_env.errors import SettingError

__all__ = ["Agent", "BatchAgent", "LearningAgent", "Progress", "best_rows", "world_of"]

#: Called after each episode of learning with its number, from 1, and its return.
Progress = Callable[[int, float], None]


@runtime_checkable
class Agent(Protocol):
    """Chooses from an observation; a trained Stable-Baselines3 model is one.

    It may also have `begin(env, seed)`, called before each episode with the environment to act in and a seed for
    its own choices: that is how a baseline comes to see the pool.
    """

    def predict(
        self,
        observation: np.ndarray,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return an action for the observation, and a recurrent state where there is one."""


@runtime_checkable
class LearningAgent(Agent, Protocol):
    """An agent that learns from an environment."""

    def learn(
        self, env: gym.Env[Any, Any], episodes: int, seed: int = 0, progress: Progress | None = None
    ) -> LearningAgent:
        """Learn for so many episodes and return itself."""


#: Rows that are taken by an agent that was told neither a number nor its environment.
DEFAULT_BATCH_SIZE = EnvConfig().batch_size


class BatchAgent(ABC):
    """Base of agents that take the `batch_size` best rows by some score of their own, and none that scores -inf.

    Args:
        batch_size: Rows to take; None: what the environment is made for.

    Attributes:
        is_live: Whether each step's scores rest on the model as it then is, or on what was taken before. Such agents
            take their best at once even where the whole pool is on offer: later steps are for later scores.

    Raises:
        SettingError: `batch_size` is no number of rows.
    """

    is_live: ClassVar[bool] = False

    def __init__(self, batch_size: int | None = None) -> None:
        is_count = isinstance(batch_size, (int, np.integer)) and not isinstance(batch_size, bool) and batch_size >= 1
        if batch_size is not None and not is_count:
            raise SettingError(
                f"batch_size is {batch_size!r}; expected a whole number of at least 1, or None for the environment's."
            )
        self.batch_size = None if batch_size is None else int(batch_size)
        self._world: RaiseSelectEnv | None = None
        self._rng = np.random.default_rng(0)

    def begin(self, env: gym.Env[Any, Any], seed: int) -> None:
        """Take note of the environment to act in; `seed` decides the agent's own random choices."""
        self._world = world_of(env)
        self._rng = np.random.default_rng(seed)

    def predict(
        self,
        observation: np.ndarray,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return a 0/1 choice of the best rows, shape (rows,), int8, for any number of rows.

        Args:
            observation: Shape (rows, 39); rows of zeros are padding.
            state: Passed through.
            episode_start: Not used.
            deterministic: False adds the agent's exploration, where it has any.
        """
        scores = self.scores(observation)
        if not deterministic:
            scores = scores + self._exploration(len(scores))
        return self._choose(scores, np.asarray(observation.any(axis=1))), state

    @abstractmethod
    def scores(self, observation: np.ndarray) -> np.ndarray:
        """Return a score for each candidate, shape (rows,); higher is taken first, -inf never."""

    @property
    def _num_wanted(self) -> int:
        """Rows to take in a step."""
        return self.batch_size or (self._world.config.batch_size if self._world else DEFAULT_BATCH_SIZE)

    def _require_begun(self) -> RaiseSelectEnv:
        """Return the environment to act in, for agents that cannot do without it.

        Raises:
            RuntimeError: `begin` was not called.
        """
        if self._world is None:
            raise RuntimeError(f"{type(self).__name__} reads the pool: call begin(env, seed) before predict.")
        return self._world

    def _exploration(self, num_rows: int) -> np.ndarray:
        """Return what is added to the scores to explore, shape (rows,): nothing, unless a subclass learns."""
        return np.zeros(num_rows)

    def _choose(self, scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return a 0/1 choice of the best rows.

        Where the whole pool is on offer and the scores stay as they are, the rows that the rest of the budget would
        buy are taken in random order: from best to worst, batches would be as alike as they can be, and the first
        would hold nothing but extremes.
        """
        size = self._num_wanted
        if self._world is None or self._world.config.num_candidates != "all" or self.is_live:
            return best_rows(scores, mask, size)
        within_budget = best_rows(scores, mask, max(size, self._world.budget_left))
        return best_rows(self._rng.random(len(scores)), within_budget == 1, size)


def best_rows(scores: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
    """Return a 0/1 choice of the rows with the highest scores among those allowed, shape (rows,), int8.

    A score of -inf forbids a row: fewer than `size` rows are taken where no others are left.
    """
    mask = mask & (scores != -np.inf)
    order = np.argsort(-np.where(mask, scores, -np.inf), kind="stable")[: min(size, int(mask.sum()))]
    choice = np.zeros(len(scores), dtype=np.int8)
    choice[order] = 1
    return choice


def world_of(env: gym.Env[Any, Any]) -> RaiseSelectEnv:
    """Return the environment under its wrappers.

    Raises:
        TypeError: It is not a `RaiseSelectEnv`.
    """
    world = env.unwrapped
    if not isinstance(world, RaiseSelectEnv):
        raise TypeError(f"expected a RaiseSelect environment, got {type(world).__name__}.")
    return world
