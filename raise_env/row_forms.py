"""From a row to an instruction, in the forms in which data sets come.

Decisions:
    Nothing is guessed. The first row says which form a file has; a later row that differs, or a value that is not
    text, is an error that names file, line and field. A wrong pool would otherwise train well and mean nothing.

    Columns that match several forms are an error too, unless one form is another with more to it: those are named as
    `RowForm.instead_of`. A column that belongs to no whole form, such as `answer` beside `instruction` and `output`,
    is one of the extra columns that every row may have.

    In columns A, B, C, D a letter is no text, for there it names a column.

    What was said before a conversation, and the text that heads it, are read from columns of their own too. Where a
    column that by its name says what is asked, among what is chosen or who answers holds something that the form does
    not read, the row is an error.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from .config import ColumnSettings
from .errors import DataError, describe, excerpt
from .pool import Instruction
from .row_choices import choices_of, right_choice, up_to_the_last
from .row_files import Row, is_text
from .row_texts import described, has_text, is_chat, text_in
from .row_turns import history_of, no_turns, system_text, turns_of

__all__ = ["RowForm", "RowReader", "required_columns"]

#: What a conversation's row may say of the tools that its assistant has, and else to the template, as SmolTalk2's do.
_TOOLS = ("tools", "functions", "chat_template_kwargs")

#: Columns that say what a question is about, among what it chooses or who answers it, and by which key of `columns`
#: they are read.
_CONTEXTS = {
    **dict.fromkeys(("input", "context", "passage", "article", "dialogue", "story", "hint"), "input"),
    **dict.fromkeys(("options", "choice", "endings"), "choices"),
    "system_prompt": "system",
}

#: Columns that hold one choice each, as Global-MMLU's `option_a`.
_ONE_CHOICE = re.compile(r"(?:(?:option|opt|choice|distractor)[ _]?(?:[a-z]|[0-9]{1,2})|[a-z])", re.IGNORECASE)

#: How the instructions of LLM-Adapters' multiple-choice data end (Hu et al. 2023, "LLM-Adapters").
_ANSWER_FORMAT = re.compile(r"Answer format: *([^\s/]+(?:/[^\s/]+)+)\s*\Z")

#: An instruction, or the name of the field that has no text.
Reading = Instruction | str


@dataclass(frozen=True, slots=True)
class RowForm:
    """A form of rows.

    Attributes:
        name: Its columns in words, for messages.
        columns: Those that every row has.
        read: Makes an instruction of a row, given where it stands.
        fits: Whether a row that has the columns is of this form.
        instead_of: Names of forms whose columns are among these: such rows are of this form.
        is_chat: Whether it has all that was said in one column.
        extra: The column that it reads besides, where a row has it.
        settings: What reads its columns by name; None: nothing does.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row, str], Reading]
    fits: Callable[[Row], bool] = lambda _: True
    instead_of: tuple[str, ...] = ()
    is_chat: bool = False
    extra: str | None = None
    settings: ColumnSettings | None = None

    def matches(self, row: Row) -> bool:
        """Return whether a row is of this form."""
        return all(column in row for column in self.columns) and self.fits(row)


