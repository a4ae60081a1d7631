"""The baselines that want rows unlike those already taken, beside slow code that does the same another way."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import pairwise_distances
from sklearn.metrics.pairwise import cosine_similarity

from raise_env import RaiseSelectEnv
from raise_env.agents import coverage, run_episode
from raise_env.agents.coverage import DeitaAgent, DiversityAgent
from raise_env.errors import DataError, SettingError
from raise_env.features import FEATURE_NAMES, standardise
from raise_env.pool import Instruction, Pool
from raise_env.testing import toy_env

SEMANTIC = [place for place, name in enumerate(FEATURE_NAMES[2:]) if name.startswith("semantic")]


def with_assets(env, **changes):
    return RaiseSelectEnv(None, dataclasses.replace(env.assets, **changes), **env.config.to_kwargs())


def with_raw(env, **columns):
    """Return the environment with some columns of its features replaced, by name."""
    raw = env.assets.features.raw.copy()
    for name, values in columns.items():
        raw[:, FEATURE_NAMES.index(name) - 2] = values
    return with_assets(env, features=standardise(raw, num_tokens=0))


def with_columns(env, **columns):
    rows = [
        Instruction(f"q{i}", f"a{i}", fields=dict(zip(columns, values, strict=True)))
        for i, values in enumerate(zip(*columns.values(), strict=True))
    ]
    return with_assets(env, pool=Pool(rows, "toy"))


def semantic(env):
    return env.assets.features.columns[:, SEMANTIC]


def episode(env, agent, seed=0):
    """Run an episode; return, step by step, what was on offer and what was taken."""
    run_episode(env, agent, seed=seed, name="agent")
    return [(step.candidates[step.candidates >= 0].tolist(), set(step.selected.tolist())) for step in env.history]


# K-centre


def brute_force(distances, steps, first):
    """Return what k-centre greedy takes in each step if it begins with this row; all centres against all on offer."""
    centres, taken = [], []
    for offered, _ in steps:
        batch = []
        for _ in range(4):
            left = [row for row in offered if row not in batch]
            pick = first if not centres else max(left, key=lambda row: min(distances[row, c] for c in centres))
            batch.append(pick)
            centres.append(pick)
        taken.append(set(batch))
    return taken


@pytest.mark.parametrize(("num_rows", "num_candidates"), [(80, "all"), (80, 24), (30, 32)])
@pytest.mark.parametrize("seed", range(3))
def test_diversity__an_episode__equals_brute_force(num_rows, num_candidates, seed):
    # Of 30 rows in 4 classes two classes are one short of their 8 places: they are padded.
    env = toy_env(num_rows, num_candidates=num_candidates, batch_size=4, horizon=7)
    steps = episode(env, DiversityAgent(), seed)
    distances = pairwise_distances(semantic(env).astype(np.float64))
    taken = [rows for _, rows in steps]
    assert taken in [brute_force(distances, steps, first) for first in taken[0]]


def test_diversity__first_row__is_drawn_at_random():
    env = toy_env(80, num_candidates="all", batch_size=1, horizon=1)
    firsts = {tuple(episode(env, DiversityAgent(), seed)[0][1]) for seed in range(20)}
    assert len(firsts) > 10


def test_diversity__predict__adds_no_centre_until_the_rows_are_trained_on():
    env = toy_env(80, num_candidates=32, batch_size=4, horizon=4)
    observation, _ = env.reset(seed=0)
    agent = DiversityAgent()
    agent.begin(env, 0)
    observation, *_ = env.step(agent.predict(observation)[0])
    first = agent.predict(observation)[0]
    np.testing.assert_array_equal(agent.predict(observation)[0], first)


def test_diversity__new_episode__begins_without_centres():
    env, agent = toy_env(80, num_candidates="all", batch_size=4, horizon=4), DiversityAgent()
    once = episode(env, agent, seed=1)
    assert episode(env, agent, seed=1) == once


def test_diversity__steps_undone__are_centres_no_longer():
    env, agent = toy_env(80, num_candidates="all", batch_size=4, horizon=4), DiversityAgent()
    observation, _ = env.reset(seed=0)
    agent.begin(env, 0)
    observation, *_ = env.step(agent.predict(observation)[0])
    moment, wanted = env.snapshot(), agent.predict(observation)[0]
    for _ in range(2):
        env.step(np.arange(80) // 20 == 3)  # rows that the agent would not have taken
        agent.predict(env.observation())
        env.restore(moment)
        np.testing.assert_array_equal(agent.predict(env.observation())[0], wanted)


def test_diversity__long_episode__measures_each_centre_against_the_pool_once(monkeypatch):
    num_rows, calls = 80, []
    measure = coverage._squared_distances
    monkeypatch.setattr(
        coverage, "_squared_distances", lambda points, c: calls.append(len(points)) or measure(points, c)
    )
    episode(toy_env(num_rows, num_candidates=24, batch_size=4, horizon=10), DiversityAgent())
    assert calls.count(num_rows) == 4 * (10 - 1), "those of the last step are not needed any more"


def test_diversity__rows_alike_and_padding__are_coped_with():
    env = toy_env(30, num_candidates=32, batch_size=8, horizon=4)
    same = {name: np.ones(30) for name in FEATURE_NAMES if name.startswith("semantic")}
    for offered, taken in episode(with_raw(env, **same), DiversityAgent()):
        assert len(taken) == 8
        assert taken <= set(offered)


# DEITA


def naive_filter(scores, cosines, threshold, offered, taken, wanted):
    """Return what DEITA takes of the rows on offer: the first that pass, then the best of the rest."""
    batch = []
    order = sorted((row for row in offered if row not in taken), key=lambda row: -scores[row])
    for row in order:
        if all(cosines[row, other] <= threshold for other in [*taken, *batch]):
            batch.append(row)
        if len(batch) == wanted:
            return batch
    rest = [row for row in order if row not in batch]
    return batch + rest[: wanted - len(batch)]


@pytest.mark.parametrize("threshold", [0.9, 0.3, 0.1, -1.0])
def test_deita__candidates_drawn__each_step_equals_a_naive_loop(threshold):
    env = toy_env(80, num_candidates=24, batch_size=4, horizon=8)
    agent = DeitaAgent(threshold=threshold)
    steps = episode(env, agent)
    scores, cosines = agent.score_pool(env, 0), cosine_similarity(semantic(env).astype(np.float64))
    seen = []
    for offered, taken in steps:
        assert taken == set(naive_filter(scores, cosines, threshold, offered, seen, 4))
        seen += taken


@pytest.mark.parametrize("threshold", [0.9, 0.3])
def test_deita__whole_pool_on_offer__the_episode_is_deitas_own_choice_in_random_order(threshold):
    env = toy_env(200, num_candidates="all", batch_size=4, horizon=6)
    agent = DeitaAgent(threshold=threshold)
    steps = episode(env, agent)
    scores, cosines = agent.score_pool(env, 0), cosine_similarity(semantic(env).astype(np.float64))
    chosen = naive_filter(scores, cosines, threshold, range(200), [], 24)
    assert set.union(*(taken for _, taken in steps)) == set(chosen)
    assert steps[0][1] != set(chosen[:4]), "not from best to worst"


def test_deita__thresholds__change_what_is_taken():
    env = toy_env(200, num_candidates="all", batch_size=4, horizon=6)
    loose, strict = ([taken for _, taken in episode(env, DeitaAgent(threshold=t))] for t in (0.9, 0.3))
    assert loose != strict


def test_deita__columns_of_the_pool__are_multiplied():
    env = with_columns(toy_env(4, num_candidates=4, num_classes=1, batch_size=2), c=[1, 2, "3", 0], q=[0.5, 2, 1, 9])
    np.testing.assert_array_equal(DeitaAgent("c", "q").score_pool(env, 0), [0.5, 4.0, 3.0, 0.0])


def test_deita__auxiliary_model__a_score_that_rises_with_both_signals():
    # Nats of the whole response: 10 x 1, 100 x 1, 20 x 3; what the prompt brings, a token: -1, 0, 0.
    env = with_raw(
        toy_env(3, num_candidates=3, num_classes=1, batch_size=1),
        response_length=np.log1p([10, 100, 20]),
        log_p_response_given_prompt=[-1, -1, -3],
        log_p_response=[0, -1, -3],
    )
    np.testing.assert_allclose(DeitaAgent().score_pool(env, 0), [1 / 3 * 1 / 2, 1, 2 / 3], rtol=1e-6)


def test_deita__rows_that_the_auxiliary_model_could_not_read__do_not_spoil_the_others():
    env = toy_env(16, num_candidates=16, num_classes=1)
    env.assets.features.raw[3] = np.nan
    env = with_raw(env)
    assert np.isfinite(DeitaAgent().score_pool(env, 0)).all()
    assert len(episode(env, DeitaAgent())) == 10


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"complexity": "c"}, r"row 2, field 'c': found -1; expected a finite number of at least 0"),
        ({"quality": "none"}, r"row 1: found no field 'none' among 'c', 'q'"),
        ({"quality": "q"}, r"row 1, field 'q': found null"),
    ],
)
def test_deita__column_that_cannot_be_used__named(settings, words):
    env = with_columns(toy_env(4, num_candidates=4, num_classes=1, batch_size=2), c=[1, -1, 2, 3], q=[None] * 4)
    with pytest.raises(DataError, match=words):
        run_episode(env, DeitaAgent(**settings), seed=0, name="deita")


@pytest.mark.parametrize("threshold", [1.1, -2, float("nan"), "0.9"])
def test_deita__threshold_that_is_no_cosine__refused(threshold):
    with pytest.raises(SettingError, match="threshold is"):
        DeitaAgent(threshold=threshold)
