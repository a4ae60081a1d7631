"""Arrays on disk: made block by block, gone on with after a kill, checked whenever they are opened.

What takes minutes or hours to compute for a large pool is kept in the cache folder as a *table*: a folder with one
raw binary file for each column, and `index.json`, which says what the columns were made of, and the SHA-256 of each.

Decisions:
    A table is made in a folder `NAME.partial` and gets its name when it is whole. After each block the index is
    replaced: what a kill leaves behind is cut back to the last block that the index knows, checked, and gone on with.

    Nothing on disk is trusted. A table that is torn, spoilt or foreign is named in the log and made again.

    Files are written by `write`, never through a memory map: a full disk is then an error with a message, and no
    signal that ends the process.

    Of two processes that want the same table one makes it, and the other waits and reads. The lock is the system's
    own on an open file: it ends with the process that holds it, and a lock file left behind locks nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from .errors import OutputError
from .files import clear_unfinished, write_json
from .foreign_files import check_regular, read_json

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["Block", "Column", "Table", "TableForm", "cache_folder", "stored_table"]

logger = logging.getLogger(__name__)

#: Counts up whenever tables are written in another way.
FORMAT = 1

_INDEX = "index.json"

#: How messages end that say that a table cannot be written.
ADVICE = "name a folder on another disk: cache_dir (--cache-dir) or $RAISE_ENV_CACHE"


@dataclass(frozen=True, slots=True)
class Column:
    """The form of one array: entries end to end, several a row or none as the table's maker has it.

    Attributes:
        dtype: Of its numbers.
        width: Numbers of one entry, for an array of shape (entries, width); None: shape (entries,).
        is_by_row: Whether each row has one entry.
    """

    dtype: str
    width: int | None = None
    is_by_row: bool = True

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry."""
        return np.dtype(self.dtype).itemsize * (1 if self.width is None else self.width)


