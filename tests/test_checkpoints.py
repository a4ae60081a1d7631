from __future__ import annotations

import logging

import pytest

from raise_env.agents.checkpoints import NUM_KEPT, Checkpoints


def writer(text):
    def write(folder):
        (folder / "below").mkdir(parents=True)
        (folder / "below" / "numbers.bin").write_bytes(text.encode() * 100)
        (folder / "config.json").write_text(text)

    return write


def kept(folder):
    return sorted(path.name for path in folder.iterdir())


def filled(folder, number=3):
    checkpoints = Checkpoints(folder)
    for episode in range(1, number + 1):
        checkpoints.save(episode, writer(f"after {episode}"))
    return checkpoints


def test_newest__none_was_made__is_said(tmp_path):
    assert Checkpoints(tmp_path / "learning").newest() == (0, None)
    assert not (tmp_path / "learning").exists(), "looking makes nothing"


def test_save__several__only_the_last_are_kept(tmp_path):
    checkpoints = filled(tmp_path, 12)
    assert NUM_KEPT == 2
    assert kept(tmp_path) == ["episode-0011", "episode-0012"]
    number, folder = checkpoints.newest()
    assert number == 12
    assert (folder / "config.json").read_text() == "after 12"


def test_save__killed_before_what_is_old_was_removed__is_made_up_for(tmp_path):
    filled(tmp_path, 2)
    (tmp_path / "episode-0000").mkdir()  # half removed
    filled(tmp_path, 3)
    assert kept(tmp_path) == ["episode-0002", "episode-0003"]


def test_newest__foreign_names__are_left_alone(tmp_path):
    checkpoints = filled(tmp_path, 1)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "episode-x").mkdir()
    assert checkpoints.newest()[0] == 1
    assert kept(tmp_path) == ["episode-0001", "episode-x", "notes.txt"]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


SPOILERS = {
    "file cut off": lambda folder: cut(folder / "state" / "below" / "numbers.bin"),
    "file emptied": lambda folder: (folder / "state" / "config.json").write_bytes(b""),
    "one bit": lambda folder: flip(folder / "state" / "below" / "numbers.bin"),
    "file missing": lambda folder: (folder / "state" / "config.json").unlink(),
    "file too many": lambda folder: (folder / "state" / "more").write_text(""),
    "index missing": lambda folder: (folder / "index.json").unlink(),
    "index cut off": lambda folder: cut(folder / "index.json"),
    "index that is a list": lambda folder: (folder / "index.json").write_text("[]"),
    "index that is no text": lambda folder: (folder / "index.json").write_bytes(b"\xff\x00"),
}


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS)
def test_newest__the_last_one_is_torn__is_named_and_the_one_before_taken(tmp_path, caplog, spoil):
    checkpoints = filled(tmp_path)
    spoil(tmp_path / "episode-0003")
    with caplog.at_level(logging.WARNING, logger="raise_env"):
        number, folder = checkpoints.newest()
    assert number == 2
    assert (folder / "config.json").read_text() == "after 2"
    assert "episode-0003 cannot be used" in caplog.text
    checkpoints.save(3, writer("after 3 again"))
    assert (checkpoints.newest()[1] / "config.json").read_text() == "after 3 again"


def test_newest__all_are_torn__learning_begins_anew(tmp_path):
    checkpoints = filled(tmp_path)
    for path in tmp_path.iterdir():
        cut(path / "index.json")
    assert checkpoints.newest() == (0, None)
    assert kept(tmp_path) == []
