"""LESS and GREATS, against the same sums worked out apart with plain PEFT, torch and loops."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from peft import PeftModel
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer

from raise_env.agents import influence, run_episode
from raise_env.agents.catalogue import make_agent
from raise_env.agents.influence import GreatsAgent, LessAgent, choose_batch
from raise_env.base_model import model_folder
from raise_env.env import RaiseSelectEnv
from raise_env.errors import SettingError
from raise_env.testing import toy_env


class Plain:
    """The embedded model in plain PEFT and torch, trained as the environment's settings say."""

    def __init__(self, env, folder):
        self.tokenizer = AutoTokenizer.from_pretrained(model_folder("tiny"))
        base = AutoModelForCausalLM.from_pretrained(model_folder("tiny"))
        self.model = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
        self.parameters = [value for value in self.model.parameters() if value.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, env.config.learning_rate, weight_decay=0.0)
        self.max_grad_norm = env.config.max_grad_norm

    def loss(self, rows):
        talks = [[{"role": "user", "content": r.prompt}, {"role": "assistant", "content": r.response}] for r in rows]
        encoded = [
            self.tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
            for talk in talks
        ]
        length = max(len(row["input_ids"]) for row in encoded)
        ids, labels = torch.zeros(len(rows), length, dtype=torch.long), torch.full((len(rows), length), -100)
        for line, row in enumerate(encoded):
            tokens, learned = torch.tensor(row["input_ids"]), torch.tensor(row["assistant_masks"]).bool()
            ids[line, : len(tokens)] = tokens
            labels[line, : len(tokens)] = torch.where(learned, tokens, -100)
        return self.model(input_ids=ids, labels=labels).loss

    def gradient(self, row):
        self.optimiser.zero_grad()
        self.loss([row]).backward()
        return torch.cat([value.grad.flatten() for value in self.parameters]).double()

    def train(self, rows, rate):
        self.optimiser.zero_grad()
        self.loss(rows).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimiser.param_groups[0]["lr"] = rate
        self.optimiser.step()

    def adam_direction(self, gradient):
        """The paper's Gamma: the gradient's share in Adam's moments, as one more step would have them."""
        states = [self.optimiser.state[value] for value in self.parameters]
        count = int(states[0]["step"].item()) + 1
        first = torch.cat([state["exp_avg"].flatten() for state in states]).double()
        second = torch.cat([state["exp_avg_sq"].flatten() for state in states]).double()
        first = (0.9 * first + 0.1 * gradient) / (1 - 0.9**count)
        second = (0.999 * second + 0.001 * gradient**2) / (1 - 0.999**count)
        return first / (second.sqrt() + 1e-8)


def plain_less(env, batches, epochs, folder, *, adam=True):
    """LESS's scores by loops over rows: training on the batches, which are of equally many steps an epoch."""
    plain = Plain(env, folder)
    scores = [0.0] * len(env.assets.pool)
    rates = [env.config.learning_rate * (1 + math.cos(math.pi * s / len(batches))) / 2 for s in range(len(batches))]
    steps = len(batches) // epochs
    for start in range(0, len(batches), steps):
        for rows, rate in zip(batches[start : start + steps], rates[start : start + steps], strict=True):
            plain.train([env.assets.pool[int(row)] for row in rows], rate)
        dev_gradient = sum(plain.gradient(row) for row in env.assets.data.dev) / len(env.assets.data.dev)
        for place, row in enumerate(env.assets.pool):
            direction = plain.gradient(row)
            if adam:
                direction = plain.adam_direction(direction)
            cosine = dev_gradient @ direction / dev_gradient.norm() / direction.norm()
            scores[place] += sum(rates[start : start + steps]) / steps * cosine.item()
    return np.array(scores)


@pytest.fixture
def private_worlds(monkeypatch):
    """The environments that the warm-ups make, in order."""
    made = []

    variant = RaiseSelectEnv.variant

    def make(world, **settings):
        made.append(variant(world, **settings))
        return made[-1]

    monkeypatch.setattr(RaiseSelectEnv, "variant", make)
    return made


@pytest.fixture
def env(embedded_env):
    world = embedded_env(pool_size=32)
    world.reset(seed=0)
    return world


# LESS


