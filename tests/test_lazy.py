from __future__ import annotations

import numpy as np
import pytest

from raise_env.agents.baselines import IfdAgent, RandomAgent
from raise_env.agents.raise_fork import RaiseFork
from raise_env.agents.raise_ppo import RaisePpo
from raise_env.agents.rollout import run_episode
from raise_env.errors import SettingError
from raise_env.features import standardise
from raise_env.lazy import GROUP_ROWS, MAX_DRAWS, FeatureUse, LazyFeatures, random_order, sample_of
from raise_env.record import EpisodeRecord

NUM_ROWS = 1000

#: What a row's features are: one of four heaps by its number; every eleventh row has none, as nothing of it fits.
TRUTH = np.random.default_rng(0).normal(size=(NUM_ROWS, 36)).astype(np.float32)
TRUTH += 10 * np.random.default_rng(1).normal(size=(4, 36)).astype(np.float32)[np.arange(NUM_ROWS) % 4]
TRUTH[::11] = np.nan


class Computing:
    """Gives the truth, and notes of which rows."""

    def __init__(self):
        self.asked = []

    def __call__(self, ids):
        self.asked.append(ids.tolist())
        return TRUTH[ids], len(ids)


@pytest.fixture
def small_sample(monkeypatch):
    """Let the sample be small, so that most rows are outside of it."""
    monkeypatch.setattr("raise_env.lazy.SAMPLE_ROWS", 160)


def lazy(num_classes=4, num_rows=NUM_ROWS):
    order, compute = random_order(num_rows), Computing()
    sample = sample_of(order)
    return LazyFeatures(order, compute, TRUTH[sample], 7, num_classes), compute


@pytest.mark.usefixtures("small_sample")
def test_rows__asked_for__are_standardised_over_the_sample_and_computed_once():
    features, compute = lazy()
    sample = standardise(TRUTH[sample_of(random_order(NUM_ROWS))], 0)
    np.testing.assert_array_equal(features.mean, sample.mean)
    np.testing.assert_array_equal(features.std, sample.std)
    ids = np.array([[3, 500], [999, 11]])
    wanted = np.nan_to_num(((TRUTH[ids] - sample.mean) / sample.std).clip(-5, 5))
    for _ in range(2):
        np.testing.assert_array_equal(features.rows(ids), wanted)
    asked = [row for rows in compute.asked for row in rows]
    assert len(asked) == len(set(asked)) <= 4 * GROUP_ROWS
    assert features.num_tokens == 7 + len(asked)
    assert not set(asked) & set(sample_of(random_order(NUM_ROWS)).tolist()), "the sample is known"


@pytest.mark.usefixtures("small_sample")
def test_rows__whatever_was_computed_before__come_in_the_same_company():
    groups = []
    for ids in ([5, 700], [700], [3, 9, 700, 12]):
        features, compute = lazy()
        for row in ids:
            features.rows(np.array([row]))
        groups.append(next(rows for rows in compute.asked if 700 in rows))
    assert groups[0] == groups[1] == groups[2]
    assert len(groups[0]) == GROUP_ROWS


def test_random_order__any_size__has_every_row_once_and_is_the_same_for_ever():
    np.random.seed(1)  # noqa: NPY002  the global generator must have no say
    first = random_order(1000)
    np.random.seed(2)  # noqa: NPY002
    np.testing.assert_array_equal(first, random_order(1000))
    assert sorted(first) == list(range(1000))
    assert sorted(first) != first.tolist()


@pytest.mark.usefixtures("small_sample")
def test_draw__each_class__has_its_share_and_no_row_comes_twice():
    features, _ = lazy()
    candidates, classes = features.draw(32, np.random.default_rng(3))
    assert candidates.dtype == classes.dtype == np.int64
    assert classes.tolist() == [0] * 8 + [1] * 8 + [2] * 8 + [3] * 8
    assert len(set(candidates.tolist())) == 32
    assert not (candidates % 11 == 0).any(), "rows without features are never offered"
    np.testing.assert_array_equal(features.classes[candidates], classes)
    assert len({tuple(set((candidates[classes == label] % 4).tolist())) for label in range(4)}) == 4


@pytest.mark.usefixtures("small_sample")
def test_draw__same_seed__same_candidates_whatever_was_drawn_before():
    fresh, _ = lazy()
    wanted = [fresh.draw(32, np.random.default_rng(seed))[0].tolist() for seed in range(5)]
    used, _ = lazy()
    used.rows(np.arange(0, NUM_ROWS, 7))
    for seed in reversed(range(5)):
        assert used.draw(32, np.random.default_rng(seed))[0].tolist() == wanted[seed]
    assert len(set(map(tuple, wanted))) == 5


