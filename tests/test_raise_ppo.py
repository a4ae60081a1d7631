from __future__ import annotations

import itertools
import json
import logging
import random

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors.torch import load_file
from stable_baselines3.common.buffers import RolloutBuffer

from raise_env import RaiseSelectEnv, TopKScores
from raise_env.agents import RaisePpo, RandomAgent, load_selector, make_agent, raise_ppo, run_episode
from raise_env.agents.class_law import BatchLaw
from raise_env.agents.networks import AcquisitionFunction, Critic
from raise_env.agents.raise_ppo import (
    NUM_ROUNDS,
    PRESETS,
    PpoSettings,
    Rollout,
    ShownColumns,
    advantages_of,
    clipped_loss,
    stage_advantages,
)
from raise_env.errors import RaiseEnvError, RecordError, SettingError
from raise_env.testing import toy_env

SMALL = {"num_epochs": 2, "hidden_dims": [8]}


def learned(episodes=1, seed=0, env=None, **settings):
    return RaisePpo(**{**SMALL, **settings}).learn(env or toy_env(), episodes, seed=seed)


def observation_of(env, seed=0):
    return env.reset(seed=seed)[0]


def weights_of(network):
    return torch.cat([value.flatten() for value in network.state_dict().values()])


@pytest.fixture
def steps(monkeypatch):
    """A list that observation, action and reward of every step of learning are added to."""
    taken = []
    step = RaiseSelectEnv.step

    def noted(env, action):
        observation = env.observation()
        result = step(env, action)
        taken.append((observation, np.array(action), result[1]))
        return result

    monkeypatch.setattr(RaiseSelectEnv, "step", noted)
    return taken


@pytest.fixture
def rollouts(monkeypatch):
    """A list of the rollouts whose observations were asked for, with what they gave."""
    seen = []
    observations = Rollout.observations

    def noted(rollout, *arguments):
        seen.append((rollout, observations(rollout, *arguments)))
        return seen[-1][1]

    monkeypatch.setattr(Rollout, "observations", noted)
    return seen


@pytest.fixture
def log_ratios(monkeypatch):
    """A list that the log ratios of every loss are added to."""
    seen = []

    def noted(log_ratio, *arguments):
        seen.append(log_ratio.detach().clone())
        return clipped_loss(log_ratio, *arguments)

    monkeypatch.setattr(raise_ppo, "clipped_loss", noted)
    return seen


@pytest.fixture(scope="module")
def selector():
    """One that learned in earnest: a second or two."""
    return RaisePpo(preset="tuned").learn(toy_env(), 10)


# Advantages and loss


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 1.0), (0.9, 0.7), (1.0, 0.0), (0.0, 1.0)])
def test_advantages_of__an_episode__are_the_sums_of_equation_16(gamma, gae_lambda):
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 7))
    found = advantages_of(torch.from_numpy(rewards), torch.from_numpy(values), gamma, gae_lambda)
    next_values = [*values[1:], 0.0]
    errors = [rewards[t] + gamma * next_values[t] - values[t] for t in range(7)]
    expected = [sum((gamma * gae_lambda) ** (later - t) * errors[later] for later in range(t, 7)) for t in range(7)]
    np.testing.assert_allclose(found.numpy(), expected)


def test_advantages_of__an_episode__are_those_of_stable_baselines3():
    rng = np.random.default_rng(1)
    rewards, values = rng.normal(size=(2, 6)).astype(np.float32)
    buffer = RolloutBuffer(6, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), gae_lambda=0.8, gamma=0.95)
    for step, (reward, value) in enumerate(zip(rewards, values, strict=True)):
        one = np.zeros(1)
        buffer.add(one, one, np.array([reward]), np.array([step == 0]), torch.tensor([value]), torch.zeros(1))
    buffer.compute_returns_and_advantage(torch.zeros(1), dones=np.ones(1))
    found = advantages_of(torch.from_numpy(rewards), torch.from_numpy(values), 0.95, 0.8)
    np.testing.assert_allclose(found.numpy(), buffer.advantages[:, 0], rtol=1e-5)


