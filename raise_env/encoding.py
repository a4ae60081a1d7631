"""From instructions to tokens: the prompt's frame, the mask of what is learned, and padded batches.

Rows are kept as one flat array of tokens with offsets, not as lists of lists: a pool of a million rows then
costs its tokens and nothing else, and no row's length is paid for by another's. What is learned of a row is its
end, so that a count says which tokens that is. The tokens of a large pool stay on disk, memory-mapped.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import SettingError
from .features import LoadingProgress
from .pool import Instruction, Pool
from .store import Block, Column, TableForm, stored_table

__all__ = ["PLAIN_TEMPLATE", "Batch", "EncodedRows", "Encoder", "collate", "token_batches"]

logger = logging.getLogger(__name__)

#: The frame for base models whose tokenizer has no chat template.
PLAIN_TEMPLATE = "### Instruction:\n{{ prompt }}\n\n### Response:\n"

#: Rows that are given to the tokenizer at once.
ENCODING_BLOCK_ROWS = 4096

#: Counts up whenever the same rows would give other tokens.
SCHEMA_VERSION = 1

_COLUMNS = {"tokens": Column("int32"), "lengths": Column("int32"), "label_counts": Column("int32")}


@dataclass(frozen=True, eq=False)
class EncodedRows:
    """Rows as tokens, end to end.

    Attributes:
        tokens: Token ids of all rows, shape (total,), int32.
        offsets: Where each row starts, and where the last one ends, shape (rows + 1,), int64.
        label_counts: Tokens at the end of each row that belong to its response and are learned, shape (rows,), int64.
        num_truncated: Rows that were cut at the length limit.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    label_counts: np.ndarray
    num_truncated: int = 0

    @classmethod
    def of_lengths(
        cls, tokens: np.ndarray, lengths: np.ndarray, label_counts: np.ndarray, num_truncated: int = 0
    ) -> EncodedRows:
        """Return rows of such lengths, shape (rows,)."""
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(tokens, offsets, label_counts.astype(np.int64), num_truncated)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return one row's token ids, and which of them are learned, each of shape (length,)."""
        tokens = self.tokens[self.offsets[index] : self.offsets[index + 1]]
        return tokens, np.arange(len(tokens)) >= len(tokens) - self.label_counts[index]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, shape (rows,), int64."""
        return np.diff(self.offsets)

    @cached_property
    def has_labels(self) -> np.ndarray:
        """Whether anything of a row's response is left to learn, shape (rows,), bool."""
        return self.label_counts > 0

    def select(self, rows: np.ndarray) -> EncodedRows:
        """Return some of the rows, given by number, as rows of their own."""
        tokens = [self.row(int(row))[0] for row in rows]
        return EncodedRows.of_lengths(np.concatenate(tokens), self.lengths[rows], self.label_counts[rows])


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
        return self._prompt_texts([prompt])[0]

    def encode(self, rows: Iterable[Instruction], *, what: str = "pool") -> EncodedRows:
        """Encode prompt and response of each row; the response and the end token are labels.

        A row whose prompt alone fills `max_length` comes out without labels: see `has_labels`.

        Args:
            rows: The instructions.
            what: What they are, for the log.
        """
        return _joined(self._blocks(rows), what, self.max_length)

    def encode_pool(
        self, pool: Pool, tokenizer_key: str, folder: Path, progress: LoadingProgress | None = None
    ) -> EncodedRows:
        """Encode a pool as `encode` does; the tokens of a large one are kept in a folder and memory-mapped.

        Args:
            pool: The rows.
            tokenizer_key: A content hash that changes with the tokenizer.
            folder: The cache.
            progress: Is told of a large pool, after each block, how many rows are done.

        Raises:
            OutputError: The pool is large, and the folder cannot be written or has too little room.
        """
        if not pool.is_large:
            return self.encode(pool)
        key = {
            "pool": pool.content_hash,
            "tokenizer": tokenizer_key,
            "template": self.description,
            "max_length": self.max_length,
            "schema": SCHEMA_VERSION,
        }
        form = TableForm("tokens", key, _COLUMNS, len(pool), self._about_bytes(pool))
        logger.info("encoding %d rows", len(pool))
        table = stored_table(form, lambda first: self._blocks(pool, first, progress), folder, in_memory=False)
        arrays, num_truncated = table.arrays, table.counts["num_truncated"]
        _note_truncated(num_truncated, len(pool), "pool", self.max_length)
        return EncodedRows.of_lengths(arrays["tokens"], arrays["lengths"], arrays["label_counts"], num_truncated)

    def encode_responses(self, rows: Iterable[Instruction], *, what: str = "pool") -> EncodedRows:
        """Encode each row's response without its prompt, for log P(y)."""
        rows = list(rows)
        start = self._start() or [self._end()]
        return _joined([self._block([start] * len(rows), self._responses(rows))], what, self.max_length)

    def encode_choices(self, rows: Sequence[Instruction], *, what: str = "pool") -> EncodedRows:
        """Encode every choice of every row behind its prompt, without an end token: the choice alone is labels.

        The rule is lm-eval's (0.4.13, `_encode_pair` in `lm_eval/api/model.py`, `_loglikelihood_tokens` in
        `models/huggingface.py`). White space at the prompt's end goes to the choice; prompt and choice are tokenized
        as one text, and what follows as many tokens as the prompt alone has is the choice. Too long a prompt loses its
        beginning: `max_length` tokens go in, and the last token of a row, which only has to be predicted, is one more.

        A choice that gives no tokens, or more than `max_length`, comes out without labels: see `has_labels`.

        Args:
            rows: The instructions.
            what: Whose choices they are, for the log.
        """
        texts = self._prompt_texts([row.prompt for row in rows])
        prompts = [text.rstrip() for text in texts]
        wholes = self._tokenize([t + choice for t, row in zip(texts, rows, strict=True) for choice in row.choices])
        counts = [len(row.choices) for row in rows]
        before = np.repeat([len(tokens) for tokens in self._tokenize(prompts)], counts).astype(np.int64)
        label_counts = np.array([len(whole) for whole in wholes], dtype=np.int64) - before
        label_counts[(label_counts < 0) | (label_counts > self.max_length)] = 0
        start = [] if self.uses_chat_template else self._start()
        kept = [(start + whole)[-(self.max_length + 1) :] for whole in wholes]
        lengths = np.array([len(tokens) for tokens in kept], dtype=np.int64)
        num_truncated = sum(len(start) + len(whole) > self.max_length + 1 for whole in wholes)
        _note_truncated(num_truncated, len(kept), f"{what} choice", self.max_length)
        tokens = np.fromiter(itertools.chain.from_iterable(kept), dtype=np.int32, count=int(lengths.sum()))
        return EncodedRows.of_lengths(tokens, lengths, label_counts, num_truncated)

    def _blocks(
        self, rows: Iterable[Instruction], first: int = 0, progress: LoadingProgress | None = None
    ) -> Iterator[Block]:
        """Yield the rows from a number on as tokens, some thousand at once."""
        rows = rows if isinstance(rows, Sequence) else list(rows)
        for start in range(first, len(rows), ENCODING_BLOCK_ROWS):
            stop = min(start + ENCODING_BLOCK_ROWS, len(rows))
            yield self._encoded(rows[start:stop])
            if progress is not None:
                progress("encoding the pool", stop, len(rows))

    def _encoded(self, rows: Sequence[Instruction]) -> Block:
        prompts = self._tokenize(self._prompt_texts([row.prompt for row in rows]))
        if not self.uses_chat_template:
            start = self._start()
            prompts = [start + prompt for prompt in prompts]
        return self._block(prompts, self._responses(rows))

    def _prompt_texts(self, prompts: list[str]) -> list[str]:
        if self._render is not None:
            return [str(self._render.render(prompt=prompt)) for prompt in prompts]
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return list(self.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True))

    def _about_bytes(self, pool: Pool) -> int:
        """Return about what a pool needs on disk, from some of its rows."""
        some = [pool[int(place)] for place in np.linspace(0, len(pool) - 1, 256)]
        block = self._encoded(some)
        return round(sum(array.nbytes for array in block.arrays.values()) / len(some) * len(pool))

    def _responses(self, rows: Sequence[Instruction]) -> list[list[int]]:
        return [[*response, self._end()] for response in self._tokenize([row.response for row in rows])]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose: rows longer than the model takes are cut here, so a warning about them would be wrong.
        # The mask is never read, and costs more time than the tokens.
        settings = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return list(self.tokenizer(texts, **settings)["input_ids"])

    def _start(self) -> list[int]:
        token = self.tokenizer.bos_token_id
        return [] if token is None else [int(token)]

    def _end(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def _block(self, prompts: list[list[int]], responses: list[list[int]]) -> Block:
        """Put each response behind its prompt, and cut both at the length limit."""
        pairs = list(zip(prompts, responses, strict=True))
        rows = [(prompt + response)[: self.max_length] for prompt, response in pairs]
        whole = np.array([[len(prompt), len(response)] for prompt, response in pairs]).reshape(-1, 2)
        lengths = np.minimum(whole.sum(1), self.max_length)
        arrays = {
            "tokens": np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int32, count=int(lengths.sum())),
            "lengths": lengths,
            "label_counts": np.maximum(lengths - whole[:, 0], 0),
        }
        return Block(len(rows), arrays, {"num_truncated": int((whole.sum(1) > self.max_length).sum())})


def _joined(blocks: Iterable[Block], what: str, max_length: int) -> EncodedRows:
    blocks = list(blocks)
    tokens, lengths, label_counts = (np.concatenate([block.arrays[name] for block in blocks]) for name in _COLUMNS)
    num_truncated = sum(block.counts["num_truncated"] for block in blocks)
    _note_truncated(num_truncated, len(lengths), what, max_length)
    return EncodedRows.of_lengths(tokens, lengths, label_counts, num_truncated)


def _note_truncated(num_truncated: int, num_rows: int, what: str, max_length: int) -> None:
    if num_truncated:
        logger.info("%d of %d %s rows were cut at %d tokens", num_truncated, num_rows, what, max_length)


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
