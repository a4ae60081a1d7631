from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from data_files import jsonl, write_rows

from raise_env.config import ColumnSettings
from raise_env.errors import DataError, SettingError
from raise_env.pool import Instruction, sample_rows
from raise_env.reading import check_columns, read_pool, stamp

Write = Callable[[str, "str | bytes"], Path]

ROWS = [
    {"question": "2 + 2?", "answer": "4", "rating": "5"},
    {"question": "Größe, auf\nzwei Zeilen?", "answer": 'ein "Meter"', "rating": "3"},
]

Write = Callable[[str, "str | bytes"], Path]


def fault(path: Path, **kwargs: Any) -> str:
    """Return what the reader says about a bad file; every message begins with the file's own name."""
    with pytest.raises(DataError) as caught:
        read_pool(path, **kwargs)
    message = str(caught.value)
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


# Good files


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet", ".JSONL"])
def test_read_pool__same_rows_in_each_format__same_instructions(tmp_path: Path, ending: str) -> None:
    path = write_rows(tmp_path / f"rows{ending.lower()}", ROWS)
    path = path.rename(tmp_path / f"Rows{ending}")
    pool = read_pool(path)
    assert list(pool) == [Instruction(row["question"], row["answer"], (), row) for row in ROWS]
    assert pool.source == str(path)
    assert pool.num_skipped == 0


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"instruction": "a", "output": "b"}, "a", "b"),
        ({"instruction": "a", "input": "", "output": "b"}, "a", "b"),
        ({"instruction": "a", "input": " \n", "output": "b"}, "a", "b"),
        ({"instruction": "a", "input": None, "output": "b"}, "a", "b"),
        ({"instruction": "a", "input": "c", "output": "b"}, "a\n\nc", "b"),
        ({"question": "a", "answer": "b"}, "a", "b"),
        ({"question": "a", "answer": "b", "notes": "c"}, "a", "b"),
        ({"prompt": "a", "completion": "b"}, "a", "b"),
        ({"prompt": "a", "response": "b"}, "a", "b"),
        ({"prompt": " a\n", "response": "\tb "}, " a\n", "\tb "),
    ],
)
def test_read_pool__each_column_form__prompt_and_response(
    write: Write, row: dict[str, Any], prompt: str, response: str
) -> None:
    (instruction,) = read_pool(write("a.jsonl", jsonl(row)))
    assert (instruction.prompt, instruction.response) == (prompt, response)
    assert instruction.fields == row


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_read_pool__choices__kept_in_order(tmp_path: Path, ending: str) -> None:
    rows: list[dict[str, Any]] = [
        {"question": "Which?", "answer": "two", "choices": ["one", "two"]},
        {"question": "Why?", "answer": "So.", "choices": None},
        {"question": "How?", "answer": "Like this.", "choices": []},
    ]
    pool = read_pool(write_rows(tmp_path / f"a{ending}", rows))
    assert [row.choices for row in pool] == [("one", "two"), (), ()]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv"])
def test_read_pool__byte_order_mark_and_crlf__neither_reaches_the_rows(tmp_path: Path, ending: str) -> None:
    path = write_rows(tmp_path / f"a{ending}", [{"question": "é", "answer": "a"}, {"question": "q", "answer": "b"}])
    text = path.read_text(encoding="utf-8").replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [(row.prompt, row.response) for row in read_pool(path)] == [("é", "a"), ("q", "b")]


def test_read_pool__blank_lines__passed_over_but_counted(write: Write) -> None:
    row = {"question": "q", "answer": "a"}
    assert read_pool(write("a.jsonl", f"\n{json.dumps(row)}\n  \n{json.dumps(row)}")).place(1) == "line 4"
    assert read_pool(write("a.csv", "\nquestion,answer\n\nq,a\n\nq,a\n\n")).place(1) == "line 6"


def test_read_pool__line_separator_inside_a_text__is_no_line_break(write: Write) -> None:
    line = json.dumps({"question": "a\u2028b\x85c", "answer": "d"}, ensure_ascii=False)
    (row,) = read_pool(write("a.jsonl", line))
    assert row.prompt == "a\u2028b\x85c"


def test_read_pool__values_that_json_cannot_hold__become_plain(tmp_path: Path, write: Write) -> None:
    path = write_rows(
        tmp_path / "a.parquet",
        [
            {
                "prompt": "p",
                "response": "r",
                "rating": float("nan"),
                "seen": datetime.date(2026, 1, 2),
                "nested": {"scores": [1.5, float("inf")], "raw": b"x"},
                "count": 3,
                "good": True,
            }
        ],
    )
    expected = {"rating": None, "seen": "2026-01-02", "nested": {"scores": [1.5, None], "raw": "x"}}
    assert read_pool(path)[0].fields == {"prompt": "p", "response": "r", **expected, "count": 3, "good": True}
    row = read_pool(write("a.jsonl", '{"prompt": "p", "response": "r", "rating": NaN, "low": -Infinity}'))[0]
    assert row.fields == {"prompt": "p", "response": "r", "rating": None, "low": None}


