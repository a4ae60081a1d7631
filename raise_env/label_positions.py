"""The end of a model's last layer, computed only where it is read.

A loss looks at the positions that predict a label, often one token in ten. What comes after the last layer's keys and
values (its queries, what follows its attention, its feed-forward part) mixes no positions, and so need not be computed
anywhere else. The modules named here do so for the forms of model that the tests hold equal to the whole computation;
every other model computes all of it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["LAST_LAYERS", "Choice", "LabelPositions"]

_LLAMA = ("model.layers", ("self_attn.q_proj", "self_attn.o_proj", "mlp"))

#: By transformers' name of the form of model: where its layers are, and which parts of the last one mix no positions.
LAST_LAYERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gpt2": ("transformer.h", ("attn.c_proj", "mlp")),
    "opt": ("model.decoder.layers", ("self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2")),
}

#: Above this share of positions, picking them out costs more than it saves.
MOST_KEPT = 0.6


class Choice(NamedTuple):
    """Positions that are computed: their numbers among all of a batch, shape (groups * kept,), group by group."""

    places: Tensor
    num_groups: int


class _Local(threading.local):
    choice: Choice | None = None


class LabelPositions:
    """Makes the parts of a model's last layer that mix no positions work on chosen ones alone.

    Elsewhere they give zeros, so that what the model makes of other positions means nothing.

    Args:
        causal: The model; its modules' `forward` is wrapped. One of an unknown form is left as it is.

    """

    def __init__(self, causal: nn.Module) -> None:
        self._local = _Local()
        model_type = str(getattr(causal.config, "model_type", ""))
        if model_type in LAST_LAYERS:
            path, names = LAST_LAYERS[model_type]
            last: Any = causal.get_submodule(path)
            for name in names:
                module = last[-1].get_submodule(name)
                module.forward = self._on_places(module.forward)

    @property
    def choice(self) -> Choice | None:
        """What this thread computes now; None: every position."""
        return self._local.choice

    @choice.setter
    def choice(self, choice: Choice | None) -> None:
        self._local.choice = choice

    @contextlib.contextmanager
    def only(self, keep: Tensor, num_groups: int) -> Iterator[None]:
        """Compute only the positions that are kept, for as long as the context lasts.

        Args:
            keep: Which positions are read, shape (rows, length), bool.
            num_groups: Parts of the batch, equal in rows, that must keep equally many positions: one for each adapter.
        """
        flat = keep.reshape(num_groups, -1)
        most = int(flat.sum(1).max())
        if most <= MOST_KEPT * flat.shape[1]:
            # Kept positions first, then others to make the groups equal: none twice, or its gradient would count twice.
            order = flat.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
            starts = torch.arange(num_groups, device=keep.device)[:, None] * flat.shape[1]
            self.choice = Choice((order + starts).reshape(-1), num_groups)
        try:
            yield
        finally:
            self.choice = None

    def _on_places(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def on_places(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.choice is None:
                return forward(x, *args, **kwargs)
            places, num_groups = self.choice
            rows = x.reshape(-1, x.shape[-1])
            chosen = rows.index_select(0, places).view(num_groups, -1, x.shape[-1])
            kept = forward(chosen, *args, **kwargs)
            # Zeros where nobody looks, so that nothing that follows there can stop being finite.
            result = kept.new_zeros(len(rows), kept.shape[-1]).index_copy(0, places, kept.reshape(-1, kept.shape[-1]))
            return result.view(*x.shape[:-1], kept.shape[-1])

        return on_places