class RowReader:
    """Makes instructions of a source's rows, in the form that its first row has.

    Args:
        columns: Which columns to read; used if the first row has all that are required, see `required_columns`.
        choice_form: One of `config.CHOICE_FORMS`.
    """

    def __init__(self, columns: ColumnSettings, choice_form: str) -> None:
        self._columns = columns
        self._with_letters = choice_form == "letter"
        self._forms = self._known_forms()
        self._form: RowForm | None = None
        self._narrower: tuple[RowForm, ...] = ()
        #: Conversations that ended with a question, which was left out.
        self.num_unanswered = 0
        #: Those of the named columns that the source has; none where it is not read by them.
        self.columns_found: set[str] = set()

    def read(self, row: Row, where: str) -> Reading:
        """Return a row as an instruction, or the name of a field of it that has no text.

        Args:
            row: Its columns; the first row that is given decides on the form.
            where: Where it stands, for messages.

        Raises:
            DataError: It has no known form, or several, or another than the first row; or a value is at fault.
        """
        if self._form is None:
            self._form = self._chosen(row, where)
            self._narrower = tuple(form for form in self._forms if self._form.name in form.instead_of)
        elif not self._form.matches(row) or any(form.matches(row) for form in self._narrower):
            raise self._other_form(row, where)
        if self.columns_found:
            self.columns_found.update(column for column in self._columns.named().values() if column in row)
        reading = self._form.read(row, where)
        return reading if isinstance(reading, str) else self._in_context(reading, row, where)

    def _known_forms(self) -> tuple[RowForm, ...]:
        pairs = [
            ("instruction", "output", "input"),
            ("instruction", "response", "context"),
            ("question", "answer", None),
            ("prompt", "completion", None),
            ("prompt", "response", None),
        ]
        keyed = ColumnSettings("question", choices="choices", answer="answerKey")
        return (
            *(self._pair(prompt, response, extra) for prompt, response, extra in pairs),
            *(_chat(self, column) for column in ("messages", "conversations")),
            RowForm(
                "prompt and completion, both lists of turns",
                ("prompt", "completion"),
                partial(_read_turns, self, ("prompt", "completion")),
                lambda row: all(is_chat(row[column]) for column in ("prompt", "completion")),
                instead_of=("prompt and completion",),
                is_chat=True,
            ),
            RowForm(
                "question and choices with answerKey",
                ("question", "choices", "answerKey"),
                partial(self._read_pair, keyed),
                settings=keyed,
            ),
            RowForm(
                "question, A, B and so on with answer",
                ("question", "A", "B", "answer"),
                self._read_lettered,
                instead_of=("question and answer",),
            ),
            RowForm(
                "instruction and output with answer, the instruction ending in 'Answer format: ...'",
                ("instruction", "output", "answer"),
                self._read_alternatives,
                lambda row: bool(_ANSWER_FORMAT.search(str(row["instruction"]))),
                instead_of=("instruction and output",),
                extra="input",
            ),
        )

    def _pair(self, prompt: str, response: str, extra: str | None) -> RowForm:
        columns = ColumnSettings(prompt, response, extra, choices="choices")
        read = partial(self._read_pair, columns)
        return RowForm(f"{prompt} and {response}", (prompt, response), read, extra=extra, settings=columns)

    def _chosen(self, row: Row, where: str) -> RowForm:
        """Return the form of the first row."""
        required = required_columns(self._columns)
        if required and all(column in row for column in required):
            self.columns_found.update(required)
            names = ", ".join(f"{key} in {column!r}" for key, column in self._columns.named().items())
            if self._columns.messages is not None:
                return _chat(self, self._columns.messages, self._columns.system, name=names)
            return RowForm(names, required, partial(self._read_pair, self._columns))
        found = _matching(self._forms, row)
        # A conversation that is null decides on the form only where nothing else does.
        found = [form for form in found if not form.is_chat or row[form.columns[0]] is not None] or found
        if len(found) == 1:
            _check_one_choices(found[0], row, where)
            return found[0]
        seen = excerpt(", ".join(repr(column) for column in row) or "none", 300)
        if found:
            several = "; ".join(form.name for form in found)
            ways = [named for form in found if (named := _names_as_now(form, row))]
            raise DataError(
                f"{where}: found the columns {seen}, which are of several forms: {several}. "
                f"{_naming_advice(ways or _ways_to_name(row))}"
            )
        chats = [form.columns[0] for form in self._forms if form.is_chat and all(name in row for name in form.columns)]
        if chats:
            raise no_turns(row[chats[0]], f"{where}, field {chats[0]!r}")
        forms = "; ".join(form.name for form in self._forms)
        advice = _naming_advice(_ways_to_name(row))
        raise DataError(f"{where}: found the columns {seen}; expected one of these forms: {forms}. {advice}")

    def _other_form(self, row: Row, where: str) -> DataError:
        """Return what is wrong with a later row that has not the form of the first."""
        form = self._form
        assert form is not None
        others = [other.name for other in _matching(self._forms, row) if other != form]
        if others:
            return DataError(
                f"{where}: found a row of the form {others[0]}; expected {form.name}, as in the first row. "
                "Give all rows of a pool, dev or test set one form."
            )
        missing = next((column for column in form.columns if column not in row), None)
        if missing is None and form.is_chat:
            return no_turns(row[form.columns[0]], f"{where}, field {form.columns[0]!r}")
        if missing is None:
            return DataError(f"{where}: found something other than {form.name}; expected it, as in the first row.")
        seen = ", ".join(repr(name) for name in row) or "none"
        return DataError(
            f"{where}: found no field {missing!r} among {excerpt(seen, 300)}; expected it, as in the first row. "
            "Give every row the same columns."
        )

    def _in_context(self, instruction: Instruction, row: Row, where: str) -> Reading:
        """Return an instruction with the system text and the exchanges that stand in columns of their own.

        Where columns are named, what they name is all that is read.
        """
        assert self._form is not None
        if self.columns_found:
            return instruction
        if "system" in row and not instruction.system:
            instruction = replace(instruction, system=system_text(row["system"], f"{where}, field 'system'"))
        self._check_contexts(instruction, row, where)
        if not instruction.choices:
            _check_label(self._form, row, where)
        if self._form.is_chat:
            _check_tools(self._form, row, where)
        if "history" not in row or self._form.is_chat:
            return instruction
        earlier = history_of(row["history"], f"{where}, field 'history'")
        if not all(text.strip() for exchange in earlier for text in exchange):
            return "history"
        return replace(instruction, earlier=earlier)

    def _check_contexts(self, instruction: Instruction, row: Row, where: str) -> None:
        """Check that nothing beside the form's columns says what is asked, among what is chosen or who answers."""
        form = self._form
        assert form is not None
        unread = [column for column in _CONTEXTS if column in row and self._is_missed(instruction, column, row[column])]
        if unread:
            column = unread[0]
            raise DataError(
                f"{where}, field {column!r}: found {describe(row[column])} that the form {form.name} does not read; "
                f"expected none, for what is answered may rest on it. {_context_advice(form, row, unread)}"
            )

    def _is_missed(self, instruction: Instruction, column: str, value: object) -> bool:
        """Return whether a column of `_CONTEXTS` holds what its row's instruction lacks.

        A conversation says itself what it is about, but not always who answers.
        """
        form, key = self._form, _CONTEXTS[column]
        assert form is not None
        if column == form.extra or (form.is_chat and key != "system"):
            return False
        if key == "choices":
            return bool(value) and isinstance(value, (list, dict)) and not instruction.choices
        if key == "input" and isinstance(value, (list, dict)):
            return has_text(value)
        return is_text(value) and value.strip() not in ("", instruction.system.strip() if key == "system" else "")

    # The forms' readers

    def _read_pair(self, columns: ColumnSettings, row: Row, where: str) -> Reading:
        """Read a prompt and its response, with choices where there are any."""
        response_column = columns.response or columns.answer
        assert columns.prompt is not None
        assert response_column is not None
        prompt = text_in(row, columns.prompt, where)
        if not prompt.strip():
            return columns.prompt
        extra = text_in(row, columns.input, where) if columns.input in row else ""
        prompt += f"\n\n{extra}" if extra.strip() else ""
        system = text_in(row, columns.system, where) if columns.system in row else ""
        choices_where = f"{where}, field {columns.choices!r}"
        choices = choices_of(row.get(columns.choices) if columns.choices else None, choices_where)
        answer = row[response_column]
        if choices is None and columns.answer is not None:
            return str(columns.choices)
        if choices is not None and answer is not None and answer != "":
            texts, labels = choices
            if not texts or not all(text.strip() for text in texts):
                return str(columns.choices)
            right = right_choice(texts, labels, answer, response_column, choices_where)
            if self._with_letters and len(texts) > len(string.ascii_uppercase):
                raise DataError(
                    f"{choices_where}: found {len(texts)} choices; expected at most {len(string.ascii_uppercase)}, for "
                    "each gets a letter. Ask for their texts instead: choice_form='text' (--choice-form text)."
                )
            return self._choice(prompt, texts, right, row, system)
        response = text_in(row, response_column, where)
        if not response.strip():
            return response_column
        return Instruction(prompt, response, (), row, "" if not system.strip() else system)

    def _read_lettered(self, row: Row, where: str) -> Reading:
        """Read a question whose choices stand in columns A, B, C, ..."""
        prompt, answer = text_in(row, "question", where), row["answer"]
        answer = answer.strip() if is_text(answer) else answer
        if not prompt.strip():
            return "question"
        if answer is None or answer == "":
            return "answer"
        texts = up_to_the_last(
            [text_in(row, letter, where) if letter in row else "" for letter in string.ascii_uppercase]
        )
        letters = list(string.ascii_uppercase[: len(texts)])
        blank = next((letter for letter, text in zip(letters, texts, strict=True) if not text.strip()), None)
        if blank is not None or not texts:
            return blank or "A"
        if not is_text(answer) or answer not in [*letters, *texts]:
            shown = excerpt(repr(answer)) if is_text(answer) else described(answer)
            raise DataError(
                f"{where}, field 'answer': found {shown}; expected one of the letters {', '.join(letters)}, or the "
                "text of that choice. Write one of them."
            )
        right = letters.index(answer) if answer in letters else texts.index(answer)
        return self._choice(prompt, texts, right, row)

    def _read_alternatives(self, row: Row, where: str) -> Reading:
        """Read an instruction that lists its alternatives, one of which stands in the output."""
        prompt, output, answer = (text_in(row, column, where) for column in ("instruction", "output", "answer"))
        for column, text in (("output", output), ("answer", answer)):
            if not text.strip():
                return column
        found = _ANSWER_FORMAT.search(prompt)
        assert found is not None  # or the row would not be of this form
        alternatives = found[1].split("/")
        before, is_there, after = output.rpartition(answer)
        if answer not in alternatives or not is_there:
            raise DataError(
                f"{where}, field 'answer': found {excerpt(repr(answer))}; expected one of "
                f"{', '.join(alternatives)}, which is also in the output {excerpt(repr(output))}."
            )
        extra = text_in(row, "input", where) if "input" in row else ""
        prompt += f"\n\n{extra}" if extra.strip() else ""
        # The prompt lists them already: `choice_form` has nothing to add.
        return Instruction(prompt, output, tuple(before + other + after for other in alternatives), row)

    def _choice(self, prompt: str, texts: Sequence[str], right: int, row: Row, system: str = "") -> Instruction:
        """Return a multiple-choice row in the form that was asked for."""
        system = system if system.strip() else ""
        if not self._with_letters:
            is_first = texts.index(texts[right]) == right
            return Instruction(prompt, texts[right], tuple(texts), row, system, right=None if is_first else right)
        letters = string.ascii_uppercase[: len(texts)]
        lines = [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)]
        return Instruction("\n".join([prompt, *lines]), letters[right], tuple(letters), row, system)