def test_stage_advantages__episodes_of_unequal_length__compare_those_that_got_as_far():
    returns = [torch.tensor([1.0, 5.0]), torch.tensor([2.0, 1.0, 9.0]), torch.tensor([6.0, 3.0, 7.0, 4.0])]
    expected = []
    for step, among in enumerate(([1, 2, 6], [5, 1, 3], [9, 7], [4])):
        expected.append((returns[2][step].item() - np.mean(among)) / (np.std(among) + 1e-3))
    np.testing.assert_allclose(stage_advantages(returns).numpy(), expected, rtol=1e-5)
    assert expected[3] == 0.0


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 2.0, -2.4, 0.0),
        (1.5, -2.0, 3.0, 3.0),
        (0.5, 2.0, -1.0, -1.0),
        (0.5, -2.0, 1.6, 0.0),
        (1.1, 0.0, 0.0, 0.0),
    ],
)
def test_clipped_loss__inside_and_outside_the_range__as_by_hand(ratio, advantage, loss, slope):
    """The slope is that in the log ratio: minus ratio times advantage, where it is not cut."""
    log_ratio = torch.tensor([ratio]).log().requires_grad_()
    found = clipped_loss(log_ratio, torch.tensor([advantage]), 0.2)
    found.sum().backward()
    assert found.item() == pytest.approx(loss)
    assert log_ratio.grad.item() == pytest.approx(slope)


# Learning


