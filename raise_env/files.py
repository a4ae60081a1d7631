"""Writing so that a crash loses nothing: beside the target first, then renamed onto it.

What a killed process leaves behind has a name of its own form (`.NAME.XXXXXXXX.unfinished`, and with `.old` after it
what NAME was before), so that whoever goes on with its work can clear it away, or put it back. That is safe only while
nobody else writes there, which `held` sees to.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import OutputError, RaiseEnvError

__all__ = [
    "append_line",
    "clear_unfinished",
    "clear_unfinished_beside",
    "held",
    "prepare_folder",
    "replaced",
    "replaced_folder",
    "scratch_folder",
    "write_json",
    "write_text",
]

#: How the names end of what is being written, and of what it takes the place of.
_UNFINISHED, _OLD = ".unfinished", ".unfinished.old"

#: Of what something takes the place: its name is in it.
_MOVED_AWAY = re.compile(rf"\.(.+)\.[^.]+{re.escape(_OLD)}", re.DOTALL)

#: What systems say that lock nothing, or not on this disk.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EBADF, errno.EINVAL, errno.ENOSYS)

#: How the names of folders begin that are needed for a moment, and the age from which on one was left behind.
_SCRATCH, _LEFT_BEHIND_S = "raise-env-scratch-", 24 * 3600.0

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a file name to write to; when the context ends well it becomes `path`, else `path` stays as it was.

    Raises:
        OutputError: It cannot be written: the disk is full, say.
    """
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_UNFINISHED)
        os.close(handle)
        beside = Path(name)
        try:
            yield beside
            _see_onto_disk(beside)
            _readable_by_others(beside)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Give a new folder to fill; when the context ends well it takes the place of `path`.

    Raises:
        OutputError: It cannot be written: the disk is full, say.
    """
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=_UNFINISHED))
        old = beside.with_name(beside.name.removesuffix(_UNFINISHED) + _OLD)
        try:
            yield beside
            for part in [beside, *beside.rglob("*")]:
                _see_onto_disk(part)
                _readable_by_others(part)
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
    """Add one line to a file and see it onto the disk; where that fails, the file stays as it was.

    Raises:
        OutputError: It cannot be written: the disk is full, say.
    """
    with _explained(path), path.open("ab", buffering=0) as file:
        size, content = file.tell(), f"{line}\n".encode()
        try:
            while content:  # a full disk may take a part of it
                content = content[file.write(content) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise


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


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make an output folder where there is none, and keep other processes from writing in it meanwhile.

    The lock is the system's own on the open folder: it ends with the process, and leaves nothing behind. Where the
    system or the disk knows no such locks there is none.

    Raises:
        OutputError: The folder cannot be written, or another process is at work in it.
    """
    prepare_folder(folder)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"another process is writing in the folder {str(folder)!r}: wait until it ends, or name another folder."
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(handle)


def clear_unfinished_beside(path: Path) -> None:
    """Remove what processes that were killed were about to make this file of; its folder is held."""
    for left in path.parent.glob(f".{path.name}.*{_UNFINISHED}"):
        left.unlink(missing_ok=True)


def clear_unfinished(folder: Path) -> None:
    """Remove what processes that were killed were about to write, anywhere in a folder that is held.

    A folder that one of them had moved away, to put a new one in its place, gets its name back.
    """
    for parent, folders, files in os.walk(folder):
        for name in [name for name in [*folders, *files] if _is_unfinished(name)]:
            path = Path(parent, name)
            if name not in folders:
                logger.info("%s was left by a process that was killed; removing it", path)
                path.unlink(missing_ok=True)
                continue
            folders.remove(name)  # it is walked no more
            moved = _MOVED_AWAY.fullmatch(name)
            if moved and not os.path.lexists(path.with_name(moved[1])):
                logger.info("a process was killed before it had replaced %s; putting that back", moved[1])
                path.rename(path.with_name(moved[1]))
            else:
                logger.info("%s was left by a process that was killed; removing it", path)
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give a new folder for a moment, among the system's temporary ones, after removing those of killed processes."""
    for left in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError):  # another process may be faster
            if time.time() - left.lstat().st_mtime > _LEFT_BEHIND_S:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH) as folder:
        yield Path(folder)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Say in one message what is to be done where something cannot be written."""
    try:
        yield
    except RaiseEnvError:
        raise
    except (OSError, SafetensorError) as error:  # the second writes by itself, and tells of disks in its own words
        reason = getattr(error, "strerror", None) or str(error)
        fault = OutputError(
            f"{str(path)!r} cannot be written ({reason}). What was done before is on disk: free some room there, or "
            "mend the permissions; a run goes on with --resume."
        )
        fault.strerror = reason
        raise fault from error


def _is_unfinished(name: str) -> bool:
    return name.startswith(".") and name.endswith((_UNFINISHED, _OLD))


def _see_onto_disk(path: Path) -> None:
    """Wait until a file is on the disk: else a machine that stops may have done the rename and not the writing."""
    if path.is_dir():
        return
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _readable_by_others(path: Path) -> None:
    # mkstemp and safetensors make files for their owner alone; a result is as open as any other file.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