@pytest.mark.parametrize("adam", [True, False])
def test_less__embedded_model__scores_as_plain_loops_do(env, private_worlds, tmp_path, adam):
    env.save_adapter(tmp_path)
    scores = LessAgent(0.2, epochs=2, projection_dim=None, adam=adam).score_pool(env, 5)
    (private,) = private_worlds
    batches = [step.selected for step in private.history]
    assert [len(batch) for batch in batches] == [3, 3, 3, 3]
    assert set(np.concatenate(batches[:2])) == set(np.concatenate(batches[2:])), "the same rows in each epoch"
    assert len(set(np.concatenate(batches[:2]))) == 6, "a fifth of the pool, once each"
    expected = plain_less(env, batches, 2, tmp_path, adam=adam)
    np.testing.assert_allclose(scores, expected, atol=1e-3 * np.abs(expected).max())
    assert scores.std() > 0.01 * env.config.learning_rate


def test_less__projected__scores_nearly_as_without(env):
    exact = LessAgent(0.2, epochs=1, projection_dim=None).score_pool(env, 5)
    for dim, least in ((8192, 0.98), (512, 0.8)):
        projected = LessAgent(0.2, epochs=1, projection_dim=dim).score_pool(env, 5)
        assert spearmanr(projected, exact).statistic > least
        assert (projected != exact).any()
    whole = LessAgent(0.2, epochs=1, projection_dim=env.assets.learner.base.num_parameters).score_pool(env, 5)
    np.testing.assert_array_equal(whole, exact)


def test_projection__vectors_of_any_sign__keep_lengths_and_angles():
    rng = np.random.default_rng(0)
    vectors = rng.normal(loc=[[0.0], [1.0], [-2.0]], size=(3, 20_000)).astype(np.float32)
    projected = influence._projection(20_000, 2_000, rng)(vectors)
    assert projected.shape == (3, 2_000)
    assert projected.dtype == np.float32
    lengths = np.linalg.norm(vectors, axis=1)
    np.testing.assert_allclose(np.linalg.norm(projected, axis=1), lengths, rtol=0.1)
    scale = np.outer(lengths, lengths)
    np.testing.assert_allclose(projected @ projected.T / scale, vectors @ vectors.T / scale, atol=0.1)


def test_less__a_datastore__gives_the_same_scores_and_costs_and_serves_another_dev_set(embedded_env, tmp_path):
    settings = {"pool_size": 80, "num_test": None}
    plain, keeping = LessAgent(0.2, epochs=2), LessAgent(0.2, epochs=2, datastore=tmp_path)
    costs = []
    for agent, num_dev in [(plain, 8), (keeping, 8), (keeping, 8), (plain, 4), (keeping, 4)]:
        world = embedded_env(**settings, num_dev=num_dev)
        world.reset(seed=0)
        before = world.ledger.token_forwards
        costs.append((agent.score_pool(world, 5), world.ledger.token_forwards - before))
    for (scores, cost), (expected, expected_cost) in zip(costs, [*costs[:1] * 3, *costs[3:4] * 2], strict=True):
        np.testing.assert_array_equal(scores, expected)
        assert cost == expected_cost
    assert len(list(tmp_path.glob("gradients-*/directions.bin"))) == 2, "one for each epoch, for both dev sets"


@pytest.mark.parametrize("other", [{"seed": 6}, {"learning_rate": 1e-3}, {"seed_model": 1}, {"lora": {"r": 4}}])
def test_less__a_datastore_of_another_warm_up__is_not_used(embedded_env, tmp_path, other):
    seed, settings = other.get("seed", 5), {k: v for k, v in other.items() if k != "seed"}
    world, another = embedded_env(), embedded_env(**settings)
    agent = LessAgent(0.2, epochs=1, datastore=tmp_path)
    world.reset(seed=0)
    another.reset(seed=0)
    agent.score_pool(world, 5)
    np.testing.assert_array_equal(agent.score_pool(another, seed), LessAgent(0.2, epochs=1).score_pool(another, seed))
    assert len(list(tmp_path.glob("gradients-*/directions.bin"))) == 2


def test_less__toy__takes_the_rows_that_help():
    env = toy_env(batch_size=4)
    record = run_episode(env, LessAgent(), seed=3, name="less")
    values = env.assets.learner.values
    for step, rows in zip(env.history, record.actions, strict=True):
        helpful = (values[step.candidates] > 0).sum()
        assert (values[rows] > 0).sum() == min(4, helpful)


