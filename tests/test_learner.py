from __future__ import annotations

import dataclasses
import json
import math
import pickle
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from raise_env.base_model import BaseModel, model_folder
from raise_env.config import LoraSettings
from raise_env.encoding import EncodedRows, Encoder, collate
from raise_env.env import RaiseSelectEnv
from raise_env.errors import ModelError
from raise_env.evaluation import EvaluationSet, evaluate
from raise_env.learner import LoraLearner, TrainingState, UpdateSettings, _adamw
from raise_env.learner_protocol import Ledger, scheduled_rate
from raise_env.pool import Instruction


def take(env, *places):
    action = np.zeros(env.action_space.n, dtype=np.int8)
    action[list(places)] = 1
    return action


def test_training_state_to__another_device__takes_all_of_it_there():
    state = TrainingState(torch.ones(3), torch.zeros(3), torch.zeros(3), num_updates=4)
    there = state.to(torch.device("meta"))
    assert {part.device.type for part in (there.adapter, there.first_moment, there.second_moment)} == {"meta"}
    assert there.num_updates == 4
    assert state.to(torch.device("cpu")) is state


class Elsewhere:
    """A tensor in another device's memory, as far as pickling asks for it; itself it opens only there."""

    def __init__(self, tensor):
        self.tensor = tensor

    def cpu(self):
        return self.tensor

    def __reduce__(self):
        pytest.fail("it was pickled where it is")


def test_training_state__pickled_in_another_devices_memory__opens_in_the_processors():
    parts = [torch.arange(3.0) + shift for shift in range(3)]
    opened = pickle.loads(pickle.dumps(TrainingState(*map(Elsewhere, parts), num_updates=4)))
    for part, own in zip((opened.adapter, opened.first_moment, opened.second_moment), parts, strict=True):
        assert part.device.type == "cpu"
        assert torch.equal(part, own)
    assert opened.num_updates == 4


# The same fine-tuning by plain PEFT and torch


def tokens_of(tokenizer, row):
    """A row's tokens and labels, by the chat template's own mask of what the assistant says, or the plain frame."""
    if tokenizer.chat_template:
        messages = []
        for said, answered in row.exchanges:
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, is_label = encoded["input_ids"], encoded["assistant_masks"]
    else:
        frame = f"### Instruction:\n{row.prompt}\n\n### Response:\n"
        whole, prompt = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (frame + row.response, frame)
        )
        ids = [tokenizer.bos_token_id, *whole, tokenizer.eos_token_id]
        pairs = enumerate(zip(whole, prompt, strict=False))
        alike = next((place for place, (one, other) in pairs if one != other), len(prompt))
        is_label = [place > alike for place in range(len(ids))]
    return ids, [token if learned else -100 for token, learned in zip(ids, is_label, strict=True)]


def padded(tokenizer, rows):
    encoded = [tokens_of(tokenizer, row) for row in rows]
    length = max(len(ids) for ids, _ in encoded)
    return {
        "input_ids": torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in encoded]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in encoded]),
        "labels": torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in encoded]),
    }


def plain_fine_tuning(env, adapter_folder):
    """Train on what `env` has trained on; return the training losses, dev scores and test loss that come of it."""
    folder = model_folder(env.config.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder), str(adapter_folder), is_trainable=True
    )
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimiser = torch.optim.AdamW(parameters, env.config.learning_rate, weight_decay=env.config.weight_decay)
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: (1 + math.cos(math.pi * step / env.config.horizon)) / 2
    )

    def loss_on(rows):
        with torch.no_grad():
            return model(**padded(tokenizer, rows)).loss.item()

    train_losses, dev_scores = [], [-loss_on(env.assets.data.dev)]
    for step in env.history:
        loss = model(**padded(tokenizer, [env.assets.pool[int(row)] for row in step.selected])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, env.config.max_grad_norm)
        optimiser.step()
        optimiser.zero_grad()
        cosine.step()
        train_losses.append(loss.item())
        dev_scores.append(-loss_on(env.assets.data.dev))
    return train_losses, dev_scores, loss_on(env.assets.data.test)


