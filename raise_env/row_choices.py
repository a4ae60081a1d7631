"""The choices of a row, in the forms that data sets have, and which of them its answer means.

A choice is looked for by its label where it has one, and else by its text, its letter and its number; where these mean
several choices the row is an error.
"""

from __future__ import annotations

import string
from typing import Any

from .errors import DataError, describe, excerpt
from .row_files import is_text
from .row_texts import check_text, described

__all__ = ["choices_of", "right_choice", "up_to_the_last"]


def choices_of(value: Any, where: str) -> tuple[list[str], list[str]] | None:
    """Return the texts to choose among, and their labels where they have any; None where there are no choices.

    Where there are some but none has text, there are no texts.

    Raises:
        DataError: They have no known form, or some have labels and others none, or a label stands twice.
    """
    if value is None or value == [] or _is_without_choices(value):
        return None
    labels: Any = []
    texts = value
    if isinstance(value, dict):
        is_lettered = list(value) == list(string.ascii_uppercase[: len(value)])  # as in MedQA
        texts, labels = (list(value.values()), list(value)) if is_lettered else (value.get("text"), value.get("label"))
    elif isinstance(value, list) and all(isinstance(choice, dict) for choice in value):
        texts = [choice["text"] for choice in value] if all("text" in choice for choice in value) else None
        labels = [choice.get("label") for choice in value]
    if not isinstance(texts, list) or not isinstance(labels, list) or len(labels) not in (0, len(texts)):
        raise DataError(
            f"{where}: found {_shown_choices(value)}; expected a list of texts, a list of objects with label and text, "
            "the lists label and text of one length, or a text for each of A, B and so on. Store such rows as .jsonl, "
            "or rename the column if it is not meant to be read."
        )
    for index, choice in enumerate(texts, start=1):
        if choice is not None:
            check_text(choice, f"{where}, item {index}")
    texts = up_to_the_last([choice or "" for choice in texts])
    return texts, _labels(labels[: len(texts)], where)


def _shown_choices(value: Any) -> str:
    """Return in words what stands where choices are expected, with the names that its objects have."""
    item = value[0] if isinstance(value, list) else value
    if not isinstance(item, dict):
        return describe(value)
    kind = "a list of objects" if isinstance(value, list) else "an object"
    return f"{kind} with {excerpt(', '.join(map(repr, item)))}"


def _is_without_choices(value: Any) -> bool:
    """Return whether a value is what nested tables have where there are no choices: lists that are null or empty."""
    is_form = isinstance(value, dict) and value.keys() <= {"text", "label"}
    return is_form and all(entries in (None, []) for entries in value.values())


def up_to_the_last(texts: list[str]) -> list[str]:
    """Return the choices up to the last with text: a table has as many for each row as for the one that has most."""
    last = max((place for place, text in enumerate(texts, start=1) if text.strip()), default=0)
    return texts[:last]


def _labels(labels: list[Any], where: str) -> list[str]:
    """Return the labels of choices as texts; none where no choice has one."""
    if all(label is None or label == "" for label in labels):
        return []
    for index, label in enumerate(labels, start=1):
        if isinstance(label, bool) or not (is_text(label) or isinstance(label, int)):
            raise DataError(
                f"{where}, item {index}: found the label {described(label)}; expected text or a number, for the others "
                "have labels. Give all choices a label, or none."
            )
    names = [str(label) for label in labels]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{where}: found the label {excerpt(repr(twice))} twice; expected each once. Mend the row.")
    return names


def right_choice(texts: list[str], labels: list[str], answer: Any, column: str, where: str) -> int:
    """Return which of the choices an answer means: a label, a text, a letter, or a number.

    Args:
        texts: The choices.
        labels: Theirs; none where they have none.
        answer: What the row says.
        column: Where it says so, for messages.
        where: Where the choices stand, for messages.

    Raises:
        DataError: It means none of them, or more than one.
    """
    # A table whose column has gaps keeps whole numbers so.
    answer = int(answer) if isinstance(answer, float) and answer.is_integer() else answer
    is_number = isinstance(answer, int) and not isinstance(answer, bool)
    if not is_text(answer) and not is_number:
        raise DataError(
            f"{where}: found the row's {column!r} to be {described(answer)}; expected text or a whole number. "
            "Write it as one of them."
        )
    places = [names.index(str(answer)) for names in _names(texts, labels, is_number) if str(answer) in names]
    if places and (str(answer) in labels or len(set(places)) == 1):
        return places[0]
    if places:
        meant = " or ".join(excerpt(repr(texts[place])) for place in sorted(set(places)))
        raise DataError(
            f"{where}: found the row's {column!r} to be {answer!r}, which may mean {meant}; expected one choice alone. "
            f"Write the choice's {'label' if labels else 'number there, counted from 0 and without quotes'}."
        )
    among = labels or texts
    advice = "Write both alike, letter for letter."
    if is_number and not any(label.isdecimal() for label in labels):
        advice = (
            "A number without quotes counts from 0: write it so, or the choice's letter, and null where none is known."
        )
    elif not labels and str(answer).strip().isdecimal():
        advice = (
            "In quotes a number may count from 0 or from 1: write it without quotes, where it counts from 0, or write "
            "the choice's letter."
        )
    raise DataError(
        f"{where}: found {excerpt(', '.join(map(repr, among)), 200)}; expected the row's {column!r} "
        f"among them, which is {excerpt(repr(answer))}. {advice}"
    )


def _names(texts: list[str], labels: list[str], is_number: bool) -> list[list[str]]:
    """Return by what an answer may name the choices; a label goes before the rest."""
    from_0, from_1 = ([str(number + first) for number in range(len(texts))] for first in (0, 1))
    # Where labels are numbers, a number is one of them, and no place in the list; and so with letters.
    has_numbers = any(label.isdecimal() for label in labels)
    if is_number:
        return [labels if has_numbers else from_0]
    has_letters = any(len(label) == 1 and label in string.ascii_uppercase for label in labels)
    letters = [] if has_letters else list(string.ascii_uppercase[: len(texts)])
    # In quotes a number counts as labels do, from 1; without labels nothing says where it counts from.
    return [labels, texts, letters, from_1 if labels and not has_numbers else []]
