from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raise_env.config import ColumnSettings
from raise_env.errors import DataError
from raise_env.pool import Instruction
from raise_env.row_files import Rendered
from raise_env.row_forms import RowReader


def read(*rows: dict[str, Any], choice_form: str = "text", **columns: str) -> Any:
    """Read rows as those of one file, and return the last as an instruction, or the field that has no text."""
    reader = RowReader(ColumnSettings(**columns), choice_form)
    return [reader.read(row, f"f, line {number}") for number, row in enumerate(rows, start=1)][-1]


def fault(*rows: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(*rows, **settings)
    message = str(caught.value)
    assert message.startswith(f"f, line {len(rows)}")
    return message.removeprefix(f"f, line {len(rows)}")


def turns(*texts: str, first: str = "user") -> list[dict[str, str]]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]


def sharegpt(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in messages]


# Pairs of columns


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"instruction": "a", "input": "c", "output": "b", "text": "all"}, "a\n\nc", "b"),
        ({"instruction": "a", "context": "c", "response": "b", "category": "qa"}, "a\n\nc", "b"),
        ({"instruction": "a", "context": "", "response": "b", "category": "qa"}, "a", "b"),
        ({"instruction": "a", "response": "b"}, "a", "b"),
        ({"instruction": "a", "output": "b", "answer": "c"}, "a", "b"),
        ({"prompt": "a", "prompt_id": "9", "completion": "b", "answer": "c"}, "a", "b"),
    ],
)
def test_read__pair_of_columns__prompt_and_response(row: dict[str, Any], prompt: str, response: str) -> None:
    assert read(row) == Instruction(prompt, response, (), row)


@pytest.mark.parametrize(
    ("row", "forms", "columns"),
    [
        (
            {"instruction": "i", "input": "", "output": "o", "response": "r"},
            "instruction and output; instruction and response",
            "prompt=instruction,response=output,input=input; or prompt=instruction,response=response",
        ),
        (
            {"question": "q", "answer": "a", "prompt": "p", "response": "r"},
            "question and answer; prompt and response",
            "prompt=question,response=answer; or prompt=prompt,response=response",
        ),
        (
            {"messages": turns("a", "b"), "prompt": "p", "completion": "c"},
            "prompt and completion; messages",
            "prompt=prompt,response=completion; or messages=messages",
        ),
        (
            {"instruction": "i", "response": "r", "conversations": turns("a", "b"), "system": "s"},
            "instruction and response; conversations",
            "prompt=instruction,response=response,system=system; or messages=conversations,system=system",
        ),
    ],
)
def test_read__several_forms__are_named_with_how_to_choose(row: dict[str, Any], forms: str, columns: str) -> None:
    message = fault(row)
    assert message.endswith(
        f"which are of several forms: {forms}. Say which hold what: columns (--columns {columns}), or rename them."
    )
    assert all(repr(column) in message for column in row)
    for way in columns.split("; or "):
        assert read(row, **dict(pair.split("=") for pair in way.split(","))).fields == row


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (
            {"query": "q", "solution": "s", "input": "i"},
            "prompt=NAME,response=NAME; or prompt=NAME,choices=NAME,answer=NAME; or messages=NAME",
        ),
        (
            {"system_prompt": "s", "question": "q", "response": "r"},
            "prompt=NAME,response=NAME,system=system_prompt; or prompt=NAME,choices=NAME,answer=NAME,"
            "system=system_prompt; or messages=NAME,system=system_prompt",
        ),
        (
            {"question_stem": "q", "choices": {"label": ["A"], "text": ["a"]}, "answerKey": "A"},
            "prompt=NAME,choices=choices,answer=NAME",
        ),
        (
            {"context": "c", "query": "q", "options": ["a", "b"], "correct_option": 1},
            "prompt=NAME,choices=options,answer=NAME,input=context",
        ),
        ({"conversation": turns("q", "a"), "context": "c", "system": "s"}, "messages=conversation,system=system"),
        (
            {"prompt": "q", "chosen": turns("q", "a"), "rejected": turns("q", "b")},
            "prompt=NAME,response=NAME; or prompt=NAME,choices=NAME,answer=NAME; or messages=NAME",
        ),
    ],
)
def test_read__unknown_form__is_told_with_the_columns_that_may_read_it(row: dict[str, Any], columns: str) -> None:
    message = fault(row)
    assert message.endswith(f". Say which hold what: columns (--columns {columns}), or rename them.")
    keys = [dict(pair.split("=") for pair in way.split(",")) for way in columns.split("; or ")]
    assert all(ColumnSettings(**named) for named in keys)


def test_read__later_row_of_another_form__names_both() -> None:
    first = {"question": "q", "answer": "a"}
    message = fault(first, {"prompt": "p", "response": "r"})
    assert (
        ": found a row of the form prompt and response; expected question and answer, as in the first row." in message
    )
    assert "form messages; expected question and answer" in fault(first, {"messages": turns("a", "b")})
    assert "found no field 'answer' among 'question'" in fault(first, {"question": "q"})
    # What all of the first form's rows have may be there beside what makes another form.
    alpaca = {"instruction": "i", "output": "the answer is yes", "answer": "yes"}
    listed = {**alpaca, "instruction": "i? Answer format: yes/no"}
    assert "'Answer format: ...'; expected instruction and output," in fault(alpaca, listed)
    assert "form instruction and output; expected instruction and output with answer" in fault(listed, alpaca)


# Columns of one's own


def test_read__named_columns__are_read() -> None:
    row = {"q": "a", "a": "b", "i": "c", "s": "head", "question": "x", "answer": "y"}
    assert read(row, prompt="q", response="a") == Instruction("a", "b", (), row)
    assert read(row, prompt="q", response="a", input="i", system="s") == Instruction("a\n\nc", "b", (), row, "head")
    assert read(row | {"s": " "}, prompt="q", response="a", system="s").system == ""
    chat = {"talk": turns("a", "b"), "s": "head"}
    assert read(chat, messages="talk") == Instruction("a", "b", (), chat)
    assert read(chat, messages="talk", system="s").system == "head"
    own = {"talk": [{"role": "system", "content": "own"}, *turns("a", "b")], "s": "head"}
    assert read(own, messages="talk", system="s").system == "own"
    blank = {"talk": [{"role": "system", "content": " "}, *turns("a", "b")], "s": "head"}
    assert read(blank, messages="talk", system="s").system == "head"


