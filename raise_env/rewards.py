"""From an evaluation to a dev score, and from two dev scores to a reward: numbers in, number out.

RAISE (Lv et al. 2025, section 3) takes P(M) = -(mean loss on the dev set) and allows other measures; the
reward of a step is P(M_t) - P(M_{t-1}), so that the undiscounted return of an episode is P(M_T) - P(M_0).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .errors import RaiseEnvError, RewardError, failing_lines, lacks_memory
from .final_number import has_final_number
from .pool import Instruction

__all__ = [
    "DIVERGENCE_PENALTY",
    "Evaluation",
    "RewardFunction",
    "check_reward",
    "load_reward",
    "missing_need",
    "needs_choices",
    "needs_generation",
    "step_reward",
]

#: The reward of a step after which the loss is no longer finite; the paper knows no such step.
DIVERGENCE_PENALTY = -10.0


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """How a model does on a set of rows: what every dev score is computed from.

    Its arrays are read-only: environments share them, and no reward may change them for the others.

    Attributes:
        row_losses: Sum of the negative log-likelihood of each row's response, nats, shape (rows,), float64.
        row_tokens: Response tokens of each row, shape (rows,), int64; 0 where none fits into the length.
        row_correct: Whether every response token is the model's first choice, which is to say that greedy
            decoding gives exactly the response, shape (rows,), bool.
        choice_scores: For rows with choices, the log-likelihood of each, nats; an empty array for others.
        choice_answers: The index of the right choice, -1 where a row has none, shape (rows,), int64.
        choice_lengths: For rows with choices, the characters of each; an empty array for others.
        strict_matches: For rows whose response ends in `#### number`: 1 where a generated answer gives that number in
            the same form, 0 where not; NaN for other rows, shape (rows,), float64. None where nothing was generated.
        flexible_matches: The same, where the last number of the answer counts, in whatever form.
        num_generating_tokens: Tokens that went through the model to generate answers.
        rows: The instructions that all this is of, in the same order.
    """

    row_losses: np.ndarray
    row_tokens: np.ndarray
    row_correct: np.ndarray
    choice_scores: tuple[np.ndarray, ...] = ()
    choice_answers: np.ndarray | None = None
    choice_lengths: tuple[np.ndarray, ...] = ()
    strict_matches: np.ndarray | None = None
    flexible_matches: np.ndarray | None = None
    num_generating_tokens: int = 0
    rows: Sequence[Instruction] = ()

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, np.ndarray):
                object.__setattr__(self, entry.name, _read_only(value))
            elif entry.name.startswith("choice_") and value is not None:
                object.__setattr__(self, entry.name, tuple(_read_only(own) for own in value))

    @property
    def loss(self) -> float:
        """Mean loss in nats per response token; NaN where no response token fits."""
        num_tokens = self.row_tokens.sum()
        return float(self.row_losses.sum() / num_tokens) if num_tokens else math.nan

    @property
    def row_exact_matches(self) -> np.ndarray:
        """1 for each row that is answered right, 0 for others, NaN where that is not known, shape (rows,), float64.

        A generated answer counts by its number, as `strict_matches` says; any other by the whole response.
        """
        whole = np.where(self.row_tokens > 0, self.row_correct.astype(np.float64), np.nan)
        if self.strict_matches is None:
            return whole
        return np.where(np.isnan(self.strict_matches), whole, self.strict_matches)

    @property
    def row_flexible_matches(self) -> np.ndarray:
        """The same by the last number of a generated answer; NaN where none was generated."""
        unknown = np.full(len(self.row_losses), np.nan)
        return unknown if self.flexible_matches is None else self.flexible_matches

    @property
    def row_accuracies(self) -> np.ndarray:
        """1 where the right choice is the likeliest, 0 elsewhere, NaN without choices, shape (rows,), float64."""
        return self._of_choices(lambda scores, _, answer: float(scores.argmax() == answer))

    @property
    def row_accuracies_norm(self) -> np.ndarray:
        """The same by log-likelihood per character."""
        return self._of_choices(lambda scores, lengths, answer: float((scores / lengths).argmax() == answer))

    @property
    def row_choice_probabilities(self) -> np.ndarray:
        """Probability of the right choice among a row's own, NaN without choices, shape (rows,), float64."""
        return self._of_choices(lambda scores, _, answer: _softmax_at(scores, answer))

    @property
    def exact_match(self) -> float:
        """Share of rows that greedy decoding answers right: see `row_exact_matches`."""
        return _mean_of_known(self.row_exact_matches) or 0.0

    @property
    def flexible_match(self) -> float | None:
        """Share of generated answers whose last number is right; None where nothing was generated."""
        return _mean_of_known(self.row_flexible_matches)

    @property
    def accuracy(self) -> float | None:
        """Share of rows whose right choice has the highest log-likelihood; None without choices."""
        return _mean_of_known(self.row_accuracies)

    @property
    def accuracy_norm(self) -> float | None:
        """The same with each log-likelihood divided by the choice's characters; None without choices."""
        return _mean_of_known(self.row_accuracies_norm)

    @property
    def choice_probability(self) -> float | None:
        """Mean probability of the right choice among a row's own; None without choices."""
        return _mean_of_known(self.row_choice_probabilities)

    def scores(self) -> dict[str, float]:
        """Return every share and mean that the rows allow, by the names of rewards; "loss" with its own sign."""
        values = {name: getattr(self, name) for name in _MEASURES}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def is_finite(self) -> bool:
        """Whether the loss of every row is a number, and the log-likelihood of every choice."""
        numbers = (self.row_losses, *self.choice_scores)
        return all(bool(np.isfinite(values).all()) for values in numbers)

    def _of_choices(self, value: Callable[[np.ndarray, np.ndarray, int], float]) -> np.ndarray:
        """Return a value of log-likelihoods, lengths and answer of each row that has choices, NaN for others."""
        values = np.full(len(self.row_losses), np.nan)
        if self.choice_answers is not None:
            for row in np.flatnonzero(self.choice_answers >= 0):
                values[row] = value(self.choice_scores[row], self.choice_lengths[row], int(self.choice_answers[row]))
        return values