@pytest.mark.usefixtures("small_sample")
def test_draw__many_draws__take_every_row_about_as_often():
    features, _ = lazy()
    rng = np.random.default_rng(0)
    counts = np.bincount(np.concatenate([features.draw(32, rng)[0] for _ in range(600)]), minlength=NUM_ROWS)
    offered = counts[np.arange(NUM_ROWS) % 11 != 0]
    # 600 draws of 32 among 909 rows: 21.1 in the mean. Rows of a group come together, which widens the spread.
    assert offered.min() > 5
    assert offered.max() < 45


@pytest.mark.usefixtures("small_sample")
def test_draw__class_that_is_rare__is_padded_after_so_many_draws(monkeypatch):
    features, compute = lazy()
    features._centres[3] = 100.0  # far from every row
    features.classes[:] = np.where(features.classes == 3, -1, features.classes)
    candidates, classes = features.draw(32, np.random.default_rng(0))
    assert (candidates[classes == 3] == -1).all()
    assert (candidates[classes != 3] >= 0).all()
    assert sum(map(len, compute.asked)) <= MAX_DRAWS * 32


def test_draw__pool_smaller_than_the_sample__computes_nothing_more():
    features, compute = lazy(num_rows=70)
    candidates, _ = features.draw(40, np.random.default_rng(0))
    assert (candidates >= 0).sum() >= 30
    assert len(set(candidates[candidates >= 0].tolist())) == (candidates >= 0).sum()
    features.rows(np.arange(70))
    assert not compute.asked


def test_lazy_features__what_needs_all_rows__is_refused():
    features, _ = lazy()
    for name in ("raw", "columns", "log_p_response", "log_p_response_given_prompt"):
        with pytest.raises(SettingError, match=r"lazy_features computes .* Leave lazy_features out"):
            getattr(features, name)


@pytest.mark.usefixtures("small_sample")
def test_feature_use__rows_that_another_use_had_computed__count_for_each_that_asks_for_them():
    features, _ = lazy()
    outside = random_order(NUM_ROWS)[160:]
    first = FeatureUse(features)
    features.rows(outside[:GROUP_ROWS])
    second = FeatureUse(features)
    features.rows(outside[[0, GROUP_ROWS]])
    features.rows(sample_of(random_order(NUM_ROWS)))
    third = FeatureUse(features)
    assert first.groups() == second.groups() == {"10": GROUP_ROWS, "11": GROUP_ROWS}
    assert first.cost() == second.cost() == (features.seconds, features.num_tokens)
    assert features.num_tokens == 7 + 2 * GROUP_ROWS
    assert third.groups() == {}
    assert third.cost() == (0.0, 7)
    assert third.num_tokens({"10": 16, "12": 5}) == 28


def test_feature_use__features_of_all_rows__cost_what_they_took():
    use = FeatureUse(standardise(TRUTH, 7, 1.5))
    assert use.groups() == {}
    assert use.cost() == (1.5, 7)
    assert use.num_tokens({}) == 7


# In the environment


@pytest.fixture
def lazy_env(embedded_env, monkeypatch, tmp_path):
    """Return a function that makes a small lazy environment with nothing kept from another, and 200 rows."""
    monkeypatch.setattr("raise_env.lazy.SAMPLE_ROWS", 32)

    def make(name="a", **settings):
        own = {"pool_size": 200, "lazy_features": True, "cache_dir": str(tmp_path / name), **settings}
        return embedded_env(**own)

    return make


def episode(env, seed):
    seen = [env.reset(seed=seed)[0].tobytes()]
    over = False
    while not over:
        action = np.arange(env.action_space.n) % 4 == env.num_steps % 4
        observation, reward, over, _, _ = env.step((action & env.action_masks()).astype(np.int8))
        seen.append((observation.tobytes(), reward))
    return seen


def test_env__lazy__same_seeds_give_the_same_episode_whatever_was_computed_before(lazy_env):
    env = lazy_env("a")
    first = episode(env, 1)
    tokens = env.assets.features.num_tokens
    others = [episode(env, seed) for seed in (2, 3)]
    assert env.assets.features.num_tokens > tokens
    assert episode(env, 1) == first
    fresh = lazy_env("b")  # another process, so to say
    assert fresh.assets is not env.assets
    assert episode(fresh, 3) == others[1]
    assert episode(fresh, 1) == first
    assert episode(lazy_env("a", auxiliary_updates=1), 1) != first