def test_read__named_columns__decide_between_forms() -> None:
    row = {"instruction": "i", "output": "o", "response": "r"}
    assert read(row, prompt="instruction", response="response").response == "r"


def test_read__file_without_the_named_columns__is_recognised_by_itself() -> None:
    row = {"question": "q", "answer": "a"}
    reader = RowReader(ColumnSettings("q", "a"), "text")
    assert reader.read(row, "f") == Instruction("q", "a", (), row)
    assert not reader.columns_found


def test_read__row_without_a_named_column__is_an_error_where_it_makes_the_row_and_else_has_it_blank() -> None:
    message = fault({"q": "a", "a": "b", "i": ""}, {"q": "a", "i": "b"}, prompt="q", response="a", input="i")
    assert ": found no field 'a' among 'q', 'i'" in message
    whole, short = {"q": "a", "a": "b", "i": "c", "s": "head"}, {"q": "a", "a": "b"}
    for rows in ((short, whole), (whole, short)):
        read_of = read(*rows, prompt="q", response="a", input="i", system="s", choices="c")
        assert (read_of.prompt, read_of.system) == (("a\n\nc", "head") if rows[1] is whole else ("a", ""))
    asked = {"q": "Which?", "among": TEXTS, "right": 1}
    assert "found no field 'among'" in fault(
        asked, {"q": "Which?", "right": "B"}, prompt="q", choices="among", answer="right"
    ), "the letter alone is no answer"
    assert read({"talk": turns("a", "b")}, messages="talk", system="s").response == "b"


def test_read__named_columns_that_the_first_row_has_in_part__are_read_all_the_same() -> None:
    # The known form would take the answer for the response.
    first = {"question": "q", "answer": "a", "long_answer": "It is a."}
    assert read(first, prompt="question", response="long_answer", system="head").response == "It is a."
    reader = RowReader(ColumnSettings("question", "long_answer", system="head"), "text")
    reader.read(first, "f")
    assert reader.columns_found == {"question", "long_answer"}
    reader.read({**first, "head": "h"}, "f")
    assert reader.columns_found == {"question", "long_answer", "head"}


def test_read__named_choices__of_any_form() -> None:
    row = {"ask": "Which?", "among": ["one", "two"], "right": 1}
    assert read(row, prompt="ask", choices="among", answer="right") == Instruction("Which?", "two", ("one", "two"), row)


@pytest.mark.parametrize("more", [{"system": "gpt-4", "history": [["hi", "ho"]]}, {"system": 3, "history": "note"}])
def test_read__system_and_history__are_not_read_where_columns_are_named(more) -> None:
    row = {"q": "a", "a": "b", **more}
    assert read(row, prompt="q", response="a") == Instruction("a", "b", (), row)


def test_read__system_and_history__are_read_where_no_named_column_is() -> None:
    row = {"q": "a", "a": "b", "system": "head", "history": "note"}
    assert read(row, prompt="q", response="a", system="system") == Instruction("a", "b", (), row, "head")
    assert read(row, prompt="q", response="a", input="history") == Instruction("a\n\nnote", "b", (), row)
    # The source has not the named columns: none is named in it.
    alpaca = {"instruction": "a", "output": "b", "system": "head"}
    assert read(alpaca, prompt="system", response="a").system == "head"


# Texts that no form reads


@pytest.mark.parametrize(
    ("row", "column", "columns"),
    [
        ({"question": "q", "answer": "a"}, "context", "prompt=question,response=answer,input=context"),
        ({"question": "q", "answer": "a"}, "passage", "prompt=question,response=answer,input=passage"),
        ({"question": "q", "answer": "a"}, "input", "prompt=question,response=answer,input=input"),
        ({"prompt": "q", "response": "a"}, "input", "prompt=prompt,response=response,input=input"),
        ({"prompt": "q", "response": "a"}, "system_prompt", "prompt=prompt,response=response,system=system_prompt"),
        ({"instruction": "q", "output": "a"}, "context", "prompt=instruction,response=output,input=context"),
        ({"instruction": "q", "response": "a"}, "input", "prompt=instruction,response=response,input=input"),
        (
            {"question": "q", "choices": {"label": ["A"], "text": ["a"]}, "answerKey": "A"},
            "passage",
            "prompt=question,choices=choices,answer=answerKey,input=passage",
        ),
        (
            {"question": "q", "answer": "a", "choices": ["a"]},
            "context",
            "prompt=question,response=answer,choices=choices,input=context",
        ),
        ({"messages": turns("q", "a")}, "system_prompt", "messages=messages,system=system_prompt"),
    ],
)
def test_read__text_beside_the_form__is_refused_with_the_columns_that_read_it(
    row: dict[str, Any], column: str, columns: str
) -> None:
    plain = read(row)
    for blank in ("", " \n", None, {"title": [""]}, 3, Rendered("2026-01-02")):
        assert read({**row, column: blank}) == replace(plain, fields={**row, column: blank})
    with_text = {**row, column: "It matters."}
    message = fault(row, with_text)
    others = columns.rpartition(",")[0]
    assert message.startswith(f", field {column!r}: found text that the form ")
    assert message.endswith(f"columns (--columns {columns}), or to leave it out --columns {others}.")
    named = dict(pair.split("=") for pair in columns.split(","))
    reading = read(with_text, **named)
    assert "It matters." in (reading.system, reading.prompt.partition("\n\n")[2]), "the remedy reads it"
    assert (reading.response, reading.choices) == (plain.response, plain.choices)
    del named["system" if column == "system_prompt" else "input"]
    assert read(with_text, **named) == replace(plain, fields=with_text), "or leaves it out"


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"question": "q", "A": "a", "B": "b", "answer": "A", "context": "c"}, "Write it into 'question'"),
        ({"question": "q", "A": "a", "B": "b", "answer": "A", "system_prompt": "c"}, "Write it into 'system'"),
        ({"instruction": "q", "input": "", "output": "a", "context": "c"}, "Write it into 'input'"),
        ({"prompt": "q", "response": "a", "system": "s", "system_prompt": "c"}, "Write it into 'system'"),
        ({"prompt": "q", "response": "a", "history": [], "context": "c"}, "Write it into 'prompt'"),
        (
            {"prompt": "q", "response": "a", "system": "s", "context": "c"},
            "--columns prompt=prompt,response=response,system=system,input=context)",
        ),
    ],
)
def test_read__text_that_no_name_of_a_column_reads_with_the_rest__is_to_be_moved(
    row: dict[str, Any], advice: str
) -> None:
    assert advice in fault(row)


