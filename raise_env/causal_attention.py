"""Causal attention over short rows on a CPU, block of queries by block of queries.

Torch's own kernel is made for long rows and wide heads. On rows of a few hundred tokens with narrow heads, as small
models have them, it takes half as long again as two batched matrix products and a softmax, over no more keys than a
block of queries can see. Whatever is not plain causal attention goes to transformers' use of torch's kernel.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["LONGEST", "use_block_attention"]

#: Queries that are looked at together: the part above the diagonal that is computed in vain is half as wide.
BLOCK = 64

#: Longer rows go to torch's kernel, which keeps no weights for the backward pass.
LONGEST = 512

_NAME = "raise_env_blocks"

#: What an attention function may be told that changes nothing about plain causal attention.
_HARMLESS = frozenset(
    {"position_ids", "use_cache", "cache_position", "output_attentions", "layer_idx", "num_items_in_batch"}
)


def use_block_attention(causal: Any) -> None:
    """Let a transformers model attend by blocks where that is possible; the numbers are the same but for rounding."""
    _register()
    causal.set_attn_implementation(_NAME)


@functools.cache
def _register() -> None:
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)  # no mask where plain causal attention is meant


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
    is_plain = attention_mask is None and is_causal and not dropout and (window is None or window >= query.shape[2])
    told = {name for name, told in kwargs.items() if told is not None and told is not False}
    is_short = query.shape[2] == key.shape[2] <= LONGEST and query.dtype == torch.float32
    if not (is_plain and is_short and told <= _HARMLESS):
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "sliding_window": window, **kwargs}
        output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output, weights
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _attend(query, key, value, scaling).transpose(1, 2).contiguous(), None


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Return causal attention, shape (rows, heads, length, head_dim), from three such."""
    length, head_dim = query.shape[2:]
    queries, keys, values = (part.reshape(-1, length, head_dim) for part in (query, key, value))
    blocks = []
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        hidden = _hidden()[start:end, :end].expand(len(queries), -1, -1)
        scores = torch.baddbmm(hidden, queries[:, start:end], keys[:, :end].mT, alpha=scaling)
        blocks.append(torch.bmm(scores.softmax(-1), values[:, :end]))
    return torch.cat(blocks, dim=1).view(query.shape)


@functools.cache
def _hidden() -> Tensor:
    """Return minus infinity where a position is later than the one that looks, else 0, shape (LONGEST, LONGEST)."""
    return torch.full((LONGEST, LONGEST), -torch.inf).triu(1)
