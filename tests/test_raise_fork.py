from __future__ import annotations

import json
import random

import gymnasium as gym
import numpy as np
import pytest
import torch

from raise_env import RaiseSelectEnv, TopKScores
from raise_env.agents import RaiseFork, RandomAgent, run_episode
from raise_env.agents.credit import Group
from raise_env.agents.networks import AcquisitionFunction
from raise_env.agents.raise_fork import ForkSettings, _loss, _stacked, fit_ensemble
from raise_env.errors import RaiseEnvError, RecordError, SettingError
from raise_env.testing import toy_env

FIT = {"num_networks": 3, "num_passes": 40, "hidden_dims": (64, 64), "weight_decay": 0.1}
SMALL = {"hidden_dims": (32, 32), "num_forks": 4, "num_networks": 2, "num_passes": 5, "num_states": 3, "num_rows": 16}
BATCHES = {**FIT, "credit": "batches", "num_forks": 8, "num_states": 10}
TRUE_SCORES = np.array([2.0, -1.0])


def learned(episodes=1, seed=0, env=None, **settings):
    return RaiseFork(**{**SMALL, **settings}).learn(env or toy_env(), episodes, seed=seed)


def observation_of(env, seed=0):
    return env.reset(seed=seed)[0]


def made_up_groups(count, rng):
    """Return groups in which a fork's gain is a weighted sum over two columns of its rows."""
    groups = []
    for _ in range(count):
        rows = rng.normal(size=(8, 4, 39)).astype(np.float32)
        gains = (rows[:, :, :2] @ TRUE_SCORES).sum(axis=1)
        groups.append(Group(rows, ((gains - gains.mean()) / gains.std()).astype(np.float32)))
    return groups


@pytest.fixture(scope="module")
def selector():
    """One that learned in earnest: a second or two."""
    return RaiseFork(**BATCHES).learn(toy_env(), episodes=4)


# Learning


@pytest.mark.parametrize("settings", [BATCHES, {**FIT, "num_rows": 64}], ids=["batches", "rows"])
def test_learn__toy_world__beats_random_on_every_seed(settings):
    agent = RaiseFork(**settings).learn(toy_env(), episodes=4)
    for seed in range(5):
        ours = run_episode(toy_env(), agent, seed=seed, name="raise_fork")
        random_rows = run_episode(toy_env(), RandomAgent(), seed=seed, name="random")
        assert ours.dev_scores[-1] > random_rows.dev_scores[-1] + 0.1


def test_learn__toy_world__prefers_the_column_that_tells_the_value(selector):
    env = toy_env(400, num_candidates="all")
    observation = observation_of(env)
    values = env.assets.learner.values[env.candidates]
    assert np.corrcoef(selector.scores(observation), values)[0, 1] > 0.6


def test_learn__same_seed__same_selector():
    observation = observation_of(toy_env())
    np.testing.assert_array_equal(learned(2).scores(observation), learned(2).scores(observation))


def test_learn__another_seed__another_selector():
    observation = observation_of(toy_env())
    assert (learned(seed=0).scores(observation) != learned(seed=1).scores(observation)).any()


def test_learn__the_environment__is_left_as_it_was():
    env = toy_env()
    env.reset(seed=5)
    env.step(np.ones(32, dtype=np.int8))
    before = env.snapshot()
    learned(env=env)
    after = env.snapshot()
    assert (after.learner_state, after.num_steps, after.generator_state) == (
        before.learner_state,
        before.num_steps,
        before.generator_state,
    )


def test_learn__global_generators__untouched():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    before = states()
    learned()
    assert states() == before


def test_learn__progress__number_and_return_of_each_episode():
    calls = []
    agent = RaiseFork(**SMALL).learn(toy_env(), 3, progress=lambda number, total: calls.append((number, total)))
    assert [number for number, _ in calls] == [1, 2, 3]
    assert [total for _, total in calls] == agent.episode_returns


