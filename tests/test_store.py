from __future__ import annotations

import errno
import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from raise_env.errors import OutputError
from raise_env.store import Block, Column, TableForm, cache_folder, stored_table

FORM = TableForm(
    "things",
    {"pool": "a", "updates": 3},
    {"ids": Column("int64", is_by_row=False), "rows": Column("float32", 3)},
    10,
    200,
)

#: What FORM's table holds: two ids for each even row, and a line of numbers for every row.
ROWS = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
IDS = np.repeat(np.arange(0, 10, 2), 2)


class Maker:
    """Makes the blocks of FORM's table, three rows each, and notes from which row on it was asked."""

    def __init__(self, stop_after=None):
        self.calls = []
        self.num_blocks = 0
        self.stop_after = stop_after

    def __call__(self, first):
        self.calls.append(first)
        for start in range(0, 10, 3):
            if start < first:
                continue
            if self.num_blocks == self.stop_after:
                raise KeyboardInterrupt
            self.num_blocks += 1
            ids = IDS[np.isin(IDS, range(start, start + 3))]
            rows = ROWS[start : start + 3]
            yield Block(len(rows), {"ids": ids, "rows": rows}, {"num_tokens": int(rows.shape[0]) * 7})


def check(table):
    np.testing.assert_array_equal(table.arrays["ids"], IDS)
    np.testing.assert_array_equal(table.arrays["rows"], ROWS)
    assert table.arrays["ids"].dtype == np.int64
    assert table.arrays["rows"].dtype == np.float32
    assert table.counts == {"num_tokens": 70}


def content(folder):
    return {path.name: path.read_bytes() for path in (folder / FORM.folder_name).iterdir()}


def begin(folder, num_blocks, *, in_memory=False):
    """Make so many blocks and stop, as a kill would."""
    with pytest.raises(KeyboardInterrupt):
        stored_table(FORM, Maker(num_blocks), folder, in_memory=in_memory)
    return folder / f"{FORM.folder_name}.partial"


@pytest.mark.parametrize("in_memory", [True, False])
def test_stored_table__second_call__reads_what_the_first_has_kept(tmp_path, in_memory):
    maker = Maker()
    for _ in range(2):
        check(stored_table(FORM, maker, tmp_path / "new", in_memory=in_memory))
    assert maker.calls == [0]


def test_stored_table__another_key__is_another_table(tmp_path):
    stored_table(FORM, Maker(), tmp_path, in_memory=True)
    maker = Maker()
    same = TableForm("things", dict(reversed(FORM.key.items())), FORM.columns, 10, 200)
    stored_table(same, maker, tmp_path, in_memory=True)
    assert not maker.calls
    other = TableForm("things", {**FORM.key, "updates": 4}, FORM.columns, 10, 200)
    stored_table(other, maker, tmp_path, in_memory=True)
    assert maker.calls == [0]


def test_stored_table__mapped__is_not_in_memory_and_cannot_be_written(tmp_path):
    table = stored_table(FORM, Maker(), tmp_path, in_memory=False)
    rows = table.arrays["rows"]
    assert not rows.flags.owndata
    assert type(rows) is np.ndarray
    with pytest.raises(ValueError, match="read-only"):
        rows[0] = 1


def test_stored_table__without_rows__has_empty_arrays(tmp_path):
    form = TableForm("things", {}, FORM.columns, 0, 0)
    for in_memory in (True, False):
        table = stored_table(form, lambda _: iter(()), tmp_path, in_memory=in_memory)
        assert [array.shape for array in table.arrays.values()] == [(0,), (0, 3)]


# Killed and gone on with


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("num_blocks", [1, 2, 4])
def test_stored_table__killed_after_some_blocks__goes_on_to_equal_bytes(tmp_path, num_blocks, in_memory):
    stored_table(FORM, Maker(), tmp_path / "whole", in_memory=in_memory)
    if num_blocks < 4:
        begin(tmp_path / "torn", num_blocks, in_memory=in_memory)
    maker = Maker()
    check(stored_table(FORM, maker, tmp_path / "torn", in_memory=in_memory))
    assert maker.calls == [3 * num_blocks if num_blocks < 4 else 0]
    assert content(tmp_path / "torn") == content(tmp_path / "whole")


