"""From a file to rows, each a mapping of columns to plain JSON data, with its number in the file.

A fault is named by file, line and column. Rows are read one by one; only a .json file, being one value, has to fit into
memory. What JSON cannot say becomes what it can: NaN and infinity become None, bytes the text that they spell, a date
or a decimal its usual text, marked as `Rendered` so that it is not taken for one that somebody wrote.

A packed file may be far smaller than what it holds. What grows to more than `MOST_GROWTH` times its size may hold
`foreign_files.max_bytes` at most: a real file is packed less tightly, and may be as large as it will.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import math
import re
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeGuard

from .errors import DataError, RaiseEnvError, describe, excerpt
from .foreign_files import MAX_BYTES_VARIABLE, lines_of, max_bytes, parse_json

__all__ = [
    "ENDINGS",
    "MOST_GROWTH",
    "UNITS",
    "Rendered",
    "Row",
    "check_file",
    "check_halves",
    "is_readable",
    "is_text",
    "plain_row",
    "rows_of_file",
    "unit_of",
]

#: How the rows of each kind of file are counted, from 1: by line where an editor can go to it.
UNITS = {".jsonl": "line", ".json": "row", ".csv": "line", ".parquet": "row"}

#: What a file may end in.
ENDINGS = (*UNITS, *(f"{ending}.gz" for ending in UNITS if ending != ".parquet"))

#: The columns of MMLU's files, which have no header (Hendrycks et al. 2021).
MMLU_COLUMNS = ["question", "A", "B", "C", "D", "answer"]

#: What one of the cells is in any header, whatever letter it ends in.
_HEADER_CELLS = frozenset({"question", "prompt", "answer"})

#: How many times its size a packed file may hold, where that is much.
MOST_GROWTH = 100

#: Empty lines one after the other: more are no data, and take minutes to skip.
_MOST_BLANK = 200_000

#: What is unpacked at once.
_PIECE = 1 << 20

#: What a parquet file's rows are read by: so many at once, and fewer where they may be large.
_ROWS_AT_ONCE = 1024
_BYTES_AT_ONCE = 2**32

#: What a torn parquet file, its dates and time zones too, can make Python itself stumble over.
_PARQUET_ERRORS = (ArithmeticError, LookupError, MemoryError, OSError, RecursionError, TypeError, ValueError)

#: The beginning of JSON's escapes for halves of pairs.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")

#: Held while the limit of csv, which is one for all of a process, is another.
_FIELD_LIMIT_LOCK = threading.Lock()

Row = dict[str, Any]


class Rendered(str):
    """The usual text of a table's value that is none, such as a date or a decimal."""

    __slots__ = ()


def is_text(value: object) -> TypeGuard[str]:
    """Return whether a value is a text that somebody wrote."""
    return isinstance(value, str) and not isinstance(value, Rendered)


def is_readable(path: Path) -> bool:
    """Return whether a file of this name is one of those that can be read."""
    return path.name.lower().endswith(ENDINGS)


def unit_of(path: str) -> str:
    """Return what the rows of a file are counted in."""
    return UNITS[_kind(path)]


def check_file(source: str) -> None:
    """Check that there is such a file, and that its ending is one of `ENDINGS`.

    Raises:
        DataError: It is not so.
    """
    path = Path(source)
    if not path.exists():
        looked = "" if path.is_absolute() else f" (looked in {Path.cwd()})"
        raise DataError(f"{source}: there is no such file{looked}. Check the path.")
    # A pipe could be read only once, and would block where nobody writes into it.
    if not path.is_file():
        raise DataError(f"{source}: is not a regular file. Write its content to a file first.")
    if not is_readable(path):
        raise DataError(
            f"{source}: found the ending {path.suffix!r}; expected one of {', '.join(ENDINGS)}. "
            "Convert the file, or give it the ending that its content has."
        )


def _kind(source: str) -> str:
    return Path(source.lower().removesuffix(".gz")).suffix


def rows_of_file(source: str) -> Generator[tuple[int, Row]]:
    """Yield each row's number in the file, from 1, and the row.

    Args:
        source: A file that `check_file` has nothing against.

    Raises:
        DataError: It cannot be read, or a row is at fault.
    """
    readers = {".jsonl": _rows_of_jsonl, ".json": _rows_of_json, ".csv": _rows_of_csv, ".parquet": _rows_of_parquet}
    try:
        yield from readers[_kind(source)](source)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{source}: cannot be unpacked ({error}). Is it whole, and made by gzip?") from error
    except OSError as error:
        raise DataError(
            f"{source}: cannot be read ({error.strerror or error}). Check its name, its rights and its disk."
        ) from error


