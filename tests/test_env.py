from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import inspect
import json
import math
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import textwrap
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3

import raise_env
from raise_env import EnvConfig, PickOne, RaiseSelectEnv, TopKScores, assets
from raise_env.config import ENV_IDS
from raise_env.env import Snapshot, StepOutcome, step_together
from raise_env.errors import ActionError, MemoryShortageError, ModelError, SettingError
from raise_env.features import CLIP, FEATURE_NAMES
from raise_env.record import EpisodeRecord
from raise_env.rewards import DIVERGENCE_PENALTY
from raise_env.testing import FakeLearner, ToyAssets, toy_env
from raise_env.vector import RaiseSelectVectorEnv

MODES = (None, "ansi", "rgb_array")
WRAPPERS = {"none": lambda env: env, "top-k": TopKScores, "pick one": PickOne}


def numbers(env, count=4, seed=0):
    """Some 0/1 actions."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 2, env.action_space.n).astype(np.int8) for _ in range(count)]


def first_rows(env, count):
    action = np.zeros(env.action_space.n, dtype=np.int8)
    action[np.flatnonzero(env.action_masks())[:count]] = 1
    return action


def trace(env, actions):
    """Everything that the steps return, in a form that compares by ==, to the bit."""
    seen = []
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        plain = {k: v.tobytes() if isinstance(v, np.ndarray) else v for k, v in info.items()}
        seen.append((observation.tobytes(), reward, terminated, truncated, plain))
    return seen


def moment_of(env):
    """All that makes up the present state, in a form that compares by ==."""
    moment = env.snapshot()
    history = [(id(step), step.selected.tobytes()) for step in moment.history]
    values = (moment.generator_state, moment.num_steps, moment.num_spent, moment.dev_scores, moment.is_over)
    return id(moment.learner_state), id(moment.round), moment.counts.tobytes(), history, values


@pytest.fixture(scope="module", autouse=True)
def _toy_id():
    """An id for the toy world: the checkers make their own environments by the spec."""
    gym.register("RaiseSelectToy-v0", entry_point="raise_env.testing:toy_env")
    yield
    del gym.registry["RaiseSelectToy-v0"]


@pytest.fixture
def env():
    world = toy_env(budget=400)
    world.reset(seed=1)
    return world


def in_new_process(code):
    """Run code in a fresh interpreter, warnings being errors, and return what it prints."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# The checkers of Gymnasium and Stable-Baselines3


@pytest.mark.filterwarnings("ignore:.* is different from the unwrapped version")  # wrapped, as is meant
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_check_env__toy__has_nothing_to_say(wrapper, mode):
    env = wrapper(gym.make("RaiseSelectToy-v0", render_mode=mode).unwrapped)
    check_env(env)


# Stable-Baselines3 takes an observation of two dimensions for a half-finished picture; its policies flatten it.
@pytest.mark.filterwarnings("ignore:Your observation .* has an unconventional shape")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_sb3_check_env__toy__has_nothing_to_say(wrapper, mode):
    check_env_for_sb3(wrapper(toy_env(render_mode=mode)), warn=True, skip_render_check=False)


@pytest.mark.filterwarnings("ignore:.* is different from the unwrapped version")
@pytest.mark.filterwarnings("ignore:Your observation .* has an unconventional shape")
@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_check_env__embedded_model__has_nothing_to_say(wrapper, small_settings):
    env = wrapper(gym.make("RaiseSelect-v0", **small_settings).unwrapped)
    check_env(env, skip_render_check=True)  # drawing needs no model: the toy's pictures are checked above
    check_env_for_sb3(env)


# What is known before anything is loaded


def test_docstring__arguments__are_the_settings_with_their_defaults():
    table = (RaiseSelectEnv.__doc__ or "").partition("## Arguments")[2].partition("## Information")[0]
    lines = [line.strip().strip("|") for line in table.splitlines() if line.strip().startswith("|")]
    rows = [[cell.strip() for cell in line.split(" | ")] for line in lines[2:]]
    assert [name for name, _, _ in rows] == [entry.name for entry in dataclasses.fields(EnvConfig)]
    for name, default, meaning in rows:
        assert EnvConfig.from_kwargs({name: ast.literal_eval(default)}) == EnvConfig(), name
        assert len(meaning) > 10, name


def test_init__any_settings__loads_nothing(monkeypatch):
    monkeypatch.setattr("raise_env.assets.load_assets", lambda _: pytest.fail("assets were loaded"))
    env = RaiseSelectEnv(render_mode="rgb_array", model="no such/model", num_candidates=8)
    assert env.observation_space.shape == (8, 39)
    assert env.action_space.n == 8
    env.close()


def test_init__unknown_keyword__suggests_the_nearest():
    with pytest.raises(SettingError, match="did you mean 'horizon'"):
        gym.make("RaiseSelect-v0", horizont=3)


def test_feature_names__as_in_the_paper__name_the_columns():
    names = toy_env().feature_names
    assert names == FEATURE_NAMES
    assert len(names) == 39
    assert names[:6] == (
        "dev_score",
        "progress",
        "prompt_length",
        "response_length",
        "log_p_response_given_prompt",
        "log_p_response",
    )
    assert names[6:38] == tuple(f"semantic_{i}" for i in range(32))
    assert names[38] == "times_selected"


def test_spec__made_by_id__survives_json(small_settings):
    env = gym.make("RaiseSelect-v0", **small_settings, lora={"r": 4, "target_modules": ["q_proj"]})
    spec = json.loads(env.spec.to_json())
    assert spec["id"] == "RaiseSelect-v0"
    assert spec["kwargs"]["lora"] == {"r": 4, "target_modules": ["q_proj"]}
    assert gym.spec("RaiseSelect-v0").max_episode_steps is None
    assert not gym.spec("RaiseSelect-v0").nondeterministic


@pytest.mark.parametrize(("env_id", "task"), ENV_IDS.items())
def test_ids__of_every_task__make_it_with_its_settings(env_id, task):
    env = gym.make(env_id).unwrapped
    assert env.config == EnvConfig.from_kwargs({"task": task})
    assert gym.make(env_id, task="noise-90", horizon=7).unwrapped.config.task == "noise-90"
    assert json.loads(gym.make(f"raise_env:{env_id}").spec.to_json())["kwargs"].get("task", "default") == task
    assert gym.spec(env_id).vector_entry_point == "raise_env.vector:RaiseSelectVectorEnv"


@pytest.mark.filterwarnings("ignore:.* is different from the unwrapped version")
@pytest.mark.parametrize("env_id", [env_id for env_id in ENV_IDS if env_id != "RaiseSelect-v0"])
def test_check_env__id_of_a_task__has_nothing_to_say(env_id, small_settings):
    check_env(gym.make(env_id, **small_settings).unwrapped, skip_render_check=True)


def test_make_vec__id_of_a_task__is_a_vector_of_it(small_settings):
    vector = gym.make_vec("RaiseSelect/Shift-v0", num_envs=2, **small_settings)
    assert isinstance(vector, RaiseSelectVectorEnv)
    assert [env.unwrapped.config.task for env in vector.envs] == ["shift", "shift"]
    vector.reset(seed=0)
    vector.close()


def test_env__stable_baselines__is_no_goal_environment():
    assert not hasattr(toy_env(), "compute_reward")


def test_import__fresh_process__loads_no_torch_and_makes_the_id():
    out = in_new_process(
        """
        import sys
        import gymnasium as gym
        env = gym.make("raise_env:RaiseSelect-v0")
        import raise_env
        raise_env.TopKScores
        env.close()
        print([name for name in ("torch", "transformers", "peft", "datasets", "sklearn") if name in sys.modules])
        """
    )
    assert out == "[]"


def test_package__names_and_attributes__are_what_it_says():
    for name in raise_env.__all__:
        assert getattr(raise_env, name) is not None
    assert set(raise_env.__all__) <= set(dir(raise_env))
    with pytest.raises(AttributeError, match="no_such_name"):
        raise_env.no_such_name  # noqa: B018


# Observation


