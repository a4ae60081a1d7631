"""The package's exceptions: each says what was found, what was expected and what to do."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import traceback
from collections.abc import Iterable, Iterator

__all__ = [
    "ActionError",
    "AgentError",
    "DataError",
    "MemoryShortageError",
    "ModelError",
    "OutputError",
    "RaiseEnvError",
    "RecordError",
    "RewardError",
    "SettingError",
    "describe",
    "excerpt",
    "failing_lines",
    "lacks_memory",
    "memory_explained",
    "printable",
    "suggestion",
]

#: What a terminal obeys or cannot show: control characters, marks that turn the direction of writing, separators of
#: lines that are no line feed, and halves of pairs. Line feed and tab stay.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


class RaiseEnvError(Exception):
    """Base of every error that a user can mend; the command line turns it into one message and exit code 2.

    Messages show what was found, which may come from anyone's file: as text they are `printable`.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class SettingError(RaiseEnvError, ValueError):
    """A keyword or option has a value that cannot be used."""


class DataError(RaiseEnvError, ValueError):
    """A pool, dev or test set cannot be read, or breaks a rule; names file, line and field where there are any."""


class ModelError(RaiseEnvError, ValueError):
    """A model, tokenizer or adapter cannot be loaded or used."""


class RewardError(RaiseEnvError, ValueError):
    """A reward function cannot be found, failed, or returned something other than a finite number."""


class ActionError(RaiseEnvError, ValueError):
    """An action has the wrong shape, or holds something other than 0 and 1."""


class AgentError(RaiseEnvError, RuntimeError):
    """An agent's own code failed, or chose what is no action; says where, and ends with the lines that failed."""


class RecordError(RaiseEnvError, ValueError):
    """An episode record, selector or results file is not what its format promises."""


class OutputError(RaiseEnvError, OSError):
    """A folder or file cannot be written."""


class MemoryShortageError(RaiseEnvError, MemoryError):
    """The machine or its GPU has less memory than what was asked for needs; says what needs less."""


#: What torch says where a processor's or a GPU's memory is used up, each in an error of another kind.
_NO_MEMORY = ("can't allocate memory", "out of memory", "not enough memory")


def lacks_memory(error: BaseException) -> bool:
    """Return whether an error of Python, NumPy or torch says that there is too little memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


@contextlib.contextmanager
def memory_explained(advice: str) -> Iterator[None]:
    """Say in one message what to do where the memory does not suffice for this block, or for a function so decorated.

    Raises:
        MemoryShortageError: It does not.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, RaiseEnvError) or not lacks_memory(error):
            raise
        told = excerpt(str(error) or type(error).__name__, 160)
        raise MemoryShortageError(f"there is too little memory ({told}). {advice}") from error


def failing_lines(error: BaseException, num_ours: int) -> str:
    """Return the traceback of code of the user's own: without its first frames, ours, and Python's import machinery."""
    frames = traceback.extract_tb(error.__traceback__)[num_ours:]
    own = [frame for frame in frames if "importlib" not in frame.filename]
    return "".join([*traceback.format_list(own), *traceback.format_exception_only(error)]).rstrip()


def printable(text: str) -> str:
    """Return a text that a terminal shows and does not obey: escape sequences and the like are spelled out."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the nearest known one, then all of them, likely ones first."""
    names = sorted(known)
    matches = difflib.get_close_matches(name.lower(), dict.fromkeys(entry.lower() for entry in names), n=3)
    near = sorted((entry for entry in names if entry.lower() in matches), key=lambda n: matches.index(n.lower()))
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}Known: {', '.join([*near, *(entry for entry in names if entry not in near)])}."


def describe(value: object) -> str:
    """Return the kind of a JSON value, and the value itself where it is short."""
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    return {str: "text", list: "a list", type(None): "null"}.get(type(value), "an object")


def excerpt(text: str, length: int = 60) -> str:
    """Return the beginning of a text on one line, so many characters of it."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[:length]}..."
