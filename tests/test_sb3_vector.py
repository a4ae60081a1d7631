"""SB3 learns from many environments over one base model as it does from as many of its own."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from raise_env import PickOne, TopKScores
from raise_env.agents import Sb3Agent
from raise_env.agents.sb3 import RowPolicy, SubsetPolicy
from raise_env.agents.sb3_vector import ReportingVecEnv, StackedVecEnv
from raise_env.errors import SettingError
from raise_env.features import BLOCKS
from raise_env.testing import toy_env
from raise_env.vector import RaiseSelectVectorEnv

#: As in test_vector.py: rounding differs by processor.
TOLERANCE = 1e-4


class Notes(BaseCallback):
    """Keeps what each step of learning returned."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, ...]] = []

    def _on_step(self) -> bool:
        self.steps.append(tuple(self.locals[name] for name in ("actions", "new_obs", "rewards", "dones", "infos")))
        return True


def learned(venv: VecEnv, policy: Any, algorithm: Any = PPO, num_steps: int = 24, **settings: Any) -> Any:
    model = algorithm(policy, venv, seed=3, device="cpu", **settings)
    model.set_logger(Logger(None, []))
    notes = Notes()
    model.learn(num_steps, callback=notes)
    return model, notes.steps


def assert_same_steps(found: list[Any], expected: list[Any]) -> int:
    """Both were the same, within what the order of sums may change; return how many episodes ended."""
    static = slice(BLOCKS["difficulty"].start, None)
    num_ends = 0
    for (actions, observations, rewards, dones, infos), others in zip(found, expected, strict=True):
        np.testing.assert_allclose(actions, others[0], atol=TOLERANCE)  # scores follow the observation
        np.testing.assert_array_equal(observations[..., static], others[1][..., static])
        np.testing.assert_allclose(observations, others[1], atol=TOLERANCE)
        assert rewards.dtype == others[2].dtype == np.float32
        np.testing.assert_allclose(rewards, others[2], atol=TOLERANCE)
        assert dones.dtype == others[3].dtype == bool
        np.testing.assert_array_equal(dones, others[3])
        for info, other in zip(infos, others[4], strict=True):
            assert info.keys() == other.keys() - {"episode"}  # SB3's own monitor adds it
            assert info["TimeLimit.truncated"] is other["TimeLimit.truncated"] is False
            assert [type(info[name]) for name in info] == [type(other[name]) for name in info]
            np.testing.assert_array_equal(info["selected"], other["selected"])
            if "terminal_observation" in info:
                num_ends += 1
                np.testing.assert_allclose(info["terminal_observation"], other["terminal_observation"], atol=TOLERANCE)
    return num_ends


@pytest.mark.parametrize("form", ["subset", "scores", "pick"])
def test_stacked_vec_env__ppo_learns__from_the_rollout_that_dummy_vec_env_gives(embedded_env: Any, form: str) -> None:
    wrap = {"subset": lambda env: env, "scores": TopKScores, "pick": PickOne}[form]
    policy = SubsetPolicy if form == "subset" else RowPolicy
    settings = {"n_steps": 8 if form != "pick" else 32, "batch_size": 8, "n_epochs": 1, "learning_rate": 1e-3}
    settings |= {"policy_kwargs": {"subset_size": 4}} if form == "subset" else {}
    num_steps = 32 if form != "pick" else 64
    stacked = StackedVecEnv(RaiseSelectVectorEnv.over([wrap(embedded_env()) for _ in range(2)]))
    dummy = DummyVecEnv([lambda: wrap(embedded_env())] * 2)
    model, steps = learned(stacked, policy, num_steps=num_steps, **settings)
    other, expected = learned(dummy, policy, num_steps=num_steps, **settings)
    assert assert_same_steps(steps, expected) >= 4
    for name, info in enumerate(stacked.reset_infos):
        np.testing.assert_array_equal(info["candidates"], dummy.reset_infos[name]["candidates"])
    np.testing.assert_allclose(model.rollout_buffer.returns, other.rollout_buffer.returns, atol=1e-4)


def test_stacked_vec_env__an_episode_ends__no_step_is_spent_on_the_reset() -> None:
    venv = StackedVecEnv(_toys(2, horizon=2))
    venv.seed(0)
    venv.reset()
    rewards = [venv.step(np.tile(np.repeat([1, 0], [4, 28]), (2, 1)))[1] for _ in range(5)]
    assert (np.array(rewards) != 0).all()


