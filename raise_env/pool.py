"""Instructions: kept apart from dev and test, put into classes, drawn as candidates.

Decisions:
    A row is its text. Two rows in which the same is said are the same instruction wherever they stand, so splits are
    compared by content hash, never by position or file.

    A row keeps every column it came with, so that what was selected can be written back as it was.

    A large pool is not held in memory. From `MAX_ROWS_IN_MEMORY` on its rows go into a temporary file as they are
    read, and come back from there one by one, when they are asked for.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import tempfile
import warnings
import weakref
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import DataError, OutputError, SettingError, excerpt
from .store import ADVICE

__all__ = [
    "MAX_ROWS_IN_MEMORY",
    "Instruction",
    "Pool",
    "SpilledRows",
    "sample_rows",
    "check_disjoint",
    "check_enough",
    "classes_hash",
    "kmeans_centres",
    "kmeans_classes",
    "nearest_centres",
    "draw_candidates",
]

#: A pool of more rows is large: rows, tokens and features are kept on disk, and classes come from a sample.
MAX_ROWS_IN_MEMORY = 50_000

#: Rows that are read from a temporary file at once.
_ROWS_AT_ONCE = 1024

#: The system text, the exchanges before and the right choice of a row that has none of them to be told.
_NO_CONTEXT: tuple[Any, ...] = ("", [], None)

#: K-means starts this often and the best end is kept: a single start often ends in a poor split.
KMEANS_STARTS = 4

#: An overlap names so many rows.
NUM_NAMED = 5


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction and the response that a model should learn to give.

    Args:
        prompt: What is asked, as plain text, before any chat template.
        response: What is trained on, or what the answer is compared with.
        choices: The answers to choose among, `response` one of them; empty where the answer is open.
        fields: The row as it was read, every column of it: plain JSON data.
        system: What the conversation is headed by; empty where there is no such text.
        earlier: The exchanges before, each what the user said and what was answered; they are trained on too.
        right: Which of the choices is the right one, from 0; None: the first that reads as the response does.
    """

    prompt: str
    response: str
    choices: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False, repr=False)
    system: str = ""
    earlier: tuple[tuple[str, str], ...] = ()
    right: int | None = None

    @property
    def right_choice(self) -> int:
        """The index of the right choice, -1 where the answer is open."""
        if not self.choices:
            return -1
        return self.choices.index(self.response) if self.right is None else self.right

    @property
    def exchanges(self) -> tuple[tuple[str, str], ...]:
        """All exchanges, the last one being prompt and response."""
        return (*self.earlier, (self.prompt, self.response))

    @property
    def content_hash(self) -> str:
        """SHA-256 of all that is said, hexadecimal: equal if and only if the texts are."""
        return self._digest().hex()

    @property
    def short_hash(self) -> int:
        """The content hash's first 64 bits: enough to tell a million rows apart."""
        return int.from_bytes(self._digest()[:8], "little")

    def _digest(self) -> bytes:
        text = f"{self.prompt}\x00{self.response}"
        if self.system or self.earlier:
            # JSON never holds a bare \x00: such a text is never that of a row with prompt and response alone.
            text = json.dumps([self.system, self.exchanges])
        return hashlib.sha256(text.encode()).digest()