@pytest.mark.parametrize("credit", ["rows", "batches"])
@pytest.mark.parametrize(("num_states", "expected"), [(3, 3), (5, 5), (50, 5)])
def test_learn__num_states__so_many_groups_as_far_as_there_are_steps(credit, num_states, expected):
    agent = learned(num_states=num_states, credit=credit, env=toy_env(horizon=5))
    assert len(agent.groups) == expected


def test_learn__rows__are_seen_at_states_spread_over_the_horizon():
    agent = learned(num_states=4, env=toy_env(horizon=10))
    stages = [group.rows[0, 0, 1] for group in agent.groups]
    np.testing.assert_allclose(stages, [0.0, 0.2, 0.5, 0.7], atol=1e-6)


def test_learn__batches__are_seen_at_the_first_states():
    agent = learned(num_states=4, credit="batches", env=toy_env(horizon=10))
    stages = [group.rows[0, 0, 1] for group in agent.groups]
    np.testing.assert_allclose(stages, [0.0, 0.1, 0.2, 0.3], atol=1e-6)


def test_learn__budget_that_ends_before_the_horizon__states_are_spread_over_it():
    agent = learned(num_states=4, env=toy_env(horizon=40, budget=64))  # full batches last for 8 steps
    stages = [group.rows[0, 0, 1] for group in agent.groups]
    np.testing.assert_allclose(stages, [0.0, 2 / 40, 4 / 40, 6 / 40], atol=1e-6)


def test_predict__least__takes_the_rows_alone_that_stand_out_from_the_pool():
    env = toy_env(num_candidates=64)
    observation, _ = env.reset(seed=0)
    sizes = []
    for least in (None, -10.0, 1.0, 100.0):
        agent = learned(least=least, env=toy_env())
        agent.begin(env, seed=0)
        sizes.append(int(agent.predict(observation)[0].sum()))
    assert sizes[0] == sizes[1] == 8
    assert sizes[3] == 0
    scores = learned(env=toy_env()).scores(observation)
    agent = learned(least=1.0, env=toy_env())
    agent.begin(env, seed=0)
    few = np.isfinite(agent.scores(observation))
    assert 0 < few.sum() < 32
    assert scores[few].min() > scores[~few].max(), "the order of the rows stays"


@pytest.mark.parametrize("least", ["2", float("nan")])
def test_fork_settings__least_that_is_no_number__says_what_is_expected(least):
    with pytest.raises(SettingError, match=r"least is .*; expected a number of standard deviations"):
        RaiseFork(least=least)


@pytest.mark.usefixtures("rare_class")
def test_learn__offers_of_different_size__all_are_learned_from():
    agent = learned(2, num_rows=32)
    assert len(agent.groups) == 6
    assert len({len(group.gains) for group in agent.groups}) > 1
    assert np.isfinite(agent.scores(observation_of(toy_env()))).all()


def test_learn__budget_that_the_batch_does_not_divide__batches_are_as_small_as_what_is_left(monkeypatch):
    sizes, probe = [], RaiseSelectEnv.probe

    def noted(env, actions, num_dev=None):
        sizes.append((actions.sum(axis=1).tolist(), env.budget_left))
        return probe(env, actions, num_dev)

    monkeypatch.setattr(RaiseSelectEnv, "probe", noted)
    agent = learned(2, credit="batches", env=toy_env(budget=20))
    assert sizes == [([8] * 4, 20), ([8] * 4, 12), ([4] * 4, 4)] * 2
    assert [group.rows.shape for group in agent.groups] == [(4, 8, 39), (4, 8, 39), (4, 4, 39)] * 2


@pytest.mark.parametrize(("num_rows", "expected"), [(16, 16), (18, 20), (4, 8), (1000, 200)])
def test_learn__num_rows__so_many_are_valued_as_classes_and_pool_allow(num_rows, expected):
    agent = learned(num_rows=num_rows, env=toy_env(200))
    assert {group.rows.shape for group in agent.groups} == {(expected, 1, 39)}


