"""From instructions to tokens: the mask of what is learned, and padded batches.

Rows are kept as one flat array of tokens with offsets, not as lists of lists: a pool of a million rows then
costs its tokens and nothing else, and no row's length is paid for by another's. A mask beside the tokens says which
are learned: in a conversation they are in the middle too. The tokens of a large pool stay on disk, memory-mapped.

A conversation is tokenised as one text, for a tokenizer may put the end of a prompt and the beginning of its response
into one token. Learned is what the tokenizer makes otherwise once the response is there.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .features import LoadingProgress
from .frames import PLAIN_TEMPLATE, ChatFrame, Frame, FramedRow, PlainFrame
from .pool import Instruction, Pool
from .store import Block, Column, TableForm, stored_table

__all__ = ["Batch", "EncodedRows", "Encoder", "collate", "token_batches"]

logger = logging.getLogger(__name__)

#: Rows that are given to the tokenizer at once.
ENCODING_BLOCK_ROWS = 4096

#: Counts up whenever the same rows would give other tokens.
SCHEMA_VERSION = 2

_COLUMNS = {
    "tokens": Column("int32", is_by_row=False),
    "is_label": Column("bool", is_by_row=False),
    "lengths": Column("int32"),
    "is_cut": Column("bool"),
}

#: What tells a tokenizer that puts nothing together: it has a token for each of these characters.
_PROBE = "What is 12 + 12?\n\nThe  answer is: 24."

#: A row's tokens before they are cut, and which are learned.
_Pair = tuple[list[int], list[bool]]


@dataclass(frozen=True, eq=False)
class EncodedRows:
    """Rows as tokens, end to end.

    Attributes:
        tokens: Token ids of all rows, shape (total,), int32.
        offsets: Where each row starts, and where the last one ends, shape (rows + 1,), int64.
        is_label: Tokens that belong to a response and are learned, shape (total,), bool; never a row's first.
        is_cut: Rows that were cut at the length limit, shape (rows,), bool.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    is_label: np.ndarray
    is_cut: np.ndarray

    @classmethod
    def of_lengths(cls, tokens: np.ndarray, lengths: np.ndarray, label_counts: np.ndarray) -> EncodedRows:
        """Return rows of such lengths whose last tokens, so many of each, are learned; both of shape (rows,)."""
        lengths = np.asarray(lengths, dtype=np.int64)
        places = np.arange(int(lengths.sum())) - np.repeat(lengths.cumsum(), lengths)  # -1 is a row's last
        is_label = places >= -np.repeat(np.asarray(label_counts, dtype=np.int64), lengths)
        return cls.of_mask(tokens, lengths, is_label)

    @classmethod
    def of_mask(
        cls, tokens: np.ndarray, lengths: np.ndarray, is_label: np.ndarray, is_cut: np.ndarray | None = None
    ) -> EncodedRows:
        """Return rows of such lengths, shape (rows,), with a mask of their tokens; None: no row was cut."""
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(tokens, offsets, is_label, np.zeros(len(lengths), dtype=bool) if is_cut is None else is_cut)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return one row's token ids, and which of them are learned, each of shape (length,)."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[part], self.is_label[part]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, shape (rows,), int64."""
        return np.diff(self.offsets)

    @cached_property
    def label_counts(self) -> np.ndarray:
        """Tokens of each row that are learned, shape (rows,), int64."""
        counts = np.zeros(len(self), dtype=np.int64)
        filled = np.flatnonzero(self.lengths)  # an empty row would be given the next one's first token
        if len(filled):
            counts[filled] = np.add.reduceat(self.is_label, self.offsets[filled], dtype=np.int64)
        return counts

    @cached_property
    def has_labels(self) -> np.ndarray:
        """Whether anything of a row's responses is left to learn, shape (rows,), bool."""
        return self.label_counts > 0

    @property
    def num_truncated(self) -> int:
        """Rows that were cut at the length limit."""
        return int(np.count_nonzero(self.is_cut))

    def select(self, rows: np.ndarray) -> EncodedRows:
        """Return some of the rows, given by number, as rows of their own."""
        pairs = [self.row(int(row)) for row in rows]
        tokens, is_label = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        return EncodedRows.of_mask(tokens, self.lengths[rows], is_label, self.is_cut[rows])


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
        template: A Jinja template of a prompt over the variables `prompt` and `system`; None takes the tokenizer's
            chat template, or `PLAIN_TEMPLATE` where there is none.

    Raises:
        SettingError: The template does not compile, or does not contain the prompt.
    """

    def __init__(self, tokenizer: Any, max_length: int, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.uses_chat_template = template is None and bool(getattr(tokenizer, "chat_template", None))
        self._frame: Frame = (
            ChatFrame(tokenizer)
            if self.uses_chat_template
            else PlainFrame(template or PLAIN_TEMPLATE, tokenizer.eos_token or "")
        )

    @property
    def description(self) -> str:
        """The frame as text."""
        return self._frame.description

    @property
    def key(self) -> dict[str, str | int]:
        """What tokens depend on besides rows, tokenizer and length: part of every cache key."""
        key: dict[str, str | int] = {"template": self.description}
        # Features that were kept when prompt and response were still tokenised apart are right where that is the same.
        return key if self._is_sum_of_parts else {**key, "encoding": SCHEMA_VERSION}

    def prompt_text(self, row: Instruction) -> str:
        """Return the text that stands before the last response.

        Raises:
            SettingError: The template refuses the row.
        """
        return self._frame.prompt_text(row)

    def encode(self, rows: Iterable[Instruction], *, what: str = "pool") -> EncodedRows:
        """Encode each row; its responses, and what ends them, are labels.

        A row of whose responses nothing is within `max_length` comes out without labels: see `has_labels`.

        Args:
            rows: The instructions.
            what: What they are, for the log.

        Raises:
            SettingError: The template refuses a row, or does not tell what the assistant says in it.
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
            SettingError: As `encode`.
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
        form = TableForm("tokens", key, _COLUMNS, len(pool), self._about_bytes(pool), check=self._check_stored)
        logger.info("encoding %d rows", len(pool))
        table = stored_table(form, lambda first: self._blocks(pool, first, progress), folder, in_memory=False)
        arrays = table.arrays
        rows = EncodedRows.of_mask(arrays["tokens"], arrays["lengths"], arrays["is_label"], arrays["is_cut"])
        _note_truncated(rows, "pool", self.max_length)
        return rows

    def _check_stored(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Check tokens from disk: those of all rows, as long as they may be, and known to the tokenizer.

        Raises:
            ValueError: They are something else.
        """
        tokens, lengths = arrays["tokens"], arrays["lengths"]
        if (lengths < 0).any() or (lengths > self.max_length + 1).any():
            raise ValueError("it has rows of another length")
        if not len(tokens) == len(arrays["is_label"]) == int(lengths.sum(dtype=np.int64)):
            raise ValueError("it has another number of tokens than its rows")
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) <= max(self.tokenizer.get_vocab().values()):
            raise ValueError("it has tokens that the tokenizer does not know")

    def encode_responses(self, rows: Iterable[Instruction], *, what: str = "pool") -> EncodedRows:
        """Encode each row's last response without what stands before it, for log P(y)."""
        rows = list(rows)
        start = self._start() or [self._end()]
        responses = [[*response, self._end()] for response in self._tokenize([row.response for row in rows])]
        pairs = [(start + own, [False] * len(start) + [True] * len(own)) for own in responses]
        return _joined([self._block(pairs)], what, self.max_length)

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
        texts = [self.prompt_text(row) for row in rows]
        prompts = [text.rstrip() for text in texts]
        wholes = self._tokenize([t + choice for t, row in zip(texts, rows, strict=True) for choice in row.choices])
        counts = [len(row.choices) for row in rows]
        before = np.repeat([len(tokens) for tokens in self._tokenize(prompts)], counts).astype(np.int64)
        label_counts = np.array([len(whole) for whole in wholes], dtype=np.int64) - before
        label_counts[(label_counts < 0) | (label_counts > self.max_length)] = 0
        start = [] if self._frame.has_start else self._start()
        kept = [(start + whole)[-(self.max_length + 1) :] for whole in wholes]
        lengths = np.array([len(tokens) for tokens in kept], dtype=np.int64)
        tokens = np.fromiter(itertools.chain.from_iterable(kept), dtype=np.int32, count=int(lengths.sum()))
        is_cut = np.array([len(start) + len(whole) > self.max_length + 1 for whole in wholes], dtype=bool)
        encoded = dataclasses.replace(EncodedRows.of_lengths(tokens, lengths, label_counts), is_cut=is_cut)
        _note_truncated(encoded, f"{what} choice", self.max_length)
        return encoded

    def encode_prompts(self, rows: Sequence[Instruction]) -> list[np.ndarray]:
        """Return what stands before each row's last response, uncut, to be gone on from: int32, shape (length,)."""
        start = [] if self._frame.has_start else self._start()
        prompts = self._tokenize([self.prompt_text(row) for row in rows])
        return [np.array(start + prompt, dtype=np.int32) for prompt in prompts]

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
        return self._block(self._pairs(rows))

    def _pairs(self, rows: Sequence[Instruction]) -> list[_Pair]:
        """Return each row's tokens before they are cut, and which are learned."""
        if isinstance(self._frame, ChatFrame) and self._frame.has_marks:
            end = [] if self._frame.end else [self._end()]
            return [(tokens + end, mask + [True] * len(end)) for tokens, mask in self._frame.marked(rows)]
        framed = self._frame.framed(rows)
        # What stands before each place where something learned begins or ends, one after the other for all rows.
        cuts = [[cut for span in row.spans for cut in span] for row in framed]
        beginnings = iter(
            self._tokenize([row.text[:cut] for row, own in zip(framed, cuts, strict=True) for cut in own])
        )
        wholes = self._tokenize([row.text for row in framed])
        return [
            self._masked(row, whole, [_common(next(beginnings), whole) for _ in own])
            for row, whole, own in zip(framed, wholes, cuts, strict=True)
        ]

    def _masked(self, row: FramedRow, tokens: list[int], cuts: list[int]) -> _Pair:
        """Return a row's tokens and mask for the tokens where what is learned begins and ends, in turns."""
        mask = [False] * len(tokens)
        for first, last in zip(cuts[::2], cuts[1::2], strict=True):
            mask[first:last] = [True] * max(0, last - first)
        start = [] if self._frame.has_start else self._start()
        end = [] if row.is_ended else [self._end()]
        return start + tokens + end, [False] * len(start) + mask + [True] * len(end)

    @functools.cached_property
    def _is_sum_of_parts(self) -> bool:
        """Whether a single exchange has the tokens of its prompt and of its response, one after the other."""
        row = Instruction(_PROBE, _PROBE)
        prompt, response = self._tokenize([self.prompt_text(row), _PROBE])
        start = [] if self._frame.has_start else self._start()
        tokens = [*start, *prompt, *response, self._end()]
        mask = [place >= len(start) + len(prompt) for place in range(len(tokens))]
        return len(response) == len(_PROBE) and self._pairs([row]) == [(tokens, mask)]

    def _about_bytes(self, pool: Pool) -> int:
        """Return about what a pool needs on disk, from some of its rows."""
        some = [pool[int(place)] for place in np.linspace(0, len(pool) - 1, 256)]
        block = self._encoded(some)
        return round(sum(array.nbytes for array in block.arrays.values()) / len(some) * len(pool))

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

    def _block(self, pairs: Sequence[_Pair]) -> Block:
        """Cut rows at the length limit, and put them end to end."""
        whole = np.array([len(tokens) for tokens, _ in pairs], dtype=np.int64)
        lengths = np.minimum(whole, self.max_length)
        total = int(lengths.sum())
        tokens = itertools.chain.from_iterable(own[: self.max_length] for own, _ in pairs)
        # Nothing stands before a row's first token to predict it by.
        masks = itertools.chain.from_iterable([False, *own[1 : self.max_length]] for _, own in pairs)
        arrays = {
            "tokens": np.fromiter(tokens, dtype=np.int32, count=total),
            "is_label": np.fromiter(masks, dtype=bool, count=total),
            "lengths": lengths,
            "is_cut": whole > self.max_length,
        }
        return Block(len(pairs), arrays)


def _common(some: list[int], others: list[int]) -> int:
    """Return with how many tokens both begin."""
    if others[: len(some)] == some:
        return len(some)
    pairs = enumerate(zip(some, others, strict=False))
    return next((place for place, (one, other) in pairs if one != other), len(others))


def _joined(blocks: Iterable[Block], what: str, max_length: int) -> EncodedRows:
    blocks = list(blocks)
    arrays = {name: np.concatenate([block.arrays[name] for block in blocks]) for name in _COLUMNS}
    rows = EncodedRows.of_mask(arrays["tokens"], arrays["lengths"], arrays["is_label"], arrays["is_cut"])
    _note_truncated(rows, what, max_length)
    return rows


def _note_truncated(rows: EncodedRows, what: str, max_length: int) -> None:
    if rows.num_truncated:
        logger.info("%d of %d %s rows were cut at %d tokens", rows.num_truncated, len(rows), what, max_length)


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
