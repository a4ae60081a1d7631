"""Several environments over one base model: what `gym.make_vec("RaiseSelect-v0", num_envs=8)` returns.

Each environment has an adapter and an optimiser's memory of its own, and that is all: their updates go through the one
base model in one pass. Gymnasium's SyncVectorEnv does the rest (resets, seeds, calls) and defines what a step returns.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.vector import SyncVectorEnv
from gymnasium.vector.utils import iterate
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker

from .env import RaiseSelectEnv, StepResult, step_together
from .errors import ActionError, SettingError
from .wrappers import ActionForm, forgotten_by_errors

__all__ = ["RaiseSelectVectorEnv"]


if TYPE_CHECKING:
    _SyncVectorEnv = SyncVectorEnv[Any, Any]
else:  # Gymnasium 1.2's class takes no type arguments
    _SyncVectorEnv = SyncVectorEnv


class RaiseSelectVectorEnv(_SyncVectorEnv):
    """Environments that share everything but their adapters, and step together: updates go through in one pass.

    Where the base model can hold several adapters at once, as many updates of equal batch size go through together as
    `micro_batch_tokens` allows, and on a processor as gain by it; elsewhere one after the other. Sums are then made in
    another order than by a single environment: scores and rewards differ from its in their last digits, and over an
    episode of tiny updates in the fourth, while what is offered and selected is the same.
    Passes that do not go together, and dev scores, are made side by side in as many threads as torch may use.

    An environment whose episode has ended is reset in the step after, as Gymnasium's next-step autoreset
    defines it: that step's action is ignored and its reward is 0. `reset(options={"reset_mask": mask})` resets some at
    once.

    Args:
        num_envs: How many.
        settings: As for `RaiseSelectEnv`, the same for all.

    Raises:
        SettingError: As for `RaiseSelectEnv`.
    """

    _env_obs: list[Any]  # the last observation of each, where reset looks for those that it leaves alone

    def __init__(self, num_envs: int = 1, **settings: Any) -> None:
        super().__init__([functools.partial(RaiseSelectEnv, **settings)] * num_envs)

    @classmethod
    def over(cls, envs: Sequence[gym.Env[Any, Any]]) -> RaiseSelectVectorEnv:
        """Return environments that there are already as one that steps them together, such as `env.fork(8)`.

        They go on from where they are; `np.stack(vector.call("observation"))` shows where that is. What learns resets
        first: forks then begin alike, and are offered the same, unless that reset is given a seed. For learning take
        environments of their own, as `gym.make_vec` makes them.

        Args:
            envs: `RaiseSelectEnv`s, as they are or as `gym.make` returns them, all of them in `TopKScores` or in
                `PickOne` or in neither.

        Raises:
            SettingError: There are none, one is there twice, or one has a wrapper that could not see its steps.
        """
        worlds = [_world(env) for env in envs]
        if len({id(world) for world in worlds}) < max(1, len(worlds)):
            raise SettingError(
                f"a vector over {len(worlds)} environments, {len({id(w) for w in worlds})} of them different: "
                "each needs a state of its own; env.unwrapped.fork(n) or variant() gives more."
            )
        vector = cls.__new__(cls)
        _SyncVectorEnv.__init__(vector, [functools.partial(_itself, env) for env in envs])
        for place, world in enumerate(worlds):
            with contextlib.suppress(ResetNeeded):
                vector._env_obs[place] = world.observation()
        return vector

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step each environment, or reset it where its episode ended with the last step.

        Args:
            actions: The action of each, stacked, shape (num_envs, ...).

        Returns:
            Observations, rewards (float64), terminated, truncated, stacked, and infos as `SyncVectorEnv` stacks them.

        Raises:
            ActionError: As for `RaiseSelectEnv.step`, or there are more or fewer actions than environments; no
                environment has made an update then.
            ResetNeeded: As for `RaiseSelectEnv.step`.
            RewardError: As for `RaiseSelectEnv.step`.
        """
        rewards = np.zeros(self.num_envs)
        terminated, truncated = np.zeros((2, self.num_envs), dtype=bool)
        worlds = [_world(env) for env in self.envs]
        # By where they are now: some may have been put back to an earlier moment, or to an end. Where no episode has
        # begun, none has ended either.
        running = [place for place, world in enumerate(worlds) if not world.is_over or world.num_steps == 0]
        all_actions = self._one_each(actions)
        results = _steps([self.envs[place] for place in running], [all_actions[place] for place in running])
        answers = dict(zip(running, results, strict=True))
        infos: dict[str, Any] = {}
        for place, env in enumerate(self.envs):
            if place in answers:
                observation, rewards[place], terminated[place], truncated[place], info = answers[place]
            else:
                observation, info = env.reset()
            self._env_obs[place] = observation
            infos = self._add_info(infos, info, place)
        self._autoreset_envs = terminated | truncated
        return np.stack(self._env_obs), rewards, terminated, truncated, infos

    def _one_each(self, actions: Any) -> list[Any]:
        """Return the action of each environment."""
        try:
            found = list(iterate(self.action_space, actions))
        except TypeError as error:
            raise ActionError(f"{error}; expected {self.num_envs} actions, one for each environment.") from error
        if len(found) != self.num_envs:
            raise ActionError(
                f"there are {len(found)} actions for {self.num_envs} environments; expected one for each, also for "
                "those whose episode has ended."
            )
        return found


def _steps(envs: Sequence[gym.Env[Any, Any]], actions: Sequence[Any]) -> list[StepResult]:
    """Step environments together, through the wrappers of their actions."""
    with forgotten_by_errors(envs):
        choices = [env.choice(a) if isinstance(env, ActionForm) else a for env, a in zip(envs, actions, strict=True)]
        chosen = {place: choice for place, choice in enumerate(choices) if choice is not None}
        results = step_together([_world(envs[place]) for place in chosen], list(chosen.values()))
    answers = dict(zip(chosen, results, strict=True))
    return [
        env.answer(answers.get(place)) if isinstance(env, ActionForm) else answers[place]
        for place, env in enumerate(envs)
    ]


def _world(env: gym.Env[Any, Any]) -> RaiseSelectEnv:
    """Return the environment itself, if a step may go past what is around it.

    Raises:
        SettingError: There is a wrapper that would miss the step.
    """
    inner = env.env if isinstance(env, ActionForm) else env
    while isinstance(inner, OrderEnforcing | PassiveEnvChecker):  # those of gym.make, which only look on
        inner = inner.env
    if not isinstance(inner, RaiseSelectEnv):
        raise SettingError(
            f"{type(inner).__name__} cannot be stepped together with others: expected RaiseSelectEnv, alone or in "
            "TopKScores or PickOne; with other wrappers use gymnasium.vector.SyncVectorEnv."
        )
    return inner


def _itself(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    return env
