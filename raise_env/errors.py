"""The package's exceptions: each says what was found, what was expected and what to do."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable

__all__ = [
    "ActionError",
    "AgentError",
    "DataError",
    "ModelError",
    "OutputError",
    "RaiseEnvError",
    "RecordError",
    "RewardError",
    "SettingError",
    "describe",
    "excerpt",
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
    """A reward function cannot be found, or returned something other than a finite number."""


class ActionError(RaiseEnvError, ValueError):
    """An action has the wrong shape, or holds something other than 0 and 1."""


class AgentError(RaiseEnvError, RuntimeError):
    """An agent's own code failed, or chose what is no action; says where, and ends with the lines that failed."""


class RecordError(RaiseEnvError, ValueError):
    """An episode record, selector or results file is not what its format promises."""


class OutputError(RaiseEnvError, OSError):
    """A folder or file cannot be written."""


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
