"""Scoring a model on dev and test rows: losses, wholly right answers, and choices.

Whole answers are checked without generating any: greedy decoding gives a response exactly when the model's
first choice is right at every one of its tokens, given the ones before, and that is seen in one forward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .encoding import Batch, EncodedRows, Encoder, collate, token_batches
from .errors import DataError
from .pool import Instruction
from .rewards import Evaluation

__all__ = ["EVALUATION_BATCH_TOKENS", "EvaluationSet", "evaluate", "score_rows"]

logger = logging.getLogger(__name__)

#: Tokens of one forward pass, padding included. Small, so that on a CPU what a layer makes stays in its cache.
EVALUATION_BATCH_TOKENS = 1024

LossFunction = Callable[[Batch], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationSet:
    """Rows to be scored on, encoded once.

    Attributes:
        rows: The rows with their right responses.
        choices: Every choice of every row that has any, each as a row of its own; None where no row has.
        choice_rows: Which row a choice belongs to, shape (choices,), int64.
        answers: Index of the right choice among a row's own, -1 without choices, shape (rows,), int64.
    """

    rows: EncodedRows
    choices: EncodedRows | None
    choice_rows: np.ndarray
    answers: np.ndarray

    @classmethod
    def build(cls, instructions: Sequence[Instruction], encoder: Encoder, what: str) -> EvaluationSet:
        """Encode a dev or test set, with its choices where it has any.

        Rows of whose response nothing fits into the encoder's length are left out, with a warning.

        Raises:
            DataError: No row is left.
        """
        encoded = encoder.encode(instructions, what=what)
        kept = np.flatnonzero(encoded.has_labels)
        if len(kept) == 0:
            raise DataError(
                f"no response of the {what} set fits into max_length={encoder.max_length}; raise max_length."
            )
        if len(kept) < len(encoded):
            message = "%d of %d %s rows are left out: nothing of their response fits into max_length=%d"
            logger.warning(message, len(encoded) - len(kept), len(encoded), what, encoder.max_length)
            encoded, instructions = encoded.select(kept), [instructions[int(row)] for row in kept]
        answers = np.array([i.choices.index(i.response) if i.choices else -1 for i in instructions], dtype=np.int64)
        counts = [len(instruction.choices) for instruction in instructions]
        choice_rows = np.repeat(np.arange(len(counts)), counts)
        pairs = [Instruction(i.prompt, choice) for i in instructions for choice in i.choices]
        choices = encoder.encode(pairs, what=f"{what} choice") if pairs else None
        return cls(encoded, choices, choice_rows, answers)

    def __len__(self) -> int:
        return len(self.rows)


def evaluate(losses_of: LossFunction, data: EvaluationSet, subset: np.ndarray | None = None) -> Evaluation:
    """Score a model on the rows, or on some of them.

    Args:
        losses_of: Gives the loss and the logits of every label of a batch.
        data: The rows.
        subset: Row numbers, shape (some,); None for all.
    """
    chosen = np.arange(len(data)) if subset is None else subset
    sums, correct = score_rows(losses_of, data.rows, chosen)
    tokens = data.rows.label_counts[chosen]
    if data.choices is None:
        return Evaluation(sums, tokens, correct)
    lines = np.flatnonzero(np.isin(data.choice_rows, chosen))
    choice_sums, _ = score_rows(losses_of, data.choices, lines)
    owners = data.choice_rows[lines]
    scores = tuple(-choice_sums[owners == row] for row in chosen)
    return Evaluation(sums, tokens, correct, scores, data.answers[chosen])


@torch.no_grad()
def score_rows(losses_of: LossFunction, rows: EncodedRows, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the summed loss of each row's labels in nats, and whether all are the first choice, each (chosen,).

    Args:
        losses_of: As for `evaluate`.
        rows: The rows.
        chosen: Row numbers to score, shape (chosen,).
    """
    sums = np.zeros(len(chosen))
    correct = np.zeros(len(chosen), dtype=bool)
    for places in token_batches(rows.lengths[chosen], EVALUATION_BATCH_TOKENS):
        batch = collate(rows, chosen[places])
        losses, logits = losses_of(batch)
        owners = torch.nonzero(batch.is_label, as_tuple=True)[0]
        wrong = (logits.argmax(-1).cpu() != batch.targets).double()
        zeros = torch.zeros(len(places), dtype=torch.float64)
        sums[places] = zeros.index_add(0, owners, losses.double().cpu()).numpy()
        correct[places] = zeros.index_add(0, owners, wrong).numpy() == 0
    return sums, correct