def test_learn__another_reward__falls_back_to_batches():
    agent = learned(credit=None, env=toy_env(reward=f"{__name__}:root_loss"))
    assert {group.rows.shape for group in agent.groups} == {(4, 8, 39)}


def test_learn__rows_for_a_reward_without_gradient__says_so():
    with pytest.raises(SettingError, match=r"credit 'rows'.*'exact_match' has none.*credit=batches"):
        learned(credit="rows", env=toy_env(reward="exact_match"))


def root_loss(evaluation):
    return -(evaluation.loss**0.5)


def test_learn__a_fork_diverges__its_group_is_left_out_and_learning_goes_on():
    # Four of the eight batches of 64 rows are tried: half of the groups hold the row that makes the model diverge.
    env = toy_env(64, num_candidates="all", diverges_on=0)
    agent = learned(4, env=env, num_states=5, credit="batches")
    assert 0 < len(agent.groups) < 20
    assert all(np.isfinite(group.gains).all() for group in agent.groups)


def test_learn__a_random_run_diverges__learning_goes_on():
    # An episode trains on 24 of 64 rows: in every third the model diverges, and the states after it are left out.
    agent = learned(6, env=toy_env(64, diverges_on=0, num_candidates=64), num_rows=64, num_states=3)
    assert 6 < len(agent.groups) < 18
    assert all(np.isfinite(group.gains).all() for group in agent.groups)
    assert np.isfinite(agent.episode_returns).all()


def test_learn__every_fork_scores_alike__an_error_that_says_what_to_do():
    # Every toy row counts as wrong until the loss has halved, which two updates do not do.
    env = toy_env(reward="exact_match", horizon=2)
    with pytest.raises(RaiseEnvError, match=r"nothing to learn from.*num_forks"):
        RaiseFork(num_forks=2, num_networks=1, num_passes=1).learn(env, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_forks": 1}, "num_forks is 1; expected at least 2"),
        ({"num_rows": 1}, "num_rows is 1; expected at least 2"),
        ({"num_states": 0}, "num_states is 0; expected at least 1"),
        ({"credit": "row"}, "credit is 'row': did you mean 'rows'"),
    ],
)
def test_fork_settings__nothing_to_compare__says_what_is_expected(settings, message):
    with pytest.raises(SettingError, match=message):
        RaiseFork(**settings)


def test_raise_fork__unknown_setting__lists_the_known():
    with pytest.raises(
        SettingError, match=r"raise_fork has no setting 'num_frocks': did you mean 'num_forks'\? Known: "
    ):
        RaiseFork(num_frocks=3)


def test_raise_fork__one_width_in_place_of_a_list__is_named():
    with pytest.raises(SettingError, match=r"hidden_dims is 64; expected a list of widths, such as \[256,256\]"):
        RaiseFork(hidden_dims=64)


def test_fit_ensemble__sums_of_a_known_score__it_is_found():
    rng = np.random.default_rng(0)
    settings = ForkSettings(**{**FIT, "num_networks": 2})
    networks = fit_ensemble(made_up_groups(60, rng), settings, seed=0)
    rows = rng.normal(size=(200, 39)).astype(np.float32)
    with torch.no_grad():
        scores = torch.stack([network(torch.from_numpy(rows)) for network in networks]).mean(dim=0).numpy()
    assert np.corrcoef(scores, rows[:, :2] @ TRUE_SCORES)[0, 1] > 0.8


def test_loss__groups_of_fewer_forks__is_the_mean_over_the_forks_that_there_are():
    whole, other = made_up_groups(2, np.random.default_rng(0))
    groups = [whole, Group(other.rows[:5, :3], other.gains[:5])]
    network = AcquisitionFunction(39, (8,), generator=torch.Generator().manual_seed(0))
    errors = []
    for group in groups:
        sums = network(torch.from_numpy(group.rows)).sum(dim=-1)
        errors.append((sums - sums.mean() - torch.from_numpy(group.gains)).square())
    torch.testing.assert_close(_loss(network, *_stacked(groups)), torch.cat(errors).mean())


