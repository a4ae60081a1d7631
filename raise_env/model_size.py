"""A model's shapes without its weights: what they say of cost, and a small model that stands in for it."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from .base_model import load_config, load_tokenizer, model_folder, quiet, resolve_device, shapes_of
from .config import TINY, EnvConfig
from .errors import ModelError

__all__ = ["ModelSize", "has_weights", "matrix_rate", "save_stand_in", "size_of"]

#: The stand-in: as small as the 32 semantic columns let it be.
_STAND_IN: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_STAND_IN_POSITIONS = 2**20

#: How long a machine's rate of matrix products is measured, and over how many tokens at once.
_RATE_SECONDS = 1.0
_RATE_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class ModelSize:
    """How large a model is.

    Attributes:
        num_parameters: All of its numbers.
        num_matrix: Those of them that every token is multiplied with, the head included.
        num_adapter: Numbers of an adapter of the configuration's form.
        num_layers: Its layers.
        hidden_dim: Width of the hidden state.
        inner_dim: Width within a layer's feed-forward part.
        num_words: Size of its vocabulary.
    """

    num_parameters: int
    num_matrix: int
    num_adapter: int
    num_layers: int
    hidden_dim: int
    inner_dim: int
    num_words: int


def has_weights(source: str) -> bool:
    """Return whether a model's weights are at hand: a folder may have its configuration alone."""
    folder = Path(model_folder(source))
    return source == TINY or not folder.is_dir() or any(folder.glob("*.safetensors"))


def size_of(config: EnvConfig, source: str) -> ModelSize:
    """Return the size of a model by its configuration; no weights are read or made.

    Args:
        config: The form of the adapter.
        source: The model, as for the environment.

    Raises:
        ModelError: There is no configuration of a causal language model.
    """
    form = load_config(source)
    model = shapes_of(form, source)
    text = form.get_text_config()
    layers = {name: part for name, part in model.named_modules() if isinstance(part, (nn.Linear, Conv1D))}
    head = model.get_output_embeddings()
    adapted = [part for name, part in layers.items() if part is not head and _is_adapted(config, name)]
    return ModelSize(
        num_parameters=sum(value.numel() for value in model.parameters()),
        num_matrix=sum(part.weight.numel() for part in layers.values()),
        num_adapter=config.lora.r * sum(sum(part.weight.shape) for part in adapted),
        num_layers=int(text.num_hidden_layers),
        hidden_dim=int(text.hidden_size),
        inner_dim=int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
        num_words=int(text.vocab_size),
    )


def _is_adapted(config: EnvConfig, name: str) -> bool:
    modules = config.lora.target_modules
    if modules == "all-linear":
        return True
    if isinstance(modules, str):  # PEFT's own reading: a pattern of whole names
        return re.fullmatch(modules, name) is not None
    return any(name == module or name.endswith(f".{module}") for module in modules)


def matrix_rate(config: EnvConfig, size: ModelSize) -> float:
    """Return the operations a second that this machine reaches in a matrix product of a model's shapes."""
    device = resolve_device(config.device)
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    left = torch.ones(_RATE_TOKENS, size.hidden_dim, device=device, dtype=dtype)
    right = torch.ones(size.hidden_dim, size.inner_dim, device=device, dtype=dtype)
    _wait(torch.mm(left, right))
    start, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < _RATE_SECONDS:
        _wait(torch.mm(left, right))
        count += 1
    return 2.0 * count * left.numel() * size.inner_dim / passed


def _wait(result: torch.Tensor) -> None:
    if result.device.type == "cuda":
        torch.cuda.synchronize(result.device)


def save_stand_in(source: str, folder: Path) -> bool:
    """Write a small model that takes the same tokens, and return whether the model's own tokenizer was there.

    Without it the embedded model's stands in, which makes a token of each character.

    Args:
        source: The model that it stands for.
        folder: Where to; it is made.
    """
    try:
        tokenizer, has_tokenizer = load_tokenizer(source), True
    except ModelError:
        tokenizer, has_tokenizer = load_tokenizer(TINY), False
    form = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=_STAND_IN_POSITIONS, **_STAND_IN)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # not the GPUs' too
        LlamaForCausalLM(form).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return has_tokenizer
