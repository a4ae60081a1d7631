"""The reference is the padded batch: the same rows by the same model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raise_env.base_model import BaseModel
from raise_env.config import LoraSettings
from raise_env.encoding import Batch
from raise_env.packing import pack


def batch_of(rows, num_labels):
    """Rows of token ids, the last few of each labels, padded on the right."""
    length = max(map(len, rows))
    ids, is_label = np.zeros((len(rows), length), dtype=np.int64), np.zeros((len(rows), length), dtype=bool)
    for place, (row, count) in enumerate(zip(rows, num_labels, strict=True)):
        ids[place, : len(row)] = row
        is_label[place, len(row) - count : len(row)] = True
    return Batch(torch.from_numpy(ids), torch.from_numpy(is_label))


def random_rows(num_shared, lengths, seed=0):
    rng = np.random.default_rng(seed)
    shared = rng.integers(3, 259, size=num_shared).tolist()
    return [[*shared, *rng.integers(3, 259, size=length).tolist()] for length in lengths]


def test_pack__rows_that_begin_alike__hold_the_beginning_once():
    batch = batch_of([[7, 8, 9, 3], [7, 8, 4, 5, 6, 3], [7, 8, 2]], [1, 2, 1])
    packed = pack(batch)
    # The last row's label stands third, and is predicted by the second token, which must be the row's own.
    assert packed.layout.num_shared == 1
    assert packed.input_ids.tolist() == [[7, 8, 9, 3, 8, 4, 5, 6, 3, 8, 2]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 1, 2, 3, 4, 5, 1, 2]]
    assert packed.keep.tolist() == [[bool(x) for x in (0, 0, 1, 0, 0, 0, 1, 1, 0, 1, 0)]]
    assert packed.layout.own.tolist() == [[1, 2, 3, 0, 0], [4, 5, 6, 7, 8], [9, 10, 0, 0, 0]]
    assert packed.layout.seen.tolist() == [[0, 1, 2, 3, 0, 0], [0, 4, 5, 6, 7, 8], [0, 9, 10, 0, 0, 0]]
    assert packed.layout.ends.tolist() == [0, 1, 2, 5, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize(
    ("rows", "num_labels"),
    [
        ([[7, 8, 9, 3]], [1]),
        ([[7, 8, 9, 3], [4, 8, 9, 3]], [1, 1]),
        ([[7, 8, 9, 3], [7, 8]], [1, 0]),
    ],
)
def test_pack__a_single_row_or_nothing_to_save_or_no_label__is_left_as_it_is(rows, num_labels):
    assert pack(batch_of(rows, num_labels)) is None


@pytest.fixture(scope="module", params=[False, True])
def model(request):
    return BaseModel("tiny", LoraSettings(r=4), device="cpu", activation_checkpointing=request.param)


def in_the_middle(batch, places):
    """The same batch with more labels, before others: what stands in the middle of a conversation."""
    is_label = batch.is_label.clone()
    for row, start, end in places:
        is_label[row, start:end] = True
    return Batch(batch.input_ids, is_label)


def test_pack__labels_in_the_middle__what_is_shared_ends_before_the_first_of_any_row():
    batch = batch_of([[7, 8, 9, 3, 5], [7, 8, 9, 3, 4, 6]], [1, 1])
    assert pack(batch).layout.num_shared == 3
    packed = pack(in_the_middle(batch, [(0, 2, 3)]))
    assert packed.layout.num_shared == 1
    assert packed.input_ids[0].tolist() == [7, 8, 9, 3, 5, 8, 9, 3, 4, 6]
    assert packed.keep[0].tolist() == [bool(x) for x in (0, 1, 0, 1, 0, 0, 0, 0, 1, 0)]


def test_base_model__packed_with_labels_in_the_middle__losses_of_the_padded_batch(model):
    batch = in_the_middle(
        batch_of(random_rows(9, [40, 12, 5, 5]), [4, 2, 1, 5]), [(0, 12, 20), (0, 25, 27), (1, 11, 15)]
    )
    adapter = torch.randn(1, model.num_parameters, generator=torch.Generator().manual_seed(1)) * 0.1
    results = []
    for packs in (True, False):
        model._packs = packs
        own = adapter.clone().requires_grad_()
        losses, _ = model.token_losses(batch, own)
        (gradient,) = torch.autograd.grad(losses.sum(), own)
        results.append([losses.detach(), gradient / gradient.abs().max()])
    model._packs = True
    assert len(results[0][0]) == int(batch.is_label.sum()) == 12 + 14
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("num_shared", "lengths", "num_labels"),
    [
        (0, [30, 12, 5], [4, 2, 1]),
        (9, [30, 12, 5, 5], [4, 2, 1, 5]),
        (70, [80, 3, 1], [70, 2, 1]),
        (20, [0, 0], [5, 5]),
    ],
)
def test_base_model__packed__losses_and_gradients_of_the_padded_batch(model, num_shared, lengths, num_labels):
    batch = batch_of(random_rows(num_shared, lengths), num_labels)
    assert pack(batch) is not None
    adapter = torch.randn(1, model.num_parameters, generator=torch.Generator().manual_seed(1)) * 0.1
    results = []
    for packs in (True, False):
        model._packs = packs
        own = adapter.clone().requires_grad_()
        losses, logits = model.token_losses(batch, own)
        (gradient,) = torch.autograd.grad(losses.sum(), own)
        with model.merged(adapter[0]), torch.no_grad():
            merged, _ = model.token_losses(batch, None)
        results.append([losses.detach(), logits.detach(), merged, gradient / gradient.abs().max()])
    model._packs = True
    assert results[0][0].shape == (sum(num_labels),)
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    assert results[0][0].std() > 0.1
