"""Reading models that Stable-Baselines3 saved itself, without running anything that their files hold.

`model.save("ppo.zip")` writes the weights (policy.pth), and everything else (data) as JSON with pickles in it.
`PPO.load` unpickles those, which runs whatever code the file's author put there. Here the JSON is read as text: beside
each pickle SB3 notes in plain words what it holds, and that is enough to build the model anew for the weights.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raise_env.errors import RecordError
from raise_env.foreign_files import check_regular, max_bytes, parse_json

__all__ = ["SavedModel", "check_widths", "observation_shape", "shape_to_build", "subset_size"]

#: What the last part of an action space's class says of the form in which the model acts.
_ACTION_FORMS = {"Box": "scores", "Discrete": "pick", "MultiBinary": "multibinary"}

#: Policy settings that matter to learning alone; what learns on from the file has its own.
_OPTIMISER_SETTINGS = ("optimizer_class", "optimizer_kwargs")

#: What the largest observation may hold that a model is built for: a file that claims more would exhaust the memory.
_MAX_NUMBERS = 10_000_000

#: Rows of the largest pool that a policy over rows may have learned on.
_MAX_ROWS = 100_000_000

#: Numbers of an observation from which on a flat network is looked at before it is built.
_LARGE_INPUT = 100_000

#: Settings of a policy: more has none; and numbers among them that are no widths.
_MAX_SETTINGS = 1000
_SMALL = 64

#: What broken archives raise; a RuntimeError also stands for encryption, and for JSON that is nested too deeply.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)


@dataclass(frozen=True, slots=True)
class SavedModel:
    """What a file of `model.save` tells.

    Attributes:
        weights: The policy's weights by name.
        action_form: How the model acts: "subset", "multibinary", "scores" or "pick".
        num_candidates: Rows of the observations that it was trained on.
        num_features: Columns of the same.
        policy_kwargs: Settings of its policy.
    """

    weights: dict[str, Tensor]
    action_form: str
    num_candidates: int
    num_features: int
    policy_kwargs: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> SavedModel:
        """Read a file of `model.save`; no pickle in it is opened.

        Raises:
            RecordError: It cannot be read, is no such file, or its policy has settings that only a pickle could tell.
        """
        try:
            check_regular(Path(path))
            with zipfile.ZipFile(path) as archive:
                notes = parse_json(_member(archive, "data").decode())
                weights = _weights(_member(archive, "policy.pth"))
            num_candidates, num_features = observation_shape(notes["observation_space"]["_shape"])
            kind = notes["action_space"][":type:"].rstrip("'>").rpartition(".")[2]
            policy_kwargs = _plain(notes["policy_kwargs"])
            form = "subset" if "subset_size" in policy_kwargs else _ACTION_FORMS[kind]
        except (*_ZIP_ERRORS, OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            reason = f"missing: {error.args[0]}" if isinstance(error, KeyError) else error
            raise RecordError(
                f"{path}: cannot be read: {reason}. Expected what Stable-Baselines3's model.save() writes for a model "
                "of this environment."
            ) from error
        return cls(weights, form, num_candidates, num_features, policy_kwargs)


def check_widths(policy_kwargs: Any, weights: Mapping[str, Tensor]) -> None:
    """Check that a policy is not to be built wider than the weights that there are for it.

    Args:
        policy_kwargs: Its settings, which may hold lists of widths.
        weights: What the file holds.

    Raises:
        ValueError: A whole number among the settings is larger than any side of a weight.
    """
    widest = max((side for tensor in weights.values() for side in tensor.shape), default=0)
    waiting, num_seen = [policy_kwargs], 0
    while waiting:
        value = waiting.pop()
        num_seen += 1
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, int) and value > max(widest, _SMALL):
            raise ValueError(f"its policy is to be {str(value)[:40]} wide, and its widest weights are {widest}")
    if num_seen > _MAX_SETTINGS:
        raise ValueError(f"its policy has {num_seen:,} settings")


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Return a file of an archive.

    Raises:
        ValueError: It is too large to be unpacked; no more is, whatever it really holds.
    """
    size, limit = archive.getinfo(name).file_size, max_bytes()
    if size > limit:
        raise ValueError(f"{name} would unpack to {size:,} bytes; expected at most {limit:,}")
    return archive.read(name)


def observation_shape(sizes: Any) -> tuple[int, int]:
    """Return the number of rows and of columns of an observation.

    Raises:
        ValueError: They are not two, or no model could have learned on them.
    """
    num_candidates, num_features = (int(size) for size in sizes)
    if min(num_candidates, num_features) < 1 or num_candidates > _MAX_ROWS or num_features > _MAX_NUMBERS:
        raise ValueError(f"its observations have shape {tuple(sizes)}")
    return num_candidates, num_features


def shape_to_build(shape: tuple[int, int], weights: Mapping[str, Tensor], *, is_flat: bool) -> tuple[int, int]:
    """Return the shape of the observations that a model is to be built for.

    To a policy over rows their number is nothing, but SB3 makes room for a whole observation: where that would be
    large, it is built for fewer.

    Args:
        shape: Rows and columns of the observations that it learned on.
        weights: What the file holds.
        is_flat: Whether its networks look at all numbers at once.

    Raises:
        ValueError: They are not made for so many columns, or, where it is flat, numbers.
    """
    num_candidates, num_features = shape
    if not is_flat:
        check_widths(num_features, weights)
        return min(num_candidates, _MAX_NUMBERS // num_features), num_features
    num_numbers = num_candidates * num_features
    if num_numbers > _MAX_NUMBERS:
        raise ValueError(f"its observations have shape {shape}")
    if num_numbers > _LARGE_INPUT:
        check_widths(num_numbers, weights)
    return shape


def subset_size(value: Any, num_candidates: int) -> int:
    """Return how many rows a policy over subsets takes: as many as a file says, or all where there are fewer.

    Raises:
        ValueError: That is no number of rows.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"its subsets are to have {str(value)[:40]} rows")
    return min(value, num_candidates)


def _weights(content: bytes) -> dict[str, Tensor]:
    """Return a policy's weights.

    Raises:
        ValueError: It holds something other than tensors, or a weight that is not finite.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as inner:
            if sum(entry.file_size for entry in inner.infolist()) > max_bytes():
                raise ValueError("it would unpack to more than it may")
        weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever a broken file makes it stumble over, pickle's own error too
        raise ValueError(f"policy.pth holds no plain weights ({str(error).partition(chr(10))[0]})") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError("policy.pth holds something other than tensors by name")
    for name, tensor in weights.items():
        # A view may claim any size over a few bytes.
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"policy.pth holds no plain weights ({str(name)[:60]})")
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"policy.pth holds weights that are not finite: {', '.join(broken)}")
    return dict(weights)


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a policy's settings as SB3 notes them: as they are, or as text beside a pickle of them all.

    Raises:
        ValueError: One that decides how the model acts can only be told by the pickle.
    """
    named = {name: value for name, value in settings.items() if name not in _OPTIMISER_SETTINGS}
    if ":serialized:" not in named:
        return named
    plain = {name: value for name, value in named.items() if not name.startswith(":")}
    # SB3 writes str() of what is no plain data: "<class 'torch.nn.modules.activation.SiLU'>".
    objects = [f"{name}={value}" for name, value in plain.items() if isinstance(value, str)]
    if objects:
        raise ValueError(
            f"its policy was made with {', '.join(objects)}, which only a pickle could restore. If you trust the file, "
            'load it in a module of your own, model = PPO.load("ppo.zip"), and name that: --agent my_module:model'
        )
    return plain