def test_observation__whole_episode__lies_in_its_space_and_is_new_each_time(env):
    observation, info = env.reset(seed=3)
    seen = [(observation, info)]
    for action in numbers(env):
        observation, _, _, _, info = env.step(action)
        seen.append((observation, info))
    for observation, _ in seen:
        assert observation.dtype == np.float32
        assert observation in env.observation_space
        assert np.isfinite(observation).all()
    arrays = [v for o, i in seen for v in (o, *i.values()) if isinstance(v, np.ndarray)]
    inner = [env.candidates, env.observation(), env.action_masks(), env.assets.features.columns, env.assets.classes]
    for place, array in enumerate([*arrays, *inner]):
        assert not any(np.shares_memory(array, other) for other in [*arrays, *inner][:place])


def test_observation__written_into_by_the_caller__changes_nothing_inside(env):
    before = env.observation()
    spoilt, info = env.observation(), env.reset(seed=1)[1]
    spoilt[:] = 7
    for value in info.values():
        if isinstance(value, np.ndarray):
            value[:] = False
    env.candidates[:] = 0
    np.testing.assert_array_equal(env.observation(), before)
    assert env.action_masks().all()


def test_observation__columns__hold_what_their_names_say(env):
    columns = {name: place for place, name in enumerate(env.feature_names)}
    first = env.observation()
    assert (first[:, columns["dev_score"]] == 0).all()
    assert (first[:, columns["progress"]] == 0).all()
    assert (first[:, columns["times_selected"]] == 0).all()
    np.testing.assert_array_equal(first[:, 2:38], env.assets.features.columns[env.candidates])
    for _ in range(3):
        env.step(np.ones(32, dtype=np.int8) * (env.num_steps != 1))
    later = env.observation()
    gain = (env.dev_scores[-1] - env.dev_scores[0]) / abs(env.dev_scores[0])
    np.testing.assert_allclose(later[:, columns["dev_score"]], gain, rtol=1e-6)
    np.testing.assert_allclose(later[:, columns["progress"]], 0.3, rtol=1e-6)
    taken = np.concatenate([step.selected for step in env.history])
    times = [(taken == row).sum() for row in env.candidates]
    np.testing.assert_allclose(later[:, columns["times_selected"]], np.log1p(times), rtol=1e-6)
    assert max(times) > 0


def test_observation__score_and_counts_beyond_the_bounds__are_clipped(env):
    env.step(np.ones(32))
    env._dev_scores[-1] = -1000.0
    env._counts[:] = 1000
    observation = env.observation()
    assert (observation[:, 0] == -CLIP).all()
    assert (observation[:, -1] == CLIP).all()
    assert observation in env.observation_space


def test_observation__blocks_hidden__are_zeros_and_the_offers_as_before():
    seen, hidden = toy_env(), toy_env(hide=["stage", "semantic"])
    for env in (seen, hidden):
        env.reset(seed=0)
        env.step(np.ones(32))
    np.testing.assert_array_equal(hidden.candidates, seen.candidates)
    assert hidden.dev_scores == seen.dev_scores
    np.testing.assert_array_equal(
        hidden.observation()[:, [*range(2, 6), 38]], seen.observation()[:, [*range(2, 6), 38]]
    )
    assert not hidden.observation()[:, [0, 1, *range(6, 38)]].any()
    assert not hidden.fork(1)[0].observation()[:, :2].any()
    assert hidden.observation().any(axis=1).all(), "no row looks like padding"


def test_candidates__each_step__are_new_and_class_by_class(env):
    offers = []
    for _ in range(5):
        np.testing.assert_array_equal(env.candidate_classes, np.repeat(np.arange(4), 8))
        np.testing.assert_array_equal(env.assets.classes[env.candidates], env.candidate_classes)
        assert len(set(env.candidates)) == 32
        offers.append(tuple(env.candidates))
        env.step(numbers(env)[0])
    assert len(set(offers)) == 5


def test_candidates__class_too_small__are_padded_with_rows_that_are_forbidden():
    env = toy_env(num_rows=20)
    observation, info = env.reset(seed=0)
    padding = env.candidates < 0
    assert padding.sum() == 12
    np.testing.assert_array_equal(info["action_mask"], ~padding)
    np.testing.assert_array_equal(env.action_masks(), ~padding)
    assert (observation[padding] == 0).all()
    assert (env.candidate_classes == np.repeat(np.arange(4), 8)).all()
    _, reward, _, _, info = env.step(padding.astype(np.int8))
    assert (reward, info["num_selected"], info["num_dropped"]) == (0.0, 0, 0)


def test_candidates__all__are_the_whole_pool():
    env = toy_env(num_rows=31, num_candidates="all", batch_size=31)
    assert env.action_space.n == 31
    env.reset(seed=0)
    assert sorted(env.candidates) == list(range(31))
    np.testing.assert_array_equal(env.assets.classes[env.candidates], env.candidate_classes)
    np.testing.assert_array_equal(np.sort(env.candidate_classes), env.candidate_classes)
    _, _, _, _, info = env.step(np.ones(31, dtype=np.int8))
    assert info["num_selected"] == 31


def test_candidates__all_with_rows_that_cannot_be_trained_on__end_in_padding():
    assets = ToyAssets.build(30, 4, seed=0)
    members = tuple(ids[ids != 7] for ids in assets.members)
    env = RaiseSelectEnv(None, dataclasses.replace(assets, members=members), num_candidates="all")
    env.reset(seed=0)
    assert env.candidates[-1] == -1
    assert sorted(env.candidates[:-1]) == [row for row in range(30) if row != 7]


def test_observation__whole_pool_on_offer__static_columns_are_gathered_once():
    assets = ToyAssets.build(30, 4, seed=0)
    asked = []
    rows = assets.features.rows
    assets.features.rows = lambda ids: asked.append(len(ids)) or rows(ids)
    env = RaiseSelectEnv(None, assets, num_candidates="all", hide=["stage"])
    for seed in (0, 1):
        first, _ = env.reset(seed=seed)
        for _ in range(3):
            seen = env.step(first_rows(env, 2))[0]
            assert not np.shares_memory(seen, first)
            np.testing.assert_array_equal(seen[:, :38], first[:, :38])
        assert not first[:, 38].any()
        assert seen[:2, 38].all()
    assert asked == [30]


# Action


@pytest.mark.parametrize("kind", [np.int8, np.int64, bool, np.float32, list], ids=str)
def test_step__any_zeros_and_ones__are_legal(env, kind):
    for action in [np.zeros(32), np.ones(32), *numbers(env, 3)]:
        given = [int(bit) for bit in action] if kind is list else action.astype(kind)
        offered = env.candidates
        _, _, _, _, info = env.step(given)
        np.testing.assert_array_equal(
            info["selected"][: info["num_selected"]], offered[action == 1][: info["num_selected"]]
        )
        if env._is_over:
            env.reset()


def test_step__vector_sampled_action__is_legal(env):
    space = gym.vector.utils.batch_space(env.action_space, 3)
    for action in space.sample():
        env.step(action)
        env.reset()


def test_step__none_chosen__earns_nothing_and_counts(env):
    before = env.dev_scores[-1]
    _, reward, terminated, _, info = env.step(np.zeros(32, dtype=np.int8))
    assert (reward, terminated, info["num_selected"], info["dev_score"]) == (0.0, False, 0, before)
    assert "train_loss" not in info
    assert (info["selected"] == -1).all()
    assert env.num_steps == 1
    assert env.budget_left == env.config.total_budget
    assert env.ledger.updates == 0


def test_step__more_than_the_budget_left__drops_a_seeded_random_part():
    kept = []
    for seed in (0, 1, 1):
        env = toy_env(budget=20, batch_size=8)
        env.reset(seed=seed)
        env.step(first_rows(env, 12))
        offered = env.candidates
        _, _, terminated, _, info = env.step(np.ones(32, dtype=np.int8))
        assert (info["num_selected"], info["num_dropped"], info["budget_left"]) == (8, 24, 0)
        assert terminated
        chosen = info["selected"][:8]
        assert (info["selected"][8:] == -1).all()
        places = [list(offered).index(row) for row in chosen]
        assert places == sorted(places), "the rows that are kept stay in their order"
        kept.append(places)
    assert kept[1] == kept[2]
    assert kept[0] != kept[1]
    assert kept[0] != list(range(8)), "the first rows have no privilege"


