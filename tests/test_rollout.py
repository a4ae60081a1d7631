"""Episodes: any agent acts in any form, and what fails is put down to who wrote it."""

from __future__ import annotations

import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from raise_env import PickOne, TopKScores
from raise_env.agents import RandomAgent, run_episode
from raise_env.agents.rollout import agents_code, fit_wrapper
from raise_env.errors import ActionError, AgentError, DataError, MemoryShortageError, SettingError
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


@pytest.mark.parametrize("agent", [TakesFirst(), PicksFirstAllowed()])
def test_run_episode__cut_short_by_a_wrapper__is_refused_after_as_many_steps(agent):
    steps = []
    env = gym.wrappers.TimeLimit(toy_env(horizon=5), 2)
    with pytest.raises(SettingError, match=r"'mine', episode seed 0, step 2: .*TimeLimit.* set horizon instead"):
        run_episode(env, agent, seed=0, name="mine", on_step=steps.append)
    assert set(steps) <= {0, 1}
    assert env.unwrapped.num_steps == 2
    whole = gym.wrappers.TimeLimit(toy_env(horizon=5), 5)  # which cuts nothing
    assert len(run_episode(whole, TakesFirst(), seed=0, name="mine").actions) == 5


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


@pytest.mark.parametrize(
    ("there", "space"),
    [
        (TopKScores, spaces.MultiBinary(32)),
        (TopKScores, spaces.Discrete(32)),
        (PickOne, spaces.MultiBinary(32)),
        (PickOne, spaces.Box(-1, 1, (32,))),
    ],
)
def test_fit_wrapper__wrapped_for_another_form__says_which_wrapper_to_leave_out(there, space):
    agent = TakesFirst()
    agent.action_space = space
    with pytest.raises(SettingError, match=f"the environment without {there.__name__}"):
        fit_wrapper(there(toy_env()), agent)


def test_fit_wrapper__another_action_space__says_which_fit():
    agent = TakesFirst()
    agent.action_space = spaces.MultiDiscrete([32] * 8)
    with pytest.raises(SettingError, match="MultiBinary, Box or Discrete"):
        fit_wrapper(toy_env(), agent)


# Agents that fail


class Returns:
    """An agent that returns the same thing every time, as an action or in place of the whole pair."""

    def __init__(self, action=None, space=None, **answer):
        self.action_space = space
        self.answer = answer.get("answer", (action, None))

    def predict(self, observation, state=None, episode_start=None, deterministic=True):
        return self.answer


BOX, DISCRETE = spaces.Box(-1, 1, (32,)), spaces.Discrete(32)


@pytest.mark.parametrize(
    ("agent", "returned", "expected"),
    [
        (Returns(np.ones(3)), r"float64 of shape \(3,\), \[1\. 1\. 1\.\]", r"expected \(32,\)"),
        (Returns(np.full(32, np.nan)), r"float64 of shape \(32,\), \[nan nan nan \.\.\. nan", "expected only 0 and 1"),
        (Returns(np.full(32, 0.5)), r"float64 of shape \(32,\)", "the action holds .*0.5"),
        (Returns(None), "NoneType None", "expected a number for each candidate"),
        (Returns("all of them"), "str 'all of them'", "expected a number for each candidate"),
        (Returns([[1, 0], [1]]), r"tuple \(\[\[1, 0\], \[1\]\], None\)", "expected a pair of a NumPy array"),
        (Returns(torch.ones(32, requires_grad=True)), "tuple", "requires grad"),
        (Returns(answer=np.ones(32)), r"float64 of shape \(32,\)", "expected a pair of a NumPy array and a state"),
        (Returns(answer=None), "NoneType None", "expected a pair"),
        (Returns(np.full(32, np.nan), BOX), r"float64 of shape \(32,\)", "the score of candidate 0 is NaN"),
        (Returns(np.zeros((1, 32)), BOX), r"float64 of shape \(1, 32\)", r"the scores have shape \(1, 32\)"),
        (Returns(np.int64(99), DISCRETE), "int64 .*99", "candidate 99 was picked; expected 0 to 31"),
        (Returns(2.5, DISCRETE), "float 2.5", "expected one whole number, the place of a candidate"),
        (Returns(np.array([3]), DISCRETE), r"int64 of shape \(1,\)", "expected one whole number"),
    ],
)
def test_run_episode__agent_that_returns_no_action__says_who_when_what_and_what_was_expected(agent, returned, expected):
    with pytest.raises(AgentError, match=f"(?s)^agent 'mine', episode seed 7, step 1: .*{returned}.*{expected}"):
        run_episode(toy_env(), agent, seed=7, name="mine")


class FailsLater:
    """Acts once, and then stumbles in a function of its own."""

    num_calls = 0

    def predict(self, observation, state=None, episode_start=None, deterministic=True):
        self.num_calls += 1
        if self.num_calls > 1:
            self.look_up(observation)
        return TakesFirst().predict(observation)

    def look_up(self, observation):
        return {}["nothing"]


def test_run_episode__agent_that_raises__shows_the_lines_of_its_own_that_failed():
    with pytest.raises(AgentError) as caught:
        run_episode(toy_env(), FailsLater(), seed=7, name="mine")
    message = str(caught.value)
    assert message.startswith("agent 'mine', episode seed 7, step 2: the agent's own code failed.\n  File ")
    assert message.endswith("KeyError: 'nothing'")
    assert re.findall(r"in (\w+)$", message, re.MULTILINE) == ["predict", "look_up"]
    assert 'return {}["nothing"]' in message
    assert isinstance(caught.value.__cause__, KeyError)


def test_run_episode__begin_that_raises__is_the_agents_too():
    agent = TakesFirst()
    agent.begin = lambda env, seed: [][0]
    with pytest.raises(AgentError, match=r"(?s)'mine', episode seed 7, begin: .*IndexError: list index out of range"):
        run_episode(toy_env(), agent, seed=7, name="mine")


class Raises(TakesFirst):
    def __init__(self, error):
        self.error = error

    def predict(self, *arguments, **options):
        raise self.error


def test_run_episode__errors_of_the_environment__pass_unchanged():
    error = DataError("line 3")
    with pytest.raises(DataError) as caught:
        run_episode(toy_env(), Raises(error), seed=0, name="mine")
    assert caught.value is error


def test_run_episode__action_that_the_agent_tried_in_vain__is_the_agents_fault():
    with pytest.raises(AgentError, match="ActionError: no such row"):
        run_episode(toy_env(), Raises(ActionError("no such row")), seed=0, name="mine")


def test_run_episode__interrupted__is_interrupted():
    with pytest.raises(KeyboardInterrupt):
        run_episode(toy_env(), Raises(KeyboardInterrupt()), seed=0, name="mine")


def test_agents_code__agent_needs_more_memory_than_there_is__says_what_to_make_smaller():
    told = r"agent x: .*Unable to allocate.*buffer_size"
    with pytest.raises(MemoryShortageError, match=told), agents_code("agent x"):
        np.empty(10**14)
