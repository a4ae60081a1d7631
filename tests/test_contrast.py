import numpy as np
import pytest

from raise_env.agents import RaiseFork, contrast, make_agent
from raise_env.agents.contrast import (
    NUM_WANTED,
    columns_of_few_values,
    looked_at,
    pool_scores,
    traits,
    wanted,
    words_apart,
)
from raise_env.pool import Instruction, Pool
from raise_env.testing import toy_env


def row(prompt="q", response="a", **fields):
    return Instruction(prompt, response, fields=fields)


def apart(rows, chosen):
    pool = Pool(rows, "here")
    return words_apart(pool, list(chosen), looked_at(pool, list(chosen)))


def columns_of(rows):
    pool = Pool(rows, "here")
    return columns_of_few_values(pool, looked_at(pool, []))


# What is looked at


def test_looked_at__large_pool__a_part_with_all_chosen_rows(monkeypatch):
    monkeypatch.setattr("raise_env.agents.contrast.MAX_ROWS_IN_MEMORY", 50)
    pool = Pool([row(str(n)) for n in range(500)], "here")
    places = looked_at(pool, [3, 499, 3])
    assert 50 <= len(places) <= 52
    assert {3, 499} <= set(places.tolist())
    assert (np.diff(places) > 0).all()
    np.testing.assert_array_equal(looked_at(Pool([row(str(n)) for n in range(50)], "here"), [3]), np.arange(50))


# Words


def test_words_apart__words_of_the_chosen_rows__named_with_their_shares():
    pool = [row(f"count {n}", "number word") for n in range(50)] + [
        row(f"write {n}", "letter word") for n in range(150)
    ]
    more, less = apart(pool, [*range(40), 60])
    assert {word.text for word in more} == {"count", "number"}
    assert {word.text for word in less} == {"write", "letter"}
    count = next(word for word in more if word.text == "count")
    assert (count.chosen, count.pool) == pytest.approx((40 / 41, 50 / 200))


def test_words_apart__log_odds__as_worked_out_by_hand():
    # 30 of 40 chosen rows have the word, 20 of 60 others; the prior is its share of all rows.
    pool = [row("word" if n < 30 or 40 <= n < 60 else "none", "x") for n in range(100)]
    a, b = 30 + 0.5, 20 + 0.5
    expected = (np.log(a / (41 - a)) - np.log(b / (61 - b))) / np.sqrt(1 / a + 1 / b)
    found = contrast._log_odds(np.array([30.0]), np.array([20.0]), 40, 60)
    assert found[0] == pytest.approx(expected)
    assert [word.text for word in apart(pool, range(40))[0]] == ["word"]


def test_words_apart__random_rows__hardly_any():
    rng = np.random.default_rng(0)
    pool = [row(" ".join(f"w{n}" for n in rng.integers(60, size=8)), "x") for _ in range(600)]
    more, less = apart(pool, rng.choice(600, 100, replace=False).tolist())
    assert len(more) + len(less) <= 8  # 5% of some 60 words by chance


@pytest.mark.parametrize("rows", [[], list(range(10))])
def test_words_apart__nothing_or_all_chosen__nothing(rows):
    assert apart([row("word", "x")] * 10, rows) == ([], [])


def test_words_apart__row_chosen_twice__counts_once():
    pool = [row("word" if n < 20 else "none", "x") for n in range(100)]
    assert apart(pool, [*range(10)] * 2) == apart(pool, range(10))


# Columns


def test_columns_of_few_values__texts_with_few_values__only_those():
    rows = [
        row(category=["qa", "summary"][n % 2], id=str(n), rating=n % 2, source="one", output="a") for n in range(40)
    ]
    found = columns_of(rows)
    assert list(found) == ["category"]
    assert [found["category"][place] for place in range(3)] == ["qa", "summary", "qa"]


def test_columns_of_few_values__column_that_some_rows_lack__left_out():
    assert columns_of([row(kind="a"), row(), row(kind="b")]) == {}


# Traits and scores


def test_traits__longer_responses_chosen__told_in_tokens_and_deviations():
    env = toy_env()
    env.reset(seed=0)
    raw = env.assets.features.raw
    long = np.argsort(-raw[:, 1])[:20]
    found = {trait.name: trait for trait in traits(env, long, np.arange(200))}
    lengths = np.expm1(raw[:, 1].astype(np.float64))
    trait = found["response length"]
    assert trait.pool == pytest.approx(lengths.mean())
    assert trait.chosen == pytest.approx(lengths[long].mean())
    assert trait.difference == pytest.approx((lengths[long].mean() - lengths.mean()) / lengths.std())
    assert abs(found["log P of the response by itself"].difference) < 1.0


def test_traits__lazy_features__nothing():
    env = toy_env()
    env.reset(seed=0)
    object.__setattr__(env.config, "lazy_features", True)
    assert traits(env, np.arange(3), np.arange(200)) == []


def test_pool_scores__selector__one_standardised_score_a_row():
    env = toy_env()
    agent = RaiseFork(credit="batches", num_states=4).learn(env, 1, seed=0)
    env.reset(seed=0)
    scores = pool_scores(env, agent, np.arange(200), seed=0)
    assert scores.shape == (200,)
    assert (scores.mean(), scores.std()) == pytest.approx((0.0, 1.0))
    columns = np.zeros((200, 39), dtype=np.float32)
    columns[:, 2:38] = env.assets.features.rows(np.arange(200))
    assert np.corrcoef(scores, agent.scores(columns))[0, 1] > 0.999


def test_pool_scores__selector_that_takes_few_rows__every_row_has_a_score():
    env = toy_env()
    agent = RaiseFork(credit="batches", num_states=4, least=1.0).learn(env, 1, seed=0)
    observation, _ = env.reset(seed=0)
    agent.begin(env, seed=0)
    assert np.isinf(agent.scores(observation)).any()
    scores = pool_scores(env, agent, np.arange(200), seed=0)
    assert (scores.mean(), scores.std()) == pytest.approx((0.0, 1.0))
    columns = np.zeros((200, 39), dtype=np.float32)
    columns[:, 2:38] = env.assets.features.rows(np.arange(200))
    np.testing.assert_array_equal(np.argsort(scores), np.argsort(agent.uncut_scores(columns)))
    cut = agent.scores(columns)
    assert scores[np.isinf(cut)].max() < scores[np.isfinite(cut)].min()


def test_pool_scores__agent_without_scores_of_its_own__none():
    env = toy_env()
    env.reset(seed=0)
    assert pool_scores(env, make_agent("random"), np.arange(200), seed=0) is None


def test_wanted__scores__best_and_worst_first_without_repeats_and_rows_never_offered():
    pool = [row(f"q{n // 2}") for n in range(40)]
    scores = np.linspace(1.0, -1.0, 40)
    scores[39] = np.nan
    most, least = wanted(scores, pool)
    assert [entry.pool_id for entry in most] == [0, 2, 4, 6, 8]
    assert [entry.pool_id for entry in least] == [38, 37, 35, 33, 31]
    assert len(most) == NUM_WANTED
    assert least[0].score == scores[38]
