from pathlib import Path

import numpy as np
import pytest

from raise_env.agents.feature_view import AUXILIARY, FeatureView, as_it_is
from raise_env.errors import ModelError, SettingError
from raise_env.features import BLOCKS, FEATURE_NAMES, NUM_STATIC, STATIC
from raise_env.testing import toy_env


def world(**settings):
    env = toy_env(**settings)
    env.reset(seed=0)
    return env


def other_pool(env, *, scale=3.0, shift=2.0):
    """The same rows as another pool would show them: its raw columns vary more and lie elsewhere."""
    features = env.assets.features
    other = world()
    changed = type(features)(features.raw, features.mean - shift, features.std / scale, 0)
    object.__setattr__(other.assets, "features", changed)
    other.reset(seed=0)
    return other


def test_translation__same_pool__observations_themselves():
    env = world()
    observation, _ = env.reset(seed=1)
    assert FeatureView.of(env).translation(env)(observation) is observation


def test_translation__pool_of_other_units__columns_in_those_of_learning():
    env = world()
    other = other_pool(env, scale=1.1, shift=0.1)  # little enough that nothing is clipped
    shown, info = other.reset(seed=0)
    candidates = info["candidates"]
    expected = env.assets.features.rows(candidates)  # by the pool of learning, worked out from its own raw columns
    inside = (np.abs(shown[:, STATIC]) < 5).all(axis=1) & (np.abs(expected) < 5).all(axis=1)
    assert inside.sum() > 20
    translated = FeatureView.of(env).translation(other)(shown)
    np.testing.assert_allclose(translated[inside][:, STATIC], expected[inside], atol=1e-4)
    others = [index for index in range(len(FEATURE_NAMES)) if not STATIC.start <= index < STATIC.stop]
    np.testing.assert_array_equal(translated[:, others], shown[:, others])


def test_translation__padding__stays_zero_and_bounds_hold():
    env = world()
    other = other_pool(env, scale=0.1, shift=30.0)
    shown, _ = other.reset(seed=0)
    shown[-3:] = 0.0
    translated = FeatureView.of(env).translation(other)(shown)
    assert not translated[-3:].any()
    assert other.observation_space.contains(translated)


def test_translation__stack_of_observations__each_as_by_itself():
    env = world()
    other = other_pool(env)
    shown, _ = other.reset(seed=0)
    translate = FeatureView.of(env).translation(other)
    np.testing.assert_array_equal(translate(np.stack([shown, shown[::-1]]))[1], translate(shown)[::-1])


def test_translation__block_hidden_in_learning__hidden_again():
    view = FeatureView.of(world(hide=("semantic",)))
    env = world()
    observation, _ = env.reset(seed=0)
    translated = view.translation(env)(observation)
    assert not translated[:, BLOCKS["semantic"]].any()
    np.testing.assert_array_equal(translated[:, BLOCKS["difficulty"]], observation[:, BLOCKS["difficulty"]])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "another"}, "features of another auxiliary model than 'tiny'.*--auxiliary-model"),
        ({"updates": 60}, "after 0 updates, and here they are computed after 60.*--auxiliary-updates"),
    ],
)
def test_translation__other_auxiliary__refused_with_the_reason(changed, message):
    view = FeatureView.of(world())
    env = world()
    object.__setattr__(env.assets, "auxiliary", {**env.assets.auxiliary, **changed})
    with pytest.raises(SettingError, match=message):
        view.translation(env)


def test_translation__environment_hides_what_was_seen__refused():
    with pytest.raises(SettingError, match="hides stage, which the selector learned to look at"):
        FeatureView.of(world()).translation(world(hide=("stage",)))


