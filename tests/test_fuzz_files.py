"""Files of every kind with something wrong in them: read for what they say, or refused in one message, and soon.

`make test` tries some hundreds, `make test-all` ten thousand; what is drawn is the same each time. Each defect that was
found so has a test of its own beside those of its module, or at the end of this file.
"""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_trust import adapter_copy, open_run, record_of, results_line, selector_copy

from raise_env.adapter_files import adapter_settings
from raise_env.agents.catalogue import load_selector
from raise_env.agents.job import check_line
from raise_env.agents.run_folder import whole_lines, whole_records
from raise_env.config import EnvConfig
from raise_env.errors import DataError, RaiseEnvError, RecordError, SettingError
from raise_env.foreign_files import parse_json
from raise_env.pool import Pool
from raise_env.reading import read_pool
from raise_env.record import EpisodeRecord
from raise_env.store import Block, Column, TableForm, stored_table

COUNTS: Counter[str] = Counter()

#: A case that takes longer hangs, or nearly so.
SECONDS = 20.0

FAST, SLOW = 60, 900


def fuzz(kind: str, strategy: st.SearchStrategy[Any], check: Callable[[Any], None], examples: int) -> None:
    """Check so many drawn values."""

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(value: Any) -> None:
        COUNTS[kind] += 1
        begun = time.perf_counter()
        check(value)
        assert time.perf_counter() - begun < SECONDS

    run()


def require_message(error: RaiseEnvError, where: str) -> None:
    """Check that an error says where, in a message and not a book."""
    assert where in str(error)
    assert 10 < len(str(error)) < 12_000


often = pytest.mark.parametrize("examples", [FAST, pytest.param(SLOW, marks=pytest.mark.slow)])

# Data files

ROWS = [
    {"prompt": "What is 1 + 1?", "response": "2", "source": "a", "n": 1},
    {"prompt": 'Say "hi", please,\nnow.', "response": "hi \U0001f600 ä", "source": None, "n": 2.5},
    {"prompt": "A long one " * 20, "response": "yes", "source": "b,c", "n": -3},
    {"prompt": "empty", "response": " ", "source": "d", "n": 0},
]


def csv_bytes() -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(ROWS[0]))
    writer.writeheader()
    writer.writerows(ROWS)
    return buffer.getvalue().encode()


def parquet_bytes() -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    buffer = io.BytesIO()
    dates = [None, "2020-01-01", "x", "y"]
    rows = [{**row, "when": when} for row, when in zip(ROWS, dates, strict=True)]
    parquet.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


VALID = {
    "jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "json": json.dumps(ROWS, indent=1).encode(),
    "csv": csv_bytes(),
    "parquet": parquet_bytes(),
}
VALID |= {f"{name}.gz": gzip.compress(VALID[name]) for name in ("jsonl", "json", "csv")}

NASTY = [
    *(
        b"\x00",
        b"\xef\xbb\xbf",
        b"\r\n",
        b"\r",
        b"\n\n",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b'"',
        b"'",
        b",",
        b"\\",
        b"\x0b\x0c",
    ),
    *(b"\\ud800", b"\\u0000", b"1e999", b"-1e999", b"NaN", b"Infinity", b"9" * 4400, b"null", b"{}", b"[]", b"true"),
    *(
        b"[" * 300,
        b'{"a":' * 300,
        b'"prompt": "again", ',
        b'"prompt": 1',
        b"\xe2\x80\xa8",
        b"\xc2\x85",
        b"}",
        b"{",
        b"]",
    ),
    *(b"prompt", b"response", b"\n" * 50, b"PAR1", b"\x1f\x8b\x08\x00"),
]

change = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 10**6), st.integers(0, 7)),
    st.tuples(st.just("cut"), st.integers(0, 10**6), st.integers(1, 200)),
    st.tuples(st.just("end"), st.integers(0, 10**6), st.just(0)),
    st.tuples(st.just("repeat"), st.integers(0, 10**6), st.integers(1, 200)),
    st.tuples(st.just("put"), st.integers(0, 10**6), st.integers(0, len(NASTY) - 1)),
)
changes = st.lists(change, min_size=1, max_size=5)


