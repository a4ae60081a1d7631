"""The baselines that never look at the model in training, and the oracle."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import raise_env.tiny
from raise_env import RaiseSelectEnv
from raise_env.agents import IfdAgent, OracleAgent, RandomAgent, make_agent, run_episode
from raise_env.agents.baselines import FullAgent, PoolScoreAgent, QualityAgent, column_values, times_taken
from raise_env.errors import DataError, SettingError
from raise_env.features import StaticFeatures, standardise
from raise_env.pool import Instruction, Pool
from raise_env.testing import toy_env


class FixedScores(PoolScoreAgent):
    """Scores a pool row by its id, and counts how often it was asked to."""

    num_calls = 0

    def score_pool(self, world, seed):
        self.num_calls += 1
        return np.arange(len(world.assets.pool), dtype=np.float64)


def with_features(env, log_p_given, log_p):
    """Return a toy environment whose auxiliary model has said these log-probabilities of the first rows."""
    raw = env.assets.features.raw.copy()
    raw[: len(log_p), 2] = log_p_given
    raw[: len(log_p), 3] = log_p
    return with_assets(env, features=standardise(raw, num_tokens=0))


def with_assets(env, **changes):
    return RaiseSelectEnv(None, dataclasses.replace(env.assets, **changes), **env.config.to_kwargs())


def with_labels(num_clean=20, num_rows=60):
    """Return a toy world on offer whole: clean rows of a target skill, then clean ones of another, then corrupted."""
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


def with_ratings(ratings, column="rating", **settings):
    """Return a toy world, on offer whole, whose rows hold these ratings."""
    rows = [Instruction(f"q{i}", f"a{i}", fields={"prompt": f"q{i}", column: r}) for i, r in enumerate(ratings)]
    settings = {"num_candidates": len(rows), "num_classes": 1, "horizon": 4, "batch_size": 2, **settings}
    return with_assets(toy_env(len(rows), **settings), pool=Pool(rows, "toy"))


def full_run_env(env, agent, num_rows):
    """Return the environment of a full run over the same assets, as the runner makes it."""
    settings = {**env.config.to_kwargs(), **agent.run_settings(env.config, num_rows)}
    return RaiseSelectEnv(None, env.assets, **settings)


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


@pytest.mark.parametrize(
    "name",
    [
        *("random", "full", "ifd", "quality:rating", "deita", "self_paced", "loss_high", "loss_low", "diversity"),
        *("greedy", "less", "greats", "oracle"),
    ],
)
def test_batch_agent__batch_size_that_is_no_number_of_rows__refused(name):
    for size in (-1, 0, 2.5, True, "8"):
        with pytest.raises(SettingError, match=rf"batch_size is {size!r}; expected a whole number of at least 1"):
            make_agent(name, {"batch_size": size})
    assert make_agent(name, {"batch_size": 1}).batch_size == 1
    assert make_agent(name, {"batch_size": None}).batch_size is None


# The whole pool


def test_full__an_episode__takes_every_row_exactly_once_an_epoch():
    agent = FullAgent()
    env = full_run_env(toy_env(21), agent, num_rows=21)
    record = run_episode(env, agent, seed=0, name="full")
    assert [len(rows) for rows in record.actions] == [8, 8, 5] * 3
    epochs = [[row for rows in record.actions[start : start + 3] for row in rows] for start in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    batches = [[frozenset(rows) for rows in record.actions[start : start + 3]] for start in (0, 3, 6)]
    assert all(one != other for one, other in pairwise(batches)), "each epoch is a new order"
    assert env.budget_left == 0
    assert np.count_nonzero(record.rewards) == 1, "the dev set is scored once, at the end"


def test_full__two_seeds__two_orders_and_each_again():
    def actions(seed):
        agent = FullAgent(epochs=1)
        return run_episode(full_run_env(toy_env(24), agent, 24), agent, seed=seed, name="full").actions

    assert actions(0) == actions(0) != actions(1)


def test_full__rows_that_are_never_offered__are_left_out():
    env = toy_env(20, num_classes=1, num_candidates=20)
    env = with_assets(env, members=(np.arange(3, 20),))
    agent = FullAgent(batch_size=4)
    record = run_episode(full_run_env(env, agent, num_rows=20), agent, seed=0, name="full")
    assert Counter(row for rows in record.actions for row in rows) == dict.fromkeys(range(3, 20), 3)
    assert [len(rows) for rows in record.actions] == [4, 4, 4, 4, 1] * 3
    assert record.test_score is not None


@pytest.mark.parametrize(
    ("agent", "num_rows", "expected"),
    [
        (FullAgent(), 2000, {"num_candidates": "all", "horizon": 750, "budget": 6000, "score_every": 750}),
        (FullAgent(), 2001, {"num_candidates": "all", "horizon": 753, "budget": 6003, "score_every": 753}),
        (
            FullAgent(epochs=1, learning_rate=1e-3, batch_size=16),
            33,
            {"num_candidates": "all", "horizon": 3, "budget": 33, "score_every": 3, "learning_rate": 1e-3},
        ),
    ],
)
def test_full__run_settings__room_for_every_epoch(agent, num_rows, expected):
    assert agent.run_settings(toy_env(batch_size=8).config, num_rows) == expected


@pytest.mark.parametrize("lacking", [{"num_candidates": 24}, {"horizon": 8}, {"budget": 71}])
def test_full__environment_without_room__says_what_it_needs(lacking):
    agent = FullAgent()
    env = toy_env(24)
    settings = {**env.config.to_kwargs(), **agent.run_settings(env.config, 24), **lacking}
    env = RaiseSelectEnv(None, env.assets, **settings)
    with pytest.raises(SettingError, match=r"all 24 rows in 3 epochs.*'all', horizon=9 and budget=72; found"):
        run_episode(env, agent, seed=0, name="full")


@pytest.mark.parametrize("epochs", [0, -1, 2.5, "3"])
def test_full__no_number_of_epochs__refused(epochs):
    with pytest.raises(SettingError, match="epochs is"):
        FullAgent(epochs=epochs)


# Scores of the pool


def test_pool_scores__rows_taken_once__come_after_all_others():
    env = toy_env(32, num_candidates=32, num_classes=1, horizon=4, batch_size=8)
    record = run_episode(env, FixedScores(), seed=0, name="fixed")
    assert [sorted(rows) for rows in record.actions] == [list(range(s, s + 8)) for s in (24, 16, 8, 0)]


def test_pool_scores__all_rows_taken_once__begin_again_with_the_best():
    env = toy_env(16, num_candidates=16, num_classes=1, horizon=4, batch_size=8)
    record = run_episode(env, FixedScores(), seed=0, name="fixed")
    assert [sorted(rows) for rows in record.actions] == [list(range(s, s + 8)) for s in (8, 0, 8, 0)]


def test_pool_scores__observation__is_not_what_tells_the_rows_that_were_taken():
    env = toy_env(32, num_candidates=32, num_classes=1, horizon=4, batch_size=8)
    observation, _ = env.reset(seed=0)
    agent = FixedScores()
    agent.begin(env, seed=0)
    observation, *_ = env.step(agent.predict(observation)[0])
    np.testing.assert_array_equal(agent.scores(np.zeros_like(observation)), agent.scores(observation))
    assert set(env.candidates[agent.scores(observation) < 0]) == set(range(24, 32))


def test_pool_scores__whole_pool_on_offer__the_best_that_the_budget_buys_in_random_order():
    env = toy_env(64, num_candidates="all", horizon=4, batch_size=8)
    record = run_episode(env, FixedScores(), seed=0, name="fixed")
    assert sorted(row for rows in record.actions for row in rows) == list(range(32, 64))
    assert max(record.actions[-1]) > 56  # not from best to worst
    another = run_episode(env, FixedScores(), seed=1, name="fixed")
    assert another.actions != record.actions


def test_pool_scores__several_episodes__the_pool_is_scored_once_and_another_pool_anew():
    env, agent = toy_env(), FixedScores()
    for seed in range(3):
        run_episode(env, agent, seed=seed, name="fixed")
    assert agent.num_calls == 1
    run_episode(toy_env(100), agent, seed=0, name="fixed")
    assert agent.num_calls == 2


def test_times_taken__during_an_episode__counts_repeats():
    env = toy_env(8, num_candidates=8, num_classes=1, batch_size=2, horizon=3)
    env.reset(seed=0)
    assert times_taken(env).tolist() == [0] * 8
    for rows in ([0, 1], [1, 2], [1, 7]):
        env.step(np.isin(env.candidates, rows).astype(np.int8))
    assert times_taken(env).tolist() == [1, 3, 1, 0, 0, 0, 0, 1]


# IFD


def test_ifd__values__by_hand():
    # IFD = L(y|x) / L(y) with L = -log P: 1/2, 2/2, and 3/2, above 1 and so mismatched: below all others.
    env = with_features(toy_env(), log_p_given=[-1.0, -2.0, -3.0], log_p=[-2.0, -2.0, -2.0])
    np.testing.assert_allclose(IfdAgent().score_pool(env, 0)[:3], [0.5, 1.0, -1.5], rtol=1e-6)


def test_ifd__rows_that_the_auxiliary_model_could_not_read__do_not_spoil_the_others():
    env = toy_env(16, num_candidates=16, num_classes=1)
    env = with_features(env, log_p_given=[np.nan, -300.0] + [-1.0] * 14, log_p=[np.nan, -0.1] + [-2.0] * 14)
    observation, _ = env.reset(seed=0)
    agent = IfdAgent()
    agent.begin(env, seed=0)
    assert np.isfinite(agent.scores(observation)).all()
    assert agent.score_pool(env, 0).argmin() == 1


def test_ifd__a_step__takes_the_hardest_that_fit():
    env = toy_env(16, num_candidates=16, num_classes=1, batch_size=2)
    env = with_features(env, log_p_given=[-1.0] * 16, log_p=[-1.0 - 0.1 * row for row in range(16)])
    record = run_episode(env, IfdAgent(), seed=0, name="ifd")
    # log P(y) falls with the row, so IFD = log P(y|x) / log P(y) is highest for the first rows.
    assert sorted(record.actions[0]) == [0, 1]


def test_ifd__embedded_pool__equals_plain_transformers(embedded_env):
    env = embedded_env(auxiliary_updates=0)
    folder = Path(raise_env.tiny.__file__).parent / "base"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def mean_loss(before, answer):
        start = tokenizer(before, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([start + tokenizer(answer, add_special_tokens=False)["input_ids"]])
        labels = ids.clone()
        labels[:, : len(start)] = -100
        return model(input_ids=ids, labels=labels).loss.item()

    expected = []
    with torch.no_grad():
        for row in env.assets.pool:
            chat = [{"role": "user", "content": row.prompt}]
            prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            answer = row.response + tokenizer.eos_token
            ratio = mean_loss(prompt, answer) / mean_loss(tokenizer.bos_token, answer)
            expected.append(ratio if ratio <= 1 else -ratio)
    scores = IfdAgent().score_pool(env, 0)
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
    assert min(expected) < 0 < max(expected), "rows of both kinds were compared"


def test_static_features__fields__as_the_baselines_read_them():
    # The columns that IFD reads are named by position: this is the position.
    raw = np.arange(72, dtype=np.float32).reshape(2, 36)
    features = standardise(raw, num_tokens=0)
    assert isinstance(features, StaticFeatures)
    np.testing.assert_array_equal(features.log_p_response_given_prompt, [2, 38])
    np.testing.assert_array_equal(features.log_p_response, [3, 39])


# Quality


def test_quality__rows_at_or_above_the_threshold__count_alike_and_the_rest_by_rating():
    env = with_ratings([5, 4.5, 4, 3.5, "4.5", 1, 5, 2])
    first_steps = set()
    for seed in range(30):
        record = run_episode(env, QualityAgent("rating"), seed=seed, name="quality")
        assert {row for rows in record.actions[:2] for row in rows} == {0, 1, 4, 6}
        assert [set(rows) for rows in record.actions[2:]] == [{2, 3}, {5, 7}]
        first_steps.add(frozenset(record.actions[0]))
    assert len(first_steps) == 6, "every pair of the good rows comes first now and then"


def test_quality__another_column_and_threshold__are_used():
    env = with_ratings(["0.1", "0.7", "0.9", "0.2"], column="judge")
    scores = QualityAgent("judge", threshold=0.6).score_pool(env, 0)
    np.testing.assert_array_equal(scores, [0.1, 0.6, 0.6, 0.2])


def test_quality__embedded_pool__has_ratings(embedded_env):
    record = run_episode(embedded_env(), make_agent("quality", {"column": "rating"}), seed=0, name="quality")
    assert len(record.actions) == 3


def test_quality__no_column__tells_how_to_name_one():
    with pytest.raises(SettingError, match="quality:COLUMN"):
        QualityAgent()


@pytest.mark.parametrize("threshold", [math.nan, math.inf, "4.5"])
def test_quality__threshold_that_is_no_number__refused(threshold):
    with pytest.raises(SettingError, match="threshold is"):
        QualityAgent("rating", threshold=threshold)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "null"),
        (True, "true"),
        ("high", '"high"'),
        ("", '""'),
        ("nan", '"nan"'),
        (math.inf, "Infinity"),
        (10**400, "1000"),
        ([4.5], r"\[4.5\]"),
    ],
)
def test_quality__value_that_is_no_number__named_by_row_and_column(value, shown):
    env = with_ratings([5, 4, value, 3])
    with pytest.raises(
        DataError, match=f"^toy, row 3, field 'rating': found {shown}.*finite number.*'prompt', 'rating'"
    ):
        run_episode(env, QualityAgent("rating"), seed=0, name="quality")


def test_quality__column_that_is_missing__names_the_line_and_those_that_are_there():
    rows = [Instruction("q", "a", fields={"prompt": "q", "judge": 3}), Instruction("p", "a", fields={"prompt": "p"})]
    pool = Pool(rows, "pool.jsonl", numbers=[1, 7], unit="line")
    with pytest.raises(DataError, match=r"^pool.jsonl, line 7: found no field 'judge' among 'prompt'; expected"):
        column_values(pool, "judge")
    with pytest.raises(DataError, match=r"line 1: found no field 'rating' among 'prompt', 'judge'"):
        column_values(pool, "rating")


def test_column_values__minimum__is_named():
    rows = [Instruction("q", "a", fields={"c": value}) for value in (0, -0.5)]
    assert column_values(Pool(rows, "toy"), "c").tolist() == [0.0, -0.5]
    with pytest.raises(DataError, match=r"row 2, field 'c': found -0.5; expected a finite number of at least 0"):
        column_values(Pool(rows, "toy"), "c", minimum=0.0)


# Rows that are not taken at all


def test_pool_score__least__leaves_batches_short_and_steps_empty():
    class Good(FixedScores):
        def score_pool(self, world, seed):
            return super().score_pool(world, seed) % 50

    env = toy_env(num_candidates=32, horizon=6)
    record = run_episode(env, Good(least=48), seed=0, name="good")
    assert {row for rows in record.actions for row in rows} <= {row for row in range(200) if row % 50 >= 48}
    assert min(len(rows) for rows in record.actions) == 0
    assert sum(len(rows) for rows in record.actions) > 0


def test_quality__least__takes_no_row_below_it_where_the_rule_alone_fills_up():
    ratings = [5.0, 4.5, 4.0, 1.0]
    filled = run_episode(with_ratings(ratings, horizon=2), QualityAgent("rating"), seed=0, name="quality")
    strict = run_episode(with_ratings(ratings, horizon=2), QualityAgent("rating", least=4.5), seed=0, name="quality")
    assert [set(rows) for rows in filled.actions] == [{0, 1}, {2, 3}]
    assert {row for rows in strict.actions for row in rows} == {0, 1}


def test_quality__least_above_the_threshold__takes_the_rows_that_reach_it():
    env = with_ratings([5.0, 9.0, 8.0, 10.0, 7.9, 4.5], horizon=3)
    record = run_episode(env, QualityAgent("rating", least=8), seed=0, name="quality")
    assert {row for rows in record.actions[:2] for row in rows} == {1, 2, 3}
    first = {
        frozenset(run_episode(env, QualityAgent("rating", least=8), seed=s, name="q").actions[0]) for s in range(20)
    }
    assert len(first) == 3, "they count alike, whatever lies above"


@pytest.mark.parametrize("least", ["4.5", math.inf])
def test_pool_score__least_that_is_no_number__says_what_is_expected(least):
    with pytest.raises(SettingError, match=r"least is .*; expected a finite score"):
        FixedScores(least=least)


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


def test_oracle__least__is_refused_as_the_task_says_what_is_worth_taking():
    with pytest.raises(SettingError, match=r"'oracle' does not take these settings: .*'least'\. Known: batch_size\."):
        make_agent("oracle", {"least": 1.0})
    assert make_agent("oracle", {"batch_size": 3}).batch_size == 3


def test_oracle__pool_without_labels__refuses():
    with pytest.raises(SettingError, match="hidden labels of embedded tasks; toy has none"):
        run_episode(toy_env(), OracleAgent(), seed=0, name="oracle")


def test_oracle__pool_of_ones_own__refuses_whatever_its_columns_are():
    env = RaiseSelectEnv(None, with_labels().assets, pool="pool.jsonl", dev="dev.jsonl", num_candidates=32)
    with pytest.raises(SettingError, match="embedded"):
        run_episode(env, OracleAgent(), seed=0, name="oracle")
