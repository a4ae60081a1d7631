"""Every setting of the environment with its default: the only home of both, and of their checks.

Nothing here reads a file: values are checked against each other and that is all.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from .errors import SettingError, excerpt, suggestion

__all__ = [
    "AUXILIARY_UPDATES",
    "CHOICE_FORMS",
    "DTYPES",
    "ENV_IDS",
    "OBSERVATION_BLOCKS",
    "OWN_SETTINGS",
    "RENDER_MODES",
    "REWARDS",
    "TASK_SETTINGS",
    "TINY",
    "ColumnSettings",
    "EnvConfig",
    "LoraSettings",
    "check_foreign_lora",
]

#: The name under which the embedded base model goes.
TINY = "tiny"

#: The dev scores that can be asked for by name; anything else is "module:function".
REWARDS = ("loss", "accuracy", "accuracy_norm", "choice_probability", "exact_match", "flexible_match")

#: What frozen weights are kept in; "nf4" is four bits each, by bitsandbytes (Dettmers et al. 2023, QLoRA, section 3).
DTYPES = ("float32", "bfloat16", "nf4")

#: How multiple-choice rows are asked: for a choice's text, or for its letter in a list that the prompt ends with.
CHOICE_FORMS = ("text", "letter")

RENDER_MODES = ("ansi", "rgb_array")

#: The parts of the observation that can be hidden (Lv et al. 2025, eq. 2-6), in the order of their columns.
OBSERVATION_BLOCKS = ("stage", "difficulty", "semantic", "availability")

#: What an environment has to itself: two that differ in nothing else share model, data and features.
OWN_SETTINGS = frozenset(
    {"num_candidates", "batch_size", "horizon", "budget", "reward", "score_every", "hide", "render_mode"}
)

#: The environments' ids, each with the embedded task that it is made for.
ENV_IDS = {
    "RaiseSelect-v0": "default",
    "RaiseSelect/Noise-v0": "noise-60",
    "RaiseSelect/Target-v0": "target",
    "RaiseSelect/Redundancy-v0": "redundancy",
    "RaiseSelect/Curriculum-v0": "curriculum",
    "RaiseSelect/Thrift-v0": "thrift",
    "RaiseSelect/Shift-v0": "shift",
    "RaiseSelect/Large-v0": "large",
}

#: What embedded tasks want otherwise than by default: `from_kwargs` takes it for what is not given.
TASK_SETTINGS: dict[str, dict[str, Any]] = {
    "noise-0": {"pool_size": 1000, "horizon": 30},
    "noise-30": {"pool_size": 1000, "horizon": 30},
    "noise-60": {"pool_size": 1000, "horizon": 30},
    "noise-90": {"pool_size": 4000, "horizon": 30},
    "target": {"pool_size": 1000, "horizon": 30},
    "redundancy": {},
    "curriculum": {"pool_size": 1000},
    "thrift": {"horizon": 96, "budget": 96},
    "shift": {"horizon": 16},
    "large": {"pool_size": 20_000, "horizon": 75},
}

#: What decides on the rows of an embedded task, and on nothing where there is a pool of one's own.
OF_TASK = ("task", "task_seed", "pool_size")

#: The largest rank that an adapter from a file may have; beyond it LoRA is larger than most layers.
MAX_FOREIGN_RANK = 4096

#: A regular expression that is matched in a moment: names, at most two gaps, and one choice among names.
_GAP, _NAME = r"(\.\*)?", r"[\w-]*(\\?\.[\w-]+)*(\\?\.)?"
_PLAIN_PATTERN = re.compile(rf"\^?{_GAP}{_NAME}{_GAP}{_NAME}(\((\?:)?[\w.-]+(\|[\w.-]+)*\))?\$?")

#: What is meant where the settings' names do not say that it is a text, and live objects come to mind.
_FILES = "the name of a file, a folder or a data set of the hub, as a text"
_TEXTS = {
    "model": "the name of a folder or of a model of the hub, as a text",
    **dict.fromkeys(("pool", "dev", "test"), _FILES),
    "reward": 'a name, or "module:function" for a function of your own, as a text',
}

#: Updates on random rows that make the base model an auxiliary one, where no other model was named.
AUXILIARY_UPDATES = 60


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The adapter, by PEFT's own names (`peft.LoraConfig`).

    RAISE does not mention LoRA; using it, and these values, is this project's choice.
    """

    r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    bias: Literal["none"] = "none"

    def __post_init__(self) -> None:
        _take_scalars_out(self)
        modules: Any = self.target_modules
        expected = '"all-linear", a list of names of modules, or a regular expression of whole names: ".*(q|v)_proj"'
        _require(_names_modules(modules), "lora target_modules", modules, expected)
        if isinstance(modules, list):  # JSON knows no tuples
            object.__setattr__(self, "target_modules", tuple(modules))
        _require(_is_int(self.r) and self.r >= 1, "lora r", self.r, "a rank of at least 1")
        _require(_is_number(self.lora_alpha), "lora lora_alpha", self.lora_alpha, "a finite number of at least 0")
        good = _is_number(self.lora_dropout) and self.lora_dropout < 1
        _require(good, "lora lora_dropout", self.lora_dropout, "a share from 0 up to, not with, 1")
        for name in ("use_rslora", "use_dora"):
            value = getattr(self, name)
            _require(isinstance(value, bool), f"lora {name}", value, "true or false")
        _require(self.bias == "none", "lora bias", self.bias, '"none"')


