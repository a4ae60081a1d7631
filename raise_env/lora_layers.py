"""The arithmetic of a plain LoRA layer, for several adapters at once: x W + s (x A) B.

Two ways, with the same numbers but for rounding. *Apart*, the two narrow products are made beside the wide one: nothing
as large as W is made anew. *Merged*, W + s A B is made first for each adapter, the forward pass is one product, and the
gradients of A and B take four narrow products instead of six. Narrow products use a processor badly, so that this is
faster wherever a batch has more numbers in it than W has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

__all__ = ["lora_linear"]


def lora_linear(layer: Any, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return what a layer gives with its adapters, shape (rows, ..., out).

    Args:
        layer: The frozen layer: `nn.Linear`, or transformers' `Conv1D`, which keeps its weight the other way round.
        x: Its input, shape (rows, ..., in); the first rows/k belong to the first adapter, and so on.
        a: The k adapters' first matrices, shape (k, rank, in).
        b: Their second ones, shape (k, out, rank).
        scaling: s.
    """
    num_out, num_in = b.shape[1], a.shape[2]
    num_positions = x.numel() // (len(a) * num_in)
    is_float32 = x.dtype == layer.weight.dtype == torch.float32
    if is_float32 and num_positions * (num_in + num_out) >= num_in * num_out:
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        rows = x.reshape(len(a), -1, num_in)
        merged: Tensor = _MergedLinear.apply(rows, weight, layer.bias, a, b, scaling)  # type: ignore[no-untyped-call]
        return merged.view(*x.shape[:-1], num_out)
    result: Tensor = layer(x)
    rows = x.reshape(len(a), -1, num_in).to(a.dtype)
    start = result.reshape(len(a), -1, num_out).to(a.dtype)
    return torch.baddbmm(start, torch.bmm(rows, a.mT), b.mT, alpha=scaling).view(result.shape).to(result.dtype)


class _MergedLinear(torch.autograd.Function):
    """The merged way. By hand, for autograd would make the whole gradient of the merged weight, and keep it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        """Return the result, shape (k, positions, out), for x of shape (k, positions, in) and weight (out, in)."""
        merged = torch.baddbmm(weight.expand(len(a), -1, -1), b, a, alpha=scaling)  # (k, out, in)
        ctx.save_for_backward(x, merged, a, b)
        ctx.scaling = scaling
        result = torch.bmm(x, merged.mT)
        return result if bias is None else result.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, a and b."""
        x, merged, a, b = ctx.saved_tensors
        of_x = torch.bmm(gradient, merged) if ctx.needs_input_grad[0] else None
        narrow = torch.bmm(gradient, b).mul_(ctx.scaling)  # (k, positions, rank)
        of_a = torch.bmm(narrow.mT, x)
        of_b = torch.bmm(gradient.mT, torch.bmm(x, a.mT).mul_(ctx.scaling))
        return of_x, None, None, of_a, of_b, None
