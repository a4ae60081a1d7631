"""A rollout buffer for Stable-Baselines3 that keeps what changes, where the whole pool is on offer.

SB3's own keeps every observation: 156 bytes a row and step, 6 GB for 40 steps on a million rows. But 36 of the 39
columns are the same at every step, the two of the stage are the same in every row, and the last one, how often each
row was selected, is zero almost everywhere, as is a choice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from scipy import sparse
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.type_aliases import RolloutBufferSamples

__all__ = ["LeanRolloutBuffer"]

_STATIC = slice(2, -1)


class LeanRolloutBuffer(RolloutBuffer):
    """SB3's rollout buffer, equal to the bit, for environments with num_candidates="all".

    Observations, and actions where they are MultiBinary, are made again for each minibatch: what it takes then is
    SB3's own, so that a large pool wants a small `batch_size`.

    Args:
        args: As for `RolloutBuffer`.
        kwargs: As for `RolloutBuffer`.
    """

    observation_space: spaces.Box

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._static: np.ndarray | None = None  # (N, 36), the same for all environments and steps
        super().__init__(*args, **kwargs)

    def reset(self) -> None:
        """Forget the rollout."""
        self._stages = np.zeros((self.buffer_size, self.n_envs, 2), dtype=np.float32)
        # By step and environment, a row of N each, without its zeros.
        self._counts: list[list[sparse.csr_array]] = []
        self._choices: list[list[sparse.csr_array]] = []
        # SB3 shall make no room for what is kept here.
        self.obs_shape = (0,)
        if isinstance(self.action_space, spaces.MultiBinary):
            self.action_dim = 0
        super().reset()

    def add(
        self,
        obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        episode_start: np.ndarray,
        value: torch.Tensor,
        log_prob: torch.Tensor,
    ) -> None:
        """Keep a step of all environments; see `RolloutBuffer.add`.

        Raises:
            ValueError: Other rows are on offer than before, or in another environment: such steps cannot be kept here.
        """
        static = self._static_of(obs)
        self._stages[self.pos] = obs[:, static.any(axis=1).argmax(), :2]
        self._counts.append([sparse.csr_array(column[None]) for column in obs[:, :, -1]])
        if self.action_dim == 0:
            self._choices.append([sparse.csr_array(row[None].astype(self.action_space.dtype)) for row in action])
            action = action[:, :0]
        super().add(obs[:, :0, 0], action, reward, episode_start, value, log_prob)

    def _static_of(self, obs: np.ndarray) -> np.ndarray:
        if self._static is None:
            self._static = obs[0, :, _STATIC].copy()
        for rows in obs:
            if not np.array_equal(rows[:, _STATIC], self._static):
                raise ValueError(
                    "the candidates on offer have changed, and this buffer keeps them once: "
                    'set num_candidates="all", or use SB3\'s own RolloutBuffer.'
                )
        return self._static

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> RolloutBufferSamples:
        samples = super()._get_samples(batch_inds, env)
        # SB3 has put the environments one after the other, each with all its steps.
        places = [(int(index) % self.buffer_size, int(index) // self.buffer_size) for index in batch_inds]
        observations = self.to_torch(np.stack([self._observation(*place) for place in places]), copy=False)
        if self.action_dim:
            return samples._replace(observations=observations)
        choices = np.concatenate([self._choices[step][env].toarray() for step, env in places])
        return samples._replace(
            observations=observations, actions=self.to_torch(choices.astype(np.float32), copy=False)
        )

    def _observation(self, step: int, env: int) -> np.ndarray:
        assert self._static is not None
        observation = np.empty((len(self._static), self._static.shape[1] + 3), dtype=np.float32)
        observation[:, :2] = self._stages[step, env]
        observation[:, _STATIC] = self._static
        observation[:, -1] = self._counts[step][env].toarray()[0]
        observation[~self._static.any(axis=1)] = 0.0  # padding
        return observation