@pytest.mark.parametrize(
    ("row", "choices", "prompt"),
    [
        ({"options": ["yes", "no"]}, "options", "q"),
        ({"options": ["yes", "no"], "article": "It was."}, "options", "q\n\nIt was."),
        ({"choice": ["yes", "no"], "dialogue": "W: Was it?"}, "choice", "q\n\nW: Was it?"),
        ({"endings": ["yes", "no"], "story": "It was.", "hint": ""}, "endings", "q\n\nIt was."),
        ({"choices": ["yes", "no"], "hint": "It was."}, "choices", "q\n\nIt was."),
    ],
)
def test_read__choices_or_passage_in_columns_of_other_names__are_refused_instead_of_lost(
    row: dict[str, Any], choices: str, prompt: str
) -> None:
    row = {"question": "q", "answer": "B", **row}
    message = fault(row)
    assert ": found a list that the form" in message or ": found text that the form" in message
    # The remedy reads all that was missed, and not only what the message names.
    advice = message.partition("(--columns ")[2].partition(")")[0]
    named = dict(pair.split("=") for pair in advice.split(","))
    assert named["choices"] == choices
    assert read(row, **named) == Instruction(prompt, "no", ("yes", "no"), row)
    assert read(row, prompt="question", response="answer") == Instruction("q", "B", (), row), "as it was asked for"


@pytest.mark.parametrize("column", ["options", "choice", "endings"])
def test_read__columns_of_choices__are_missed_only_where_there_are_some_and_no_others(column: str) -> None:
    row = {"question": "q", "answer": "a"}
    for empty in (None, [], {}, "", "set at the shop", 3):
        assert read({**row, column: empty}).response == "a"
    for more in ({"choices": ["a", "b"]}, {"A": "a", "B": "b"}):
        assert read({**row, **more, column: ["x"]}).choices == ("a", "b")
    assert read({"messages": turns("q", "a"), column: ["x"]}).response == "a"
    assert "found an object that the form" in fault({**row, column: {"A": "a", "B": "b"}})
    named = {"prompt": "question", "response": "answer", "choices": column}
    assert read({**row, column: {"A": "b", "B": "a"}}, **named).right_choice == 1, "as the message says"
    assert "Write it into 'choices'" in fault({**row, "choices": None, column: ["a"]})


@pytest.mark.parametrize(
    "names", [("option_a", "option_b"), ("option1", "option2"), ("Choice A", "Choice B"), ("a", "b"), ("A", "C")]
)
def test_read__choices_in_columns_of_other_names__are_refused_instead_of_lost(names: tuple[str, str]) -> None:
    row = {"question": "q", **dict.fromkeys(names, "text"), "answer": "B"}
    for answer in ("B", 1):
        message = fault({**row, "answer": answer})
        assert message.startswith(f": found the columns {names[0]!r}, {names[1]!r}, each with a text, that the form")
    others = message.partition("--columns ")[2].removesuffix(").")
    assert read(row, **dict(pair.split("=") for pair in others.split(","))).response == "B"
    renamed = dict(zip(("question", "A", "B", "answer"), row.values(), strict=True))
    assert read(renamed).choices == ("text", "text")
    for harmless in ({names[1]: None}, {names[1]: 3}, {"choices": ["x", "y"]}):
        assert read({**row, **harmless}).prompt == "q"
    assert read({"messages": turns("q", "a"), **dict.fromkeys(names, "text")}).response == "a"


@pytest.mark.parametrize(
    ("column", "value", "found"),
    [
        ("dialogue", ["W: Was it?", "M: It was."], "a list"),
        ("context", {"title": ["HotpotQA"], "sentences": [["It was.", "So."]]}, "an object"),
        ("context", [["2WikiMultihopQA", ["It was.", "So."]]], "a list"),
    ],
)
def test_read__passage_that_holds_texts__is_refused_and_is_to_be_joined(column: str, value: object, found: str) -> None:
    row = {"question": "q", "answer": "a", column: value}
    assert f", field {column!r}: found {found} that the form question and answer does not read" in fault(row)
    assert "Join what it holds" in fault(row, prompt="question", response="answer", input=column)
    assert read({**row, column: ["", {"title": [], "id": 3}]}).response == "a"
    assert read({"prompt": "q", "response": "a", "system_prompt": value}).response == "a"


def test_read__text_that_a_conversation_holds__is_not_missed() -> None:
    row = {"messages": turns("q", "a"), "context": "c", "input": "i", "passage": "p"}
    assert read(row).prompt == "q"
    head = [{"role": "system", "content": "head"}, *turns("q", "a")]
    assert read({"messages": head, "system_prompt": "head\n"}).system == "head"
    assert "field 'system_prompt'" in fault({"messages": head, "system_prompt": "another"})


# Multiple choice


TEXTS = ["bank", "library", "mall"]


