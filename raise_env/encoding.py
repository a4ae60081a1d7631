"""From instructions to tokens: the prompt's frame, the mask of what is learned, and padded batches.

Rows are kept as one flat array of tokens with offsets, not as lists of lists: a pool of a million rows then
costs its tokens and nothing else, and no row's length is paid for by another's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import SettingError
from .pool import Instruction

__all__ = ["PLAIN_TEMPLATE", "Batch", "EncodedRows", "Encoder", "collate", "token_batches"]

logger = logging.getLogger(__name__)

#: The frame for base models whose tokenizer has no chat template.
PLAIN_TEMPLATE = "### Instruction:\n{{ prompt }}\n\n### Response:\n"


@dataclass(frozen=True, eq=False)
class EncodedRows:
    """Rows as tokens, end to end; what is counted over all rows is counted once.

    Attributes:
        tokens: Token ids of all rows, shape (total,), int32.
        is_label: Whether a token belongs to the response and is learned, shape (total,), bool.
        offsets: Where each row starts, and where the last one ends, shape (rows + 1,), int64.
        num_truncated: Rows that were cut at the length limit.
    """

    tokens: np.ndarray
    is_label: np.ndarray
    offsets: np.ndarray
    num_truncated: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return one row's token ids and label mask, each of shape (length,)."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[part], self.is_label[part]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, shape (rows,), int64."""
        return np.diff(self.offsets)

    @cached_property
    def label_counts(self) -> np.ndarray:
        """Response tokens of each row, shape (rows,), int64."""
        totals = np.concatenate([[0], np.cumsum(self.is_label)])
        return np.diff(totals[self.offsets])

    def select(self, rows: np.ndarray) -> EncodedRows:
        """Return some of the rows, given by number, as rows of their own."""
        parts = [self.row(int(row)) for row in rows]
        offsets = np.concatenate([[0], np.cumsum([len(tokens) for tokens, _ in parts], dtype=np.int64)])
        tokens, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
        return EncodedRows(tokens, labels, offsets.astype(np.int64))

    @cached_property
    def has_labels(self) -> np.ndarray:
        """Whether anything of a row's response is left to learn, shape (rows,), bool."""
        return self.label_counts > 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded on the right to one length.

    Attributes:
        input_ids: Token ids, shape (rows, length), int64.
        is_label: True where a token is learned, shape (rows, length), bool; never in the first column.
    """

    input_ids: torch.Tensor
    is_label: torch.Tensor

    @property
    def keep(self) -> torch.Tensor:
        """Positions whose hidden state predicts a label, shape (rows, length), bool."""
        return torch.nn.functional.pad(self.is_label[:, 1:], (0, 1))

    @property
    def targets(self) -> torch.Tensor:
        """The labels themselves, row by row, shape (labels,), int64."""
        return self.input_ids[self.is_label]


class Encoder:
    """Turns instructions into tokens, by the tokenizer's chat template where it has one.

    Args:
        tokenizer: A `transformers` tokenizer; one without a padding token is fine, for padding is never read.
        max_length: Tokens a row may have; longer ones lose their end.
        template: A Jinja template of the prompt over the variable `prompt`; None takes the tokenizer's chat
            template, or `PLAIN_TEMPLATE` where there is none.

    Raises:
        SettingError: The template does not compile, or does not contain the prompt.
    """

    def __init__(self, tokenizer: Any, max_length: int, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.uses_chat_template = template is None and bool(getattr(tokenizer, "chat_template", None))
        self.template = template or PLAIN_TEMPLATE
        self._render = None if self.uses_chat_template else _compile(self.template)

    @property
    def description(self) -> str:
        """The frame as text: part of every cache key that depends on it."""
        return str(self.tokenizer.chat_template) if self.uses_chat_template else self.template

    def prompt_text(self, prompt: str) -> str:
        """Return the text that stands before the response."""
        if self._render is not None:
            return str(self._render.render(prompt=prompt))
        messages = [{"role": "user", "content": prompt}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def encode(self, rows: Iterable[Instruction], *, what: str = "pool") -> EncodedRows:
        """Encode prompt and response of each row; the response and the end token are labels.

        A row whose prompt alone fills `max_length` comes out without labels: see `has_labels`.

        Args:
            rows: The instructions.
            what: What they are, for the log.
        """
        rows = list(rows)
        prompts = self._tokenize([self.prompt_text(row.prompt) for row in rows])
        if not self.uses_chat_template:
            prompts = [self._start() + prompt for prompt in prompts]
        return self._join(prompts, self._responses(rows), what)

    def encode_responses(self, rows: Iterable[Instruction], *, what: str = "pool") -> EncodedRows:
        """Encode each row's response without its prompt, for log P(y)."""
        rows = list(rows)
        start = self._start() or [self._end()]
        return self._join([start] * len(rows), self._responses(rows), what)

    def _responses(self, rows: list[Instruction]) -> list[list[int]]:
        return [[*response, self._end()] for response in self._tokenize([row.response for row in rows])]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose: rows longer than the model takes are cut here, so a warning about them would be wrong.
        return list(self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])

    def _start(self) -> list[int]:
        token = self.tokenizer.bos_token_id
        return [] if token is None else [int(token)]

    def _end(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def _join(self, prompts: list[list[int]], responses: list[list[int]], what: str) -> EncodedRows:
        tokens: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        num_truncated = 0
        for prompt, response in zip(prompts, responses, strict=True):
            row = np.asarray(prompt + response, dtype=np.int32)[: self.max_length]
            num_truncated += len(prompt) + len(response) > self.max_length
            tokens.append(row)
            labels.append(np.arange(len(row)) >= len(prompt))
        if num_truncated:
            logger.info("%d of %d %s rows were cut at %d tokens", num_truncated, len(tokens), what, self.max_length)
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in tokens], dtype=np.int64)])
        return EncodedRows(np.concatenate(tokens), np.concatenate(labels), offsets.astype(np.int64), num_truncated)


def collate(rows: EncodedRows, indices: Sequence[int] | np.ndarray, pad_id: int = 0) -> Batch:
    """Pad the given rows on the right into one batch.

    No attention mask is needed: in a causal model nothing to the left of the padding can see it, and nothing
    in the padding is a label.
    """
    parts = [rows.row(int(index)) for index in indices]
    length = max(len(tokens) for tokens, _ in parts)
    input_ids = np.full((len(parts), length), pad_id, dtype=np.int64)
    is_label = np.zeros((len(parts), length), dtype=bool)
    for line, (tokens, labels) in enumerate(parts):
        input_ids[line, : len(tokens)] = tokens
        is_label[line, : len(labels)] = labels
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(is_label))


def token_batches(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Share rows out into batches of about equal padded size, longest first.

    Args:
        lengths: Tokens of each row, shape (rows,).
        max_tokens: Tokens, padding included, that a batch may have; a longer row goes alone.

    Returns:
        Row indices of each batch; sorted by length, so that little is padding.
    """
    order = np.argsort(-lengths, kind="stable")
    batches: list[np.ndarray] = []
    start = 0
    while start < len(order):
        size = max(1, max_tokens // int(lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches


def _compile(template: str) -> Any:
    # A template may come from a stranger's file: the sandbox lets it format text and nothing else.
    try:
        compiled = ImmutableSandboxedEnvironment(keep_trailing_newline=True).from_string(template)
        probe = compiled.render(prompt="\x00")
    except TemplateError as error:
        raise SettingError(f"the template does not compile: {error}. Expected Jinja over {{{{ prompt }}}}.") from error
    if "\x00" not in probe:
        raise SettingError(f"the template {template!r} never shows {{{{ prompt }}}}.")
    return compiled
