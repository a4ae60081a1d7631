"""Running episodes: an agent, an environment, a record."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from raise_env import PickOne, TopKScores
from raise_env.errors import SettingError
from raise_env.record import EpisodeRecord

from .base import Agent, world_of

__all__ = ["fit_wrapper", "run_episode"]


def run_episode(
    env: gym.Env[Any, Any],
    agent: Agent,
    *,
    seed: int,
    name: str,
    deterministic: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> EpisodeRecord:
    """Run one episode and return its record.

    Args:
        env: A RaiseSelect environment; it is wrapped to fit the agent's actions where the agent says which.
        agent: Who acts.
        seed: What the environment is reset with, and the agent's own choices begin from.
        name: The agent's name in the record.
        deterministic: Passed to `predict`.
        on_step: Called after each step with its number, from 1.
    """
    env = fit_wrapper(env, agent)
    world = world_of(env)
    observation, info = env.reset(seed=seed)
    begin = getattr(agent, "begin", None)
    if begin is not None:
        begin(env, seed)
    is_masked = isinstance(env.action_space, spaces.Discrete) and _takes_masks(agent)
    state, start, over = None, np.ones(1, dtype=bool), False
    while not over:
        masks = {"action_masks": info["action_mask"]} if is_masked else {}
        action, state = agent.predict(
            observation, state=state, episode_start=start, deterministic=deterministic, **masks
        )
        observation, _, over, _, info = env.step(action)
        start = np.zeros(1, dtype=bool)
        if on_step is not None:
            on_step(world.num_steps)
    return EpisodeRecord.of(world, agent=name, seed=seed, info=info)


def fit_wrapper(env: gym.Env[Any, Any], agent: object) -> gym.Env[Any, Any]:
    """Return the environment with the wrapper that the agent's actions need.

    An agent with an `action_space`, as every Stable-Baselines3 model has, says by it which form it chooses.

    Args:
        env: The environment as `gym.make` returns it, or wrapped to fit already.
        agent: Anything with `predict`; without an `action_space` it acts in the environment as it is.

    Raises:
        SettingError: The agent's action space is none of MultiBinary, Box and Discrete.
    """
    space = getattr(agent, "action_space", None)
    if space is None or isinstance(env.action_space, type(space)):
        return env
    if isinstance(space, spaces.Box):
        return TopKScores(env)
    if isinstance(space, spaces.Discrete):
        return PickOne(env)
    raise SettingError(f"an agent that acts in {space} fits no wrapper: train it on MultiBinary, Box or Discrete.")


def _takes_masks(agent: Agent) -> bool:
    return "action_masks" in inspect.signature(agent.predict).parameters
