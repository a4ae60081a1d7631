"""Many environments over one base model, in the form in which Stable-Baselines3 wants them.

SB3 resets an environment in the step that ends its episode; Gymnasium's vector environments, this project's included,
do so in the step after. Here the reset is asked for at once, so that no step goes by without anything being learned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from raise_env.vector import RaiseSelectVectorEnv

from .base import Progress

__all__ = ["ReportingVecEnv", "StackedVecEnv"]

#: Which of the environments, as SB3 says it: one, some, or None for all.
Indices = int | Iterable[int] | None


class StackedVecEnv(VecEnv):
    """A `RaiseSelectVectorEnv` as SB3's VecEnv: `PPO("MlpPolicy", StackedVecEnv(gym.make_vec("RaiseSelect-v0", 4)))`.

    It returns what SB3's DummyVecEnv over single environments would, but for the last bits of what the language model
    computes: where an episode ends, the next one's first observation, and the last one of the old in
    `infos[i]["terminal_observation"]`. For actions in another form, give it
    `RaiseSelectVectorEnv.over([TopKScores(env) for env in envs])`, or `PickOne`.

    Args:
        env: The environments.
    """

    def __init__(self, env: RaiseSelectVectorEnv) -> None:
        self.env = env
        self._actions: np.ndarray | None = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> np.ndarray:
        """Begin an episode in each environment, from the seeds given by `seed`; return the first observations."""
        observations, infos = self.env.reset(seed=list(self._seeds))
        self.reset_infos = [_info(infos, place) for place in range(self.num_envs)]
        # As in SB3, seeds are for one reset; options there are none.
        self._reset_seeds()
        self._reset_options()
        return np.asarray(observations)

    def step_async(self, actions: np.ndarray) -> None:
        """Take note of the actions, shape (num_envs, ...)."""
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Step all environments.

        Returns:
            Observations, shape (num_envs, N, 39); rewards, float32; dones, bool, each of shape (num_envs,); infos.
        """
        assert self._actions is not None, "step_async comes first"
        observations, rewards, terminated, truncated, stacked = self.env.step(self._actions)
        dones = terminated | truncated
        infos = [_info(stacked, place) for place in range(self.num_envs)]
        for place, info in enumerate(infos):
            info["TimeLimit.truncated"] = bool(truncated[place] and not terminated[place])
        if dones.any():
            last = observations
            observations, stacked = self.env.reset(options={"reset_mask": dones})
            for place in np.flatnonzero(dones).tolist():
                infos[place]["terminal_observation"] = last[place]
                self.reset_infos[place] = _info(stacked, place)
        return observations, rewards.astype(np.float32), dones, infos

    def close(self) -> None:
        """Let go of the learners."""
        self.env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Return the picture of each environment, None where it draws none."""
        pictures: list[Any] = [env.render() if self.render_mode == "rgb_array" else None for env in self.env.envs]
        return pictures

    def get_attr(self, attr_name: str, indices: Indices = None) -> list[Any]:
        """Return an attribute of environments, or of what is wrapped in them."""
        return [env.get_wrapper_attr(attr_name) for env in self._chosen(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Indices = None) -> None:
        """Set an attribute of environments."""
        for env in self._chosen(indices):
            env.set_wrapper_attr(attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Indices = None, **kwargs: Any) -> list[Any]:
        """Call a method of environments, such as `action_masks`, and return what each gave."""
        return [env.get_wrapper_attr(method_name)(*args, **kwargs) for env in self._chosen(indices)]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Indices = None
    ) -> list[bool]:
        """Return which environments have such a wrapper."""
        return [is_wrapped(env, wrapper_class) for env in self._chosen(indices)]

    def _chosen(self, indices: Indices) -> list[gym.Env[Any, Any]]:
        return [self.env.envs[place] for place in self._get_indices(indices)]


class ReportingVecEnv(VecEnvWrapper):
    """Tells number and return of each episode that ends.

    Args:
        venv: The environments.
        progress: Called after each episode with its number among all, from 1, and its return.
    """

    def __init__(self, venv: VecEnv, progress: Progress) -> None:
        super().__init__(venv)
        self._progress = progress
        self._num_episodes = 0
        self._returns = np.zeros(self.num_envs)

    def reset(self) -> Any:
        """Begin an episode in each environment."""
        self._returns[:] = 0.0
        return self.venv.reset()

    def step_wait(self) -> Any:
        """Step all environments, and report those that ended."""
        observations, rewards, dones, infos = self.venv.step_wait()
        self._returns += rewards
        for place in np.flatnonzero(dones):
            self._num_episodes += 1
            self._progress(self._num_episodes, float(self._returns[place]))
            self._returns[place] = 0.0
        return observations, rewards, dones, infos


def _info(stacked: dict[str, Any], place: int) -> dict[str, Any]:
    """Return one environment's info from those that a vector environment has stacked."""
    has = {name.removeprefix("_"): mask for name, mask in stacked.items() if name.startswith("_")}
    chosen = {name: stacked[name][place] for name, mask in has.items() if mask[place]}
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in chosen.items()}
