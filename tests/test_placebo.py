from __future__ import annotations

import json

import gymnasium as gym
import numpy as np
import pytest

from raise_env import TopKScores
from raise_env.agents import RandomAgent, load_selector, run_episode
from raise_env.agents.catalogue import learning_episodes, make_agent
from raise_env.agents.placebo import OtherRewards, Placebo, PlaceboFork
from raise_env.agents.raise_fork import RaiseFork
from raise_env.errors import SettingError
from raise_env.testing import toy_env

FIT = {"num_networks": 2, "num_passes": 15, "hidden_dims": (32, 32), "weight_decay": 0.1, "num_rows": 64}
SEEDS = range(4)


def advantage(agent, **settings):
    """Return by how much the agent's last dev score exceeds random's, the mean over runs."""
    gains = []
    for seed in SEEDS:
        ours = run_episode(toy_env(**settings), agent, seed=seed, name="ours")
        random_rows = run_episode(toy_env(**settings), RandomAgent(), seed=seed, name="random")
        gains.append(ours.dev_scores[-1] - random_rows.dev_scores[-1])
    return np.mean(gains)


# raise_fork's


@pytest.mark.parametrize("credit", ["rows", pytest.param("batches", marks=pytest.mark.slow)])
def test_placebo_fork__toy_world__does_not_learn_what_raise_fork_learns(credit):
    settings = {**FIT, "credit": credit, "num_forks": 8, "num_states": 10}
    episodes = 2 if credit == "rows" else 6
    real = advantage(RaiseFork(**settings).learn(toy_env(), episodes))
    # A placebo's taste is arbitrary, and may suit the toy world by chance; that of five cannot.
    placebos = [advantage(PlaceboFork(**settings).learn(toy_env(), episodes, seed=s)) for s in range(5)]
    assert real > 0.5
    assert abs(np.mean(placebos)) < 0.25 * real


def test_placebo_fork__first_episode__sees_the_same_rows_at_the_same_cost():
    agents, tokens = [RaiseFork(**FIT), PlaceboFork(**FIT)], []
    for agent in agents:
        env = toy_env()
        env.reset(seed=0)
        agent.learn(env, episodes=1, seed=3)
        tokens.append((env.ledger.train_tokens, env.ledger.forward_tokens, env.ledger.updates))
    assert tokens[0] == tokens[1]
    for real, placebo in zip(agents[0].groups, agents[1].groups, strict=True):
        np.testing.assert_array_equal(real.rows, placebo.rows)
        np.testing.assert_array_equal(np.sort(real.gains), np.sort(placebo.gains))
        assert not np.array_equal(real.gains, placebo.gains)
    assert agents[0].episode_returns == agents[1].episode_returns


def test_placebo_fork__stored__says_what_it_learned_from(tmp_path):
    agent = PlaceboFork(**FIT).learn(toy_env(), episodes=1)
    agent.save(tmp_path / "selector")
    assert json.loads((tmp_path / "selector" / "config.json").read_text())["training"]["credits"] == "shuffled"
    observation = toy_env().reset(seed=0)[0]
    loaded = load_selector(tmp_path / "selector")
    np.testing.assert_array_equal(loaded.scores(observation), agent.scores(observation))


# Of those that learn through env.step


def rewards_of(env, seed=0):
    """Return the rewards of a random episode: those handed out, and the true ones."""
    rng, handed_out, over = np.random.default_rng(seed), [], False
    env.reset(seed=seed)
    while not over:
        _, reward, over, _, _ = env.step((rng.random(env.unwrapped.action_space.shape[0]) < 0.25).astype(np.int8))
        handed_out.append(reward)
    return handed_out, [step.reward for step in env.unwrapped.history]


def test_other_rewards__later_episodes__are_those_of_the_same_step_before():
    env = OtherRewards(toy_env(), seed=0)
    handed_out, true = zip(*[rewards_of(env, seed) for seed in range(4)], strict=True)
    assert handed_out[0][0] == 0.0
    assert all(handed_out[0][step] in true[0][:step] for step in range(1, len(true[0])))
    for episode in range(1, 4):
        for step, reward in enumerate(handed_out[episode]):
            assert reward in [true[before][step] for before in range(episode)]