def _names_modules(value: Any) -> bool:
    names = value if isinstance(value, (list, tuple)) else [value]
    return bool(names) and all(isinstance(name, str) and name != "" for name in names)


def check_foreign_lora(lora: LoraSettings) -> None:
    """Check an adapter's form that comes from anyone's file: it must cost neither memory nor time without bound.

    Raises:
        SettingError: Its rank is beyond what any adapter has, or its modules are a regular expression of more than
            names and gaps, which may take forever to match.
    """
    _require(lora.r <= MAX_FOREIGN_RANK, "lora r", lora.r, f"a rank of at most {MAX_FOREIGN_RANK} in a file")
    modules = lora.target_modules
    good = not isinstance(modules, str) or (len(modules) <= 200 and _PLAIN_PATTERN.fullmatch(modules) is not None)
    _require(good, "lora target_modules", modules, "a list of names, or names with .* between, in a file")


@dataclass(frozen=True, slots=True)
class ColumnSettings:
    """Which columns of a file hold what; none named: they are recognised.

    Attributes:
        prompt: What is asked.
        response: What is to be answered.
        input: What follows the prompt after an empty line, where it is not blank.
        system: The text that a conversation is headed by.
        messages: Whole conversations, in place of prompt and response.
        choices: The answers to choose among.
        answer: Which of them is right, in place of the response: its text, letter or number from 0.

    Raises:
        SettingError: A name is no text, or the names do not make a row.
    """

    prompt: str | None = None
    response: str | None = None
    input: str | None = None
    system: str | None = None
    messages: str | None = None
    choices: str | None = None
    answer: str | None = None

    def __post_init__(self) -> None:
        for key, column in self.named().items():
            _require(isinstance(column, str) and column != "", f"columns {key}", column, "the name of a column")
        if not self.named():
            return
        keys = set(self.named())
        is_chat = "messages" in keys and keys <= {"messages", "system"}
        has_answer = ("response" in keys) != ("answer" in keys) and ("answer" not in keys or "choices" in keys)
        is_pair = "prompt" in keys and "messages" not in keys and has_answer
        expected = "prompt with response, or with choices and answer; or messages; input and system as there are any"
        _require(is_chat or is_pair, "columns", self.named(), expected)

    def named(self) -> dict[str, str]:
        """Return the columns that have a name."""
        pairs = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        return {key: column for key, column in pairs.items() if column is not None}


