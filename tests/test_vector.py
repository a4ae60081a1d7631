from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import RecordEpisodeStatistics

from raise_env import PickOne, RaiseSelectEnv, TopKScores
from raise_env.errors import ActionError, RewardError, SettingError
from raise_env.features import BLOCKS
from raise_env.learner import LoraLearner
from raise_env.testing import toy_env
from raise_env.vector import RaiseSelectVectorEnv

#: How far a step from one and the same state may differ. AdamW divides small gradients by their own size, and with them
#: their rounding, which is the processor's: 2e-5 was seen, and a step with another's adapter is far beyond this.
TOLERANCE = 1e-4


@pytest.fixture
def passes(monkeypatch):
    """A list of how many adapters went through the model together, one entry a backward pass."""
    seen = []
    backward = LoraLearner._backward
    monkeypatch.setattr("raise_env.learner.STACKED_TOKENS", 1024)  # as many as go together here at most

    def noted(learner, adapters, batches, seed):
        seen.append(len(adapters))
        return backward(learner, adapters, batches, seed)

    monkeypatch.setattr(LoraLearner, "_backward", noted)
    return seen


def assert_same(found, expected):
    """What both vectors returned is the same: to the bit but for what the model computes."""
    observations, *numbers, infos = found
    expected_observations, *expected_numbers, expected_infos = expected
    static = slice(BLOCKS["difficulty"].start, None)
    np.testing.assert_array_equal(observations[..., static], expected_observations[..., static])
    np.testing.assert_allclose(observations, expected_observations, atol=TOLERANCE)
    for one, other in zip(numbers, expected_numbers, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, atol=TOLERANCE)
    assert list(infos) == list(expected_infos)
    for name, values in infos.items():
        assert values.dtype == expected_infos[name].dtype
        tolerance = TOLERANCE if name in ("dev_score", "test_score", "train_loss") else 0.0
        np.testing.assert_allclose(values, expected_infos[name], rtol=tolerance, atol=tolerance, err_msg=name)


def go_on_alike(followers, leaders):
    """Put environments into the states of others.

    AdamW goes by a small gradient's sign nearly as far as by a large one's: what two orders of summing differ in grows
    from step to step, and is not what is tested.
    """
    for follower, leader in zip(followers, leaders, strict=True):
        follower.unwrapped.restore(leader.unwrapped.snapshot())


@pytest.mark.parametrize("mode", [None, "sync"])
def test_make_vec__bernoulli_actions__runs_through_autoreset(small_settings, mode):
    env = gym.make_vec("RaiseSelect-v0", num_envs=3, vectorization_mode=mode, **small_settings)
    assert isinstance(env, RaiseSelectVectorEnv if mode is None else SyncVectorEnv)
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    rng = np.random.default_rng(0)
    observations, infos = env.reset(seed=0)
    assert observations.shape == (3, 16, 39)
    ends, rewards = [], []
    for _ in range(5):
        observations, reward, terminated, truncated, infos = env.step(rng.binomial(1, 0.3, (3, 16)))
        assert observations in env.observation_space
        assert not truncated.any()
        ends.append(terminated.tolist())
        rewards.append(reward)
    # Three steps an episode; the fourth resets, ignores its action and earns nothing.
    assert ends == [[False] * 3, [False] * 3, [True] * 3, [False] * 3, [False] * 3]
    assert (rewards[3] == 0).all()
    assert (rewards[0] != 0).all()
    assert infos["candidates"].shape == (3, 16)
    env.close()


def test_step__many_environments__is_what_sync_vector_env_does(small_settings, passes):
    """Equal batches and unequal ones, empty ones, ends at different steps, and the resets after them."""
    settings = {**small_settings, "budget": 12, "learning_rate": 1e-3}  # a first step at 3e-3 moves the loss by 1.3
    together = gym.make_vec("RaiseSelect-v0", num_envs=4, **settings)
    alone = SyncVectorEnv([lambda: RaiseSelectEnv(**settings)] * 4)
    seeds = [7, 3, 11, 5]
    rng = np.random.default_rng(0)
    observations, _ = together.reset(seed=seeds)
    np.testing.assert_array_equal(observations, alone.reset(seed=seeds)[0])
    ends = []
    for step in range(7):
        sizes = [4, 4, 0 if step == 1 else 2, 12 if step == 0 else 4]
        actions = np.stack([np.isin(np.arange(16), rng.choice(16, size, replace=False)) for size in sizes])
        found = together.step(actions.astype(np.int8))
        assert_same(found, alone.step(actions.astype(np.int8)))
        go_on_alike(alone.envs, together.envs)
        ends.append(found[2].tolist())
    assert ends[0] == [False, False, False, True], "the last one spends its budget at once"
    assert ends[2] == [True, True, True, False]
    assert max(passes) == 3


