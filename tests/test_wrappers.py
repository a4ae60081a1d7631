from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.wrappers import FlattenObservation, NormalizeObservation, RescaleObservation, TransformObservation

from raise_env import PickOne, TopKScores
from raise_env.errors import ActionError, SettingError
from raise_env.features import CLIP
from raise_env.testing import toy_env
from raise_env.wrappers import top_of_each_class

CLASSES = np.repeat([0, 1], 4)
EVERYTHING = np.ones(8, dtype=bool)


def chosen(scores, mask=EVERYTHING, batch_size=4, classes=CLASSES, num_classes=2):
    choice = top_of_each_class(np.array(scores, dtype=float), classes, mask, batch_size, num_classes)
    assert choice.dtype == np.int8
    assert set(choice) <= {0, 1}
    return np.flatnonzero(choice).tolist()


def test_top_of_each_class__different_scores__takes_the_best_of_each():
    assert chosen([1, 9, 8, 2, 0, -1, -2, -3]) == [1, 2, 4, 5]


def test_top_of_each_class__equal_scores__takes_the_earlier_row():
    assert chosen([0, 0, 0, 0, 7, 3, 3, 3]) == [0, 1, 4, 5]


def test_top_of_each_class__share_that_does_not_divide__goes_to_the_best_left_over():
    assert chosen([1, 9, 8, 2, 0, -1, -2, -3], batch_size=5) == [1, 2, 3, 4, 5]
    assert chosen([-5, -6, -7, -8, 0, -1, -2, -3], batch_size=5) == [0, 1, 4, 5, 6]
    assert chosen([0, 1, 2, 3, 4, 5, 6, 7], batch_size=1) == [7], "less than one a class"


def test_top_of_each_class__padding__is_never_taken_and_others_fill_the_batch():
    mask = np.array([1, 0, 0, 0, 1, 1, 1, 1], dtype=bool)
    assert chosen([-9, 9, 9, 9, 0, 1, 2, 3], mask) == [0, 5, 6, 7]
    mask[5:] = False
    assert chosen([-9, 9, 9, 9, 0, 1, 2, 3], mask) == [0, 4], "fewer rows than the batch"


def test_top_of_each_class__infinite_scores__are_ranked():
    assert chosen([np.inf, -np.inf, 0, 1, -np.inf, -np.inf, -np.inf, 0]) == [0, 3, 4, 7]


@pytest.fixture
def scored():
    env = TopKScores(toy_env())
    env.reset(seed=0)
    return env


def test_top_k_scores__a_step__trains_on_the_best_of_each_class(scored):
    world = scored.unwrapped
    scores = np.random.default_rng(0).uniform(-1, 1, 32).astype(np.float32)
    wanted = np.concatenate([block[np.argsort(-scores[block])[:2]] for block in np.arange(32).reshape(4, 8)])
    offered = world.candidates
    _, _, _, _, info = scored.step(scores)
    assert sorted(info["selected"][:8]) == sorted(offered[wanted])
    assert scored.action_space.shape == (32,)
    assert scored.action_space.dtype == np.float32


def test_top_k_scores__padded_candidates__are_not_taken():
    env = TopKScores(toy_env(num_rows=20))
    env.reset(seed=0)
    scores = np.where(env.action_masks(), -1.0, 1.0)
    assert env.step(scores)[4]["num_selected"] == 8


@pytest.mark.parametrize("scores", [np.zeros(31), np.zeros((32, 1)), 0.5], ids=["31", "32x1", "scalar"])
def test_top_k_scores__wrong_shape__is_refused(scored, scores):
    with pytest.raises(ActionError, match=r"expected \(32,\)"):
        scored.step(scores)


def test_top_k_scores__nan__is_refused_by_its_place(scored):
    scores = np.zeros(32)
    scores[5] = np.nan
    with pytest.raises(ActionError, match="candidate 5"):
        scored.step(scores)


@pytest.mark.parametrize("wrapper", [TopKScores, PickOne])
def test_wrapper__in_the_spec__is_made_again(wrapper):
    env = wrapper(gym.make("RaiseSelect-v0", num_candidates=8))
    again = gym.make(env.spec)
    assert isinstance(again, wrapper)
    assert again.action_space == env.action_space
    assert again.unwrapped.config == env.unwrapped.config