def test_read__what_save_wrote__the_same_view(tmp_path):
    view = FeatureView.of(world(hide=("stage",)))
    again = FeatureView.read(view.save(tmp_path), tmp_path)
    assert not list(tmp_path.iterdir())  # no adapter computed the toy's features
    assert (again.pool, again.adapter) == (view.pool, None)
    np.testing.assert_array_equal(again.mean, view.mean)
    np.testing.assert_array_equal(again.std, view.std)
    assert (dict(again.auxiliary), again.hide) == (dict(view.auxiliary), ("stage",))


@pytest.mark.parametrize(
    "changed",
    [
        {"names": ["x"]},
        {"version": 0},
        {"auxiliary": "tiny"},
        {"hide": ["everything"]},
        {"mean": [0.0]},
        {"std": [0.0] * NUM_STATIC},
        {"std": [float("nan")] * NUM_STATIC},
        {"mean": "text"},
        {"adapter": 1},
        {"pool": []},
    ],
)
def test_read__not_a_view__value_error(changed, tmp_path):
    with pytest.raises(ValueError, match=r"selector|features|could not convert"):
        FeatureView.read({**FeatureView.of(world()).save(tmp_path), **changed}, tmp_path)


@pytest.mark.parametrize("value", [None, [], "features"])
def test_read__no_object__value_error(value, tmp_path):
    with pytest.raises(ValueError, match="other features"):
        FeatureView.read(value, tmp_path)


@pytest.fixture
def carried(embedded_env, tmp_path):
    """An environment, and what a selector that learned in it carries, as it is read again."""
    home = embedded_env()
    home.load()
    return home, FeatureView.read(FeatureView.of(home).save(tmp_path), tmp_path), str(tmp_path / AUXILIARY)


def test_auxiliary_adapter__of_a_selector__gives_the_columns_that_it_learned_on(carried, embedded_env):
    home, view, adapter = carried
    same = embedded_env(auxiliary_adapter=adapter, auxiliary_updates=None)
    np.testing.assert_array_equal(same.assets.features.raw, home.assets.features.raw)
    bare = embedded_env(auxiliary_updates=0)
    assert not np.array_equal(bare.assets.features.raw, home.assets.features.raw)
    view.translation(same)
    assert same.assets.auxiliary == {"model": view.auxiliary["model"], "updates": 0, "adapter": view.adapter}
    assert same.assets.learner.base is home.assets.learner.base


def test_auxiliary_adapter__on_another_pool__is_what_a_selector_asks_for(carried, embedded_env):
    _, view, adapter = carried
    other = embedded_env(task_seed=1)
    with pytest.raises(SettingError, match=r"learned on another pool.*--auxiliary-adapter"):
        view.translation(other)
    adapted = embedded_env(task_seed=1, auxiliary_adapter=adapter, auxiliary_updates=None)
    assert view.translation(adapted) is not as_it_is
    assert not np.array_equal(adapted.assets.features.raw, other.assets.features.raw)


def test_auxiliary_adapter__of_another_selector__is_refused(carried, embedded_env, tmp_path):
    _, view, _ = carried
    other = embedded_env(auxiliary_updates=3)
    other.load()
    FeatureView.of(other).save(tmp_path / "other")
    adapted = embedded_env(auxiliary_adapter=str(tmp_path / "other" / AUXILIARY), auxiliary_updates=None)
    with pytest.raises(SettingError, match="another auxiliary"):
        view.translation(adapted)


def test_save__of_what_was_read__carries_the_same_adapter(carried, tmp_path):
    _, view, _ = carried
    again = FeatureView.read(view.save(tmp_path / "again"), tmp_path / "again")
    assert again.adapter == view.adapter is not None


def test_save__adapter_that_leads_elsewhere__is_refused(carried, tmp_path, tmp_path_factory):
    _, view, adapter = carried
    weights, elsewhere = Path(adapter, "adapter_model.safetensors"), tmp_path_factory.mktemp("elsewhere") / "weights"
    weights.rename(elsewhere)
    weights.symlink_to(elsewhere)
    with pytest.raises(ModelError, match="cannot be read"):
        view.save(tmp_path / "again")
