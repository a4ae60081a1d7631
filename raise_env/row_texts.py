"""Texts in a row's columns, and what to do where something else stands there."""

from __future__ import annotations

from .errors import DataError, describe, excerpt
from .row_files import Rendered, Row, check_halves, is_text

__all__ = ["TURN_FIELDS", "check_text", "described", "has_text", "is_chat", "text_in"]

#: By which names a turn says who speaks, and what.
TURN_FIELDS = (("role", "content"), ("from", "value"))


def text_in(row: Row, column: str | None, where: str) -> str:
    """Return the text in a column; a null, which is how tables say that there is none, is an empty one.

    Raises:
        DataError: It holds something else.
    """
    assert column is not None
    value = row[column]
    if value is None:
        return ""
    check_text(value, f"{where}, field {column!r}")
    return str(value)


def check_text(value: object, where: str) -> None:
    """Check that a value is a text that can be written in UTF-8.

    Raises:
        DataError: It is not; the message says what to do.
    """
    if not is_text(value):
        raise DataError(f"{where}: found {described(value)}; expected text. {_text_advice(value)}")
    check_halves(value, where)


def has_text(value: object) -> bool:
    """Return whether a value is a text that is not blank, or holds one."""
    if isinstance(value, (list, dict)):
        return any(map(has_text, value.values() if isinstance(value, dict) else value))
    return is_text(value) and bool(value.strip())


def described(value: object) -> str:
    """Return in words what a value is, also of one that a table holds in a type of its own."""
    return f"{excerpt(value)}, which is not stored as text" if isinstance(value, Rendered) else describe(value)


def _text_advice(value: object) -> str:
    """Return how to make a text of a value that is none."""
    if value is None:
        return "Write one there, or remove the row."
    if isinstance(value, Rendered):
        return "Store the column as text."
    if value and is_chat(value):
        return (
            "If the column holds whole conversations, their last answers included, name it as messages "
            "(--columns messages=NAME); else join its turns into one text."
        )
    if isinstance(value, (list, dict)):
        return "Join what it holds into one text, or keep one of several answers."
    return "Write the value in quotes; in a table, store the column as text."


def is_chat(value: object) -> bool:
    """Return whether a value is a list of turns, be it an empty one."""
    return isinstance(value, list) and all(map(_is_turn, value))


def _is_turn(value: object) -> bool:
    return isinstance(value, dict) and any(fields[0] in value for fields in TURN_FIELDS)