class SpilledRows(Sequence[Instruction]):
    """Instructions in a temporary file that has no name: it goes when the last process that has it open ends.

    Rows are read at their own place in the file, never at a place that is shared, so that threads and processes do
    not disturb each other.

    Args:
        rows: The instructions; their fields are plain JSON data.
        folder: Where the file is; None, or a folder that cannot be written: where temporary files go.

    Raises:
        OutputError: The file cannot be written.
    """

    def __init__(self, rows: Iterable[Instruction], folder: Path | None = None) -> None:
        self._file, self._place = _temporary_file(folder)
        weakref.finalize(self, self._file.close)
        digest = hashlib.sha256()
        offsets = array("q", [0])
        for row in rows:
            content = _content(row)
            digest.update(content)
            # Two lines a row: JSON breaks none of its own.
            line = b"%s\n%s\n" % (content, json.dumps(row.fields).encode())
            self._write(line, offsets[-1])
            offsets.append(offsets[-1] + len(line))
        self._write(b"", offsets[-1])
        self.content_hash = digest.hexdigest()
        self._offsets = np.frombuffer(offsets, dtype=np.int64)  # (rows + 1,)

    @overload
    def __getitem__(self, index: int) -> Instruction: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Instruction, ...]: ...

    def __getitem__(self, index: int | slice) -> Instruction | tuple[Instruction, ...]:
        if isinstance(index, slice):
            places = range(*index.indices(len(self)))
            if places.step == 1:
                return tuple(self._read(places.start, places.stop))
            return tuple(self[place] for place in places)
        place = range(len(self))[index]
        return next(self._read(place, place + 1))

    def __iter__(self) -> Iterator[Instruction]:
        for start in range(0, len(self), _ROWS_AT_ONCE):
            yield from self._read(start, min(start + _ROWS_AT_ONCE, len(self)))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __reduce__(self) -> tuple[type[SpilledRows], tuple[tuple[Instruction, ...]]]:
        # Another process gets a file of its own.
        return SpilledRows, (tuple(self),)

    def _write(self, line: bytes, num_bytes: int) -> None:
        """Add a line after so many bytes; the empty one sees all others into the file."""
        try:
            self._file.write(line)
            if not line:
                self._file.flush()
        except OSError as error:
            raise OutputError(
                f"a pool of more than {MAX_ROWS_IN_MEMORY:,} rows is kept in a temporary file while it is in use, and "
                f"that cannot be written in {self._place!r} after {num_bytes / 1e9:.2f} GB ({error.strerror}). "
                f"Free some disk there, or {ADVICE}."
            ) from error

    def _read(self, start: int, stop: int) -> Iterator[Instruction]:
        first, last = int(self._offsets[start]), int(self._offsets[max(start, stop)])
        lines = os.pread(self._file.fileno(), last - first, first).split(b"\n")
        for content, fields in zip(lines[0:-1:2], lines[1::2], strict=True):
            told: list[Any] = json.loads(content)
            prompt, response, choices, system, earlier, right = (*told, *_NO_CONTEXT[len(told) - 3 :])
            exchanges = tuple((said, answered) for said, answered in earlier)
            yield Instruction(prompt, response, tuple(choices), json.loads(fields), system, exchanges, right)


def _temporary_file(folder: Path | None) -> tuple[IO[bytes], str]:
    """Return a file without a name, and the folder that it is in."""
    size = 1 << 20
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return tempfile.TemporaryFile(dir=folder, buffering=size), str(folder)
        except OSError:
            pass
    return tempfile.TemporaryFile(buffering=size), tempfile.gettempdir()


def _content(row: Instruction) -> bytes:
    """Return what a model can be taught by a row; JSON keeps the boundaries: ("ab", "c") and ("a", "bc") differ."""
    right = [] if row.right is None else [row.right]
    context = [row.system, row.earlier, *right] if row.system or row.earlier or right else []
    return json.dumps([row.prompt, row.response, row.choices, *context]).encode()


def _kept(
    rows: Iterable[Instruction], hashes: array[int], folder: Path | None
) -> tuple[Instruction, ...] | SpilledRows:
    """Return the rows in memory, or in a temporary file where they are many, and note a hash of each."""
    if isinstance(rows, SpilledRows):
        hashes.extend(row.short_hash for row in rows)
        return rows
    left = _hashed(rows, hashes)
    first = tuple(itertools.islice(left, MAX_ROWS_IN_MEMORY))
    following = next(left, None)
    return first if following is None else SpilledRows(itertools.chain(first, [following], left), folder)


def _hashed(rows: Iterable[Instruction], hashes: array[int]) -> Iterator[Instruction]:
    for row in rows:
        hashes.append(row.short_hash)
        yield row