def test_loss__groups_of_one_size__is_the_plain_mean_to_the_bit():
    """Selectors that were learned before there was padding come out as they did."""
    for seed in range(20):
        groups = made_up_groups(1 + seed, np.random.default_rng(seed))
        rows, gains = (torch.from_numpy(np.stack([getattr(g, name) for g in groups])) for name in ("rows", "gains"))
        gradients = []
        for plain in (True, False):
            network = AcquisitionFunction(39, (8,), generator=torch.Generator().manual_seed(seed))
            if plain:
                sums = network(rows).sum(dim=-1)
                loss = (sums - sums.mean(dim=1, keepdim=True) - gains).square().mean()
            else:
                loss = _loss(network, *_stacked(groups))
            loss.backward()
            gradients.append([loss.detach(), *(weight.grad for weight in network.parameters())])
        torch.testing.assert_close(*gradients, rtol=0, atol=0)


# Acting


def test_predict__padding__is_never_chosen(selector):
    # Five rows a class where eight are offered: 12 of 32 are padding.
    env = toy_env(20, num_candidates=32, batch_size=20)
    observation = observation_of(env)
    selector.begin(env, seed=0)
    for deterministic in (True, False):
        choice, _ = selector.predict(observation, deterministic=deterministic)
        assert choice.sum() == 20
        assert not choice[~env.action_masks()].any()


@pytest.mark.parametrize("num_rows", [1, 5, 1000])
def test_predict__any_number_of_rows__as_many_as_there_are_up_to_the_batch(selector, num_rows):
    observation = np.random.default_rng(0).normal(size=(num_rows, 39)).astype(np.float32)
    observation[:, -1] = 0.0
    selector.begin(toy_env(), seed=0)
    choice, state = selector.predict(observation, state=("kept",))
    assert (choice.shape, choice.dtype, choice.sum()) == ((num_rows,), np.int8, min(8, num_rows))
    assert state == ("kept",)


def test_predict__order_of_the_rows__does_not_matter(selector):
    observation = observation_of(toy_env())
    order = np.random.default_rng(1).permutation(len(observation))
    choice, _ = selector.predict(observation)
    shuffled, _ = selector.predict(observation[order])
    np.testing.assert_array_equal(shuffled, choice[order])


def test_predict__rows_taken_once__come_after_all_others(selector):
    env = toy_env(32, num_candidates="all", horizon=4)
    record = run_episode(env, selector, seed=0, name="raise_fork")
    assert sorted(row for rows in record.actions for row in rows) == list(range(32))


def test_predict__not_deterministic__varies(selector):
    observation = observation_of(toy_env())
    choices = {selector.predict(observation, deterministic=False)[0].tobytes() for _ in range(10)}
    assert len(choices) > 1


def test_predict__nothing_learned__says_so():
    with pytest.raises(RuntimeError, match="learn"):
        RaiseFork().predict(np.ones((4, 39), dtype=np.float32))


# Files


def test_load__what_save_wrote__equal_scores(tmp_path):
    agent = learned(2)
    agent.save(tmp_path / "selector")
    loaded = RaiseFork.load(tmp_path / "selector")
    observation = observation_of(toy_env())
    np.testing.assert_array_equal(loaded.scores(observation), agent.scores(observation))
    assert (loaded.settings, loaded.episode_returns, loaded.training) == (
        agent.settings,
        agent.episode_returns,
        agent.training,
    )


def test_save__files__two_and_no_pickle(tmp_path):
    learned().save(tmp_path / "selector")
    assert sorted(path.name for path in (tmp_path / "selector").iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "selector" / "config.json").read_text())
    assert config["agent"] == "raise_fork"
    assert len(config["features"]["names"]) == 39