def assert_trains_as_peft_does(env, tmp_path):
    env.reset(seed=1)
    env.save_adapter(tmp_path / "first")
    size = env.config.batch_size
    for start in range(env.config.horizon):
        _, _, over, _, info = env.step(take(env, *range(start, start + size)))
    assert over
    train_losses, dev_scores, test_loss = plain_fine_tuning(env, tmp_path / "first")
    assert [step.train_loss for step in env.history] == pytest.approx(train_losses, abs=1e-5)
    assert env.dev_scores == pytest.approx(dev_scores, abs=1e-5)
    assert [step.reward for step in env.history] == pytest.approx(np.diff(dev_scores), abs=1e-5)
    assert info["test_score"] == pytest.approx(-test_loss, abs=1e-5)
    assert min(abs(np.diff(dev_scores))) > 1e-4, "something was learned at every step"


FORMS = {
    "plain": {},
    "few layers": {"r": 4, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "DoRA": {"use_dora": True},
}


@pytest.mark.parametrize("form", FORMS)
def test_episode__embedded_model__is_what_plain_peft_and_torch_do(embedded_env, tmp_path, form):
    settings = {"learning_rate": 5e-3, "weight_decay": 0.1, "max_grad_norm": 0.5, "auxiliary_updates": 0}
    env = embedded_env(lora=FORMS[form], budget=None, **settings)
    assert_trains_as_peft_does(env, tmp_path)
    assert env.assets.learner.base.stackable == (form != "DoRA")


def folder_of_rows(tmp_path, shared):
    """Write a small pool, dev and test set of GSM8K."""
    lines = (shared / "data" / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if len(line) < 300]
    for name, part in {"pool": rows[:32], "dev": rows[32:36], "test": rows[36:40]}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part), encoding="utf-8")
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("pool", "dev", "test")}


@pytest.mark.real
def test_episode__real_model_and_data__is_what_plain_peft_and_torch_do(tmp_path, shared):
    env = RaiseSelectEnv(
        model=str(shared / "models" / "stories260K-hf"),
        **folder_of_rows(tmp_path, shared),
        num_candidates=16,
        num_classes=2,
        batch_size=4,
        horizon=3,
        max_length=512,
        auxiliary_updates=0,
    )
    assert_trains_as_peft_does(env, tmp_path)


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """A small GPT-2 with random weights: its layers are Conv1D, with weights the other way round."""
    folder = tmp_path_factory.mktemp("gpt2")
    AutoTokenizer.from_pretrained(model_folder("tiny")).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": 259}
        GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).save_pretrained(folder)
    return str(folder)


def test_episode__gpt2__is_what_plain_peft_and_torch_do(embedded_env, gpt2_folder, tmp_path):
    env = embedded_env(model=gpt2_folder, budget=None, learning_rate=1e-2, auxiliary_updates=0)
    assert_trains_as_peft_does(env, tmp_path)
    assert env.assets.learner.base.stackable


def test_save_adapter__loaded_by_plain_peft__scores_the_same(embedded_env, tmp_path):
    env = embedded_env()
    env.reset(seed=0)
    for _ in range(2):
        env.step(take(env, 0, 1, 2, 3))
    env.save_adapter(tmp_path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder("tiny")), str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(model_folder("tiny"))
    with torch.no_grad():
        loss = model(**padded(tokenizer, env.assets.data.test)).loss.item()
    assert loss == pytest.approx(env.evaluate("test").loss, abs=1e-4)
    assert abs(loss + env.dev_scores[0]) > 1e-3


def test_adamw__several_states_at_once__steps_as_torch_does():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 50, generator=generator)
    settings = UpdateSettings(learning_rate=0.1, weight_decay=0.1, max_grad_norm=1.0, micro_batch_tokens=1)
    for clipped in (True, False):
        settings = dataclasses.replace(settings, max_grad_norm=1.0 if clipped else 0.0)
        states = [TrainingState.start(row) for row in start]
        plain = [torch.nn.Parameter(row.clone()) for row in start]
        optimisers = [torch.optim.AdamW([value], lr=0.1, weight_decay=0.1) for value in plain]
        for _ in range(4):
            gradients = torch.randn(3, 50, generator=generator) * torch.tensor([[0.01], [1.0], [100.0]])
            states = _adamw(states, gradients, [0.1] * len(states), settings)
            for value, gradient, optimiser in zip(plain, gradients, optimisers, strict=True):
                value.grad = gradient.clone()
                if clipped:
                    torch.nn.utils.clip_grad_norm_([value], 1.0)
                optimiser.step()
        for state, value in zip(states, plain, strict=True):
            torch.testing.assert_close(state.adapter, value.detach(), atol=1e-5, rtol=1e-5)
            assert state.num_updates == 4