def test_read_pool__bytes_in_a_table__are_the_text_that_they_spell(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", [{"prompt": "Größe?".encode(), "response": b"3", "picture": b"\x00"}])
    (row,) = read_pool(path)
    assert (row.prompt, row.response) == ("Größe?", "3")
    assert row.fields == {"prompt": "Größe?", "response": "3", "picture": "\x00"}


@pytest.mark.parametrize("column", ["response", "picture"])
def test_read_pool__bytes_that_are_no_text__are_named(tmp_path: Path, column: str) -> None:
    row = {"prompt": "p", "response": b"r", "picture": b"x"}
    path = write_rows(tmp_path / "a.parquet", [row, row | {column: b"ab\xff"}])
    message = fault(path)
    assert message.startswith(f", row 2, field {column!r}: found bytes that are no text (0xff at byte 3); expected UTF")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (decimal.Decimal("2.50"), "2.50"),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (datetime.datetime(2026, 1, 2, 3), "2026-01-02 03:00:00"),
    ],
)
def test_read_pool__date_or_decimal_for_a_text__is_refused_as_a_number_is(
    tmp_path: Path, value: object, shown: str
) -> None:
    row = {"question": "q", "answer": "a", "at": value}
    path = write_rows(tmp_path / "a.parquet", [row])
    assert read_pool(path)[0].fields["at"] == shown
    assert json.dumps(read_pool(path)[0].fields["at"]) == f'"{shown}"'
    path = write_rows(tmp_path / "b.parquet", [row | {"answer": value}])
    assert f", row 1, field 'answer': found {shown}, which is not stored as text; expected text." in fault(path)


def test_read_pool__relative_path__source_is_as_given(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("a.jsonl", jsonl(*ROWS))
    monkeypatch.chdir(path.parent)
    assert read_pool("a.jsonl").source == "a.jsonl"
    with pytest.raises(DataError, match=r"^b\.jsonl: there is no such file \(looked in .*\)\."):
        read_pool("b.jsonl")


# Bad files


def test_read_pool__missing_file__says_so(tmp_path: Path) -> None:
    assert "there is no such file" in fault(tmp_path / "a.jsonl")


@pytest.mark.skipif(os.name != "posix", reason="devices are files on POSIX only")
def test_read_pool__device__refused(tmp_path: Path) -> None:
    # Stands for pipes too, which would not fail here but wait.
    (tmp_path / "a.jsonl").symlink_to(os.devnull)
    assert "not a regular file" in fault(tmp_path / "a.jsonl")


def test_read_pool__file_the_system_refuses__data_error(tmp_path: Path) -> None:
    assert "cannot be read" in fault(tmp_path / ("a" * 5000 + ".jsonl"))


@pytest.mark.parametrize("name", ["a.txt", "a", "a.parquet.gz", "a.gz"])
def test_read_pool__unknown_ending__lists_the_known(write: Write, name: str) -> None:
    assert "expected one of .jsonl, .json, .csv, .parquet, .jsonl.gz, .json.gz, .csv.gz" in fault(write(name, "x"))


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_read_pool__wrong_columns__lists_seen_and_accepted(tmp_path: Path, ending: str) -> None:
    message = fault(write_rows(tmp_path / f"a{ending}", [{"question": "q", "solution": "a"}]))
    assert "found the columns 'question', 'solution'" in message
    assert (
        "expected one of these forms: instruction and output; instruction and response; question and answer" in message
    )
    assert "messages; conversations" in message
    assert "columns (--columns prompt=NAME,response=NAME; or " in message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", ""),
        ("a.jsonl", "\n\n"),
        ("a.json", ""),
        ("a.json", "\ufeff"),
        ("a.json", "[]"),
        ("a.csv", ""),
        ("a.csv", "question,answer\n"),
    ],
)
def test_read_pool__no_rows__says_so(write: Write, name: str, content: str) -> None:
    assert "it has no rows" in fault(write(name, content))


def test_read_pool__parquet_without_rows__says_so(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"question": [], "answer": []}), tmp_path / "a.parquet")
    assert "it has no rows" in fault(tmp_path / "a.parquet")