@dataclass(frozen=True, slots=True)
class EnvConfig:
    """What `gym.make("RaiseSelect-v0", ...)` takes. Units and meaning are in `RaiseSelectEnv`'s docstring.

    Raises:
        SettingError: A value is of the wrong kind or out of range, or two values contradict each other.
    """

    # What is trained, on what, for what.
    model: str = TINY
    pool: str | None = None
    dev: str | None = None
    test: str | None = None
    task: str = "default"
    task_seed: int = 0
    pool_size: int = 2000
    num_dev: int | None = None
    num_test: int | None = None
    allow_overlap: bool = False
    skip_empty: bool = False
    columns: ColumnSettings = field(default_factory=ColumnSettings)
    choice_form: str = "text"

    # The decision process.
    num_candidates: int | Literal["all"] = 64
    num_classes: int = 4
    batch_size: int = 8
    horizon: int = 40
    budget: int | None = None
    reward: str = "loss"
    score_every: int = 1

    # The update.
    lora: LoraSettings = field(default_factory=LoraSettings)
    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 256
    template: str | None = None
    micro_batch_tokens: int = 16_384
    seed_model: int = 0
    adapter: str | None = None
    activation_checkpointing: bool = False
    dtype: str = "float32"
    device: str = "auto"

    # The observation.
    auxiliary_model: str | None = None
    auxiliary_updates: int | None = None
    auxiliary_adapter: str | None = None
    cache_dir: str | None = None
    lazy_features: bool = False
    hide: tuple[str, ...] = ()

    render_mode: str | None = None

    def __post_init__(self) -> None:
        lora: Any = self.lora  # from gym.make it comes as plain data
        if not isinstance(lora, LoraSettings):
            object.__setattr__(self, "lora", _part(LoraSettings, "lora", lora, "PEFT's names, such as {'r': 8}"))
        columns: Any = self.columns
        if not isinstance(columns, ColumnSettings):
            expected = "what columns hold, such as {'prompt': 'q', 'response': 'a'}"
            object.__setattr__(
                self, "columns", _part(ColumnSettings, "columns", {} if columns is None else columns, expected)
            )
        _take_scalars_out(self)
        self._check_kinds()
        object.__setattr__(self, "hide", _hidden_blocks(self.hide))
        self._check_sizes()
        self._check_choices()
        self._check_data()
        if self.auxiliary_adapter is not None and self.num_auxiliary_updates:
            raise SettingError(
                f"auxiliary_adapter={self.auxiliary_adapter!r} is what the auxiliary model has learned already, and "
                f"auxiliary_updates={self.num_auxiliary_updates} would have it learn anew: leave one of the two out."
            )

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> EnvConfig:
        """Return the settings that `gym.make`'s keywords ask for.

        What is not given has the default of the embedded task that is named, where that has one of its own.

        Raises:
            SettingError: A keyword is unknown, or its value cannot be used.
        """
        known = {entry.name for entry in dataclasses.fields(cls)}
        for name in kwargs:
            if name not in known:
                raise SettingError(f"unknown setting {name!r}: {suggestion(name, known)}")
        return cls(**{**_task_settings(kwargs.get("task"), kwargs.get("pool")), **kwargs})

    def to_kwargs(self) -> dict[str, Any]:
        """Return the settings that differ from their defaults, those of the task, as plain data for `from_kwargs`."""
        default = EnvConfig(**_task_settings(self.task, self.pool))
        kwargs: dict[str, Any] = {}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if value != getattr(default, entry.name):
                kwargs[entry.name] = _plain(value)
        return kwargs

    def shared_part(self) -> EnvConfig:
        """Return the settings that decide on model, data and features: all others are as if never set."""
        default = EnvConfig()
        own = {name: getattr(default, name) for name in OWN_SETTINGS}
        # One candidate a class, one of them taken: nothing that is shared can contradict that.
        return dataclasses.replace(self, **{**own, "num_candidates": self.num_classes, "batch_size": 1})

    @property
    def total_budget(self) -> int:
        """Instructions that may be trained on in one episode, repeats counted."""
        return self.horizon * self.batch_size if self.budget is None else self.budget

    @property
    def num_auxiliary_updates(self) -> int:
        """Updates on random rows before the auxiliary model computes features; none if it is ready as it is."""
        if self.auxiliary_updates is not None:
            return self.auxiliary_updates
        return AUXILIARY_UPDATES if self.auxiliary_model is None and self.auxiliary_adapter is None else 0

    @property
    def is_embedded(self) -> bool:
        """Whether pool, dev and test are generated rather than read."""
        return self.pool is None

    def _check_kinds(self) -> None:
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
                object.__setattr__(self, entry.name, value)
            if entry.type in ("str", "str | None"):
                good = isinstance(value, str) or (value is None and entry.type != "str")
                _require(good, entry.name, value, _TEXTS.get(entry.name, "a text"))
            elif entry.type == "bool":
                _require(isinstance(value, bool), entry.name, value, "True or False")

    def _check_sizes(self) -> None:
        for name in (
            "num_classes",
            "batch_size",
            "horizon",
            "score_every",
            "pool_size",
            "max_length",
            "micro_batch_tokens",
        ):
            value = getattr(self, name)
            _require(_is_int(value) and value >= 1, name, value, "a whole number of at least 1")
        for name in ("budget", "num_dev", "num_test"):
            value = getattr(self, name)
            _require(value is None or (_is_int(value) and value >= 1), name, value, "a whole number of at least 1")
        for name in ("num_auxiliary_updates", "task_seed", "seed_model"):
            value = getattr(self, name)
            _require(_is_int(value) and value >= 0, name, value, "a whole number of at least 0")
        # What torch's generators take.
        _require(self.seed_model < 2**64, "seed_model", self.seed_model, "a whole number below 2^64")
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            _require(_is_number(value), name, value, "a finite number of at least 0")
        if self.num_candidates != "all":
            self._check_candidates(self.num_candidates)
        elif self.lazy_features:
            raise SettingError(
                'num_candidates="all" shows the features of every row, and lazy_features computes those alone of rows '
                "that are drawn: leave one of the two out. (The agents less and full offer the whole pool themselves.)"
            )

    def _check_candidates(self, count: int) -> None:
        _require(_is_int(count) and count >= 1, "num_candidates", count, 'a whole number of at least 1, or "all"')
        if count % self.num_classes:
            below = max(self.num_classes, count - count % self.num_classes)
            raise SettingError(
                f"num_candidates={count} cannot be shared equally by num_classes={self.num_classes}: "
                f"take a multiple of {self.num_classes}, such as {below}."
            )
        _require(
            self.batch_size <= count, "batch_size", self.batch_size, f"at most the {count} candidates that are offered"
        )

    def _check_choices(self) -> None:
        known = self.reward in REWARDS or _is_reference(self.reward)
        _require(known, "reward", self.reward, f'one of {", ".join(REWARDS)}, or "module:function"')
        _require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        form = self.choice_form
        _require(form in CHOICE_FORMS, "choice_form", form, f"one of {', '.join(CHOICE_FORMS)}")
        mode = self.render_mode
        _require(mode is None or mode in RENDER_MODES, "render_mode", mode, f"one of {', '.join(RENDER_MODES)}")
        if self.dtype == "nf4" and self.activation_checkpointing:
            raise SettingError(
                "activation_checkpointing does not go with dtype='nf4', whose layers are bitsandbytes' own: take "
                "dtype='bfloat16', or leave activation_checkpointing out and make micro_batch_tokens smaller."
            )

    def _check_data(self) -> None:
        if self.is_embedded and (self.dev or self.test):
            raise SettingError("dev and test belong to a pool: give pool=FILE too, or none of the three.")
        if self.is_embedded and self.columns.named():
            raise SettingError("columns names those of a file: give pool=FILE too, or leave columns out.")
        if not self.is_embedded:
            self._check_task_unset()
        if not self.is_embedded and self.dev is None:
            raise SettingError(
                "a pool without a dev set gives no reward: add dev=FILE (rows that are not in the pool)."
            )

    def _check_task_unset(self) -> None:
        """Refuse what decides on the rows of an embedded task: nobody shall think that it thins a pool out."""
        default = {entry.name: entry.default for entry in dataclasses.fields(self)}
        # A task's name alone misleads nobody, and stands in records.
        given = [name for name in OF_TASK if name != "task" and getattr(self, name) != default[name]]
        if given:
            raise SettingError(
                f"{given[0]}={getattr(self, given[0])!r} is of the embedded tasks, and pool={self.pool!r} takes their "
                f"place: leave one of the two out. To train on a part of a pool's rows, write that part to a file."
            )