# Losses and gradients of single rows


def plain_model(env, folder):
    """The environment's model as it is, as plain PEFT loads it, and its tokenizer."""
    env.save_adapter(folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder(env.config.model))
    tokenizer = AutoTokenizer.from_pretrained(model_folder(env.config.model))
    return PeftModel.from_pretrained(base, str(folder), is_trainable=True).eval(), tokenizer


def plain_gradients(env, rows, folder):
    """The gradient of each row's loss by a backward pass of its own, and the losses."""
    model, tokenizer = plain_model(env, folder)
    parameters = [value for value in model.parameters() if value.requires_grad]
    gradients, losses = [], []
    for row in rows:
        model.zero_grad()
        loss = model(**padded(tokenizer, [row])).loss
        loss.backward()
        gradients.append(torch.cat([value.grad.flatten() for value in parameters]).numpy())
        losses.append(loss.item())
    return np.array(gradients), np.array(losses)


def relative_errors(values, expected):
    """How far each row is from the expected one, by its length."""
    return np.linalg.norm(values - expected, axis=1) / np.linalg.norm(expected, axis=1)


ROWS = np.array([31, 2, 17, 40, 5, 5, 22])


@pytest.mark.parametrize("form", FORMS)
def test_row_gradients__embedded_model__are_those_of_plain_peft_row_by_row(embedded_env, tmp_path, form):
    env = embedded_env(lora=FORMS[form], budget=None, auxiliary_updates=0)
    env.reset(seed=0)
    env.step(take(env, 0, 1, 2, 3))
    env.step(take(env, 4, 5, 6, 7))
    assert len(set(env.assets.learner.pool.lengths[ROWS])) > 3, "padded to different lengths"
    expected, losses = plain_gradients(env, [env.assets.pool[int(row)] for row in ROWS], tmp_path / "pool")
    gradients = env.row_gradients(ROWS)
    assert gradients.dtype == np.float32
    assert relative_errors(gradients, expected).max() < 1e-5
    np.testing.assert_allclose(env.row_losses(ROWS), losses, rtol=1e-5)
    dev_rows = np.array([6, 0, 3])
    expected, _ = plain_gradients(env, [env.assets.data.dev[int(row)] for row in dev_rows], tmp_path / "dev")
    assert relative_errors(env.row_gradients(dev_rows, "dev"), expected).max() < 1e-5


def test_learner__conversations__losses_gradients_and_updates_of_plain_peft(embedded_env, tmp_path):
    env = embedded_env(auxiliary_updates=0)
    env.reset(seed=0)
    env.step(take(env, 0, 1, 2, 3))
    rows = [
        dataclasses.replace(
            env.assets.pool[i], earlier=tuple((r.prompt, r.response) for r in env.assets.pool[i + 1 : i + n])
        )
        for i, n in [(0, 1), (1, 3), (5, 2), (9, 4)]
    ]
    learner = env._running_learner.copy()
    learner.pool = Encoder(learner.base.tokenizer, 256).encode(rows)
    _, mask = learner.pool.row(1)
    assert (np.diff(mask.astype(int)) == 1).sum() == 3, "labels in three places"
    places = np.arange(4)
    expected, losses = plain_gradients(env, rows, tmp_path / "rows")
    assert relative_errors(learner.row_gradients(places), expected).max() < 1e-5
    np.testing.assert_allclose(learner.row_losses(places), losses, rtol=1e-5)
    # All of them in one update: the mean over all labels, packed or not, in one pass or several.
    model, tokenizer = plain_model(env, tmp_path / "batch")
    loss = model(**padded(tokenizer, rows)).loss
    loss.backward()
    wanted = torch.cat([value.grad.flatten() for value in model.parameters() if value.requires_grad]).numpy()
    for limit, packs in [(16_384, True), (16_384, False), (200, True)]:
        learner.settings = dataclasses.replace(learner.settings, micro_batch_tokens=limit)
        learner.base._packs = packs
        gradients, found = learner._gradients([learner.state], [places], [0])
        learner.base._packs = True
        assert found[0] == pytest.approx(loss.item(), rel=1e-5)
        assert relative_errors(gradients.numpy(), wanted[None]).max() < 1e-5


