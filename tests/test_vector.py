from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from raise_env import TopKScores
from raise_env.testing import toy_env
from raise_env.vector import RaiseSelectVectorEnv


@pytest.mark.parametrize("mode", [None, "sync"])
def test_make_vec__bernoulli_actions__runs_through_autoreset(small_settings, mode):
    env = gym.make_vec("RaiseSelect-v0", num_envs=3, vectorization_mode=mode, **small_settings)
    assert isinstance(env, RaiseSelectVectorEnv if mode is None else SyncVectorEnv)
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    rng = np.random.default_rng(0)
    observations, infos = env.reset(seed=0)
    assert observations.shape == (3, 16, 39)
    ends, rewards = [], []
    for _ in range(5):
        observations, reward, terminated, truncated, infos = env.step(rng.binomial(1, 0.3, (3, 16)))
        assert observations in env.observation_space
        assert not truncated.any()
        ends.append(terminated.tolist())
        rewards.append(reward)
    # Three steps an episode; the fourth resets, ignores its action and earns nothing.
    assert ends == [[False] * 3, [False] * 3, [True] * 3, [False] * 3, [False] * 3]
    assert (rewards[3] == 0).all()
    assert (rewards[0] != 0).all()
    assert infos["candidates"].shape == (3, 16)
    env.close()


def test_make_vec__by_default__shares_one_base_between_adapters_of_their_own(small_settings):
    env = gym.make_vec("RaiseSelect-v0", num_envs=2, **small_settings)
    observations, _ = env.reset(seed=0)
    one, other = env.envs
    assert one.assets is other.assets
    assert one._learner.base is other._learner.base
    assert (observations[0] != observations[1]).any(), "each has a seed of its own"
    env.step(np.stack([np.ones(16), np.zeros(16)]))
    assert one._learner.state is not other._learner.state
    assert other.dev_scores[0] == other.dev_scores[1] != one.dev_scores[1]
    env.close()


def test_make_vec__same_seed__is_what_single_environments_do(small_settings):
    vector = gym.make_vec("RaiseSelect-v0", num_envs=2, **small_settings)
    single = gym.make("RaiseSelect-v0", **small_settings)
    observations, _ = vector.reset(seed=4)
    observation, _ = single.reset(seed=5)
    np.testing.assert_array_equal(observations[1], observation)
    action = np.tile([1, 0, 0, 0], 4)
    observations, rewards, *_ = vector.step(np.stack([action, action]))
    observation, reward, *_ = single.step(action)
    np.testing.assert_array_equal(observations[1], observation)
    assert rewards[1] == reward


def test_sync_vector_env__wrapped_environments__step_together():
    env = SyncVectorEnv([lambda: TopKScores(toy_env(horizon=2))] * 2)
    env.reset(seed=0)
    for _ in range(4):
        observations, *_ = env.step(env.action_space.sample())
    assert observations.shape == (2, 32, 39)
