"""Reading what anyone may have written.

Read are regular files alone, so that no pipe makes a command wait, and of no value more than `max_bytes`, so that no
file fills the memory. Faults are `OSError` and `ValueError`: who reads knows what was expected, and says so.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .errors import SettingError

__all__ = [
    "MAX_BYTES_VARIABLE",
    "check_inside",
    "check_regular",
    "lines_of",
    "max_bytes",
    "numbered_lines",
    "parse_json",
    "read_json",
    "read_text",
]

#: The environment variable that raises `max_bytes`.
MAX_BYTES_VARIABLE = "RAISE_ENV_MAX_BYTES"

#: Brackets within brackets that a JSON text may have. What follows a row's values goes one level deeper at each.
_MAX_DEPTH = 100

#: Of a line, so much is read at once.
_PIECE = 1 << 20

_TOO_DEEP = "brackets nested too deeply to be data"


def max_bytes() -> int:
    """Return how much one value of a file may take: a line, a JSON document, what a packed file grows to out of little.

    256 MiB, or what $RAISE_ENV_MAX_BYTES says.

    Raises:
        SettingError: The variable is no number.
    """
    text = os.environ.get(MAX_BYTES_VARIABLE, str(2**28))
    if not text.isdecimal() or len(text) > 18 or int(text) == 0:
        raise SettingError(f"${MAX_BYTES_VARIABLE} is {text[:60]!r}; expected a number of bytes, such as {2**30}.")
    return int(text)


def check_regular(path: Path) -> None:
    """Check that a path is that of a file with content of its own.

    Raises:
        OSError: There is no such file.
        ValueError: It is a folder, a pipe or a device.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no regular file")


def check_inside(path: Path, folder: Path) -> None:
    """Check that a path does not lead out of a folder, by a link or by its name.

    Raises:
        ValueError: It does.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"it leads out of {str(folder)!r}, to {str(path.resolve())!r}")


def read_text(path: Path) -> str:
    """Return the text of a file that anyone may have written.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no regular file, too large, or not UTF-8.
    """
    check_regular(path)
    limit = max_bytes()
    if path.stat().st_size > limit:
        raise ValueError(f"it has more than {limit:,} bytes; if it is meant to, raise ${MAX_BYTES_VARIABLE}")
    return path.read_bytes().decode()


def read_json(path: Path, inside: Path | None = None) -> Any:
    """Return the value of a JSON file that anyone may have written.

    Args:
        path: The file.
        inside: A folder that it must not lead out of.

    Raises:
        OSError: It cannot be read.
        ValueError: It leads out, is no regular file, too large, or as for `parse_json`.
    """
    if inside is not None:
        check_inside(path, inside)
    return parse_json(read_text(path))


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield each line of a text file, without its line feed, and its number from 1; blank ones are left out.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no regular file; or a line is too long, or not UTF-8, which names its number.
    """
    check_regular(path)
    with path.open("rb") as file:
        for number, line in enumerate(lines_of(file), start=1):
            try:
                text = line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number} is not UTF-8") from error
            if text.strip():
                yield number, text


def lines_of(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of an open file with their line feeds.

    Raises:
        OSError: It cannot be read.
        ValueError: A line is longer than `max_bytes`, which names its number.
    """
    limit = max_bytes()
    number = 1
    while line := file.readline(_PIECE):
        if not line.endswith(b"\n") and len(line) == _PIECE:
            line = _whole_line(file, line, limit, number)
        yield line
        number += 1


def _whole_line(file: IO[bytes], line: bytes, limit: int, number: int) -> bytes:
    pieces, length = [line], len(line)
    while not pieces[-1].endswith(b"\n") and (piece := file.readline(_PIECE)):
        pieces.append(piece)
        length += len(piece)
        if length > limit:
            raise ValueError(
                f"line {number} has more than {limit:,} bytes; if it is meant to, raise ${MAX_BYTES_VARIABLE}"
            )
    return b"".join(pieces)


def parse_json(text: str, **hooks: Any) -> Any:
    """Return what a JSON text says; whatever is wrong with it is a ValueError.

    Args:
        text: The whole text.
        hooks: As for `json.loads`.

    Raises:
        ValueError: It is no JSON, names something twice in one object, or goes too deep; of a JSONDecodeError the place
            is known.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object, **hooks)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    except ValueError as error:
        # Python refuses whole numbers of more than 4,300 digits.
        raise ValueError("a number too long to read" if "digits" in str(error) else str(error)) from error
    if text.count("[") + text.count("{") > _MAX_DEPTH:
        _check_depth(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twice[:60]!r} twice in one object")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH + 1):
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list)))
        level = [child for items in inner for child in items if isinstance(child, (dict, list))]
        if not level:
            return
    raise ValueError(_TOO_DEEP)
