"""What a model's folder may hold, whoever wrote it: looked at before transformers opens anything in it.

transformers runs no code of a folder, and opens no pickle, as it is asked here. What it would do is follow a file name
to wherever it leads, fetch a kernel that config.json names, and take memory for any size that it is told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import ModelError
from .foreign_files import check_inside, check_regular, read_json

__all__ = ["check_model_folder", "check_room", "num_weights"]

_CONFIG, _TOKENIZER, _ADAPTER = "config.json", "tokenizer_config.json", "adapter_config.json"

#: How config.json counts what a model is built of, one by one.
_COUNT = re.compile(r"(num|n)_\w*(layer|expert|block)s?")

#: More of them has no model; building so many alone would take minutes.
_MAX_COUNT = 1000

#: How many times the numbers in its files a model may have: four bits a number stand in 32, and buffers are not stored.
_MOST_GROWTH = 16
_FREE = 2**28


def check_model_folder(folder: Path) -> None:
    """Check the files of a model's folder.

    Links are followed: in the hub's own cache every file is one. A name within a file is not, where it leads out.

    Raises:
        ModelError: It is an adapter's; a file is no regular one, is no JSON, or names one outside the folder; or
            config.json asks for code of the hub, or for more parts than any model has.
    """
    if (folder / _ADAPTER).exists():
        raise ModelError(
            f"model {str(folder)!r} holds an {_ADAPTER}, by which other weights would be loaded than its own. Name the "
            "adapter's folder as adapter (--adapter), and the model without it as model."
        )
    for path in sorted(folder.iterdir()):
        where = f"model {str(folder)!r}, {path.name}"
        try:
            if not path.is_dir():
                check_regular(path)
            if path.name.endswith(".index.json"):
                _check_index(read_json(path))
            elif path.name == _CONFIG:
                _check_config(read_json(path))
            elif path.name == _TOKENIZER:
                _check_tokenizer(read_json(path), folder)
        except (OSError, ValueError) as error:
            raise ModelError(f"{where}: {error}. Expected a folder as transformers writes it.") from error


def num_weights(folder: Path) -> int:
    """Return how many numbers a folder's safetensors hold, by their headers, which are checked against the files.

    Raises:
        ModelError: A file is torn.
    """
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "np") as file:
                for name in file.keys():  # noqa: SIM118 (it is no mapping)
                    size = 1
                    for width in file.get_slice(name).get_shape():
                        size *= width
                    total += size
        except (OSError, SafetensorError, ValueError) as error:
            raise ModelError(
                f"model {str(folder)!r}, {path.name}: cannot be read ({error}). Expected whole safetensors; download "
                "or save it again."
            ) from error
    return total


def check_room(wanted: int, folder: Path) -> None:
    """Check that a model asks for no more memory than its files account for.

    Args:
        wanted: Its numbers, by config.json.
        folder: Its files.

    Raises:
        ModelError: It asks for many times as many; or as `num_weights`.
    """
    found = num_weights(folder)
    if wanted > _MOST_GROWTH * found + _FREE:
        raise ModelError(
            f"model {str(folder)!r}: {_CONFIG} asks for {wanted:,} numbers, and its files hold {found:,}: they do not "
            "belong together. Expected the folder as transformers wrote it."
        )


def _check_index(index: Any) -> None:
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError("it has no weight_map of file names")
    for name in sorted(set(names.values())):
        if Path(name).name != name:
            raise ValueError(f"it names {name[:100]!r}; expected a file of this folder")


def _check_tokenizer(settings: Any, folder: Path) -> None:
    if not isinstance(settings, dict):
        raise ValueError("it is no object")
    for key, value in settings.items():
        # What the author's own disk had there says nothing; what this one has would be read.
        if key.endswith("_file") and isinstance(value, str) and (folder / value).exists():
            check_inside(folder / value, folder)


def _check_config(settings: Any) -> None:
    if not isinstance(settings, dict):
        raise ValueError("it is no object")
    for key, value in _entries(settings):
        if key.endswith("_implementation") and "/" in str(value):
            raise ValueError(f"{key} is {str(value)[:100]!r}, code of the hub, which is not run; remove it")
        if _COUNT.fullmatch(key) and isinstance(value, (int, float)) and not value <= _MAX_COUNT:
            raise ValueError(f"{key} is {str(value)[:100]}; expected at most {_MAX_COUNT}")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of an object and of those within it."""
    if isinstance(value, dict):
        yield from value.items()
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _entries(inner)
