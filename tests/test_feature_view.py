import numpy as np
import pytest

from raise_env.agents.feature_view import FeatureView
from raise_env.errors import SettingError
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


def test_from_json__to_json__the_same_view():
    view = FeatureView.of(world(hide=("stage",)))
    again = FeatureView.from_json(view.to_json())
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
    ],
)
def test_from_json__not_a_view__value_error(changed):
    with pytest.raises(ValueError, match=r"selector|features|could not convert"):
        FeatureView.from_json({**FeatureView.of(world()).to_json(), **changed})


@pytest.mark.parametrize("value", [None, [], "features"])
def test_from_json__no_object__value_error(value):
    with pytest.raises(ValueError, match="other features"):
        FeatureView.from_json(value)