def test_stored_table__killed_while_a_block_was_written__its_torn_end_is_cut(tmp_path):
    stored_table(FORM, Maker(), tmp_path / "whole", in_memory=False)
    partial = begin(tmp_path / "torn", 2)
    with (partial / "rows.bin").open("ab") as file:
        file.write(b"a row that did not " * 20)
    maker = Maker()
    check(stored_table(FORM, maker, tmp_path / "torn", in_memory=False))
    assert maker.calls == [6]
    assert content(tmp_path / "torn") == content(tmp_path / "whole")


def flip_a_bit(path):
    changed = bytearray(path.read_bytes())
    changed[3] ^= 1
    path.write_bytes(bytes(changed))


def tear(path):
    path.write_bytes(path.read_bytes()[:5])


def empty(path):
    path.write_bytes(b"")


def change(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def replace_by_file(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_text("in the way")


SPOILERS = {
    "bit": lambda folder: flip_a_bit(folder / "rows.bin"),
    "bit of another column": lambda folder: flip_a_bit(folder / "ids.bin"),
    "torn column": lambda folder: tear(folder / "rows.bin"),
    "empty column": lambda folder: empty(folder / "ids.bin"),
    "missing column": lambda folder: (folder / "ids.bin").unlink(),
    "torn index": lambda folder: tear(folder / "index.json"),
    "empty index": lambda folder: empty(folder / "index.json"),
    "missing index": lambda folder: (folder / "index.json").unlink(),
    "index that is a list": lambda folder: (folder / "index.json").write_text("[1]"),
    "index of another table": lambda folder: change(folder / "index.json", digest="0"),
    "index without counts": lambda folder: change(folder / "index.json", counts=[1]),
    "index with other counts": lambda folder: change(folder / "index.json", counts={"num_tokens": "x"}),
    "index with sizes below zero": lambda folder: change(folder / "index.json", num_bytes={"ids": -1, "rows": 0}),
    "index without hashes": lambda folder: change(folder / "index.json", sha256={}),
    "file in the folder's place": replace_by_file,
}


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS)
def test_stored_table__spoilt_or_foreign__is_named_and_made_again(tmp_path, caplog, spoil):
    stored_table(FORM, Maker(), tmp_path, in_memory=False)
    spoil(tmp_path / FORM.folder_name)
    maker = Maker()
    with caplog.at_level(logging.WARNING, logger="raise_env"):
        check(stored_table(FORM, maker, tmp_path, in_memory=False))
    assert maker.calls == [0]
    assert FORM.folder_name in caplog.text
    check(stored_table(FORM, maker, tmp_path, in_memory=True))
    assert maker.calls == [0], "it is whole again"


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS)
def test_stored_table__spoilt_beginning__is_named_and_started_anew(tmp_path, caplog, spoil):
    spoil(begin(tmp_path, 2))
    maker = Maker()
    with caplog.at_level(logging.WARNING, logger="raise_env"):
        check(stored_table(FORM, maker, tmp_path, in_memory=False))
    assert maker.calls == [0]
    assert f"{FORM.folder_name}.partial" in caplog.text


def test_stored_table__fewer_rows_than_asked_for__is_made_again(tmp_path, caplog):
    stored_table(FORM, Maker(), tmp_path, in_memory=True)
    change(tmp_path / FORM.folder_name / "index.json", num_rows=9)
    maker = Maker()
    check(stored_table(FORM, maker, tmp_path, in_memory=True))
    assert maker.calls == [0]
    assert "another number of entries" in caplog.text


def test_stored_table__killed_while_its_index_was_written__keeps_nothing_of_that(tmp_path):
    (begin(tmp_path, 2) / ".index.json.abc.unfinished").write_text("{")
    maker = Maker()
    check(stored_table(FORM, maker, tmp_path, in_memory=False))
    assert maker.calls != [0], "it is gone on with"
    assert not list(tmp_path.rglob("*.unfinished"))


# Where it cannot be written


def fail_to_write(monkeypatch, after):
    """Let the disk be full after so many bytes."""
    opened = Path.open
    left = [after]

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            if left[0] < len(data):
                raise OSError(errno.ENOSPC, "No space left on device")
            left[0] -= len(data)
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    def open_path(self, mode="r", *args, **kwargs):
        file = opened(self, mode, *args, **kwargs)
        return Full(file) if "+" in mode else file

    monkeypatch.setattr(Path, "open", open_path)


