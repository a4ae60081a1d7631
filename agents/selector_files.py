"""The folder of a learned selector: config.json says what it is, model.safetensors holds its weights.

Nothing is pickled, and nothing in a folder is run.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from raise_env.errors import RecordError
from raise_env.files import replaced_folder, write_json
from raise_env.foreign_files import check_inside, check_regular, read_json

from .feature_view import FeatureView

__all__ = ["SELECTOR_FORMAT", "check_room", "read_config", "read_tensors", "stored_tensors", "write_selector"]

#: Counts up when `read_config` could no longer read what an earlier `write_selector` wrote.
SELECTOR_FORMAT = 2


def write_selector(
    folder: Path,
    agent: str,
    weights: Mapping[str, Tensor],
    *,
    settings: Mapping[str, Any],
    view: FeatureView | None,
    episode_returns: Sequence[float],
    training: Mapping[str, Any],
) -> None:
    """Write a selector; the folder appears whole or not at all.

    Args:
        folder: Where to.
        agent: The agent's name in the catalogue.
        weights: What it has learned.
        settings: What the agent is made with, as plain data.
        view: The features that it learned on; None before it has learned.
        episode_returns: The return of each episode of learning.
        training: What it learned on, for the reader.
    """
    config = {
        "format": SELECTOR_FORMAT,
        "agent": agent,
        "settings": dict(settings),
        "episode_returns": list(episode_returns),
        "training": dict(training),
    }
    with replaced_folder(folder) as beside:
        config["features"] = None if view is None else view.save(beside)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, beside / "model.safetensors")
        write_json(beside / "config.json", config)


def read_config(folder: Path, agent: str) -> dict[str, Any]:
    """Return what config.json holds, checked.

    Raises:
        RecordError: It is missing or torn, or the selector is of another kind or for other features.
    """
    path = folder / "config.json"
    try:
        config = read_json(path, inside=folder)
    except (OSError, ValueError) as error:
        raise RecordError(
            f"{path}: not a selector ({error}). Expected a folder that `raise-env train` wrote."
        ) from error
    if not isinstance(config, dict) or config.get("agent") != agent or config.get("format") != SELECTOR_FORMAT:
        raise RecordError(f"{path}: not a {agent} selector of format {SELECTOR_FORMAT}.")
    if not isinstance(config.get("settings"), dict) or not isinstance(config.get("training"), dict):
        raise RecordError(f"{path}: the fields 'settings' and 'training' are not as promised.")
    returns = config.get("episode_returns")
    if not isinstance(returns, list) or not all(isinstance(value, (int, float)) for value in returns):
        raise RecordError(f"{path}: the field 'episode_returns' is not as promised.")
    return config


def check_room(dims: Sequence[int], weights: Mapping[str, Tensor], copies: int = 1) -> None:
    """Check that networks are not larger than the weights that there are for them, before they are built.

    Args:
        dims: Widths of a network's layers, from input to output.
        weights: What the file holds.
        copies: How many networks.

    Raises:
        ValueError: They are.
    """
    num_layers, wanted = len(dims) - 1, sum(a * b for a, b in itertools.pairwise(dims))
    found = sum(tensor.numel() for tensor in weights.values())
    if copies * num_layers > len(weights) or copies * wanted > found:
        raise ValueError(f"{copies} networks of {num_layers} layers asked for, and {found:,} numbers found")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a selector's file.

    Raises:
        OSError: It cannot be read.
        SafetensorError: It is torn.
        ValueError: It leads out of its folder, is no regular file, or a number in it is not finite.
    """
    check_inside(path, path.parent)
    check_regular(path)
    tensors = load_file(path)
    for name, tensor in tensors.items():
        # Networks are of float32, in which a larger number would be infinite.
        if not torch.isfinite(tensor.float() if tensor.is_floating_point() else tensor).all():
            raise ValueError(f"{name!r} holds numbers that are not finite")
    return tensors


@contextlib.contextmanager
def stored_tensors(path: Path) -> Iterator[dict[str, Tensor]]:
    """Give the tensors of a file, to be put where they belong within the context.

    Raises:
        RecordError: The file is missing or torn, or what it holds does not fit where it is put.
    """
    try:
        yield read_tensors(path)
    except (OSError, SafetensorError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # A RuntimeError is torch's, on weights of another shape or name.
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise RecordError(f"{path}: not the weights that config.json names ({reason}).") from error