@pytest.mark.parametrize("action", [np.ones(31), np.ones((1, 32)), 1, np.ones(0)], ids=str)
def test_step__wrong_shape__says_which_is_right(env, action):
    with pytest.raises(ActionError, match=r"expected \(32,\)"):
        env.step(action)


@pytest.mark.parametrize("odd", [2, -1, 0.5, np.nan])
def test_step__something_other_than_0_and_1__is_named(env, odd):
    action = np.zeros(32)
    action[3] = odd
    with pytest.raises(ActionError, match=str(odd)):
        env.step(action)
    assert env.num_steps == 0


# Reward and end


def test_reward__whole_episode__adds_up_to_the_gain_in_dev_score(env):
    rewards, over = [], False
    while not over:
        _, reward, over, truncated, info = env.step(numbers(env, 1, seed=env.num_steps)[0] * (env.num_steps % 3 != 1))
        assert type(reward) is float
        assert type(over) is bool
        assert truncated is False
        assert info["dev_score"] == env.dev_scores[-1]
        rewards.append(reward)
    assert len(rewards) == env.num_steps == len(env.history)
    assert sum(rewards) == pytest.approx(env.dev_scores[-1] - env.dev_scores[0], abs=1e-12)
    assert [step.reward for step in env.history] == rewards
    assert rewards == pytest.approx(np.diff(env.dev_scores).tolist())


def test_score_every__steps_between__earn_nothing_and_the_scored_one_the_whole_gain(monkeypatch):
    def episode(**settings):
        env = toy_env(horizon=5, budget=400, **settings)
        env.reset(seed=1)
        # Nothing is taken at the end: there is nothing new to score.
        infos = [env.step(first_rows(env, 3 * (step < 4)))[4] for step in range(5)]
        assert [info["dev_score"] for info in infos] == env.dev_scores[1:]
        return env.dev_scores

    often = episode()
    calls, evaluate = [], FakeLearner.evaluate
    monkeypatch.setattr(FakeLearner, "evaluate", lambda self, split: calls.append(split) or evaluate(self, split))
    assert episode(score_every=2) == [often[0], often[0], often[2], often[2], often[4], often[4]]
    assert calls == ["dev", "dev", "dev", "test"], "the first of them is the toy's own, before training"


def test_score_every__end_of_the_episode__is_always_scored():
    for settings in ({"horizon": 3}, {"horizon": 9, "budget": 12}):
        env = toy_env(score_every=99, **settings)
        env.reset(seed=0)
        rewards = [env.step(first_rows(env, 4))[1] for _ in range(3)]
        assert rewards[:2] == [0, 0]
        assert rewards[2] == env.dev_scores[-1] - env.dev_scores[0] != 0
    env = toy_env(score_every=2, horizon=3)
    env.reset(seed=0)
    env.step(first_rows(env, 4))
    moment = env.snapshot()
    env.step(first_rows(env, 4))
    env.restore(moment)
    assert env.step(np.zeros(32))[1] != 0, "a snapshot remembers what is not scored yet"


def test_end__at_the_horizon__terminates(env):
    flags = [env.step(first_rows(env, 1))[2:4] for _ in range(10)]
    assert flags == [(False, False)] * 9 + [(True, False)]


def test_end__horizon_of_one__terminates_at_once():
    env = toy_env(horizon=1)
    env.reset(seed=0)
    assert env.step(np.ones(32, dtype=np.int8))[2:4] == (True, False)


def test_end__at_the_budget__terminates():
    env = toy_env(budget=10)
    env.reset(seed=0)
    assert env.step(first_rows(env, 9))[2] is False
    assert env.step(first_rows(env, 1))[2] is True


def test_end__loss_not_finite__earns_the_penalty_and_goes_on_after_reset():
    env = toy_env(num_rows=32, diverges_on=5)
    env.reset(seed=0)
    env.step((env.candidates == 6).astype(np.int8))
    observation, reward, terminated, truncated, info = env.step((env.candidates == 5).astype(np.int8))
    assert (reward, terminated, truncated, info["diverged"]) == (DIVERGENCE_PENALTY, True, False, True)
    assert "test_score" not in info
    assert "train_loss" not in info
    assert observation in env.observation_space
    assert np.isfinite(env.dev_scores).all()
    _, info = env.reset(seed=0)
    assert info["diverged"] is False
    assert env.step((env.candidates == 6).astype(np.int8))[1] != 0


def test_test_score__only_on_the_last_step__is_the_score_of_the_test_set():
    env = toy_env(horizon=3)
    _, info = env.reset(seed=0)
    infos = [info, *[env.step(first_rows(env, 2))[4] for _ in range(3)]]
    assert ["test_score" in info for info in infos] == [False, False, False, True]
    assert infos[-1]["test_score"] == -env.evaluate("test").loss
    without = toy_env(horizon=1, has_test=False)
    without.reset(seed=0)
    assert "test_score" not in without.step(first_rows(without, 1))[4]
    with pytest.raises(ValueError, match="'test'"):
        without.evaluate("test")


@pytest.mark.parametrize("make", [toy_env, RaiseSelectEnv])
def test_assets_without_test__all_but_the_test_score__is_the_same(make, small_settings):
    settings = {"horizon": 2, "num_candidates": 16} if make is toy_env else small_settings
    env = make(**settings)
    env.reset(seed=3)
    other = RaiseSelectEnv(assets=env.assets.without_test(), **settings)
    other.reset(seed=3)
    before = env.ledger.test_tokens
    for step in range(1, settings["horizon"] + 1):
        (observation, *scored), (same, *unscored) = other.step(first_rows(other, 2)), env.step(first_rows(env, 2))
        np.testing.assert_array_equal(observation, same)
        assert scored[:2] == unscored[:2]
        assert ("test_score" in scored[-1], "test_score" in unscored[-1]) == (False, step == settings["horizon"])
    if make is RaiseSelectEnv:
        assert other.ledger is env.ledger
        assert env.ledger.test_tokens - before == env.assets.learner.splits["test"].num_tokens()
    with pytest.raises(ValueError, match="'test'"):
        other.evaluate("test")


def test_assets_without_test__what_was_worked_out__is_shared(small_settings):
    assets = RaiseSelectEnv(**small_settings).assets
    members, answers = assets.members, assets.base_answers
    other = assets.without_test()
    assert other.members is members
    assert other.base_answers is answers
    assert (assets.has_test, other.has_test) == (True, False)
    assert (assets.data.test is None, other.data.test is None) == (False, True)


def test_step__before_reset_or_after_the_end__asks_for_a_reset():
    env = toy_env(horizon=1)
    for call in (lambda: env.step(np.zeros(32)), env.snapshot, env.observation, env.action_masks, lambda: env.fork(1)):
        with pytest.raises(ResetNeeded, match="reset"):
            call()
    env.reset(seed=0)
    env.step(np.zeros(32))
    for call in (lambda: env.step(np.zeros(32)), lambda: env.probe(np.zeros((1, 32)))):
        with pytest.raises(ResetNeeded, match="over"):
            call()
    env.reset()
    env.step(np.zeros(32))


def test_close__twice_and_before_use__is_fine(env):
    toy_env().close()
    env.close()
    env.close()
    with pytest.raises(ResetNeeded):
        env.step(np.zeros(32))
    env.reset(seed=0)
    env.step(np.ones(32))


# Info