def required_columns(columns: ColumnSettings) -> tuple[str, ...]:
    """Return the named columns that a source must have to be read by them; its rows may lack the others."""
    choices = None if columns.answer is None else columns.choices
    needed = (columns.messages, columns.prompt, columns.response, choices, columns.answer)
    return tuple(column for column in needed if column is not None)


def _matching(forms: Sequence[RowForm], row: Row) -> list[RowForm]:
    """Return the forms that a row has, without those that another of them stands in for."""
    found = [form for form in forms if form.matches(row)]
    covered = {name for form in found for name in form.instead_of}
    return [form for form in found if form.name not in covered]


def _check_one_choices(form: RowForm, row: Row, where: str) -> None:
    """Check that beside a question there are no columns of single choices, of which its answer names one.

    They are columns of the whole source, and seen in its first row.
    """
    names = [name for name, value in row.items() if _ONE_CHOICE.fullmatch(name) and is_text(value) and value.strip()]
    if len(names) < 2 or form.settings is None or form.is_chat or row.get("choices"):
        return
    raise DataError(
        f"{where}: found the columns {excerpt(', '.join(map(repr, names)), 200)}, each with a text, that the form "
        f"{form.name} does not read; expected none, for they may be what is chosen among. Rename question, choices "
        f"and answer to question, A, B and so on, and answer, or leave the columns out: columns (--columns "
        f"{_option(_names_as_now(form, row))})."
    )


