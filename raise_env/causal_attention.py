"""Causal attention over short rows on a CPU, block of queries by block of queries.

Torch's own kernel is made for long rows and wide heads. On rows of a few hundred tokens with narrow heads, as small
models have them, it takes half as long again as two batched matrix products and a softmax, over no more keys than a
block of queries can see. Whatever is not plain causal attention goes to transformers' use of torch's kernel.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .packing import Layout

__all__ = ["LONGEST", "rows_at", "rows_now", "use_block_attention"]

#: Queries that are looked at together: the part above the diagonal that is computed in vain is half as wide.
BLOCK = 64

#: Longer rows go to torch's kernel, which keeps no weights for the backward pass.
LONGEST = 512

_NAME = "raise_env_blocks"

#: What an attention function may be told that changes nothing about plain causal attention.
_HARMLESS = frozenset({"position_ids", "use_cache", "cache_position"})


class _Local(threading.local):
    layout: Layout | None = None


_local = _Local()


def use_block_attention(causal: Any) -> None:
    """Let a transformers model attend by blocks where that is possible; the numbers are the same but for rounding."""
    _register()
    causal.set_attn_implementation(_NAME)


@contextlib.contextmanager
def rows_at(layout: Layout | None) -> Iterator[None]:
    """Take what this thread attends over for rows that are packed so, or for plain rows again if it is None."""
    before, _local.layout = _local.layout, layout
    try:
        yield
    finally:
        _local.layout = before


def rows_now() -> Layout | None:
    """Return how the rows are packed that this thread attends over, if they are."""
    return _local.layout


@functools.cache
def _register() -> None:
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _mask)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Return no mask where plain causal attention is meant, or rows are packed; else torch's kernel's."""
    return None if _local.layout is not None else sdpa_mask(*args, **kwargs)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return what each position takes from those up to it, shape (rows, length, heads, head_dim).

    Args:
        module: The layer's attention.
        query: Shape (rows, heads, length, head_dim).
        key: Shape (rows, key heads, length, head_dim).
        value: As `key`.
        attention_mask: None where plain causal attention is meant.
        dropout: Of the weights.
        scaling: What scores are multiplied by; None: one over the root of head_dim.
        is_causal: Whether positions see only those up to them; None: as the module says.
        kwargs: What else transformers tells.
    """
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = kwargs.pop("sliding_window", None)
    in_sight = window is None or window >= query.shape[2] or _local.layout is not None  # whose rows are shorter
    is_plain = attention_mask is None and is_causal and not dropout and in_sight
    told = {name for name, told in kwargs.items() if told is not None and told is not False}
    layout = _local.layout
    length = query.shape[2] if layout is None else layout.seen.shape[1]
    is_short = query.shape[2] == key.shape[2] and length <= LONGEST and query.dtype == torch.float32
    assert layout is None or (is_plain and is_short and told <= _HARMLESS), (told, length)
    if not (is_plain and is_short and told <= _HARMLESS):
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "sliding_window": window, **kwargs}
        output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output, weights
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layout is not None:
        return _attend_packed(query, key, value, scaling, layout), None
    return _attend(query, key, value, scaling).transpose(1, 2).contiguous(), None


def _attend_packed(query: Tensor, key: Tensor, value: Tensor, scaling: float, layout: Layout) -> Tensor:
    """Return causal attention within each packed row, shape (1, tokens, heads, head_dim)."""
    heads, head_dim, num_shared = query.shape[1], query.shape[3], layout.num_shared

    def rows_of(part: Tensor, places: Tensor) -> Tensor:  # (rows, heads, length, head_dim)
        return part[0].index_select(1, places.reshape(-1)).view(heads, len(places), -1, head_dim).transpose(0, 1)

    own = _attend(rows_of(query, layout.own), rows_of(key, layout.seen), rows_of(value, layout.seen), scaling)
    own = own.transpose(1, 2).reshape(-1, heads, head_dim).index_select(0, layout.ends)
    if not num_shared:
        return own[None]
    shared = _attend(query[:, :, :num_shared], key[:, :, :num_shared], value[:, :, :num_shared], scaling)
    return torch.cat([shared[0].transpose(0, 1), own])[None]


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Return causal attention, shape (rows, heads, queries, head_dim); the last query sees all keys."""
    length, head_dim = query.shape[2:]
    num_before = key.shape[2] - length
    queries, keys, values = (part.reshape(-1, part.shape[2], head_dim) for part in (query, key, value))
    blocks = []
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        last = num_before + end
        hidden = _hidden()[num_before + start : last, :last].expand(len(queries), -1, -1)
        scores = torch.baddbmm(hidden, queries[:, start:end], keys[:, :last].mT, alpha=scaling)
        blocks.append(torch.bmm(scores.softmax(-1), values[:, :last]))
    return torch.cat(blocks, dim=1).view(query.shape)


@functools.cache
def _hidden() -> Tensor:
    """Return minus infinity where a position is later than the one that looks, else 0, shape (LONGEST, LONGEST)."""
    return torch.full((LONGEST, LONGEST), -torch.inf).triu(1)