@pytest.mark.parametrize("empty", ["", " \t\n", "\u00a0", None])
@pytest.mark.parametrize(("ending", "place"), [(".jsonl", "line 2"), (".json", "row 2"), (".parquet", "row 2")])
def test_read_pool__empty_answers__first_named_and_all_counted(
    tmp_path: Path, ending: str, place: str, empty: str | None
) -> None:
    answers = ["a", empty, "b", empty, empty]
    rows = [{"question": f"q{index}", "answer": answer} for index, answer in enumerate(answers)]
    path = write_rows(tmp_path / f"a{ending}", rows)
    message = fault(path)
    assert message.startswith(f", {place}, field 'answer'")
    assert f"3 rows have an empty 'answer', the first in {place}" in message
    assert "skip_empty=True" in message
    pool = read_pool(path, skip_empty=True)
    assert [row.prompt for row in pool] == ["q0", "q2"]
    assert pool.num_skipped == 3
    assert pool.place(1).endswith(" 3")


def test_read_pool__empty_prompt__named_and_can_be_skipped(write: Write) -> None:
    path = write("a.csv", "instruction,input,output\n,input alone,o\ni,,o\n")
    assert "line 2, field 'instruction'" in (message := fault(path))
    assert "1 row has an empty 'instruction'" in message
    assert [row.prompt for row in read_pool(path, skip_empty=True)] == ["i"]


def test_read_pool__empty_prompts_and_answers__only_the_first_kind_is_counted(write: Write) -> None:
    rows = [{"question": "", "answer": "a"}, {"question": "q", "answer": ""}, {"question": "", "answer": ""}]
    assert "2 rows have an empty 'question', the first in line 1" in fault(write("a.jsonl", jsonl(*rows)))


def test_read_pool__all_rows_skipped__says_that_none_is_left(write: Write) -> None:
    path = write("a.jsonl", jsonl({"question": "q", "answer": ""}))
    assert "none of its 1 rows has both" in fault(path, skip_empty=True)


def test_read_pool__skip_empty__other_faults_stay_errors(write: Write) -> None:
    path = write("a.jsonl", jsonl({"question": "q", "answer": ""}, {"question": "q", "answer": 3}))
    assert ", line 2, field 'answer': found 3; expected text" in fault(path, skip_empty=True)


@pytest.mark.parametrize(
    ("value", "shown"), [(42, "42"), (1.5, "1.5"), (True, "true"), (["a"], "a list"), ({"a": "b"}, "an object")]
)
@pytest.mark.parametrize("column", ["instruction", "input", "output"])
def test_read_pool__value_that_is_not_text__named(write: Write, column: str, value: object, shown: str) -> None:
    good = {"instruction": "i", "input": "x", "output": "o"}
    message = fault(write("a.jsonl", jsonl(good, good | {column: value})))
    assert message.startswith(f", line 2, field {column!r}: found {shown}; expected text.")


def test_read_pool__number_in_a_parquet_column__named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", [{"question": "q", "answer": 3}])
    assert ", row 1, field 'answer': found 3; expected text." in fault(path)


def test_read_pool__numbers_in_a_csv__are_text(write: Write) -> None:
    assert read_pool(write("a.csv", "question,answer\n1,2\n"))[0].response == "2"


def test_read_pool__half_a_character__named(write: Write) -> None:
    path = write("a.jsonl", '{"question": "q", "answer": "ab\\ud83d"}')
    assert r"field 'answer': found \ud83d at character 3" in fault(path)
    assert read_pool(write("b.jsonl", '{"question": "q", "answer": "\\ud83d\\ude00"}'))[0].response == "😀"


def test_read_pool__later_row_without_a_column__named(write: Write) -> None:
    path = write("a.jsonl", jsonl(ROWS[0], {"question": "q", "Answer": "a"}))
    assert ", line 2: found no field 'answer' among 'question', 'Answer'" in fault(path)


@pytest.mark.parametrize("broken", ['{"question": "q", "answer": "a"', '{"question": "q",}', "question", "{} {}"])
def test_read_pool__broken_json_line__names_that_line(write: Write, broken: str) -> None:
    message = fault(write("a.jsonl", f"{jsonl(*ROWS)}\n{broken}\n{jsonl(*ROWS)}"))
    assert message.startswith(", line 4, column ")
    assert "broken JSON" in message


def test_read_pool__broken_json_file__names_line_and_column(write: Write) -> None:
    message = fault(write("a.json", '[\n  {"question": "q",\n   "answer" "a"}\n]'))
    assert message.startswith(", line 3, column 13: found broken JSON")