def _check_label(form: RowForm, row: Row, where: str) -> None:
    """Check that a row's answer is not marked as one that is not wanted, as in KTO's data."""
    if row.get("label") is not False:  # 0 is a class of something as often
        return
    raise DataError(
        f"{where}, field 'label': found false; expected true or none, for in KTO's form a false one marks an answer "
        f"that is not wanted. Remove such rows, or, if it says something else, {_how_to_leave_out(form, row)}."
    )


def _how_to_leave_out(form: RowForm, row: Row) -> str:
    """Return what is to be done where a column is not meant to be read."""
    named = _option(_names_as_now(form, row))
    return f"leave the column out: columns (--columns {named})" if named else "rename the column"


def _names_as_now(form: RowForm, row: Row) -> dict[str, str]:
    """Return what `columns` has to name to read a row as its form does; nothing where no names do."""
    if form.settings is None:
        return {}
    named = {key: place for key, place in form.settings.named().items() if place in row}
    return {**named, "system": "system"} if "system" in row else named


def _option(named: Mapping[str, str]) -> str:
    return ",".join(f"{key}={place}" for key, place in named.items())


def _ways_to_name(row: Row) -> list[dict[str, str]]:
    """Return what `columns` may name in a row of no known form: NAME where nothing about a column tells it."""
    keys = {"choices": "choices", "system": "system", **_CONTEXTS}
    # The first of a key's columns. `input` is a prompt as often as what follows one.
    told = {key: column for column, key in reversed(keys.items()) if row.get(column) and column != "input"}
    chats = [column for column, value in row.items() if value and is_chat(value)]
    pair = {"prompt": "NAME", "response": "NAME"}
    choice = {"prompt": "NAME", "choices": told.get("choices", "NAME"), "answer": "NAME"}
    chat = {"messages": chats[0] if len(chats) == 1 else "NAME"}
    for way, more in ((pair, ("input", "system")), (choice, ("input", "system")), (chat, ("system",))):
        way.update({key: told[key] for key in more if key in told})
    if len(chats) == 1:
        return [chat]
    return [choice] if "choices" in told else [pair, choice, chat]