@pytest.mark.parametrize(
    "row",
    [
        {"choices": {"label": ["A", "B", "C"], "text": TEXTS}, "answerKey": "B"},
        {"choices": {"label": ["1", "2", "3"], "text": TEXTS}, "answerKey": "2"},
        {"choices": {"label": ["A", "B", "C"], "text": TEXTS}, "answerKey": "2"},
        {"choices": {"label": ["1", "2", "3"], "text": TEXTS}, "answerKey": "B"},
        {
            "choices": [{"label": label, "text": text} for label, text in zip("ABC", TEXTS, strict=True)],
            "answerKey": "B",
        },
        {"choices": {"A": "bank", "B": "library", "C": "mall", "D": None}, "answer": "library"},
        {"choices": {"A": "bank", "B": "library", "C": "mall"}, "answerKey": "B"},
        {"choices": TEXTS, "answer": "library"},
        {"choices": TEXTS, "answer": "B"},
        {"choices": TEXTS, "answer": 1, "subject": "places"},
        {"choices": TEXTS, "answer": 1.0, "subject": "as pandas has it"},
        {"A": "bank", "B": "library", "C": "mall", "answer": "B"},
        {"A": "bank", "B": "library", "C": "mall", "D": None, "answer": "library"},
    ],
)
def test_read__choices__in_each_form_found(row: dict[str, Any]) -> None:
    row = {"question": "Where?", **row}
    assert read(row) == Instruction("Where?", "library", tuple(TEXTS), row)
    asked = "Where?\nA. bank\nB. library\nC. mall"
    assert read(row, choice_form="letter") == Instruction(asked, "B", ("A", "B", "C"), row)


def test_read__more_choices_than_letters__are_refused_where_they_get_letters() -> None:
    many = [f"choice {number}" for number in range(27)]
    row = {"question": "Which?", "choices": many, "answer": 26}
    assert read(row) == Instruction("Which?", many[-1], tuple(many), row)
    assert read(row | {"choices": many[1:], "answer": "Z"}, choice_form="letter").response == "Z"
    message = fault(row, choice_form="letter")
    assert message.startswith(", field 'choices': found 27 choices; expected at most 26, for each gets a letter.")


def test_read__answer_that_means_two_choices__is_refused_where_it_is_no_label() -> None:
    row = {"question": "Which group?", "choices": ["O", "B", "A", "AB"]}
    message = fault(row | {"answer": "A"})
    assert (
        "'answer' to be 'A', which may mean 'O' or 'A'; expected one choice alone. Write the choice's number" in message
    )
    assert read(row | {"answer": "B"}).response == "B", "its text and its letter"
    assert read(row | {"answer": "AB"}).response == "AB"
    assert read(row | {"answer": "D"}).response == "AB"
    assert read(row | {"answer": 2}).response == "A"
    for labels, answer in (("1234", "A"), ("ABCD", "1")):
        texts = ["2", "A", "1", "B"]
        labelled = {"question": "q", "choices": {"label": list(labels), "text": texts}}
        assert "which may mean '2' or " in fault(labelled | {"answer": answer})
        assert "expected one choice alone. Write the choice's label." in fault(labelled | {"answer": answer})
        assert [read(labelled | {"answer": label}).right_choice for label in labels] == [0, 1, 2, 3]


def test_read__letter_beside_labels_that_are_letters__is_no_place() -> None:
    row = {"question": "q", "choices": {"label": list("BCD"), "text": ["x", "y", "z"]}}
    assert read(row | {"answerKey": "B"}).response == "x"
    assert "found 'B', 'C', 'D'; expected the row's 'answerKey' among them" in fault(row | {"answerKey": "A"})
    row["choices"]["label"] = ["a)", "b)", "c)"]
    assert read(row | {"answerKey": "A"}).response == "x"


def test_read__choices_that_are_letters_themselves__letter_first_in_columns() -> None:
    row = {"question": "q", "A": "B", "B": "A", "C": "x", "D": "y", "answer": "A"}
    assert read(row).response == "B"


def test_read__choices_that_are_numbers__text_before_number() -> None:
    assert read({"question": "q", "choices": ["2", "1", "0"], "answer": "1"}).response == "1"
    assert read({"question": "q", "choices": ["2", "1", "0"], "answer": 0}).response == "2"


CITIES = ["Paris", "Rome", "Oslo", "Bern"]


@pytest.mark.parametrize(
    ("labels", "answer", "expected"),
    [
        ([1, 2, 3, 4], 1, "Paris"),
        (["1", "2", "3", "4"], 1, "Paris"),
        ([1, 2, 3, 4], "1", "Paris"),
        ([0, 1, 2, 3], 1, "Rome"),
        (["0", "1", "2", "3"], "1", "Rome"),
        ([30, 20, 10, 0], 0, "Bern"),
        (list("ABCD"), 1, "Rome"),
        (list("ABCD"), "1", "Paris"),
        ([None] * 4, 1, "Rome"),
        ([""] * 4, 1, "Rome"),
    ],
)
def test_read__number_beside_labels__is_a_label_before_a_place(labels: Any, answer: Any, expected: str) -> None:
    for choices in (
        {"label": labels, "text": CITIES},
        [{"label": label, "text": text} for label, text in zip(labels, CITIES, strict=True)],
    ):
        assert read({"question": "Where?", "choices": choices, "answerKey": answer}).response == expected


@pytest.mark.parametrize(
    ("labels", "answer", "expected"),
    [
        (
            [1, 2, 3, 4],
            0,
            ": found '1', '2', '3', '4'; expected the row's 'answerKey' among them, which is 0. Write both",
        ),
        (
            ["0", "1", "2", "3"],
            "4",
            ": found '0', '1', '2', '3'; expected the row's 'answerKey' among them, which is '4'",
        ),
        (list("ABCD"), 4, ": found 'A', 'B', 'C', 'D'; expected the row's 'answerKey' among them, which is 4"),
        (list("ABCC"), "C", ": found the label 'C' twice; expected each once."),
        (["A", None, "C", "D"], "A", ", item 2: found the label null; expected text or a number, for the others have"),
        (["A", "B", "C", 4.0], "A", ", item 4: found the label 4.0; expected text or a number"),
    ],
)
def test_read__bad_labels__are_named(labels: Any, answer: Any, expected: str) -> None:
    row = {"question": "Where?", "choices": {"label": labels, "text": CITIES}, "answerKey": answer}
    assert fault(row).startswith(f", field 'choices'{expected}")


def test_read__choices_without_labels__are_named_by_their_texts() -> None:
    row = {"question": "Which?", "choices": [{"text": "one"}, {"text": "two"}, {"text": "None"}], "answer": "None"}
    assert read(row) == Instruction("Which?", "None", ("one", "two", "None"), row)
    for choices in (row["choices"], ["one", "two", "None"]):
        message = fault(row | {"choices": choices, "answer": "1"})
        assert "which is '1'. In quotes a number may count from 0 or from 1: write it without quotes," in message