def changed(content: bytes, todo: list[tuple[str, int, int]]) -> bytes:
    for what, place, value in todo:
        place %= len(content) + 1
        if what == "flip" and place < len(content):
            content = content[:place] + bytes([content[place] ^ (1 << value)]) + content[place + 1 :]
        elif what == "cut":
            content = content[:place] + content[place + value :]
        elif what == "end":
            content = content[:place]
        elif what == "repeat":
            content = content[:place] + content[place : place + value] + content[place:]
        elif what == "put":
            content = content[:place] + NASTY[value] + content[place:]
    return content


def num_rows_of(name: str, content: bytes) -> int | None:
    """How many rows a file has, counted another way; None where that is not for this to say."""
    if name.endswith(".gz"):
        name, content = name.removesuffix(".gz"), gzip.decompress(content)
    if name == "parquet":
        from pyarrow import parquet

        return int(parquet.ParquetFile(io.BytesIO(content)).metadata.num_rows)
    text = content.decode("utf-8-sig")
    if name == "jsonl":
        return sum(bool(line.strip()) for line in text.split("\n"))
    if name == "json":
        return len(json.loads(text))
    rows = [cells for cells in csv.reader(io.StringIO(text, newline=""), strict=True) if cells]
    return len(rows) - 1


def check_pool(pool: Pool, name: str, content: bytes, skip_empty: bool) -> None:
    assert len(pool) + pool.num_skipped == pool.num_read == num_rows_of(name, content)
    assert pool.num_skipped == 0 or skip_empty
    for row in pool:
        assert row.prompt.strip()
        assert row.response.strip()
        json.dumps(dict(row.fields), ensure_ascii=False, allow_nan=False).encode()  # it can be written as it was read
    assert len(pool.content_hash) == 64


@often
@pytest.mark.parametrize("name", VALID)
def test_read_pool__valid_file_changed__is_read_whole_or_refused(name: str, examples: int, tmp_path: Path) -> None:
    path = tmp_path / f"pool.{name}"

    def check(drawn: tuple[list[tuple[str, int, int]], bool]) -> None:
        todo, skip_empty = drawn
        content = changed(VALID[name], todo)
        path.write_bytes(content)
        try:
            pool = read_pool(path, skip_empty=skip_empty)
        except DataError as error:
            require_message(error, str(path))
            return
        check_pool(pool, name, content, skip_empty)

    fuzz(f"changed .{name}", st.tuples(changes, st.booleans()), check, examples)


@often
@pytest.mark.parametrize("name", ["jsonl", "csv", "json"])
def test_read_pool__packed_after_it_was_changed__is_read_whole_or_refused(
    name: str, examples: int, tmp_path: Path
) -> None:
    path = tmp_path / f"pool.{name}.gz"

    def check(todo: list[tuple[str, int, int]]) -> None:
        content = gzip.compress(changed(VALID[name], todo), mtime=0)
        path.write_bytes(content)
        try:
            pool = read_pool(path, skip_empty=True)
        except DataError:
            return
        check_pool(pool, f"{name}.gz", content, True)

    fuzz(f"changed .{name}, packed", changes, check, examples // 3)


@often
@pytest.mark.parametrize("name", VALID)
def test_read_pool__any_bytes__are_refused(name: str, examples: int, tmp_path: Path) -> None:
    path = tmp_path / f"pool.{name}"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        with pytest.raises(DataError):
            read_pool(path)

    fuzz("any bytes as data", st.binary(max_size=400), check, examples // 3)


# JSON

plain = st.one_of(
    st.sampled_from([None, True, False, 0, -1, 1, 2.5, 10**30, -(10**400), 10**400, float("inf"), float("nan")]),
    st.sampled_from(["", "a", "tiny", "os:system", "\x1b[2J", "../x", "\ud800", "all", "loss", "1", "a" * 5000]),
    st.sampled_from([[], {}, [[]], [None], {"a": 1}, [10**400], ["a", 1], {"": {}}, [[[[]]]], [float("nan")]]),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
)
steps = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 2), plain), min_size=1, max_size=3)