def test_step__environments_that_differ__are_each_at_their_own_step_of_the_schedule(small_settings):
    """One vector over environments of unlike horizons: the learning rate is each one's own."""
    make = lambda horizon: RaiseSelectEnv(**{**small_settings, "horizon": horizon})  # noqa: E731
    vector = RaiseSelectVectorEnv.over([make(2), make(6)])
    singles = [make(2), make(6)]
    vector.reset(seed=[1, 1])
    for env in singles:
        env.reset(seed=1)
    action = np.tile([1, 0, 0, 0], 4)
    for _ in range(2):
        _, rewards, *_ = vector.step(np.stack([action, action]))
        np.testing.assert_allclose(rewards, [env.step(action)[1] for env in singles], atol=TOLERANCE)
        go_on_alike(singles, vector.envs)
    assert abs(rewards[0] - rewards[1]) > 1e-3


def test_step__some_choose_nothing_or_have_ended__only_the_others_make_an_update(embedded_env, passes):
    vector = RaiseSelectVectorEnv.over([embedded_env(horizon=horizon) for horizon in (1, 3, 3)])
    vector.reset(seed=0)
    ledger, learners = vector.envs[0].ledger, [env._learner for env in vector.envs]
    before, updates = [learner.state for learner in learners], ledger.updates
    action = np.tile([1, 0, 0, 0], 4)
    passes.clear()  # of what the features took, if nobody had asked for them before
    vector.step(np.stack([action, action * 0, action]))
    assert passes == [2]
    assert ledger.updates == updates + 2
    assert [learner.state is state for learner, state in zip(learners, before, strict=True)] == [False, True, False]
    vector.step(np.stack([action, action * 0, action * 0]))
    assert passes == [2], "the first one is reset, the others take nothing"
    assert vector.envs[0].num_steps == 0


@pytest.mark.parametrize("settings", [{"micro_batch_tokens": 1}, {"lora": {"lora_dropout": 0.1}}])
def test_step__base_or_memory_that_holds_one_adapter__goes_one_by_one_to_the_bit(embedded_env, passes, settings):
    vector = RaiseSelectVectorEnv.over([embedded_env(**settings) for _ in range(2)])
    single = embedded_env(**settings)
    vector.reset(seed=0)
    single.reset(seed=1)
    action = np.tile([1, 0, 0, 0], 4)
    observations, rewards, *_ = vector.step(np.stack([action, action]))
    observation, reward, *_ = single.step(action)
    assert set(passes) == {1}
    assert rewards[1] == reward
    np.testing.assert_array_equal(observations[1], observation)


def test_step__one_update_diverges__ends_that_episode_and_leaves_the_others_untouched(embedded_env):
    make = lambda: RaiseSelectVectorEnv.over([embedded_env() for _ in range(3)])  # noqa: E731
    sound, struck = make(), make()
    action = np.tile(np.tile([1, 0, 0, 0], 4), (3, 1))
    for vector in (sound, struck):
        vector.reset(seed=0)
    learner = struck.envs[1]._learner
    adapter = learner.state.adapter.clone()
    adapter[0] = np.inf
    learner.state = type(learner.state).start(adapter)
    _, expected, *_ = sound.step(action)
    observations, rewards, terminated, _, infos = struck.step(action)
    np.testing.assert_array_equal(rewards[[0, 2]], expected[[0, 2]])
    assert rewards[1] == -10
    assert terminated.tolist() == infos["diverged"].tolist() == [False, True, False]
    assert infos["_train_loss"].tolist() == [True, False, True]
    assert np.isfinite(observations).all()
    _, rewards, terminated, _, infos = struck.step(action)
    assert rewards[1] == 0
    assert not terminated.any()
    assert infos["num_selected"].tolist() == [4, 0, 4]