def test_read__empty_choices_in_columns__are_none_at_the_end_and_a_blank_field_before_it() -> None:
    row = {"question": "Where?", "A": "bank", "B": "library", "C": "mall", "D": "", "E": " ", "F": None, "answer": "B"}
    assert read(row) == Instruction("Where?", "library", tuple(TEXTS), row)
    assert read(row, choice_form="letter").choices == ("A", "B", "C")
    assert "found 'D'; expected one of the letters A, B, C," in fault(row | {"answer": "D"})
    for empty in ("", " "):
        assert read(row | {"C": empty, "D": "zoo"}) == "C"
        assert read(row | {"A": empty}) == "A", "whatever the answer is"
    # A table of another kind has null for it, and a row of .jsonl may have no such field.
    assert read(row | {"C": None, "D": "zoo", "answer": "D"}) == "C"
    assert read({"question": "Where?", "A": "bank", "B": "library", "D": "zoo", "answer": "D"}) == "C"
    assert read(row | dict.fromkeys("ABC", "")) == "A"


@pytest.mark.parametrize("with_labels", [False, True])
def test_read__empty_choices_in_a_list__are_none_at_the_end_and_a_blank_field_before_it(with_labels: bool) -> None:
    def row(*texts: str | None) -> dict[str, Any]:
        labelled = {"label": list("ABCDE"[: len(texts)]), "text": list(texts)}
        return {"question": "Where?", "choices": labelled if with_labels else list(texts), "answer": "B"}

    for ending in ((), ("",), (" ", None), (None,)):
        assert read(row(*TEXTS, *ending)).choices == tuple(TEXTS)
        assert read(row(*TEXTS, *ending), choice_form="letter").choices == ("A", "B", "C")
    for empty in ("", " ", None):
        assert read(row("bank", "library", empty, "zoo")) == "choices"
        assert read(row(empty, "library")) == "choices"
        assert read(row(empty, empty)) == "choices", "these are blank, and the row no open question"


def test_read__answer_that_names_an_empty_choice__is_an_error() -> None:
    assert "expected the row's 'answer' among them, which is 1" in fault(
        {"question": "Is it?", "choices": ["yes", ""], "answer": 1}
    )


def test_read__choices_that_read_alike__keep_which_is_right() -> None:
    twice = ["clumsy", "dull", "clumsy"]
    for row in (
        {"choices": {"label": list("ABC"), "text": twice}, "answerKey": "C"},
        {"choices": twice, "answer": 2},
        {"choices": twice, "answer": "C"},
        {"A": "clumsy", "B": "dull", "C": "clumsy", "answer": "C"},
    ):
        reading = read({"question": "What?", **row})
        assert (reading.response, reading.right, reading.right_choice) == ("clumsy", 2, 2)
        letter = read({"question": "What?", **row}, choice_form="letter")
        assert (letter.response, letter.right, letter.right_choice) == ("C", None, 2)
    # Where the text tells it, nothing is added: what a pool's content is stays as it was.
    assert read({"question": "What?", "choices": twice, "answer": 0}).right is None
    assert read({"question": "What?", "choices": twice, "answer": 1}).right is None


def test_read__rows_without_choices_among_others__are_open_questions() -> None:
    first = {"question": "q", "choices": TEXTS, "answer": 1}
    for choices in (None, [], {"label": [], "text": []}, {"label": None, "text": None}, {"text": []}):
        assert read(first, {"question": "q", "choices": choices, "answer": "So."}).choices == ()


def test_read__key_without_choices__is_a_blank_field_and_no_answer() -> None:
    first = {"question": "q", "choices": {"label": list("ABC"), "text": TEXTS}, "answerKey": "B"}
    named = {"prompt": "question", "choices": "choices", "answer": "answerKey"}
    for choices in (None, [], {"label": [], "text": []}, {"label": None, "text": None}):
        assert read(first, first | {"choices": choices}) == "choices"
        assert read(first | {"choices": choices}) == "choices"
        assert read(first, first | {"choices": choices}, **named) == "choices"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"choices": TEXTS, "answer": 3},
            "field 'choices': found 'bank', 'library', 'mall'; expected the row's 'answer'",
        ),
        ({"choices": TEXTS, "answer": "D"}, "among them, which is 'D'"),
        ({"choices": TEXTS, "answer": "2"}, "among them, which is '2'"),
        ({"choices": TEXTS, "answer": -1}, "among them, which is -1. A number without quotes counts from 0: write"),
        (
            {"choices": {"label": list("ABC"), "text": TEXTS}, "answer": 3},
            "which is 3. A number without quotes counts from 0: write it so, or the choice's letter, and null where",
        ),
        ({"choices": TEXTS, "answer": True}, "found the row's 'answer' to be true; expected text or a whole number"),
        ({"choices": TEXTS, "answer": 1.5}, "found the row's 'answer' to be 1.5; expected text or a whole number"),
        ({"choices": TEXTS, "answer": 3.0}, "among them, which is 3"),
        ({"choices": TEXTS, "answer": Rendered("1")}, "to be 1, which is not stored as text; expected text or a whole"),
        (
            {"choices": [Rendered("1"), "b"], "answer": "b"},
            "item 1: found 1, which is not stored as text; expected text",
        ),
        (
            {"choices": {"B": "x", "A": "y"}, "answer": "A"},
            "found an object with 'B', 'A'; expected a list of texts, a list of objects with label and text, the lists",
        ),
        ({"choices": {"label": ["A"], "text": TEXTS}, "answerKey": "A"}, "found an object with 'label', 'text'; exp"),
        (
            {"choices": [{"key": "A", "value": "x"}, {"key": "B", "value": "y"}], "answer": "x"},
            "found a list of objects with 'key', 'value'; expected a list of texts, a list of objects with label and",
        ),
        ({"choices": {"label": list("ABC"), "text": TEXTS}, "answerKey": "D"}, "found 'A', 'B', 'C'; expected"),
        ({"A": "a", "B": "b", "answer": "C"}, "field 'answer': found 'C'; expected one of the letters A, B"),
        (
            {"A": "a", "B": "b", "answer": 1},
            "field 'answer': found 1; expected one of the letters A, B, or the text of",
        ),
        (
            {"A": "1", "B": "2", "answer": Rendered("1")},
            "found 1, which is not stored as text; expected one of the letters A, B, or the text",
        ),
        ({"A": "a", "B": "b", "answer": ["A"]}, "field 'answer': found a list; expected one of the letters A, B"),
    ],
)
def test_read__bad_choices__are_named(row: dict[str, Any], expected: str) -> None:
    assert expected in fault({"question": "Where?", **row})


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"choices": TEXTS, "answer": None}, "answer"),
        ({"choices": {"label": list("ABC"), "text": TEXTS}, "answerKey": ""}, "answerKey"),
        ({"choices": ["", "a"], "answer": 0}, "choices"),
        ({"A": " ", "B": "b", "answer": "A"}, "A"),
        ({"A": "a", "B": "b", "answer": None}, "answer"),
    ],
)
def test_read__no_answer__is_a_blank_field(row: dict[str, Any], field: str) -> None:
    assert read({"question": "Where?", **row}) == field
    assert read({**row, "question": ""}) == "question"


