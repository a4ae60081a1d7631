"""The law of drawing k of n rows, every set in proportion to the product of its rows' weights.

This is the conditional Bernoulli law, the natural policy over batches of a fixed size: unlike independent draws it
never misses the size, and unlike a ranking (Plackett-Luce) it gives a *set* its exact probability, which a policy
gradient needs. The usual recursion runs over the rows one by one; here the rows are the leaves of a binary tree, so
that log2(n) rounds of tensor operations do instead of n. Each inner node carries one table: the chance that i of the d
rows chosen below it lie in its left half. Drawing, entropy and inclusion probabilities are all read off these tables
in one pass up or down, without subtracting large numbers from each other and without second derivatives.

References:
    Chen & Liu, "Statistical applications of the Poisson-Binomial and conditional Bernoulli distributions",
    Statistica Sinica 7 (1997): the law and the elementary symmetric polynomials that normalise it.
    Ahmed et al., "SIMPLE: a gradient estimator for k-subset sampling", ICLR 2023 (arXiv 2210.01941): log-probability,
    entropy and marginals by dynamic programming.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["SubsetLaw"]

#: Stands for a log weight of minus infinity. Finite, so that no difference or product becomes NaN; so large that its
#: exponential beside any real weight is exactly 0; and a million of them still add up within float32.
_IMPOSSIBLE = -1e20


class SubsetLaw:
    """The law p(S) = prod_{i in S} exp(logits_i) / Z over all sets S of exactly k allowed rows.

    Where fewer than k rows are allowed, all of these are chosen. Results are exact, for any leading batch dimensions;
    time and memory grow as n k for each of the batch. The tables are computed on first need: `mode` needs none.

    Args:
        logits: Log weights, shape (..., n) with n >= 1, finite wherever `mask` allows. A constant added to all rows
            changes nothing. Half precision is computed in float32.
        k: How many rows to choose, at least 0.
        mask: True where a row may be chosen, of a shape that broadcasts to that of `logits`; None allows all. A
            forbidden row has probability 0 exactly, and so has the gradient of its logit.

    Raises:
        ValueError: `k` is negative, there are no rows, or an allowed logit is not finite.
    """

    def __init__(self, logits: Tensor, k: int, mask: Tensor | None = None) -> None:
        if k < 0 or logits.shape[-1] < 1:
            raise ValueError(f"k={k} of n={logits.shape[-1]} rows; expected k >= 0 and at least one row.")
        allowed = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask.bool().expand_as(logits)
        if not (torch.isfinite(logits) | ~allowed).all():
            raise ValueError("a logit is NaN or infinite: training has diverged (to forbid a row, use the mask).")
        self.k = k
        self.mask = allowed
        #: How many rows are chosen, shape (...,): k, or the number of allowed rows where that is smaller.
        self.sizes = allowed.sum(-1).clamp(max=k)
        # A common offset cancels in every result; taking it out keeps the digits that tell the sets apart.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(~allowed, 0.0)
        offset = logits.detach().sum(-1, keepdim=True) / allowed.sum(-1, keepdim=True).clamp(min=1)
        self._logits = (logits - offset).masked_fill(~allowed, _IMPOSSIBLE)
        # Tables end at the largest size that can occur; at size 1 at least, so that a leaf has both its cases.
        self._max_size = max(1, min(k, logits.shape[-1]))

    def log_prob(self, action: Tensor) -> Tensor:
        """Return the log-probability of each chosen set in nats, shape (...,).

        A set that the law cannot give (of another size, or with a forbidden row) has minus infinity, with a gradient
        of 0, never NaN. The *ratio* of two such probabilities is undefined all the same: a learner has to ask for the
        set that was drawn, not for what an environment with little budget left has kept of it.

        Args:
            action: 1 where a row is chosen and 0 elsewhere, shape (..., n).
        """
        chosen = action > 0.5
        weight = torch.where(chosen, self._logits, 0.0).sum(-1)
        possible = (chosen.sum(-1) == self.sizes) & ~(chosen & ~self.mask).any(-1)
        return torch.where(possible, weight - self._log_partition, -torch.inf)

    def entropy(self) -> Tensor:
        """Return the exact entropy in nats, shape (...,), with a gradient.

        By the chain rule from the leaves up: the entropy of a split plus the expected entropies of its halves.
        """
        num_leaves = 2 ** len(self._splits)
        entropies = self._logits.new_zeros(*self._logits.shape[:-1], num_leaves, 2)  # (..., nodes, size)
        for split in self._splits:
            left, right = entropies.chunk(2, dim=-2)
            halves = _align_totals(left.unsqueeze(-1) + right.unsqueeze(-2), split.shape[-1], fill=0.0)
            entropies = (split.exp() * (halves - split)).sum(-2)
        return self._at_size(entropies)

    def mode(self) -> Tensor:
        """Return a most probable set, the rows of largest logits: 0/1, shape (..., n); of equal rows the first."""
        order = self._logits.detach().sort(dim=-1, descending=True, stable=True).indices
        rank = torch.arange(order.shape[-1], device=order.device)
        taken = (rank < self.sizes.unsqueeze(-1)).to(self._logits.dtype)
        return torch.zeros_like(taken).scatter(-1, order, taken)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw one set for each of the batch, exactly from the law: 0/1, shape (..., n).

        From the root down, each node draws how many of the rows chosen below it lie in its left half.

        Args:
            generator: The source of randomness; None is torch's global one.
        """
        counts = self.sizes.unsqueeze(-1)  # (..., nodes)
        for split in reversed(self._splits):
            column = counts[..., None, None].expand(*counts.shape, split.shape[-2], 1)
            chances = split.detach().gather(-1, column).squeeze(-1).exp()
            left = torch.multinomial(chances.flatten(end_dim=-2), 1, generator=generator).view_as(counts)
            counts = torch.cat([left, counts - left], dim=-1)
        return counts[..., : self._logits.shape[-1]].to(self._logits.dtype)

    def marginals(self) -> Tensor:
        """Return each row's probability of being chosen, shape (..., n), with a gradient; they add up to `sizes`."""
        size_is = functional.one_hot(self.sizes, self._max_size + 1).to(self._logits.dtype)
        chances = size_is.unsqueeze(-2)  # (..., nodes, size): how probable it is that a node has so many rows chosen
        for split in reversed(self._splits):
            joint = _align_parts(chances.unsqueeze(-2) * split.exp())
            chances = torch.cat([joint.sum(-1), joint.sum(-2)], dim=-2)
        return chances[..., : self._logits.shape[-1], 1]

    @property
    def _splits(self) -> list[Tensor]:
        """From the leaves up, log P(i of d rows go left), shape (..., nodes, i, d)."""
        return self._tree[0]

    @property
    def _log_partition(self) -> Tensor:
        """Log Z of the logits without their offset, shape (...,)."""
        return self._at_size(self._tree[1])

    @functools.cached_property
    def _tree(self) -> tuple[list[Tensor], Tensor]:
        """The splits, and the root's log elementary symmetric polynomials, shape (..., 1, size)."""
        num_rows = self._logits.shape[-1]
        num_leaves = 1 << (num_rows - 1).bit_length()
        # Drawing an action without a gradient must not leave tables without one to a later log_prob.
        with torch.set_grad_enabled(self._logits.requires_grad):
            leaves = functional.pad(self._logits, (0, num_leaves - num_rows), value=_IMPOSSIBLE)
            polynomials = torch.stack([torch.zeros_like(leaves), leaves], dim=-1)
            splits: list[Tensor] = []
            while polynomials.shape[-2] > 1:
                left, right = polynomials.chunk(2, dim=-2)
                pairs = left.unsqueeze(-1) + right.unsqueeze(-2)
                joint = _align_totals(pairs, self._max_size + 1, fill=_IMPOSSIBLE)
                splits.append(joint.log_softmax(-2))
                polynomials = joint.logsumexp(-2)
        return splits, polynomials

    def _at_size(self, root: Tensor) -> Tensor:
        """Return the entry of a root's table, shape (..., 1, size), that belongs to the size drawn, shape (...,)."""
        return root.squeeze(-2).gather(-1, self.sizes.unsqueeze(-1)).squeeze(-1)


def _align_totals(pairs: Tensor, max_width: int, fill: float) -> Tensor:
    """Move entry (i, j) of (..., p, p) to (i, i + j), so that sums over i become convolutions; cut after `max_width`.

    Read with rows one shorter than they are, each row of a matrix starts one further to the right: no index needed.
    """
    num_parts = pairs.shape[-1]
    width = 2 * num_parts - 1
    flat = functional.pad(pairs, (0, num_parts), value=fill).flatten(-2)[..., : num_parts * width]
    aligned: Tensor = flat.reshape(*pairs.shape[:-1], width)
    return aligned[..., :max_width]


def _align_parts(totals: Tensor) -> Tensor:
    """Move entry (i, d) of (..., p, width) back to (i, d - i) of (..., p, p): undoes `_align_totals`."""
    num_parts = totals.shape[-2]
    width = 2 * num_parts - 1
    flat = functional.pad(totals, (0, width - totals.shape[-1])).flatten(-2)
    aligned: Tensor = functional.pad(flat, (0, num_parts)).reshape(*totals.shape[:-1], width + 1)
    return aligned[..., :num_parts]