@pytest.mark.parametrize("ratio", ["exact", "softmax_product"])
def test_learn__one_step_of_gradient_descent__as_worked_out_apart(steps, ratio, tmp_path):
    """Two rows of each of four classes; F and V go where autograd says that the formulas lead."""
    agent = RaisePpo(num_epochs=1, ratio=ratio).learn(toy_env(), 1, seed=3)
    generator = torch.Generator().manual_seed(3)
    actor, critic = AcquisitionFunction(39, generator=generator), Critic(39, generator=generator)
    rows = torch.from_numpy(np.stack([observation for observation, _, _ in steps]))
    values = critic(rows)
    returns, following = [], 0.0
    for _, _, reward in reversed(steps):
        following = reward + 0.99 * following
        returns.insert(0, following)
    returns = torch.tensor(returns)
    advantages = (returns - values).detach()
    advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
    log_probs = []
    for scores, (_, action, _) in zip(actor(rows), steps, strict=True):
        log_prob = 0.0
        for block in range(4):
            own, chosen = scores[8 * block : 8 * block + 8], np.flatnonzero(action[8 * block : 8 * block + 8])
            assert len(chosen) == 2
            if ratio == "exact":
                sums = torch.stack([own[i] + own[j] for i, j in itertools.combinations(range(8), 2)])
                log_prob = log_prob + own[chosen].sum() - sums.logsumexp(0)
            else:
                log_prob = log_prob + (own[chosen] - own.logsumexp(0)).sum()
        log_probs.append(log_prob)
    loss = -(advantages * torch.stack(log_probs)).mean() + ((values - returns) ** 2).mean() / 2
    loss.backward()
    for network, rate in ((actor, 0.1), (critic, 0.2)):
        norm = torch.stack([weight.grad.norm() for weight in network.parameters()]).norm()
        with torch.no_grad():
            for weight in network.parameters():
                weight -= rate * (weight.grad * min(1.0, 0.5 / norm) + 0.01 * weight)
    torch.testing.assert_close(weights_of(agent.acquisition), weights_of(actor), rtol=1e-4, atol=1e-6)
    assert agent.episode_returns == [pytest.approx(sum(reward for _, _, reward in steps))]
    agent.save_progress(tmp_path / "p")
    kept = load_file(tmp_path / "p" / "learners.safetensors")
    for name, value in critic.state_dict().items():
        torch.testing.assert_close(kept[f"critic.weights.{name}"], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ratio", ["exact", "softmax_product"])
def test_learn__first_pass_over_a_round__the_ratio_is_one_exactly(log_ratios, ratio):
    learned(2, num_epochs=3, ratio=ratio)
    assert len(log_ratios) == 6
    for first in (0, 3):
        assert not log_ratios[first].any()
        assert log_ratios[first + 1].all()


@pytest.mark.usefixtures("rare_class")
@pytest.mark.parametrize("ratio", ["exact", "softmax_product"])
def test_learn__padding_that_differs_between_steps__is_never_drawn_and_counts_for_nothing(
    steps, rollouts, log_ratios, ratio
):
    """One step of gradient descent goes where the formulas of each step's own rows lead."""
    agent = learned(num_epochs=1, ratio=ratio)
    masks = [observation.any(axis=1) for observation, _, _ in steps]
    assert len({int(mask.sum()) for mask in masks}) > 1
    for mask, (_, action, _) in zip(masks, steps, strict=True):
        assert (action.sum(), action[~mask].sum()) == (8, 0)
    assert not log_ratios[0].any()
    generator = torch.Generator().manual_seed(0)
    actor, critic = (network(39, [8], generator=generator) for network in (AcquisitionFunction, Critic))
    rollout, classes = rollouts[0][0], np.repeat(np.arange(4), 8)
    values, log_probs = [], []
    for mask, kinds, (observation, _, _) in zip(masks, rollout.kinds.toarray(), steps, strict=True):
        rows = torch.from_numpy(observation[mask])  # as if there were no padding
        values.append(critic(rows))
        law = BatchLaw(actor(rows), classes[mask], np.ones(len(rows), dtype=bool), 8, 4)
        drawn = torch.from_numpy(kinds[mask])
        log_probs.append(law.log_prob(drawn) if ratio == "exact" else law.log_softmax_product(drawn))
    values = torch.stack(values)
    advantages = advantages_of(torch.from_numpy(rollout.rewards), values.detach(), 0.99, 1.0)
    returns = advantages + values.detach()
    advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
    (-(advantages * torch.stack(log_probs)).mean() + ((values - returns) ** 2).mean() / 2).backward()
    norm = torch.stack([weight.grad.norm() for weight in actor.parameters()]).norm()
    with torch.no_grad():
        for weight in actor.parameters():
            weight -= 0.1 * (weight.grad * min(1.0, 0.5 / norm) + 0.01 * weight)
    torch.testing.assert_close(weights_of(agent.acquisition), weights_of(actor), rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("rare_class")
def test_learn__padding_that_differs_in_parts__as_in_one(monkeypatch):
    whole = learned()
    monkeypatch.setattr(raise_ppo, "ROWS_AT_ONCE", 3 * 32)
    torch.testing.assert_close(weights_of(learned().acquisition), weights_of(whole.acquisition), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_learn__stage_baseline__rows_are_judged_by_the_same_step_of_all_episodes(steps, monkeypatch, gamma):
    judged = []

    def noted(log_ratio, advantages, clip_range):
        judged.append(advantages)
        return clipped_loss(log_ratio, advantages, clip_range)

    monkeypatch.setattr(raise_ppo, "clipped_loss", noted)
    learned(3, num_epochs=1, baseline="stage", gamma=gamma)
    rewards = np.array([reward for _, _, reward in steps]).reshape(3, 10)
    returns = rewards.copy()
    for step in reversed(range(9)):
        returns[:, step] += gamma * returns[:, step + 1]
    assert not judged[0].any()
    for number in (1, 2):
        seen = returns[: number + 1]
        expected = (seen[-1] - seen.mean(0)) / (seen.std(0) + 1e-3)
        expected = (expected - expected.mean()) / expected.std()
        np.testing.assert_allclose(judged[number].numpy(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"preset": "tuned"}, {"ratio": "softmax_product"}])
def test_learn__toy_world__beats_random_rows(settings):
    agent = RaisePpo(**settings).learn(toy_env())
    gains = []
    for seed in range(5):
        ours = run_episode(toy_env(), agent, seed=seed, name="raise_ppo")
        random_rows = run_episode(toy_env(), RandomAgent(), seed=seed, name="random")
        gains.append(ours.dev_scores[-1] - random_rows.dev_scores[-1])
    assert min(gains) > 0.1


def test_learn__wrappers_that_would_be_left_out__are_refused_by_name():
    shaped = gym.wrappers.TransformReward(TopKScores(toy_env(horizon=2)), lambda reward: -reward)
    with pytest.raises(SettingError, match="TransformReward would have no effect"):
        RaisePpo().learn(shaped, 1)


def test_learn__rounds_not_named__are_the_papers():
    agent = RaisePpo(**SMALL).learn(toy_env(horizon=1))
    assert len(agent.episode_returns) == NUM_ROUNDS == 20


def test_learn__the_whole_pool_on_offer__prefers_the_column_that_tells_the_value():
    env = toy_env(400, num_candidates="all")
    agent = RaisePpo(preset="tuned").learn(env, 20)
    observation = observation_of(env)
    values = env.assets.learner.values[env.candidates]
    assert np.corrcoef(agent.scores(observation), values)[0, 1] > 0.3


def test_learn__in_parts__as_in_one(monkeypatch):
    env = toy_env(40, num_candidates="all")
    whole = learned(env=env)
    monkeypatch.setattr(raise_ppo, "ROWS_AT_ONCE", 3 * 40)
    parts = learned(env=env)
    torch.testing.assert_close(weights_of(parts.acquisition), weights_of(whole.acquisition), rtol=1e-4, atol=1e-6)


def test_learn__same_seed__same_selector():
    observation = observation_of(toy_env())
    np.testing.assert_array_equal(learned(2).scores(observation), learned(2).scores(observation))


def test_learn__another_seed__another_selector():
    observation = observation_of(toy_env())
    assert (learned(seed=0).scores(observation) != learned(seed=1).scores(observation)).any()


def test_learn__in_two_goes__equals_one():
    observation = observation_of(toy_env())
    twice = learned(1).learn(toy_env(), 2)
    np.testing.assert_array_equal(twice.scores(observation), learned(3).scores(observation))


def test_learn__the_environment__is_left_as_it_was():
    env = toy_env(render_mode="ansi")
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
    agent = learned(optimiser="adamw")
    agent.predict(observation_of(toy_env()), deterministic=False)
    assert states() == before


def test_learn__progress__number_and_return_of_each_episode():
    calls = []
    agent = RaisePpo(**SMALL).learn(toy_env(), 3, progress=lambda number, total: calls.append((number, total)))
    assert [number for number, _ in calls] == [1, 2, 3]
    assert [total for _, total in calls] == agent.episode_returns


@pytest.mark.parametrize("horizon", [1, 6])
def test_learn__the_model_diverges__learning_goes_on(horizon):
    env = toy_env(32, num_candidates="all", diverges_on=0, horizon=horizon)
    agent = learned(8, env=env)
    assert min(agent.episode_returns) < -9
    assert np.isfinite(agent.scores(observation_of(env))).all()


def test_learn__loss_is_not_finite__the_weights_stay_and_the_log_says_so(monkeypatch, caplog):
    untouched = weights_of(AcquisitionFunction(39, [8], generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr(raise_ppo, "clipped_loss", lambda log_ratio, *_: log_ratio * np.nan)
    with caplog.at_level(logging.WARNING):
        agent = learned()
    torch.testing.assert_close(weights_of(agent.acquisition), untouched, rtol=0, atol=0)
    assert "not finite" in caplog.text


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_learn__the_largest_rates__scores_stay_finite(optimiser):
    rates = {"actor_learning_rate": 1.0, "critic_learning_rate": 1.0, "weight_decay": 1.0, "max_grad_norm": 1e6}
    agent = learned(10, optimiser=optimiser, **rates)
    assert np.isfinite(agent.scores(observation_of(toy_env()))).all()


# What is kept of an episode


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_candidates": "all"},
        {"num_rows": 20, "num_candidates": 32},
        *({"hide": [block]} for block in ("stage", "difficulty", "semantic", "availability")),
    ],
)
def test_rollout__observations__are_those_that_were_seen(steps, rollouts, settings):
    learned(env=toy_env(**settings), num_epochs=1)
    seen = np.stack([observation for observation, _, _ in steps])
    assert len(rollouts) == 2  # before the epoch and in it
    for rollout, observations in rollouts:
        np.testing.assert_array_equal(observations, seen)
        np.testing.assert_array_equal(rollout.kinds.toarray() > 0, np.stack([action for _, action, _ in steps]) == 1)


def test_rollout__observations_of_some_steps__are_those_of_all(rollouts):
    env = toy_env()
    learned(env=env)
    rollout, whole = rollouts[0]
    np.testing.assert_array_equal(rollout.observations(env.assets.features.columns, slice(2, 5)), whole[2:5])


def test_shown_columns__of_offered_rows__are_those_of_the_pool_with_the_hidden_ones_zero():
    env = toy_env(50, hide=["semantic"])
    candidates = [np.array([3, -1, 7]), np.array([40, 7, -1])]
    shown = ShownColumns(env, candidates)[np.stack(candidates)]
    wanted = env.assets.features.columns.copy()
    wanted[:, 4:] = 0.0
    is_row = np.stack(candidates) >= 0
    np.testing.assert_array_equal(shown[is_row], wanted[np.stack(candidates)[is_row]])


def test_rollout__the_whole_pool_on_offer__keeps_what_changes_alone(rollouts):
    """What a step costs does not depend on the pool."""
    sizes = []
    for num_rows in (1000, 4000):
        learned(env=toy_env(num_rows, num_candidates="all"))
        rollout = rollouts[-1][0]
        assert len({id(ids) for ids in rollout.candidates}) == 1
        tables = [rollout.times_selected, rollout.kinds]
        arrays = [rollout.stage, rollout.rewards, *(part for t in tables for part in (t.data, t.indices, t.indptr))]
        assert all(array.base is None or array.base.nbytes <= 2 * array.nbytes for array in arrays)
        sizes.append(sum(array.nbytes for array in arrays))
    # 10 steps of 8 rows: 80 marks of 5 bytes, at most 8 x (0 + 1 + ... + 9) counts of 8, and what is there at any rate.
    assert sizes[0] <= 80 * 5 + 360 * 8 + 10 * 12 + 2 * 11 * 4
    assert abs(sizes[1] - sizes[0]) < 20 * 8, "but for rows that were drawn twice"


# Acting


@pytest.mark.parametrize(
    "settings", [{}, {"batch_size": 6}, {"batch_size": 3}, {"num_rows": 20, "num_candidates": 32, "batch_size": 18}]
)
def test_predict__best__are_those_that_top_k_scores_takes(selector, settings):
    env = toy_env(**settings)
    observation = observation_of(env)
    selector.begin(env, seed=0)
    choice, _ = selector.predict(observation)
    assert choice.sum() == env.config.batch_size
    np.testing.assert_array_equal(choice, TopKScores(env).action(selector.scores(observation)))


@pytest.mark.parametrize("deterministic", [True, False])
def test_predict__a_batch_that_divides__has_as_many_of_each_class(selector, deterministic):
    env = toy_env()
    observation = observation_of(env)
    selector.begin(env, seed=0)
    choice, state = selector.predict(observation, state=("kept",), deterministic=deterministic)
    assert np.bincount(env.candidate_classes[choice == 1]).tolist() == [2, 2, 2, 2]
    assert (choice.dtype, state) == (np.int8, ("kept",))


@pytest.mark.parametrize("deterministic", [True, False])
def test_predict__padding__is_never_chosen(selector, deterministic):
    env = toy_env(20, num_candidates=32, batch_size=20)
    observation = observation_of(env)
    selector.begin(env, seed=0)
    choice, _ = selector.predict(observation, deterministic=deterministic)
    assert choice.sum() == 20
    assert not choice[~env.action_masks()].any()


@pytest.mark.parametrize("num_rows", [1, 5, 1000])
def test_predict__other_rows_than_are_offered__are_one_class(selector, num_rows):
    observation = np.random.default_rng(0).normal(size=(num_rows, 39)).astype(np.float32)
    env = toy_env()
    env.reset(seed=0)
    selector.begin(env, seed=0)
    choice, _ = selector.predict(observation)
    best = np.argsort(-selector.scores(observation), kind="stable")[:8]
    assert sorted(np.flatnonzero(choice)) == sorted(best)


def test_predict__without_an_environment__as_many_as_by_default():
    agent = learned()
    assert agent.predict(observation_of(toy_env()))[0].sum() == 8


def test_predict__the_same_rows_are_best_again__they_are_taken_again(selector):
    env = toy_env(num_candidates="all", horizon=4)
    record = run_episode(env, selector, seed=0, name="raise_ppo")
    taken = [row for rows in record.actions for row in rows]
    assert len(taken) == 32
    assert len(set(taken)) < 32


def test_predict__not_deterministic__varies_with_the_seed_alone(selector):
    env = toy_env()
    observation = observation_of(env)

    def drawn(seed):
        selector.begin(env, seed=seed)
        return [selector.predict(observation, deterministic=False)[0].tobytes() for _ in range(5)]

    assert len(set(drawn(0))) > 1
    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_predict__nothing_learned__says_so():
    with pytest.raises(RuntimeError, match="learn"):
        RaisePpo().predict(np.ones((4, 39), dtype=np.float32))


def test_predict__learned_on_few__chooses_from_the_whole_pool(selector):
    env = toy_env(20_000, num_candidates="all", horizon=2)
    record = run_episode(env, selector, seed=0, name="raise_ppo")
    assert [len(rows) for rows in record.actions] == [8, 8]


# Settings


def test_settings__by_default__are_the_papers():
    settings = PpoSettings()
    assert (settings.gamma, settings.gae_lambda, settings.clip_range) == (0.99, 1.0, 0.2)
    assert (settings.actor_learning_rate, settings.critic_learning_rate) == (0.1, 0.2)
    assert settings.weight_decay == 0.01
    assert RaisePpo().settings == settings


def test_preset__by_name__is_changed_by_settings():
    agent = make_agent("raise_ppo", {"preset": "tuned", "num_epochs": 3})
    assert agent.settings == PpoSettings(**{**PRESETS["tuned"], "num_epochs": 3})
    assert PRESETS["published"] == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "tunned"}, "did you mean 'tuned'"),
        ({"gama": 1.0}, "did you mean 'gamma'"),
        ({"presett": "tuned"}, "did you mean 'preset'"),
        ({"gamma": 1.5}, r"gamma is 1.5; expected a number from 0 to 1"),
        ({"gae_lambda": -0.1}, "gae_lambda"),
        ({"gamma": True}, "gamma is True"),
        ({"actor_learning_rate": "high"}, "actor_learning_rate is 'high'"),
        ({"critic_learning_rate": float("nan")}, "critic_learning_rate is nan"),
        ({"weight_decay": 2}, "weight_decay is 2"),
        ({"clip_range": 0}, "clip_range is 0; expected a finite number above 0"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm is inf"),
        ({"ratio": "softmax"}, "ratio is 'softmax'; expected one of exact, softmax_product"),
        ({"ratio": ["exact"]}, "ratio is"),
        ({"baseline": "mean"}, "baseline is 'mean'; expected one of critic, stage"),
        ({"optimiser": "adam"}, "optimiser is 'adam'; expected one of sgd, adamw"),
        ({"num_epochs": 0}, "num_epochs is 0"),
        ({"num_epochs": 1.5}, "num_epochs is 1.5"),
        ({"hidden_dims": 64}, "hidden_dims is 64"),
        ({"hidden_dims": []}, "hidden_dims"),
        ({"hidden_dims": [8, 0]}, "hidden_dims"),
    ],
)
def test_raise_ppo__setting_that_cannot_be__says_what_is_expected(settings, message):
    with pytest.raises(SettingError, match=message):
        RaisePpo(**settings)


