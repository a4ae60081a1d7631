from __future__ import annotations

import numpy as np
import pytest
import torch

from raise_env.config import OBSERVATION_BLOCKS
from raise_env.features import (
    BLOCKS,
    CLIP,
    FEATURE_NAMES,
    frame,
    observation_bounds,
    observe,
    standardise,
)

RAW = np.random.default_rng(0).normal(size=(7, 36)).astype(np.float32)


def test_standardise__numbers_by_hand__are_centred_scaled_and_clipped():
    raw = np.zeros((60, 36), dtype=np.float32)
    raw[:, 0] = np.tile([1.0, 3.0], 30)  # mean 2, standard deviation 1
    raw[0, 1] = 60.0  # mean 1, standard deviation sqrt(59): the first row lies 7.7 of them out
    raw[:, 2] = 5.0
    raw[59] = np.nan
    raw[59, 0] = np.nan
    static = standardise(raw, num_tokens=9)
    np.testing.assert_allclose(static.mean[0], 2 - 1 / 59, rtol=1e-6)
    np.testing.assert_allclose(static.columns[:2, 0], [(1 - static.mean[0]), (3 - static.mean[0])] / static.std[0])
    assert abs(static.columns[:59, 0].mean()) < 1e-6
    assert static.columns[:59, 0].std() == pytest.approx(1.0, abs=1e-6)
    assert static.columns[0, 1] == CLIP
    assert (static.columns[:, 2] == 0).all(), "a column that says nothing"
    assert (static.columns[59] == 0).all(), "a row that cannot be trained on"
    assert static.columns.dtype == np.float32
    assert static.num_tokens == 9
    np.testing.assert_array_equal(static.log_p_response_given_prompt, raw[:, 2])
    np.testing.assert_array_equal(static.log_p_response, raw[:, 3])


def test_standardise__several_blocks__are_put_together(monkeypatch):
    raw = np.random.default_rng(1).normal(3.0, 2.0, (100, 36)).astype(np.float32)
    raw[[0, 40, 41, 99]] = np.nan
    raw[40:50] = np.nan  # a block without any row
    whole = standardise(raw, 0)
    monkeypatch.setattr("raise_env.features._ROWS_AT_ONCE", 10)
    parts = standardise(raw, 0)
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-6)
    np.testing.assert_allclose(parts.std, whole.std, rtol=1e-6)
    np.testing.assert_allclose(whole.mean, np.nanmean(raw.astype(np.float64), axis=0), rtol=1e-5)


def test_rows__of_any_shape__are_those_of_all_columns():
    raw = RAW.copy()
    raw[2] = np.nan
    static = standardise(raw, 0)
    ids = np.array([[1, 2], [6, 1]])
    assert static.rows(ids).shape == (2, 2, 36)
    np.testing.assert_array_equal(static.rows(ids), static.columns[ids])
    assert not static.rows(np.array([2])).any()
    assert static.rows(ids).dtype == np.float32


def test_observe__its_frame__stays_as_it_is():
    ids = np.array([1, -1])
    still = frame(standardise(RAW, 0), ids)
    before = still.copy()
    seen = observe(still, ids, np.ones(7, int), dev_score=-1.0, first_dev_score=-2.0, progress=0.5)
    assert not np.shares_memory(seen, still)
    np.testing.assert_array_equal(still, before)


def test_observe__numbers_by_hand__fill_the_live_columns():
    static = standardise(RAW, 0)
    counts = np.array([0, 1, 0, 0, 0, 0, 1000])
    ids = np.array([1, 6, -1])
    shown = observe(frame(static, ids), ids, counts, dev_score=-1.5, first_dev_score=-2.0, progress=0.25)
    assert shown.dtype == np.float32
    np.testing.assert_allclose(shown[:2, 0], 0.25)  # half a nat of two
    np.testing.assert_allclose(shown[:2, 1], 0.25)
    np.testing.assert_array_equal(shown[:2, 2:38], static.columns[[1, 6]])
    np.testing.assert_allclose(shown[:2, 38], [np.log(2.0), CLIP])
    assert (shown[2] == 0).all()
    low, high = observation_bounds(3)
    assert ((shown >= low) & (shown <= high)).all()


