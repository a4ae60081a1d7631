"""What holds on a GPU: the same numbers as on the processor within the tolerance of replays, and exact undoing."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from raise_env import RaiseSelectEnv
from raise_env.agents.baselines import RandomAgent
from raise_env.agents.raise_fork import RaiseFork
from raise_env.agents.rollout import run_episode
from raise_env.base_model import model_folder
from raise_env.record import TOLERANCE, replay
from raise_env.vector import RaiseSelectVectorEnv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

#: Large enough that rounding has something to add up in.
SETTINGS = {"pool_size": 300, "num_candidates": 32, "batch_size": 8, "horizon": 12, "budget": None}


@pytest.fixture(scope="module")
def env(embedded_env):
    """An environment on the GPU, of the default numbers of dev and test rows."""
    return embedded_env(**SETTINGS, device="cuda", num_dev=None, num_test=None)


def batches(env, count):
    rng = np.random.default_rng(5)
    actions = np.zeros((count, env.config.num_candidates), dtype=np.int8)
    for action in actions:
        action[rng.choice(env.config.num_candidates, env.config.batch_size, replace=False)] = 1
    return actions


def test_device__auto__is_the_gpu(embedded_env):
    assert embedded_env(device="auto").assets.learner.base.device.type == "cuda"


@pytest.mark.parametrize("reward", ["loss", "exact_match"])
def test_replay__record_of_the_other_device__comes_out_within_the_tolerance(embedded_env, reward):
    for here, there in (("cuda", "cpu"), ("cpu", "cuda")):
        world = embedded_env(**SETTINGS, device=here, reward=reward, num_dev=None, num_test=None)
        record = run_episode(world, RandomAgent(), seed=3, name="random")
        difference, distance = replay(record, device=there)
        assert difference is None, (here, str(difference))
        assert distance < TOLERANCE or reward != "loss"


def test_step__from_one_moment__is_the_same_to_the_bit(env):
    env.reset(seed=1)
    action = batches(env, 1)[0]
    env.step(action)
    moment = env.snapshot()
    seen = []
    for _ in range(3):
        env.restore(moment)
        observation, reward, *_ = env.step(action)
        seen.append((reward, observation.tobytes(), env.dev_scores))
    assert seen[0] == seen[1] == seen[2]


def test_run_episode__twice__is_the_same_to_the_bit(env):
    first, second = (run_episode(env, RandomAgent(), seed=2, name="random") for _ in range(2))
    assert first.rewards == second.rewards
    assert first.final == second.final


def test_fork_and_probe__on_the_gpu__agree_with_steps_one_by_one(env):
    env.reset(seed=4)
    env.step(batches(env, 1)[0])
    moment, actions = env.snapshot(), batches(env, 4)
    together = RaiseSelectVectorEnv.over(env.fork(4)).step(actions)[1]
    probed = env.probe(actions) - env.dev_scores[-1]
    alone = []
    for action in actions:
        env.restore(moment)
        alone.append(env.step(action)[1])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(probed, alone, atol=1e-5)


def test_snapshot__of_the_processor__goes_on_on_the_gpu(embedded_env, env):
    other = embedded_env(**SETTINGS, device="cpu", num_dev=None, num_test=None)
    other.reset(seed=6)
    action = batches(env, 1)[0]
    other.step(action)
    env.reset(seed=6)
    env.restore(other.snapshot())
    np.testing.assert_allclose(env.step(action)[1], other.step(action)[1], rtol=1e-3, atol=1e-5)


def test_snapshot__of_the_gpu__is_pickled_in_the_processors_memory_and_goes_on_to_the_bit(env):
    env.reset(seed=6)
    first, second = batches(env, 2)
    env.step(first)
    moment = env.snapshot()
    sent = pickle.loads(pickle.dumps(moment))
    assert (moment.learner_state.adapter.device.type, sent.learner_state.adapter.device.type) == ("cuda", "cpu")
    wanted = env.step(second)[1]
    env.restore(sent)
    assert env.step(second)[1] == wanted


def test_row_gradients__of_both_devices__are_the_same(embedded_env, env):
    other = embedded_env(**SETTINGS, device="cpu", num_dev=None, num_test=None)
    env.reset(seed=0)
    other.reset(seed=0)
    rows = list(range(6))
    ours, theirs = env.row_gradients(rows), other.row_gradients(rows)
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    np.testing.assert_allclose(env.row_losses(rows), other.row_losses(rows), rtol=1e-4)


def test_save_adapter__trained_on_the_gpu__is_loaded_by_peft_on_the_processor(env, tmp_path):
    env.reset(seed=0)
    env.step(batches(env, 1)[0])
    env.save_adapter(tmp_path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder("tiny")), tmp_path)
    weights = [value for name, value in model.named_parameters() if "lora_B" in name]
    assert weights
    assert all(bool(value.abs().sum() > 0) and value.device.type == "cpu" for value in weights)


@pytest.mark.parametrize("more", [{"activation_checkpointing": True}, {"micro_batch_tokens": 200}])
def test_step__with_less_memory__gains_the_same(embedded_env, env, more):
    env.reset(seed=7)
    other = embedded_env(**SETTINGS, device="cuda", num_dev=None, num_test=None, **more)
    other.reset(seed=7)
    action = batches(env, 1)[0]
    np.testing.assert_allclose(other.step(action)[1], env.step(action)[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_raise_fork__learned_on_the_gpu__beats_random(embedded_env, dtype):
    world = RaiseSelectEnv(task="noise-60", horizon=12, device="cuda", dtype=dtype)
    agent = RaiseFork().learn(world, 2, seed=0)
    ours, theirs = (
        np.mean([run_episode(world, one, seed=seed, name=name).dev_scores[-1] for seed in range(3)])
        for name, one in (("raise_fork", agent), ("random", RandomAgent()))
    )
    assert ours > theirs


def test_reset__the_callers_generators__are_untouched(embedded_env):
    before = torch.random.get_rng_state(), torch.cuda.get_rng_state()
    world = embedded_env(**SETTINGS, device="cuda", seed_model=11)
    world.reset(seed=0)
    world.step(batches(world, 1)[0])
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert torch.equal(before[1], torch.cuda.get_rng_state())