def test_save__folder_that_is_there__is_replaced_whole(tmp_path):
    folder = tmp_path / "selector"
    folder.mkdir()
    (folder / "left-over").write_text("old")
    learned().save(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["selector"]


@pytest.mark.parametrize("settings", [{}, {"credit": "batches"}])
def test_load_progress__then_learning__equals_an_undisturbed_run(tmp_path, settings):
    learned(2, **settings).save_progress(tmp_path / "learning")
    resumed = RaiseFork(**SMALL, **settings)
    resumed.load_progress(tmp_path / "learning")
    resumed.learn(toy_env(), 1)
    undisturbed = learned(3, **settings)
    observation = observation_of(toy_env())
    np.testing.assert_array_equal(resumed.scores(observation), undisturbed.scores(observation))
    assert resumed.episode_returns == undisturbed.episode_returns


@pytest.mark.usefixtures("rare_class")
def test_load_progress__groups_of_different_size__learning_goes_on_as_if_undisturbed(tmp_path):
    learned(2).save_progress(tmp_path / "learning")
    resumed = RaiseFork(**SMALL)
    resumed.load_progress(tmp_path / "learning")
    resumed.learn(toy_env(), 1)
    undisturbed = learned(3)
    observation = observation_of(toy_env())
    np.testing.assert_array_equal(resumed.scores(observation), undisturbed.scores(observation))


def test_learn__on_from_a_folder__refused_as_what_was_seen_is_not_in_it(tmp_path):
    learned(2).save(tmp_path / "selector")
    loaded, observation = RaiseFork.load(tmp_path / "selector"), observation_of(toy_env())
    before = loaded.scores(observation)
    with pytest.raises(SettingError, match=r"has learned for 2 episodes, .* after 3 more it would know of these alone"):
        loaded.learn(toy_env(), 3)
    np.testing.assert_array_equal(loaded.learn(toy_env(), 0).scores(observation), before)
    assert len(learned(1).learn(toy_env(), 1).groups) == 6, "one that has it all goes on"


def spoil(path, change):
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(format=99),
        lambda config: config.update(agent="other"),
        lambda config: config["features"]["names"].reverse(),
        lambda config: config.update(settings=[]),
        lambda config: config.update(training=None),
        lambda config: config.pop("episode_returns"),
        lambda config: config["settings"].update(num_networks=7),
        lambda config: config["settings"].update(hidden_dims=[3]),
        lambda config: config["settings"].update(unheard_of=1),
    ],
)
def test_load__another_config__an_error_that_names_the_file(tmp_path, change):
    learned().save(tmp_path / "s")
    spoil(tmp_path / "s" / "config.json", change)
    with pytest.raises(RaiseEnvError, match=r"config\.json|model\.safetensors|unheard_of"):
        RaiseFork.load(tmp_path / "s")


def test_learn__wrappers_that_would_be_left_out__are_refused_by_name():
    shaped = gym.wrappers.TransformReward(TopKScores(toy_env(horizon=2)), lambda reward: -reward)
    with pytest.raises(SettingError, match="TransformReward would have no effect"):
        RaiseFork(**SMALL).learn(shaped, 1)


@pytest.mark.parametrize("damage", ["missing", "torn", "empty"])
def test_load__weights_are_damaged__record_error(tmp_path, damage):
    learned().save(tmp_path / "s")
    path = tmp_path / "s" / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "torn" else b"")
    with pytest.raises(RecordError, match=r"model\.safetensors"):
        RaiseFork.load(tmp_path / "s")


@pytest.mark.parametrize("damage", ["missing", "torn"])
def test_load_progress__groups_are_damaged__record_error(tmp_path, damage):
    learned().save_progress(tmp_path / "p")
    path = tmp_path / "p" / "groups.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage == "torn":
        path.write_bytes(content[:50])
    with pytest.raises(RecordError, match="groups"):
        RaiseFork(**SMALL).load_progress(tmp_path / "p")
