"""The reference is torch's own kernel."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MistralConfig

from raise_env import causal_attention
from raise_env.causal_attention import BLOCK, LONGEST, use_block_attention


class Layer(nn.Module):
    """What an attention function may ask a layer of grouped keys."""

    num_key_value_groups = 2


def random_parts(length, num_heads=4, num_key_heads=2, head_dim=8, rows=2):
    generator = torch.Generator().manual_seed(length)
    heads = (num_heads, num_key_heads, num_key_heads)
    return [torch.randn(rows, count, length, head_dim, generator=generator).requires_grad_() for count in heads]


@pytest.fixture
def fallbacks(monkeypatch):
    """Calls that went to transformers' own function."""
    calls, forward = [], causal_attention.sdpa_attention_forward

    def spied(*args, **kwargs):
        calls.append(kwargs)
        return forward(*args, **kwargs)

    monkeypatch.setattr(causal_attention, "sdpa_attention_forward", spied)
    return calls


@pytest.mark.parametrize("length", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_attention__plain_causal__values_and_gradients_of_torchs_kernel(fallbacks, length, scaling):
    parts = random_parts(length)
    found, _ = causal_attention._attention(Layer(), *parts, None, scaling=scaling)
    expected = nn.functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True, scale=scaling)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(result.square().sum(), parts) for result in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert not fallbacks


@pytest.mark.parametrize(
    "told",
    [
        {"attention_mask": torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()},
        {"dropout": 0.5},
        {"is_causal": False},
        {"sliding_window": 3},
        {"something_new": 1},
    ],
)
def test_attention__anything_else__is_left_to_transformers(fallbacks, told):
    with torch.random.fork_rng():
        causal_attention._attention(Layer(), *random_parts(6), told.pop("attention_mask", None), **told)
    assert len(fallbacks) == 1


@pytest.mark.parametrize("length", [LONGEST + 1])
def test_attention__long_rows__are_left_to_transformers(fallbacks, length):
    causal_attention._attention(Layer(), *random_parts(length), None)
    assert len(fallbacks) == 1


def test_use_block_attention__window_shorter_than_the_row__sees_the_window_alone(fallbacks):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MistralConfig(vocab_size=50, intermediate_size=48, sliding_window=4, **sizes)
        causal = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(2, 22).reshape(2, 10)
    with torch.no_grad():
        expected = causal(ids).logits
        use_block_attention(causal)
        found = causal(ids).logits
        short = causal(ids[:, :3]).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(short, expected[:, :3], rtol=1e-5, atol=1e-5)
    assert len(fallbacks) == 2, "the two layers of the long rows, and those alone"