def test_step__a_bad_action__moves_no_environment():
    vector = RaiseSelectVectorEnv.over([toy_env(), toy_env()])
    vector.reset(seed=0)
    with pytest.raises(ActionError, match="expected only 0 and 1"):
        vector.step(np.stack([np.ones(32), np.full(32, 2)]))
    assert [env.num_steps for env in vector.envs] == [0, 0]
    assert [env._learner.state for env in vector.envs] == [0.0, 0.0]


@pytest.mark.parametrize("actions", [np.ones((1, 32)), np.ones((3, 32)), np.ones((0, 32)), 1], ids=np.shape)
def test_step__more_or_fewer_actions_than_environments__moves_none(actions):
    vector = RaiseSelectVectorEnv.over([toy_env(), toy_env()])
    vector.reset(seed=0)
    with pytest.raises(ActionError, match=r"expected (one for each|2 actions)"):
        vector.step(actions)
    assert [env.num_steps for env in vector.envs] == [0, 0]


def test_make_vec__by_default__costs_adapters_alone(small_settings):
    env = gym.make_vec("RaiseSelect-v0", num_envs=3, **small_settings)
    assert all(single._assets is None for single in env.envs), "nothing is loaded before the first reset"
    observations, _ = env.reset(seed=0)
    assert len({id(single.assets) for single in env.envs}) == 1
    learners = [single._learner for single in env.envs]
    assert len({id(learner.base) for learner in learners}) == len({id(learner.pool) for learner in learners}) == 1
    assert (observations[0] != observations[1]).any(), "each has a seed of its own"
    env.step(np.stack([np.ones(16), np.zeros(16), np.ones(16)]))
    states = [learner.state for learner in learners]
    assert len({id(state) for state in states}) == 3
    # Nor does one keep alive what all went through together.
    assert [state.adapter.untyped_storage().nbytes() for state in states] == [4 * learners[0].base.num_parameters] * 3
    assert [state.first_moment.untyped_storage().nbytes() for state in states] == [4 * len(states[0].adapter)] * 3
    one, other = env.envs[:2]
    assert other.dev_scores[0] == other.dev_scores[1] != one.dev_scores[1]
    env.close()


def test_reset__a_mask__begins_some_anew_and_leaves_the_others():
    vector = RaiseSelectVectorEnv.over([toy_env(horizon=2) for _ in range(3)])
    actions = np.tile(np.repeat([1, 0], [8, 24]), (3, 1))
    vector.reset(seed=0)
    vector.step(actions)
    observations, *_ = vector.step(actions)
    fresh, infos = vector.reset(seed=[None, 9, None], options={"reset_mask": np.array([False, True, False])})
    assert [env.num_steps for env in vector.envs] == [2, 0, 2]
    np.testing.assert_array_equal(fresh[[0, 2]], observations[[0, 2]])
    np.testing.assert_array_equal(fresh[1], toy_env(horizon=2).reset(seed=9)[0])
    assert infos["_candidates"].tolist() == [False, True, False]
    _, rewards, *_ = vector.step(actions)
    assert (rewards != 0).tolist() == [False, True, False], "the two others are reset by the step"


def test_call__methods_and_attributes__reach_every_environment():
    vector = RaiseSelectVectorEnv.over([toy_env(), toy_env()])
    vector.reset(seed=[3, 4])
    assert vector.get_attr("num_steps") == (0, 0)
    np.testing.assert_array_equal(vector.call("action_masks"), np.ones((2, 32), dtype=bool))
    assert [env.np_random_seed for env in vector.envs] == [3, 4]


# Over environments that there are


def test_over__forks__go_on_from_one_state_as_each_alone_would(embedded_env, passes):
    env = embedded_env()
    env.reset(seed=0)
    env.step(np.tile([1, 0, 0, 0], 4))
    passes.clear()
    forks = RaiseSelectVectorEnv.over(env.fork(4))
    np.testing.assert_array_equal(np.stack(forks.call("observation")), np.stack([env.observation()] * 4))
    actions = np.stack([np.roll(np.tile([1, 0, 0, 0], 4), shift) for shift in range(4)])
    _, rewards, *_, infos = forks.step(actions)
    assert passes == [4]
    assert env.num_steps == 1
    assert {single._learner.base for single in forks.envs} == {env._learner.base}
    for place, single in enumerate(env.fork(4)):
        _, reward, _, _, info = single.step(actions[place])
        assert rewards[place] == pytest.approx(reward, abs=TOLERANCE)
        np.testing.assert_array_equal(infos["selected"][place], info["selected"])
    assert len(set(rewards)) == 4


