from __future__ import annotations

import json
import multiprocessing
import os
import signal
import stat
import tempfile
import time
from pathlib import Path

import pytest

from raise_env import files
from raise_env.errors import OutputError
from raise_env.files import (
    append_line,
    clear_unfinished,
    clear_unfinished_beside,
    held,
    prepare_folder,
    replaced,
    replaced_folder,
    scratch_folder,
    write_json,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_replaced__all_well__puts_the_new_file_in_place(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with replaced(path) as beside:
        beside.write_text("new")
        assert beside.parent == path.parent, "a rename is only safe on one file system"
        assert not path.exists()
    assert path.read_text() == "new"
    assert names(path.parent) == ["file.txt"]


def test_replaced__crash_in_between__leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def crash():
        with replaced(path) as beside:
            beside.write_text("half of the ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        crash()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_replaced__umask__decides_who_can_read(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file.txt", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o640


def test_replaced_folder__all_well__takes_the_place_of_the_old_one(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    with replaced_folder(folder) as beside:
        (beside / "new.txt").write_text("new")
        assert names(folder) == ["old.txt"]
    assert names(folder) == ["new.txt"]
    assert names(tmp_path) == ["results"]


def test_replaced_folder__crash_in_between__leaves_the_old_one(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "old.txt").write_text("old")

    def crash():
        with replaced_folder(folder) as beside:
            (beside / "new.txt").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        crash()
    assert names(folder) == ["old.txt"]
    assert names(tmp_path) == ["results"]


def test_replaced_folder__crash_of_the_last_rename__leaves_the_old_one(tmp_path, monkeypatch):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    rename = type(folder).rename

    def fail(self, target):
        if target == folder and not (self / "old.txt").exists():
            raise OSError("disk is gone")
        return rename(self, target)

    monkeypatch.setattr(type(folder), "rename", fail)
    with pytest.raises(OSError, match="disk is gone"), replaced_folder(folder) as beside:
        (beside / "new.txt").write_text("new")
    assert names(folder) == ["old.txt"]
    assert names(tmp_path) == ["results"]


def test_write_json__any_value__is_read_back_and_ends_in_a_newline(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"name": "Größe", "numbers": [1, 2.5, None]})
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == {"name": "Größe", "numbers": [1, 2.5, None]}
    assert "Größe" in text
    assert text.endswith("}\n")


def test_write_json__not_a_number__is_refused_and_the_old_file_stays(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, 1)
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"))
    assert path.read_text() == "1\n"


def test_append_line__several__come_one_after_the_other(tmp_path):
    for text in ("one", "zwei: ß"):
        append_line(tmp_path / "lines.txt", text)
    assert (tmp_path / "lines.txt").read_text(encoding="utf-8") == "one\nzwei: ß\n"


def test_prepare_folder__new__is_made_and_left_empty(tmp_path):
    prepare_folder(tmp_path / "a" / "b")
    prepare_folder(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []


def test_prepare_folder__a_file_is_in_the_way__is_said(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="cannot be written"):
            prepare_folder(folder)


def test_replaced__file_and_folder__are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(f"synced {os.path.getsize(f'/dev/fd/{handle}')}"))
    for kind in ("replace", "rename"):
        real = getattr(os, kind)
        monkeypatch.setattr(os, kind, lambda a, b, real=real: (done.append("named"), real(a, b)))
    write_text(tmp_path / "file", "1234567")
    assert done == ["synced 7", "named"]
    done.clear()
    with replaced_folder(tmp_path / "folder") as beside:
        (beside / "a").mkdir()
        (beside / "a" / "b").write_text("12")
    assert done == ["synced 2", "named"]


# What killed processes leave


def killed_while_writing(folder, monkeypatch):
    """Leave what is left where nothing is cleared up."""
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        for writing, name in ((replaced, "deep/file.txt"), (replaced_folder, "results")):
            with pytest.raises(KeyboardInterrupt), writing(folder / name):
                raise KeyboardInterrupt
        with replaced_folder(folder / "results") as beside:
            (beside / "new.txt").write_text("new")


def test_clear_unfinished__what_killed_processes_left__is_removed_and_nothing_else(tmp_path, monkeypatch):
    kept = {".hidden", "unfinished", "a.unfinished", ".gitignore"}
    for name in kept:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".results.x.unfinished.old").mkdir()
    killed_while_writing(tmp_path, monkeypatch)
    assert len(list(tmp_path.rglob(".*unfinished*"))) == 3
    clear_unfinished(tmp_path)
    assert set(names(tmp_path)) == {*kept, "deep", "results"}
    assert names(tmp_path / "deep") == []
    assert names(tmp_path / "results") == ["new.txt"]


def replace_and_die(folder):
    """Replace a folder, and die between the two renames."""
    rename = Path.rename

    def rename_or_die(path, target):
        if Path(target) == Path(folder):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    Path.rename = rename_or_die
    with replaced_folder(Path(folder)) as beside:
        (beside / "new.txt").write_text("new")


@pytest.mark.parametrize("name", ["results", "a.b"])
def test_clear_unfinished__killed_between_the_renames_of_a_folder__puts_the_old_one_back(tmp_path, name):
    folder = tmp_path / "deep" / name
    folder.mkdir(parents=True)
    (folder / "old.txt").write_text("old")
    process = multiprocessing.get_context("spawn").Process(target=replace_and_die, args=(str(folder),))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(names(folder.parent)) == 2
    assert not folder.exists()
    clear_unfinished(tmp_path)
    assert names(folder.parent) == [name]
    assert names(folder) == ["old.txt"]


@pytest.mark.parametrize("name", ["..x.unfinished.old", ".x.unfinished.old", ".unfinished.old", "....x.unfinished.old"])
def test_clear_unfinished__old_one_of_no_name__is_removed(tmp_path, name):
    (tmp_path / name).mkdir()
    clear_unfinished(tmp_path)
    assert names(tmp_path) == []


def test_clear_unfinished_beside__what_was_to_become_this_file__is_all_that_goes(tmp_path):
    kept = {"run.json", ".results.jsonl.abcdefgh.unfinished", ".run.json", "a.run.json.b.unfinished"}
    for name in {*kept, ".run.json.abcdefgh.unfinished"}:
        (tmp_path / name).write_text("mine")
    clear_unfinished_beside(tmp_path / "run.json")
    assert set(names(tmp_path)) == kept


def test_scratch_folder__after_use_and_a_day_after_a_kill__is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "raise-env-scratch-old").mkdir()
    (tmp_path / "raise-env-scratch-old" / "file").write_text("")
    (tmp_path / "raise-env-scratch-new").mkdir()
    (tmp_path / "other").mkdir()
    long_ago = time.time() - files._LEFT_BEHIND_S - 60
    for name in ("raise-env-scratch-old", "other"):
        os.utime(tmp_path / name, (long_ago, long_ago))
    with scratch_folder() as folder:
        assert folder.parent == tmp_path
        assert names(tmp_path) == sorted(["other", "raise-env-scratch-new", folder.name])
    assert names(tmp_path) == ["other", "raise-env-scratch-new"]


# One process at a time


def hold_and_wait(folder, begun, over):
    with held(Path(folder)):
        begun.set()
        over.wait(60)


def test_held__by_another_process__is_refused_until_that_ends(tmp_path):
    context = multiprocessing.get_context("spawn")
    begun, over = context.Event(), context.Event()
    process = context.Process(target=hold_and_wait, args=(str(tmp_path / "run"), begun, over))
    process.start()
    try:
        assert begun.wait(60)
        with pytest.raises(OutputError, match="another process is writing"), held(tmp_path / "run"):
            pass
        process.kill()  # it is not asked to let go
        process.join()
        with held(tmp_path / "run"):
            assert names(tmp_path / "run") == []
    finally:
        process.kill()
        process.join()
    with held(tmp_path / "run"):
        pass


def test_held__disk_without_locks__goes_on_without(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(handle, how):
        raise OSError(files._NO_LOCKS[0], "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