@pytest.mark.parametrize("num_updates", [0, 2])
def test_row_gradients__adam__are_the_steps_that_torch_makes_from_the_same_moments(embedded_env, tmp_path, num_updates):
    env = embedded_env(auxiliary_updates=0)
    env.reset(seed=0)
    for start in range(num_updates):
        env.step(take(env, start, start + 1, start + 2))
    state = env.snapshot().learner_state
    gradients, _ = plain_gradients(env, [env.assets.pool[int(row)] for row in ROWS], tmp_path)
    expected = []
    for gradient in gradients:
        value = torch.nn.Parameter(torch.zeros_like(state.adapter))
        optimiser = torch.optim.AdamW([value], lr=1.0, weight_decay=0.0)
        moments = {"exp_avg": state.first_moment.clone(), "exp_avg_sq": state.second_moment.clone()}
        optimiser.state[value] = {"step": torch.tensor(float(state.num_updates)), **moments}
        value.grad = torch.from_numpy(gradient)
        optimiser.step()
        expected.append(-value.detach().numpy())
    # Adam divides small gradients by their own size, and with them their rounding: whole directions are compared.
    directions = env.row_gradients(ROWS, adam=True)
    assert relative_errors(directions, np.array(expected)).max() < 1e-3
    assert relative_errors(env.row_gradients(ROWS), np.array(expected)).min() > 0.5
    assert state.num_updates == num_updates


@pytest.mark.parametrize("limit", [1, 100, 16_384])
@pytest.mark.parametrize("adam", [False, True])
def test_row_gradients__rows_in_any_order_and_company__are_each_their_own(learner, limit, adam):
    learner.update(BATCHES[0], 0.0, 0)
    together = learner.row_gradients(ROWS, adam=adam)
    learner.settings = dataclasses.replace(learner.settings, micro_batch_tokens=limit)
    backwards = learner.row_gradients(ROWS[::-1].copy(), adam=adam)[::-1]
    assert relative_errors(backwards, together).max() < (1e-3 if adam else 1e-5)
    assert relative_errors(together[:1], together[1:2]).max() > 0.1
    np.testing.assert_allclose(learner.row_losses(ROWS[::-1].copy())[::-1], learner.row_losses(ROWS), rtol=1e-5)


def test_row_gradients__rows_without_labels__are_zero_and_their_losses_nan(learner):
    bare = ROWS[1:4]
    label_counts = learner.pool.label_counts.copy()
    label_counts[bare] = 0
    learner.pool = EncodedRows.of_lengths(learner.pool.tokens, learner.pool.lengths, label_counts)
    for part in (ROWS, bare):
        has_labels = ~np.isin(part, bare)
        np.testing.assert_array_equal(learner.row_gradients(part).any(axis=1), has_labels)
        np.testing.assert_array_equal(np.isfinite(learner.row_losses(part)), has_labels)
        assert np.isfinite(learner.row_gradients(part, adam=True)).all()


def test_row_gradients__and_losses__move_nothing_and_are_counted(learner):
    learner.update(BATCHES[0], 0.0, 0)
    state, adapter = learner.state, learner.state.adapter.clone()
    learner.ledger = Ledger()
    learner.row_losses(ROWS)
    learner.row_gradients(ROWS, adam=True)
    learner.row_gradients(np.array([2]), "dev")
    assert learner.state is state
    assert torch.equal(state.adapter, adapter)
    tokens = int(learner.pool.lengths[ROWS].sum())
    dev_tokens = int(learner.splits["dev"].rows.lengths[2])
    assert learner.ledger == Ledger(tokens, tokens + dev_tokens, 0, 0)


# One update in several ways


@pytest.fixture
def learner(embedded_env):
    return embedded_env().assets.learner.copy()


BATCHES = [np.array([0, 1, 2]), np.array([3, 4, 5]), np.array([6, 7, 8])]


