"""The base of agents."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

from raise_env import TopKScores
from raise_env.agents import RandomAgent
from raise_env.agents.base import best_rows, world_of
from raise_env.testing import toy_env


def test_best_rows__scores_and_mask__highest_allowed_ones():
    scores = np.array([0.1, 0.9, 0.8, 0.7])
    choice = best_rows(scores, np.array([True, False, True, True]), 2)
    np.testing.assert_array_equal(choice, [0, 0, 1, 1])
    assert choice.dtype == np.int8


def test_best_rows__equal_scores__earlier_first():
    np.testing.assert_array_equal(best_rows(np.zeros(4), np.ones(4, dtype=bool), 2), [1, 1, 0, 0])


def test_best_rows__fewer_rows_than_asked_for__all_of_them():
    np.testing.assert_array_equal(best_rows(np.zeros(3), np.array([True, False, True]), 8), [1, 0, 1])


def test_world_of__wrapped__the_environment_below():
    env = toy_env()
    assert world_of(TopKScores(env)) is env


def test_world_of__another_environment__says_what_was_expected():
    with pytest.raises(TypeError, match="RaiseSelect"):
        world_of(gym.make("CartPole-v1"))


def test_predict__before_begin__says_to_call_it():
    env = toy_env()
    observation, _ = env.reset(seed=0)
    with pytest.raises(RuntimeError, match="begin"):
        RandomAgent().predict(observation)


@pytest.mark.parametrize(("own_size", "expected"), [(None, 8), (3, 3)])
def test_predict__batch_size__the_environments_unless_given(own_size, expected):
    env = toy_env(batch_size=8)
    agent = RandomAgent(own_size)
    observation, _ = env.reset(seed=0)
    agent.begin(env, seed=0)
    assert agent.predict(observation)[0].sum() == expected
