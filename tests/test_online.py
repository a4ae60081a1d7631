"""The baselines that look at the model in training."""

from __future__ import annotations

import math

import numpy as np
import pytest

from raise_env.agents import RandomAgent, run_episode
from raise_env.agents.baselines import times_taken
from raise_env.agents.online import GreedyAgent, HighLossAgent, LowLossAgent, SelfPacedAgent
from raise_env.errors import SettingError
from raise_env.testing import toy_env


def losses(env, rows):
    """The toy's losses up to a constant: lower for rows of higher value."""
    return -env.assets.learner.values[rows]


def steps_of(env, agent, seed=0):
    """Run an episode; return, step by step, what was on offer and what was taken."""
    run_episode(env, agent, seed=seed, name="agent")
    return [(step.candidates[step.candidates >= 0], step.selected) for step in env.history]


# By loss


@pytest.mark.parametrize(("agent", "sign"), [(HighLossAgent(), -1), (LowLossAgent(), 1)])
def test_loss__every_step__takes_the_end_of_the_scale_among_rows_not_yet_taken(agent, sign):
    env = toy_env(80, num_candidates=20, num_classes=2, batch_size=4, horizon=8)
    seen = set()
    for offered, taken in steps_of(env, agent):
        fresh = [row for row in offered if row not in seen]
        best = sorted(fresh, key=lambda row: sign * losses(env, row))[:4]
        assert set(taken) == set(best)
        seen |= set(taken)


def test_loss__whole_pool_on_offer__the_very_best_at_once():
    env = toy_env(64, num_candidates="all", batch_size=4, horizon=16)
    order = np.argsort(losses(env, np.arange(64)))
    taken = [set(rows) for _, rows in steps_of(env, LowLossAgent())]
    assert taken == [set(order[start : start + 4]) for start in range(0, 64, 4)]


def test_loss__rows_all_taken_once__are_taken_again():
    env = toy_env(8, num_candidates=8, num_classes=1, batch_size=4, horizon=5)
    steps_of(env, HighLossAgent())
    assert times_taken(env).tolist() == np.where(times_taken(env) == 3, 3, 2).tolist()
    assert times_taken(env).sum() == 20


@pytest.mark.parametrize("agent", [HighLossAgent(), LowLossAgent(), SelfPacedAgent()])
def test_loss__padding__is_neither_scored_nor_taken(agent):
    # 30 rows in 4 classes: two classes are one short of their 8 places.
    env = toy_env(30, num_candidates=32, batch_size=8, horizon=2)
    observation, _ = env.reset(seed=0)
    agent.begin(env, 0)
    before = env.ledger.forward_tokens
    choice, _ = agent.predict(observation)
    assert choice.sum() == 8
    assert (env.candidates[choice == 1] >= 0).all()
    assert env.ledger.forward_tokens - before == 30, "the toy counts a token a row"


def test_loss__loss_that_is_no_number__comes_last(monkeypatch):
    env = toy_env(8, num_candidates=8, num_classes=1, batch_size=7)
    observation, _ = env.reset(seed=0)
    monkeypatch.setattr(env, "row_losses", lambda rows: np.where(rows == 5, np.nan, rows))
    for agent in (HighLossAgent(), LowLossAgent(), SelfPacedAgent(start=0.1)):
        agent.begin(env, 0)
        assert set(env.candidates[agent.predict(observation)[0] == 0]) == {5}


@pytest.mark.parametrize("agent", [HighLossAgent(), LowLossAgent()])
def test_loss__embedded_model__live_and_not_that_of_the_start(embedded_env, agent):
    env = embedded_env(horizon=6, budget=None)
    observation, _ = env.reset(seed=0)
    agent.begin(env, 0)
    for _ in range(5):
        observation, *_ = env.step(agent.predict(observation)[0])
    assert agent.predict(observation)[0].sum() == env.config.batch_size
    fresh = times_taken(env)[env.candidates] == 0
    live = env.row_losses(env.candidates)
    best = np.where(fresh, live if isinstance(agent, HighLossAgent) else -live, -np.inf).argsort()[-4:]
    assert set(np.flatnonzero(agent.predict(observation)[0])) == set(best)


# Self-paced


