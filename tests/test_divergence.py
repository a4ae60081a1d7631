"""Training that goes wrong: the episode ends by the contract, and whoever learns goes on with the next, unharmed."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from raise_env.agents.benchmark import BenchPlan, bench
from raise_env.agents.catalogue import make_agent
from raise_env.agents.job import Entry
from raise_env.agents.rollout import run_episode
from raise_env.agents.runs import Plan, train
from raise_env.errors import SettingError
from raise_env.rewards import DIVERGENCE_PENALTY
from raise_env.testing import toy_env

SMALL_FIT = {"num_networks": 2, "num_passes": 3, "hidden_dims": [16]}
LEARNERS = {
    "raise_fork": {**SMALL_FIT, "num_rows": 16, "num_states": 3},
    "raise_fork batches": {**SMALL_FIT, "credit": "batches", "num_states": 3, "num_forks": 3},
    "raise_ppo": {},
    "sb3:PPO": {"n_steps": 5, "batch_size": 5, "n_epochs": 2},
    "sb3:DQN": {"learning_starts": 4, "batch_size": 4},
    "sb3:SAC": {"learning_starts": 4, "batch_size": 4},
}


def weights_of(agent):
    """Return all weights of a learned agent."""
    model = getattr(agent, "model", None)
    if model is not None:
        return list(model.policy.state_dict().values())
    networks = getattr(agent, "networks", None) or [learner.network for learner in agent._learners.values()]
    return [value for network in networks for value in network.state_dict().values()]


@pytest.mark.parametrize("learning_rate", [1e-3, 1e3, 1e10, 1e20, 1e30])
@pytest.mark.parametrize("score_every", [1, 3])
def test_step__any_learning_rate__stays_finite_and_the_next_episode_is_as_good(
    embedded_env, learning_rate, score_every
):
    env = embedded_env(learning_rate=learning_rate, score_every=score_every)
    action = np.zeros(16, dtype=np.int8)
    action[:4] = 1
    told = []
    for _ in range(2):
        observation, info = env.reset(seed=1)
        rewards, over = [], False
        while not over:
            assert env.observation_space.contains(observation)
            observation, reward, over, truncated, info = env.step(action)
            assert not truncated
            assert all(np.isfinite(value).all() for value in info.values())
            rewards.append(reward)
        assert env.observation_space.contains(observation)
        assert info["diverged"] == (rewards[-1] == DIVERGENCE_PENALTY)
        assert "test_score" not in info or not info["diverged"]
        told.append(rewards)
    assert told[0] == told[1]
    assert (told[0][-1] == DIVERGENCE_PENALTY) == (learning_rate >= 1e20)


@pytest.mark.parametrize("name", LEARNERS)
def test_learn__many_episodes_diverge__all_weights_are_finite_and_it_acts(name):
    env = toy_env(num_rows=40, diverges_on=3, horizon=6)
    env.reset(seed=0)
    agent, returns = make_agent(name.partition(" ")[0], LEARNERS[name]), []
    agent.learn(env, 8, seed=0, progress=lambda _number, total: returns.append(total))
    assert env.ledger.divergences >= 2
    assert sum(total < DIVERGENCE_PENALTY / 2 for total in returns) >= 2
    assert all(math.isfinite(total) for total in returns)
    weights = weights_of(agent)
    assert weights
    assert all(torch.isfinite(value).all() for value in weights)
    record = run_episode(toy_env(num_rows=40), agent, seed=9, name="after")
    assert not record.diverged
    assert any(record.actions)


@pytest.mark.parametrize("credit", ["rows", "batches"])
def test_learn__raise_fork_whose_every_fork_diverges__says_what_to_change(embedded_env, credit):
    agent = make_agent("raise_fork", {**LEARNERS["raise_fork"], "credit": credit, "num_lookahead": 2})
    env = embedded_env(learning_rate=1e30)
    with pytest.raises(SettingError, match=r"nothing to learn from.*lower learning_rate"):
        agent.learn(env, 2, seed=0)
    assert agent.episode_returns == [DIVERGENCE_PENALTY] * 2, "it went on with the next episode"


def test_learn__raise_fork_that_diverges_after_the_last_look__is_told_and_can_be_kept(tmp_path, embedded_env):
    agent = make_agent("raise_fork", {**LEARNERS["raise_fork"], "num_states": 1, "num_lookahead": 0})
    env = embedded_env(learning_rate=1e30)
    env.reset(seed=0)
    before = env.ledger.divergences
    agent.learn(env, 2, seed=0)
    assert agent.episode_returns == [DIVERGENCE_PENALTY] * 2
    assert env.ledger.divergences == before + 2
    agent.save_progress(tmp_path / "kept")
    assert all(torch.isfinite(value).all() for value in weights_of(agent))


def test_learn__raise_fork_whose_first_episode_diverges__is_gone_on_with(tmp_path, embedded_env):
    agent, kept = make_agent("raise_fork", LEARNERS["raise_fork"]), tmp_path / "kept"
    with pytest.raises(SettingError, match="nothing to learn from"):
        agent.learn(embedded_env(learning_rate=1e30), 1, seed=0)
    agent.save_progress(kept)
    again = make_agent("raise_fork", LEARNERS["raise_fork"])
    again.load_progress(kept)
    assert (again.networks, again.groups, again.episode_returns) == ([], [], [DIVERGENCE_PENALTY])
    assert again.view is not None


def test_train__runs_that_diverge__are_told_of_in_report_and_page(tmp_path, small_settings):
    settings = {**small_settings, "learning_rate": 1e20}
    own = {"n_steps": 3, "batch_size": 3}
    report = train(tmp_path / "run", Plan(settings, "sb3:PPO", own, episodes=2, num_runs=2))
    num_episodes = len(report["learning"]["episode_returns"])
    assert report["diverged"] == {"learning": num_episodes, "final": {"sb3:PPO": 2, "random": 2}}
    assert report["agents"]["random"]["dev_loss"] == report["agents"]["random"]["test_loss"] == [None, None]
    told = f"stopped being finite in {num_episodes} episodes of learning and in 4 final runs."
    assert told in report["headline"]
    assert told in (tmp_path / "run" / "report.html").read_text()
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["divergences"] == {"learning": num_episodes, "final/sb3:PPO": 2, "final/random": 2}


def test_train__no_run_diverges__says_nothing_of_it(tmp_path, small_settings):
    report = train(tmp_path / "run", Plan(small_settings, "random", episodes=0, compare=(), num_runs=1))
    assert report["diverged"] == {"learning": 0, "final": {"random": 0}}
    assert "finite" not in report["headline"]


def test_bench__runs_that_diverge__are_counted_in_summary_and_page(tmp_path, small_settings):
    settings = {**small_settings, "learning_rate": 1e20}
    entries = {"random": Entry("random"), "raise_ppo": Entry("raise_ppo", episodes=2)}
    summary = bench(tmp_path / "bench", BenchPlan(settings, entries, num_seeds=2))
    expected = {"random": {"learning": 0, "final": 2}, "raise_ppo": {"learning": 4, "final": 2}}
    assert summary["diverged"] == {"default": expected}
    assert [entry["reason"] for entry in summary["missing"]] == ["diverged"] * 4
    page = (tmp_path / "bench" / "report.html").read_text()
    assert "stopped being finite in 4 episodes of learning and in 4 final runs." in page