def _task_settings(task: Any, pool: Any) -> Mapping[str, Any]:
    """Return a task's own defaults; none beside a pool, which takes the task's place."""
    return TASK_SETTINGS.get(task, {}) if isinstance(task, str) and pool is None else {}


Part = TypeVar("Part", LoraSettings, ColumnSettings)


def _part(kind: type[Part], name: str, value: Any, expected: str) -> Part:
    """Return settings that come together under one keyword."""
    if not isinstance(value, Mapping):
        raise SettingError(f"{name} is {value!r}; expected settings by {expected}.")
    known = {entry.name for entry in dataclasses.fields(kind)}
    for key in value:
        if key not in known:
            raise SettingError(f"unknown {name} setting {key!r}: {suggestion(str(key), known)}")
    return kind(**value)


def _take_scalars_out(settings: LoraSettings | EnvConfig) -> None:
    """Put Python's own numbers in the place of NumPy's, which are settings as well: JSON knows no others."""
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        if isinstance(value, np.generic):
            object.__setattr__(settings, entry.name, value.item())


def _hidden_blocks(value: Any) -> tuple[str, ...]:
    """Return the blocks to hide in the order of their columns, each once."""
    is_list = isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
    _require(is_list, "hide", value, f"a list of blocks out of {', '.join(OBSERVATION_BLOCKS)}")
    for name in value:
        if name not in OBSERVATION_BLOCKS:
            raise SettingError(f"hide has an unknown block {name!r}: {suggestion(name, OBSERVATION_BLOCKS)}")
    if {"difficulty", "semantic"} <= set(value):
        # Stage and availability are zeros at the first step, and rows of zeros are padding.
        raise SettingError(
            f"hide is {', '.join(value)!r}: rows could no longer be told from each other, nor from padding; "
            "leave difficulty or semantic in sight."
        )
    return tuple(name for name in OBSERVATION_BLOCKS if name in value)


def _require(good: bool, name: str, value: Any, expected: str) -> None:
    if not good:
        # A whole data set may stand where its file's name belongs.
        raise SettingError(f"{name} is {excerpt(repr(value), 200)}; expected {expected}.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    # Compared and not converted: a whole number may be beyond all floats.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def _is_reference(value: str) -> bool:
    module, colon, function = value.partition(":")
    return bool(colon and module and function.isidentifier())


def _plain(value: Any) -> Any:
    if isinstance(value, LoraSettings):
        default = LoraSettings()
        pairs = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
        return {name: _plain(item) for name, item in pairs.items() if item != getattr(default, name)}
    if isinstance(value, ColumnSettings):
        return value.named()
    return list(value) if isinstance(value, tuple) else value