@pytest.mark.parametrize("outer", [TopKScores, PickOne])
@pytest.mark.parametrize("inner", [TopKScores, PickOne])
def test_wrapper__over_another_form_of_the_action__is_refused(outer, inner):
    within = gym.wrappers.OrderEnforcing(inner(toy_env()))
    expected = (
        f"in {inner.__name__} already, and {outer.__name__} makes 0/1 choices: hand over .* without {inner.__name__}"
    )
    with pytest.raises(SettingError, match=expected):
        outer(within)


# One candidate at a time


@pytest.fixture
def picking():
    env = PickOne(toy_env(num_rows=40, batch_size=3, horizon=2))
    env.reset(seed=0)
    return env


def test_pick_one__until_the_batch_is_full__waits_and_shows_what_was_picked(picking):
    world = picking.unwrapped
    before, offered = world.observation(), world.candidates
    for picks, index in enumerate([4, 30], start=1):
        observation, reward, terminated, truncated, info = picking.step(index)
        assert (reward, terminated, truncated, info["num_selected"]) == (0.0, False, False, 0)
        assert world.num_steps == 0
        expected = before.copy()
        expected[[4, 30][:picks], -1] = np.log(2.0)
        np.testing.assert_allclose(observation, expected, rtol=1e-6)
        np.testing.assert_array_equal(np.flatnonzero(~info["action_mask"]), sorted([4, 30][:picks]))
        np.testing.assert_array_equal(picking.action_masks(), info["action_mask"])
        assert "train_loss" not in info
        assert (info["selected"] == -1).all()
    observation, reward, _, _, info = picking.step(9)
    assert sorted(info["selected"][:3]) == sorted(offered[[4, 9, 30]])
    assert reward == world.history[0].reward != 0
    assert info["action_mask"].all()
    np.testing.assert_array_equal(observation, world.observation())


def test_pick_one__row_taken_in_earlier_steps__counts_on_from_there():
    env = PickOne(toy_env(num_rows=4, num_candidates=4, num_classes=1, batch_size=2, horizon=9))
    env.reset(seed=0)
    world = env.unwrapped
    row = world.candidates[0]
    env.step(0)
    env.step(1)
    index = int(np.flatnonzero(world.candidates == row)[0])
    assert env.step(index)[0][index, -1] == pytest.approx(np.log(3.0))


def test_pick_one__the_same_row_again__is_a_pick_that_adds_nothing(picking):
    for _ in range(2):
        assert picking.step(7)[1] == 0.0
    _, _, _, _, info = picking.step(7)
    assert info["num_selected"] == 1


def test_pick_one__fewer_rows_than_the_batch__trains_on_what_there_is():
    env = PickOne(toy_env(num_rows=5, num_candidates=8, num_classes=1, batch_size=8))
    observation, info = env.reset(seed=0)
    assert info["action_mask"].tolist() == [True] * 5 + [False] * 3
    observation, *_ = env.step(7)
    assert (observation[5:] == 0).all(), "padding stays a row of zeros"
    for index in range(5):
        _, _, _, _, info = env.step(index)
    assert info["num_selected"] == 5


def test_pick_one__counts_at_the_bound__stay_inside_the_space(picking):
    picking.unwrapped._counts[:] = 10_000
    picking._last = (picking.unwrapped.observation(), picking._last[1])
    observation, *_ = picking.step(0)
    assert observation[0, -1] == CLIP
    assert observation in picking.observation_space


def test_pick_one__after_the_end__asks_for_a_reset(picking):
    over = [picking.step(index)[2] for index in [0, 1, 2, 0, 1, 2]]
    assert over == [False] * 5 + [True]
    with pytest.raises(ResetNeeded):
        picking.step(0)
    picking.reset()
    assert picking.step(0)[2] is False


def test_pick_one__before_reset__asks_for_one():
    with pytest.raises(ResetNeeded):
        PickOne(toy_env()).step(0)