def test_other_rewards__everything_else__stays_as_it_is():
    plain, other = toy_env(), OtherRewards(toy_env())
    _, true = rewards_of(plain)
    handed_out, history = rewards_of(other)
    assert history == true != handed_out
    assert other.dev_scores == plain.dev_scores
    np.testing.assert_array_equal(other.observation(), plain.observation())


def test_other_rewards__variants_and_wrappers__hand_out_other_rewards_too():
    variant = OtherRewards(toy_env(), seed=5).variant(horizon=4)
    assert isinstance(variant, OtherRewards)
    assert (variant.config.horizon, variant.render_mode) == (4, None)
    wrapped = TopKScores(OtherRewards(toy_env()))
    wrapped.reset(seed=0)
    assert wrapped.step(np.zeros(32, dtype=np.float32))[1] == 0.0
    assert wrapped.unwrapped.history[0].reward != 0.0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "episodes"), [("raise_ppo", 30), ("sb3:PPO", 60)])
def test_placebo__toy_world__does_not_learn_what_the_agent_learns(name, episodes):
    arguments = {"preset": "tuned"} if name == "raise_ppo" else {}
    real = advantage(make_agent(name, arguments).learn(toy_env(), episodes, seed=0))
    agents = [make_agent(f"placebo:{name}", arguments) for _ in range(4)]
    placebos = [advantage(agent.learn(toy_env(), episodes, seed=s)) for s, agent in enumerate(agents)]
    assert real > 0.15
    assert np.mean(placebos) < 0.5 * real


def test_placebo__its_agents_cost__is_its_own():
    tokens = []
    for name in ("raise_ppo", "placebo:raise_ppo"):
        env = toy_env()
        env.reset(seed=0)
        make_agent(name).learn(env, 2, seed=1)
        tokens.append((env.ledger.train_tokens, env.ledger.updates))
    assert tokens[0] == tokens[1]


def test_make_agent__placebo_of__names_and_settings_go_through():
    assert isinstance(make_agent("placebo"), PlaceboFork)
    assert make_agent("placebo:raise_fork", {"num_states": 3}).settings.num_states == 3
    agent = make_agent("placebo:raise_ppo", {"preset": "tuned"})
    assert isinstance(agent, Placebo)
    assert agent.settings.gamma == 0.0
    assert learning_episodes("placebo:raise_ppo") == learning_episodes("raise_ppo")
    assert learning_episodes("placebo") == learning_episodes("raise_fork")


@pytest.mark.parametrize(
    ("name", "arguments", "match"), [("random", {}, "not learn"), ("sb3:PPO", {"num_envs": 2}, "one")]
)
def test_make_agent__placebo_of_what_cannot_be__is_refused(name, arguments, match):
    with pytest.raises(SettingError, match=match):
        make_agent(f"placebo:{name}", arguments)


def test_placebo__an_agent_of_stable_baselines3__stores_itself(tmp_path):
    agent = make_agent("placebo:sb3:PPO").learn(toy_env(), 1)
    agent.save(tmp_path / "selector")
    record = run_episode(toy_env(), agent, seed=0, name="placebo")
    again = run_episode(toy_env(), load_selector(tmp_path / "selector"), seed=0, name="placebo")
    assert record.actions == again.actions


def test_placebo__of_an_agent_that_keeps_its_progress__does_not():
    placebo = make_agent("placebo:raise_ppo")
    assert hasattr(make_agent("raise_ppo"), "load_progress")
    assert not hasattr(placebo, "load_progress"), "the rewards that are handed out are no part of it"
    assert hasattr(placebo, "save")


def test_placebo__of_an_agent_that_picks__takes_full_batches():
    env = toy_env(horizon=3)
    placebo = make_agent("placebo:sb3:DQN")
    placebo.learn(env, 1)
    assert [len(step) for step in run_episode(env, placebo, seed=0, name="placebo").actions] == [
        env.config.batch_size
    ] * 3


def test_placebo__environment_in_a_wrapper_of_ones_own__is_refused():
    with pytest.raises(SettingError, match="ClipReward would have no effect"):
        make_agent("placebo:sb3:PPO").learn(gym.wrappers.ClipReward(toy_env(), 0.0, 1.0), 1)