def test_less__same_seed__gives_the_same_scores_and_another_seed_others(env):
    def scores(seed):
        return LessAgent(0.2, epochs=1).score_pool(env, seed)

    np.testing.assert_array_equal(scores(1), scores(1))
    assert (scores(1) != scores(2)).any()


def test_less__scoring__leaves_the_world_and_global_generators_alone(env, private_worlds):
    action = np.zeros(16, dtype=np.int8)
    action[:4] = 1
    env.step(action)
    moment, observation = env.snapshot(), env.observation()
    generators = torch.get_rng_state(), np.random.get_state()[1].tobytes()  # noqa: NPY002 - that it is not used
    tokens = env.ledger.forward_tokens
    LessAgent(0.2, epochs=1).prepare(env, 0)
    dev_tokens = int(env.assets.learner.splits["dev"].rows.lengths.sum())
    assert env.ledger.forward_tokens == tokens + dev_tokens, "the dev set is scored at the end of the warm-up alone"
    assert env.snapshot().learner_state is moment.learner_state
    assert env.snapshot().counts.tobytes() == moment.counts.tobytes()
    np.testing.assert_array_equal(env.observation(), observation)
    assert torch.equal(generators[0], torch.get_rng_state())
    assert generators[1] == np.random.get_state()[1].tobytes()  # noqa: NPY002
    assert private_worlds[0].assets is env.assets


def test_less__warm_up__takes_the_same_rows_in_each_epoch_in_another_order(private_worlds):
    env = toy_env(batch_size=4)
    env.reset(seed=0)
    LessAgent(warmup_share=0.2, epochs=2).prepare(env, 0)
    batches = [tuple(sorted(step.selected)) for step in private_worlds[0].history]
    first, second = batches[:10], batches[10:]
    assert len(batches) == 20
    assert len(set(sum(first, ()))) == 40
    assert sorted(sum(first, ())) == sorted(sum(second, ()))
    assert set(first) != set(second)


def test_less__episodes_over_one_pool__are_prepared_for_once(private_worlds):
    env, agent = toy_env(), LessAgent(epochs=3)
    env.reset(seed=0)
    agent.prepare(env, 7)
    cost = env.ledger.token_forwards
    assert cost == 3 * (3 * 10 + 3 * (200 + 16)) + 0, "three epochs over 10 rows, three passes over pool and dev"
    for seed in (1, 2):
        env.reset(seed=seed)
        agent.begin(env, seed)
    assert env.ledger.token_forwards == cost
    assert len(private_worlds) == 1


def test_less__rows_that_cannot_be_trained_on__come_last_and_cost_nothing():
    env = toy_env(num_rows=60, num_classes=2)
    bare = np.array([3, 4, 30])
    classes = env.assets.classes.copy()
    classes[bare] = -1
    members = tuple(np.flatnonzero(classes == label) for label in range(2))
    assets = dataclasses.replace(env.assets, classes=classes, members=members)
    asked = []
    row_gradients = type(assets.learner).row_gradients

    class Asked(type(assets.learner)):
        def row_gradients(self, rows, split=None, *, adam=False):
            asked.extend([] if split else rows.tolist())
            return row_gradients(self, rows, split, adam=adam)

        def copy(self):
            return Asked(self.values, self.num_dev, self.diverges_on, self.ledger, self.state)

    assets = dataclasses.replace(assets, learner=Asked(assets.learner.values))
    world = RaiseSelectEnv(assets=assets, num_candidates=32, num_classes=2)
    world.reset(seed=0)
    scores = LessAgent(warmup_share=1.0, epochs=1).score_pool(world, 0)
    assert not np.isnan(scores).any()
    assert sorted(np.argsort(scores)[:3]) == bare.tolist()
    assert sorted(asked) == sorted(set(range(60)) - set(bare.tolist()))


def test_less__a_large_pool__is_looked_at_in_blocks(monkeypatch):
    env = toy_env(num_rows=500)
    env.reset(seed=0)
    sizes = []
    row_gradients = RaiseSelectEnv.row_gradients

    def spied(self, rows, *arguments, **keywords):
        sizes.append(len(rows))
        return row_gradients(self, rows, *arguments, **keywords)

    monkeypatch.setattr(RaiseSelectEnv, "row_gradients", spied)
    LessAgent(epochs=2).score_pool(env, 0)
    assert max(sizes) == influence.BLOCK_ROWS
    assert sum(sizes) == 2 * (500 + 16)