def test_info__every_step__is_flat_finite_and_of_one_form(env):
    kinds = {
        "candidates": np.ndarray,
        "action_mask": np.ndarray,
        "selected": np.ndarray,
        "num_selected": int,
        "num_dropped": int,
        "dev_score": float,
        "budget_left": int,
        "diverged": bool,
    }
    infos = [env.reset(seed=0)[1], *[env.step(action)[4] for action in numbers(env)]]
    for place, info in enumerate(infos):
        wanted = kinds if place == 0 else {**kinds, "train_loss": float}
        assert {name: type(value) for name, value in info.items()} == wanted
        assert info["candidates"].shape == info["selected"].shape == info["action_mask"].shape == (32,)
        assert (info["candidates"].dtype, info["selected"].dtype, info["action_mask"].dtype) == (
            np.int64,
            np.int64,
            bool,
        )
        assert np.isfinite([value for value in info.values() if isinstance(value, float)]).all()
        assert not any(name.startswith("_") or name in ("episode", "final_obs", "final_info") for name in info)


def test_info__after_a_step__speaks_of_that_step(env):
    offered, action = env.candidates, first_rows(env, 5)
    _, _, _, _, info = env.step(action)
    np.testing.assert_array_equal(info["selected"][:5], offered[:5])
    np.testing.assert_array_equal(info["candidates"], env.candidates)
    assert info["num_selected"] == 5
    assert info["budget_left"] == env.config.total_budget - 5
    assert info["train_loss"] == pytest.approx(2.0), "the loss before the update"


# Randomness


def test_episode__same_seed_and_actions__is_the_same_to_the_bit():
    traces = []
    for seed in (5, 5, 6):
        env = toy_env()
        observation, _ = env.reset(seed=seed)
        traces.append((observation.tobytes(), trace(env, numbers(env))))
    assert traces[0] == traces[1]
    assert traces[0] != traces[2]


def test_episode__whatever_was_done_before__sees_the_same_candidates():
    one, other = toy_env(), toy_env()
    one.reset(seed=4)
    other.reset(seed=4)
    for step in range(5):
        one.step(np.zeros(32))
        other.step(first_rows(other, 1 + step))
        np.testing.assert_array_equal(one.candidates, other.candidates)
    one.reset()
    other.reset()
    np.testing.assert_array_equal(one.candidates, other.candidates)


def test_reset__without_seed__goes_on_with_new_candidates(env):
    first = env.candidates
    env.reset()
    assert (env.candidates != first).any()


def global_states():
    numpy_state = np.random.get_state()  # noqa: NPY002 - it is the old global generator that must not be touched
    return random.getstate(), numpy_state[1].tobytes(), numpy_state[2], torch.get_rng_state().numpy().tobytes()


def test_global_generators__whole_episode__stand_untouched(embedded_env):
    before = global_states()
    # A seed of its own, so that loading is part of what is watched.
    env = embedded_env(seed_model=123, auxiliary_updates=3)
    env.reset(seed=0)
    env.step(first_rows(env, 4))
    env.probe(np.stack([first_rows(env, 4)] * 2))
    env.fork(1)[0].step(first_rows(env, 2))
    assert global_states() == before


def episode_digest(**settings):
    import hashlib

    import gymnasium as gym
    import numpy as np

    env = gym.make("raise_env:RaiseSelect-v0", **settings).unwrapped
    digest = hashlib.sha256(env.reset(seed=11)[0].tobytes())
    rng = np.random.default_rng(0)
    over = False
    while not over:
        observation, reward, over, _, info = env.step(rng.integers(0, 2, 16))
        digest.update(observation.tobytes())
        digest.update(repr((reward, info.get("train_loss"), info.get("test_score"))).encode())
    return digest.hexdigest()


def test_episode__another_process_and_an_empty_cache__is_the_same_to_the_bit(tmp_path, small_settings):
    here = episode_digest(**small_settings)
    settings = {**small_settings, "cache_dir": str(tmp_path)}
    code = f"{inspect.getsource(episode_digest)}\nprint(episode_digest(**{settings!r}))"
    assert in_new_process(code) == here


# Moments of an episode


#: Environments that share a base model and some that do not; two draw from torch's generator, one computes as it goes.
NEIGHBOURS = [
    {},
    {"seed_model": 1},
    {"lora": {"lora_dropout": 0.1}},
    {"lora": {"lora_dropout": 0.2, "r": 4}},
    {"lazy_features": True},
]


def played(env):
    """All that two episodes show."""
    seen = []
    for seed in range(2):
        observation, _ = env.reset(seed=seed)
        seen += [observation.tobytes(), trace(env, numbers(env, count=3, seed=seed))]
    return seen


@contextlib.contextmanager
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
        assert torch.get_default_dtype() == torch.float64, "it is put back"
    finally:
        torch.set_default_dtype(torch.float32)


TORCH_MODES = {
    "autocast": lambda: torch.autocast("cpu"),
    "inference": torch.inference_mode,
    "float64": float64_by_default,
}


@pytest.fixture
def looked_at(embedded_env, tmp_path, monkeypatch):
    """A function that returns, to the bit, all that an environment shows whose model and features are made anew."""

    def look(name, **settings):
        assets._cached_assets.cache_clear()
        monkeypatch.setattr(assets, "_BASES", weakref.WeakValueDictionary())
        env = embedded_env(cache_dir=str(tmp_path / name), **settings)
        shown = [env.reset(seed=1)[0].tobytes(), env.dev_scores]
        actions, rows = np.array(numbers(env, 2)), np.arange(3)
        shown += [env.probe(actions).tolist(), env.row_losses(rows).tolist(), env.row_gradients(rows).tobytes()]
        shown += [env.dev_direction(num_updates).tobytes() for num_updates in (0, 1)]
        shown += [trace(env, actions), env.evaluate("test").row_losses.tolist()]
        for folder, save in (("adapter", env.save_adapter), ("auxiliary", env.assets.save_auxiliary)):
            (tmp_path / name / folder).mkdir()
            save(tmp_path / name / folder)
            shown.append((tmp_path / name / folder / "adapter_model.safetensors").read_bytes())
        return shown

    yield look
    assets._cached_assets.cache_clear()


@pytest.mark.parametrize("mode", TORCH_MODES)
@pytest.mark.parametrize("settings", [{}, {"lazy_features": True}], ids=str)
def test_episode__caller_in_a_mode_of_torch__is_the_same_to_the_bit(looked_at, mode, settings):
    wanted = looked_at("plain", **settings)
    with TORCH_MODES[mode]():
        assert looked_at("in a mode", **settings) == wanted


def test_step__caller_in_a_mode_of_torch__states_can_be_gone_on_with_outside(embedded_env):
    env = embedded_env()
    env.reset(seed=1)
    actions = numbers(env, 2)
    with torch.inference_mode():
        (fork,) = env.fork(1)
        fork.step(actions[0])
    wanted = trace(env, actions)[1:]
    assert trace(fork, actions[1:]) == wanted


@pytest.fixture
def neighbours(embedded_env, tmp_path):
    """A function that makes such environments, with nothing loaded and nothing in the cache."""

    def make(name):
        assets._cached_assets.cache_clear()
        return [embedded_env(cache_dir=str(tmp_path / name), **settings) for settings in NEIGHBOURS]

    yield make
    assets._cached_assets.cache_clear()


def test_episode__other_environments_in_threads__is_what_it_is_alone_to_the_bit(neighbours):
    """They load at the same time, too."""
    with ThreadPoolExecutor(len(NEIGHBOURS)) as pool:
        together = list(pool.map(played, neighbours("together")))
    for found, env in zip(together, neighbours("alone"), strict=True):
        assert found == played(env)


def test_load__threads_that_want_the_same__get_the_same(neighbours, embedded_env, tmp_path):
    neighbours("empty")
    envs = [embedded_env(cache_dir=str(tmp_path / "one")) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda env: env.load(), envs))
    assert len({id(found) for found in loaded}) == 1


def held():
    """Threads, child processes and, where the system tells, open files of this process."""
    files = os.listdir("/proc/self/fd") if sys.platform == "linux" else []
    return threading.active_count(), len(multiprocessing.active_children()), len(files)


def test_close__after_an_episode__leaves_no_thread_process_or_file(small_settings):
    RaiseSelectEnv(**small_settings).load()
    before, torch_threads = held(), torch.get_num_threads()
    vector = gym.make_vec("RaiseSelect-v0", num_envs=2, **small_settings)
    torch.set_num_threads(2)  # so that passes go side by side
    try:
        vector.reset(seed=0)
        vector.step(np.tile([1, 0, 0, 0], (2, 4)))
        vector.close()
    finally:
        torch.set_num_threads(torch_threads)
    assert held() == before