def test_pick_one__reset_in_the_middle__forgets_the_picks(picking):
    picking.step(3)
    picking.reset()
    assert picking.action_masks().all()
    picking.step(0)
    picking.step(1)
    assert picking.unwrapped.num_steps == 0


@pytest.mark.parametrize("index", [-1, 32])
def test_pick_one__no_such_candidate__is_refused(picking, index):
    with pytest.raises(ActionError, match=f"candidate {index} "):
        picking.step(index)


def test_pick_one__info_of_two_steps__shares_nothing(picking):
    arrays = [value for index in range(3) for value in picking.step(index)[4].values() if isinstance(value, np.ndarray)]
    for place, array in enumerate(arrays):
        assert not any(np.shares_memory(array, other) for other in arrays[:place])


def played(env, picks):
    """Take picks and return which rows each update was made on."""
    for pick in picks:
        env.step(pick)
    return [step.selected.tolist() for step in env.unwrapped.history]


@pytest.mark.parametrize("num_open", [0, 2])
@pytest.mark.parametrize("ends", [False, True])
def test_pick_one__restored_environment__gives_the_same_episode_again(num_open, ends):
    env = PickOne(toy_env(batch_size=4, horizon=3))
    env.reset(seed=0)
    moment = env.unwrapped.snapshot()
    picks = range(12)
    first = played(env, picks)
    assert [len(rows) for rows in first] == [4, 4, 4]
    if not ends:
        env.reset(seed=1)
    for pick in range(num_open) if not ends else ():
        env.step(20 + pick)
    env.unwrapped.restore(moment)
    assert env.action_masks().all(), "nothing is picked"
    assert played(env, picks) == first


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_pick_one__step_that_failed__is_forgotten_with_its_pick(picking, monkeypatch, error):
    def fails(evaluation):
        raise error

    world = picking.unwrapped
    offered = world.candidates
    picking.step(0)
    picking.step(1)
    with monkeypatch.context() as patched:
        patched.setattr(world, "_reward", fails)
        with pytest.raises(error):
            picking.step(2)
    assert np.flatnonzero(~picking.action_masks()).tolist() == [0, 1]
    picking.step(30)
    assert world.history[0].selected.tolist() == offered[[0, 1, 30]].tolist()


def test_pick_one__restored_to_the_end_of_an_episode__asks_for_a_reset_at_once(picking):
    for pick in range(6):
        picking.step(pick)
    end = picking.unwrapped.snapshot()
    picking.reset()
    picking.unwrapped.restore(end)
    with pytest.raises(ResetNeeded):
        picking.step(0)


def test_pick_one__over_a_fork__waits_for_a_full_batch():
    world = toy_env(batch_size=2, horizon=3)
    world.reset(seed=0)
    (fork,) = world.fork(1)
    env = PickOne(fork)
    observation, reward, *_, info = env.step(5)
    assert (reward, info["num_selected"], fork.num_steps) == (0.0, 0, 0)
    assert info["action_mask"].tolist() == [place != 5 for place in range(32)]
    np.testing.assert_array_equal(observation[:, :-1], world.observation()[:, :-1])
    assert env.step(6)[4]["num_selected"] == 2


@pytest.mark.parametrize(
    "wrap",
    [
        FlattenObservation,
        NormalizeObservation,
        lambda env: RescaleObservation(env, np.float32(-1), np.float32(1)),
        lambda env: TransformObservation(env, np.negative, env.observation_space),
    ],
    ids=["flattened", "normalized", "rescaled", "in the same space"],
)
def test_pick_one__observation_wrapper_within__is_refused_by_its_name(wrap):
    within = wrap(toy_env())
    with pytest.raises(SettingError, match=f"{type(within).__name__} .* put observation wrappers outside PickOne"):
        PickOne(gym.wrappers.OrderEnforcing(within))


def test_pick_one__availability_hidden__shows_no_picks():
    env = PickOne(toy_env(hide=["availability"]))
    before, _ = env.reset(seed=0)
    observation, _, _, _, info = env.step(4)
    assert not info["action_mask"][4]
    np.testing.assert_array_equal(observation, before)