def test_train__several_adapters_in_one_pass__is_each_by_itself(learner):
    assert learner.base.stackable
    states = [learner.state]
    for rows in BATCHES[:2]:
        learner.update(rows, 0.1, 0)
        states.append(learner.state)
    together, losses = learner._train(states, BATCHES, [0.3] * len(states), [0] * len(states))
    for state, rows, after, loss in zip(states, BATCHES, together, losses, strict=True):
        (alone,), (loss_alone,) = learner._train([state], [rows], [0.3], [0])
        assert loss == pytest.approx(loss_alone, abs=1e-5)  # rounding of float32 is the processor's
        torch.testing.assert_close(after.first_moment, alone.first_moment, atol=1e-7, rtol=1e-4)
        # AdamW divides small gradients by their own size, and with them their rounding: single numbers may differ by
        # more, on some processors, so it is the whole step that is compared.
        step, step_alone = after.adapter - state.adapter, alone.adapter - state.adapter
        assert (step - step_alone).norm() < 1e-3 * step_alone.norm()
    assert len({round(loss, 5) for loss in losses}) == 3


@pytest.mark.parametrize("limit", [1, 100, 16_384])
def test_probe__batches_of_any_size__is_update_then_evaluate(learner, limit):
    learner.settings = dataclasses.replace(learner.settings, micro_batch_tokens=limit)
    batches = [np.array([0]), *BATCHES, np.array([], dtype=np.int64), np.arange(7)]
    learner.update(np.array([9]), 0.0, 0)
    state = learner.state
    subset = np.array([1, 4, 6])
    probed = learner.probe(batches, 0.5, 0, subset)
    assert learner.state is state
    for rows, evaluation in zip(batches, probed, strict=True):
        alone = learner.copy()
        if len(rows):
            alone.update(rows, 0.5, 0)
        np.testing.assert_allclose(evaluation.row_losses, alone.evaluate("dev", subset).row_losses, rtol=1e-5)


def test_update__in_micro_batches__is_the_whole_batch_at_once(learner):
    rows, whole = np.arange(9), learner.copy()
    loss = whole.update(rows, 0.0, 0)
    for limit in (1, 120):
        parts = learner.copy()
        parts.settings = dataclasses.replace(learner.settings, micro_batch_tokens=limit)
        assert parts.update(rows, 0.0, 0) == pytest.approx(loss, abs=1e-5)
        torch.testing.assert_close(parts.state.first_moment, whole.state.first_moment, atol=1e-7, rtol=1e-4)


def test_evaluate__merged_adapter__is_the_unmerged_one_and_the_base_is_put_back(learner):
    for rows in BATCHES:
        learner.update(rows, 0.0, 0)
    checksum = learner.base.base_checksum()
    merged = learner.evaluate("dev")
    assert learner.base.base_checksum() == checksum
    adapters = learner.state.adapter[None]
    apart = evaluate(lambda batch: learner.base.token_losses(batch, adapters), learner.splits["dev"])
    np.testing.assert_allclose(merged.row_losses, apart.row_losses, rtol=1e-5)
    np.testing.assert_array_equal(merged.row_correct, apart.row_correct)
    bare = evaluate(lambda batch: learner.base.token_losses(batch, None), learner.splits["dev"])
    assert (abs(bare.row_losses - merged.row_losses) > 1e-3).all()


def test_merged__for_a_while__changes_this_threads_passes_and_no_weight(learner):
    base, noise = learner.base, torch.ones_like(learner.state.adapter)
    checksum, batch = base.base_checksum(), collate(learner.pool, BATCHES[0])

    def losses():
        with torch.no_grad():
            return base.token_losses(batch, None)[0]

    before = losses()
    with base.merged(noise):
        assert not torch.equal(losses(), before)
        assert base.base_checksum() == checksum
        with ThreadPoolExecutor(1) as other:
            torch.testing.assert_close(other.submit(losses).result(), before, rtol=1e-6, atol=1e-6)
    with pytest.raises(KeyboardInterrupt), base.merged(noise):
        raise KeyboardInterrupt
    torch.testing.assert_close(losses(), before, rtol=0, atol=0)