class Pool(Sequence[Instruction]):
    """Instructions in the order of their source; an instruction's index is its pool id.

    Args:
        instructions: The rows, gone through once; of more than `MAX_ROWS_IN_MEMORY` none stays in memory.
        source: Where they were read from, or a name such as "embedded:default".
        numbers: Each row's line or row number in its file, from 1; None counts them in order.
        unit: What `numbers` counts, "line" or "row".
        parts: Of a folder, for each file the index of its first row, its name, and its unit.
        num_skipped: Rows of the source that were left out for want of a prompt or response.
        num_read: Rows of the source; None: those given and those left out.
        folder: Where the temporary file of a large pool is; None: where temporary files go.

    Raises:
        OutputError: That file cannot be written.
    """

    def __init__(
        self,
        instructions: Iterable[Instruction],
        source: str,
        *,
        numbers: Sequence[int] | None = None,
        unit: str = "row",
        parts: Sequence[tuple[int, str, str]] = (),
        num_skipped: int = 0,
        num_read: int | None = None,
        folder: Path | None = None,
    ) -> None:
        hashes = array("Q")
        self.instructions = _kept(instructions, hashes, folder)
        self.source = source
        self.parts = parts
        #: Rows that say what an earlier one has said.
        self.num_duplicates = len(hashes) - len(np.unique(np.array(hashes, dtype=np.uint64)))
        #: Rows that the source has, those included that were left out.
        self.num_read = len(self.instructions) + num_skipped if num_read is None else num_read
        self.numbers = range(1, len(self.instructions) + 1) if numbers is None else numbers
        self.unit = unit
        self.num_skipped = num_skipped
        #: Those of the columns named for it that the source has; none where it is not read by them.
        self.columns_found: frozenset[str] = frozenset()

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over all rows in order, choices included, other fields not: what a model can be taught by it."""
        if isinstance(self.instructions, SpilledRows):
            return self.instructions.content_hash
        digest = hashlib.sha256()
        for row in self.instructions:
            digest.update(_content(row))
        return digest.hexdigest()

    @property
    def is_large(self) -> bool:
        """Whether the rows, and what is computed of each, are kept on disk."""
        return isinstance(self.instructions, SpilledRows)

    def place(self, index: int) -> str:
        """Return where a row stands in the source, in words: "line 214", or "b.parquet, row 3" in a folder."""
        if not self.parts:
            return f"{self.unit} {self.numbers[index]}"
        _, name, unit = self.parts[bisect.bisect(self.parts, index, key=lambda part: part[0]) - 1]
        return f"{name}, {unit} {self.numbers[index]}"

    @overload
    def __getitem__(self, index: int) -> Instruction: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Instruction, ...]: ...

    def __getitem__(self, index: int | slice) -> Instruction | tuple[Instruction, ...]:
        return self.instructions[index]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions)

    def __len__(self) -> int:
        return len(self.instructions)

    def __repr__(self) -> str:
        return f"Pool({len(self)} rows, source={self.source!r})"


# Splits


def sample_rows(pool: Pool, count: int, seed: int) -> Pool:
    """Return a random part of a pool, each row at most once, in the order of the file.

    Args:
        pool: Where to draw from; it stands untouched.
        count: How many rows, from 1 to all of them.
        seed: The same seed gives the same rows.

    Raises:
        SettingError: The pool does not have so many rows, or none was asked for.
    """
    if not 1 <= count <= len(pool):
        raise SettingError(
            f"{count} rows were asked for of {pool.source}, which has {len(pool)}; "
            f"ask for a number from 1 to {len(pool)}, or leave it out to take all."
        )
    kept = np.sort(np.random.default_rng(seed).choice(len(pool), size=count, replace=False))
    parts = [(int(np.searchsorted(kept, first)), name, unit) for first, name, unit in pool.parts]
    return Pool(
        [pool[index] for index in kept],
        pool.source,
        numbers=[pool.numbers[index] for index in kept],
        unit=pool.unit,
        parts=parts,
        num_skipped=pool.num_skipped,
        num_read=pool.num_read,
    )


def check_disjoint(pool: Pool, dev: Pool, test: Pool | None) -> None:
    """Check that no row of one split is in another, by content hash.

    A dev row in the pool turns the reward into a reward for learning it by heart; a test row anywhere makes the
    result worthless.

    Raises:
        DataError: Rows occur in two splits; the first few are named for each two.
    """
    in_pool = _first_places(pool, [*dev, *(test or ())])  # one pass, however large the pool is
    faults = [_describe_overlap("dev set", dev, "pool", pool, in_pool)]
    if test is not None:
        faults.append(_describe_overlap("test set", test, "pool", pool, in_pool))
        faults.append(_describe_overlap("test set", test, "dev set", dev, _first_places(dev, test)))
    faults = [fault for fault in faults if fault]
    if faults:
        raise DataError(
            "\n".join([*faults, "Remove them from one of the two, or pass allow_overlap=True (--allow-overlap)."])
        )


def _first_places(pool: Pool, rows: Iterable[Instruction]) -> dict[str, int]:
    """Return for each of the rows that a pool has, by content hash, where it stands there first."""
    wanted = {row.content_hash for row in rows}
    first: dict[str, int] = {}
    for index, other in enumerate(pool):
        if (key := other.content_hash) in wanted:
            first.setdefault(key, index)
    return first


def _describe_overlap(name: str, rows: Pool, other_name: str, others: Pool, first: Mapping[str, int]) -> str:
    """Return a paragraph about the rows that are in both, `first` telling where in the other; or nothing."""
    shared = [(index, first[row.content_hash]) for index, row in enumerate(rows) if row.content_hash in first]
    if not shared:
        return ""
    count, verb = ("1 row", "is") if len(shared) == 1 else (f"{len(shared)} rows", "are")
    lines = [f"{count} of the {name} ({rows.source}) {verb} also in the {other_name} ({others.source}):"]
    for index, other_index in shared[:NUM_NAMED]:
        lines.append(f"  {rows.place(index)}, there {others.place(other_index)}: {excerpt(rows[index].prompt)}")
    if len(shared) > NUM_NAMED:
        lines.append(f"  and {len(shared) - NUM_NAMED} more")
    return "\n".join(lines)


# Classes and candidates


def check_enough(pool_size: int, num_candidates: int) -> None:
    """Check that a pool can offer as many candidates as one step asks for.

    Raises:
        SettingError: The pool is smaller.
    """
    if pool_size < num_candidates:
        raise SettingError(
            f"num_candidates is {num_candidates}, but the pool has {pool_size} rows; "
            f'expected at most as many candidates as rows. Set num_candidates={pool_size} or less, or "all".'
        )


def kmeans_classes(features: ArrayLike, num_classes: int, seed: int) -> NDArray[np.int64]:
    """Return the K-means class of every row, the same on every run with the same seed.

    RAISE classes the pool once, before training, and selects the same number from each class; which features and
    which seed it does not say.

    Args:
        features: What rows are alike in, shape (num_rows, num_features), finite; taken as float32.
        num_classes: How many classes, from 1 to the number of rows.
        seed: Seeds the starting centres.

    Returns:
        Class ids, shape (num_rows,), from 0 up to, not with, `num_classes`. Where fewer rows than that are
        distinct, some classes are empty.

    Raises:
        SettingError: There are fewer rows than classes.
    """
    fitted = _fitted_kmeans(features, num_classes, seed)
    if fitted is None:
        return np.zeros(len(np.asarray(features)), dtype=np.int64)
    return np.asarray(fitted.labels_, dtype=np.int64)


def kmeans_centres(features: ArrayLike, num_classes: int, seed: int) -> NDArray[np.float32]:
    """Return the centres of K-means over a sample of rows, for a pool that is too large to be classed whole.

    Args:
        features: As for `kmeans_classes`.
        num_classes: As for `kmeans_classes`.
        seed: As for `kmeans_classes`.

    Returns:
        The centres, shape (num_classes, num_features).

    Raises:
        SettingError: As for `kmeans_classes`.
    """
    fitted = _fitted_kmeans(features, num_classes, seed)
    if fitted is None:
        return np.zeros((1, np.shape(features)[1]), dtype=np.float32)
    return np.asarray(fitted.cluster_centers_, dtype=np.float32)


def nearest_centres(features: NDArray[np.float32], centres: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the number of each row's nearest centre, shape (rows,); it depends on no other row, to the bit."""
    # Differences and sums of their own for each row: a matrix product may add up in another order with other rows.
    distances = np.stack([((features - centre) ** 2).sum(axis=1) for centre in centres], axis=1)
    return np.asarray(distances.argmin(axis=1), dtype=np.int64)


