import json

import numpy as np
import pytest

from raise_env.agents import RaiseFork, RaisePpo, load_selector, run_episode
from raise_env.errors import RecordError, SettingError
from raise_env.testing import toy_env

#: A selector of each kind, and the episodes in which it learns the toy world.
KINDS = [(RaiseFork, {"credit": "batches", "num_states": 4}, 1), (RaisePpo, {}, 1)]

pytestmark = pytest.mark.parametrize(("kind", "settings", "episodes"), KINDS)


def in_other_units(env):
    """Give the environment a pool's scaling of its own, as another pool would have it."""
    features = env.assets.features
    changed = type(features)(features.raw, features.mean - 0.2, features.std / 1.2, 0)
    object.__setattr__(env.assets, "features", changed)
    env.reset(seed=0)
    return env


def test_begin__pool_in_other_units__rows_are_scored_as_on_the_pool_of_learning(kind, settings, episodes, tmp_path):
    home, away = toy_env(), in_other_units(toy_env())
    agent = kind(**settings).learn(home, episodes, seed=0)
    agent.save(tmp_path / "selector")
    loaded = load_selector(tmp_path / "selector")
    at_home, info = home.reset(seed=3)
    elsewhere, info_away = away.reset(seed=3)
    np.testing.assert_array_equal(info["candidates"], info_away["candidates"])
    agent.begin(home, seed=0)
    expected = agent.scores(at_home)
    loaded.begin(away, seed=0)
    is_whole = (np.abs(at_home) < 5).all(axis=1) & (np.abs(elsewhere) < 5).all(axis=1)  # nothing clipped
    differences = np.abs(loaded.scores(elsewhere) - expected)[is_whole]
    unaware = kind.load(tmp_path / "selector")
    far = np.abs(unaware.scores(elsewhere) - expected)[is_whole]
    assert np.median(differences) < 0.3 * np.median(far)


def test_begin__other_auxiliary_model__refused_before_the_episode(kind, settings, episodes):
    home, away = toy_env(), toy_env()
    agent = kind(**settings).learn(home, episodes, seed=0)
    object.__setattr__(away.assets, "auxiliary", {"model": "another", "updates": 0})
    with pytest.raises(SettingError, match="another auxiliary model"):
        run_episode(away, agent, seed=0, name="selector")


def test_learn__again_on_a_pool_in_other_units__refused(kind, settings, episodes):
    agent = kind(**settings).learn(toy_env(), episodes, seed=0)
    agent.learn(toy_env(), 1, seed=1)  # the same pool
    with pytest.raises(SettingError, match="learned on the features of another pool"):
        agent.learn(in_other_units(toy_env()), 1, seed=1)


def test_load__features_of_another_version__record_error(kind, settings, episodes, tmp_path):
    kind(**settings).learn(toy_env(), episodes, seed=0).save(tmp_path / "selector")
    path = tmp_path / "selector" / "config.json"
    config = json.loads(path.read_text())
    config["features"]["version"] += 1
    path.write_text(json.dumps(config))
    with pytest.raises(RecordError, match="computed otherwise; learn it again"):
        kind.load(tmp_path / "selector")
