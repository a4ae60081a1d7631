"""LoRA adapters in PEFT's folders, whoever wrote them: what form they have, and their weights for a base model.

Only what `BaseModel` computes is taken. A folder that asks for more (ranks by pattern, whole modules beside LoRA) is
refused by name: scored without it, it would be another model. Weights come from safetensors alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open

from .base_model import BaseModel
from .config import EnvConfig, LoraSettings, check_foreign_lora
from .errors import ModelError, SettingError
from .foreign_files import check_regular, read_json

__all__ = [
    "ADAPTER_FILES",
    "adapter_settings",
    "auxiliary_form",
    "content_hash",
    "first_adapter",
    "read_adapter",
    "starting_form",
]

#: The files of an adapter's folder that count.
ADAPTER_FILES = _CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

#: What a LoRA folder may say beside `LoraSettings` without changing what the model computes.
_HARMLESS = frozenset(
    {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config", "loftq_config"),
    }
)

#: Ways to start LoRA that leave the base model's weights as they are.
_HARMLESS_STARTS = (True, False, "gaussian", "orthogonal")


def adapter_settings(folder: Path) -> LoraSettings:
    """Return the form of an adapter as its adapter_config.json has it, without dropout: it is there to be scored.

    Raises:
        ModelError: There is no such file, or it describes something else than a LoRA adapter that can be scored.
    """
    path = folder / _CONFIG
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the adapter {str(folder)!r} cannot be loaded: {path.name}: {error}. Expected a folder that PEFT's "
            "save_pretrained wrote."
        ) from error
    kind = found.get("peft_type") if isinstance(found, dict) else None
    if kind != "LORA":
        raise ModelError(f"{path}: peft_type is {kind!r}; expected 'LORA'.")
    _check_known(found, path)
    own = {entry.name for entry in dataclasses.fields(LoraSettings)} - {"lora_dropout"}
    try:
        stored = LoraSettings(**{name: value for name, value in found.items() if name in own})
        check_foreign_lora(stored)
    except SettingError as error:
        raise ModelError(f"{path}: {error}") from error
    return stored


def content_hash(folder: Path) -> str:
    """Return the SHA-256 of an adapter's form and weights as they lie in their folder.

    Raises:
        ModelError: A file cannot be read.
    """
    digest = hashlib.sha256()
    for name in ADAPTER_FILES:
        try:
            check_regular(folder / name)
            with (folder / name).open("rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
        except (OSError, ValueError) as error:
            raise ModelError(f"the adapter {str(folder)!r} cannot be loaded: {name}: {error}.") from error
    return digest.hexdigest()


def starting_form(config: EnvConfig) -> LoraSettings:
    """Return the form of an environment's adapter: of the one to go on from, or else as its settings have it.

    Raises:
        ModelError: As `adapter_settings`.
        SettingError: The settings ask for another form.
    """
    if config.adapter is None:
        return config.lora
    stored = dataclasses.replace(adapter_settings(Path(config.adapter)), lora_dropout=config.lora.lora_dropout)
    asked = dataclasses.replace(config.lora, target_modules=stored.target_modules)
    plain = LoraSettings(lora_dropout=config.lora.lora_dropout)
    if config.lora != plain and asked != stored:
        raise SettingError(
            f"lora asks for {_told(config.lora)}, and the adapter to go on from, {config.adapter!r}, has "
            f"{_told(stored)}: leave lora out."
        )
    return stored


def auxiliary_form(config: EnvConfig, *, is_trained: bool) -> LoraSettings:
    """Return the form of the auxiliary model's adapter: of the one that it has, or else as the settings have it.

    Args:
        config: The settings.
        is_trained: Whether it is the model that is trained, and so has that one's form where nothing else is said.

    Raises:
        ModelError: As `adapter_settings`.
        SettingError: As `starting_form`.
    """
    if config.auxiliary_adapter is not None:
        stored = adapter_settings(Path(config.auxiliary_adapter))
        # Otherwise alike, it is one and the same model in memory.
        return dataclasses.replace(stored, lora_dropout=config.lora.lora_dropout)
    return starting_form(config) if is_trained else config.lora


def read_adapter(folder: Path, base: BaseModel) -> torch.Tensor:
    """Return an adapter's parameters as `BaseModel` takes them, shape (P,), float32.

    Args:
        folder: Where PEFT wrote it.
        base: The model, with an adapter of the form that `adapter_settings` gives.

    Raises:
        ModelError: There are no weights in safetensors, or they do not fit the model.
    """
    path = folder / _WEIGHTS
    try:
        check_regular(path)
        with safe_open(path, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _check_shapes(found, folder, base)
            weights = {name: file.get_tensor(name) for name in base.adapter_shapes}
    except (OSError, SafetensorError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"the adapter {str(folder)!r} cannot be loaded: {path.name}: {error}. Expected weights in safetensors; "
            "adapter_model.bin is pickle and never opened: save it again with PEFT's save_pretrained."
        ) from error
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ModelError(f"the adapter {str(folder)!r}: {broken[0]} has numbers that are not finite; expected weights.")
    return torch.cat([weights[name].flatten().float() for name in base.adapter_shapes]).to(base.device)


def _check_shapes(found: dict[str, tuple[int, ...]], folder: Path, base: BaseModel) -> None:
    """Refuse, before they are read, matrices that are not those of the model's adapter."""
    shapes = base.adapter_shapes
    missing, extra = sorted(set(shapes) - set(found)), sorted(set(found) - set(shapes))
    where = f"the adapter {str(folder)!r} does not fit the model {base.source!r}"
    if missing or extra:
        named = missing or extra
        which = "are not in it" if missing else "have no place in the model"
        raise ModelError(
            f"{where}: {len(named)} of {len(shapes if missing else found)} matrices {which}, such as {named[0]}. "
            "Expected the model that the adapter was trained on."
        )
    for name, shape in shapes.items():
        if found[name] != tuple(shape):
            raise ModelError(
                f"{where}: {name} has shape {found[name]}; expected {tuple(shape)}. "
                "Expected the model that the adapter was trained on."
            )


def first_adapter(config: EnvConfig, base: BaseModel) -> torch.Tensor:
    """Return the adapter that every episode begins from, shape (P,): the one to go on from, or a new one.

    Raises:
        ModelError: As `read_adapter`.
    """
    if config.adapter is None:
        return base.initial_parameters(config.seed_model)
    return read_adapter(Path(config.adapter), base)


def _told(lora: LoraSettings) -> str:
    return ", ".join(f"{entry.name}={getattr(lora, entry.name)}" for entry in dataclasses.fields(lora))


def _check_known(found: dict[str, Any], path: Path) -> None:
    """Refuse a setting that differs from PEFT's default and that scoring would leave out."""
    known = {entry.name for entry in dataclasses.fields(LoraSettings)} | _HARMLESS
    default = LoraConfig()
    for name, value in found.items():
        if name in known or not value or value == getattr(default, name, None):
            continue
        if name == "init_lora_weights" and value in _HARMLESS_STARTS:
            continue
        raise ModelError(
            f"{path}: {name} is {value!r}, which raise-env does not compute; expected a LoRA adapter without it. "
            "Merge the adapter into its model with PEFT's merge_and_unload, save that, and name it as the model."
        )