def test_restore__after_other_steps__continues_to_the_bit(env):
    actions = numbers(env, 4)
    env.step(actions[0])
    moment, shown = env.snapshot(), env.observation()
    wanted = trace(env, actions[1:])
    for _ in range(3):
        env.step(np.ones(32))
    env.reset(seed=99)
    env.restore(moment)
    np.testing.assert_array_equal(env.observation(), shown)
    assert env.num_steps == 1
    assert trace(env, actions[1:]) == wanted
    env.restore(moment)
    assert trace(env, actions[1:]) == wanted, "a snapshot can be used twice"


def test_restore__into_a_new_environment__continues_to_the_bit(env):
    env.step(numbers(env)[0])
    moment = env.snapshot()
    wanted = trace(env, numbers(env, 3))
    other = toy_env(budget=400)
    other.restore(moment)
    assert trace(other, numbers(env, 3)) == wanted


def test_restore__embedded_model__continues_to_the_bit(embedded_env):
    env = embedded_env()
    env.reset(seed=2)
    actions = numbers(env, 3)
    env.step(actions[0])
    moment = env.snapshot()
    wanted = trace(env, actions[1:])
    env.reset(seed=3)
    env.step(actions[2])
    env.restore(moment)
    assert trace(env, actions[1:]) == wanted


def test_restore__end_of_an_episode__is_still_its_end():
    env = toy_env(horizon=1)
    env.reset(seed=0)
    env.step(np.ones(32))
    moment = env.snapshot()
    env.reset()
    env.restore(moment)
    with pytest.raises(ResetNeeded):
        env.step(np.ones(32))


OTHER_FORMS = {
    "num_candidates": ({"num_candidates": 16}, "num_candidates 32, and this one has 16"),
    "pool": ({"num_rows": 100}, "pool rows 200, and this one has 100"),
    "horizon": ({"horizon": 5, "budget": 80}, "horizon 10, and this one has 5"),
    "budget": ({"budget": 40}, "budget 80, and this one has 40"),
    "reward": ({"reward": "exact_match"}, "reward 'loss', and this one has 'exact_match'"),
    "num_classes": ({"num_classes": 8}, "num_classes 4, and this one has 8"),
    "max_length": ({"max_length": 128}, "max_length 256, and this one has 128"),
    "template": ({"template": "{{ prompt }}"}, r"template hash '\w{12}', and this one has '\w{12}'"),
}


@pytest.mark.parametrize(("settings", "words"), OTHER_FORMS.values(), ids=OTHER_FORMS)
def test_restore__moment_of_another_form__is_refused_and_nothing_moves(settings, words):
    env, other = toy_env(), toy_env(**settings)
    env.reset(seed=0)
    other.reset(seed=1)
    before = moment_of(other)
    with pytest.raises(SettingError, match=words):
        other.restore(env.snapshot())
    assert moment_of(other) == before


def test_restore__other_rows_as_many__is_refused(embedded_env):
    env = embedded_env()
    env.reset(seed=0)
    with pytest.raises(SettingError, match=r"pool hash '\w{12}', and this one has '\w{12}'"):
        embedded_env(task_seed=1).restore(env.snapshot())


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"r": 4}, "lora r 8, and this one has 4"),
        ({"lora_alpha": 8}, "lora lora_alpha 16, and this one has 8"),
        ({"use_rslora": True}, "lora use_rslora False, and this one has True"),
        ({"target_modules": ["q_proj"]}, r"lora matrices hash '\w{12}', and this one has '\w{12}'"),
    ],
    ids=str,
)
def test_restore__adapter_of_another_form__is_refused(embedded_env, lora, words):
    env = embedded_env(auxiliary_updates=0)
    env.reset(seed=0)
    with pytest.raises(SettingError, match=words):
        embedded_env(lora=lora, auxiliary_updates=0).restore(env.snapshot())


def test_restore__adapter_of_the_same_form_however_it_came_by_it__is_gone_on_with(embedded_env, tmp_path):
    env = embedded_env(lora={"r": 4}, auxiliary_updates=0)
    env.reset(seed=0)
    env.save_adapter(tmp_path)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    others = [{"adapter": str(tmp_path)}, {"lora": {"r": 4, "target_modules": modules}}, {"lora": {"r": 4}}]
    action = first_rows(env, 4)
    moment = env.snapshot()
    wanted = trace(env, [action])
    for settings in others:
        other = embedded_env(**settings, seed_model=5, auxiliary_updates=0)
        other.restore(moment)
        assert trace(other, [action]) == wanted


def test_restore__moment_that_tells_less_of_its_form__is_held_to_that():
    env, other = toy_env(), toy_env(num_classes=8)
    env.reset(seed=0)
    moment = env.snapshot()
    form = {name: value for name, value in moment.form.items() if name != "num_classes"}
    other.restore(dataclasses.replace(moment, form=form))
    np.testing.assert_array_equal(other.candidates, env.candidates)


def test_restore__moment_pickled_before_it_told_its_form__is_known_by_its_arrays():
    env = toy_env()
    env.reset(seed=0)
    names = [entry.name for entry in dataclasses.fields(Snapshot) if entry.name != "form"]
    old = object.__new__(Snapshot)
    old.__setstate__([getattr(env.snapshot(), name) for name in names])
    other = toy_env()
    other.restore(old)
    np.testing.assert_array_equal(other.observation(), env.observation())
    for settings in ({"num_candidates": 16}, {"num_rows": 100}):
        with pytest.raises(SettingError, match="the snapshot is of an environment with"):
            toy_env(**settings).restore(old)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_deepcopy__embedded_model_in_an_episode__goes_on_as_the_original_does(wrapper, small_settings):
    env = WRAPPERS[wrapper](gym.make("RaiseSelect-v0", **small_settings))
    env.reset(seed=0)
    env.action_space.seed(0)
    env.step(env.action_space.sample())  # of PickOne a first pick of four
    copied = copy.deepcopy(env)
    assert copied.unwrapped.assets is env.unwrapped.assets
    assert copied.spec == env.spec
    actions = [env.action_space.sample() for _ in range(4 if wrapper == "pick one" else 2)]
    wanted = trace(env, actions)
    assert copied.unwrapped.num_steps < env.unwrapped.num_steps
    assert trace(copied, actions) == wanted


def test_deepcopy__loaded_and_never_reset__begins_as_the_original_does(embedded_env):
    env = embedded_env()
    env.load()
    copied = copy.deepcopy(env)
    assert copied.assets is env.assets
    assert copied.reset(seed=3)[0].tobytes() == env.reset(seed=3)[0].tobytes()


def test_pickle__toy_in_an_episode__goes_on_to_the_bit(env):
    env.step(numbers(env)[0])
    sent = pickle.loads(pickle.dumps(env))
    assert trace(sent, numbers(env, 3)) == trace(env, numbers(env, 3))


def test_pickle__reward_of_ones_own__goes_with_it():
    sent = pickle.loads(pickle.dumps(toy_env(reward="math:fsum")))
    assert sent.config.reward == "math:fsum"


def test_pickle__model_in_use__says_what_to_pickle_instead(embedded_env):
    env = embedded_env()
    env.reset(seed=2)
    with pytest.raises(TypeError, match=r"Pickle env\.config\.to_kwargs\(\) and env\.snapshot\(\) instead") as caught:
        pickle.dumps(env)
    assert "env.fork(n)" in str(caught.value)
    kwargs, moment = pickle.loads(pickle.dumps((env.config.to_kwargs(), env.snapshot())))
    sent = RaiseSelectEnv(**kwargs)
    sent.restore(moment)
    assert trace(sent, numbers(env, 2)) == trace(env, numbers(env, 2))


