"""Baselines that look at the model in training at every step: by its loss on the candidates, or by trying batches."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from raise_env import RaiseSelectEnv
from raise_env.errors import SettingError

from .base import BatchAgent
from .baselines import times_taken

__all__ = ["GreedyAgent", "HighLossAgent", "LowLossAgent", "SelfPacedAgent"]


class LossRankAgent(BatchAgent):
    """Takes the candidates at one end of the scale of live losses; abstract.

    Rows that were trained on in this episode come after all others, as within an epoch: with the whole pool on offer,
    the same rows would otherwise be taken time and again, being wrong beyond learning, or known by heart.
    """

    is_live: ClassVar[bool] = True
    sign: ClassVar[int]

    def scores(self, observation: np.ndarray) -> np.ndarray:
        """Return the ranks of the losses; rows trained on already lie below all others.

        Raises:
            RuntimeError: `begin` was not called.
        """
        del observation
        world = self._require_begun()
        return _fresh_first(world, self.sign * live_losses(world))


class HighLossAgent(LossRankAgent):
    """Takes the candidates on which the model now has the highest loss.

    Online batch selection (Loshchilov and Hutter 2016) and Selective-Backprop (Jiang et al. 2019) draw rows with a
    probability that rises with the rank of their loss; this is the end of that scale, where only the top is drawn.
    There the ranks rest in part on losses of earlier steps; here each step computes every candidate's loss anew.
    """

    sign = 1


class LowLossAgent(LossRankAgent):
    """Takes the candidates on which the model now has the lowest loss: the opposite of `HighLossAgent`."""

    sign = -1


class SelfPacedAgent(BatchAgent):
    """Trains on what the model finds easy, then on more and more of the rest: self-paced learning.

    Kumar et al. 2010 (NeurIPS) alternate between fitting the model to the admitted rows and admitting those with a
    loss below a threshold, weight 1 below it and 0 above, while the threshold grows until every row is admitted. Here
    a step is one update, and the threshold is a quantile of the candidates' losses, which needs no scale: the share
    admitted grows from `start` with the share of the episode that is used up, linearly, towards 1. The batch is drawn
    at random among the admitted, for in the paper all of them weigh alike. RAISE names the method SSPL and does not
    say how it set the pace.

    Args:
        start: Share of the candidates admitted in the first step, above 0 and up to 1. Never fewer than a batch.
        batch_size: Rows to take; None: what the environment is made for.

    Raises:
        SettingError: `start` is out of range.
    """

    is_live: ClassVar[bool] = True

    def __init__(self, start: float = 0.25, batch_size: int | None = None) -> None:
        super().__init__(batch_size)
        if not isinstance(start, (int, float)) or not 0.0 < start <= 1.0:
            raise SettingError(f"self_paced: start is {start!r}; expected a share above 0 and up to 1.")
        self.start = start

    def scores(self, observation: np.ndarray) -> np.ndarray:
        """Return random numbers above 0 for the admitted rows; below 0, by falling ease, for the others.

        Raises:
            RuntimeError: `begin` was not called.
        """
        del observation
        world = self._require_begun()
        ranks = np.argsort(np.argsort(live_losses(world), kind="stable"))  # padding is last
        num_admitted = round(self.share(world) * int(world.action_masks().sum()))
        return np.where(ranks < num_admitted, self._rng.random(len(ranks)), -ranks)

    def share(self, world: RaiseSelectEnv) -> float:
        """Return the share of the candidates that is admitted now."""
        return self.start + (1.0 - self.start) * world.progress


class GreedyAgent(BatchAgent):
    """Tries several random batches from where the model is, and takes the one after which the dev score is best.

    It looks one step ahead and learns nothing from it. Every step costs `num_tries` updates and as many passes over
    the dev rows; the ledger counts them.

    Args:
        num_tries: Batches that are tried at each step.
        num_dev: Dev rows that they are scored on, drawn anew at each step and the same for all; None: all dev rows.
        batch_size: Rows to take; None: what the environment is made for.

    Raises:
        SettingError: `num_tries` or `num_dev` is no such number.
    """

    is_live: ClassVar[bool] = True

    def __init__(self, num_tries: int = 8, num_dev: int | None = None, batch_size: int | None = None) -> None:
        super().__init__(batch_size)
        if not isinstance(num_tries, int) or num_tries < 1:
            raise SettingError(f"greedy: num_tries is {num_tries!r}; expected a whole number of at least 1.")
        if num_dev is not None and (not isinstance(num_dev, int) or num_dev < 1):
            raise SettingError(
                f"greedy: num_dev is {num_dev!r}; expected a whole number of at least 1, or None for all."
            )
        self.num_tries = num_tries
        self.num_dev = num_dev

    def scores(self, observation: np.ndarray) -> np.ndarray:
        """Return 1 for the rows of the best batch that was tried, 0 for the others.

        Raises:
            RuntimeError: `begin` was not called.
        """
        world = self._require_begun()
        rows = np.flatnonzero(world.action_masks())
        tries = np.zeros((self.num_tries, len(observation)), dtype=np.int8)
        for batch in tries:
            batch[self._rng.choice(rows, min(self._num_wanted, len(rows)), replace=False)] = 1
        return np.asarray(tries[np.argmax(world.probe(tries, self.num_dev))])


def live_losses(world: RaiseSelectEnv) -> np.ndarray:
    """Return the model's mean loss on each candidate as it is, nats per token, shape (candidates,); NaN for padding."""
    mask = world.action_masks()
    losses = np.full(len(mask), np.nan)
    losses[mask] = world.row_losses(world.candidates[mask])
    return losses


def _fresh_first(world: RaiseSelectEnv, scores: np.ndarray) -> np.ndarray:
    """Return the scores' ranks, NaN lowest, those of rows trained on already below all others; shape (candidates,)."""
    ranks = np.argsort(np.argsort(np.where(np.isnan(scores), -np.inf, scores), kind="stable"))
    return np.asarray(ranks - len(ranks) * times_taken(world)[world.candidates])