def test_stored_table__disk_full_in_between__says_what_to_do_and_is_gone_on_with(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail_to_write(patch, after=150)
        with pytest.raises(OutputError, match=r"things of 10 rows .*No space left.*--cache-dir.*RAISE_ENV_CACHE") as e:
            stored_table(FORM, Maker(), tmp_path, in_memory=False)
    assert str(tmp_path) in str(e.value)
    maker = Maker()
    check(stored_table(FORM, maker, tmp_path, in_memory=False))
    assert maker.calls == [6]


def test_stored_table__disk_full_in_between_but_fits_into_memory__costs_time_only(tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        fail_to_write(patch, after=150)
        check(stored_table(FORM, Maker(), tmp_path, in_memory=True))
    assert "cannot be kept" in caplog.text
    maker = Maker()
    check(stored_table(FORM, maker, tmp_path, in_memory=True))
    assert maker.calls == [6]


def test_stored_table__disk_that_takes_a_part_of_each_write__gets_all(tmp_path, monkeypatch):
    opened = Path.open

    class Slow:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[:5])

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(
        Path,
        "open",
        lambda self, mode="r", *a, **k: (Slow if "+" in mode else (lambda f: f))(opened(self, mode, *a, **k)),
    )
    check(stored_table(FORM, Maker(), tmp_path, in_memory=False))


def test_stored_table__too_little_room__is_said_before_anything_is_made(tmp_path):
    huge = TableForm("things", {}, FORM.columns, 10, 10**18)
    maker = Maker()
    with pytest.raises(OutputError, match=r"1000000000\.00 GB more are needed, .* are free.*--cache-dir"):
        stored_table(huge, maker, tmp_path, in_memory=False)
    assert not maker.calls
    check(stored_table(huge, maker, tmp_path, in_memory=True))


@pytest.mark.parametrize("in_memory", [True, False])
def test_stored_table__folder_that_cannot_be_written__costs_time_or_is_refused(tmp_path, caplog, in_memory):
    (tmp_path / "file").write_text("in the way")
    if in_memory:
        check(stored_table(FORM, Maker(), tmp_path / "file", in_memory=True))
        assert "cannot be kept" in caplog.text
    else:
        with pytest.raises(OutputError, match="cannot be kept in the cache folder"):
            stored_table(FORM, Maker(), tmp_path / "file", in_memory=False)


# Two processes

WORKER = """
import logging, sys, time
sys.path.insert(0, sys.argv[2])
logging.basicConfig(level=logging.INFO)
import test_store as t
from pathlib import Path
class Slow(t.Maker):
    def __call__(self, first):
        print("making", flush=True)
        for block in super().__call__(first):
            time.sleep(0.3)
            yield block
t.check(t.stored_table(t.FORM, Slow(), Path(sys.argv[1]), in_memory=False))
"""


def start(folder):
    arguments = [sys.executable, "-c", WORKER, str(folder), str(Path(__file__).parent)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_stored_table__two_processes_at_once__one_makes_it_and_the_other_waits(tmp_path):
    workers = [start(tmp_path) for _ in range(2)]
    outputs = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    assert sorted(out for out, _ in outputs) == ["", "making\n"]
    check(stored_table(FORM, Maker(0), tmp_path, in_memory=True))


def test_stored_table__process_killed_in_the_middle__lock_is_free_and_blocks_are_kept(tmp_path):
    worker = start(tmp_path)
    index = tmp_path / f"{FORM.folder_name}.partial" / "index.json"
    deadline = time.monotonic() + 60
    while not index.exists() or json.loads(index.read_text())["num_rows"] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    worker.kill()
    worker.communicate()
    maker = Maker()
    check(stored_table(FORM, maker, tmp_path, in_memory=False))
    assert maker.calls[0] >= 3


def test_stored_table__lock_held_by_another__says_that_it_waits(tmp_path, caplog):
    holder = start(tmp_path)
    assert holder.stdout.readline() == "making\n"
    check(stored_table(FORM, Maker(0), tmp_path, in_memory=True))
    assert "waiting for it" in caplog.text
    holder.communicate()


def test_cache_folder__several_places_named__takes_the_nearest(monkeypatch, tmp_path):
    monkeypatch.setenv("RAISE_ENV_CACHE", str(tmp_path / "variable"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("given").name == "given"
    assert cache_folder(None) == tmp_path / "variable"
    monkeypatch.delenv("RAISE_ENV_CACHE")
    assert cache_folder(None) == tmp_path / "xdg" / "raise-env"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(None).parts[-2:] == (".cache", "raise-env")