def _rows_of_jsonl(source: str) -> Generator[tuple[int, Row]]:
    advice = "Expected one JSON object a line. A file that is one JSON list ends in .json."
    with contextlib.closing(_lines(source)) as lines:
        for number, line in enumerate(lines, start=1):
            # Without its newline, or a line that breaks off would be reported as the next one.
            text = line.rstrip("\r\n")
            if text.strip():
                where = f"{source}, line {number}"
                row = _check_object(_parse(text, source, number, advice), where, advice)
                if _HALF.search(text):
                    _check_whole(row, where)
                # One copy of each column's name instead of one a row.
                yield number, {sys.intern(name): value for name, value in row.items()}


def _rows_of_json(source: str) -> Generator[tuple[int, Row]]:
    advice = "Expected one JSON list of objects. A file with one JSON object a line ends in .jsonl."
    text = "".join(_lines(source))
    rows = _parse(text, source, 1, advice) if text.strip() else []
    if not isinstance(rows, list):
        raise DataError(f"{source}: found {describe(rows)} at the top. {advice}")
    has_halves = bool(_HALF.search(text))
    for number, row in enumerate(rows, start=1):
        where = f"{source}, row {number}"
        if has_halves:
            _check_whole(_check_object(row, where, advice), where)
        yield number, _check_object(row, where, advice)


def _rows_of_csv(source: str) -> Generator[tuple[int, Row]]:
    columns: list[str] = []
    number = 1
    try:
        with contextlib.closing(_lines(source)) as lines:
            # Strict: a quote that is never closed would otherwise swallow the rest of the file as one answer.
            reader = csv.reader(lines, strict=True)
            while (cells := _next_cells(reader)) is not None:
                if cells and not columns:
                    has_header = not _is_mmlu(cells)
                    columns = _check_columns(cells, source) if has_header else MMLU_COLUMNS
                    cells = [] if has_header else cells
                if cells:
                    yield number, _csv_row(columns, cells, f"{source}, line {number}")
                # A quoted cell may run over many lines: a row is named by its first.
                number = reader.line_num + 1
    except csv.Error as error:
        where = f"{source}, line {number}"
        if "field limit" in str(error):
            raise DataError(
                f"{where}: found a cell of more than {max_bytes():,} characters; expected fewer. Look for a quote that "
                f"is not closed; if the cell is meant to be so long, raise ${MAX_BYTES_VARIABLE}."
            ) from error
        raise DataError(
            f"{where}: found a broken row ({error}); expected cells between commas, those that hold "
            'commas, quotes or line breaks in "quotes" and quotes in them doubled. Mend the row, or use .jsonl.'
        ) from error


def _next_cells(reader: Iterator[list[str]]) -> list[str] | None:
    """Return the next row of a .csv, with cells as long as `max_bytes` allows; None at the end."""
    with _FIELD_LIMIT_LOCK:
        usual = csv.field_size_limit(max_bytes())
        try:
            return next(reader, None)
        finally:
            csv.field_size_limit(usual)


def _is_mmlu(cells: list[str]) -> bool:
    """Return whether a file's first row is a question with four choices and a letter, as in MMLU's files."""
    is_header = not _HEADER_CELLS.isdisjoint(cell.strip().casefold() for cell in cells)
    return len(cells) == len(MMLU_COLUMNS) and cells[-1] in MMLU_COLUMNS[1:-1] and not is_header


def _csv_row(columns: list[str], cells: list[str], where: str) -> Row:
    if len(cells) != len(columns):
        raise DataError(
            f"{where}: found {len(cells)} cells; expected {len(columns)}, one for each of "
            f"{excerpt(', '.join(columns), 300)}. Put cells that hold commas in quotes."
        )
    return dict(zip(columns, cells, strict=True))