def test_fork__several_that_act_differently__do_not_disturb_each_other(env):
    env.step(numbers(env)[0])
    forks = env.fork(3)
    actions = numbers(env, 3, seed=8)
    alone = [trace(fork, [action, action]) for fork, action in zip(env.fork(3), actions, strict=True)]
    together = [[], [], []]
    for _ in range(2):
        assert len({fork.candidates.tobytes() for fork in forks}) == 1
        for place, fork in enumerate(forks):
            together[place] += trace(fork, [actions[place]])
    assert together == alone
    assert env.num_steps == 1
    assert trace(env, [actions[0], actions[0]]) == alone[0], "the parent goes on as its fork did"
    assert forks[0].fork(1)[0].num_steps == 3


def test_fork__embedded_model__shares_the_base_and_nothing_else(embedded_env):
    env = embedded_env()
    env.reset(seed=0)
    parent = env.snapshot()
    fork, other = env.fork(2)
    assert fork._learner.base is env._learner.base
    fork.step(first_rows(env, 3))
    assert env.snapshot().learner_state is parent.learner_state
    assert other.dev_scores == env.dev_scores
    assert len(fork.dev_scores) == 2


# Probes


def test_probe__toy__is_what_a_fork_would_have_scored(env):
    env.step(numbers(env)[0])
    actions = [*numbers(env, 3, seed=5), np.zeros(32, dtype=np.int8), np.ones(32, dtype=np.int8)]
    before = moment_of(env)
    scores = env.probe(np.stack(actions))
    assert moment_of(env) == before
    assert scores.dtype == np.float64
    forks = env.fork(len(actions))
    for fork, action in zip(forks, actions, strict=True):
        fork.step(action)
    assert scores.tolist() == [fork.dev_scores[-1] for fork in forks]
    assert scores[3] == env.dev_scores[-1]


def test_probe__embedded_model__is_what_a_fork_would_have_scored(embedded_env):
    env = embedded_env(budget=11)
    env.reset(seed=0)
    env.step(first_rows(env, 3))
    # Four rows go through the model as a stack, nine are cut to the budget's eight, none makes no update.
    actions = [np.roll(first_rows(env, 4), shift) for shift in (0, 4)] + [first_rows(env, 9), np.zeros(16, np.int8)]
    before = moment_of(env)
    scores = env.probe(np.stack(actions))
    assert moment_of(env) == before
    for fork, action, score in zip(env.fork(4), actions, scores, strict=True):
        fork.step(action)
        assert fork.dev_scores[-1] == pytest.approx(score, abs=1e-6)
    assert len(set(np.round(scores, 6))) == 4


def test_probe__part_of_the_dev_rows__is_the_same_part_for_all_in_one_round(env):
    none = np.zeros((2, 32), dtype=np.int8)
    first = env.probe(none, num_dev=4)
    assert first[0] == first[1] == env.probe(none, num_dev=4)[0]
    assert first[0] != env.probe(none)[0]
    assert env.probe(none, num_dev=999)[0] == env.dev_scores[-1]
    env.step(np.zeros(32))
    assert env.probe(none, num_dev=4)[0] != first[0], "the next round looks at other rows"


def test_probe__action_that_diverges__scores_minus_infinity():
    env = toy_env(num_rows=32, diverges_on=5)
    env.reset(seed=0)
    actions = np.stack([env.candidates == 5, env.candidates == 6]).astype(np.int8)
    scores = env.probe(actions)
    assert scores[0] == -np.inf
    assert np.isfinite(scores[1])
    assert env.step(actions[1])[4]["diverged"] is False


class Told(FakeLearner):
    """A learner that notes what it is asked for; its copies note it in the same place."""

    calls: ClassVar[list[tuple]] = []

    def probe(self, *args):
        self.calls.append(("probe", *args[1:]))
        return super().probe(*args)

    def evaluate(self, split, subset=None):
        self.calls.append(("evaluate", split, self.scores_choices))
        return super().evaluate(split, subset)

    def row_gradients(self, *args, **kwargs):
        self.calls.append(("row_gradients", *args, kwargs))
        return super().row_gradients(*args, **kwargs)

    def dev_direction(self, *args, **kwargs):
        self.calls.append(("dev_direction", *args, kwargs))
        return super().dev_direction(*args, **kwargs)

    def copy(self):
        return Told(self.values, self.num_dev, self.diverges_on, self.ledger, self.state)


@pytest.fixture
def told():
    """An environment after a step, and what its learner is asked for from then on."""
    env = toy_env()
    learner = env.assets.learner
    env._assets = dataclasses.replace(env.assets, learner=Told(learner.values, learner.num_dev))
    env.reset(seed=0)
    env.step(first_rows(env, 8))
    Told.calls.clear()
    return env, Told.calls


def test_restore__between_two_scores__the_next_one_is_made_when_it_is_due_and_only_then(monkeypatch):
    env = toy_env(score_every=2)
    env.reset(seed=0)
    fresh = env.snapshot()
    env.step(first_rows(env, 8))
    unscored = env.snapshot()
    scored = []
    evaluate = FakeLearner.evaluate
    monkeypatch.setattr(FakeLearner, "evaluate", lambda *args: scored.append(args[1]) or evaluate(*args))
    env.restore(unscored)
    assert env.step(np.zeros(32))[1] != 0
    assert scored == ["dev"]
    env.restore(fresh)
    for _ in range(2):
        assert env.step(np.zeros(32))[1] == 0
    assert scored == ["dev"], "nothing was trained: the first score still holds"


def test_evaluate__dev_rows_with_choices__scores_them_though_steps_do_not(told):
    env, calls = told
    choices = dataclasses.replace(
        env.assets.base_evaluation,
        choice_scores=(np.array([-1.0, -2.0]),) * 16,
        choice_lengths=(np.ones(2),) * 16,
        choice_answers=np.zeros(16, dtype=np.int64),
    )
    env.evaluate("dev")
    env._assets = dataclasses.replace(env.assets, base_evaluation=choices)
    env.evaluate("dev")
    env.evaluate("test")
    env._learner.scores_choices = True
    env.evaluate("dev")
    assert calls == [
        *[("evaluate", "dev", False), ("evaluate", "dev", True), ("evaluate", "test", False)],
        ("evaluate", "dev", True),
    ]


def test_step_together__an_action_too_few__is_refused_before_anything_moves():
    envs = [toy_env(), toy_env()]
    for env in envs:
        env.reset(seed=0)
    with pytest.raises(ValueError, match="shorter"):
        step_together(envs, [np.ones(32)])
    assert [env.num_steps for env in envs] == [0, 0]


def test_probe__what_the_learner_is_told__rows_once_each_and_one_seed_a_round(told):
    env, calls = told
    for num_dev in (15, 15, 16, None):
        env.probe(np.zeros((2, 32)), num_dev=num_dev)
    env.step(first_rows(env, 8))
    env.probe(np.zeros((2, 32)), num_dev=15)
    progress, seeds, subsets = zip(*[call[1:] for call in calls if call[0] == "probe"], strict=True)
    assert progress == (0.1, 0.1, 0.1, 0.1, 0.2)
    assert [len(rows) for rows in subsets] == [15, 15, 16, 16, 15]
    assert all((np.diff(rows) > 0).all() for rows in subsets), "in their order, none twice"
    assert subsets[2].tolist() == subsets[3].tolist() == list(range(16))
    assert len(set(seeds[:4])) == 1
    assert seeds[4] != seeds[0]
    assert all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds)


def test_row_gradients__what_the_learner_is_told__is_what_was_asked(told):
    env, calls = told
    env.row_gradients([3, 1])
    env.row_gradients(np.array([2]), "dev", adam=True)
    assert [(call[1].tolist(), *call[2:]) for call in calls] == [
        ([3, 1], None, {"adam": False}),
        ([2], "dev", {"adam": True}),
    ]


def test_dev_direction__what_the_learner_is_told__half_the_rate_and_a_seed_a_round(told):
    env, calls = told
    assert env.dev_direction().tolist() == [1.0]
    env.dev_direction(2, 4)
    env.step(first_rows(env, 8))
    env.dev_direction(2, batch_size=4)
    asked = [call[1:] for call in calls if call[0] == "dev_direction"]
    assert [call[:2] for call in asked] == [(8, 16), (2, 4), (2, 4)]
    assert [call[2]["progress"] for call in asked] == [0.5] * 3
    seeds = [call[2]["seed"] for call in asked]
    assert seeds[0] == seeds[1] != seeds[2]
    assert all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds)


