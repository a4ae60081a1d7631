"""The law of drawing a batch class by class: RAISE's rule, with draws where the rule takes the best.

The rule (Lv et al. 2025, algorithm 1) takes the b best rows of each of C classes, B = C b. PPO needs a policy whose
choices have a probability, which a ranking has not. Here b rows of each class are drawn by `SubsetLaw`, with the
scores as log weights. Where that gives fewer than B rows, because C does not divide B or a class has too few, a last
draw from all rows left over fills the batch; `raise_env.TopKScores` fills it with the best of them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .subset import SubsetLaw

__all__ = ["BatchLaw"]

#: How a row came into a batch: not at all, drawn from its class, or drawn at last to fill the batch.
_NOT_DRAWN, _OF_CLASS, _TO_FILL = 0, 1, 2

#: Stands for minus infinity where a softmax leaves a row out: a class without rows must not become NaN.
_LEFT_OUT = -1e20


class BatchLaw:
    """The law of batches over the rows on offer, for any leading dimensions of the scores.

    A draw is an array of the rows' kinds: 0 not drawn, 1 drawn from its class, 2 drawn to fill the batch. It tells
    more than the batch, so that its probability is one product and no sum over the ways to the same batch.

    Args:
        scores: Log weights, shape (..., N), finite where the mask allows.
        classes: Class of each row, 0 to num_classes - 1, shape (N,).
        mask: True where a row may be drawn, the rest being padding, shape (N,).
        batch_size: B, the rows to draw; all of them where there are fewer.
        num_classes: C.
    """

    def __init__(
        self, scores: Tensor, classes: np.ndarray, mask: np.ndarray, batch_size: int, num_classes: int
    ) -> None:
        self._scores = scores
        self._mask = torch.from_numpy(mask)
        per_class = batch_size // num_classes
        members = [np.flatnonzero(mask & (classes == label)) for label in range(num_classes)]
        self._num_to_fill = batch_size - sum(min(per_class, len(places)) for places in members)
        # Classes side by side, the shorter ones filled up with a place behind the last row.
        longest = max(1, *map(len, members))
        padded = [np.pad(places, (0, longest - len(places)), constant_values=len(mask)) for places in members]
        self._places = torch.from_numpy(np.stack(padded))  # (C, longest)
        self._is_member = self._places < len(mask)
        self._of_class = SubsetLaw(self._by_class(scores), per_class, self._is_member)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw one batch for each of the leading dimensions: kinds, shape (..., N), int8.

        Args:
            generator: The source of randomness; None is torch's global one.
        """
        drawn = self._of_class.sample(generator)  # (..., C, longest)
        places = self._places.flatten().expand(*drawn.shape[:-2], -1)
        kinds = drawn.new_zeros(*self._scores.shape[:-1], len(self._mask) + 1)
        kinds = kinds.scatter(-1, places, drawn.flatten(-2))[..., :-1].to(torch.int8)
        if self._num_to_fill:
            kinds = kinds + _TO_FILL * self._to_fill(kinds).sample(generator).to(torch.int8)
        return kinds

    def log_prob(self, kinds: Tensor) -> Tensor:
        """Return the exact log-probability of each draw in nats, shape (...,)."""
        total = self._of_class.log_prob(self._by_class(kinds == _OF_CLASS)).sum(-1)
        if self._num_to_fill:
            total = total + self._to_fill(kinds).log_prob(kinds == _TO_FILL)
        return total

    def log_softmax_product(self, kinds: Tensor) -> Tensor:
        """Return the log of the paper's product for each draw, shape (...,).

        Eq. 11: over classes and drawn rows, the softmax of a row's score within its class. It is not the
        probability of a draw without replacement. For rows drawn to fill the batch, which the paper does not have,
        the softmax is over all rows that were left over.
        """
        by_class = self._by_class(self._scores).masked_fill(~self._is_member, _LEFT_OUT).log_softmax(-1)
        total: Tensor = torch.where(self._by_class(kinds == _OF_CLASS), by_class, 0.0).sum((-2, -1))
        if self._num_to_fill:
            left_over = self._scores.masked_fill(~self._is_left_over(kinds), _LEFT_OUT).log_softmax(-1)
            total = total + torch.where(kinds == _TO_FILL, left_over, 0.0).sum(-1)
        return total

    def _by_class(self, values: Tensor) -> Tensor:
        """Return values of rows, shape (..., N), class by class, shape (..., C, longest); zeros fill up."""
        taken = functional.pad(values, (0, 1)).index_select(-1, self._places.flatten())
        return taken.view(*values.shape[:-1], *self._places.shape)

    def _to_fill(self, kinds: Tensor) -> SubsetLaw:
        return SubsetLaw(self._scores, self._num_to_fill, self._is_left_over(kinds))

    def _is_left_over(self, kinds: Tensor) -> Tensor:
        return self._mask & (kinds != _OF_CLASS)