def test_read__alternatives_in_the_instruction__each_in_the_outputs_place() -> None:
    row = {
        "instruction": "Which?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2",
        "input": "",
        "output": "the correct answer is answer2",
        "answer": "answer2",
    }
    choices = ("the correct answer is answer1", "the correct answer is answer2")
    for form in ("text", "letter"):
        assert read(row, choice_form=form) == Instruction(row["instruction"], choices[1], choices, row)
    yes = {"instruction": "Is it? Answer format: true/false", "output": "it is true: true.", "answer": "true"}
    assert read(yes).choices == ("it is true: true.", "it is true: false."), "the last place is the answer's"
    assert "found 'answer3'; expected one of answer1, answer2" in fault(row | {"answer": "answer3"})
    assert "which is also in the output 'no'" in fault(row | {"output": "no"})
    assert read(row | {"answer": ""}) == "answer"


# Conversations


@pytest.mark.parametrize("as_row", [lambda chat: {"messages": chat}, lambda chat: {"conversations": sharegpt(chat)}])
def test_read__conversation__last_exchange_and_those_before(as_row: Any) -> None:
    row = as_row(turns("a", "b"))
    assert read(row) == Instruction("a", "b", (), row)
    row = as_row([{"role": "system", "content": "head"}, *turns("a", "b", "c", "d", "e", "f")])
    assert read(row) == Instruction("e", "f", (), row, "head", (("a", "b"), ("c", "d")))


def test_read__prompt_and_completion_that_are_turns__are_one_conversation() -> None:
    head = {"role": "system", "content": "head"}
    row: dict[str, Any] = {"prompt": turns("a"), "completion": turns("b", first="assistant")}
    assert read(row) == Instruction("a", "b", (), row)
    longer = {"prompt": [head, *turns("a", "b", "c")], "completion": turns("d", first="assistant")}
    assert read(row, longer) == Instruction("c", "d", (), longer, "head", (("a", "b"),))
    assert read(row | {"system": "head"}).system == "head"
    assert fault(row | {"completion": turns("b")}).startswith(
        ", field 'prompt' and 'completion', turn 2: found a second turn of the user in a row"
    )
    assert read(row, row | {"prompt": []}) == "prompt"
    assert read(row, row | {"completion": []}) == "completion"
    assert read(row | {"completion": turns(" ", first="assistant")}) == "completion"
    assert read(row | {"prompt": turns("")}) == "prompt"
    # Nothing else is a conversation, and all rows have one form.
    text = {"prompt": "p", "completion": "c"}
    assert read(text) == Instruction("p", "c", (), text)
    assert "expected prompt and completion, both lists of turns, as in the first row" in fault(row, text)
    assert "form prompt and completion, both lists of turns; expected prompt and completion," in fault(text, row)
    assert "expected text. If the column holds whole" in fault(text | {"completion": row["completion"]})
    assert "messages; prompt and completion, both lists of turns" in fault({"messages": turns("a", "b"), **row})
    assert "expected one of these forms" in fault({"prompt": turns("a"), "solution": "b"})


def test_read__other_names_of_roles__are_known() -> None:
    chat = [("developer", "head"), ("human", "a"), ("ChatGPT", "b"), ("user", "c"), ("model", "d")]
    row = {"messages": [{"role": role, "content": text} for role, text in chat]}
    assert read(row) == Instruction("c", "d", (), row, "head", (("a", "b"),))
    assert read({"conversations": turns("a", "b")}).response == "b", "a column's name does not decide on its turns'"


def test_read__content_of_text_parts__is_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read({"messages": [{"role": "user", "content": parts}, *turns("c", first="assistant")]}).prompt == "ab"


PIRATE = {"system": "Be a pirate", "history": [["hi", "ho"], ["a", "b"]]}