def test_probe__bad_action__is_refused(env):
    with pytest.raises(ActionError, match="shape"):
        env.probe(np.ones((2, 31)))


# The embedded model


def test_episode__embedded_model__leaves_the_base_as_it_was(embedded_env):
    env = embedded_env()
    env.reset(seed=0)
    base = env.assets.learner.base
    before = base.base_checksum()
    rewards = [env.step(action)[1] for action in numbers(env, 3)]
    env.evaluate("test")
    assert base.base_checksum() == before
    assert all(reward != 0 for reward in rewards)
    env.reset(seed=0)
    assert [env.step(action)[1] for action in numbers(env, 3)] == rewards, "M_0 is where it was"


def test_assets__environments_that_ask_for_the_same__are_shared(embedded_env):
    one, other = embedded_env(), embedded_env(horizon=9, batch_size=2, budget=5, reward="exact_match")
    assert one.assets is other.assets
    assert one.assets is not embedded_env(task_seed=1).assets
    assert one.assets.learner.base is embedded_env(task_seed=1).assets.learner.base


def test_schedule__share_of_the_episode__is_that_of_what_runs_out_first():
    env = toy_env(horizon=10, budget=20)
    env.reset(seed=0)
    assert env.progress == 0
    env.step(np.zeros(32))
    assert env.progress == pytest.approx(0.1)
    env.step(first_rows(env, 10))
    assert env.progress == pytest.approx(0.5)


def test_learning_rate__each_step__is_what_the_next_update_is_told(monkeypatch):
    env = toy_env(horizon=10, budget=20, learning_rate=0.5)
    env.reset(seed=0)
    told = []
    update = type(env.assets.learner).update
    spied = lambda self, rows, progress, seed: told.append(progress) or update(self, rows, progress, seed)  # noqa: E731
    monkeypatch.setattr(type(env.assets.learner), "update", spied)
    rates = []
    for size in (1, 6, 3, 10):
        rates.append(env.learning_rate)
        env.step(first_rows(env, size))
    assert rates == pytest.approx([0.25 * (1 + math.cos(math.pi * progress)) for progress in told])
    assert told == pytest.approx([0, 0.1, 0.35, 0.5])
    assert env.learning_rate == pytest.approx(0.0, abs=1e-9)


# Losses and gradients of single rows


def test_row_losses__and_gradients__change_nothing_of_the_episode(env):
    before = moment_of(env)
    tokens = env.ledger.token_forwards
    losses, gradients = env.row_losses([3, 150, 3]), env.row_gradients([3, 150, 3], adam=True)
    assert losses.shape == (3,)
    assert losses[0] == losses[2] != losses[1]
    assert gradients.shape == (3, 1)
    assert env.row_gradients(np.arange(5), "dev").shape == (5, 1)
    assert env.ledger.token_forwards == tokens + 3 + 3 * (3 + 5)
    assert moment_of(env) == before


@pytest.mark.parametrize("split", ["test", "train", ""])
def test_row_gradients__no_such_split__is_refused(env, split):
    with pytest.raises(ValueError, match=f"split is '{split}'; expected 'pool' or 'dev'"):
        env.row_gradients(np.arange(2), split)


def test_row_losses__before_reset__asks_for_one():
    env = toy_env()
    for question in (env.row_losses, env.row_gradients):
        with pytest.raises(ResetNeeded):
            question(np.arange(2))


def test_row_losses__embedded_model__are_of_the_model_as_it_is(embedded_env):
    env = embedded_env()
    env.reset(seed=0)
    rows = env.candidates[:6]
    before, gradients = env.row_losses(rows), env.row_gradients(rows)
    action = first_rows(env, 4)
    _, _, _, _, info = env.step(action)
    counts = env.assets.learner.pool.label_counts[rows[:4]]
    assert info["train_loss"] == pytest.approx(np.average(before[:4], weights=counts), rel=1e-5)
    assert (env.row_losses(rows)[:4] < before[:4]).all(), "it has learned them"
    assert np.abs(env.row_gradients(rows) - gradients).max() > 1e-3


# Drawing


def test_render__without_a_mode__warns_and_draws_nothing(env):
    with pytest.warns(UserWarning, match=r'render\(\) needs a mode: gym.make\("RaiseSelect-v0", render_mode="ansi"'):
        assert env.render() is None


