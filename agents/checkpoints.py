"""Checkpoints of learning: which there are, which of them are whole, and no more of them than are of use.

A checkpoint is a folder that appears whole or not at all. Disks may still tear what was whole: so each has an index of
its files with the SHA-256 of each, and the one before it is kept as well.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from raise_env.files import replaced_folder, write_json

__all__ = ["NUM_KEPT", "Checkpoints"]

#: The newest, and one to go back to.
NUM_KEPT = 2

_INDEX, _CONTENT = "index.json", "state"

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints in a folder, each after so many episodes.

    Args:
        folder: Where they are; made with the first one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, num_episodes: int, write: Callable[[Path], None]) -> None:
        """Keep a checkpoint, and remove those that are no longer of use.

        Args:
            num_episodes: Episodes of learning that it is after.
            write: Writes what is to be kept into a folder that it makes.
        """
        with replaced_folder(self._folder / f"episode-{num_episodes:04d}") as beside:
            write(beside / _CONTENT)
            write_json(beside / _INDEX, _digests(beside / _CONTENT))
        for number, path in self._found()[NUM_KEPT:]:
            logger.debug("the checkpoint after episode %d is no longer needed", number)
            shutil.rmtree(path, ignore_errors=True)

    def newest(self) -> tuple[int, Path | None]:
        """Return after how many episodes the newest whole one is, and its content; 0 and None where there is none."""
        for number, path in self._found():
            fault = _fault(path)
            if fault is None:
                return number, path / _CONTENT
            logger.warning("the checkpoint %s cannot be used (%s); going back to the one before it", path, fault)
            shutil.rmtree(path, ignore_errors=True)
        return 0, None

    def _found(self) -> list[tuple[int, Path]]:
        """Return number and folder of all, the newest first."""
        names = {path.name: path for path in self._folder.iterdir()} if self._folder.is_dir() else {}
        numbers = {name: match for name in names if (match := re.fullmatch(r"episode-(\d+)", name))}
        return sorted(((int(match[1]), names[name]) for name, match in numbers.items()), reverse=True)


def _digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder, by its path there."""
    digests = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _fault(path: Path) -> str | None:
    """Return why a checkpoint is not what was written, None where it is."""
    try:
        noted = json.loads((path / _INDEX).read_text(encoding="utf-8"))
        found = _digests(path / _CONTENT)
    except (OSError, ValueError, RecursionError) as error:
        return str(error)
    if noted == found:
        return None
    names = {*noted, *found} if isinstance(noted, dict) else {_INDEX}
    odd = sorted(name for name in names if not isinstance(noted, dict) or noted.get(name) != found.get(name))
    return f"{', '.join(odd)} not as written"
