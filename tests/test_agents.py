"""The base of agents, the baselines, the oracle, the catalogue and the rollout."""

from __future__ import annotations

import dataclasses
import json
import math

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from raise_env import PickOne, RaiseSelectEnv, TopKScores
from raise_env.agents import IfdAgent, OracleAgent, RaiseFork, RandomAgent, load_selector, make_agent, run_episode
from raise_env.agents.base import Agent, best_rows, world_of
from raise_env.agents.baselines import PoolScoreAgent
from raise_env.agents.catalogue import AGENTS, agent_name
from raise_env.agents.rollout import fit_wrapper
from raise_env.errors import RecordError, SettingError
from raise_env.features import StaticFeatures, standardise
from raise_env.pool import Instruction, Pool
from raise_env.testing import toy_env


class TakesFirst:
    """No base class, no `begin`: an agent is anything with `predict`."""

    def predict(self, observation, state=None, episode_start=None, deterministic=True):
        choice = np.zeros(len(observation), dtype=np.int8)
        choice[:8] = 1
        return choice, state


class Remembers:
    """Keeps what it was called with, and passes a state on from call to call."""

    def __init__(self):
        self.calls = []

    def predict(self, observation, state=None, episode_start=None, deterministic=True):
        self.calls.append((state, bool(episode_start[0]), deterministic))
        return TakesFirst().predict(observation)[0], len(self.calls)


class ScoresEarlierRowsHigher:
    action_space = spaces.Box(-1, 1, (32,))

    def predict(self, observation, state=None, episode_start=None, deterministic=True):
        return -np.arange(len(observation), dtype=np.float32) / len(observation), state


class PicksFirstAllowed:
    action_space = spaces.Discrete(32)

    def __init__(self):
        self.masks = []

    def predict(self, observation, state=None, episode_start=None, deterministic=True, action_masks=None):
        self.masks.append(action_masks)
        return np.flatnonzero(action_masks)[0], state


class PicksWithoutMasks:
    action_space = spaces.Discrete(32)

    def predict(self, observation, state=None, episode_start=None, deterministic=True):
        return np.int64(0), state


class FixedScores(PoolScoreAgent):
    """Scores a pool row by its id."""

    def score_pool(self, env):
        return np.arange(len(world_of(env).assets.pool), dtype=np.float64)


def with_features(env, log_p_given, log_p):
    """Return a toy environment whose auxiliary model has said these log-probabilities of the first rows."""
    raw = env.assets.features.raw.copy()
    raw[: len(log_p), 2] = log_p_given
    raw[: len(log_p), 3] = log_p
    return with_assets(env, features=standardise(raw, num_tokens=0))


def with_assets(env, **changes):
    return RaiseSelectEnv(None, dataclasses.replace(env.assets, **changes), **env.config.to_kwargs())


def with_labels(num_clean=20, num_rows=60):
    """Return a toy world on offer whole: clean rows of a target skill, then clean ones of another, then spoilt ones."""
    rows = [
        Instruction(
            f"q{i}",
            f"a{i}",
            fields={
                "skill": "plural" if i < num_clean or i >= 2 * num_clean else "capital",
                "corruption": "none" if i < 2 * num_clean else "cut",
            },
        )
        for i in range(num_rows)
    ]
    return with_assets(toy_env(num_rows, num_candidates=num_rows, num_classes=1, horizon=3), pool=Pool(rows, "toy"))


# The base


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


# Random


def test_random__same_seed__same_episode():
    first = run_episode(toy_env(), RandomAgent(), seed=3, name="random")
    again = run_episode(toy_env(), RandomAgent(), seed=3, name="random")
    assert first == again


def test_random__another_seed_of_its_own__other_rows_of_the_same_offer():
    env = toy_env()
    observation, _ = env.reset(seed=0)
    choices = []
    for seed in (0, 1):
        agent = RandomAgent()
        agent.begin(env, seed)
        choices.append(agent.predict(observation)[0])
    assert (choices[0] != choices[1]).any()


def test_random__many_draws__every_candidate_alike():
    env = toy_env(num_candidates=16, batch_size=4)
    observation, _ = env.reset(seed=0)
    agent = RandomAgent()
    agent.begin(env, seed=0)
    counts = np.sum([agent.predict(observation)[0] for _ in range(2000)], axis=0)
    # 2,000 draws of 4 of 16: mean 500, standard deviation 19.4.
    assert abs(counts - 500).max() < 5 * 19.4


# Scores of the pool


def test_pool_scores__rows_taken_once__come_after_all_others():
    env = toy_env(32, num_candidates=32, num_classes=1, horizon=4, batch_size=8)
    record = run_episode(env, FixedScores(), seed=0, name="fixed")
    assert [sorted(rows) for rows in record.actions] == [list(range(s, s + 8)) for s in (24, 16, 8, 0)]