@pytest.mark.parametrize(
    ("row", "prompt", "response", "choices"),
    [
        ({"instruction": "i", "output": "o"}, "i", "o", ()),
        ({"instruction": "i", "input": "x", "output": "o"}, "i\n\nx", "o", ()),
        ({"prompt": "i", "completion": "o"}, "i", "o", ()),
        ({"question": "i", "choices": ["n", "o"], "answer": 1}, "i", "o", ("n", "o")),
        ({"question": "i", "choices": {"label": ["A"], "text": ["o"]}, "answerKey": "A"}, "i", "o", ("o",)),
        ({"question": "i", "A": "n", "B": "o", "answer": "B"}, "i", "o", ("n", "o")),
    ],
)
def test_read__system_and_history_in_columns__head_the_conversation(
    row: dict[str, Any], prompt: str, response: str, choices: tuple[str, ...]
) -> None:
    row = {**row, **PIRATE}
    assert read(row) == Instruction(prompt, response, choices, row, "Be a pirate", (("hi", "ho"), ("a", "b")))
    for empty in ({"system": "", "history": []}, {"system": " ", "history": " "}, {"system": None, "history": None}):
        row |= empty
        assert read(row) == Instruction(prompt, response, choices, row)


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_read__system_beside_turns__is_theirs_if_they_have_none(column: str) -> None:
    row = {column: turns("a", "b"), "system": "head", "history": "a note"}
    assert read(row) == Instruction("a", "b", (), row, "head")
    assert read({"talk": row[column], "system": "head"}, messages="talk").system == ""
    assert read({"talk": row[column], "system": "head"}, messages="talk", system="system").system == "head"
    for own, expected in (("own", "own"), (" ", "head")):
        assert read(row | {column: [{"role": "system", "content": own}, *turns("a", "b")]}).system == expected


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"system": 3}, "field 'system': found 3; expected the text that a conversation is headed by. Rename"),
        ({"system": "\ud83d"}, "field 'system': found \\ud83d at character 1"),
        ({"history": "hi"}, "field 'history': found text; expected what was said before: a list of pairs"),
        ({"history": {"hi": "ho"}}, "field 'history': found an object; expected"),
        ({"history": [["a", "b"], ["hi"]]}, "field 'history', item 2: found a list; expected what was said before"),
        ({"history": turns("a", "b")}, "field 'history', item 1: found an object; expected"),
        ({"history": [["a", None]]}, "field 'history', item 1: found null; expected text"),
    ],
)
def test_read__system_or_history_of_another_form__is_refused_instead_of_lost(
    columns: dict[str, Any], expected: str
) -> None:
    assert expected in fault({"instruction": "i", "output": "o", **columns})


def test_read__history_without_text__is_a_blank_field() -> None:
    assert read({"instruction": "i", "output": "o", "history": [["a", "b"], ["c", " "]]}) == "history"


@pytest.mark.parametrize(
    ("extra", "value", "found"),
    [
        ("tool_calls", [{"function": {"name": "look_up"}}], "a list"),
        ("function_call", {"name": "look_up"}, "an object"),
        ("refusal", "I will not.", "text"),
        ("reasoning_content", "Hm.", "text"),
        ("reasoning", "Hm.", "text"),
        ("thinking", "Hm.", "text"),
    ],
)
def test_read__turn_that_says_more_than_its_text__is_refused_instead_of_lost(
    extra: str, value: object, found: str
) -> None:
    for content in ("b", None):
        chat = [*turns("a"), {"role": "assistant", "content": content, extra: value}]
        expected = f", turn 2, {extra}: found {found}; expected none, for a turn's text alone is learned. Write it into"
        assert fault({"messages": chat}).startswith(f", field 'messages'{expected} the content")
    for empty in (None, "", " \n", [], {}):
        assert read({"messages": [*turns("a"), {"from": "gpt", "value": "b", extra: empty}]}).response == "b"


@pytest.mark.parametrize(
    ("mark", "value", "expected"),
    [
        ("weight", 0, "0; expected 1 or none"),
        ("weight", 0.5, "0.5; expected 1 or none"),
        ("train", False, "false; expected true or none"),
        ("loss", False, "false; expected true or none"),
    ],
)
def test_read__answer_that_is_not_to_be_learned__is_refused(mark: str, value: object, expected: str) -> None:
    chat: list[dict[str, Any]] = [*turns("a"), {"role": "assistant", "content": "b", mark: value}, *turns("c", "d")]
    message = fault({"messages": chat})
    assert message.startswith(f", field 'messages', turn 2, {mark}: found {expected}, for every answer")
    assert "Remove the turn with the question before it" in message
    for learned in (1, 1.0, True, None):
        chat[1][mark] = learned
        assert read({"messages": chat}).response == "d"
    chat[0][mark] = value
    assert read({"messages": chat}).response == "d", "a question is never learned"


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "q", "completion": "a"}, "prompt=prompt,response=completion"),
        ({"instruction": "q", "output": "a", "system": "s"}, "prompt=instruction,response=output,system=system"),
        ({"messages": turns("q", "a")}, "messages=messages"),
        ({"prompt": turns("q"), "completion": turns("a", first="assistant")}, None),
    ],
)
def test_read__row_whose_label_is_false__is_refused(row: dict[str, Any], columns: str | None) -> None:
    for other in (True, None, 0, 1, "false"):
        assert read({**row, "label": other}).response == "a"
    message = fault(row, {**row, "label": False})
    assert message.startswith(", field 'label': found false; expected true or none, for in KTO's form")
    if columns is None:
        assert message.endswith("if it says something else, rename the column.")
        return
    assert message.endswith(f"leave the column out: columns (--columns {columns}).")
    named = dict(pair.split("=") for pair in columns.split(","))
    assert read({**row, "label": False}, **named) == replace(read(row), fields={**row, "label": False})


def test_read__label_that_is_false_beside_choices__is_no_fault() -> None:
    assert read({"question": "q", "choices": ["no", "yes"], "answer": 0, "label": False}).response == "no"


@pytest.mark.parametrize("column", ["tools", "functions", "chat_template_kwargs"])
def test_read__tools_beside_turns__are_refused_instead_of_lost(column: str) -> None:
    for value, found in (([{"name": "look_up"}], "a list"), ('[{"name": "look_up"}]', "text"), ({"x": 1}, "an object")):
        row = {"messages": turns("a", "b"), "system": "s", column: value}
        message = fault(row)
        assert message.startswith(f", field {column!r}: found {found}; expected none, for what the turns say alone is")
        assert message.endswith("leave the column out: columns (--columns messages=messages,system=system).")
        assert read(row, messages="messages", system="system") == Instruction("a", "b", (), row, "s")
    for empty in (None, [], "", "[]", {}):
        assert read({"messages": turns("a", "b"), column: empty}).response == "b"
    row = {"talk": turns("a", "b"), column: ["look_up"]}
    assert read(row, messages="talk").response == "b", "named columns alone are read"
    assert read({"prompt": "a", "response": "b", column: "a hammer"}).response == "b", "no conversation's tools"


def test_read__question_without_an_answer_at_the_end__is_left_out_and_counted() -> None:
    reader = RowReader(ColumnSettings(), "text")
    row = {"messages": turns("a", "b", "c")}
    assert reader.read(row, "f") == Instruction("a", "b", (), row)
    assert reader.num_unanswered == 1
    assert reader.read({"messages": turns("a", "", "c")}, "f") == "messages"
    assert reader.num_unanswered == 1, "a row that is skipped is counted as that alone"