def test_over__some_reset_before_any_step__shows_the_others_as_they_are():
    env = toy_env()
    env.reset(seed=0)
    env.step(np.ones(32))
    forks = RaiseSelectVectorEnv.over(env.fork(2))
    observations, _ = forks.reset(options={"reset_mask": np.array([True, False])})
    np.testing.assert_array_equal(observations[1], env.observation())
    assert forks.get_attr("num_steps") == (0, 1)


def test_over__environments_not_begun__need_a_reset():
    vector = RaiseSelectVectorEnv.over([toy_env(), toy_env()])
    with pytest.raises(ResetNeeded):
        vector.step(np.ones((2, 32)))


@pytest.mark.parametrize("wrapper", [TopKScores, PickOne])
def test_over__wrapped_environments__step_as_they_do_alone(embedded_env, passes, wrapper):
    together = RaiseSelectVectorEnv.over([wrapper(embedded_env()) for _ in range(3)])
    alone = SyncVectorEnv([lambda: wrapper(embedded_env())] * 3)
    together.reset(seed=2)
    alone.reset(seed=2)
    rng = np.random.default_rng(0)
    num_updates = 0
    for _ in range(4 if wrapper is TopKScores else 15):
        actions = rng.random((3, 16)) if wrapper is TopKScores else rng.integers(16, size=3)
        passes.clear()
        found = together.step(actions.astype(together.single_action_space.dtype))
        num_updates += bool(passes)
        assert_same(found, alone.step(actions.astype(together.single_action_space.dtype)))
        if passes:  # without an update there is nothing to follow, and picks would be dropped
            go_on_alike(alone.envs, together.envs)
    assert num_updates == 3
    assert together.call("action_masks")[0].shape == (16,)


def test_over__gym_make_wrappers__are_gone_past(small_settings):
    envs = [gym.make("RaiseSelect-v0", **small_settings) for _ in range(2)]
    vector = RaiseSelectVectorEnv.over([TopKScores(env) for env in envs])
    vector.reset(seed=0)
    vector.step(np.zeros((2, 16), dtype=np.float32))
    assert [env.unwrapped.num_steps for env in envs] == [1, 1]


@pytest.mark.parametrize("envs", [[], [toy_env()] * 2], ids=["none", "one twice"])
def test_over__no_environments_or_one_twice__is_refused(envs):
    with pytest.raises(SettingError, match=r"each needs a state of its own; .*fork\(n\)"):
        RaiseSelectVectorEnv.over(envs)


def test_over__a_wrapper_that_would_miss_steps__is_refused():
    with pytest.raises(SettingError, match=r"RecordEpisodeStatistics cannot .* use gymnasium\.vector\.SyncVectorEnv"):
        RaiseSelectVectorEnv.over([TopKScores(RecordEpisodeStatistics(toy_env()))])


def test_sync_vector_env__wrapped_environments__step_together():
    env = SyncVectorEnv([lambda: TopKScores(toy_env(horizon=2))] * 2)
    env.reset(seed=0)
    for _ in range(4):
        observations, *_ = env.step(env.action_space.sample())
    assert observations.shape == (2, 32, 39)


@pytest.mark.parametrize("size", [4, 1])
def test_step__several_threads_of_torch__same_bits_each_time_and_nearly_those_of_one(embedded_env, size):
    env = embedded_env()
    env.reset(seed=0)
    actions = np.random.default_rng(0).permuted(np.tile(np.arange(16) < size, (3, 1)), axis=1).astype(np.int8)
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 3, 3):
            torch.set_num_threads(num_threads)
            rewards = RaiseSelectVectorEnv.over(env.fork(3)).step(actions)[1]
            results.append([rewards, env.probe(actions) - env.dev_scores[-1]])
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(results[2], results[1])
    np.testing.assert_allclose(results[1], results[0], atol=TOLERANCE)