def mutated(value: Any, todo: list[tuple[int, int, int, Any]]) -> Any:
    """A JSON value with some of its parts replaced, removed, or added to."""
    value = copy.deepcopy(value)
    for first, second, what, drawn in todo:
        parent, key, new = value, None, copy.deepcopy(drawn)
        for turn in (first, second):
            inner = parent if key is None else parent[key]
            if not isinstance(inner, (dict, list)) or not inner:
                break
            keys = list(inner) if isinstance(inner, dict) else range(len(inner))
            parent, key = inner, keys[turn % len(keys)]
        if key is None:
            return new
        if what == 0:
            parent[key] = new
        elif what == 1:
            del parent[key]
        elif isinstance(parent, dict):
            parent[f"{key}_"] = new
        else:
            parent.append(new)
    return value


def same(one: Any, other: Any) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


@often
def test_record__changed__is_refused_or_says_the_same(examples: int) -> None:
    valid = {**json.loads(record_of(pool_size=8, lora={"r": 2}).to_json()), "final": {"test_loss": 1.0}}

    def check(todo: list[tuple[int, int, int, Any]]) -> None:
        value = mutated(valid, todo)
        try:
            record = EpisodeRecord.from_json(json.dumps(value), "here")
        except RecordError as error:
            require_message(error, "here")
            return
        again = {name: getattr(record, name) for name in EpisodeRecord.__dataclass_fields__}
        assert same({"final": {}, **value}, again)

    fuzz("changed record", steps, check, examples * 2)


@often
def test_record__text_changed__is_refused_or_says_the_same(examples: int) -> None:
    valid = record_of(pool_size=8, lora={"r": 2}).to_json().encode()

    def check(todo: list[tuple[str, int, int]]) -> None:
        text = changed(valid, todo).decode(errors="replace")
        try:
            record = EpisodeRecord.from_json(text, "here")
        except RecordError:
            return
        assert same(
            {"final": {}, **json.loads(text)}, {n: getattr(record, n) for n in EpisodeRecord.__dataclass_fields__}
        )

    fuzz("changed text of a record", changes, check, examples)


@often
def test_results__line_changed__is_refused_or_can_be_summarised(examples: int) -> None:
    from raise_env.agents.summary import markdown_tables, summarise, text_tables

    def check(todo: list[tuple[int, int, int, Any]]) -> None:
        line = mutated(results_line(diverged=False, episode_returns=[0.5], rows=2, updates=1), todo)
        try:
            check_line(parse_json(json.dumps(line)))
        except ValueError:
            return
        assert isinstance(line, dict)
        lines = [line, {**results_line(), "agent": "random"}]
        agents = list(dict.fromkeys(own["agent"] for own in lines))
        tasks = list(dict.fromkeys(own["task"] for own in lines))
        summary = summarise(lines, tasks, agents, sorted({own["seed"] for own in lines}), "random")
        assert markdown_tables(summary)
        assert text_tables(summary)
        json.dumps(summary, allow_nan=False)

    fuzz("changed line of results", steps, check, examples)