def _rows_of_parquet(source: str) -> Generator[tuple[int, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source) as table:
            _check_columns(table.schema_arrow.names, source)
            number, growth = 0, _Growth(source)
            size, num_rows = Path(source).stat().st_size, _rows_at_once(table.metadata, growth)
            for batch in table.iter_batches(batch_size=num_rows):
                for row in batch.to_pylist():
                    number += 1
                    growth.add(_length(row), size)
                    yield number, plain_row(row, f"{source}, row {number}")
    # Of what is torn or made to mislead, dates and time zones too, Python's own errors come through.
    except (pa.ArrowException, *_PARQUET_ERRORS) as error:
        if isinstance(error, RaiseEnvError):
            raise
        raise DataError(
            f"{source}: cannot be read as parquet ({excerpt(str(error), 200)}). "
            "Write the file again, or give it the ending that its content has."
        ) from error


def _rows_at_once(metadata: Any, growth: _Growth) -> int:
    """Return how many rows may be read together, by what the file says of its parts.

    Raises:
        DataError: It says that it holds much more than there is room for in it.
    """
    sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    growth.add(max(0, *sizes, 0), Path(growth.source).stat().st_size, is_all=False)
    # A value may be as large as all of its part, and stand in each row.
    return int(max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE // max(1, *sizes, 1))))


def _length(value: Any) -> int:
    """Return about how many characters a table's value has: one that is stored once may stand in each row."""
    if isinstance(value, dict):
        return sum(map(_length, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_length, value)) + len(value)
    return len(value) if isinstance(value, (str, bytes)) else 8


def plain_row(row: Mapping[str, Any], where: str) -> Row:
    """Return a table's row as JSON can hold it.

    Args:
        row: Its columns.
        where: Where it stands, for messages.

    Raises:
        DataError: Bytes in it are no text.
    """
    columns: Row = {}
    for name, value in row.items():
        try:
            columns[str(name)] = _plain(value)
        except UnicodeDecodeError as error:
            byte = f"0x{error.object[error.start]:02x} at byte {error.start + 1}"
            raise DataError(
                f"{where}, field {str(name)!r}: found bytes that are no text ({byte}); expected UTF-8. "
                "Store the column as text, or leave it out of the table."
            ) from error
    return columns


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.decode()
    return value if value is None or isinstance(value, (str, int)) else Rendered(value)


def _check_columns(columns: list[str], source: str) -> list[str]:
    twice = next((column for column, count in Counter(columns).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{source}: found the column {twice!r} twice; expected each once. Rename or remove one.")
    return columns


def _check_object(row: Any, where: str, advice: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where}: found {describe(row)}. {advice}")
    return row


def _check_whole(value: Any, where: str) -> None:
    """Check that the texts of a row can be written again: JSON's escapes can spell one half of a pair."""
    waiting: list[tuple[Any, str]] = [(value, "")]
    while waiting:
        item, field = waiting.pop()
        if isinstance(item, dict):
            waiting += [(entry, field or str(name)) for name, entry in item.items()]
            waiting += [(name, field or "its name") for name in item]
        elif isinstance(item, list):
            waiting += [(entry, field) for entry in item]
        elif isinstance(item, str):
            check_halves(item, f"{where}, field {field!r}")


def check_halves(text: str, where: str) -> None:
    """Check that a text has no half of a pair.

    Raises:
        DataError: It has; no tokenizer takes it, and no file.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(
            f"{where}: found {half} at character {error.start + 1}, one half of a pair; expected whole characters. "
            "Write the pair, or the character itself."
        ) from error


def _parse(text: str, source: str, line: int, advice: str) -> Any:
    """Return what a JSON text says; its first line is number `line` of the file."""
    try:
        # NaN and Infinity are Python's, not JSON's; what is selected must be writable as JSON again.
        return parse_json(text, parse_constant=lambda _: None, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{source}, line {line + error.lineno - 1}, column {error.colno}: found broken JSON ({error.msg}). {advice}"
        ) from error
    except ValueError as error:
        raise DataError(f"{source}, line {line}: found {error}. {advice}") from error


def _finite(text: str) -> float | None:
    """Return a number; 1e999 is one to JSON, and infinity to Python."""
    value = float(text)
    return value if math.isfinite(value) else None


class _Growth:
    """Watches how much comes out of a packed file.

    Args:
        source: The file.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._limit = max_bytes()
        self._held = 0

    def add(self, num_bytes: int, packed: int, *, is_all: bool = True) -> None:
        """Note what has come out, of so many packed bytes in all.

        Raises:
            DataError: It is too much for so little.
        """
        held = self._held + num_bytes
        if is_all:
            self._held = held
        if held > self._limit and held > MOST_GROWTH * packed:
            raise DataError(
                f"{self.source}: found more than {self._limit:,} bytes packed into {packed:,}; expected at most "
                f"{MOST_GROWTH} times as many, as in real data. If it is meant to hold so much, raise "
                f"${MAX_BYTES_VARIABLE}, or unpack it."
            )


class _Unpacked(io.RawIOBase):
    """The content of a .gz, as far as it does not grow out of measure."""

    def __init__(self, source: str, packed: IO[bytes]) -> None:
        super().__init__()
        self._packed = packed
        self._file = gzip.GzipFile(fileobj=packed)
        self._growth = _Growth(source)

    def readable(self) -> bool:
        """Return that it is there to be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Unpack as much as there is room for."""
        content = self._file.read(len(buffer))
        self._growth.add(len(content), self._packed.tell())
        buffer[: len(content)] = content
        return len(content)


def _lines(source: str) -> Generator[str]:
    """Yield a text file's lines with their endings, decoded one by one so that an error knows its line."""
    with open(source, "rb") as file:
        is_packed = source.lower().endswith(".gz")
        content = io.BufferedReader(_Unpacked(source, file), _PIECE) if is_packed else file
        number = num_blank = 0
        try:
            for number, line in enumerate(lines_of(content), start=1):
                num_blank = num_blank + 1 if len(line) < 3 and not line.strip() else 0
                if num_blank > _MOST_BLANK:
                    raise ValueError(f"found more than {_MOST_BLANK:,} empty lines up to line {number:,}; remove them")
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise DataError(
                f"{source}, line {number}: found the byte 0x{byte:02x}; expected UTF-8. "
                "Save the file again with the encoding UTF-8."
            ) from error
        except ValueError as error:
            if isinstance(error, RaiseEnvError):
                raise
            raise DataError(f"{source}: {error}.") from error