def test_read_pool__json_lines_named_json__says_which_ending_they_have(write: Write) -> None:
    assert "one JSON object a line ends in .jsonl" in fault(write("a.json", jsonl(*ROWS)))


def test_read_pool__json_list_named_jsonl__says_which_ending_it_has(write: Write) -> None:
    assert "one JSON list ends in .json" in fault(write("a.jsonl", json.dumps(ROWS)))


@pytest.mark.parametrize(("value", "shown"), [("text", "text"), (7, "7"), ([1], "a list"), (None, "null")])
def test_read_pool__row_that_is_no_object__named(write: Write, value: object, shown: str) -> None:
    assert f", line 3: found {shown}. Expected one JSON object" in fault(write("a.jsonl", jsonl(*ROWS, value)))
    assert f", row 3: found {shown}. Expected one JSON list of" in fault(write("a.json", json.dumps([*ROWS, value])))


def test_read_pool__json_object_at_the_top__says_list_expected(write: Write) -> None:
    assert "found an object at the top. Expected one JSON list" in fault(write("a.json", json.dumps({"data": ROWS})))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_read_pool__brackets_nested_deeply__data_error(write: Write, name: str) -> None:
    assert "nested too deeply" in fault(write(name, "[" * 100_000 + "]" * 100_000))


def test_read_pool__number_with_too_many_digits__data_error(write: Write) -> None:
    assert ", line 1: found a number too long" in fault(write("a.jsonl", '{"question": ' + "9" * 5000 + "}"))


@pytest.mark.parametrize(("row", "found"), [("only one", 1), ("a,b,c", 3)])
def test_read_pool__csv_row_with_wrong_number_of_cells__names_physical_line(write: Write, row: str, found: int) -> None:
    path = write("a.csv", f'question,answer\n"over\ntwo lines",a\n\n{row}\nq,a\n')
    assert f", line 5: found {found} cells; expected 2" in fault(path)


def test_read_pool__csv_cell_over_several_lines__row_named_by_its_first(write: Write) -> None:
    path = write("a.csv", 'question,answer\nq,a\n"over\ntwo lines",\n')
    assert ", line 3, field 'answer'" in fault(path)


def test_read_pool__csv_quote_never_closed__named_where_it_opens(write: Write) -> None:
    path = write("a.csv", 'question,answer\nq,a\nq,"never closed\nq,a\nq,a\n')
    assert ", line 3: found a broken row (unexpected end of data)" in fault(path)


def test_read_pool__csv_cell_of_any_size_that_files_may_have__is_read(write: Write) -> None:
    limit, text = csv.field_size_limit(), 'with "quotes",\n' * 20_000
    assert len(text) > 2 * limit
    quoted = text.replace('"', '""')
    path = write("a.csv", f'question,answer\nq,"{quoted}"\nq,a\n')
    assert [row.response for row in read_pool(path)] == [text, "a"]
    assert csv.field_size_limit() == limit, "that of the process is as it was"


def test_read_pool__csv_cell_beyond_the_limit_of_files__is_named(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAISE_ENV_MAX_BYTES", "1000")
    limit = csv.field_size_limit()
    message = fault(write("a.csv", f"question,answer\nq,a\nq,{'a' * 1001}\n"))
    assert message.startswith(", line 3: found a cell of more than 1,000 characters; expected fewer.")
    assert "$RAISE_ENV_MAX_BYTES" in message
    assert csv.field_size_limit() == limit


def test_read_pool__csv_files_in_several_threads__do_not_take_each_others_limit(write: Write) -> None:
    path = write("a.csv", f"question,answer\nq,{'a' * 200_000}\n")
    limit = csv.field_size_limit()
    with ThreadPoolExecutor(8) as threads:
        assert [len(pool) for pool in threads.map(read_pool, [path] * 24)] == [1] * 24
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_read_pool__column_twice__refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    if ending == ".csv":
        path.write_text("question,answer,answer\nq,a,b\n")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        columns = [pyarrow.array(["q"]), pyarrow.array(["a"]), pyarrow.array(["b"])]
        parquet.write_table(pyarrow.Table.from_arrays(columns, ["question", "answer", "answer"]), path)
    assert "found the column 'answer' twice" in fault(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_read_pool__not_utf8__names_line_and_byte(write: Write, name: str) -> None:
    # Far enough into the file that a reader that decodes in blocks would name another line.
    content = b"question,answer\n" + b"q,a\n" * 3000 + "q,Größe\n".encode("latin-1") + b"q,a\n" * 3000
    if name != "a.csv":
        content = content.replace(b"question,answer", b"").replace(b"q,a", b'{"question": "q", "answer": "a"}')
    assert ", line 3002: found the byte 0xf6; expected UTF-8" in fault(write(name, content))


def test_read_pool__utf16__says_utf8_expected(write: Write) -> None:
    assert ", line 1: found the byte 0xff; expected UTF-8" in fault(write("a.csv", "question,answer".encode("utf-16")))


def test_read_pool__file_that_is_no_parquet__data_error(write: Write) -> None:
    pytest.importorskip("pyarrow")
    assert "cannot be read as parquet" in fault(write("a.parquet", jsonl(*ROWS)))
    assert "cannot be read as parquet" in fault(write("b.parquet", b""))


def test_read_pool__parquet_cut_off__data_error(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-10])
    assert "cannot be read as parquet" in fault(path)


def test_read_pool__parquet_text_that_is_not_utf8__data_error(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    bad = pyarrow.array([b"\xf6"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"question": ["q"], "answer": bad}), tmp_path / "a.parquet")
    assert "cannot be read as parquet" in fault(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        (["one", "Two"], "field 'choices': found 'one', 'Two'; expected the row's 'answer' among them, which is 'two'"),
        ("one|two", "field 'choices': found text; expected a list of texts"),
        ({"text": ["one", "two"]}, "field 'choices': found an object with 'text'; expected a list of texts"),
        (["two", 2], "field 'choices', item 2: found 2; expected text"),
    ],
)
def test_read_pool__bad_choices__named(write: Write, choices: object, expected: str) -> None:
    row = {"question": "q", "answer": "two", "choices": choices}
    assert f", line 1, {expected}" in fault(write("a.jsonl", jsonl(row)))