@often
def test_run_folder__files_changed__are_refused_or_gone_on_with(examples: int, tmp_path: Path) -> None:
    valid = {
        "schema_version": 1,
        "status": "running",
        "start": "2026-01-01T00:00:00+00:00",
        "command": "train",
        "plan": {"entries": {}, "num_seeds": 1},
        "versions": {"python": "3"},
        "content": {"pool": "a"},
        "seconds": {"learning": 1.0},
        "phi_tokens": {"learning": 1},
        "costs": {"learning": {"1": {"seconds": 1.0, "phi_tokens": 1, "divergences": 0}}},
        "divergences": {"learning": 0},
        "episode_returns": [0.1],
    }

    def check(drawn: tuple[list[tuple[int, int, int, Any]], list[tuple[str, int, int]]]) -> None:
        todo, todo_text = drawn
        (tmp_path / "run.json").write_text(json.dumps(mutated(valid, todo)))
        (tmp_path / "episodes.jsonl").write_bytes(changed(record_of().to_json().encode() + b"\n", todo_text))
        whole_records(tmp_path / "episodes.jsonl")
        whole_lines(tmp_path / "episodes.jsonl")
        try:
            run = open_run(tmp_path)
        except RaiseEnvError:
            return
        run.book("learning", 1, 1.0, 1)  # type: ignore[attr-defined]

    fuzz("changed run.json", st.tuples(steps, changes), check, examples)


@often
def test_selector__config_changed__is_refused_or_loads(examples: int, tmp_path: Path) -> None:
    folder = selector_copy(tmp_path / "selector")
    valid = json.loads((folder / "config.json").read_text())

    def check(todo: list[tuple[int, int, int, Any]]) -> None:
        (folder / "config.json").write_text(json.dumps(mutated(valid, todo)))
        try:
            agent: Any = load_selector(folder)
        except RaiseEnvError:
            return
        assert agent.scores(np.ones((3, 39), dtype=np.float32)).shape == (3,) or agent.settings.least is not None

    fuzz("changed config of a selector", steps, check, examples)


@often
def test_adapter__config_changed__is_refused_or_read(examples: int, tmp_path: Path) -> None:
    folder = adapter_copy(tmp_path / "adapter")
    valid = json.loads((folder / "adapter_config.json").read_text())

    def check(todo: list[tuple[int, int, int, Any]]) -> None:
        (folder / "adapter_config.json").write_text(json.dumps(mutated(valid, todo)))
        try:
            adapter_settings(folder)
        except RaiseEnvError:
            return

    fuzz("changed config of an adapter", steps, check, examples)


FORM = TableForm("things", {"a": 1}, {"raw": Column("float32", 2)}, 4, 32, ("num_tokens",))
TABLE = np.arange(8, dtype=np.float32).reshape(4, 2)


@often
@pytest.mark.parametrize("ending", ["", ".partial"])
def test_stored_table__index_or_content_changed__gives_what_was_written(
    ending: str, examples: int, tmp_path: Path
) -> None:
    def blocks(first: int) -> Any:
        for row in range(first, 4):
            yield Block(1, {"raw": TABLE[row : row + 1]}, {"num_tokens": 1})

    stored_table(FORM, blocks, tmp_path, in_memory=True)
    whole = tmp_path / FORM.folder_name
    index, content = json.loads((whole / "index.json").read_text()), (whole / "raw.bin").read_bytes()
    folder = tmp_path / f"{FORM.folder_name}{ending}"

    def check(drawn: tuple[list[tuple[int, int, int, Any]], list[tuple[str, int, int]], bool]) -> None:
        todo, todo_content, changes_content = drawn
        if ending:
            for path in whole.glob("*"):
                path.unlink()
            if whole.exists():
                whole.rmdir()
        folder.mkdir(exist_ok=True)
        (folder / "index.json").write_text(json.dumps(mutated(index, [] if changes_content else todo)))
        (folder / "raw.bin").write_bytes(changed(content, todo_content) if changes_content else content)
        table = stored_table(FORM, blocks, tmp_path, in_memory=True)
        assert table.arrays["raw"].tobytes() == TABLE.tobytes()
        assert table.counts["num_tokens"] >= 0

    fuzz(f"changed cache{ending}", st.tuples(steps, changes, st.booleans()), check, examples)


# Settings