def test_step__refused_pick_of_one_environment__leaves_the_picks_of_the_others_as_they_were():
    envs = [toy_env(batch_size=2), toy_env(batch_size=2)]
    vector = RaiseSelectVectorEnv.over([PickOne(env) for env in envs])
    vector.reset(seed=0)
    with pytest.raises(ActionError, match="candidate 999"):
        vector.step(np.array([0, 999]))
    vector.step(np.array([1, 1]))
    assert [env.num_steps for env in envs] == [0, 0]
    vector.step(np.array([2, 2]))
    assert [env.num_steps for env in envs] == [1, 1]


@pytest.mark.parametrize("wrapper", [lambda env: env, PickOne])
def test_step__environments_put_back_after_their_end__go_on_from_there(wrapper):
    worlds = [toy_env(horizon=1, batch_size=1) for _ in range(2)]
    vector = RaiseSelectVectorEnv.over([wrapper(world) for world in worlds])
    vector.reset(seed=0)
    moments = [world.snapshot() for world in worlds]
    action = np.ones(2, dtype=np.int64) if wrapper is PickOne else np.eye(32, dtype=np.int8)[[1, 1]]
    first = vector.step(action)
    assert first[2].all()
    for world, moment in zip(worlds, moments, strict=True):
        world.restore(moment)
    again = vector.step(action)
    np.testing.assert_array_equal(again[1], first[1])
    assert again[2].all()
    assert vector.step(action)[1].tolist() == [0.0, 0.0], "now they are reset"


def test_step__environments_put_to_their_end__are_reset_and_the_others_go_on():
    world = toy_env(horizon=1)
    world.reset(seed=0)
    begun = world.snapshot()
    world.step(np.ones(32))
    ended = world.snapshot()
    vector = RaiseSelectVectorEnv.over(world.fork(2))  # of an environment whose episode has ended
    _, rewards, terminated, *_ = vector.step(np.ones((2, 32)))
    assert rewards.tolist() == [0.0, 0.0]
    assert not terminated.any()
    for single, moment in zip(vector.envs, (begun, ended), strict=True):
        single.restore(moment)
    _, rewards, terminated, *_ = vector.step(np.ones((2, 32)))
    assert (rewards != 0).tolist() == terminated.tolist() == [True, False]
    assert vector.get_attr("num_steps") == (1, 0)


@pytest.mark.parametrize("error", [RewardError, KeyboardInterrupt])
def test_step__error_in_one_environment__leaves_the_picks_of_all(monkeypatch, error):
    def fails(evaluation):
        raise error("on purpose")

    envs = [toy_env(batch_size=2), toy_env(batch_size=3)]
    vector = RaiseSelectVectorEnv.over([PickOne(env) for env in envs])
    vector.reset(seed=0)
    offered = [env.candidates for env in envs]
    vector.step(np.array([0, 0]))
    with monkeypatch.context() as patched:
        patched.setattr(envs[0], "_reward", fails)
        with pytest.raises(error, match="on purpose"):
            vector.step(np.array([1, 1]))
    vector.step(np.array([1, 1]))
    assert [env.num_steps for env in envs] == [1, 0], "the second one waits for a third pick"
    vector.step(np.array([2, 2]))
    for env, rows, size in zip(envs, offered, (2, 3), strict=True):
        assert env.history[0].selected.tolist() == rows[:size].tolist()


def test_step__error_in_one_environment__moves_none(monkeypatch):
    envs = [toy_env(), toy_env()]
    vector = RaiseSelectVectorEnv.over(envs)
    vector.reset(seed=0)
    actions = np.ones((2, 32), dtype=np.int8)
    expected = [env.fork(1)[0].step(actions[0])[1] for env in envs]
    with monkeypatch.context() as patched:
        patched.setattr(envs[1], "_reward", fails)
        with pytest.raises(RewardError, match="on purpose"):
            vector.step(actions)
    assert [(env.num_steps, env._learner.state, len(env.dev_scores)) for env in envs] == [(0, 0.0, 1)] * 2
    assert vector.step(actions)[1].tolist() == expected


def fails(evaluation):
    raise RewardError("on purpose")
