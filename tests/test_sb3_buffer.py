"""The lean rollout buffer gives back what SB3's own would, and keeps what changes alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.buffers import RolloutBuffer

from raise_env.agents import Sb3Agent, sb3
from raise_env.agents.sb3_buffer import LeanRolloutBuffer
from raise_env.testing import toy_env


def learned(settings: Any, algorithm: str = "PPO", **arguments: Any) -> Any:
    # A pool that does not divide by the classes, so that there is padding.
    env = toy_env(42, num_candidates="all", horizon=5, **settings)
    return Sb3Agent(algorithm, **arguments).learn(env, 8, seed=1).model


@pytest.mark.parametrize(
    ("algorithm", "arguments", "settings"),
    [
        ("PPO", {}, {}),
        ("PPO", {"n_steps": 10, "batch_size": 4, "num_envs": 2}, {"hide": ["semantic"]}),
        ("PPO", {"action_form": "scores"}, {}),
        ("PPO", {"action_form": "pick"}, {"batch_size": 4}),
        ("PPO", {"policy": "MlpPolicy", "action_form": "multibinary"}, {}),
        ("A2C", {"num_envs": 2}, {"hide": ["availability", "stage"]}),
    ],
)
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_lean_buffer__training__is_that_with_sb3s_own_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, algorithm: str, arguments: Any, settings: Any
) -> None:
    lean = learned(settings, algorithm, **arguments)
    monkeypatch.setattr(sb3, "_LEAN", ())
    plain = learned(settings, algorithm, **arguments)
    assert type(lean.rollout_buffer) is LeanRolloutBuffer
    assert type(plain.rollout_buffer) is RolloutBuffer
    for one, other in zip(lean.policy.parameters(), plain.policy.parameters(), strict=True):
        assert torch.equal(one, other)
    assert plain.rollout_buffer.observations[..., -1].any() or "availability" in settings.get("hide", ())


def test_lean_buffer__fixed_number_of_candidates__is_not_used() -> None:
    agent = Sb3Agent("PPO").learn(toy_env(horizon=5), 2)
    assert type(agent.model.rollout_buffer) is RolloutBuffer


def test_lean_buffer__a_larger_pool__costs_no_more_a_step() -> None:
    sizes = []
    for num_rows in (100, 1000):
        buffer = Sb3Agent("PPO").learn(toy_env(num_rows, num_candidates="all", horizon=5), 2).model.rollout_buffer
        tables = [table for part in (buffer._counts, buffer._choices) for step in part for table in step]
        arrays = [array for table in tables for array in (table.data, table.indices, table.indptr)]
        arrays += [
            value for value in vars(buffer).values() if isinstance(value, np.ndarray) and value is not buffer._static
        ]
        assert all(array.base is None or array.base.nbytes <= 2 * array.nbytes for array in arrays if array.nbytes)
        sizes.append(sum(array.nbytes for array in arrays))
        assert buffer._static.nbytes == 36 * 4 * num_rows
    assert abs(sizes[1] - sizes[0]) < 0.2 * sizes[0], "but for rows that were drawn twice"


def test_lean_buffer__other_candidates_are_offered__is_refused() -> None:
    env = toy_env()
    space, actions = env.observation_space, env.action_space
    buffer = LeanRolloutBuffer(4, space, actions, device="cpu")
    one = torch.zeros(1)
    observation, _ = env.reset(seed=0)
    buffer.add(observation[None], np.zeros((1, 32)), np.zeros(1), np.ones(1), one, one)
    other, *_ = env.step(np.zeros(32))
    with pytest.raises(ValueError, match="the candidates on offer have changed"):
        buffer.add(other[None], np.zeros((1, 32)), np.zeros(1), np.ones(1), one, one)