# Files


def test_load__what_save_wrote__equal_scores(tmp_path):
    agent = learned(2)
    agent.save(tmp_path / "selector")
    loaded = load_selector(tmp_path / "selector")
    assert type(loaded) is RaisePpo
    observation = observation_of(toy_env())
    np.testing.assert_array_equal(loaded.scores(observation), agent.scores(observation))
    assert (loaded.settings, loaded.episode_returns, loaded.training) == (
        agent.settings,
        agent.episode_returns,
        agent.training,
    )


def test_load__then_learn__goes_on_from_its_f(tmp_path):
    learned(2).save(tmp_path / "s")
    agent = RaisePpo.load(tmp_path / "s")
    before = weights_of(agent.acquisition)
    agent.learn(toy_env(), 1)
    change = weights_of(agent.acquisition) - before
    assert 0 < change.abs().max() < 0.2
    assert len(agent.episode_returns) == 3


def test_save__files__two_and_no_pickle(tmp_path):
    learned().save(tmp_path / "selector")
    assert sorted(path.name for path in (tmp_path / "selector").iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "selector" / "config.json").read_text())
    assert config["agent"] == "raise_ppo"
    assert len(config["features"]["names"]) == 39


@pytest.mark.parametrize("settings", [{}, {"preset": "tuned"}])
def test_load_progress__then_learning__equals_an_undisturbed_run(tmp_path, settings):
    learned(2, **settings).save_progress(tmp_path / "learning")
    resumed = RaisePpo(**SMALL, **settings)
    resumed.load_progress(tmp_path / "learning")
    resumed.learn(toy_env(), 2)
    undisturbed = learned(4, **settings)
    observation = observation_of(toy_env())
    np.testing.assert_array_equal(resumed.scores(observation), undisturbed.scores(observation))
    assert resumed.episode_returns == undisturbed.episode_returns
    resumed.save_progress(tmp_path / "a")
    undisturbed.save_progress(tmp_path / "b")
    both = [(tmp_path / name / "learners.safetensors").read_bytes() for name in "ab"]
    assert both[0] == both[1]


