"""Writing so that a crash loses nothing: beside the target first, then renamed onto it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import OutputError

__all__ = ["append_line", "prepare_folder", "replaced", "replaced_folder", "write_json", "write_text"]


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a file name to write to; when the context ends well it becomes `path`, else `path` stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        _readable_by_others(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Give a new folder to fill; when the context ends well it takes the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    old = beside.with_name(f"{beside.name}.old")
    try:
        yield beside
        _folder_readable_by_others(beside)
        if path.exists():
            path.rename(old)
        beside.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file by this text."""
    with replaced(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace a file by this value, indented for people to read."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """Add one line to a file and see it onto the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def prepare_folder(folder: Path) -> None:
    """Make an output folder, and find out now rather than in an hour whether it can be written.

    Raises:
        OutputError: It cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"the output folder {str(folder)!r} cannot be written ({error.strerror}); name another, or free it."
        ) from error


def _readable_by_others(path: Path) -> None:
    # mkstemp and safetensors make files for their owner alone; a result is as open as any other file.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _folder_readable_by_others(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        _readable_by_others(path)
