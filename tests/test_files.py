from __future__ import annotations

import json
import os
import stat

import pytest

from raise_env.errors import OutputError
from raise_env.files import append_line, prepare_folder, replaced, replaced_folder, write_json, write_text


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
