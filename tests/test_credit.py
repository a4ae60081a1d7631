from __future__ import annotations

import numpy as np
import pytest
import torch

from raise_env.agents.credit import batch_group, row_group
from raise_env.testing import toy_env


def standardised(values):
    return (values - values.mean()) / values.std()


def test_batch_group__gains__are_the_standardised_scores_of_a_probe():
    env = toy_env()
    observation, _ = env.reset(seed=0)
    actions = np.zeros((3, 32), dtype=np.int8)
    for line, action in enumerate(actions):
        action[8 * line : 8 * line + 8] = 1
    group = batch_group(env, actions, num_dev=4)
    np.testing.assert_array_equal(group.rows, observation[:24].reshape(3, 8, 39))
    np.testing.assert_allclose(group.gains, standardised(env.probe(actions, 4)), rtol=1e-5)


def test_batch_group__a_batch_that_diverges__nothing_is_shown():
    env = toy_env(32, diverges_on=0)
    env.reset(seed=0)
    actions = np.eye(2, 32, dtype=np.int8)
    actions[1, np.flatnonzero(env.candidates == 0)] = 1
    actions[0, -1] = 1
    assert batch_group(env, actions, None) is None


def test_batch_group__all_alike__nothing_is_shown():
    env = toy_env()
    env.reset(seed=0)
    assert batch_group(env, np.ones((2, 32), dtype=np.int8), None) is None


def test_row_group__padding__is_left_out():
    env = toy_env(20, num_candidates=32)  # five rows a class where eight are offered
    observation, _ = env.reset(seed=0)
    group = row_group(env, 2, 4)
    np.testing.assert_array_equal(group.rows[:, 0], observation[env.action_masks()])
    assert group.gains.shape == (20,)


@pytest.mark.parametrize("num_updates", [0, 2])
def test_row_group__embedded_model__cosines_with_the_fork_as_worked_out_apart(embedded_env, num_updates):
    env = embedded_env()
    env.reset(seed=0)
    env.step(np.eye(1, 16, dtype=np.int8)[0])
    before = env.snapshot().learner_state
    group = row_group(env, num_updates, 4)
    assert env.snapshot().learner_state is before
    direction = torch.from_numpy(env.dev_direction(num_updates, 4))
    cosines = []
    for row in env.candidates:
        update = -torch.from_numpy(env.row_gradients(np.array([row]), adam=True))[0]
        cosines.append(torch.nn.functional.cosine_similarity(update, direction, dim=0).item())
    np.testing.assert_allclose(group.gains, standardised(np.array(cosines)), atol=1e-3)
