"""From what a pool, dev or test set is called to its rows: a file, a folder of files, or a data set of the hub."""

from __future__ import annotations

import contextlib
import logging
import os
from array import array
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .config import ColumnSettings
from .errors import DataError, SettingError
from .hub_rows import HubName, rows_of_dataset
from .pool import Instruction, Pool
from .row_files import ENDINGS, Row, check_file, is_readable, rows_of_file, unit_of
from .row_forms import RowReader, required_columns

__all__ = ["Stamp", "check_columns", "folder_stamp", "read_pool", "stamp"]

logger = logging.getLogger(__name__)

#: Endings of files that may hold rows and are not read: in a folder they are told of.
_UNREAD_ENDINGS = (".arrow", ".feather", ".ndjson", ".tsv", ".txt", ".gz", ".bz2", ".xz", ".zst", ".zip")

#: So many names of what is not read.
_NUM_NAMED = 5

#: Names and times of files: something else once any of them has changed.
Stamp = tuple[tuple[str, int, int], ...]


@dataclass(slots=True)
class _Part:
    """One file of a source, or all of it.

    Attributes:
        rows: Each row's number, from 1, and the row.
        unit: What they are counted in.
        name: What it is called within a folder; empty where it is the whole source.
    """

    rows: Generator[tuple[int, Row]]
    unit: str
    name: str = ""

    def place(self, number: int) -> str:
        """Return where a row stands in the source, in words."""
        return f"{self.name}, {self.unit} {number}" if self.name else f"{self.unit} {number}"

    def where(self, source: str, number: int) -> str:
        """Return where a row stands, in words, for messages."""
        return str(Path(source) / self.place(number)) if self.name else f"{source}, {self.place(number)}"


@dataclass(slots=True)
class _Notes:
    """What is found on the way through a source.

    Attributes:
        numbers: Of each row that is kept, its number in its file.
        parts: As for `Pool`.
        blanks: Rows without text, by the column that has none.
        part_blanks: Those of the columns that have text, but not in all their parts.
        first_blank: The first such column, and where it is.
    """

    numbers: array[int] = field(default_factory=lambda: array("q"))
    parts: list[tuple[int, str, str]] = field(default_factory=list)
    blanks: dict[str, int] = field(default_factory=dict)
    part_blanks: set[str] = field(default_factory=set)
    first_blank: tuple[str, str, str] | None = None

    @property
    def num_blanks(self) -> int:
        return sum(self.blanks.values())

    def add_blank(self, column: str, value: object, where: str, place: str) -> None:
        """Note a row that has no text in a column, or not in all its parts."""
        self.blanks[column] = self.blanks.get(column, 0) + 1
        if value and isinstance(value, (list, dict)):
            self.part_blanks.add(column)
        self.first_blank = self.first_blank or (column, where, place)


def read_pool(
    path: str | os.PathLike[str],
    *,
    skip_empty: bool = False,
    folder: Path | None = None,
    columns: ColumnSettings | None = None,
    choice_form: str = "text",
) -> Pool:
    """Read instructions from a file, a folder of files, or a data set of the hub.

    What exists is a path. What does not, but ends like a file or begins with `/`, `.` or `~`, is a file that is
    missing; anything else is looked for on the hub: `owner/name[/config][@revision][:split]`. Files are .jsonl, .json
    and .csv, each of them also packed as .gz, and .parquet. Those of a folder are read in the order of their names, as
    one; folders within it, and files of other kinds that may hold rows, are not read, and named in a warning.

    The first row shows the form that all rows have; `row_forms` knows them. Rows keep every column. Text is UTF-8,
    with or without a byte-order mark, and is kept exactly as it is written. Rows are checked and put away one by one;
    only a .json file, being one value, has to fit into memory.

    Args:
        path: The file, folder or name.
        skip_empty: Whether rows without text, in a prompt, response, choice or turn, are left out, and counted in
            `Pool.num_skipped`, instead of being an error.
        folder: As for `Pool`.
        columns: Which columns hold what, if the first row has those that make a row; others may be missing in it.
        choice_form: How multiple-choice rows are asked, one of `config.CHOICE_FORMS`.

    Raises:
        DataError: The source is not there, or cannot be read.
        DataError: Its ending, its columns or one of its rows is not as above.
        DataError: Rows are without text, and `skip_empty` is off. This is said only when the
            rest of the source is in order, since it counts them all.
        DataError: There are no rows, or none is left.
        OutputError: As for `Pool`.
    """
    source = os.fspath(path)
    reader, notes = RowReader(columns or ColumnSettings(), choice_form), _Notes()
    parts = _parts(source)
    with contextlib.closing(_instructions(source, parts, reader, notes)) as rows:
        pool = Pool(rows, source, numbers=notes.numbers, unit=parts[0].unit, parts=notes.parts, folder=folder)
    if notes.first_blank is not None and not skip_empty:
        raise _blank_error(notes)
    if not len(pool):
        left = f"none of its {notes.num_blanks} rows has both prompt and response" if notes.blanks else "it has no rows"
        raise DataError(f"{source}: {left}; expected at least one instruction. Is this the right file?")
    pool.num_skipped = notes.num_blanks
    pool.num_read += notes.num_blanks
    pool.columns_found = frozenset(reader.columns_found)
    if reader.num_unanswered:
        message = "%s: %d conversations end with a question that has no answer; it is left out of them"
        logger.warning(message, source, reader.num_unanswered)
    return pool