def test_less__warm_up_that_diverges__says_what_to_lower():
    env = toy_env(diverges_on=11)
    env.reset(seed=0)
    with pytest.raises(SettingError, match=r"diverged in epoch 1.*lower learning_rate, now 0\.003"):
        LessAgent(warmup_share=1.0).prepare(env, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_share": 0.0}, "less: warmup_share is 0.0; expected a share above 0 and up to 1"),
        ({"warmup_share": 1.5}, "less: warmup_share is 1.5"),
        ({"epochs": 0}, "less: epochs is 0; expected a whole number of at least 1"),
        ({"epochs": 1.5}, "less: epochs is 1.5"),
        ({"projection_dim": 0}, "less: projection_dim is 0"),
    ],
)
def test_less__setting_out_of_range__is_named(settings, message):
    with pytest.raises(SettingError, match=message):
        make_agent("less", settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_dev": 0}, "greats: num_dev is 0; expected a whole number of at least 1"),
        ({"max_candidates": True}, "greats: max_candidates is True"),
    ],
)
def test_greats__setting_out_of_range__is_named(settings, message):
    with pytest.raises(SettingError, match=message):
        make_agent("greats", settings)


@pytest.mark.parametrize("name", ["less", "greats"])
def test_influence__reward_without_gradient__is_refused(name):
    env = toy_env(reward="exact_match")
    env.reset(seed=0)
    with pytest.raises(SettingError, match=r"reward 'exact_match' has no gradient.*expected reward 'loss'"):
        make_agent(name).begin(env, 0)


# GREATS


def naive_choice(dev_gradient, gradients, size, rate):
    """The paper's gains by loops over rows, batch and parameters, without any reuse."""
    chosen = []
    while len(chosen) < min(size, len(gradients)):
        gains = {}
        for row in range(len(gradients)):
            if row in chosen:
                continue
            gains[row] = rate * sum(a * b for a, b in zip(dev_gradient, gradients[row], strict=True))
            for other in chosen:
                product = sum(a * b for a, b in zip(gradients[other], gradients[row], strict=True))
                gains[row] -= rate**2 * product
        chosen.append(max(gains, key=gains.get))
    return chosen


@pytest.mark.parametrize("rate", [1e-3, 0.1, 0.5, 3.0])
def test_choose_batch__any_gradients__is_what_naive_loops_choose(rate):
    rng = np.random.default_rng(int(rate * 1000))
    for _ in range(5):
        dev_gradient, gradients = rng.normal(size=6), rng.normal(size=(12, 6))
        chosen = choose_batch(dev_gradient, gradients, 5, rate)
        assert chosen.dtype == np.int64
        assert chosen.tolist() == naive_choice(dev_gradient.tolist(), gradients.tolist(), 5, rate)


def test_choose_batch__rows_alike__are_not_taken_together():
    dev_gradient = np.array([1.0, 0.9])
    gradients = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert choose_batch(dev_gradient, gradients, 2, 0.5).tolist() == [0, 3]
    assert choose_batch(dev_gradient, gradients, 2, 0.01).tolist() == [0, 1]


def test_choose_batch__nothing_moves_or_too_few_rows__still_takes_the_best_once_each():
    gradients = np.array([[1.0], [3.0], [2.0]], dtype=np.float32)
    assert choose_batch(np.ones(1, dtype=np.float32), gradients, 5, 0.0).tolist() == [1, 2, 0]
    assert choose_batch(np.ones(1), gradients[:0], 5, 0.1).tolist() == []


def test_greats__embedded_model__takes_what_plain_gradients_and_loops_say(embedded_env, tmp_path):
    rate = 0.1
    env = embedded_env(learning_rate=rate)
    observation, _ = env.reset(seed=0)
    env.save_adapter(tmp_path)
    agent = GreatsAgent()
    agent.begin(env, 0)
    action, _ = agent.predict(observation)
    plain = Plain(env, tmp_path)
    gradients = [plain.gradient(env.assets.pool[int(row)]) for row in env.candidates]
    dev_gradient = sum(plain.gradient(row) for row in env.assets.data.dev) / len(env.assets.data.dev)
    chosen = []
    for _ in range(4):
        gains = [
            -math.inf if row in chosen else rate * dev_gradient @ g - rate**2 * sum(gradients[s] @ g for s in chosen)
            for row, g in enumerate(gradients)
        ]
        chosen.append(int(np.argmax(gains)))
    assert np.flatnonzero(action).tolist() == sorted(chosen)
    firsts = np.argsort([-(dev_gradient @ g).item() for g in gradients])[:4]
    assert set(firsts) != set(chosen), "the rows already taken made a difference"


