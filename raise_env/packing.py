"""A batch as one row without padding, in which tokens that all its rows begin with stand once.

Most of a padded batch's cost is in layers that look at each token by itself. They need no padding, and what every row
begins with (the template's frame, the same words) is the same there in every row: it is computed once, and all rows
attend to it. Only attention has to know where a row begins and ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .encoding import Batch

__all__ = ["Layout", "PackedBatch", "pack"]

#: Of a padded batch's tokens, at least this share must be saved, or packing is not worth its own work.
LEAST_SAVED = 0.08


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where the rows of a packed batch are: first the shared tokens, then each row's own ones, row after row.

    Attributes:
        num_shared: Tokens that all rows begin with.
        own: Places of each row's own tokens, shape (rows, most own tokens); 0 beyond a row's end.
        seen: Places of the shared and the own tokens, shape (rows, num_shared + most own tokens); 0 beyond the end.
        ends: Where each own token of the packed row stands in `own`, laid out flat, shape (own tokens,).
    """

    num_shared: int
    own: Tensor
    seen: Tensor
    ends: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """A batch in one row.

    Attributes:
        input_ids: Shape (1, tokens), int64.
        position_ids: Each token's place in its own row, shape (1, tokens), int64.
        keep: Positions whose hidden state predicts a label, shape (1, tokens), bool; in the order of the batch's.
        layout: Where the rows are.
    """

    input_ids: Tensor
    position_ids: Tensor
    keep: Tensor
    layout: Layout


def pack(batch: Batch) -> PackedBatch | None:
    """Return a batch in one row, or None where that would save too little.

    What follows a row's last label is left out: nothing that is learned sees it.

    Args:
        batch: Rows with at least one label each, on the CPU.
    """
    ids, is_label = batch.input_ids, batch.is_label
    num_rows, length = ids.shape
    if num_rows < 2 or not bool(is_label.any(1).all()):
        return None
    columns = torch.arange(length)
    lengths = length - is_label.flip(1).to(torch.uint8).argmax(1)  # up to the last label
    first_label = int(is_label.to(torch.uint8).argmax(1).min())
    is_same = (ids == ids[:1]).all(0)
    # The last token before a label predicts it, and so must be the row's own.
    num_shared = min(int(is_same.to(torch.uint8).cumprod(0).sum()), first_label - 1)
    num_shared = max(0, num_shared)
    total = num_shared + int((lengths - num_shared).sum())
    if total > (1 - LEAST_SAVED) * num_rows * length:
        return None
    is_own = (columns >= num_shared) & (columns < lengths[:, None])  # (rows, length)
    shared = columns[:num_shared]
    layout = _layout(is_own[:, num_shared : int(lengths.max())], num_shared)
    return PackedBatch(
        torch.cat([ids[0, :num_shared], ids[is_own]])[None],
        torch.cat([shared, columns.expand(num_rows, -1)[is_own]])[None],
        torch.cat([torch.zeros(num_shared, dtype=torch.bool), batch.keep[is_own]])[None],
        layout,
    )


def _layout(is_own: Tensor, num_shared: int) -> Layout:
    """Return the layout for the mask of each row's own tokens, shape (rows, most own tokens)."""
    own = torch.zeros(is_own.shape, dtype=torch.int64)
    own[is_own] = num_shared + torch.arange(int(is_own.sum()))
    shared = torch.arange(num_shared).expand(len(own), -1)
    return Layout(num_shared, own, torch.cat([shared, own], dim=1), is_own.flatten().nonzero()[:, 0])
