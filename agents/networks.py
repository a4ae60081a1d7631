"""The acquisition function F, which scores rows, and the critic V: both work on any number of rows, in any order.

The paper calls F an MLP over each row and says neither how large it is nor what the critic looks like; the sizes, the
initialisation and the pooling here are this project's choice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["ROWS_AT_ONCE", "AcquisitionFunction", "Critic", "mlp"]

#: Rows that go through hidden layers at once: bounds the memory where a whole large pool is on offer.
ROWS_AT_ONCE = 2**16

#: Keeps the variance of activations through a tanh layer about even (as in OpenAI Baselines and its descendants).
_HIDDEN_GAIN = math.sqrt(2)


def mlp(
    dims: Sequence[int],
    activation: type[nn.Module] = nn.Tanh,
    output_gain: float = 1.0,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """Return a multilayer perceptron with orthogonal weights and zero biases.

    Args:
        dims: Widths from input to output, at least two.
        activation: What stands between two linear layers; none follows the last.
        output_gain: Scale of the last layer's weights.
        generator: The source of the weights; None is torch's global one, which is left untouched otherwise.
    """
    layers: list[nn.Module] = []
    for index, (num_inputs, num_outputs) in enumerate(itertools.pairwise(dims)):
        is_last = index == len(dims) - 2
        # skip_init: the layer's own initialisation would draw from the global generator.
        linear = nn.utils.skip_init(nn.Linear, num_inputs, num_outputs)
        nn.init.orthogonal_(linear.weight, output_gain if is_last else _HIDDEN_GAIN, generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear] if is_last else [linear, activation()]
    return nn.Sequential(*layers)


class AcquisitionFunction(nn.Module):
    """F: the score of every row, by one and the same MLP; higher is better.

    At first all scores are close to 0, so that a policy built on them starts out almost uniform.

    Args:
        num_features: Columns of a row.
        hidden_dims: Widths of the hidden layers; none makes F linear.
        activation: What stands between two linear layers.
        generator: The source of the first weights; None is torch's global one, which is left untouched otherwise.
    """

    def __init__(
        self,
        num_features: int,
        hidden_dims: Sequence[int] = (64, 64),
        activation: type[nn.Module] = nn.Tanh,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.layers = mlp((num_features, *hidden_dims, 1), activation, output_gain=0.01, generator=generator)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the scores, shape (..., N), of rows, shape (..., N, num_features)."""
        parts = _in_parts(self.layers, rows)
        scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)
        return scores.squeeze(-1)


class Critic(nn.Module):
    """V: what return to expect from the offered rows together.

    One MLP embeds each row, the mean over the rows forgets their order and number, and a linear head reads it off.

    Args:
        num_features: Columns of a row.
        hidden_dims: Widths of the row's hidden layers; the last is the width of the mean. None makes V linear.
        activation: What follows each hidden layer.
        generator: The source of the first weights; None is torch's global one, which is left untouched otherwise.
    """

    def __init__(
        self,
        num_features: int,
        hidden_dims: Sequence[int] = (64, 64),
        activation: type[nn.Module] = nn.Tanh,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        dims = (num_features, *hidden_dims)
        self.embed: nn.Module = nn.Identity()
        if hidden_dims:
            layers = mlp(dims, activation, output_gain=_HIDDEN_GAIN, generator=generator)
            self.embed = nn.Sequential(layers, activation())
        self.head = mlp((dims[-1], 1), generator=generator)

    def forward(self, rows: Tensor, row_mask: Tensor | None = None) -> Tensor:
        """Return the values, shape (...,).

        Args:
            rows: Shape (..., N, num_features).
            row_mask: True where a row counts, shape (..., N), the rest being padding; None counts all.
        """
        if row_mask is None and rows.shape[-2] <= ROWS_AT_ONCE:
            mean = self.embed(rows).mean(-2)
        else:
            counted = rows.new_ones(rows.shape[-2]) if row_mask is None else row_mask
            weight = counted.unsqueeze(-1).to(rows.dtype)
            first, *others = _in_parts(self._weighted_sum, rows, weight)
            mean = sum(others, start=first) / weight.sum(-2).clamp(min=1)
        value: Tensor = self.head(mean)
        return value.squeeze(-1)

    def _weighted_sum(self, rows: Tensor, weight: Tensor) -> Tensor:
        embedded: Tensor = self.embed(rows)
        return (embedded * weight).sum(-2)


def _in_parts(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    """Return what a function gives for rows, in parts of `ROWS_AT_ONCE` where there are more, of shape (..., N, any).

    What such a part computes on the way is not kept for its gradient, but computed again.
    """
    if tensors[0].dim() < 2 or tensors[0].shape[-2] <= ROWS_AT_ONCE:
        return [function(*tensors)]
    parts = zip(*(tensor.split(ROWS_AT_ONCE, dim=-2) for tensor in tensors), strict=True)
    return [checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