def _naming_advice(ways: Sequence[Mapping[str, str]]) -> str:
    return f"Say which hold what: columns (--columns {'; or '.join(map(_option, ways))}), or rename them."


def _context_advice(form: RowForm, row: Row, unread: Sequence[str]) -> str:
    """Return what to do about columns that a form does not read: what reads them, and what reads the rest as now."""
    key = _CONTEXTS[unread[0]]
    named = _names_as_now(form, row)
    if form.settings is None or key in named or ("history" in row and not form.is_chat):
        place = named.get(key, "system" if key == "system" else form.columns[0])
        return f"Write it into {place!r}, or remove or rename the column if it is not meant to be read."
    whole = dict(named)
    for column in unread:  # each key reads one column
        whole.setdefault(_CONTEXTS[column], column)
    left_out = "it" if len(whole) == len(named) + 1 else "them"
    return (
        f"Say what to read: columns (--columns {_option(whole)}), or to leave {left_out} out "
        f"--columns {_option(named)}."
    )


def _chat(reader: RowReader, column: str, system: str | None = None, name: str | None = None) -> RowForm:
    def fits(row: Row) -> bool:
        return name is not None or row[column] is None or isinstance(row[column], list)

    read = partial(_read_turns, reader, (column,), system=system)
    return RowForm(name or column, (column,), read, fits, is_chat=True, settings=ColumnSettings(messages=column))


def _read_turns(
    reader: RowReader, columns: tuple[str, ...], row: Row, where: str, system: str | None = None
) -> Reading:
    """Read the conversation that a column has, or several, one after the other."""
    blank = next((column for column in columns if row[column] is None or row[column] == []), None)
    if blank is not None:
        return blank
    value = row[columns[0]] if len(columns) == 1 else [turn for column in columns for turn in row[column]]
    turns = turns_of(value, f"{where}, field {' and '.join(map(repr, columns))}")
    head = text_in(row, system, where) if system in row else ""
    if turns[0][0] == "system":
        head = turns[0][1] if turns[0][1].strip() else head
        turns = turns[1:]
    is_unanswered = turns[-1][0] == "user"
    turns = turns[:-1] if is_unanswered else turns
    if any(not text.strip() for _, text in turns):
        return columns[0] if turns[-1][1].strip() else columns[-1]
    reader.num_unanswered += is_unanswered
    said, answered = [text for _, text in turns[::2]], [text for _, text in turns[1::2]]
    exchanges = list(zip(said, answered, strict=True))
    return Instruction(*exchanges[-1], (), row, head if head.strip() else "", tuple(exchanges[:-1]))


def _check_tools(form: RowForm, row: Row, where: str) -> None:
    """Check that a conversation's row names no tools: they would head the conversation, and are not in its text."""
    for column in _TOOLS:
        value = row.get(column)
        if value.strip() not in ("", "[]") if isinstance(value, str) else value:
            raise DataError(
                f"{where}, field {column!r}: found {describe(value)}; expected none, for what the turns say alone is "
                f"learned. Write it into the system text as the model is to see it, or {_how_to_leave_out(form, row)}."
            )