@pytest.mark.parametrize("start", [0.2, 0.5, 1.0])
def test_self_paced__admitted_share__grows_from_start_to_one(start):
    env = toy_env(200, num_candidates=40, batch_size=4, horizon=10)
    observation, _ = env.reset(seed=0)
    agent = SelfPacedAgent(start)
    agent.begin(env, 0)
    for step in range(10):
        num_admitted = round((start + (1 - start) * step / 10) * 40)
        easiest = set(env.candidates[np.argsort(losses(env, env.candidates))[:num_admitted]])
        drawn = [set(env.candidates[agent.predict(observation)[0] == 1]) for _ in range(400)]
        assert set.union(*drawn) == easiest, "all of them come up, and no other"
        observation, *_ = env.step(agent.predict(observation)[0])


def test_self_paced__budget_that_ends_first__sets_the_pace():
    env = toy_env(200, num_candidates=40, batch_size=4, horizon=100, budget=16)
    observation, _ = env.reset(seed=0)
    agent = SelfPacedAgent(0.5)
    agent.begin(env, 0)
    shares = []
    for _ in range(4):
        shares.append(agent.share(env))
        observation, *_ = env.step(agent.predict(observation)[0])
    assert shares == [0.5, 0.625, 0.75, 0.875]


def test_self_paced__fewer_admitted_than_a_batch__the_easiest_fill_it():
    env = toy_env(200, num_candidates=40, batch_size=8, horizon=10)
    observation, _ = env.reset(seed=0)
    agent = SelfPacedAgent(0.01)
    agent.begin(env, 0)
    taken = env.candidates[agent.predict(observation)[0] == 1]
    assert set(taken) == set(env.candidates[np.argsort(losses(env, env.candidates))[:8]])


@pytest.mark.parametrize("start", [0.0, 1.5, -1, math.nan, "half"])
def test_self_paced__start_out_of_range__refused(start):
    with pytest.raises(SettingError, match="start is"):
        SelfPacedAgent(start)


# Greedy


def test_greedy__a_step__takes_the_best_of_what_it_tried(monkeypatch):
    env = toy_env(100, batch_size=4)
    observation, _ = env.reset(seed=0)
    tried = []
    probe = env.probe
    monkeypatch.setattr(env, "probe", lambda actions, num_dev: tried.append((actions, num_dev)) or probe(actions))
    agent = GreedyAgent(num_tries=12, num_dev=5)
    agent.begin(env, 0)
    taken = agent.predict(observation)[0]
    ((actions, num_dev),) = tried
    assert num_dev == 5
    assert actions.shape == (12, 32)
    assert (actions.sum(axis=1) == 4).all()
    assert len(np.unique(actions, axis=0)) == 12
    # On the toy a batch is worth the mean of its rows' values.
    worth = [env.assets.learner.values[env.candidates[action == 1]].mean() for action in actions]
    np.testing.assert_array_equal(taken, actions[np.argmax(worth)])


def test_greedy__episodes_on_the_toy__better_than_random_and_counted():
    env = toy_env()
    env.reset(seed=0)
    start = env.ledger.updates
    greedy = [run_episode(env, GreedyAgent(), seed=seed, name="greedy").test_score for seed in range(5)]
    assert env.ledger.updates - start == 5 * 10 * (8 + 1)
    random = [run_episode(env, RandomAgent(), seed=seed, name="random").test_score for seed in range(5)]
    assert min(np.subtract(greedy, random)) > 0


@pytest.mark.parametrize("num_rows", [30, 5])
def test_greedy__padding_and_small_offers__are_coped_with(num_rows):
    env = toy_env(num_rows, num_candidates=32, batch_size=8, horizon=2)
    record = run_episode(env, GreedyAgent(), seed=0, name="greedy")
    assert [len(rows) for rows in record.actions] == [min(8, num_rows)] * 2


def test_greedy__whole_pool_on_offer__the_batch_that_was_tried():
    env = toy_env(64, num_candidates="all", batch_size=4, horizon=2)
    observation, _ = env.reset(seed=0)
    agent = GreedyAgent()
    agent.begin(env, 0)
    scores = agent.scores(observation)
    agent.begin(env, 0)
    np.testing.assert_array_equal(agent.predict(observation)[0], scores)


@pytest.mark.parametrize("settings", [{"num_tries": 0}, {"num_tries": 2.5}, {"num_dev": 0}, {"num_dev": "all"}])
def test_greedy__settings_that_are_no_counts__refused(settings):
    (name,) = settings
    with pytest.raises(SettingError, match=f"{name} is"):
        GreedyAgent(**settings)