def test_read_pool__choices_in_a_csv__refused_instead_of_lost(write: Write) -> None:
    path = write("a.csv", "question,answer,choices\nq,two,one|two\n")
    assert "field 'choices': found text; expected a list" in fault(path)


# Packed files, folders and the hub


@pytest.mark.parametrize("ending", [".jsonl.gz", ".json.gz", ".csv.gz", ".JSONL.GZ"])
def test_read_pool__packed__is_what_is_in_it(tmp_path: Path, ending: str) -> None:
    plain = write_rows(tmp_path / f"a{ending.lower().removesuffix('.gz')}", ROWS)
    (tmp_path / f"a{ending}").write_bytes(gzip.compress(plain.read_bytes()))
    packed = read_pool(tmp_path / f"a{ending}")
    assert list(packed) == list(read_pool(plain))
    assert packed.place(1) == read_pool(plain).place(1)


def test_read_pool__packed_badly__data_error(write: Write) -> None:
    whole = gzip.compress(jsonl(*ROWS).encode() * 100)
    for content in (whole[:-20], b"not packed", whole[:40] + b"x" * 9 + whole[49:]):
        assert "cannot be unpacked" in fault(write("a.jsonl.gz", content))


def test_read_pool__mmlu_without_a_header__every_line_is_a_row(write: Write) -> None:
    path = write("a.csv", '"One, or two?",0,1,2,3,B\nNext?,a,b,c,d,D\n')
    assert [(row.prompt, row.response) for row in read_pool(path)] == [("One, or two?", "1"), ("Next?", "d")]
    assert read_pool(path).place(0) == "line 1"
    headed = write("b.csv", "question,A,B,C,D,answer\nNext?,a,b,c,d,D\n")
    assert read_pool(headed)[0].response == "d"
    assert ", line 2: found 5 cells; expected 6, one for each of question, A, B" in fault(
        write("c.csv", "q,0,1,2,3,B\n1,2,3,4,A\n")
    )


def test_read_pool__csv_header_that_ends_in_a_letter__is_no_row(write: Write) -> None:
    (row,) = read_pool(write("a.csv", "question,answer,A,B,C,D\nq,B,a,b,c,d\n"))
    assert (row.prompt, row.response, row.choices) == ("q", "b", ("a", "b", "c", "d"))
    for header in ("id,Question, Answer,A,B,C", "prompt,1,2,3,4,A"):
        assert ", line 2: found the columns" in fault(write("b.csv", f"{header}\nq,r,a,b,c,D\n"))