def test_pool_scores__whole_pool_on_offer__the_best_that_the_budget_buys_in_random_order():
    env = toy_env(64, num_candidates="all", horizon=4, batch_size=8)
    record = run_episode(env, FixedScores(), seed=0, name="fixed")
    assert sorted(row for rows in record.actions for row in rows) == list(range(32, 64))
    assert max(record.actions[-1]) > 56  # not from best to worst
    another = run_episode(env, FixedScores(), seed=1, name="fixed")
    assert another.actions != record.actions


def test_ifd__values__by_hand():
    # IFD = exp(L(y|x)) / exp(L(y)) with L = -log P: exp(1 - 2), exp(2 - 2), and exp(3 - 2), above 1 and so
    # mismatched: minus its logarithm, -(3 - 2).
    env = with_features(toy_env(), log_p_given=[-1.0, -2.0, -3.0], log_p=[-2.0, -2.0, -2.0])
    scores = IfdAgent().score_pool(env)[:3]
    np.testing.assert_allclose(scores, [math.exp(-1), 1.0, -1.0], rtol=1e-6)


def test_ifd__rows_that_the_auxiliary_model_could_not_read__do_not_spoil_the_others():
    env = with_features(toy_env(), log_p_given=[np.nan, -300.0], log_p=[np.nan, -0.1])
    observation, _ = env.reset(seed=0)
    agent = IfdAgent()
    agent.begin(env, seed=0)
    assert np.isfinite(agent.scores(observation)).all()
    assert agent.score_pool(env).argmin() == 1


def test_ifd__a_step__takes_the_hardest_that_fit():
    env = toy_env(16, num_candidates=16, num_classes=1, batch_size=2)
    env = with_features(env, log_p_given=[-1.0] * 16, log_p=[-1.0 - 0.1 * row for row in range(16)])
    record = run_episode(env, IfdAgent(), seed=0, name="ifd")
    # log P(y) falls with the row, so IFD = exp(log P(y) - log P(y|x)) is highest for the first rows.
    assert sorted(record.actions[0]) == [0, 1]


# Oracle


def test_oracle__first_steps__clean_rows_of_the_target_skills_then_other_clean_ones():
    record = run_episode(with_labels(num_clean=8, num_rows=32), OracleAgent(), seed=0, name="oracle")
    steps = [set(rows) for rows in record.actions]
    assert steps[0] == set(range(8))
    assert steps[1] == set(range(8, 16))
    assert steps[2] <= set(range(16, 32))


def test_oracle__two_seeds__ties_are_broken_at_random():
    env = with_labels()
    first, second = (run_episode(env, OracleAgent(), seed=seed, name="oracle").actions[0] for seed in (0, 1))
    assert set(first) != set(second)


def test_oracle__pool_without_labels__refuses():
    # A pool of one's own: the settings say so, whatever the toy's rows are.
    env = RaiseSelectEnv(None, toy_env().assets, pool="pool.jsonl", dev="dev.jsonl", num_candidates=32)
    env.reset(seed=0)
    with pytest.raises(SettingError, match="embedded"):
        OracleAgent().begin(env, seed=0)


# Rollout


def test_run_episode__record__adds_up():
    env = toy_env(horizon=5, batch_size=4)
    record = run_episode(env, RandomAgent(), seed=1, name="who")
    assert (record.agent, record.seed, len(record.actions)) == ("who", 1, 5)
    assert all(len(rows) == 4 for rows in record.actions)
    np.testing.assert_allclose(np.cumsum(record.rewards), np.subtract(record.dev_scores[1:], record.dev_scores[0]))
    assert record.env["kwargs"] == {"num_candidates": 32, "horizon": 5, "batch_size": 4}
    assert record.test_score is not None


def test_run_episode__on_step__every_step_from_one():
    steps = []
    run_episode(toy_env(horizon=4), TakesFirst(), seed=0, name="first", on_step=steps.append)
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize("deterministic", [True, False])
def test_run_episode__predict__gets_state_start_and_determinism(deterministic):
    agent = Remembers()
    run_episode(toy_env(horizon=3), agent, seed=0, name="remembers", deterministic=deterministic)
    assert agent.calls == [(None, True, deterministic), (1, False, deterministic), (2, False, deterministic)]


def test_run_episode__agent_that_scores__the_best_of_each_class_are_trained_on():
    env = toy_env(horizon=1, num_classes=4, batch_size=8)
    env.reset(seed=0)
    offered = env.candidates
    record = run_episode(env, ScoresEarlierRowsHigher(), seed=0, name="scores")
    assert record.actions == [[int(offered[8 * label + place]) for label in range(4) for place in range(2)]]