@dataclass(frozen=True, slots=True)
class TableForm:
    """What a table shall hold.

    Attributes:
        name: What it is called in its file name, such as "features".
        key: Everything that its content depends on: plain JSON data.
        columns: Its arrays by name.
        num_rows: Rows when it is whole.
        num_bytes: About what it needs on disk then.
        counts: What its blocks count.
        check: Raises a ValueError where arrays from disk cannot be what was written, whatever their index says.
    """

    name: str
    key: Mapping[str, Any]
    columns: Mapping[str, Column]
    num_rows: int
    num_bytes: int
    counts: tuple[str, ...] = ()
    check: Callable[[Mapping[str, np.ndarray]], None] = lambda _: None

    @property
    def digest(self) -> str:
        """SHA-256 of the key, hexadecimal."""
        return hashlib.sha256(json.dumps({**self.key, "format": FORMAT}, sort_keys=True).encode()).hexdigest()

    @property
    def folder_name(self) -> str:
        """The name of its folder in the cache."""
        return f"{self.name}-{self.digest[:32]}"


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """The next rows of a table that is being made.

    Attributes:
        num_rows: How many.
        arrays: Their part of each column.
        counts: Whole numbers that are added up over all blocks.
    """

    num_rows: int
    arrays: Mapping[str, np.ndarray]
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A whole table: its arrays by name, read-only where they are memory-mapped, and its counts."""

    arrays: Mapping[str, np.ndarray]
    counts: Mapping[str, int]


#: Makes the blocks of a table from a row on.
BlockMaker = Callable[[int], Iterator[Block]]


def cache_folder(cache_dir: str | None) -> Path:
    """Return where tables are kept: as asked, else $RAISE_ENV_CACHE, else the user's cache folder."""
    if cache_dir is not None:
        return Path(cache_dir)
    if "RAISE_ENV_CACHE" in os.environ:
        return Path(os.environ["RAISE_ENV_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "raise-env"


def stored_table(form: TableForm, blocks: BlockMaker, folder: Path, *, in_memory: bool) -> Table:
    """Return a table from the cache, or make and keep it.

    Args:
        form: What it holds.
        blocks: Gives its blocks, in order, from the row on that it is called with; what it gives must not depend on
            which row that is.
        folder: The cache.
        in_memory: Read the arrays into memory; a folder that cannot be written then costs only the time saved.
            Otherwise they are memory-mapped, and the folder must be writable unless the table is there.

    Raises:
        OutputError: The table is not to be held in memory, and the folder cannot be written or has too little room.
    """
    path = folder / form.folder_name
    found = _read(path, form, in_memory)
    if found is not None:
        return found
    try:
        lock = _locked(path, form)
    except (OSError, NotImplementedError) as error:  # the second is filelock's, of a file system without locks
        _cannot_keep(form, folder, error, in_memory)
        return _joined(form, list(blocks(0)))
    try:
        # While this process waited, another may have made it.
        return _read(path, form, in_memory) or _make(path, form, blocks, in_memory)
    finally:
        lock.release()


def _locked(path: Path, form: TableForm) -> BaseFileLock:
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process makes the %s in %s; waiting for it", form.name, path)
        lock.acquire()
    return lock


def _make(path: Path, form: TableForm, blocks: BlockMaker, in_memory: bool) -> Table:
    """Make a table, write it as it grows, and return it; where it may not be written, it is made in memory."""
    writer: _Writer | None = None
    made: list[Block] = []
    try:
        try:
            writer = _Writer(path.with_name(f"{path.name}.partial"), form)
        except OSError as error:
            _cannot_keep(form, path.parent, error, in_memory)
        if writer is not None and in_memory:
            made += writer.earlier()
        for block in blocks(writer.num_rows if writer else 0):
            made += [block] if in_memory else []
            writer = _written(writer, block, form, path.parent, in_memory)
        if writer is not None:
            try:
                writer.finish(path)
            except OSError as error:
                _cannot_keep(form, path.parent, error, in_memory)
    finally:
        if writer is not None:
            writer.close()
    if in_memory:
        return _joined(form, made)
    table = _read(path, form, in_memory)
    if table is None:
        raise OutputError(f"the {form.name} in {path} changed as soon as they were written. Is the disk in order?")
    return table


def _written(writer: _Writer | None, block: Block, form: TableForm, folder: Path, in_memory: bool) -> _Writer | None:
    """Write a block, where anything is written at all; return the writer as long as it works."""
    if writer is None:
        return None
    try:
        writer.append(block)
    except OSError as error:
        writer.close()
        _cannot_keep(form, folder, error, in_memory)
        return None
    return writer


def _cannot_keep(form: TableForm, folder: Path, error: Exception, in_memory: bool) -> None:
    reason = getattr(error, "strerror", None) or str(error)
    if in_memory:
        message = "%s cannot be kept in %s (%s); they will be computed again next time"
        logger.warning(message, form.name, folder, reason)
        return
    raise OutputError(
        f"the {form.name} of {form.num_rows:,} rows cannot be kept in the cache folder {str(folder)!r} ({reason}); "
        f"they are too many for memory and need {_size(form.num_bytes)} of disk. Free it, or {ADVICE}. "
        "What was written so far is gone on with next time."
    ) from error


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e7 else f"{num_bytes / 1e6:.2f} MB"


def _joined(form: TableForm, blocks: list[Block]) -> Table:
    arrays = {
        name: np.concatenate([block.arrays[name] for block in blocks]) if blocks else _empty(column)
        for name, column in form.columns.items()
    }
    return Table(arrays, _summed(blocks))


def _empty(column: Column) -> np.ndarray:
    return np.zeros(0 if column.width is None else (0, column.width), dtype=column.dtype)


def _summed(blocks: list[Block]) -> dict[str, int]:
    names = dict.fromkeys(name for block in blocks for name in block.counts)
    return {name: sum(block.counts.get(name, 0) for block in blocks) for name in names}


# Reading


def _read(path: Path, form: TableForm, in_memory: bool) -> Table | None:
    """Return a whole table, or None where there is none that can be used."""
    if not os.path.lexists(path):
        return None
    try:
        index = _read_index(path, form)
        if index["num_rows"] != form.num_rows:
            raise ValueError("it is not whole")
        for name in form.columns:
            if (path / f"{name}.bin").stat().st_size != index["num_bytes"][name]:
                raise ValueError(f"{name}.bin is longer than what was written")
            with (path / f"{name}.bin").open("rb") as file:
                _check(name, hashlib.file_digest(file, "sha256").hexdigest(), index)
        arrays = {name: _array(path / f"{name}.bin", column, in_memory) for name, column in form.columns.items()}
        form.check(arrays)
        return Table(arrays, index["counts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error) or type(error).__name__
        logger.warning("%s in %s cannot be used (%s); computing them again", form.name, path, reason)
        return None


def _read_index(path: Path, form: TableForm) -> dict[str, Any]:
    """Return what a table's index says.

    Raises:
        OSError: There is none.
        ValueError: It is no index, or that of another table.
    """
    index = read_json(path / _INDEX)
    if not isinstance(index, dict) or index.get("digest") != form.digest:
        raise ValueError("its index is not that of what was asked for")
    parts = [index["sha256"], index["num_bytes"], index["counts"]]
    if not all(isinstance(part, dict) for part in parts) or not all(
        set(part) == set(form.columns) for part in parts[:2]
    ):
        raise ValueError("its index does not tell of every column")
    numbers = [index["num_rows"], *index["num_bytes"].values(), *index["counts"].values()]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("its index holds something other than counts")
    if index["num_rows"] > form.num_rows or (index["num_rows"] and not set(form.counts) <= set(index["counts"])):
        raise ValueError("its index is that of another table")
    for name, column in form.columns.items():
        _check_size(path / f"{name}.bin", column, index["num_bytes"][name], index["num_rows"])
    return index


def _check_size(path: Path, column: Column, num_bytes: int, num_rows: int) -> None:
    """Check before a file is read that it is as large as its index says, and that this is what its rows take."""
    if num_bytes % column.entry_bytes or (column.is_by_row and num_bytes != column.entry_bytes * num_rows):
        raise ValueError(f"{path.name} has another number of entries than there are rows")
    check_regular(path)
    if path.stat().st_size < num_bytes:
        raise ValueError(f"{path.name} is torn")


def _check(name: str, sha256: str, index: Mapping[str, Any]) -> None:
    if sha256 != index["sha256"][name]:
        raise ValueError(f"the content of {name}.bin is not what was written")


def _array(path: Path, column: Column, in_memory: bool) -> np.ndarray:
    shape = -1 if column.width is None else (-1, column.width)
    if path.stat().st_size == 0:
        return _empty(column)
    if in_memory:
        return np.fromfile(path, dtype=column.dtype).reshape(shape)
    # A plain array over the map: numpy's own class for maps makes each index a little slower.
    return np.asarray(np.memmap(path, dtype=column.dtype, mode="r")).reshape(shape)


# Writing


class _Writer:
    """A table in the making; whoever has one holds the table's lock."""

    def __init__(self, path: Path, form: TableForm) -> None:
        self._path = path
        self._form = form
        self._files: dict[str, IO[bytes]] = {}
        self._digests = {name: hashlib.sha256() for name in form.columns}
        self._sizes = dict.fromkeys(form.columns, 0)
        self.num_rows = 0
        self.counts: dict[str, int] = {}
        try:
            if os.path.lexists(path):
                clear_unfinished(path)
                self._go_on()
            else:
                self._start()
            self._require_room()
        except BaseException:
            self.close()
            raise

    def earlier(self) -> list[Block]:
        """Return what was found on disk, as one block."""
        if self.num_rows == 0:
            return []
        return [Block(self.num_rows, self._arrays(), dict(self.counts))]

    def _arrays(self) -> dict[str, np.ndarray]:
        columns = self._form.columns
        return {name: _array(self._path / f"{name}.bin", columns[name], in_memory=True) for name in columns}

    def append(self, block: Block) -> None:
        """Write a block, then the index that knows of it."""
        for name, column in self._form.columns.items():
            data = np.ascontiguousarray(block.arrays[name], dtype=column.dtype)
            content = data.reshape(-1).view(np.uint8).data
            file = self._files[name]
            written = 0
            while written < len(content):  # a full disk may take a part of it
                written += file.write(content[written:])
            os.fsync(file.fileno())  # the index shall know of nothing that is not on the disk
            self._digests[name].update(content)
            self._sizes[name] += len(content)
        self.num_rows += block.num_rows
        for name, count in block.counts.items():
            self.counts[name] = self.counts.get(name, 0) + int(count)
        self._write_index()

    def finish(self, path: Path) -> None:
        """Give the table its place; what was there could not be used."""
        assert self.num_rows == self._form.num_rows, (self.num_rows, self._form.num_rows)
        self.close()
        _remove(path)
        self._path.rename(path)

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files.values():
            file.close()

    def _start(self) -> None:
        self._path.mkdir(parents=True)
        for name in self._form.columns:
            self._files[name] = (self._path / f"{name}.bin").open("w+b", buffering=0)
        self._write_index()

    def _go_on(self) -> None:
        """Take up what was left behind, or start anew where it is not what its index says."""
        try:
            index = _read_index(self._path, self._form)
            for name in self._form.columns:
                self._take_up(name, index)
            if index["num_rows"]:
                self._form.check(self._arrays())
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error) or type(error).__name__
            logger.warning("%s begun in %s cannot be gone on with (%s); starting anew", *self._what(), reason)
            self.close()
            self._digests = {name: hashlib.sha256() for name in self._form.columns}
            self._sizes = dict.fromkeys(self._form.columns, 0)
            _remove(self._path)
            self._start()
            return
        self.num_rows, self.counts = index["num_rows"], dict(index["counts"])
        logger.info("%s in %s: going on after %d of %d rows", *self._what(), self.num_rows, self._form.num_rows)

    def _take_up(self, name: str, index: Mapping[str, Any]) -> None:
        size = index["num_bytes"][name]
        file = self._files[name] = (self._path / f"{name}.bin").open("r+b", buffering=0)
        left = size
        while left:
            part = file.read(min(left, 1 << 20))
            if not part:
                raise ValueError(f"{name}.bin is torn")
            self._digests[name].update(part)
            left -= len(part)
        _check(name, self._digests[name].hexdigest(), index)
        file.truncate(size)  # what the index does not know of was being written when the process ended
        self._sizes[name] = size

    def _what(self) -> tuple[str, Path]:
        return self._form.name, self._path

    def _require_room(self) -> None:
        needed = self._form.num_bytes - sum(self._sizes.values())
        free = shutil.disk_usage(self._path).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"{_size(needed)} more are needed, {_size(free)} are free")

    def _write_index(self) -> None:
        index = {
            "digest": self._form.digest,
            "num_rows": self.num_rows,
            "num_bytes": self._sizes,
            "sha256": {name: digest.hexdigest() for name, digest in self._digests.items()},
            "counts": self.counts,
            "key": dict(self._form.key),
        }
        write_json(self._path / _INDEX, index)


def _remove(path: Path) -> None:
    """Remove a folder, or whatever else has its name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