def test_greats__adam__follows_the_directions_that_adam_would_go(env):
    env.step(np.arange(16) < 4)
    agent = GreatsAgent(adam=True)
    agent.begin(env, 0)
    action, _ = agent.predict(env.observation())
    dev_gradient = env.row_gradients(np.arange(8), "dev").mean(axis=0)
    directions = env.row_gradients(env.candidates, adam=True)
    assert np.flatnonzero(action).tolist() == sorted(choose_batch(dev_gradient, directions, 4, env.learning_rate))
    plain = choose_batch(dev_gradient, env.row_gradients(env.candidates), 4, env.learning_rate)
    assert np.flatnonzero(action).tolist() != sorted(plain)


def test_greats__toy__takes_the_most_helpful_rows_of_each_offer():
    env = toy_env(batch_size=4)
    run_episode(env, GreatsAgent(), seed=3, name="greats")
    values = env.assets.learner.values
    for step in env.history:
        best = step.candidates[np.argsort(-values[step.candidates])[:4]]
        assert set(step.selected) == set(best)


def test_greats__part_of_the_dev_rows__is_drawn_anew_at_each_step(monkeypatch):
    asked = []
    row_gradients = RaiseSelectEnv.row_gradients

    def spied(self, rows, split="pool", *, adam=False):
        asked.extend([tuple(rows)] if split == "dev" else [])
        return row_gradients(self, rows, split, adam=adam)

    monkeypatch.setattr(RaiseSelectEnv, "row_gradients", spied)
    runs = []
    for seed in (0, 0, 1):
        asked.clear()
        run_episode(toy_env(horizon=5), GreatsAgent(num_dev=3), seed=seed, name="greats")
        runs.append(list(asked))
    assert [len(set(rows)) for rows in runs[0]] == [3] * 5
    assert len(set(runs[0])) > 1
    assert runs[0] == runs[1] != runs[2]


def test_greats__more_on_offer_than_it_looks_at__takes_the_best_of_a_random_part():
    env = toy_env(num_candidates="all", batch_size=4, horizon=3)
    costs = []
    for max_candidates in (50, 2):
        before = env.ledger.token_forwards if costs else 0
        run_episode(env, GreatsAgent(max_candidates=max_candidates), seed=0, name="greats")
        assert [len(step.selected) for step in env.history] == [4, 4, 4]
        costs.append(env.ledger.token_forwards - before)
    assert costs == [3 * 3 * (50 + 16 + 4), 3 * 3 * (4 + 16 + 4)]
    parts = [set(step.selected) for step in env.history]
    assert parts[0] != parts[1]


def test_greats__whole_pool_on_offer__takes_its_best_at_once():
    env = toy_env(num_candidates="all", batch_size=4, horizon=3)
    run_episode(env, GreatsAgent(), seed=0, name="greats")
    best = set(np.argsort(-env.assets.learner.values)[:4])
    assert [set(step.selected) for step in env.history] == [best] * 3


def test_greats__padding__is_never_looked_at():
    env = toy_env(num_rows=40, num_candidates=32, num_classes=2)
    classes = np.where(np.arange(40) < 5, 0, 1)
    members = (np.arange(5), np.arange(5, 40))
    assets = dataclasses.replace(env.assets, classes=classes, members=members)
    world = RaiseSelectEnv(assets=assets, num_candidates=32, num_classes=2)
    world.reset(seed=0)
    assert (world.candidates < 0).sum() == 11
    run_episode(world, GreatsAgent(), seed=0, name="greats")
    assert all((step.selected >= 0).all() and len(step.selected) == 8 for step in world.history)


def test_greats__before_begin__asks_for_it():
    env = toy_env()
    observation, _ = env.reset(seed=0)
    with pytest.raises(RuntimeError, match="begin"):
        GreatsAgent().predict(observation)