def test_run_episode__agent_that_picks__is_told_what_is_left():
    agent = PicksFirstAllowed()
    record = run_episode(toy_env(horizon=2, batch_size=8), agent, seed=0, name="picks")
    assert [len(set(rows)) for rows in record.actions] == [8, 8]
    assert [mask.sum() for mask in agent.masks[:9]] == [32, 31, 30, 29, 28, 27, 26, 25, 32]


def test_run_episode__agent_that_takes_no_masks__is_not_given_any():
    record = run_episode(toy_env(horizon=2, batch_size=8), PicksWithoutMasks(), seed=0, name="picks")
    assert [len(rows) for rows in record.actions] == [1, 1]


@pytest.mark.parametrize(
    ("agent", "wrapper"), [(ScoresEarlierRowsHigher(), TopKScores), (PicksFirstAllowed(), PickOne)]
)
def test_fit_wrapper__action_space__decides(agent, wrapper):
    assert isinstance(fit_wrapper(toy_env(), agent), wrapper)


def test_fit_wrapper__no_action_space_or_the_environments__stays_as_it_is():
    env = toy_env()
    agent = TakesFirst()
    assert fit_wrapper(env, agent) is env
    agent.action_space = env.action_space
    assert fit_wrapper(env, agent) is env


def test_fit_wrapper__wrapped_already__is_not_wrapped_twice():
    env = TopKScores(toy_env())
    assert fit_wrapper(env, ScoresEarlierRowsHigher()) is env


def test_fit_wrapper__another_action_space__says_which_fit():
    agent = TakesFirst()
    agent.action_space = spaces.MultiDiscrete([32] * 8)
    with pytest.raises(SettingError, match="MultiBinary, Box or Discrete"):
        fit_wrapper(toy_env(), agent)


# Catalogue


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_make_agent__every_name__an_agent(name):
    assert isinstance(make_agent(name), Agent)


def test_make_agent__unknown_name__names_the_nearest():
    with pytest.raises(SettingError, match=r"unknown agent 'randon': did you mean 'random'\? Known: .*raise_fork"):
        make_agent("randon")


def test_make_agent__settings__reach_the_agent():
    assert make_agent("random", {"batch_size": 3}).batch_size == 3
    assert make_agent("raise_fork", {"num_forks": 4}).settings.num_forks == 4


@pytest.mark.parametrize("name", ["random", "raise_fork"])
def test_make_agent__unknown_setting__named(name):
    with pytest.raises(SettingError, match="num_frocks"):
        make_agent(name, {"num_frocks": 4})


def test_make_agent__class_of_ones_own__is_built(tmp_path, monkeypatch):
    (tmp_path / "my_agent.py").write_text(
        "class Mine:\n    def __init__(self, size=1):\n        self.size = size\n    def predict(self, *_, **__): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert make_agent("my_agent:Mine", {"size": 3}).size == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no.such.module:Class", "no.such.module|No module"),
        ("raise_env.testing:NoSuchClass", "NoSuchClass"),
        ("raise_env.testing:toy_pool", "no predict"),
    ],
)
def test_make_agent__class_that_cannot_be_used__says_why(name, words):
    with pytest.raises(SettingError, match=words):
        make_agent(name)


@pytest.mark.parametrize(
    ("name", "short"), [("selector:a/b", "selector"), ("random", "random"), ("sb3:PPO", "sb3:PPO")]
)
def test_agent_name__form__short(name, short):
    assert agent_name(name) == short


def test_load_selector__no_folder__says_what_was_expected(tmp_path):
    with pytest.raises(RecordError, match=r"config\.json.*raise-env train"):
        load_selector(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", json.dumps({"agent": "raise_fork", "format": 99})])
def test_load_selector__broken_config__record_error(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RecordError, match=r"config\.json"):
        load_selector(tmp_path)


def test_load_selector__folder_of_a_run__its_selector(tmp_path):
    agent = RaiseFork(num_forks=2, num_networks=1, num_passes=1, num_steps=1)
    agent.learn(toy_env(), episodes=1)
    agent.save(tmp_path / "selector")
    observation, _ = toy_env().reset(seed=0)
    np.testing.assert_array_equal(load_selector(tmp_path).scores(observation), agent.scores(observation))


def test_static_features__fields__as_the_baselines_read_them():
    # The columns that IFD reads are named by position: this is the position.
    raw = np.arange(72, dtype=np.float32).reshape(2, 36)
    features = standardise(raw, num_tokens=0)
    assert isinstance(features, StaticFeatures)
    np.testing.assert_array_equal(features.log_p_response_given_prompt, [2, 38])
    np.testing.assert_array_equal(features.log_p_response, [3, 39])
