"""From an evaluation to a dev score, and from two dev scores to a reward: numbers in, number out.

RAISE (Lv et al. 2025, section 3) takes P(M) = -(mean loss on the dev set) and allows other measures; the
reward of a step is P(M_t) - P(M_{t-1}), so that the undiscounted return of an episode is P(M_T) - P(M_0).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .errors import RewardError

__all__ = ["DIVERGENCE_PENALTY", "Evaluation", "RewardFunction", "load_reward", "step_reward"]

#: The reward of a step after which the loss is no longer finite; the paper knows no such step.
DIVERGENCE_PENALTY = -10.0


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """How a model does on a set of rows: what every dev score is computed from.

    Attributes:
        row_losses: Sum of the negative log-likelihood of each row's response, nats, shape (rows,), float64.
        row_tokens: Response tokens of each row, shape (rows,), int64.
        row_correct: Whether every response token is the model's first choice, which is to say that greedy
            decoding gives exactly the response, shape (rows,), bool.
        choice_scores: For rows with choices, the log-likelihood of each, nats; an empty array for others.
        choice_answers: The index of the right choice, -1 where a row has none, shape (rows,), int64.
    """

    row_losses: np.ndarray
    row_tokens: np.ndarray
    row_correct: np.ndarray
    choice_scores: tuple[np.ndarray, ...] = ()
    choice_answers: np.ndarray | None = None

    @property
    def loss(self) -> float:
        """Mean loss in nats per response token."""
        return float(self.row_losses.sum() / self.row_tokens.sum())

    @property
    def exact_match(self) -> float:
        """Share of rows that greedy decoding answers wholly right."""
        return float(self.row_correct.mean())

    @property
    def accuracy(self) -> float | None:
        """Share of rows whose right choice has the highest log-likelihood; None without choices."""
        if self.choice_answers is None or not (self.choice_answers >= 0).any():
            return None
        pairs = zip(self.choice_scores, self.choice_answers, strict=True)
        return float(np.mean([scores.argmax() == answer for scores, answer in pairs if answer >= 0]))

    @property
    def is_finite(self) -> bool:
        """Whether the loss of every row is a number."""
        return bool(np.isfinite(self.row_losses).all())


RewardFunction = Callable[[Evaluation], float]


def load_reward(reward: str) -> RewardFunction:
    """Return the dev score P that `reward` names; higher is better.

    Args:
        reward: "loss", "accuracy", "exact_match", or "module:function", a function of an `Evaluation`.

    Raises:
        RewardError: The module or the function cannot be found.
    """
    if reward in _SCORES:
        return _SCORES[reward]
    module, _, name = reward.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RewardError(
            f"reward {reward!r} cannot be loaded: {error}. Expected an importable module:function."
        ) from error
    if not callable(function):
        raise RewardError(f"reward {reward!r} is a {type(function).__name__}; expected a function of an Evaluation.")
    return _checked(reward, function)


def step_reward(before: float, after: float) -> float:
    """Return the gain of one step, P(M_t) - P(M_{t-1})."""
    return after - before


def _negative_loss(evaluation: Evaluation) -> float:
    return -evaluation.loss


def _accuracy(evaluation: Evaluation) -> float:
    accuracy = evaluation.accuracy
    if accuracy is None:
        raise RewardError(
            "reward 'accuracy' needs dev rows with a column `choices` (a list of strings, the response one of them); "
            "this dev set has none. Take reward 'loss' or 'exact_match', or add the choices."
        )
    return accuracy


def _exact_match(evaluation: Evaluation) -> float:
    return evaluation.exact_match


_SCORES: dict[str, RewardFunction] = {"loss": _negative_loss, "accuracy": _accuracy, "exact_match": _exact_match}


def _checked(reward: str, function: Callable[[Evaluation], object]) -> RewardFunction:
    def score(evaluation: Evaluation) -> float:
        value = function(evaluation)
        if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
            raise RewardError(f"reward {reward!r} returned {value!r}; expected one number, higher is better.")
        if not math.isfinite(value):
            raise RewardError(
                f"reward {reward!r} returned {value!r} for a dev loss of {evaluation.loss:.4g}; expected a finite "
                "number. Losses that are not finite never reach it: look for a division by zero or a logarithm in it."
            )
        return float(value)

    return score
