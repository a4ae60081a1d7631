"""Scoring a model on dev and test rows: losses, wholly right answers, choices, and the numbers of worked answers.

Whole answers are checked without generating any: greedy decoding gives a response exactly when the model's
first choice is right at every one of its tokens, given the ones before, and that is seen in one forward pass.
A worked answer may be right in other words, so that one which ends in `#### number` has to be generated, if asked for.
Choices and numbers are scored as lm-eval does it; a test holds both equal.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .encoding import Batch, EncodedRows, Encoder, collate, token_batches
from .errors import DataError
from .final_number import flexible_match, has_final_number, strict_match
from .pool import Instruction
from .rewards import Evaluation

__all__ = ["EVALUATION_BATCH_TOKENS", "AnswerFunction", "EvaluationSet", "LossFunction", "evaluate", "score_rows"]

logger = logging.getLogger(__name__)

#: Tokens of one forward pass, padding included. Small, so that on a CPU what a layer makes stays in its cache.
EVALUATION_BATCH_TOKENS = 1024

LossFunction = Callable[[Batch], tuple[Tensor, Tensor]]

#: From prompts as tokens to generated answers, and how many tokens that took.
AnswerFunction = Callable[[Sequence[np.ndarray]], tuple[list[str], int]]


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationSet:
    """Rows to be scored on, encoded once.

    Attributes:
        instructions: The rows as text.
        rows: The rows with their right responses.
        choices: Every choice of every row that has any, each as a row of its own; None where no row has.
        choice_rows: Which row a choice belongs to, shape (choices,), int64.
        choice_lengths: Characters of each choice, shape (choices,), int64.
        answers: Index of the right choice among a row's own, -1 without choices, shape (rows,), int64.
        questions: By row number, the prompts of rows whose response ends in a number, as tokens, of any length.
    """

    instructions: tuple[Instruction, ...]
    rows: EncodedRows
    choices: EncodedRows | None
    choice_rows: np.ndarray
    choice_lengths: np.ndarray
    answers: np.ndarray
    questions: dict[int, np.ndarray]

    @classmethod
    def build(cls, instructions: Sequence[Instruction], encoder: Encoder, what: str) -> EvaluationSet:
        """Encode a dev or test set, with its choices where it has any.

        Rows of whose response nothing fits into the encoder's length are left out, with a warning, unless they have
        choices or a number to be scored by: their prompts lose their beginning instead.

        Raises:
            DataError: No row's response fits.
        """
        encoded = encoder.encode(instructions, what=what)
        if not encoded.has_labels.any():
            raise DataError(
                f"no response of the {what} set fits into max_length={encoder.max_length}; raise max_length."
            )
        instructions, choices = _scorable_choices(instructions, encoder, what)
        others = [bool(row.choices) or has_final_number(row.response) for row in instructions]
        kept = np.flatnonzero(encoded.has_labels | np.array(others))
        if len(kept) < len(encoded):
            message = "%d of %d %s rows are left out: nothing of their response fits into max_length=%d"
            logger.warning(message, len(encoded) - len(kept), len(encoded), what, encoder.max_length)
            encoded, instructions = encoded.select(kept), [instructions[int(row)] for row in kept]
        counts = [len(instruction.choices) for instruction in instructions]
        return cls(
            instructions=tuple(instructions),
            rows=encoded,
            choices=choices,  # a row that has any was kept
            choice_rows=np.repeat(np.arange(len(counts)), counts),
            choice_lengths=np.array([len(choice) for i in instructions for choice in i.choices], dtype=np.int64),
            answers=np.array([instruction.right_choice for instruction in instructions], dtype=np.int64),
            questions=_questions(instructions, encoder),
        )

    def num_tokens(self, subset: np.ndarray | None = None) -> int:
        """Return how many tokens one pass over the rows, or some of them, and their choices has."""
        chosen = np.arange(len(self)) if subset is None else subset
        total = int(self.rows.lengths[chosen][self.rows.has_labels[chosen]].sum())
        if self.choices is None:
            return total
        return total + int(self.choices.lengths[np.isin(self.choice_rows, chosen)].sum())

    def __len__(self) -> int:
        return len(self.rows)


def evaluate(
    losses_of: LossFunction,
    data: EvaluationSet,
    subset: np.ndarray | None = None,
    answer: AnswerFunction | None = None,
    *,
    max_tokens: int = EVALUATION_BATCH_TOKENS,
    shares_prompts: bool = True,
) -> Evaluation:
    """Score a model on the rows, or on some of them.

    Args:
        losses_of: Gives the loss and the logits of every label of a batch.
        data: The rows.
        subset: Row numbers, shape (some,); None for all.
        answer: Generates answers; None: none are generated.
        max_tokens: Tokens of one forward pass, padding included.
        shares_prompts: Whether a pass computes once what its rows begin with alike: then the choices of a row, which
            all begin with the prompt, go through by themselves.
    """
    chosen = np.arange(len(data)) if subset is None else subset
    fits = data.rows.has_labels[chosen]
    sums, correct = np.zeros(len(chosen)), np.zeros(len(chosen), dtype=bool)
    sums[fits], correct[fits] = score_rows(losses_of, data.rows, chosen[fits], max_tokens=max_tokens)
    return Evaluation(
        row_losses=sums,
        row_tokens=data.rows.label_counts[chosen],
        row_correct=correct,
        rows=tuple(data.instructions[int(row)] for row in chosen),
        **_choice_scores(losses_of, data, chosen, max_tokens, shares_prompts),
        **({} if answer is None else _matches(answer, data, chosen)),
    )


def _choice_scores(
    losses_of: LossFunction, data: EvaluationSet, chosen: np.ndarray, max_tokens: int, shares_prompts: bool
) -> dict[str, Any]:
    """Return what an `Evaluation` says of choices: nothing where there are none."""
    if data.choices is None:
        return {}
    lines = np.flatnonzero(np.isin(data.choice_rows, chosen))
    owners = data.choice_rows[lines]
    # The choices of one row by themselves: what they share, which is all of the prompt, is then computed once.
    groups = np.split(np.arange(len(lines)), np.flatnonzero(np.diff(owners)) + 1) if shares_prompts else None
    sums, _ = score_rows(losses_of, data.choices, lines, groups, max_tokens=max_tokens)
    return {
        "choice_scores": tuple(-sums[owners == row] for row in chosen),
        "choice_answers": data.answers[chosen],
        "choice_lengths": tuple(data.choice_lengths[lines[owners == row]] for row in chosen),
    }


def _matches(answer: AnswerFunction, data: EvaluationSet, chosen: np.ndarray) -> dict[str, Any]:
    """Return what an `Evaluation` says of generated answers: nothing where no row asks for a number."""
    places = [place for place, row in enumerate(chosen) if int(row) in data.questions]
    if not places:
        return {}
    answers, num_tokens = answer([data.questions[int(row)] for row in chosen[places]])
    strict, flexible = np.full(len(chosen), np.nan), np.full(len(chosen), np.nan)
    for place, text in zip(places, answers, strict=True):
        response = data.instructions[int(chosen[place])].response
        strict[place], flexible[place] = strict_match(text, response), flexible_match(text, response)
    return {"strict_matches": strict, "flexible_matches": flexible, "num_generating_tokens": num_tokens}


def _scorable_choices(
    instructions: Sequence[Instruction], encoder: Encoder, what: str
) -> tuple[list[Instruction], EncodedRows | None]:
    """Return the rows, without their choices where one of these cannot be scored, with a warning; and all that can."""
    if not any(row.choices for row in instructions):
        return list(instructions), None
    encoded = encoder.encode_choices(instructions, what=what)
    owners = np.repeat(np.arange(len(instructions)), [len(row.choices) for row in instructions])
    dropped = np.unique(owners[~encoded.has_labels])
    if len(dropped) == 0:
        return list(instructions), encoded
    message = "the choices of %d of %d %s rows are not scored: one of them is no token, or does not fit into %d"
    logger.warning(message, len(dropped), len(instructions), what, encoder.max_length)
    rows = list(instructions)
    for row in dropped:
        rows[row] = dataclasses.replace(rows[row], choices=(), right=None)
    left = np.flatnonzero(~np.isin(owners, dropped))
    return rows, encoded.select(left) if len(left) else None


def _questions(instructions: Sequence[Instruction], encoder: Encoder) -> dict[int, np.ndarray]:
    """Return the prompts of rows whose response ends in a number, as tokens, by row number."""
    wanted = [place for place, row in enumerate(instructions) if has_final_number(row.response)]
    if not wanted:
        return {}
    return dict(zip(wanted, encoder.encode_prompts([instructions[place] for place in wanted]), strict=True))


@torch.no_grad()
def score_rows(
    losses_of: LossFunction,
    rows: EncodedRows,
    chosen: np.ndarray,
    groups: Sequence[np.ndarray] | None = None,
    *,
    max_tokens: int = EVALUATION_BATCH_TOKENS,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the summed loss of each row's labels in nats, and whether all are the first choice, each (chosen,).

    Args:
        losses_of: As for `evaluate`.
        rows: The rows.
        chosen: Row numbers to score, shape (chosen,).
        groups: Places in `chosen` of rows that no batch mixes with others; None for one group of all.
        max_tokens: As for `evaluate`.
    """
    sums = np.zeros(len(chosen))
    correct = np.zeros(len(chosen), dtype=bool)
    for group in [np.arange(len(chosen))] if groups is None else groups:
        for part in token_batches(rows.lengths[chosen[group]], max_tokens):
            places = group[part]
            batch = collate(rows, chosen[places])
            losses, logits = losses_of(batch)
            owners = torch.nonzero(batch.is_label, as_tuple=True)[0]
            wrong = (logits.argmax(-1).cpu() != batch.targets).double()
            zeros = torch.zeros(len(places), dtype=torch.float64)
            sums[places] = zeros.index_add(0, owners, losses.double().cpu()).numpy()
            correct[places] = zeros.index_add(0, owners, wrong).numpy() == 0
    return sums, correct