def test_read_pool__csv_with_fewer_choices_in_some_rows__has_those_that_are_there(write: Write) -> None:
    path = write("a.csv", "question,A,B,C,D,E,answer\nq,a,b,c,d,e,E\nq,a,b,c,d,,D\nq,a,b,,,,A\n")
    assert [len(row.choices) for row in read_pool(path)] == [5, 4, 2]
    gap = write("b.csv", "question,A,B,C,D,answer\nq,a,b,c,d,D\nq,a,b,,d,D\n")
    assert ", line 3, field 'C': found no text; expected some. 1 row has an empty 'C'" in fault(gap)
    assert len(read_pool(gap, skip_empty=True)) == 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of three files of one form, and what else lies about."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, prompts in {"b.jsonl": "cd", "a.parquet": "ab", "c.csv": "e"}.items():
        write_rows(folder / name, [{"question": prompt, "answer": "x"} for prompt in prompts])
    (folder / "README.md").write_text("what this is")
    (folder / ".hidden.jsonl").write_text("broken")
    return folder


def test_read_pool__folder__its_files_in_the_order_of_their_names(folder: Path) -> None:
    pool = read_pool(folder)
    assert [row.prompt for row in pool] == list("abcde")
    assert [pool.place(index) for index in range(5)] == [
        *("a.parquet, row 1", "a.parquet, row 2", "b.jsonl, line 1", "b.jsonl, line 2", "c.csv, line 2")
    ]
    assert pool.source == str(folder)
    sample = sample_rows(pool, 3, seed=3)
    assert [sample.place(i) for i in range(3)] == [pool.place("abcde".index(row.prompt)) for row in sample]


def test_read_pool__fault_in_a_folder__names_the_file_in_it(folder: Path) -> None:
    (folder / "b.jsonl").write_text(jsonl({"question": "q", "answer": "a"}, {"question": "q", "answer": 3}))
    assert fault(folder).startswith("/b.jsonl, line 2, field 'answer': found 3")
    (folder / "b.jsonl").write_text(jsonl({"question": "q", "answer": "a"}, {"question": "q", "answer": ""}))
    assert fault(folder).startswith("/b.jsonl, line 2, field 'answer': found no text")
    assert "the first in b.jsonl, line 2" in fault(folder)
    assert read_pool(folder, skip_empty=True).place(3) == "c.csv, line 2"
    (folder / "b.jsonl").write_text(jsonl({"prompt": "q", "response": "a"}))
    assert "b.jsonl, line 1: found a row of the form prompt and response; expected question and answer" in fault(folder)
    (folder / "b.jsonl").write_text("{")
    assert fault(folder).startswith("/b.jsonl, line 1, column 2: found broken JSON")


def test_read_pool__folder_without_files__says_which_it_reads(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    write_rows(tmp_path / "deeper" / "a.jsonl", ROWS)
    assert ": is a folder without any file that ends in .jsonl, .json, .csv, .parquet, .jsonl.gz" in fault(tmp_path)


def test_read_pool__folder_with_what_is_not_read__is_told_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="raise_env"):
        read_pool(folder)
    assert not caplog.text, "what says itself that it is no data is not meant"
    for name in ("d.jsonl.zst", "e.TSV", "f.arrow"):
        (folder / name).write_bytes(b"x")
    (folder / "deeper").mkdir()
    (folder / ".cache").mkdir()
    with caplog.at_level(logging.WARNING, logger="raise_env"):
        assert len(read_pool(folder)) == 5
    assert f"{folder}: of this folder d.jsonl.zst, deeper/, e.TSV, f.arrow is not read; files end in" in caplog.text
    for number in range(9):
        (folder / f"{number}.txt").touch()
    read_pool(folder)
    assert "0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 8 more is not read" in caplog.text


def test_read_pool__folder_of_a_saved_dataset__says_how_to_write_it(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "several")
    for name in ("one", "several", "several/train"):
        message = fault(tmp_path / name)
        assert message.startswith(": is what save_to_disk of the library datasets wrote, which is not read; expected")
        assert "to_parquet" in message