RewardFunction = Callable[[Evaluation], float]


def load_reward(reward: str) -> RewardFunction:
    """Return the dev score P that `reward` names; higher is better.

    Args:
        reward: One of `config.REWARDS`, or "module:function", a function of an `Evaluation`.

    Raises:
        RewardError: The module or the function cannot be found, or the module's own code failed.
    """
    if reward in _MEASURES:
        return functools.partial(_measured, reward)  # which can be pickled, where a function in a function cannot
    module, _, name = reward.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        hint = f" Leave out the ending: {module.removesuffix('.py')}:{name}." if module.endswith(".py") else ""
        raise RewardError(
            f"reward {reward!r} cannot be loaded: {error}. Expected an importable module:function.{hint}"
        ) from error
    except Exception as error:  # whatever the module's own code raises
        lines = failing_lines(error, 1)
        raise RewardError(f"reward {reward!r}, importing {module!r}: its own code failed.\n{lines}") from error
    if not callable(function):
        raise RewardError(f"reward {reward!r} is a {type(function).__name__}; expected a function of an Evaluation.")
    return functools.partial(_checked, reward, function)


def needs_generation(reward: str) -> bool:
    """Return whether a reward wants generated answers to rows whose response ends in a number."""
    return reward in _MEASURES and _MEASURES[reward].generates


def needs_choices(reward: str) -> bool:
    """Return whether a reward may look at how choices are scored: a function of one's own may."""
    return reward not in _MEASURES or _MEASURES[reward].need is _CHOICES


def check_reward(reward: str, rows: Iterable[Instruction], what: str, lacking: str = "has none") -> None:
    """Check that there are rows that a reward can be computed on.

    Args:
        reward: As for `load_reward`.
        rows: The dev or test rows.
        what: Which of them, for the message.
        lacking: What is then the matter with that set.

    Raises:
        RewardError: There is none.
    """
    if missing_need(reward, rows) is not None:
        raise _lacking(reward, what, lacking)


def missing_need(reward: str, rows: Iterable[Instruction]) -> str | None:
    """Return in words what a reward needs of rows and none of them has; None where it can be computed.

    Args:
        reward: As for `load_reward`.
        rows: The rows.
    """
    need = _MEASURES[reward].need if reward in _MEASURES else None
    return None if need is None or any(map(need.is_met, rows)) else need.words


