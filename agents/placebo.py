"""Agents that learn from rewards that are not their rows' own: what they gain, learning as such gains.

All else is as for the agent that they stand for: networks, fits, steps, rows seen, cost. One that beats random rows
shows that something other than the reward tells it which rows to take, or that the comparison is unfair.

`raise_fork` does not learn from rewards of steps but from the worth of rows, so it has a placebo of its own.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from raise_env import RaiseSelectEnv
from raise_env.env import Action, StepResult
from raise_env.errors import SettingError
from raise_env.wrappers import require_no_wrappers

from .base import Agent, Progress, world_of
from .credit import Group
from .raise_fork import RaiseFork

__all__ = ["OtherRewards", "Placebo", "PlaceboFork"]

#: Sets the draws of a placebo apart from all others of the same seed.
_PLACEBO = 1_804_289


class PlaceboFork(RaiseFork):
    """`raise_fork`, with the worth of the rows of each offer shuffled among them before the networks are fitted.

    Its selector is stored as one of `raise_fork`; `training` in its config.json says what it learned from.

    Args:
        settings: Any of `ForkSettings`, by name.

    Raises:
        SettingError: As for `RaiseFork`.
    """

    def _note_training(self, world: RaiseSelectEnv, seed: int) -> None:
        super()._note_training(world, seed)
        self.training["credits"] = "shuffled"

    def _look(
        self, world: RaiseSelectEnv, observation: np.ndarray, rng: np.random.Generator, *, is_due: bool
    ) -> tuple[np.ndarray, Group | None]:
        action, group = super()._look(world, observation, rng, is_due=is_due)
        if group is None:
            return action, None
        (own,) = rng.spawn(1)  # the candidates and batches that follow stay those of the agent itself
        return action, Group(group.rows, own.permutation(group.gains))


class OtherRewards(RaiseSelectEnv):
    """An environment that hands out, at each step, the reward of the same step of an earlier episode.

    So the rewards of each stage of training are as large as ever, and say nothing of the rows. In the first episode
    they are those of earlier steps, in the very first step 0. Scores, observations and history stay true.

    Args:
        world: The environment to be like.
        seed: What decides on the episode or step whose reward is handed out.
    """

    def __init__(self, world: RaiseSelectEnv, seed: int = 0) -> None:
        super().__init__(world.render_mode, world.assets, **world.config.to_kwargs())
        self._seed = seed
        self._draws = np.random.default_rng([seed, _PLACEBO])
        self._seen: list[list[float]] = []  # by step, one for each episode that came so far

    def step(self, action: Action) -> StepResult:
        """Train on the chosen candidates, and return another step's reward.

        Raises:
            RaiseEnvError: As for `RaiseSelectEnv.step`.
        """
        place = self.num_steps
        observation, reward, terminated, truncated, info = super().step(action)
        if place == len(self._seen):
            self._seen.append([])
        others = self._seen[place] or [own for step in self._seen[:place] for own in step]
        handed_out = float(self._draws.choice(others)) if others else 0.0
        self._seen[place].append(reward)
        return observation, handed_out, terminated, truncated, info

    def variant(self, **settings: Any) -> OtherRewards:
        """Return a new environment like this one but for some settings, with no memory of rewards yet.

        Raises:
            SettingError: As for the class.
        """
        return OtherRewards(super().variant(**settings), self._seed)


class Placebo:
    """An agent that learns through `env.step`, from the rewards of other steps; once it has learned it is that agent.

    Args:
        agent: The agent, which learns one environment at a time.

    Raises:
        SettingError: The agent does not learn, or in several environments at once.
    """

    def __init__(self, agent: Agent) -> None:
        name = type(agent).__name__
        if not hasattr(agent, "learn"):
            raise SettingError(f"a placebo learns from other rewards, and {name} does not learn: name one that does.")
        if getattr(agent, "num_envs", 1) > 1:
            raise SettingError(f"a placebo learns in one environment: leave num_envs of {name} at 1.")
        self._agent: Any = agent

    def learn(self, env: gym.Env[Any, Any], episodes: int, seed: int = 0, progress: Progress | None = None) -> Placebo:
        """Learn for so many episodes.

        Args:
            env: A RaiseSelect environment; it is left as it is.
            episodes: As the agent counts them.
            seed: As for the agent.
            progress: As for the agent; the returns that it is told are those of the other rewards.

        Raises:
            SettingError: The environment is in wrappers that would be left out.
            RaiseEnvError: As for the agent.
        """
        require_no_wrappers(env)
        self._agent.learn(OtherRewards(world_of(env), seed), episodes, seed=seed, progress=progress)
        return self

    @property
    def predict(self) -> Any:
        """The agent's own, which says by its signature what it wants to be told."""
        return self._agent.predict

    def __getattr__(self, name: str) -> Any:
        """Return what else the agent has, such as `begin`, `save` and `action_space`."""
        # The first is asked for by whoever copies this before it is built. The others would keep what the agent knows,
        # and not the rewards that the next ones are drawn from.
        if name in ("_agent", "save_progress", "load_progress"):
            raise AttributeError(name)
        return getattr(self._agent, name)