def test_stamp__of_a_folder__changes_with_any_of_its_files(folder: Path) -> None:
    stamps = [stamp(str(folder))]
    write_rows(folder / "c.csv", [{"question": "longer", "answer": "x"}])
    stamps.append(stamp(str(folder)))
    (folder / "b.jsonl").rename(folder / "d.jsonl")
    stamps.append(stamp(str(folder)))
    (folder / "d.jsonl").unlink()
    stamps.append(stamp(str(folder)))
    assert len(set(stamps)) == 4
    assert stamp(str(folder)) == stamps[-1]
    assert stamp(str(folder / "c.csv")) != stamp(str(folder))
    assert stamp("owner/name") is stamp(None) is stamp("x" * 5000) is None


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub with one data set of two splits and one of a single one; returns what is asked of it."""
    import datasets

    asked: list[tuple[Any, ...]] = []

    def names(path: str, config: str | None = None, revision: str | None = None) -> list[str]:
        return ["train"] if path == "owner/one" else ["train", "test"]

    def load(path: str, config: str | None = None, *, split: str, revision: str | None = None) -> Any:
        asked.append((path, config, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "get_dataset_split_names", names)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("owner/one", ("owner/one", None, "train", None)),
        ("owner/two:test", ("owner/two", None, "test", None)),
        ("owner/two/config@v1.0:train[:9]", ("owner/two", "config", "train[:9]", "v1.0")),
        ("owner/one@refs/pr/1", ("owner/one", None, "train", "refs/pr/1")),
    ],
)
def test_read_pool__hub_id__is_asked_for(hub: list[tuple[Any, ...]], source: str, asked: tuple[Any, ...]) -> None:
    pool = read_pool(source)
    assert hub == [asked]
    assert list(pool) == [Instruction(row["question"], row["answer"], (), row) for row in ROWS]
    assert (pool.source, pool.place(1)) == (source, "row 2")


def test_read_pool__hub_id_of_several_splits__lists_them(hub: list[tuple[Any, ...]]) -> None:
    with pytest.raises(DataError, match=r"^owner/two: found the splits train, test; .* Write owner/two:train\.$"):
        read_pool("owner/two")


def test_read_pool__bytes_and_dates_of_the_hub__are_read_as_those_of_a_table(
    hub: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def load(*_: Any, **__: Any) -> Any:
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows: list[dict[str, Any]] = [{"question": b"q", "answer": "a", "at": datetime.date(2026, 1, 2)}]
    assert read_pool("owner/one")[0].fields == {"question": "q", "answer": "a", "at": "2026-01-02"}
    rows = [{"question": "q", "answer": datetime.date(2026, 1, 2)}]
    with pytest.raises(DataError, match=r"^owner/one, row 1, field 'answer': found 2026-01-02, which is not stored as"):
        read_pool("owner/one")
    rows = [{"question": "q", "answer": b"a"}, {"question": "q", "answer": b"\xff"}]
    with pytest.raises(DataError, match=r"^owner/one, row 2, field 'answer': found bytes that are no text \(0xff"):
        read_pool("owner/one")


def test_read_pool__path_that_exists__is_no_hub_id(
    hub: list[tuple[Any, ...]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent.parent)
    name = f"{folder.parent.name}/{folder.name}"
    assert len(read_pool(name)) == 5
    assert not hub


@pytest.mark.parametrize(
    "source", ["owner/name.jsonl", "./owner", "/owner/name", "~/name", "owner/name.csv.gz", "pool"]
)
def test_read_pool__missing_path__is_not_looked_for_on_the_hub(hub: list[tuple[Any, ...]], source: str) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        read_pool(source)
    assert not hub


def test_read_pool__hub_out_of_reach__is_one_sentence() -> None:
    with pytest.raises(
        DataError, match=r"^no/such-rows-anywhere: there is no such file, and as a data set .* network\."
    ):
        read_pool("no/such-rows-anywhere")


# What is counted


def test_read_pool__duplicates__are_counted_by_what_is_said(write: Write) -> None:
    rows = [{"question": "q", "answer": "a", "n": n} for n in range(3)] + [{"question": "q", "answer": "b", "n": 0}]
    pool = read_pool(write("a.jsonl", jsonl(*rows, {"question": "", "answer": "c", "n": 1})), skip_empty=True)
    assert (len(pool), pool.num_duplicates, pool.num_skipped, pool.num_read) == (4, 2, 1, 5)
    assert sample_rows(pool, 1, seed=0).num_read == 5
    assert sample_rows(pool, 1, seed=0).num_duplicates == 0


def test_read_pool__questions_without_answers__are_told_of(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    with caplog.at_level(logging.WARNING, logger="raise_env"):
        read_pool(write("a.jsonl", jsonl({"messages": chat}, {"messages": chat[:2]}, {"messages": chat})))
    assert "2 conversations end with a question that has no answer" in caplog.text


def test_read_pool__line_of_ten_megabytes__is_read(write: Write) -> None:
    text = "word " * 2_000_000
    assert read_pool(write("a.jsonl", jsonl({"question": "q", "answer": text})))[0].response == text


def test_read_pool__conversations_in_a_large_pool__come_back_from_disk(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = {"role": "system", "content": "head"}
    chats = [[head, *({"role": r, "content": f"{r}{n}"} for r in ("user", "assistant") * n)] for n in (1, 2, 3, 4)]
    path = write("a.jsonl", jsonl(*({"messages": chat} for chat in chats)))
    small = read_pool(path)
    monkeypatch.setattr("raise_env.pool.MAX_ROWS_IN_MEMORY", 2)
    large = read_pool(path)
    assert large.is_large
    assert list(large) == list(small)
    assert large[3].earlier == (("user4", "assistant4"),) * 3
    assert large.content_hash == small.content_hash
    assert large.num_duplicates == 0


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_read_pool__conversations_without_text__are_counted_and_can_be_skipped(tmp_path: Path, ending: str) -> None:
    whole = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    silent = [whole[0], {"role": "assistant", "content": None}]
    empty = [{"messages": None}, {"messages": whole}, {"messages": []}, {"messages": whole}]
    path = write_rows(tmp_path / f"a{ending}", empty)
    assert ", field 'messages': found no text; expected some. 2 rows have an empty 'messages', the first" in fault(path)
    path = write_rows(tmp_path / f"b{ending}", [*empty, {"messages": silent}])
    message = fault(path)
    assert "found no text in it or in a part of it; expected some. 3 rows have an empty 'messages', or one" in message
    assert "or one with an empty part, the first in" in message
    pool = read_pool(path, skip_empty=True)
    assert (len(pool), pool.num_skipped, pool.num_read) == (2, 3, 5)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_read_pool__system_and_history_in_each_format__are_read(tmp_path: Path, ending: str) -> None:
    row = {"instruction": "i", "input": "", "output": "o", "system": "Be a pirate", "history": [["hi", "ho"]]}
    pool = read_pool(write_rows(tmp_path / f"a{ending}", [row, row | {"system": "", "history": []}]))
    assert [(row.system, row.earlier) for row in pool] == [("Be a pirate", (("hi", "ho"),)), ("", ())]
    assert pool.num_duplicates == 0


def test_read_pool__system_in_a_csv__is_read(write: Write) -> None:
    pool = read_pool(write("a.csv", "instruction,output,system,history\ni,o,Be a pirate,\ni,o,,\n"))
    assert [(row.system, row.earlier) for row in pool] == [("Be a pirate", ()), ("", ())]


def test_read_pool__named_columns__whether_the_source_has_them(write: Write) -> None:
    columns = ColumnSettings("q", "a")
    assert read_pool(write("a.jsonl", jsonl({"q": "x", "a": "y"})), columns=columns).columns_found == {"q", "a"}
    assert not read_pool(write("b.jsonl", jsonl(*ROWS)), columns=columns).columns_found


def test_check_columns__column_that_only_some_rows_have__is_enough_and_one_that_none_has_is_named(write: Write) -> None:
    pool = {"q": "x", "a": "y"}
    columns = ColumnSettings("q", "a", system="head")
    without = read_pool(write("a.jsonl", jsonl(pool)), columns=columns)
    assert list(without) == [Instruction("x", "y", (), pool)]
    some = read_pool(write("b.jsonl", jsonl(pool, pool | {"head": "h"})), columns=columns)
    assert [row.system for row in some] == ["", "h"]
    other = read_pool(write("c.jsonl", jsonl(*ROWS)), columns=columns)
    check_columns(columns, some)
    check_columns(columns, without, some, other)
    with pytest.raises(
        SettingError, match=r"^columns names head, but no row of .*a\.jsonl or .*c\.jsonl has it; found q"
    ):
        check_columns(columns, without, other)
    with pytest.raises(
        SettingError, match=r"^columns names q, a, but no first row of .*c\.jsonl has all of these; found"
    ):
        check_columns(columns, other)
    check_columns(ColumnSettings(), other)


# Real data


@pytest.mark.real
def test_read_pool__alpaca__all_rows_but_ten_without_an_answer(shared: Path) -> None:
    path = shared / "data" / "alpaca" / "alpaca.jsonl"
    assert "10 rows have an empty 'output', the first in line 1462" in fault(path)
    pool = read_pool(path, skip_empty=True)
    assert (len(pool), pool.num_skipped) == (20_678 - 10, 10)
    assert pool[1].prompt == (
        "Read this block of text and identify all verbs:\n\nThey spoke of the pending threat with a sense of urgency."
    )
    assert pool[1].fields["in"] == ["random_9k"]


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "count"),
    [("gsm8k/train.jsonl", 7473), ("gsm8k/test.jsonl", 1319), ("arc_challenge/train.json", 1119)],
)
def test_read_pool__other_real_files__all_rows(shared: Path, name: str, count: int) -> None:
    assert len(read_pool(shared / "data" / name)) == count


@pytest.mark.real
def test_read_pool__arc__answers_by_alpacas_columns(shared: Path) -> None:
    row = read_pool(shared / "data" / "arc_challenge" / "test.json")[0]
    assert row.response == "the correct answer is answer3"
    assert row.fields["answer"] == "answer3"