def test_env__lazy__features_are_those_of_the_whole_pool_but_for_the_scale(lazy_env):
    env, whole = lazy_env(), lazy_env(lazy_features=False)
    env.reset(seed=0)
    ids = env.candidates[env.candidates >= 0]
    features, other = env.assets.features, whole.assets.features
    np.testing.assert_allclose(features._raw_rows(ids), other.raw[ids], atol=2e-5)
    assert features.num_tokens < other.num_tokens
    assert (env.assets.classes[ids] == env.candidate_classes[env.candidates >= 0]).all()
    assert ((env.assets.classes >= 0).sum()) < 200, "the others are not known"


def test_env__lazy__snapshot_and_fork_go_on_alike(lazy_env):
    env = lazy_env()
    env.reset(seed=0)
    action = np.arange(16) % 2
    fork = env.fork(1)[0]
    for _ in range(2):
        one, two = env.step(action), fork.step(action)
        np.testing.assert_array_equal(one[0], two[0])
        assert one[1] == two[1]


def test_render__lazy__moment_of_another_process__shows_the_classes_of_its_history(lazy_env):
    env, fresh = lazy_env("a", render_mode="ansi"), lazy_env("b", render_mode="ansi")
    env.reset(seed=0)
    env.step(np.arange(16) % 2)
    fresh.restore(env.snapshot())
    assert (fresh.assets.classes[env.history[0].selected] < 0).any(), "not all of them are known there"
    assert fresh.render() == env.render()


def test_env__lazy__record_has_no_digest_of_classes_that_are_not_known(lazy_env):
    env = lazy_env(horizon=1)
    env.reset(seed=0)
    *_, info = env.step(np.arange(16) % 2)
    assert EpisodeRecord.of(env, agent="every other", seed=0, info=info).content == env.assets.content


def test_env__lazy_with_what_needs_all_rows__is_refused(lazy_env):
    with pytest.raises(SettingError, match="leave one of the two out"):
        lazy_env(num_candidates="all")
    env = lazy_env()
    env.reset(seed=0)
    with pytest.raises(SettingError, match="Leave lazy_features out"):
        run_episode(env, IfdAgent(), seed=0, name="ifd")
    with pytest.raises(SettingError, match="Leave lazy_features out"):
        env.assets.members  # noqa: B018
    assert len(run_episode(env, RandomAgent(), seed=0, name="random").rewards) == 3


def test_env__lazy__raise_ppo_learns_from_the_rows_that_were_offered(lazy_env):
    env = lazy_env()
    agent = RaisePpo(num_epochs=1).learn(env, episodes=1, seed=0)
    assert len(agent.episode_returns) == 1
    assert (env.assets.classes >= 0).sum() < 200


@pytest.mark.parametrize(
    "agent",
    [
        RaiseFork(num_rows=32, num_lookahead=1, num_networks=2, num_passes=2),
        RaiseFork(credit="batches", num_forks=3, num_networks=2, num_passes=2),
        RaisePpo(num_epochs=2),
    ],
    ids=["rows", "batches", "ppo"],
)
def test_env__lazy_with_a_rare_class__learners_of_raise_learn_save_and_act(lazy_env, monkeypatch, tmp_path, agent):
    monkeypatch.setattr("raise_env.lazy.MAX_DRAWS", 1)
    env = lazy_env(num_candidates=32)
    sizes = set()
    draw = LazyFeatures.draw

    def noted(features, num_candidates, rng):
        candidates, classes = draw(features, num_candidates, rng)
        sizes.add(int((candidates >= 0).sum()))
        return candidates, classes

    monkeypatch.setattr(LazyFeatures, "draw", noted)
    agent.learn(env, episodes=2, seed=0)
    assert len(sizes) > 2
    agent.save_progress(tmp_path / "learning")
    record = run_episode(env, agent, seed=0, name="agent")
    assert [len(rows) for rows in record.actions] == [4, 4, 4]


def test_env__lazy_sample_killed_in_the_middle__is_gone_on_with_to_equal_features(lazy_env, monkeypatch, tmp_path):
    monkeypatch.setattr("raise_env.auxiliary._GROUPS_AT_ONCE", 1)
    whole = lazy_env("whole").assets.features

    def interrupt(what, done, total):
        assert (what, total) == ("computing features", 32)
        if done > GROUP_ROWS:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lazy_env("torn").load(interrupt)
    seen = []
    features = lazy_env("torn").load(lambda *progress: seen.append(progress[1])).features
    assert min(seen) > GROUP_ROWS // 2, "the first group was kept"
    np.testing.assert_array_equal(features.rows(np.arange(200)), whole.rows(np.arange(200)))
    assert features.num_tokens == whole.num_tokens