def test_state__whatever_is_done_next__is_never_changed_in_place(learner, tmp_path):
    learner.update(BATCHES[0], 0.0, 0)
    kept = [learner.initial, learner.state]
    values = [[getattr(state, f.name) for f in dataclasses.fields(state)] for state in kept]
    copies = [[v.clone() if isinstance(v, torch.Tensor) else v for v in row] for row in values]
    learner.probe(BATCHES, 0.1, 0, np.arange(4))
    learner.update(BATCHES[1], 0.2, 0)
    learner.evaluate("test")
    learner.save_adapter(tmp_path)
    learner.copy().update(BATCHES[2], 0.3, 0)
    learner.reset()
    learner.update(BATCHES[2], 0.3, 0)
    for row, copy in zip(values, copies, strict=True):
        for value, before in zip(row, copy, strict=True):
            assert torch.equal(value, before) if isinstance(value, torch.Tensor) else value == before


def test_update__the_same_rows_again_and_again__are_learned(learner):
    losses = [learner.update(BATCHES[0], 0.0, 0) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.2
    learner.reset()
    assert learner.update(BATCHES[0], 0.0, 0) == losses[0]


def test_update__part_of_the_way__moves_by_the_scheduled_rate(learner):
    learner.update(BATCHES[0], 0.25, 0)
    moved = (learner.state.adapter - learner.initial.adapter).abs().max().item()
    # AdamW's first step moves each number by the rate, whatever its gradient.
    assert moved == pytest.approx(learner.settings.learning_rate * (1 + math.cos(math.pi / 4)) / 2, rel=1e-3)
    assert moved == pytest.approx(scheduled_rate(learner.settings.learning_rate, 0.25), rel=1e-3)


def test_update__at_the_end_of_the_schedule__moves_nothing(learner):
    learner.update(BATCHES[0], 1.0, 0)
    assert torch.equal(learner.state.adapter, learner.initial.adapter)
    assert learner.state.num_updates == 1


def test_ledger__work_of_each_kind__is_counted_in_tokens(learner):
    learner.ledger = Ledger()
    rows, subset = np.array([1, 2]), np.array([0])
    tokens = int(learner.pool.lengths[rows].sum())
    dev, test = (int(learner.splits[split].rows.lengths.sum()) for split in ("dev", "test"))
    learner.update(rows, 0.0, 0)
    assert learner.ledger == Ledger(0, tokens, 0, 1)
    learner.evaluate("dev")
    learner.evaluate("test")
    assert learner.ledger == Ledger(dev, tokens, test, 1)
    learner.copy().probe([rows, rows[:0]], 0.0, 0, subset)
    first = int(learner.splits["dev"].rows.lengths[0])
    assert learner.ledger == Ledger(dev + 2 * first, 2 * tokens, test, 2)
    assert learner.ledger.token_forwards == dev + 2 * first + 3 * 2 * tokens


def test_evaluate__same_state_again__is_scored_once(learner):
    learner.ledger = Ledger()
    first = learner.evaluate("dev")
    cost = learner.ledger.forward_tokens
    learner.evaluate("test")
    part = learner.evaluate("dev", np.array([0, 1]))
    assert learner.evaluate("dev") is first
    part_cost = int(learner.splits["dev"].rows.lengths[:2].sum())
    assert learner.ledger.forward_tokens == cost + part_cost
    np.testing.assert_allclose(part.row_losses, first.row_losses[:2], rtol=1e-5)
    state = learner.state
    learner.update(BATCHES[0], 0.0, 0)
    changed = learner.evaluate("dev")
    assert (changed.row_losses != first.row_losses).all()
    learner.state = state
    np.testing.assert_array_equal(learner.evaluate("dev").row_losses, first.row_losses)


# Dropout, precision, tokenizers


@pytest.fixture
def dropping(embedded_env, monkeypatch):
    """A learner with dropout whose rows go through one by one, and the seeds that each of its passes was given."""
    learner = embedded_env(lora={"lora_dropout": 0.5}, auxiliary_updates=0).assets.learner.copy()
    learner.settings = dataclasses.replace(learner.settings, micro_batch_tokens=1)
    seeds = []
    token_losses = learner.base.token_losses

    def noted(batch, adapters, *, dropout_seed=None):
        seeds.append(dropout_seed)
        return token_losses(batch, adapters, dropout_seed=dropout_seed)

    monkeypatch.setattr(learner.base, "token_losses", noted)
    return learner, seeds


def test_update__lora_dropout_in_micro_batches__drops_something_else_in_each(dropping):
    learner, seeds = dropping
    learner.update(BATCHES[0], 0.0, 5)
    assert len(seeds) == len(set(seeds)) == len(BATCHES[0])
    assert seeds[0] == 5, "an update in one piece stays as it was"


@pytest.mark.parametrize("num_updates", [0, 2])
def test_dev_direction__lora_dropout__drops_something_else_in_each_update(dropping, num_updates):
    learner, seeds = dropping
    learner.dev_direction(num_updates, 4, progress=0.5, seed=5)
    assert len(seeds) == len(set(seeds)) == 4 * max(1, num_updates)
    assert seeds[0] == 5


@pytest.mark.parametrize(("limit", "num_threads"), [(0, 1), (10**9, 2)])
def test_probe__large_model__goes_through_one_after_the_other(embedded_env, monkeypatch, limit, num_threads):
    monkeypatch.setattr("raise_env.learner.SIDE_BY_SIDE_WEIGHTS", limit)
    learner = embedded_env(auxiliary_updates=0).assets.learner
    threads = set()
    evaluate_one = LoraLearner._evaluate

    def noted(*args):
        threads.add(threading.get_ident())
        return evaluate_one(*args)

    monkeypatch.setattr(LoraLearner, "_evaluate", noted)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        learner.probe([BATCHES[0]] * 6, 0.0, 0, np.arange(8))
    finally:
        torch.set_num_threads(before)
    assert (threads == {threading.get_ident()}) == (num_threads == 1)


def test_update__lora_dropout__is_drawn_from_its_seed_and_off_in_evaluation(embedded_env):
    learner = embedded_env(lora={"lora_dropout": 0.5}, auxiliary_updates=0).assets.learner
    assert not learner.base.stackable
    start = learner.copy()
    start.update(BATCHES[0], 0.0, 5)  # B is zero before: dropout would not show
    losses = [start.copy().update(BATCHES[1], 0.0, seed) for seed in (7, 7, 8)]
    assert losses[0] == losses[1] != losses[2]
    assert start.evaluate("dev").row_losses.tolist() == start.copy().evaluate("dev").row_losses.tolist()
    before = torch.get_rng_state()
    start.update(BATCHES[1], 0.0, 9)
    assert torch.equal(torch.get_rng_state(), before)


def test_step__bfloat16__is_near_float32_with_adapters_in_float32(embedded_env):
    rewards = {}
    for dtype in ("float32", "bfloat16"):
        env = embedded_env(dtype=dtype, auxiliary_updates=0)
        env.reset(seed=0)
        assert env._learner.state.adapter.dtype == torch.float32
        assert env._learner.base.is_float32 == (dtype == "float32")
        env.probe(np.stack([take(env, 0, 1, 2), take(env, 3, 4, 5)]))
        rewards[dtype] = env.step(take(env, 0, 1, 2))[1]
    assert rewards["bfloat16"] == pytest.approx(rewards["float32"], abs=0.05)
    assert rewards["bfloat16"] != rewards["float32"]


@pytest.fixture
def other_tokenizer(tmp_path):
    """Return a function that writes the embedded model with a changed tokenizer."""

    def write(**settings):
        folder = tmp_path / "model"
        shutil.copytree(model_folder("tiny"), folder)
        path = folder / "tokenizer_config.json"
        config = {**json.loads(path.read_text()), **settings}
        path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
        return str(folder)

    return write


def test_episode__tokenizer_without_padding_token__is_the_same(embedded_env, other_tokenizer):
    rewards = []
    for model in ("tiny", other_tokenizer(pad_token=None)):
        env = embedded_env(model=model, auxiliary_updates=0)
        env.reset(seed=0)
        rewards.append(env.step(take(env, 0, 3, 5))[1])
    assert env.assets.learner.base.tokenizer.pad_token is None
    assert rewards[0] == rewards[1]


# The base model


def test_initial_parameters__same_seed__are_the_same_and_global_generators_stand(base):
    before = torch.get_rng_state(), random.getstate()
    first, again, other = (base.initial_parameters(seed) for seed in (3, 3, 4))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (base.num_parameters,)
    assert first.dtype == torch.float32


def test_initial_parameters__as_peft_draws_them__begin_at_the_bare_model(base):
    plain = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder("tiny")),
        LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"),
    )
    sizes = {name: value for name, value in plain.named_parameters() if value.requires_grad}
    mine = dict(zip(sizes, base.initial_parameters(0).split([v.numel() for v in sizes.values()]), strict=True))
    assert list(sizes) == base._names
    for name, value in sizes.items():
        if "lora_B" in name:
            assert not mine[name].any()
        else:
            assert mine[name].std().item() == pytest.approx(value.std().item(), rel=0.1)


