from __future__ import annotations

import json
import logging

import numpy as np
import pytest

from raise_env.agents.journal import Journal, JournaledEnv
from raise_env.agents.sb3 import Sb3Agent
from raise_env.testing import toy_env


class Counting(Exception):
    """Ends learning after so many steps."""


def journaled(path, **settings):
    env = JournaledEnv(toy_env(**settings), Journal(path))
    env.reset(seed=0)
    return env


def num_updates(env):
    return env.assets.learner.ledger.updates


def steps(env, seed, count, each=lambda: None):
    """Take random actions, over the ends of episodes, and return all that was answered."""
    rng = np.random.default_rng(seed)
    answers = [env.reset(seed=seed)[0]]
    for _ in range(count):
        observation, reward, over, _, info = env.step(rng.integers(2, size=32))
        answers += [observation, reward, over, {k: v for k, v in info.items() if not isinstance(v, np.ndarray)}]
        each()
        if over:
            answers.append(env.reset()[0])
    return answers


def assert_alike(here, there):
    assert len(here) == len(there)
    for a, b in zip(here, there, strict=True):
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


SETTINGS = {"horizon": 4, "budget": 1000}


@pytest.mark.parametrize("diverges_on", [None, 3])
@pytest.mark.parametrize("score_every", [1, 3])
def test_step__taken_again__answers_alike_without_training(tmp_path, diverges_on, score_every):
    settings = {**SETTINGS, "diverges_on": diverges_on, "score_every": score_every}
    plain = steps(toy_env(**settings), 5, 30)
    first = journaled(tmp_path / "steps", **settings)
    assert_alike(steps(first, 5, 20), steps(toy_env(**settings), 5, 20))
    again = journaled(tmp_path / "steps", **settings)
    states = []
    assert_alike(steps(again, 5, 30, lambda: states.append(again._learner.state)), plain)
    assert set(states[:18]) == {0.0}, "nothing was trained for what is known"
    assert len((tmp_path / "steps").read_text().splitlines()) == 30


def test_step__in_the_middle_of_an_episode__goes_on_from_the_same_model(tmp_path):
    first = journaled(tmp_path / "steps", **SETTINGS)
    steps(first, 5, 6)
    again = journaled(tmp_path / "steps", **SETTINGS)
    steps(again, 5, 6)
    assert again._learner.state == 0.0
    booked = num_updates(again)
    assert again.evaluate("dev").loss == first.evaluate("dev").loss
    assert again.snapshot().learner_state == first.snapshot().learner_state
    assert num_updates(again) == booked == num_updates(first), "what is made again is booked once"


def test_step__taken_again_by_another__is_learned_anew_from_there(tmp_path, caplog):
    steps(journaled(tmp_path / "steps", **SETTINGS), 5, 6)
    before = (tmp_path / "steps").read_text().splitlines()
    env = journaled(tmp_path / "steps", **SETTINGS)
    rng = np.random.default_rng(5)
    env.reset(seed=5)
    plain = toy_env(**SETTINGS)
    plain.reset(seed=5)
    for number in range(4):
        action = rng.integers(2, size=32) if number < 2 else np.ones(32, dtype=int)
        with caplog.at_level(logging.WARNING, logger="raise_env"):
            assert env.step(action)[1] == plain.step(action)[1]
    assert "step 3 of learning is another one" in caplog.text
    after = (tmp_path / "steps").read_text().splitlines()
    assert len(after) == 4
    assert after[:2] == before[:2]


@pytest.mark.parametrize("tear", [lambda text: text[:-9], lambda text: text + '{"step"', lambda text: text + "\0\xff"])
def test_journal__torn_at_the_end__is_good_up_to_there(tmp_path, tear):
    plain = steps(toy_env(**SETTINGS), 5, 12)
    steps(journaled(tmp_path / "steps", **SETTINGS), 5, 9)
    whole = (tmp_path / "steps").read_text()
    (tmp_path / "steps").write_text(tear(whole), encoding="latin-1")
    assert Journal(tmp_path / "steps").num_left in (8, 9)
    assert_alike(steps(journaled(tmp_path / "steps", **SETTINGS), 5, 12), plain)
    assert len([json.loads(line) for line in (tmp_path / "steps").read_text().splitlines()]) == 12


@pytest.mark.parametrize("line", ["[]", "{}", '{"step": "a", "outcome": {}, "booked": {"x": 1}}'])
def test_journal__a_line_that_is_none_of_ours__ends_it(tmp_path, line):
    (tmp_path / "steps").write_text(line + "\n")
    assert Journal(tmp_path / "steps").num_left == 0
    assert (tmp_path / "steps").read_text() == ""


def test_restore__after_steps_that_were_taken_again__needs_no_catching_up(tmp_path):
    steps(journaled(tmp_path / "steps", **SETTINGS), 5, 3)
    env = journaled(tmp_path / "steps", **SETTINGS)
    moment = env.snapshot()
    steps(env, 5, 3)
    env.restore(moment)
    assert env.snapshot().learner_state == moment.learner_state == 0.0


ALGORITHMS = {
    "PPO": {"n_steps": 7, "batch_size": 7, "n_epochs": 2},
    "A2C": {"n_steps": 3},
    "DQN": {"learning_starts": 8, "batch_size": 4},
    "SAC": {"learning_starts": 8, "batch_size": 4},
    "TD3": {"learning_starts": 8, "batch_size": 4},
    "ARS": {"n_delta": 2},
    "RecurrentPPO": {"n_steps": 8, "batch_size": 8, "n_epochs": 2},
    "MaskablePPO": {"n_steps": 16, "batch_size": 16, "n_epochs": 2},
}


def learned(env, algorithm, stop_after=None):
    """Return the weights after six episodes, or after it was interrupted."""
    agent = Sb3Agent(algorithm, **ALGORITHMS[algorithm])
    if stop_after is not None:
        left = [stop_after]
        step = env.step

        def counted(action):
            if not left[0]:
                raise Counting
            left[0] -= 1
            return step(action)

        env.step = counted
    returns = []
    agent.learn(env, 6, seed=3, progress=lambda _number, total: returns.append(total))
    return {name: value.numpy().copy() for name, value in agent.model.policy.state_dict().items()}, returns


#: The two kinds of algorithms; the others take a while.
QUICK = ("A2C", "DQN")


@pytest.mark.parametrize(
    "algorithm", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS]
)
def test_learn__any_algorithm_interrupted_twice__ends_with_the_same_weights(tmp_path, algorithm):
    settings = {"horizon": 5, "num_candidates": 8, "batch_size": 2}
    weights, returns = learned(toy_env(**settings), algorithm)
    for stop_after in (3, 13):
        with pytest.raises(Counting):
            learned(journaled(tmp_path / "steps", **settings), algorithm, stop_after)
    again, returns_again = learned(journaled(tmp_path / "steps", **settings), algorithm)
    assert returns_again == returns
    for name, value in weights.items():
        assert np.array_equal(again[name], value), name
