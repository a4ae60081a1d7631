"""What was said in a conversation, by whom and before what, in the forms that data sets have.

No part of it is dropped without a word: a turn that says something besides its text, or is not to be learned, is an
error.
"""

from __future__ import annotations

from typing import Any

from .errors import DataError, describe, excerpt
from .row_files import check_halves, is_text
from .row_texts import TURN_FIELDS, check_text, described

__all__ = ["history_of", "no_turns", "system_text", "turns_of"]

#: Who speaks, by the names of ShareGPT, OpenAI and those who came after them.
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
}

#: What a turn may say besides its text, as OpenAI, DeepSeek, vLLM and gpt-oss name it.
_TURN_EXTRAS = ("tool_calls", "function_call", "refusal", "reasoning_content", "reasoning", "thinking")

#: How an answer is marked as one to be learned, or not: by OpenAI's fine-tuning form, Axolotl's, and ms-swift's.
_TURN_MARKS = {"weight": "1", "train": "true", "loss": "true"}


def system_text(value: Any, where: str) -> str:
    """Return the text that a conversation is headed by; an empty one where there is none.

    Raises:
        DataError: It is no text.
    """
    if not is_text(value):
        if value is None:
            return ""
        raise DataError(
            f"{where}: found {described(value)}; expected the text that a conversation is headed by. "
            "Rename the column if it is not meant to be read."
        )
    check_halves(value, where)
    return value if value.strip() else ""


def history_of(value: Any, where: str) -> tuple[tuple[str, str], ...]:
    """Return the exchanges before the last one, as LLaMA-Factory's Alpaca rows have them.

    Raises:
        DataError: It is no list of pairs of texts.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    if not isinstance(value, list):
        raise _no_history(value, where)
    for number, pair in enumerate(value, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise _no_history(pair, f"{where}, item {number}")
        for text in pair:
            check_text(text, f"{where}, item {number}")
    return tuple((said, answered) for said, answered in value)


def _no_history(value: Any, where: str) -> DataError:
    return DataError(
        f"{where}: found {describe(value)}; expected what was said before: a list of pairs, each what the user said "
        "and what was answered. Store such rows as .jsonl, or rename the column if it is not meant to be read."
    )


def turns_of(value: Any, where: str) -> list[tuple[str, str]]:
    """Return who says what, in an order that a conversation can have.

    Raises:
        DataError: It is no list of turns, one of them is at fault, or their order is.
    """
    if not isinstance(value, list):
        raise no_turns(value, where)
    turns = [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(value, start=1)]
    expected = "user"
    for number, (role, _) in enumerate(turns, start=1):
        if role == "system" and number == 1:
            continue
        if role != expected:
            raise DataError(f"{where}, turn {number}: {_disorder(turns, number)} Mend the row, or remove it.")
        expected = "assistant" if role == "user" else "user"
    if not any(role == "assistant" for role, _ in turns):
        raise DataError(f"{where}: found no turn of the assistant; expected one to learn from. Remove the row.")
    return turns


def no_turns(value: Any, where: str) -> DataError:
    """Return the error for what stands where a conversation is expected."""
    return DataError(
        f"{where}: found {describe(value)}; expected the turns of a conversation, each with role and content. "
        "Store such rows as .jsonl."
    )


def _disorder(turns: list[tuple[str, str]], number: int) -> str:
    role = turns[number - 1][0]
    if role == "system":
        return "found a system text; expected it in the first turn alone."
    if number > 1 and turns[number - 2][0] == role:
        return f"found a second turn of the {role} in a row; expected user and assistant in turns."
    return f"found that the {role} begins; expected the user."


def _turn(turn: Any, where: str) -> tuple[str, str]:
    """Return the role and the text of a turn."""
    fields = next((pair for pair in TURN_FIELDS if isinstance(turn, dict) and pair[0] in turn), None)
    if fields is None:
        raise DataError(
            f"{where}: found {describe(turn)}; expected an object with role and content, or from and value."
        )
    name, content = turn[fields[0]], turn.get(fields[1])
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        shown = repr(name) if isinstance(name, str) else describe(name)
        raise DataError(
            f"{where}: found the {fields[0]} {excerpt(shown)}; expected one of {', '.join(ROLES)}. "
            "Such turns cannot be learned from: remove them, or rename who speaks."
        )
    _check_extras(turn, where, fields[1])
    if role == "assistant":
        _check_marks(turn, where)
    if fields[1] not in turn:
        raise DataError(f"{where}: found no {fields[1]!r}; expected the turn's text in it. Mend the row, or remove it.")
    where = f"{where}, {fields[1]}"
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}, part {number}") for number, part in enumerate(content, start=1))
    if content is None:
        return role, ""
    check_text(content, where)
    return role, content


def _check_extras(turn: dict[str, Any], where: str, field: str) -> None:
    """Check that a turn says nothing besides its text."""
    for extra in _TURN_EXTRAS:
        value = turn.get(extra)
        if value.strip() if isinstance(value, str) else value:
            raise DataError(
                f"{where}, {extra}: found {describe(value)}; expected none, for a turn's text alone is learned. "
                f"Write it into the {field} as it is to be learned, or remove it, or remove the row."
            )


def _check_marks(turn: dict[str, Any], where: str) -> None:
    """Check that an answer is not marked as one that is not to be learned."""
    for mark, expected in _TURN_MARKS.items():
        value = turn.get(mark)
        if value is not None and value != 1:  # true is 1
            raise DataError(
                f"{where}, {mark}: found {describe(value)}; expected {expected} or none, for every answer of a "
                "conversation is learned. Remove the turn with the question before it, or remove the row."
            )


def _part(part: Any, where: str) -> str:
    """Return the text of a part of a turn; pictures and the like cannot be learned from."""
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = repr(part.get("type")) if isinstance(part, dict) else describe(part)
        raise DataError(f"{where}: found {excerpt(kind)}; expected parts of the type 'text' alone. Remove the row.")
    check_text(part.get("text"), where)
    return str(part["text"])