def test_base_model__loading__says_nothing(capfd, recwarn):
    BaseModel("tiny", LoraSettings(r=2))
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_base_model__other_weights_or_words__have_another_hash(base, other_tokenizer, gpt2_folder):
    folder = other_tokenizer(pad_token=None)  # padding is never read
    same = shutil.copytree(model_folder("tiny"), f"{folder}-again")
    first, again = (BaseModel(str(source), LoraSettings(r=1)).content_hash for source in (folder, same))
    assert first == again
    assert len({first, base.content_hash, BaseModel(gpt2_folder, LoraSettings(r=1)).content_hash}) == 3


def test_learner__is_a_value_over_a_shared_base__copies_cost_nothing(learner):
    other = learner.copy()
    assert isinstance(other, LoraLearner)
    assert other.base is learner.base
    assert other.state is learner.state


def test_dev_direction__updates__is_where_a_fresh_optimiser_on_dev_rows_goes(learner):
    learner.update(BATCHES[0], 0.1, 0)
    state = learner.state
    direction = learner.dev_direction(3, 4, progress=0.5, seed=7)
    assert learner.state is state
    # The same by an ordinary learner whose pool is the dev set.
    dev = learner.splits["dev"].rows
    other = LoraLearner(learner.base, dev, {}, learner.settings, TrainingState.start(state.adapter))
    rng = np.random.default_rng(7)
    for _ in range(3):
        other.update(rng.choice(len(dev), 4, replace=False), 0.5, 0)
    np.testing.assert_array_equal(direction, (other.state.adapter - state.adapter).numpy())
    assert np.linalg.norm(direction) > 0