def test_render__what_is_drawn__is_the_last_step_and_the_way_to_it(monkeypatch):
    monkeypatch.setattr("raise_env.render.render_ansi", lambda view: view)
    env = toy_env(
        num_rows=40, render_mode="ansi", num_classes=8, num_candidates=64
    )  # three places of eight are padding
    env.reset(seed=0)
    before = env.render()
    assert (before.step, before.horizon, before.budget_left, before.last_reward) == (0, 10, 80, None)
    assert (before.score_name, before.num_classes) == ("-dev loss (nats/token)", 8)
    assert before.dev_scores == env.dev_scores
    assert before.taken_history.shape == (0, 8)
    assert not before.taken_mask.any()
    assert np.bincount(before.offered_classes + 1).tolist() == [24, *[5] * 8]
    offered, classes = env.candidates, env.candidate_classes
    _, reward, *_ = env.step(np.isin(np.arange(64), [0, 8, 9]))
    after = env.render()
    assert (after.step, after.budget_left, after.last_reward) == (1, 77, reward)
    assert np.flatnonzero(after.taken_mask).tolist() == [0, 8, 9]
    assert after.taken_history.tolist() == [[1, 2, 0, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(after.offered_classes, np.where(offered == -1, -1, classes))


def test_render__another_reward__is_named(monkeypatch):
    monkeypatch.setattr("raise_env.render.render_ansi", lambda view: view)
    env = toy_env(render_mode="ansi", reward="exact_match")
    env.reset(seed=0)
    assert env.render().score_name == "dev exact_match"


@pytest.mark.parametrize("mode", ["ansi", "rgb_array"])
def test_render__each_mode__shows_the_episode(mode):
    env = toy_env(render_mode=mode)
    with pytest.raises(ResetNeeded):
        env.render()
    env.reset(seed=0)
    before = env.render()
    env.step(np.ones(32))
    after = env.render()
    if mode == "ansi":
        assert "1" in after
        assert before != after
    else:
        assert after.dtype == np.uint8
        assert after.ndim == 3
        assert (before != after).any()


def test_save_adapter__embedded_model__writes_pefts_files(embedded_env, tmp_path):
    env = embedded_env()
    env.reset(seed=0)
    env.step(first_rows(env, 4))
    env.save_adapter(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in tmp_path.iterdir()}


def test_reset__adapter_to_go_on_from__every_episode_begins_there(embedded_env, tmp_path):
    first = embedded_env()
    first.reset(seed=0)
    for _ in range(2):
        first.step(first_rows(first, 4))
    first.save_adapter(tmp_path)
    env = embedded_env(adapter=str(tmp_path))
    env.reset(seed=0)
    assert env.dev_scores[0] == pytest.approx(first.dev_scores[-1], abs=1e-6)
    assert env.dev_scores[0] != first.dev_scores[0]
    env.step(first_rows(env, 4))
    env.reset(seed=1)
    assert env.dev_scores == [pytest.approx(first.dev_scores[-1], abs=1e-6)]
    assert set(env.assets.content) == {*first.assets.content, "adapter"}


def test_reset__adapter_to_go_on_from__the_auxiliary_model_begins_there_too(embedded_env, tmp_path):
    first = embedded_env()
    first.reset(seed=0)
    first.step(first_rows(first, 4))
    first.save_adapter(tmp_path)
    env = embedded_env(adapter=str(tmp_path))
    env.reset(seed=0)
    assert env.assets.auxiliary["adapter"] == env.assets.content["adapter"]
    assert "adapter" not in first.assets.auxiliary
    assert not np.allclose(env.assets.features.raw, first.assets.features.raw)
    other = embedded_env(adapter=str(tmp_path), auxiliary_model="tiny")
    other.reset(seed=0)
    np.testing.assert_array_equal(other.assets.features.raw, env.assets.features.raw)


def test_reset__adapter_for_another_model__names_what_does_not_fit(embedded_env, tmp_path):
    first = embedded_env()
    first.reset(seed=0)
    first.save_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 8', '"r": 4'))
    with pytest.raises(ModelError, match="does not fit the model 'tiny'"):
        embedded_env(adapter=str(tmp_path)).reset(seed=0)


def test_step__the_whole_pool_on_offer__is_kept_once_for_all_steps():
    env = toy_env(num_candidates="all")
    env.reset(seed=0)
    for _ in range(3):
        env.step(np.eye(1, 200, dtype=np.int8)[0])
    first, *others = [record.candidates for record in env.history]
    assert all(record is first for record in others)
    assert sorted(first) == list(range(200))


@pytest.mark.parametrize("num_candidates", ["all", 32])
def test_history__arrays_of_its_records__cannot_be_written_into(num_candidates):
    env = toy_env(num_candidates=num_candidates)
    env.reset(seed=0)
    env.step(first_rows(env, 3))
    offered = env.candidates
    for array in (env.history[0].candidates, env.history[0].classes, env.history[0].selected):
        with pytest.raises(ValueError, match="read-only"):
            array[:1] = -1
    np.testing.assert_array_equal(env.candidates, offered)


def test_variant__settings_of_its_own__share_the_assets_and_start_anew():
    env = toy_env(batch_size=2)
    env.reset(seed=0)
    other = env.variant(num_candidates=8, horizon=3)
    assert other.assets is env.assets
    assert (other.config.num_candidates, other.config.horizon, other.config.batch_size) == (8, 3, 2)
    other.reset(seed=0)
    other.step(np.ones(8, dtype=np.int8))
    assert (env.num_steps, other.num_steps) == (0, 1)


def test_variant__settings_that_decide_on_the_model__share_nothing(embedded_env):
    env = embedded_env(pool_size=32)
    assert env.variant(budget=5).assets is env.assets
    assert env.variant(learning_rate=0.5).assets is not env.assets


# Steps of which it is known what came of them


def test_retrace__steps_that_were_taken_before__gives_what_step_gave_and_trains_when_asked(embedded_env):
    first, again = embedded_env(score_every=2, budget=12), embedded_env(score_every=2, budget=12)
    rng, over = np.random.default_rng(0), False
    first.reset(seed=4)
    again.reset(seed=4)
    while not over:
        action = (rng.random(16) < 0.2).astype(np.int8)
        observation, reward, over, _, info = first.step(action)
        known = [info.get(name) for name in ("dev_score", "train_loss", "diverged", "test_score")]
        tokens = again.assets.learner.ledger.token_forwards
        seen, reward_again, over_again, _, info_again = again.retrace(action, StepOutcome(*known))
        assert again.assets.learner.ledger.token_forwards == tokens
        np.testing.assert_array_equal(seen, observation)
        assert (reward_again, over_again) == (reward, over)
        assert info.keys() == info_again.keys()
        assert all(np.array_equal(info[name], info_again[name]) for name in info)
    tokens = again.assets.learner.ledger.train_tokens
    assert torch.equal(again.snapshot().learner_state.adapter, first.snapshot().learner_state.adapter)
    assert again.assets.learner.ledger.train_tokens == tokens, "it was booked when it was done first"
    assert again.dev_scores == first.dev_scores
    assert [r.reward for r in again.history] == [r.reward for r in first.history]


def test_retrace__updates_interrupted__are_gone_on_with_and_none_is_booked(monkeypatch):
    first, again = toy_env(), toy_env()
    for env in (first, again):
        env.reset(seed=0)
    for _ in range(3):
        action = first_rows(first, 4)
        *_, info = first.step(action)
        again.retrace(action, StepOutcome(info["dev_score"], info["train_loss"]))
    ledger = again.assets.learner.ledger
    booked = dataclasses.replace(ledger)
    update, made = FakeLearner.update, []

    def interrupted(learner, *args):
        made.append(update(learner, *args))
        if len(made) == 2:
            raise KeyboardInterrupt
        return made[-1]

    with monkeypatch.context() as patched:
        patched.setattr(FakeLearner, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            again.snapshot()
    assert ledger == booked
    again.snapshot()
    assert ledger == booked


def test_retrace__outcome__is_taken_as_it_was_told():
    env = toy_env(horizon=1)
    env.reset(seed=0)
    outcome = StepOutcome(dev_score=1.5, train_loss=0.25, test_score=-7.0)
    _, reward, _, _, info = env.retrace(env.action_masks().astype(np.int8), outcome)
    assert reward == 1.5 - env.dev_scores[0]
    assert (info["dev_score"], info["train_loss"], info["test_score"]) == (1.5, 0.25, -7.0)
    record = env.history[-1]
    assert (record.dev_score, record.train_loss) == (1.5, 0.25)


def test_retrace__outcomes_that_diverged__keep_the_score_and_are_counted():
    env = toy_env()
    env.reset(seed=0)
    before = env.ledger.divergences
    for episode in range(2):
        env.reset(seed=episode)
        *_, info = env.retrace(env.action_masks().astype(np.int8), StepOutcome(dev_score=9.0, diverged=True))
        assert info["diverged"]
        assert env.dev_scores == [env.dev_scores[0]] * 2
    assert env.ledger.divergences == before + 2


# Too little memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_step__memory_does_not_suffice__says_what_needs_less_and_can_be_taken_again(monkeypatch, error):
    env, plain = toy_env(), toy_env()
    observation, _ = env.reset(seed=0)
    plain.reset(seed=0)
    action = env.action_masks().astype(np.int8)

    def update(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(FakeLearner, "update", update)
        with pytest.raises(MemoryShortageError, match=r"too little memory \(.+\)\. Lower micro_batch_tokens") as raised:
            env.step(action)
    assert raised.value.__cause__ is error
    assert env.num_steps == 0
    np.testing.assert_array_equal(env.observation(), observation)
    assert env.step(action)[1] == plain.step(action)[1]


def test_step__an_error_of_another_kind__comes_as_it_is(monkeypatch):
    env = toy_env()
    env.reset(seed=0)
    monkeypatch.setattr(FakeLearner, "update", lambda *_: [][1])
    with pytest.raises(IndexError):
        env.step(env.action_masks())


# What goes wrong in the middle


def test_step__too_little_memory_for_the_score__was_not_taken(monkeypatch):
    env = toy_env()
    env.reset(seed=0)
    action = first_rows(env, 8)
    expected = trace(env.fork(1)[0], [action])
    before = moment_of(env)
    with monkeypatch.context() as patched:
        patched.setattr(FakeLearner, "evaluate", too_little_memory)
        with pytest.raises(MemoryShortageError):
            env.step(action)
    assert moment_of(env) == before
    assert trace(env, [action]) == expected


def too_little_memory(learner, split, subset=None):
    raise MemoryError


def test_step__test_row_without_a_finite_loss__gives_no_test_score(monkeypatch):
    env = toy_env(horizon=1)
    env.reset(seed=0)
    evaluate = FakeLearner.evaluate

    def infinite_on_test(learner, split, subset=None):
        found = evaluate(learner, split, subset)
        losses = np.where(split == "test", np.inf, found.row_losses)
        return dataclasses.replace(found, row_losses=losses)

    monkeypatch.setattr(FakeLearner, "evaluate", infinite_on_test)
    *_, info = env.step(first_rows(env, 8))
    assert "test_score" not in info
    record = EpisodeRecord.of(env, agent="first", seed=0, info=info)
    assert (record.test_score, record.final) == (None, {})
    record.to_json()


@pytest.mark.parametrize("num_dev", [0, -1])
def test_probe__no_dev_rows__is_refused(num_dev):
    env = toy_env()
    env.reset(seed=0)
    with pytest.raises(SettingError, match=f"num_dev is {num_dev}"):
        env.probe(np.ones((1, 32)), num_dev=num_dev)
