"""The reference is the sum written out, with torch's own gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from raise_env import lora_layers
from raise_env.lora_layers import lora_linear

RANK, SCALING = 3, 0.7


def layer_of(kind, num_in, num_out, generator):
    layer = Conv1D(num_out, num_in) if kind == "Conv1D" else nn.Linear(num_in, num_out, bias=kind != "no bias")
    for value in layer.parameters():
        value.requires_grad_(False).copy_(torch.randn(value.shape, generator=generator))
    return layer


def written_out(layer, x, a, b):
    weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    parts = zip(x.chunk(len(a)), a, b, strict=True)
    results = torch.cat([part @ weight.T + SCALING * (part @ one.T) @ other.T for part, one, other in parts])
    return results if layer.bias is None else results + layer.bias


@pytest.mark.parametrize("kind", ["Linear", "no bias", "Conv1D"])
@pytest.mark.parametrize("num_adapters", [1, 3])
@pytest.mark.parametrize(("length", "is_merged"), [(40, True), (2, False)])
@pytest.mark.parametrize("num_out", [8, 11])
def test_lora_linear__both_ways__equal_the_sum_written_out(monkeypatch, kind, num_adapters, length, is_merged, num_out):
    generator = torch.Generator().manual_seed(0)
    layer = layer_of(kind, 8, num_out, generator)
    shapes = [(num_adapters, length, 8), (num_adapters, RANK, 8), (num_adapters, num_out, RANK)]
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    merged = []
    apply = lora_layers._MergedLinear.apply
    monkeypatch.setattr(lora_layers._MergedLinear, "apply", lambda *args: merged.append(1) or apply(*args))
    found, expected = lora_linear(layer, *inputs, SCALING), written_out(layer, *inputs)
    assert bool(merged) == is_merged
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    wanted = torch.randn(found.shape, generator=generator)
    pairs = [torch.autograd.grad((result * wanted).sum(), inputs) for result in (found, expected)]
    torch.testing.assert_close(*pairs, rtol=1e-5, atol=1e-4)


def test_lora_linear__first_layer__makes_no_gradient_of_its_input():
    generator = torch.Generator().manual_seed(0)
    layer = layer_of("Linear", 8, 8, generator)
    x = torch.randn(1, 40, 8, generator=generator)
    a, b = (torch.randn(shape, generator=generator).requires_grad_() for shape in ((1, RANK, 8), (1, 8, RANK)))
    lora_linear(layer, x, a, b, SCALING).sum().backward()
    assert x.grad is None
    assert a.grad.abs().sum() > 0


def test_lora_linear__bfloat16__stays_apart_and_returns_it(monkeypatch):
    monkeypatch.setattr(lora_layers._MergedLinear, "apply", None)
    generator = torch.Generator().manual_seed(0)
    layer = layer_of("Linear", 8, 8, generator).to(torch.bfloat16)
    x = torch.randn(1, 40, 8, generator=generator).to(torch.bfloat16)
    a, b = torch.randn(1, RANK, 8, generator=generator), torch.randn(1, 8, RANK, generator=generator)
    result = lora_linear(layer, x, a, b, SCALING)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), written_out(layer.float(), x.float(), a, b), rtol=0.05, atol=0.1)