def test_dev_direction__no_updates__is_minus_the_gradient_of_one_batch(learner):
    spent = learner.ledger.train_tokens
    direction = learner.dev_direction(0, 100, progress=0.5, seed=0)
    counts = learner.splits["dev"].rows.label_counts
    assert learner.ledger.train_tokens - spent == learner.splits["dev"].rows.lengths.sum()
    gradients = learner.row_gradients(np.arange(len(counts)), "dev")
    np.testing.assert_allclose(direction, -(counts @ gradients) / counts.sum(), atol=1e-5)


def test_update__gradients_turned_off_by_the_caller__trains_all_the_same(learner):
    with torch.no_grad():
        learner.update(BATCHES[0], 0.0, 0)
        gradients = learner.row_gradients(BATCHES[0])
    assert (learner.state.adapter != learner.initial.adapter).any()
    assert np.abs(gradients).max() > 0


# Choices


def test_evaluate__reward_that_needs_no_choices__leaves_those_of_dev_rows_out(base):
    rows = [Instruction(f"{n} plus 1?", str(n + 1), choices=(str(n + 1), str(n))) for n in range(4)]
    encoder = Encoder(base.tokenizer, 64)
    data = EvaluationSet.build(rows, encoder, "dev")
    settings = UpdateSettings(learning_rate=1e-3, weight_decay=0.0, max_grad_norm=1.0, micro_batch_tokens=1000)
    start = TrainingState.start(base.initial_parameters(0))
    learner = LoraLearner(base, data.rows, {"dev": data, "test": data}, settings, start)
    whole = learner.evaluate("dev")
    booked = learner.ledger.forward_tokens
    learner.scores_choices = False
    learner.reset()
    learner.state = TrainingState.start(base.initial_parameters(0))  # an equal one that was not scored yet
    bare = learner.copy().evaluate("dev")
    assert whole.accuracy is not None
    assert bare.accuracy is None
    assert bare.loss == whole.loss
    assert learner.ledger.forward_tokens - booked < 0.5 * booked
    assert learner.evaluate("test").accuracy == whole.accuracy
    assert learner.copy().probe([np.array([], dtype=np.int64)], 0.0, 0, np.arange(4))[0].accuracy is None


def test_base_model__pattern_of_modules_that_is_none__model_error():
    with pytest.raises(ModelError, match="LoRA cannot be put on 'tiny'"):
        BaseModel("tiny", LoraSettings(target_modules="*q_proj"))
