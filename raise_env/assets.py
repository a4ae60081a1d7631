"""What environments share: pool, dev and test, the base model, features and classes, loaded once a process.

Nothing here changes during an episode. Two environments that ask for the same model and data get the same
objects, so that eight of them cost one base model and eight adapters.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import numpy as np

from .adapter_files import auxiliary_form, content_hash, first_adapter, starting_form
from .auxiliary import FEATURE_SEED, Auxiliary, adapter_of, classes_of, features_of, identity_of
from .base_model import BaseModel, own_modes
from .config import EnvConfig, LoraSettings
from .encoding import EncodedRows, Encoder
from .errors import DataError, ModelError, SettingError
from .evaluation import EvaluationSet
from .features import (
    LoadingProgress,
    StaticFeatures,
)
from .generation import warn_of_cut
from .lazy import LazyFeatures
from .learner import LoraLearner, TrainingState, UpdateSettings
from .learner_protocol import Split
from .pool import (
    Pool,
    check_disjoint,
    check_enough,
    classes_hash,
    draw_candidates,
    sample_rows,
)
from .reading import Stamp, check_columns, folder_stamp, read_pool, stamp
from .rewards import Evaluation, check_reward
from .store import cache_folder

__all__ = ["Assets", "Data", "auxiliary_of", "load_assets", "load_data"]

logger = logging.getLogger(__name__)

#: What pool, dev and test depend on, and where a large pool is kept.
_DATA_SETTINGS = (
    *("pool", "dev", "test", "task", "task_seed", "pool_size", "num_dev", "num_test", "allow_overlap", "skip_empty"),
    *("columns", "choice_form", "cache_dir"),
)

#: What changes with the files of pool, dev and test.
Stamps = tuple[Stamp | None, ...]

#: The base models in use. Weak: one that no assets hold is let go, and two assets never hold two of a kind.
_BASES: weakref.WeakValueDictionary[tuple[Hashable, ...], BaseModel] = weakref.WeakValueDictionary()

#: Held while anything is loaded: of threads that ask for the same, one loads it and the others get it too.
_LOCK = threading.RLock()


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """The three sets of rows, as text. `test` is None where there is none."""

    pool: Pool
    dev: Pool
    test: Pool | None


@dataclass(frozen=True, eq=False)
class Assets:
    """Everything that an environment reads and never writes.

    Attributes:
        data: The rows as text.
        features: The static columns of every pool row, or `LazyFeatures`.
        classes: K-means class of every pool row, shape (rows,), int64; -1 for rows that are never offered because
            nothing of their response is left within `max_length`, and with `LazyFeatures` for those not seen yet.
        num_classes: How many classes there are.
        learner: A learner at its initial state; each environment takes a copy.
        base_evaluation: Dev scores before any update.
        pool_tokens: Tokens of the whole pool, each row once.
        content: Content hashes by the names "model", "pool", "dev", and where there are such "test", "adapter" and
            "auxiliary_adapter".
        auxiliary: What computed the features: content hashes of "model" and, where it began with one, "adapter"; and
            "updates", its updates before.
        counts: By the names "pool", "dev", "test": "rows" that there are, and of the source those "skipped" for want of
            text; "duplicates" of others; "truncated" at `max_length`, and "left_out" because nothing is left to learn,
            or of a dev or test row to score; of these two also rows with "unscored_choices".
        save_auxiliary: Writes the adapter that the auxiliary model computes features with into a folder, as
            `auxiliary_adapter` takes it.
    """

    data: Data
    features: StaticFeatures
    classes: np.ndarray
    num_classes: int
    learner: LoraLearner
    base_evaluation: Evaluation
    pool_tokens: int
    content: dict[str, str]
    auxiliary: dict[str, str | int]
    counts: dict[str, dict[str, int]]
    save_auxiliary: Callable[[Path], None]

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled: a model in use is of its process, and pools may be larger than its memory."""
        raise TypeError(
            "an environment that has loaded its model cannot be pickled. Pickle env.config.to_kwargs() and "
            "env.snapshot() instead: RaiseSelectEnv(**kwargs), after restore(snapshot), goes on from there in any "
            "process. In this one env.fork(n) and copy.deepcopy(env) copy it."
        )

    @functools.cached_property
    def members(self) -> tuple[np.ndarray, ...]:
        """The pool ids of each class.

        Raises:
            SettingError: Features are lazy, and so the class of most rows is not known.
        """
        if isinstance(self.features, LazyFeatures):
            raise SettingError(
                "lazy_features knows the classes of those rows alone that were offered; found something that needs "
                "those of all rows. Leave lazy_features out, or take another agent."
            )
        return tuple(np.flatnonzero(self.classes == label) for label in range(self.num_classes))

    @functools.cached_property
    def classes_hash(self) -> str | None:
        """A digest of the classes; None where features are lazy, and so the class of most rows is not known."""
        return None if isinstance(self.features, LazyFeatures) else classes_hash(self.classes)

    @functools.cached_property
    def base_answers(self) -> Evaluation:
        """Dev scores before any update, with generated answers where rows ask for a number; made when asked for."""
        for name, split in self.learner.splits.items():
            warn_of_cut(self.learner.base, list(split.questions.values()), name)
        if not self.learner.splits["dev"].questions:
            return self.base_evaluation
        learner = self.learner.copy()
        learner.generates = True
        return learner.evaluate("dev")

    def check_reward(self, reward: str) -> None:
        """Check that dev and test rows, as they are scored, have what a reward needs.

        Raises:
            RewardError: None of one of the sets has.
        """
        for name, split in self.learner.splits.items():
            check_reward(reward, split.instructions, name, "has none that fits into max_length")

    def draw(self, num_candidates: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw the candidates of one step: see `pool.draw_candidates`."""
        if isinstance(self.features, LazyFeatures):
            return self.features.draw(num_candidates, rng)
        return draw_candidates(self.members, num_candidates, rng)

    @property
    def pool(self) -> Pool:
        """The pool's rows as text."""
        return self.data.pool

    @property
    def adapter_form(self) -> dict[str, int | float | str]:
        """What decides what an adapter's numbers do."""
        return self.learner.base.adapter_form

    @property
    def num_dev(self) -> int:
        """Dev rows that are scored."""
        return len(self.learner.splits["dev"])

    @property
    def has_test(self) -> bool:
        """Whether there is a test set."""
        return "test" in self.learner.splits

    def without_test(self) -> Assets:
        """Return the same without a test set: environments over it never score one, and share all else with others."""
        learner = self.learner.copy()
        learner.splits = {"dev": learner.splits["dev"]}
        other = replace(self, learner=learner, data=replace(self.data, test=None))
        # What was worked out holds there too, and answers of the dev rows are dear.
        other.__dict__.update({**self.__dict__, **other.__dict__})
        return other


def load_data(config: EnvConfig) -> Data:
    """Read or generate pool, dev and test, checked against each other; the last are kept.

    Raises:
        DataError: A file cannot be read, a row is at fault, or a dev or test row is also in the pool.
        SettingError: The pool has fewer rows than are to be offered.
    """
    with _LOCK:
        data = _cached_data(_data_part(config), _stamps(config))
    if config.num_candidates != "all":
        check_enough(len(data.pool), config.num_candidates)
    return data


@dataclass(frozen=True, slots=True)
class _Watcher:
    """Who is told of progress; all are equal, so that what is kept is the same for whoever watches."""

    show: LoadingProgress | None = field(compare=False)

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.show is not None:
            self.show(what, done, total)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """What makes tokens of texts, and what decides on how: the model's hash, the longest row, and the template."""

    form: tuple[str, int, str | None]
    encoder: Encoder = field(compare=False)


@own_modes()
def load_assets(config: EnvConfig, progress: LoadingProgress | None = None) -> Assets:
    """Return the assets that a configuration asks for; the last few are kept.

    Args:
        config: What is asked for.
        progress: Is told what is being computed, how many rows are done, and how many there are.

    Raises:
        DataError: As `load_data`, or nothing of any row's response fits into `max_length`.
        ModelError: A model cannot be loaded.
        RewardError: No dev row, or no test row, has what the reward needs.
        SettingError: As `load_data`.
        OutputError: The pool is large, and the cache folder cannot be written or has too little room.
    """
    data = load_data(config)  # bad rows, or too few, are told before anything is computed
    check_reward(config.reward, data.dev, "dev")
    if data.test is not None:
        check_reward(config.reward, data.test, "test")
    with _LOCK:
        assets = _cached_assets(config.shared_part(), _stamps(config), _folder_stamps(config), _Watcher(progress))
    assets.check_reward(config.reward)
    return assets


def auxiliary_of(config: EnvConfig) -> dict[str, str | int]:
    """Return what `Assets.auxiliary` will be, before any feature is computed.

    Raises:
        ModelError: The auxiliary model or an adapter cannot be loaded.
        SettingError: As `starting_form`.
    """
    source, is_trained = config.auxiliary_model or config.model, config.auxiliary_model in (None, config.model)
    with _LOCK:
        model = _auxiliary_base(config, source, is_trained=is_trained)
    return identity_of(config, model, adapter_of(config, is_trained=is_trained))


def _data_part(config: EnvConfig) -> EnvConfig:
    """Return the settings that decide on the data: a large pool is read once for all models and seeds."""
    return EnvConfig(**{name: getattr(config, name) for name in _DATA_SETTINGS})


def _stamps(config: EnvConfig) -> Stamps:
    return tuple(stamp(source) for source in [config.pool, config.dev, config.test])


def _folder_stamps(config: EnvConfig) -> Stamps:
    folders = [config.model, config.auxiliary_model, config.adapter, config.auxiliary_adapter]
    return tuple(folder_stamp(folder) for folder in folders)


@functools.lru_cache(maxsize=1)
def _cached_data(config: EnvConfig, _stamps: Stamps) -> Data:
    return _embedded_data(config) if config.pool is None else _read_data(config)


@functools.lru_cache(maxsize=4)
def _cached_assets(config: EnvConfig, stamps: Stamps, _folder_stamps: Stamps, watcher: _Watcher) -> Assets:
    data = _cached_data(_data_part(config), stamps)
    base = _shared_base(config, config.model, starting_form(config))
    encoder = Encoder(base.tokenizer, _max_length(config, base), config.template)
    tokens = _Tokens((base.content_hash, encoder.max_length, config.template), encoder)
    pool, splits = _cached_rows(data, cache_folder(config.cache_dir), tokens, watcher)
    if not pool.has_labels.any():
        raise DataError(f"{data.pool.source}: no response fits into max_length={encoder.max_length}; raise it.")
    num_left_out = int((~pool.has_labels).sum())
    if num_left_out:
        message = "%d of %d pool rows are never offered: nothing of their response fits into max_length=%d"
        logger.warning(message, num_left_out, len(pool), encoder.max_length)
    start = TrainingState.start(first_adapter(config, base))
    learner = LoraLearner(base, pool, dict(splits), UpdateSettings.of(config), start)
    evaluation = learner.evaluate("dev")
    if not evaluation.is_finite:
        raise ModelError(
            f"model {config.model!r}: its loss on the dev rows is not finite before any update; expected a number to "
            "improve on. Weights that are NaN or infinite do that, or a dtype that they do not fit into."
        )
    auxiliary = _auxiliary(config, data.pool, encoder, pool, watcher)
    features = features_of(auxiliary)
    classes = classes_of(auxiliary, features, pool.has_labels)
    return Assets(
        data=data,
        features=features,
        classes=classes,
        num_classes=config.num_classes,
        learner=learner,
        base_evaluation=evaluation,
        pool_tokens=int(pool.lengths[pool.has_labels].sum()),
        content=_content(config, base, data),
        auxiliary=auxiliary.identity,
        counts=_counts(data, pool, splits),
        save_auxiliary=auxiliary.save_adapter,
    )


@functools.lru_cache(maxsize=1)
def _cached_rows(
    data: Data, folder: Path, tokens: _Tokens, watcher: _Watcher
) -> tuple[EncodedRows, Mapping[Split, EvaluationSet]]:
    """Return the data as tokens: they are the same for all first adapters, and a benchmark's seeds differ in these."""
    encoder = tokens.encoder
    pool = encoder.encode_pool(data.pool, tokens.form[0], folder, watcher)
    splits: dict[Split, EvaluationSet] = {"dev": EvaluationSet.build(data.dev, encoder, "dev")}
    if data.test is not None:
        splits["test"] = EvaluationSet.build(data.test, encoder, "test")
    return pool, splits


def _shared_base(config: EnvConfig, source: str, lora: LoraSettings) -> BaseModel:
    """Return the base model; as long as anything uses it, all get the same."""
    key = (source, folder_stamp(source), lora, config.dtype, config.device, config.activation_checkpointing)
    base = _BASES.get(key)
    if base is None:
        base = _BASES[key] = BaseModel(
            source,
            lora,
            dtype=config.dtype,
            device=config.device,
            activation_checkpointing=config.activation_checkpointing,
        )
    return base


def _auxiliary_base(config: EnvConfig, source: str, *, is_trained: bool) -> BaseModel:
    """Return the auxiliary model: the one that is trained, unless it is another one or its adapter has another form."""
    usual = _shared_base(config, source, starting_form(config) if is_trained else config.lora)
    form = auxiliary_form(config, is_trained=is_trained)
    return usual if usual.has_form(form) else _shared_base(config, source, form)


def _embedded_data(config: EnvConfig) -> Data:
    from .tiny.task import generate_task

    task = generate_task(config.task, seed=config.task_seed, pool_size=config.pool_size)
    return Data(task.pool, _sampled(task.dev, config.num_dev), _sampled(task.test, config.num_test))


def _read_data(config: EnvConfig) -> Data:
    assert config.pool is not None
    assert config.dev is not None
    read = functools.partial(
        read_pool, skip_empty=config.skip_empty, columns=config.columns, choice_form=config.choice_form
    )
    pool, dev = read(config.pool, folder=cache_folder(config.cache_dir)), read(config.dev)
    test = None if config.test is None else read(config.test)
    check_columns(config.columns, *(rows for rows in (pool, dev, test) if rows is not None))
    dev = _sampled(dev, config.num_dev)
    test = None if test is None else _sampled(test, config.num_test)
    if not config.allow_overlap:
        check_disjoint(pool, dev, test)
    return Data(pool, dev, test)


def _sampled(rows: Pool, count: int | None) -> Pool:
    return rows if count is None else sample_rows(rows, count, seed=FEATURE_SEED)


def _max_length(config: EnvConfig, base: BaseModel) -> int:
    return min(config.max_length, base.max_positions or config.max_length)


def _content(config: EnvConfig, base: BaseModel, data: Data) -> dict[str, str]:
    content = {"model": base.content_hash, "pool": data.pool.content_hash, "dev": data.dev.content_hash}
    if data.test is not None:
        content["test"] = data.test.content_hash
    if config.adapter is not None:
        content["adapter"] = content_hash(Path(config.adapter))
    if config.auxiliary_adapter is not None:
        content["auxiliary_adapter"] = content_hash(Path(config.auxiliary_adapter))
    return content


def _counts(data: Data, pool: EncodedRows, splits: Mapping[Split, EvaluationSet]) -> dict[str, dict[str, int]]:
    """Return what became of the rows on their way into tokens; see `Assets.counts`."""
    sources = {"pool": (data.pool, pool), "dev": (data.dev, splits["dev"].rows)}
    if data.test is not None:
        sources["test"] = (data.test, splits["test"].rows)
    counts = {}
    for name, (rows, encoded) in sources.items():
        # Rows without a label are scored all the same where they have choices or a number.
        kept = encoded.has_labels if name == "pool" else np.ones(len(encoded), dtype=bool)
        counts[name] = {
            "rows": len(rows),
            "skipped": rows.num_skipped,
            "duplicates": rows.num_duplicates,
            "truncated": int((encoded.is_cut & kept).sum()),
            "left_out": len(rows) - int(kept.sum()),
        }
    for name, split in splits.items():
        asked = sum(bool(row.choices) for row in sources[name][0])
        counts[name]["unscored_choices"] = asked - sum(bool(row.choices) for row in split.instructions)
    return counts


def _auxiliary(config: EnvConfig, rows: Pool, encoder: Encoder, pool: EncodedRows, watcher: _Watcher) -> Auxiliary:
    if config.auxiliary_model is None or config.auxiliary_model == config.model:
        model = _auxiliary_base(config, config.model, is_trained=True)
        return Auxiliary(config, model, encoder, rows, pool, watcher, is_trained=True)
    model = _auxiliary_base(config, config.auxiliary_model, is_trained=False)
    own = Encoder(model.tokenizer, _max_length(config, model), config.template)
    encoded = own.encode_pool(rows, model.content_hash, cache_folder(config.cache_dir), watcher)
    return Auxiliary(config, model, own, rows, encoded, watcher, is_trained=False)