def test_stacked_vec_env__make_vec__is_taken_as_it_is(small_settings: Any) -> None:
    venv = StackedVecEnv(gym.make_vec("RaiseSelect-v0", num_envs=2, **small_settings))
    model, steps = learned(venv, SubsetPolicy, A2C, 16, n_steps=4, policy_kwargs={"subset_size": 4})
    assert len(steps) == 8
    assert venv.get_attr("num_steps", indices=[0]) == [2]
    assert venv.env_is_wrapped(TopKScores) == [False, False]
    assert not venv.has_attr("no_such_thing")
    model.env = None
    venv.close()


def test_stacked_vec_env__pick_one__masks_reach_maskable_ppo() -> None:
    contrib = pytest.importorskip("sb3_contrib")
    venv = StackedVecEnv(_toys(3, PickOne, horizon=2))
    settings = {"n_steps": 16, "batch_size": 48, "n_epochs": 1}
    _, steps = learned(venv, "MlpPolicy", contrib.MaskablePPO, 96, **settings)
    picks = np.array([actions for actions, *_ in steps])[:32].reshape(4, 8, 3)  # batches of eight
    assert all(len(set(batch[:, env])) == 8 for batch in picks for env in range(3)), "no row is picked twice"
    assert np.stack(venv.env_method("action_masks")).shape == (3, 32)


def test_reporting_vec_env__episodes_of_all_environments__are_counted_together() -> None:
    reports: list[tuple[int, float]] = []
    venv = ReportingVecEnv(StackedVecEnv(_toys(2, horizon=2)), lambda *report: reports.append(report))
    venv.reset()
    total = np.zeros(2)
    for _ in range(2):
        _, rewards, _, _ = venv.step(np.tile(np.repeat([1, 0], [4, 28]), (2, 1)))
        total += rewards
    assert reports == [(1, pytest.approx(total[0])), (2, pytest.approx(total[1]))]
    venv.step(np.zeros((2, 32)))
    assert len(reports) == 2


@pytest.mark.parametrize(
    ("algorithm", "form", "settings"),
    [("PPO", "subset", {}), ("A2C", "scores", {}), ("MaskablePPO", "pick", {}), ("SAC", "scores", {"batch_size": 4})],
)
def test_sb3_agent__many_environments__learns_as_many_steps(algorithm: str, form: str, settings: Any) -> None:
    pytest.importorskip("sb3_contrib")
    env = toy_env(horizon=5, batch_size=4)
    episodes: list[int] = []
    agent = Sb3Agent(algorithm, action_form=form, num_envs=4, **settings)
    agent.learn(env, 8, seed=0, progress=lambda number, _: episodes.append(number))
    assert agent.model is not None
    assert agent.model.n_envs == 4
    assert agent.model.num_timesteps == 8 * 5 * (4 if form == "pick" else 1)
    assert episodes == list(range(1, 9))
    with pytest.raises(gym.error.ResetNeeded):
        env.snapshot()  # the given one is as it was
    if algorithm == "SAC":
        assert agent.model.gradient_steps == -1


def test_sb3_agent__many_environments__is_kept_with_it(tmp_path: Any) -> None:
    agent = Sb3Agent("PPO", num_envs=3).learn(toy_env(horizon=4), 3)
    agent.save(tmp_path / "selector")
    assert Sb3Agent.load(tmp_path / "selector").num_envs == 3


@pytest.mark.parametrize("num_envs", [0, 2.5, True])
def test_sb3_agent__no_number_of_environments__is_refused(num_envs: Any) -> None:
    with pytest.raises(SettingError, match=r"num_envs is .* expected a whole number of at least 1"):
        Sb3Agent("PPO", num_envs=num_envs)


def test_sb3_agent__many_environments_with_ars__are_refused() -> None:
    pytest.importorskip("sb3_contrib")
    with pytest.raises(SettingError, match="num_envs is 2; expected 1: ARS"):
        Sb3Agent("ARS", num_envs=2)


def test_sb3_agent__many_environments__refuses_wrappers_that_would_be_left_out() -> None:
    shaped = gym.wrappers.TransformReward(PickOne(toy_env(horizon=2)), lambda reward: -reward)
    with pytest.raises(SettingError, match=r"TransformReward would have no effect: .* num_envs=1\.$"):
        Sb3Agent("PPO", num_envs=2).learn(shaped, 1)
    looked_on = gym.wrappers.RecordEpisodeStatistics(gym.wrappers.OrderEnforcing(toy_env(horizon=2)))
    assert Sb3Agent("PPO", num_envs=2).learn(looked_on, 2).model is not None


def _toys(count: int, wrap: Any = lambda env: env, **settings: Any) -> RaiseSelectVectorEnv:
    return RaiseSelectVectorEnv.over([wrap(toy_env(**settings)) for _ in range(count)])
