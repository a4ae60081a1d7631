"""Running episodes: an agent, an environment, a record, and whose fault it is when something fails."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from raise_env import PickOne, TopKScores
from raise_env.errors import (
    ActionError,
    AgentError,
    MemoryShortageError,
    RaiseEnvError,
    SettingError,
    failing_lines,
    lacks_memory,
)
from raise_env.record import EpisodeRecord
from raise_env.wrappers import require_no_form

from .base import Agent, world_of

#: What is said where an agent needs more memory than there is.
_TOO_LARGE = (
    "there is too little memory ({error}). Take smaller networks, a smaller buffer_size or batch_size of the agent, or "
    "offer fewer rows (num_candidates)."
)

__all__ = ["agents_code", "fit_wrapper", "run_episode"]


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

    Raises:
        AgentError: The agent's own code failed, or it returned something that is no action here.
        SettingError: The environment's wrappers do not fit the agent, or one cut the episode short.
        RaiseEnvError: The environment's own errors, as they are.
    """
    env = fit_wrapper(env, agent)
    world = world_of(env)
    observation, info = env.reset(seed=seed)
    begin = getattr(agent, "begin", None)
    if begin is not None:
        with agents_code(f"agent {name!r}, episode seed {seed}, begin"):
            begin(env, seed)
    is_masked = isinstance(env.action_space, spaces.Discrete) and _takes_masks(agent)
    state, start, over = None, np.ones(1, dtype=bool), False
    while not over:
        where = f"agent {name!r}, episode seed {seed}, step {world.num_steps + 1}"
        masks = {"action_masks": info["action_mask"]} if is_masked else {}
        with agents_code(where):
            answer = agent.predict(observation, state=state, episode_start=start, deterministic=deterministic, **masks)
        action, state = _checked(answer, env.action_space, where)
        try:
            observation, _, over, truncated, info = env.step(action)
        except ActionError as error:
            raise AgentError(f"{where}: predict returned {_shown(action)}: {error}") from error
        if truncated and not over:
            raise SettingError(
                f"{where}: a wrapper such as TimeLimit (max_episode_steps) cut the episode short, and a record of a "
                "part could not be replayed: set horizon instead, which the learning rate follows."
            )
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
        SettingError: The agent's action space is none of MultiBinary, Box and Discrete, or the environment is wrapped
            to fit another one.
    """
    space = getattr(agent, "action_space", None)
    if space is None or isinstance(env.action_space, type(space)):
        return env
    require_no_form(env, f"the agent acts in {space}")
    if isinstance(space, spaces.Box):
        return TopKScores(env)
    if isinstance(space, spaces.Discrete):
        return PickOne(env)
    raise SettingError(f"an agent that acts in {space} fits no wrapper: train it on MultiBinary, Box or Discrete.")


@contextmanager
def agents_code(where: str) -> Iterator[None]:
    """Run an agent's own code in this block: what it raises becomes an `AgentError` that shows the lines that failed.

    Who wrote the agent can mend it, and needs the lines; who wrote the environment would only be in the way.

    Args:
        where: What was being done, for the beginning of the message.

    Raises:
        AgentError: The code raised something; it is the cause.
        MemoryShortageError: There is too little memory for what the agent keeps.
        RaiseEnvError: The environment's own errors pass through, but for an action that an agent tried in vain.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, RaiseEnvError) and not isinstance(error, ActionError):
            raise
        if lacks_memory(error):
            raise MemoryShortageError(f"{where}: {_TOO_LARGE.format(error=error)}") from error
        lines = failing_lines(error, 2)  # ours: agents_code, and the block
        raise AgentError(f"{where}: the agent's own code failed.\n{lines}") from error


def _checked(answer: Any, space: spaces.Space[Any], where: str) -> tuple[Any, Any]:
    """Return action and state, if they can be told apart and the action is made of numbers.

    Shapes and values are the environment's to check.

    Raises:
        AgentError: They cannot, or it is not.
    """
    try:
        action, state = answer
        numbers = np.asarray(action)
    except (TypeError, ValueError, RuntimeError) as error:  # a RuntimeError is torch's, on a tensor with gradients
        raise AgentError(
            f"{where}: predict returned {_shown(answer)}; expected a pair of a NumPy array and a state: {error}."
        ) from error
    is_pick = isinstance(space, spaces.Discrete)
    if numbers.dtype.kind not in ("iu" if is_pick else "biuf") or (is_pick and numbers.ndim):
        expected = "one whole number, the place of a candidate" if is_pick else "a number for each candidate"
        raise AgentError(f"{where}: predict returned {_shown(action)} for the action; expected {expected}.")
    return action, state


def _shown(value: object) -> str:
    """Return a short description of what an agent returned."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}, {np.array2string(value, threshold=8, edgeitems=3)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def _takes_masks(agent: Agent) -> bool:
    return "action_masks" in inspect.signature(agent.predict).parameters
