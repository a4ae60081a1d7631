"""What the environment needs of a model in training, without saying how it is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from .rewards import Evaluation

__all__ = ["Learner", "Ledger", "Split", "scheduled_rate"]

Split = Literal["dev", "test"]


@dataclass(slots=True)
class Ledger:
    """What selection costs, in tokens: counted where the work is done, once for all environments over one pool.

    Attributes:
        forward_tokens: Tokens that only went forward (features, dev).
        train_tokens: Tokens that went forward and backward.
        test_tokens: Tokens of the test set, forward: what a report costs, not what selection does.
        updates: Optimiser steps.
        divergences: Episodes that ended because the loss stopped being finite.
    """

    forward_tokens: int = 0
    train_tokens: int = 0
    test_tokens: int = 0
    updates: int = 0
    divergences: int = 0

    @property
    def token_forwards(self) -> int:
        """The cost in token forwards: a forward is 1, forward and backward is 3; the test set is left out."""
        return self.forward_tokens + 3 * self.train_tokens


def scheduled_rate(learning_rate: float, progress: float) -> float:
    """Return an update's learning rate: a cosine from the first to 0, without warm-up (Lv et al. 2025, section 4).

    Args:
        learning_rate: The first update's.
        progress: Share of the episode that is used up; above 1 counts as 1.
    """
    return learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


class Learner(Protocol):
    """A model in training: `learner.LoraLearner`, or `testing.FakeLearner`, which needs no model.

    `state` is a value that is never changed in place: keeping a reference is a snapshot, and `restore` goes back to it.
    `generates` says whether rows whose response ends in a number are answered when they are scored, `scores_choices`
    whether the choices of dev rows are.
    """

    state: Any
    ledger: Ledger
    generates: bool
    scores_choices: bool

    def reset(self) -> None:
        """Go back to the state before any update."""

    def restore(self, state: Any) -> None:
        """Go on from a state of this learner, or of one like it."""

    def update(self, rows: np.ndarray, progress: float, seed: int) -> float:
        """Make one update on pool rows and return the mean loss per response token before it, in nats."""

    def update_together(
        self, learners: Sequence[Any], batches: Sequence[np.ndarray], progress: Sequence[float], seeds: Sequence[int]
    ) -> list[float]:
        """Make one update of each of several copies of this learner, and return the losses as `update` does."""

    def evaluate_together(self, learners: Sequence[Any], split: Split) -> None:
        """Score several copies of this learner on all rows, so that `evaluate` of each has it at once."""

    def evaluate(self, split: Split, subset: np.ndarray | None = None) -> Evaluation:
        """Score the model as it is on dev or test rows."""

    def probe(self, batches: Sequence[np.ndarray], progress: float, seed: int, subset: np.ndarray) -> list[Evaluation]:
        """Score what one update on each batch would give, from this very state, which stays as it is."""

    def row_losses(self, rows: np.ndarray) -> np.ndarray:
        """Return the model's mean loss on each pool row's response as it is, nats per token, shape (rows,)."""

    def row_gradients(self, rows: np.ndarray, split: Split | None = None, *, adam: bool = False) -> np.ndarray:
        """Return the gradient of each row's mean loss, shape (rows, parameters), of pool rows or of a split's."""

    def dev_direction(self, num_updates: int, batch_size: int, progress: float, seed: int) -> np.ndarray:
        """Return which way updates on dev rows would go from here, shape (parameters,); the state stays as it is."""

    def copy(self) -> Learner:
        """Return a learner that goes on from here by itself."""

    def save_adapter(self, folder: Path) -> None:
        """Write the model's adapter."""
