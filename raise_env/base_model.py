"""One frozen language model with LoRA layers in place, shared by every learner of the process.

The adapters themselves live outside the model, as rows of one flat matrix: parameters (adapters, P). A forward
pass is told which adapters to use and splits its rows among them. Two things follow: a snapshot of a training
state is a reference and costs nothing, and several adapters over one base can be trained in a single pass.

PEFT decides where the LoRA layers are, how they start and how they are saved. Only the arithmetic of its plain
layers is done here, `x W + s (x A) B` for several A and B at once; where PEFT was asked for something else
(DoRA, say), its own code runs, one adapter at a time. A test holds both equal.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    StoppingCriteria,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from .causal_attention import LONGEST, rows_at, rows_now, use_block_attention
from .config import TINY, LoraSettings
from .encoding import Batch
from .errors import ModelError, SettingError
from .hub import hub_in_reach, quiet_hub
from .label_positions import LAST_LAYERS, Choice, LabelPositions
from .lora_layers import lora_linear
from .model_files import check_model_folder, check_room
from .packing import Layout, PackedBatch, pack

__all__ = [
    "BaseModel",
    "load_config",
    "load_tokenizer",
    "model_folder",
    "own_modes",
    "quiet",
    "resolve_device",
    "shapes_of",
]

_ADAPTER = "default"

#: In the names of DoRA's magnitudes.
_MAGNITUDE = "lora_magnitude_vector"

#: Forms of model, by transformers' names, in which attention alone knows where a token stands: such rows can be packed.
ROTARY = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma"})

#: What config.json says that no number depends on; the weights' own digits tell their type.
_NO_ARCHITECTURE = frozenset(
    {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
)

#: What torch calls a processor's own instructions for bfloat16: Intel's and AMD's, Intel's for matrices, Arm's.
_BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")

logger = logging.getLogger(__name__)

#: Held while torch's global generator stands in for one of our own, which PEFT and dropout cannot be given: threads
#: that each draw from it would get each other's numbers, and put back what was not theirs.
_GENERATOR_LOCK = threading.RLock()

#: Held while transformers loads: it changes settings of the whole process meanwhile, and two that load at once end with
#: weights that neither has filled.
_LOADING_LOCK = threading.RLock()


class _Float32ByDefault:
    """Makes float32 torch's default, from the first thread that enters until the last one has left.

    The default is of the process: a thread that put it back by itself would take it from those still at work.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._found = torch.float32

    def __enter__(self) -> None:
        with self._lock:
            if self._num_inside == 0:
                self._found = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            self._num_inside += 1

    def __exit__(self, *_error: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0:
                torch.set_default_dtype(self._found)


_FLOAT32_BY_DEFAULT = _Float32ByDefault()


@contextlib.contextmanager
def own_modes() -> Iterator[None]:
    """Compute as a fresh torch does, in this block or in a function so decorated, whatever modes the caller is in.

    Autocast would change rewards, and features in a cache that is not told of it; updates need gradients, and states
    that are no tensors of inference mode. Threads begin without any of these modes, but for the default dtype.
    """
    with (
        _FLOAT32_BY_DEFAULT,
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield


class _PassState(threading.local):
    """What the layers are told for a forward pass; each thread has its own, so that several can use one model."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []  # of each layer: (k, rank, in) and (k, out, rank)
        self.merged: list[Tensor] = []  # of each layer: (out, in)
        self.hidden: list[Tensor] | None = None  # a list gets the last hidden layer: (rows, length, hidden)


class BaseModel:
    """A causal language model, frozen, with LoRA layers whose weights are given at each call.

    Args:
        source: "tiny", a local folder, or a hub id.
        lora: The adapter's form.
        dtype: Of the frozen weights, one of `DTYPES`. Adapters are always float32.
        device: "auto", "cpu", "cuda" or "cuda:1".
        activation_checkpointing: Keep no layer's inner values for the backward pass, and compute them again there.

    Raises:
        ModelError: The model or its tokenizer cannot be loaded, they do not belong together, or the model has no place
            for such an adapter.
        SettingError: There is no such device, bitsandbytes is not installed, or the adapter does not go with activation
            checkpointing.
    """

    @own_modes()
    def __init__(
        self,
        source: str,
        lora: LoraSettings,
        *,
        dtype: str = "float32",
        device: str = "auto",
        activation_checkpointing: bool = False,
    ) -> None:
        self.source = source
        self.device = resolve_device(device)
        self.tokenizer = load_tokenizer(source)
        self.lora = lora
        self.lock = threading.RLock()
        if dtype == "bfloat16":
            _warn_of_slow_bfloat16(self.device)
        causal = _load_causal(source, dtype, self.device)
        _check_vocabulary(causal, self.tokenizer, source)
        self.content_hash = _content_hash(causal, self.tokenizer, source)
        self.peft_model = _with_lora(causal, lora, source)
        self._causal = causal  # the same model, LoRA layers included, without PEFT's own arguments
        self._names = [name for name, value in self.peft_model.named_parameters() if value.requires_grad]
        parameters = dict(self.peft_model.named_parameters())
        self._shapes = [parameters[name].shape for name in self._names]
        self._sizes = [shape.numel() for shape in self._shapes]
        for value in self.peft_model.parameters():
            value.requires_grad_(False)
        self._layers = _plain_layers(self.peft_model)
        # The head is given labels alone, of which each adapter has as many as its rows have.
        has_plain_head = not isinstance(causal.get_output_embeddings(), LoraLinear)
        is_plain = len(self._layers) * 2 == len(self._names) and lora.lora_dropout == 0
        self.stackable = is_plain and has_plain_head
        self._magnitudes = {name: parameters[name].detach().clone() for name in self._names if _MAGNITUDE in name}
        self._pass = _PassState()
        self.peft_model.eval()
        if dtype == "nf4":
            _keep_differentiable(causal)
        if self.stackable:
            self._install()
        causal.get_decoder().register_forward_hook(self._keep_hidden)
        self._label_positions = LabelPositions(causal)
        model_type = causal.config.model_type
        attends_by_blocks = self.device.type == "cpu" and self.is_float32 and model_type in LAST_LAYERS
        if attends_by_blocks:
            use_block_attention(causal)
        self._packs = attends_by_blocks and model_type in ROTARY
        self._is_checkpointing = activation_checkpointing
        if activation_checkpointing:
            self._enable_checkpointing()

    @property
    def num_parameters(self) -> int:
        """Numbers in one adapter, P."""
        return sum(self._sizes)

    @property
    def adapter_shapes(self) -> dict[str, torch.Size]:
        """The matrices of an adapter by the names that PEFT saves them under, in the order of its parameters."""
        names = [
            name.replace(f".{_ADAPTER}", "").replace("magnitude_vector.weight", "magnitude_vector")
            for name in self._names
        ]
        return dict(zip(names, self._shapes, strict=True))

    @functools.cached_property
    def adapter_form(self) -> dict[str, int | float | str]:
        """What decides what an adapter's numbers do, in the words of a message."""
        matrices = repr([(name, tuple(shape)) for name, shape in self.adapter_shapes.items()])
        names = ("r", "lora_alpha", "use_rslora", "use_dora")
        return {
            **{f"lora {name}": getattr(self.lora, name) for name in names},
            "lora matrices hash": hashlib.sha256(matrices.encode()).hexdigest()[:12],
        }

    @functools.cached_property
    def num_weights(self) -> int:
        """Numbers in the frozen model and one adapter."""
        return sum(value.numel() for value in self.peft_model.parameters())

    @property
    def num_words(self) -> int:
        """Tokens that the model knows: numbers in the logits of one position."""
        embeddings = self._causal.get_input_embeddings()
        return int(getattr(embeddings, "base_layer", embeddings).num_embeddings)  # LoRA may be around it

    @property
    def hidden_dim(self) -> int:
        """Width of the last hidden layer."""
        return int(self.peft_model.config.get_text_config().hidden_size)

    @property
    def is_float32(self) -> bool:
        """Whether the frozen weights are kept in float32."""
        return bool(self.peft_model.dtype == torch.float32)

    @property
    def max_positions(self) -> int | None:
        """Tokens that the model can take at most, where it says so."""
        return getattr(self.peft_model.config.get_text_config(), "max_position_embeddings", None)

    @own_modes()
    def initial_parameters(self, seed: int) -> Tensor:
        """Return a new adapter as PEFT would start it, shape (P,), float32, the same on every device.

        PEFT draws from torch's global generator and takes no other; it is put back as it was. A GPU's own generator
        would draw other numbers, so that no run on it could be replayed elsewhere: the adapter is drawn on the CPU.
        """
        parameters = dict(self.peft_model.named_parameters())
        adapter = [parameters[name] for name in self._names]
        with self.lock, _seeded(seed, torch.device("cpu")), _on_cpu(adapter):
            for module in self.peft_model.modules():
                reset = getattr(module, "reset_lora_parameters", None)
                if reset is not None:
                    reset(_ADAPTER, True)
            for name, first in self._magnitudes.items():  # which PEFT does not start anew
                parameters[name].data.copy_(first)
            drawn = torch.cat([values.detach().flatten().float() for values in adapter])
        return drawn.to(self.device)

    def token_losses(
        self, batch: Batch, adapters: Tensor | None, *, dropout_seed: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what the model makes of every label of a batch.

        Args:
            batch: Rows; with k adapters the first rows/k belong to the first of them, and so on.
            adapters: Shape (k, P), or None for the bare base model.
            dropout_seed: Turns LoRA's dropout on, drawn from this seed.

        Returns:
            The negative log-likelihood of each label in nats, shape (labels,), float32, and the logits,
            shape (labels, vocabulary), float32.
        """
        output = self._forward(batch, adapters, dropout_seed)
        logits = output.logits.float()
        losses = nn.functional.cross_entropy(logits, batch.targets.to(self.device), reduction="none")
        return losses, logits

    def hidden_states(self, batch: Batch, adapters: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the label losses, shape (labels,), and the last hidden layer, shape (rows, length, hidden).

        Raises:
            ModelError: transformers does not know where the layers of a model of this form end.
        """
        kept: list[Tensor] = []
        self._pass.hidden = kept
        try:
            losses, _ = self.token_losses(batch, adapters)
        finally:
            self._pass.hidden = None
        if not kept:
            raise ModelError(
                f"the model {self.source!r} computes features, and its last hidden layer cannot be found: it does not "
                "use the module that transformers' get_decoder() names. Name another auxiliary_model."
            )
        return losses, kept[0].float()

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[np.ndarray], adapters: Tensor | None, max_new_tokens: int, stops: Sequence[str] = ()
    ) -> list[list[int]]:
        """Return the tokens that greedy decoding goes on with after each prompt, by transformers' own `generate`.

        Args:
            prompts: Token ids of each, shape (length,).
            adapters: As for `token_losses`, at most one.
            max_new_tokens: How many at most.
            stops: Texts after which a row ends; what follows one within a token is not cut off.

        Returns:
            For each prompt its new tokens, the end token included where it came to one.
        """
        length, padding = max(len(prompt) for prompt in prompts), self._padding
        ids = torch.full((len(prompts), length), padding, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for line, prompt in enumerate(prompts):  # on the left, so that all rows end together
            ids[line, length - len(prompt) :] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
            mask[line, length - len(prompt) :] = 1
        settings = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "use_cache": True}
        stopping = [_SaysOneOf(self.tokenizer, stops, length)] if stops else []
        with self._whole_model(adapters) as model:
            output = model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                max_new_tokens=max_new_tokens,
                pad_token_id=padding,
                stopping_criteria=stopping,
                **settings,
            )
        return [_without_padding(row, padding, self.tokenizer.eos_token_id) for row in output[:, length:].tolist()]

    @contextlib.contextmanager
    def merged(self, adapter: Tensor) -> Iterator[None]:
        """Let this thread's passes use base weights with one adapter folded in, for as long as the context lasts.

        The base weights themselves are not touched, and other threads do not see it.

        Args:
            adapter: Shape (P,).
        """
        before = self._pass.merged
        with torch.no_grad():
            pairs = zip(self._layers, self._split(adapter[None]), strict=True)
            self._pass.merged = [_merged_weight(layer, a[0], b[0]) for layer, (a, b) in pairs]
        try:
            yield
        finally:
            self._pass.merged = before

    def has_form(self, lora: LoraSettings) -> bool:
        """Return whether the model's LoRA layers are those of the settings, which may name each of them."""
        own, asked = self.lora.target_modules, lora.target_modules
        # PEFT has put the names of the layers in the place of "all-linear".
        form: Any = self.peft_model.peft_config[_ADAPTER]
        is_alike = asked == own or (not isinstance(asked, str) and set(asked) == set(form.target_modules))
        return is_alike and replace(lora, target_modules=own) == self.lora

    def save_adapter(self, adapter: Tensor, folder: Path) -> None:
        """Write an adapter, shape (P,), in PEFT's own form: `PeftModel.from_pretrained` loads it."""
        with self.lock:
            self._put(adapter)
            # Else PEFT writes the base's own embeddings too where LoRA is on them.
            self.peft_model.save_pretrained(str(folder), save_embedding_layers=False)
        # PEFT keeps the names in a set: written as it comes, the file would differ from process to process.
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config["target_modules"], list):
            config["target_modules"].sort()
        path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")

    def base_checksum(self) -> str:
        """Return a hash of the frozen weights: it never changes."""
        return _tensor_hash({n: p for n, p in self.peft_model.named_parameters() if n not in set(self._names)})

    @property
    def _padding(self) -> int:
        padding = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if padding is None else padding)

    def _put(self, adapter: Tensor) -> None:
        """Write an adapter into PEFT's own layers, where nothing else of this class reads it."""
        parameters = dict(self.peft_model.named_parameters())
        for name, part, shape in zip(self._names, adapter.split(self._sizes), self._shapes, strict=True):
            parameters[name].data.copy_(part.view(shape))

    @contextlib.contextmanager
    def _whole_model(self, adapters: Tensor | None) -> Iterator[Any]:
        """Give this thread the model with an adapter in it, for methods of transformers that call it many times."""
        with contextlib.ExitStack() as stack:
            if not self.stackable:
                stack.enter_context(self.lock)
                if adapters is None:
                    stack.enter_context(self.peft_model.disable_adapter())
                else:
                    self._put(adapters[0])
            elif adapters is not None:
                self._pass.pairs = self._split(adapters)
                stack.callback(setattr, self._pass, "pairs", [])
            if self._is_checkpointing:  # which would forget the keys and values of the tokens before
                stack.enter_context(self.lock)
                self._set_checkpointing(False)
                stack.callback(self._set_checkpointing, True)
            yield self._causal

    def _keep_hidden(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        # Not transformers' `output_hidden_states`: its hooks are of the model, not of the thread.
        if self._pass.hidden is not None:
            self._pass.hidden.append(output[0])

    def _forward(self, batch: Batch, adapters: Tensor | None, dropout_seed: int | None) -> Any:
        packed = self._packed(batch, adapters)
        # The last column predicts nothing: a row may have one token more than the model has places for.
        length = batch.input_ids.shape[1]
        width = length - (length - 1 == self.max_positions)
        inputs = {
            "input_ids": batch.input_ids[:, :width].to(self.device) if packed is None else packed.input_ids,
            "logits_to_keep": batch.keep[:, :width].to(self.device) if packed is None else packed.keep,
            "position_ids": None if packed is None else packed.position_ids,
            "use_cache": False,
        }
        with self._only_labels(inputs, adapters), rows_at(packed.layout if packed else None):
            if not self.stackable:
                with self.lock:
                    return self._plain_forward(adapters, dropout_seed, inputs)
            self._pass.pairs = [] if adapters is None else self._split(adapters)
            try:
                return self._causal(**inputs)
            finally:
                self._pass.pairs = []

    def _packed(self, batch: Batch, adapters: Tensor | None) -> PackedBatch | None:
        """Return the batch without padding, where model and request let it be packed and that is worth it."""
        if self._pass.hidden is not None:  # which is of the rows as they are
            return None
        length = batch.input_ids.shape[1]
        window = getattr(self._causal.config, "sliding_window", None)
        fits = length <= LONGEST and (window is None or length <= window)
        is_one = adapters is None or len(adapters) == 1  # several adapters need equally many tokens each
        return pack(batch) if self._packs and fits and is_one else None

    def _only_labels(self, inputs: dict[str, Any], adapters: Tensor | None) -> AbstractContextManager[None]:
        if self._pass.hidden is not None:  # which is asked for at every position
            return contextlib.nullcontext()
        return self._label_positions.only(inputs["logits_to_keep"], 1 if adapters is None else len(adapters))

    def _plain_forward(self, adapters: Tensor | None, dropout_seed: int | None, inputs: dict[str, Any]) -> Any:
        if adapters is None:
            with self.peft_model.disable_adapter():
                return self._causal(**inputs)
        (adapter,) = adapters
        parts = adapter.split(self._sizes)
        parameters = {
            name: part.view(shape) for name, part, shape in zip(self._names, parts, self._shapes, strict=True)
        }
        if dropout_seed is None:
            return torch.func.functional_call(self.peft_model, parameters, kwargs=inputs)
        with _seeded(dropout_seed, self.device), _dropout_on(self.peft_model):
            return torch.func.functional_call(self.peft_model, parameters, kwargs=inputs)

    def _split(self, adapters: Tensor) -> list[tuple[Tensor, Tensor]]:
        # One split, not a slice for each matrix: its backward is a single concatenation.
        parts = adapters.split(self._sizes, dim=1)
        matrices = [part.view(-1, *shape) for part, shape in zip(parts, self._shapes, strict=True)]
        return list(zip(matrices[0::2], matrices[1::2], strict=True))

    def _install(self) -> None:
        for index, layer in enumerate(self._layers):
            layer.forward = self._layer_forward(layer, index)

    def _enable_checkpointing(self) -> None:
        if not self.stackable:
            raise SettingError(
                "activation_checkpointing goes with plain LoRA layers alone: leave out lora_dropout, use_dora, LoRA on "
                "the head and what else makes them different, or activation_checkpointing."
            )
        # transformers 5 is giving up the second name for the first.
        causal = self._causal
        enable = getattr(causal, "activation_checkpointing_enable", None) or causal.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": self._recompute_contexts})
        _drop_nothing(causal)
        self._set_checkpointing(True)

    def _set_checkpointing(self, enabled: bool) -> None:
        for module in self._causal.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = enabled  # what it asks for; its parts, dropout among them, stay as they are

    def _recompute_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        # By the time a layer is computed again, the forward pass is over: it has to find what it was given then.
        return contextlib.nullcontext(), self._as_it_was(self._pass.pairs, self._label_positions.choice, rows_now())

    @contextlib.contextmanager
    def _as_it_was(
        self, pairs: list[tuple[Tensor, Tensor]], choice: Choice | None, layout: Layout | None
    ) -> Iterator[None]:
        before = self._pass.pairs, self._label_positions.choice
        self._pass.pairs, self._label_positions.choice = pairs, choice
        try:
            with rows_at(layout):
                yield
        finally:
            self._pass.pairs, self._label_positions.choice = before

    def _layer_forward(self, layer: Any, index: int) -> Any:
        base_layer, scaling = layer.base_layer, layer.scaling[_ADAPTER]

        def forward(x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
            if self._pass.merged:
                return nn.functional.linear(x, self._pass.merged[index], base_layer.bias)
            if not self._pass.pairs:
                return base_layer(x)  # type: ignore[no-any-return]
            return lora_linear(base_layer, x, *self._pass.pairs[index], scaling)

        return forward


class _SaysOneOf(StoppingCriteria):
    """Ends each row after one of some texts, however it falls into tokens.

    Args:
        tokenizer: The model's.
        stops: The texts.
        start: Tokens of the prompts, padding included, in which nothing is looked for.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], start: int) -> None:
        self._tokenizer, self._stops, self._start = tokenizer, stops, start
        # A token stands for a byte at least.
        self._window = max(len(stop.encode()) for stop in stops) + 2

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        del scores, kwargs
        texts = self._tokenizer.batch_decode(input_ids[:, max(self._start, input_ids.shape[1] - self._window) :])
        found = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(found, device=input_ids.device)


def _without_padding(tokens: list[int], padding: int, end: int) -> list[int]:
    """Return a row's new tokens up to its first end token, or without what it was padded with after a stop."""
    if end in tokens:
        return tokens[: tokens.index(end) + 1]
    while tokens and tokens[-1] == padding:
        tokens = tokens[:-1]
    return tokens


def model_folder(source: str) -> str:
    """Return the folder or hub id that a model's name stands for.

    Raises:
        ModelError: It looks like a local path, and there is no such folder; or as `check_model_folder`.
    """
    if source == TINY:
        return str(Path(__file__).parent / "tiny" / "base")
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model {source!r} is a folder without config.json; expected one saved by transformers.")
        check_model_folder(path)
        return str(path)
    if path.exists():
        raise ModelError(f"model {source!r} is a file; expected a folder saved by transformers, or a hub id.")
    if source.count("/") > 1 or source.startswith((".", "/", "~")) or "\\" in source:
        raise ModelError(f"model {source!r}: there is no such folder. Expected a folder, a hub id, or {TINY!r}.")
    return source


def load_tokenizer(source: str) -> Any:
    """Load a model's tokenizer; it needs an end token, and no padding token.

    Raises:
        ModelError: There is none, or it has no end token.
    """
    folder = model_folder(source)
    tokenizer = _load(AutoTokenizer.from_pretrained, folder, source, "tokenizer")
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {source!r} has no end-of-text token; set eos_token in its tokenizer_config.json."
        )
    return tokenizer


def resolve_device(device: str) -> torch.device:
    """Return the device meant; "auto" is a GPU where there is one.

    Raises:
        SettingError: There is no such device on this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0].removesuffix(".")  # torch goes on for a page
        raise SettingError(
            f"device {device!r} cannot be used here: {reason}. Expected 'auto', 'cpu' or 'cuda'."
        ) from error
    return resolved


def _merged_weight(layer: Any, a: Tensor, b: Tensor) -> Tensor:
    """Return a layer's weight with an adapter folded in, shape (out, in)."""
    weight: Tensor = layer.base_layer.weight
    delta: Tensor = (b @ a) * layer.scaling[_ADAPTER]
    return (weight.T if layer.fan_in_fan_out else weight) + delta.to(weight.dtype)


@functools.cache  # one warning a process
def _warn_of_slow_bfloat16(device: torch.device) -> None:
    capabilities = torch.cpu.get_capabilities()
    is_fast = any(capabilities.get(name, False) for name in _BFLOAT16_INSTRUCTIONS)
    if device.type == "cpu" and not is_fast:
        logger.warning(
            "dtype bfloat16: this processor (%s) has no instructions for it, and a step may take twenty times as long "
            "as in float32, which is the default.",
            capabilities.get("cpu_name", "unknown"),
        )


def _load_causal(source: str, dtype: str, device: torch.device) -> Any:
    # use_safetensors: a checkpoint in pickle would be code to run.
    kwargs = {"use_safetensors": True, "output_loading_info": True}
    kwargs |= _in_four_bits(device) if dtype == "nf4" else {"dtype": getattr(torch, dtype)}
    folder = model_folder(source)
    if source != TINY:
        _check_form(source, Path(folder))
    causal, loading = _load(AutoModelForCausalLM.from_pretrained, folder, source, "model", **kwargs)
    if loading["missing_keys"]:
        # transformers would draw them at random, and every number after that would mean nothing.
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise ModelError(
            f"the model {source!r} is not whole: {len(loading['missing_keys'])} of its weights are not in its files, "
            f"such as {missing}. Expected all weights of a causal language model; download or save it again."
        )
    return causal if dtype == "nf4" else causal.to(device)


def _check_form(source: str, folder: Path) -> None:
    """Look at what config.json asks for, before it is given memory, or code of the hub.

    Raises:
        ModelError: It names a kernel of the hub, asks for more than the files hold, or is of no causal language model.
    """
    form = load_config(source)
    named = [getattr(form, f"_{kind}_implementation", None) for kind in ("attn", "experts")]
    if any("/" in str(name) for name in named):
        raise ModelError(f"model {source!r}: its config.json names a kernel of the hub, {named}, which is not run.")
    if folder.is_dir():
        shapes = shapes_of(form, source)
        check_room(sum(value.numel() for value in (*shapes.parameters(), *shapes.buffers())), folder)


def shapes_of(form: Any, source: str) -> Any:
    """Return the model of a configuration, without any memory for its numbers.

    Raises:
        ModelError: It is no configuration of a causal language model.
    """
    try:
        with torch.device("meta"), quiet():
            return AutoModelForCausalLM.from_config(form, trust_remote_code=False)
    except Exception as error:  # a configuration can make transformers stumble over anything
        raise ModelError(
            f"model {source!r}: its config.json is not that of a causal language model ({error}). Expected one that "
            "AutoModelForCausalLM takes."
        ) from error


def _check_vocabulary(causal: Any, tokenizer: Any, source: str) -> None:
    # A tokenizer may have fewer tokens: models are often made a little wider than they need to be.
    largest, num_words = max(tokenizer.get_vocab().values(), default=-1), causal.get_input_embeddings().num_embeddings
    if largest >= num_words:
        raise ModelError(
            f"the tokenizer of {source!r} has tokens up to number {largest}, and the model knows {num_words}, from 0 "
            f"to {num_words - 1}: they do not belong together. Expected the tokenizer that it was trained with."
        )


def _keep_differentiable(causal: Any) -> None:
    """Tell four-bit layers that they train: on a processor they would else take a product that has no gradient."""
    for module in causal.modules():
        if type(module).__name__ == "Linear4bit":
            module.training = True


def _in_four_bits(device: torch.device) -> dict[str, Any]:
    """Return what makes transformers keep a model's weights in four bits, on the device at once."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SettingError(
            "dtype 'nf4' needs bitsandbytes, which is not installed: pip install bitsandbytes, or take another."
        )
    # On a processor bitsandbytes notes at the first product that a kernel of the hub is not there, and takes its own.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": settings, "dtype": dtype, "device_map": {"": device}}


def _load(read: Callable[..., Any], folder: str, source: str, what: str, **kwargs: Any) -> Any:
    reach = contextlib.nullcontext() if Path(folder).is_dir() else hub_in_reach()
    try:
        with _LOADING_LOCK, quiet(), reach:
            return read(folder, trust_remote_code=False, **kwargs)
    except Exception as error:  # files of another form can make transformers stumble over anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the {what} {source!r} cannot be loaded: {reason} Expected a folder written by transformers with "
            f"safetensors weights, a hub id that can be reached or is cached, or {TINY!r}."
        ) from error


def _with_lora(causal: Any, lora: LoraSettings, source: str) -> PeftModel:
    settings = asdict(lora)
    if not isinstance(lora.target_modules, str):
        settings["target_modules"] = list(lora.target_modules)
    # GPT-2's layers keep their weights the other way round; told so, PEFT need not find out and warn.
    transposed = any(isinstance(module, Conv1D) for module in causal.modules())
    config = LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=transposed, **settings)
    try:
        with _seeded(0, torch.device("cpu")), warnings.catch_warnings():
            # PEFT 0.21 still asks by the old name; transformers 5.23 says so to the user, who can do nothing.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            # What it warns of, that a merge would change both ends, `export` sees to.
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
            return get_peft_model(causal, config)
    except (ValueError, re.error) as error:
        raise ModelError(f"LoRA cannot be put on {source!r}: {error}") from error


def _plain_layers(model: PeftModel) -> list[Any]:
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    return [layer for layer in layers if _is_plain(layer)]


def _is_plain(layer: Any) -> bool:
    base = layer.base_layer
    return type(base) in (nn.Linear, Conv1D) and not layer.lora_variant and not layer.lora_bias.get(_ADAPTER)


def _content_hash(model: nn.Module, tokenizer: Any, source: str) -> str:
    """Return a digest of all that tokens and losses depend on."""
    weights = _tensor_hash(dict(model.named_parameters()))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else str(sorted(tokenizer.get_vocab().items()))
    # The embedded model comes with its configuration, and records of it are older than this.
    told = "" if source == TINY else json.dumps([_architecture(source), _special(tokenizer)], sort_keys=True)
    return hashlib.sha256((weights + text + told).encode()).hexdigest()


def _architecture(source: str) -> dict[str, Any]:
    """Return what config.json says of what is computed: weights alone do not tell angles, norms or activations."""
    config, _ = _load(PreTrainedConfig.get_config_dict, model_folder(source), source, "configuration")
    return {name: value for name, value in config.items() if name not in _NO_ARCHITECTURE}


def _special(tokenizer: Any) -> list[Any]:
    """Return which tokens begin and end a text, and the chat template."""
    return [tokenizer.bos_token, tokenizer.eos_token, getattr(tokenizer, "chat_template", None)]


def _tensor_hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def _on_cpu(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Keep parameters in the CPU's memory for a while."""
    devices = [values.device for values in parameters]
    for values in parameters:
        values.data = values.data.cpu()
    try:
        yield
    finally:
        for values, device in zip(parameters, devices, strict=True):
            values.data = values.data.to(device)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    # Not torch.manual_seed, which would seed each GPU's generator, whoever draws from it.
    devices = [device] if device.type == "cuda" else []
    with _GENERATOR_LOCK, torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _drop_nothing(model: Any) -> None:
    """Set the rates of dropout to 0 that the code of layers reads for itself, where it goes by `training`."""
    for owner in (model.config, model.config.get_text_config(), *model.modules()):
        for name, value in list(vars(owner).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(owner, name, 0.0)


@contextlib.contextmanager
def _dropout_on(model: PeftModel) -> Iterator[None]:
    # Only LoRA's own dropout: the base stays in eval mode, as it is frozen.
    layers = [part for name, part in model.named_modules() if "lora_dropout" in name and isinstance(part, nn.Dropout)]
    try:
        for layer in layers:
            layer.train()
        yield
    finally:
        for layer in layers:
            layer.eval()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from showing bars and notes: for four layers they are noise; errors still come through."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with quiet_hub():
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()


def load_config(source: str) -> Any:
    """Load a model's configuration alone: enough for an estimate of its size."""
    return _load(AutoConfig.from_pretrained, model_folder(source), source, "configuration")