def test_save_progress__of_a_selector_that_was_loaded__can_be_taken_up(tmp_path):
    learned(2).save(tmp_path / "s")
    agent = RaisePpo.load(tmp_path / "s").learn(toy_env(), 1)
    agent.save_progress(tmp_path / "p")
    resumed = RaisePpo(**SMALL)
    resumed.load_progress(tmp_path / "p")
    assert resumed.episode_returns == agent.episode_returns


def spoil(path, change):
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(format=99),
        lambda config: config["features"]["names"].reverse(),
        lambda config: config.update(settings=[]),
        lambda config: config.update(training=None),
        lambda config: config.pop("episode_returns"),
        lambda config: config["settings"].update(hidden_dims=[3]),
        lambda config: config["settings"].update(unheard_of=1),
    ],
)
def test_load__another_config__an_error_that_names_what_is_wrong(tmp_path, change):
    learned().save(tmp_path / "s")
    spoil(tmp_path / "s" / "config.json", change)
    with pytest.raises(RaiseEnvError, match=r"config\.json|model\.safetensors|unheard_of"):
        load_selector(tmp_path / "s")


@pytest.mark.parametrize("damage", ["missing", "torn", "empty"])
@pytest.mark.parametrize("name", ["selector/model.safetensors", "learners.safetensors"])
def test_load_progress__weights_are_damaged__record_error(tmp_path, name, damage):
    learned().save_progress(tmp_path / "p")
    path = tmp_path / "p" / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "torn" else b"")
    with pytest.raises(RecordError, match=path.name):
        RaisePpo(**SMALL).load_progress(tmp_path / "p")


def test_load_progress__of_other_networks__record_error(tmp_path):
    learned().save_progress(tmp_path / "p")
    with pytest.raises(RecordError, match=r"learners\.safetensors"):
        RaisePpo(hidden_dims=[3]).load_progress(tmp_path / "p")