def _fitted_kmeans(features: ArrayLike, num_classes: int, seed: int) -> Any:
    """Return scikit-learn's K-means, fitted; None for a single class, which needs no library."""
    rows = np.ascontiguousarray(features, dtype=np.float32)
    if len(rows) < num_classes:
        raise SettingError(
            f"num_classes is {num_classes}, but there are only {len(rows)} rows to class; "
            f"set num_classes={max(1, len(rows))} or less, or take a larger pool."
        )
    if num_classes == 1:
        return None

    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    kmeans = KMeans(n_clusters=num_classes, n_init=KMEANS_STARTS, random_state=seed)
    # One thread: several add up their parts of a centre in the order in which they finish, and float32 sums then
    # differ from run to run (scikit-learn, issue 27518).
    with threadpool_limits(limits=1), warnings.catch_warnings():
        # Repeated rows leave fewer distinct points than classes. The labels are right all the same, and the
        # user has nothing to do: classes that stay empty are padded when candidates are drawn.
        warnings.filterwarnings("ignore", "Number of distinct clusters", ConvergenceWarning)
        return kmeans.fit(rows)


def classes_hash(classes: NDArray[np.int64]) -> str:
    """Return the first 16 digits of a SHA-256 over the class of every row: what is drawn by class depends on all."""
    return hashlib.sha256(np.asarray(classes, dtype="<i8").tobytes()).hexdigest()[:16]


def draw_candidates(
    members: Sequence[NDArray[np.int64]], num_candidates: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw the candidates of one step: the same number from each class, without replacement, class by class.

    Args:
        members: The pool ids of each class; a class may be empty.
        num_candidates: N, a multiple of the number of classes C.
        rng: The environment's own generator; it moves on.

    Returns:
        The pool ids, shape (N,), in the order drawn: N/C of class 0, then N/C of class 1, and so on. A class with
        fewer members gives all of them and ends in -1.
        The class of each place, shape (N,), padding included.
    """
    assert num_candidates % len(members) == 0, (num_candidates, len(members))
    quota = num_candidates // len(members)
    candidates = np.full((len(members), quota), -1, dtype=np.int64)
    for block, ids in zip(candidates, members, strict=True):
        count = min(quota, len(ids))
        # Drawing places instead of shuffling the class: a million rows cost no more than a hundred.
        block[:count] = ids[rng.choice(len(ids), size=count, replace=False)]
    return candidates.reshape(-1), np.repeat(np.arange(len(members), dtype=np.int64), quota)