FIELDS = [*EnvConfig.__dataclass_fields__, "unknown", ""]
likely = st.sampled_from(
    [
        *(1, 2, 4, 8, 64, 0, -1, 0.5, 1e-3, "loss", "accuracy", "my:f", "tiny", "all", "text", "letter", "ansi", "nf4"),
        *("noise-60", "large", "pool.jsonl", True, False, None, ["stage"], ("semantic",), {"r": 4}, {"r": 0}),
        *({"prompt": "q", "response": "a"}, {"lora_dropout": 1}, {"target_modules": ["a"]}, ["difficulty", "semantic"]),
    ]
)


@often
def test_settings__any_values__are_refused_or_round_trip(examples: int) -> None:
    def check(kwargs: Mapping[str, Any]) -> None:
        try:
            config = EnvConfig.from_kwargs(kwargs)
        except SettingError as error:
            require_message(error, "")
            return
        again = config.to_kwargs()
        assert EnvConfig.from_kwargs(again) == config
        assert EnvConfig.from_kwargs(json.loads(json.dumps(again))) == config

    drawn = st.dictionaries(st.sampled_from(FIELDS), likely | plain, min_size=1, max_size=5)
    fuzz("any settings", drawn, check, examples * 4)


def test_fuzz__cases__counted(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        for kind, count in [*COUNTS.items(), ("in all", COUNTS.total())]:
            print(f"\n  {kind:<40}{count:>7}", end="")


# Minimal cases of what was found


@pytest.mark.parametrize("ending", ["", ".partial"])
@pytest.mark.parametrize(
    "values", [{"counts": {}}, {"num_rows": 10**6}, {"num_rows": 3}, {"num_bytes": {"raw": 16}}], ids=str
)
def test_stored_table__index_of_another_table__is_made_again(
    values: dict[str, Any], ending: str, tmp_path: Path
) -> None:
    def blocks(first: int) -> Any:
        yield Block(4 - first, {"raw": TABLE[first:]}, {"num_tokens": 1})

    stored_table(FORM, blocks, tmp_path, in_memory=True)
    whole = tmp_path / FORM.folder_name
    index = json.loads((whole / "index.json").read_text())
    (whole / "index.json").write_text(json.dumps({**index, **values}))
    if ending:
        whole.rename(tmp_path / f"{FORM.folder_name}{ending}")
    table = stored_table(FORM, blocks, tmp_path, in_memory=True)
    assert table.arrays["raw"].tobytes() == TABLE.tobytes()
    assert table.counts == {"num_tokens": 1}


def test_stored_table__content_that_cannot_be__is_made_again(tmp_path: Path) -> None:
    def check(arrays: Mapping[str, np.ndarray]) -> None:
        if (arrays["raw"] < 0).any():
            raise ValueError("it is negative")

    def of(rows: np.ndarray) -> Callable[[int], Any]:
        return lambda _first: iter([Block(4, {"raw": rows}, {"num_tokens": 1})])

    stored_table(FORM, of(-TABLE), tmp_path, in_memory=True)
    checked = TableForm(FORM.name, FORM.key, FORM.columns, 4, 32, ("num_tokens",), check)
    assert (stored_table(checked, of(TABLE), tmp_path, in_memory=True).arrays["raw"] >= 0).all()


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "max_grad_norm"])
@pytest.mark.parametrize("value", [10**400, -(10**400), float("nan"), True])
def test_settings__number_beyond_floats__is_refused(name: str, value: Any) -> None:
    with pytest.raises(SettingError, match=name):
        EnvConfig.from_kwargs({name: value})
    with pytest.raises(SettingError, match="lora_alpha"):
        EnvConfig.from_kwargs({"lora": {"lora_alpha": value}})


def test_record__number_beyond_floats__is_refused() -> None:
    value = json.loads(record_of().to_json())
    for name, number in (("rewards", [10**400]), ("dev_scores", [0.0, 10**400]), ("test_score", 10**400)):
        with pytest.raises(RecordError, match=name):
            EpisodeRecord.from_json(json.dumps({**value, name: number}), "here")
    with pytest.raises(RecordError, match="too long to read"):
        EpisodeRecord.from_json('{"seed": ' + "1" * 5000 + "}", "here")