@pytest.mark.parametrize(
    ("chat", "expected"),
    [
        (turns("a", "b", first="assistant"), ", turn 1: found that the assistant begins; expected the user."),
        (
            [{"role": "system", "content": "s"}, *turns("a", first="assistant")],
            ", turn 2: found that the assistant begi",
        ),
        (turns("a"), ": found no turn of the assistant; expected one to learn from."),
        ([*turns("a", "b"), *turns("c", first="assistant")], ", turn 3: found a second turn of the assistant in a row"),
        ([*turns("a"), *turns("c", "d")], ", turn 2: found a second turn of the user in a row"),
        (
            [*turns("a", "b"), {"role": "system", "content": "s"}],
            ", turn 3: found a system text; expected it in the first",
        ),
        ([{"role": "system", "content": "s"}] * 2, ", turn 2: found a system text"),
        ([*turns("a"), {"role": "tool", "content": "x"}], ", turn 2: found the role 'tool'; expected one of system,"),
        ([*turns("a"), {"role": None, "content": "x"}], ", turn 2: found the role null"),
        ([*turns("a"), {"role": "assistant"}], ", turn 2: found no 'content'; expected the turn's text in it"),
        ([*turns("a"), {"from": "gpt", "text": "b"}], ", turn 2: found no 'value'; expected the turn's text in it"),
        ([*turns("a"), {"role": "assistant", "content": 3}], ", turn 2, content: found 3; expected text"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            ", turn 1, content, part 1: found 'image_url'; expected parts of the type 'text' alone",
        ),
        (["hello"], ", turn 1: found text; expected an object with role and content, or from and value"),
    ],
)
def test_read__conversation_out_of_order__is_named_by_its_turn(chat: Any, expected: str) -> None:
    message = fault({"messages": chat})
    assert message.startswith(f", field 'messages'{expected}")


def test_read__turn_without_text__is_a_blank_field() -> None:
    assert read({"messages": turns("a", " ")}) == "messages"
    assert read({"messages": turns("a", "", "c", "d")}) == "messages"
    assert read({"messages": [{"role": "system", "content": " "}, *turns("a", "b")]}).system == ""


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_read__conversation_that_is_null_or_empty__is_a_blank_field_in_any_row(column: str) -> None:
    whole = {column: turns("a", "b"), "id": 1}
    for empty in (None, []):
        assert read({column: empty}) == column
        assert read(whole, {column: empty, "id": 2}) == column
        assert read({column: empty, "id": 2}, whole) == Instruction("a", "b", (), whole)
        assert read({"talk": empty}, messages="talk") == "talk"
    pair = {"prompt": "p", "response": "r", column: None}
    assert read(pair).response == "r", "what is there decides on the form"


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_read__conversation_that_is_no_list__is_refused_by_what_it_is(column: str) -> None:
    whole = {column: turns("a", "b")}
    for value, found in (('[{"role": "user"}]', "text"), ({"role": ["user"], "content": ["a"]}, "an object")):
        expected = f", field {column!r}: found {found}; expected the turns of a conversation, each with role and"
        assert fault({column: value, "id": 1}).startswith(expected)
        assert fault(whole, {column: value}).startswith(expected)
        assert read({column: value, "prompt": "p", "response": "r"}).response == "r", "what is there decides"


def test_read__turn_whose_content_is_null__is_a_blank_field_or_no_system_text() -> None:
    assert read({"messages": [*turns("a"), {"role": "assistant", "content": None}]}) == "messages"
    assert read({"messages": [{"role": "user", "content": None}, *turns("b", first="assistant")]}) == "messages"
    head = {"role": "system", "content": None}
    assert read({"messages": [head, *turns("a", "b")]}).system == ""
    assert read({"messages": [head, *turns("a", "b")], "system": "head"}).system == "head"


# Values that are no text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, "found 3; expected text. Write the value in quotes; in a table, store the column as text."),
        (["a", "b"], "found a list; expected text. Join what it holds into one text, or keep one of several answers."),
        ({"a": "b"}, "found an object; expected text. Join what it holds into one text, or keep one"),
        (turns("a", "b"), "expected text. If the column holds whole conversations, their last answers included, name"),
        (Rendered("2.50"), "found 2.50, which is not stored as text; expected text. Store the column as text."),
    ],
)
def test_read__value_that_is_no_text__is_refused_with_what_to_do_about_it(value: object, expected: str) -> None:
    for column in ("prompt", "response"):
        message = fault({"prompt": "a", "response": "b", column: value})
        assert message.startswith(f", field {column!r}: found ")
        assert expected in message
    assert "in quotes" not in fault({"prompt": "a", "response": "b", "history": [["a", None]]})


# Real data


@pytest.mark.real
def test_read__real_multiple_choice__has_its_choices(shared: Path, tmp_path: Path) -> None:
    import zipfile

    from raise_env.reading import read_pool

    pool = read_pool(shared / "data" / "commonsenseqa" / "dev.jsonl")
    assert len(pool) == 1221
    assert pool[0].response == "bank"
    assert pool[0].choices == ("bank", "library", "department store", "mall", "new york")
    pool = read_pool(shared / "data" / "arc_challenge" / "test.json")
    assert pool[0].response == "the correct answer is answer3"
    assert {len(row.choices) for row in pool} == {3, 4, 5}
    with zipfile.ZipFile(shared / "data" / "mmlu" / "mmlu.zip") as archive:
        archive.extractall(tmp_path)
    pool = read_pool(tmp_path / "data" / "test", choice_form="letter")
    assert len(pool) == 14_042
    assert pool.place(0) == "abstract_algebra_test.csv, line 1"
    assert pool[0].prompt.endswith("\nA. 0\nB. 4\nC. 2\nD. 6")
    assert pool[0].response == "B"
    assert all(len(row.choices) == 4 for row in pool)
    assert len(read_pool(tmp_path / "data" / "dev" / "anatomy_dev.csv")) == 5