def check_columns(columns: ColumnSettings, *pools: Pool) -> None:
    """Refuse names of columns that nothing was read by: rows of a form that is known would hide a mistyped one.

    Args:
        columns: As for `read_pool`.
        pools: What was read with them, at least one; it is enough if one of them has a column.

    Raises:
        SettingError: No first row has the columns that make a row, or no row has one of the others.
    """
    found = frozenset[str]().union(*(pool.columns_found for pool in pools))
    missing = [column for column in columns.named().values() if column not in found]
    if not missing:
        return
    sources = " or ".join(pool.source for pool in pools)
    names, lacking = (
        (missing, f"no row of {sources} has it")
        if found
        else (required_columns(columns), f"no first row of {sources} has all of these")
    )
    raise SettingError(
        f"columns names {', '.join(names)}, but {lacking}; found "
        f"{', '.join(pools[0][0].fields)} in {pools[0].source}. Mend the names, or leave columns out."
    )


def stamp(source: str | None) -> Stamp | None:
    """Return what changes when a file of rows, or any in a folder, does; None for what is neither."""
    return _stamp(source, lambda path: _files(path) if path.is_dir() else [path] if path.is_file() else [])


def folder_stamp(source: str | None) -> Stamp | None:
    """Return what changes when any file of a model's or adapter's folder does; None for what is no folder."""
    return _stamp(source, lambda path: sorted(file for file in path.iterdir() if file.is_file()))


def _stamp(source: str | None, files_of: Callable[[Path], Sequence[Path]]) -> Stamp | None:
    if source is None:
        return None
    try:
        statuses = [(file.name, file.stat()) for file in files_of(Path(source))]
    except OSError:
        return None
    return tuple((name, status.st_mtime_ns, status.st_size) for name, status in statuses) or None


def _parts(source: str) -> list[_Part]:
    """Return what a source consists of, at least one part.

    Raises:
        DataError: There is no such source.
    """
    path = Path(source)
    try:
        if path.is_dir():
            return _parts_of_folder(source)
        is_file = path.exists() or source.startswith(("/", ".", "~")) or is_readable(path)
    except OSError as error:
        raise DataError(
            f"{source}: cannot be read ({error.strerror or error}). Check its name, its rights and its disk."
        ) from error
    if not is_file and HubName.parse(source) is not None:
        return [_Part(rows_of_dataset(source), "row")]
    check_file(source)
    return [_Part(rows_of_file(source), unit_of(source))]


def _parts_of_folder(source: str) -> list[_Part]:
    folder = Path(source)
    if (folder / "dataset_dict.json").is_file() or ((folder / "state.json").is_file() and any(folder.glob("*.arrow"))):
        raise DataError(
            f"{source}: is what save_to_disk of the library datasets wrote, which is not read; expected files that end "
            f"in {', '.join(ENDINGS)}. Load it by datasets.load_from_disk, and write each split by to_parquet, or by "
            "to_json into a .jsonl file."
        )
    files = _files(folder)
    if not files:
        raise DataError(
            f"{source}: is a folder without any file that ends in {', '.join(ENDINGS)}; expected at least one. "
            "Name the folder that the files are in."
        )
    for file in files:
        check_file(str(file))
    unread = _unread(folder)
    if unread:
        names = ", ".join(unread[:_NUM_NAMED]) + (f" and {len(unread) - _NUM_NAMED} more" * (len(unread) > _NUM_NAMED))
        logger.warning("%s: of this folder %s is not read; files end in %s", source, names, ", ".join(ENDINGS))
    return [_Part(rows_of_file(str(file)), unit_of(str(file)), file.name) for file in files]


def _files(folder: Path) -> list[Path]:
    """Return the files of a folder that can be read, by name; what begins with a dot is not meant for readers."""
    return sorted(path for path in folder.iterdir() if is_readable(path) and not path.name.startswith("."))


def _unread(folder: Path) -> list[str]:
    """Return what else in a folder may hold rows, by name: files of other kinds, and folders."""
    others = sorted(set(folder.iterdir()) - set(_files(folder)))
    others = [path for path in others if not path.name.startswith((".", "__"))]
    return [
        f"{path.name}/" if path.is_dir() else path.name
        for path in others
        if path.is_dir() or path.name.lower().endswith(_UNREAD_ENDINGS)
    ]


def _instructions(source: str, parts: list[_Part], reader: RowReader, notes: _Notes) -> Generator[Instruction]:
    """Yield the instructions, and note what is found on the way."""
    for part in parts:
        if part.name:
            notes.parts.append((len(notes.numbers), part.name, part.unit))
        with contextlib.closing(part.rows) as rows:
            for number, row in rows:
                reading = reader.read(row, part.where(source, number))
                if isinstance(reading, Instruction):
                    notes.numbers.append(number)
                    yield reading
                else:
                    notes.add_blank(reading, row.get(reading), part.where(source, number), part.place(number))


def _blank_error(notes: _Notes) -> DataError:
    assert notes.first_blank is not None
    column, where, place = notes.first_blank
    count = notes.blanks[column]
    rows = "1 row has" if count == 1 else f"{count} rows have"
    # Conversations and choices may be blank in one of their parts alone.
    found, lack = "found no text; expected some", f"an empty {column!r}"
    if column in notes.part_blanks:
        found, lack = "found no text in it or in a part of it; expected some", f"{lack}, or one with an empty part"
    return DataError(
        f"{where}, field {column!r}: {found}. {rows} {lack}, "
        f"the first in {place}. Fill or remove such rows, or leave them out: skip_empty=True (--skip-empty)."
    )
