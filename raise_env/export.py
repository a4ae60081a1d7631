"""What leaves the package for other tools: a model with its adapter merged in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn

from .adapter_files import adapter_settings
from .base_model import BaseModel, own_modes, quiet
from .config import EnvConfig

__all__ = ["save_merged"]

#: Merged into four bits, an adapter would be rounded away.
_MERGED_DTYPES = {"nf4": "bfloat16"}


@own_modes()
def save_merged(config: EnvConfig, adapter: str | Path, folder: str | Path) -> None:
    """Write a model with an adapter merged in, and its tokenizer: plain transformers loads it, without PEFT.

    The base model is loaded once more for it, so that one in use stays as it is.

    Args:
        config: Which model, and the dtype of the weights that are merged and written; bfloat16 for "nf4".
        adapter: The folder of the adapter, as `save_adapter` wrote it.
        folder: Where to write; it is made.

    Raises:
        ModelError: The model or the adapter cannot be loaded.
    """
    base = BaseModel(
        config.model,
        adapter_settings(Path(adapter)),
        dtype=_MERGED_DTYPES.get(config.dtype, config.dtype),
        device="cpu",
    )
    set_peft_model_state_dict(base.peft_model, load_file(Path(adapter) / "adapter_model.safetensors"))
    _untie_adapted(base.peft_model.get_base_model())
    merged = base.peft_model.merge_and_unload()
    with quiet():
        merged.save_pretrained(str(folder))
        base.tokenizer.save_pretrained(str(folder))


def _untie_adapted(model: Any) -> None:
    """Give the head weights of its own where it shares them with the embeddings and one of the two has an adapter.

    Merged into what both share, it would change the other one too.
    """
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    if not any(isinstance(end, BaseTunerLayer) for end in ends):
        return
    embeddings, head = (getattr(end, "base_layer", end) for end in ends)
    if head.weight is embeddings.weight:
        head.weight = nn.Parameter(torch.clone(head.weight.detach()), requires_grad=False)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