@pytest.mark.parametrize(
    ("hide", "columns"),
    [(("stage",), [0, 1]), (("difficulty",), range(2, 6)), (("semantic", "availability"), range(6, 39))],
)
def test_observe__hidden_blocks__are_zeros_and_the_rest_as_before(hide, columns):
    static, counts = standardise(RAW, 0), np.arange(1, 8)
    scores = {"dev_score": -1.5, "first_dev_score": -2.0, "progress": 0.25}
    ids = np.array([1, 6, -1])
    shown = observe(frame(static, ids), ids, counts, **scores)
    hidden = observe(frame(static, ids, hide), ids, counts, **scores, hide=hide)
    assert shown[:2].all()
    assert not hidden[:, columns].any()
    rest = np.setdiff1d(np.arange(39), columns)
    np.testing.assert_array_equal(hidden[:, rest], shown[:, rest])


def test_blocks__together__are_all_columns_in_order():
    assert tuple(BLOCKS) == OBSERVATION_BLOCKS
    names = [name for part in BLOCKS.values() for name in FEATURE_NAMES[part]]
    assert names == list(FEATURE_NAMES)


@pytest.mark.parametrize(("score", "first", "shown"), [(0.5, 0.0, 5.0), (0.02, 0.0, 0.2), (-900.0, -2.0, -CLIP)])
def test_observe__first_score_near_nothing__is_not_divided_by(score, first, shown):
    still, ids = frame(standardise(RAW, 0), np.array([0])), np.array([0])
    observation = observe(still, ids, np.zeros(7, int), dev_score=score, first_dev_score=first, progress=0.0)
    assert observation[0, 0] == pytest.approx(shown)


# What the auxiliary model says of a row


@torch.no_grad()
def by_transformers(model, tokenizer, row):
    """The raw columns of a row, by plain transformers: one row at a time, full logits, no padding."""
    messages = [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.response}]
    ids = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")["input_ids"]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    alone = tokenizer(row.response + tokenizer.eos_token, return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    together = model(ids, labels=labels, output_hidden_states=True)
    embedding = together.hidden_states[-1][0].mean(0).reshape(32, -1).mean(1)
    counts = len(prompt), ids.shape[1] - len(prompt)
    values = [*np.log1p(counts), -together.loss.item(), -model(alone, labels=alone).loss.item()]
    return np.concatenate([values, embedding.numpy()])


def test_features__bare_auxiliary_model__are_what_plain_transformers_gives(embedded_env):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from raise_env.base_model import model_folder

    env = embedded_env(auxiliary_updates=0)
    model = AutoModelForCausalLM.from_pretrained(model_folder("tiny"))
    tokenizer = AutoTokenizer.from_pretrained(model_folder("tiny"))
    for index in (0, 17, 63):
        wanted = by_transformers(model, tokenizer, env.assets.pool[index])
        np.testing.assert_allclose(env.assets.features.raw[index], wanted, atol=2e-5)


def test_features__after_updates__tell_more_than_before(embedded_env):
    before, after = (embedded_env(auxiliary_updates=count).assets.features for count in (0, 8))
    assert after.log_p_response_given_prompt.mean() > before.log_p_response_given_prompt.mean()
    np.testing.assert_array_equal(before.raw[:, :2], after.raw[:, :2])
    assert after.num_tokens > before.num_tokens > 0


def test_features__several_threads_of_torch__same_bits_as_with_one(embedded_env, tmp_path):
    before, found = torch.get_num_threads(), []
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            folder = str(tmp_path / str(num_threads))  # nothing in the cache, and nothing kept in memory
            found.append(embedded_env(cache_dir=folder, auxiliary_updates=2).assets.features.raw)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(found[1], found[0])


@pytest.mark.real
def test_features__auxiliary_model_with_another_tokenizer__describes_the_same_pool(embedded_env, shared):
    folder = str(shared / "models" / "stories260K-hf")
    other, own = embedded_env(auxiliary_model=folder).assets, embedded_env(auxiliary_updates=0).assets
    assert other.features.raw.shape == own.features.raw.shape
    assert np.isfinite(other.features.raw).all()
    assert (other.features.raw[:, 1] < own.features.raw[:, 1]).any(), "fewer tokens than bytes"
    assert other.learner.base is own.learner.base