def usable_rows(reward: str, evaluation: Evaluation) -> np.ndarray:
    """Return the numbers of the rows that a reward looks at, shape (some,), int64; all for a function of one's own.

    Args:
        reward: As for `load_reward`.
        evaluation: Of all rows, with generated answers if the reward needs them.
    """
    if reward not in _MEASURES:
        return np.arange(len(evaluation.row_losses))
    return np.flatnonzero(~np.isnan(_MEASURES[reward].row_values(evaluation)))


def step_reward(before: float, after: float) -> float:
    """Return the gain of one step, P(M_t) - P(M_{t-1})."""
    return after - before


@dataclass(frozen=True, slots=True)
class _Need:
    """What rows have to have for a measure, in a function and in words."""

    is_met: Callable[[Instruction], bool]
    words: str
    remedy: str


_CHOICES = _Need(
    lambda row: bool(row.choices),
    "a column `choices` (a list of strings, the response one of them)",
    "Take reward 'loss' or 'exact_match', or add the choices.",
)
_NUMBERS = _Need(
    lambda row: has_final_number(row.response),
    "a response that ends in `#### number`",
    "Take reward 'loss' or 'exact_match', or write the numbers so.",
)


@dataclass(frozen=True, slots=True)
class _Measure:
    """A dev score by name.

    Attributes:
        score: Gives it; None where no row has what it needs.
        row_values: Gives a number for each row, NaN for those that it does not look at.
        need: What it needs of at least one row; None for nothing.
        generates: Whether rows that end in a number have to be answered.
    """

    score: Callable[[Evaluation], float | None]
    row_values: Callable[[Evaluation], np.ndarray]
    need: _Need | None = None
    generates: bool = False


_MEASURES = {
    "loss": _Measure(lambda of: -of.loss, lambda of: np.where(of.row_tokens > 0, of.row_losses, np.nan)),
    "accuracy": _Measure(lambda of: of.accuracy, lambda of: of.row_accuracies, _CHOICES),
    "accuracy_norm": _Measure(lambda of: of.accuracy_norm, lambda of: of.row_accuracies_norm, _CHOICES),
    "choice_probability": _Measure(lambda of: of.choice_probability, lambda of: of.row_choice_probabilities, _CHOICES),
    "exact_match": _Measure(lambda of: of.exact_match, lambda of: of.row_exact_matches, generates=True),
    "flexible_match": _Measure(
        lambda of: of.flexible_match, lambda of: of.row_flexible_matches, _NUMBERS, generates=True
    ),
}


def _measured(reward: str, evaluation: Evaluation) -> float:
    """Return the dev score of a name that `_MEASURES` has."""
    value = _MEASURES[reward].score(evaluation)
    if value is None:
        raise _lacking(reward, "dev")
    return value


def _lacking(reward: str, what: str, lacking: str = "has none") -> RewardError:
    need = _MEASURES[reward].need
    assert need is not None
    return RewardError(
        f"reward {reward!r} needs {what} rows with {need.words}; this {what} set {lacking}. {need.remedy}"
    )


def _checked(reward: str, function: Callable[[Evaluation], object], evaluation: Evaluation) -> float:
    try:
        value = function(evaluation)
    except Exception as error:
        if isinstance(error, RaiseEnvError) or lacks_memory(error):
            raise
        raise RewardError(f"reward {reward!r}: its own code failed.\n{failing_lines(error, 1)}") from error
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise RewardError(f"reward {reward!r} returned {value!r}; expected one number, higher is better.")
    if not math.isfinite(value):
        raise RewardError(
            f"reward {reward!r} returned {value!r} for a dev loss of {evaluation.loss:.4g}; expected a finite "
            "number. Losses that are not finite never reach it: look for a division by zero or a logarithm in it."
        )
    return float(value)


def _mean_of_known(values: np.ndarray) -> float | None:
    """Return the mean of those that are not NaN."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _read_only(array: np.ndarray) -> np.ndarray:
    """Return a view that cannot be written into; whoever made the array still can."""
    view = array.view()
    view.flags.writeable = False
    return view


def _softmax_at(scores: np.ndarray, place: int) -> float:
    weights = np.exp(scores - scores.max())
    return float(weights[place] / weights.sum())
