"""What environments share: pool, dev and test, the base model, features and classes, loaded once a process.

Nothing here changes during an episode. Two environments that ask for the same model and data get the same
objects, so that eight of them cost one base model and eight adapters.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from .adapter_files import content_hash, read_adapter, starting_form
from .base_model import BaseModel
from .config import EnvConfig, LoraSettings
from .encoding import Batch, EncodedRows, Encoder, collate, token_batches
from .errors import DataError, SettingError
from .evaluation import EvaluationSet
from .features import (
    NUM_SEMANTIC,
    NUM_STATIC,
    SCHEMA_VERSION,
    LoadingProgress,
    StaticFeatures,
    standardise,
)
from .lazy import GROUP_ROWS, LazyFeatures, random_order, sample_of
from .learner import LoraLearner, TrainingState, UpdateSettings
from .learner_protocol import Ledger, Split
from .pool import (
    MAX_ROWS_IN_MEMORY,
    Pool,
    check_disjoint,
    check_enough,
    draw_candidates,
    kmeans_centres,
    kmeans_classes,
    nearest_centres,
    sample_rows,
)
from .reading import Stamp, read_pool, stamp
from .rewards import Evaluation, check_reward
from .store import Block, Column, TableForm, cache_folder, stored_table

__all__ = ["Assets", "Data", "load_assets", "load_data"]

logger = logging.getLogger(__name__)

#: Tokens of one forward pass of the auxiliary model, padding included.
FEATURE_BATCH_TOKENS = 4096

#: Rows whose features are computed, sorted by length, and written to disk together.
FEATURE_BLOCK_ROWS = 32_768

#: Groups of a lazy pool's sample that are written to disk together.
_GROUPS_AT_ONCE = 16

#: The paper does not say how the auxiliary model was made ready, or in what feature space K-means ran: fixed here.
AUXILIARY_BATCH_SIZE = 8
FEATURE_SEED = 0

#: What pool, dev and test depend on, and where a large pool is kept.
_DATA_SETTINGS = (
    *("pool", "dev", "test", "task", "task_seed", "pool_size", "num_dev", "num_test", "allow_overlap", "skip_empty"),
    *("columns", "choice_form", "cache_dir"),
)

#: What changes with the files of pool, dev and test.
Stamps = tuple[Stamp | None, ...]

#: The base models in use. Weak: one that no assets hold is let go, and two assets never hold two of a kind.
_BASES: weakref.WeakValueDictionary[tuple[str, LoraSettings, str, str, bool], BaseModel] = weakref.WeakValueDictionary()


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
        content: Content hashes by the names "model", "pool", "dev", and where there are such "test" and "adapter".
        auxiliary: What computed the features: content hashes of "model" and, where it began with one, "adapter"; and
            "updates", its updates before.
        counts: By the names "pool", "dev", "test": "rows" that there are, and of the source those "skipped" for want of
            text; "duplicates" of others; "truncated" at `max_length`, and "left_out" because nothing is left to learn.
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
    def base_answers(self) -> Evaluation:
        """Dev scores before any update, with generated answers where rows ask for a number; made when asked for."""
        if not self.learner.splits["dev"].questions:
            return self.base_evaluation
        learner = self.learner.copy()
        learner.generates = True
        return learner.evaluate("dev")

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
    def num_dev(self) -> int:
        """Dev rows that are scored."""
        return len(self.learner.splits["dev"])

    @property
    def has_test(self) -> bool:
        """Whether there is a test set."""
        return "test" in self.learner.splits


def load_data(config: EnvConfig) -> Data:
    """Read or generate pool, dev and test, checked against each other; the last are kept.

    Raises:
        DataError: A file cannot be read, a row is at fault, or a dev or test row is also in the pool.
        SettingError: The pool has fewer rows than are to be offered.
    """
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
    return _cached_assets(config.shared_part(), _stamps(config), _Watcher(progress))


def _data_part(config: EnvConfig) -> EnvConfig:
    """Return the settings that decide on the data: a large pool is read once for all models and seeds."""
    return EnvConfig(**{name: getattr(config, name) for name in _DATA_SETTINGS})


def _stamps(config: EnvConfig) -> Stamps:
    sources = [config.pool, config.dev, config.test]
    return tuple(stamp(source) for source in [*sources, config.adapter])


@functools.lru_cache(maxsize=1)
def _cached_data(config: EnvConfig, _stamps: Stamps) -> Data:
    return _embedded_data(config) if config.pool is None else _read_data(config)


@functools.lru_cache(maxsize=4)
def _cached_assets(config: EnvConfig, _stamps: Stamps, watcher: _Watcher) -> Assets:
    data = _cached_data(_data_part(config), _stamps)
    base = _shared_base(config, config.model, starting_form(config))
    encoder = Encoder(base.tokenizer, _max_length(config, base), config.template)
    pool = _encoded(config, data.pool, encoder, base, watcher)
    splits: dict[Split, EvaluationSet] = {"dev": EvaluationSet.build(data.dev, encoder, "dev")}
    if data.test is not None:
        splits["test"] = EvaluationSet.build(data.test, encoder, "test")
    if not pool.has_labels.any():
        raise DataError(f"{data.pool.source}: no response fits into max_length={encoder.max_length}; raise it.")
    num_left_out = int((~pool.has_labels).sum())
    if num_left_out:
        message = "%d of %d pool rows are never offered: nothing of their response fits into max_length=%d"
        logger.warning(message, num_left_out, len(pool), encoder.max_length)
    auxiliary = _auxiliary(config, data.pool, encoder, pool, base, watcher)
    features = _features(auxiliary)
    classes = _classes(auxiliary, features, pool.has_labels)
    learner = _learner(config, base, pool, splits, _first_adapter(config, base))
    return Assets(
        data=data,
        features=features,
        classes=classes,
        num_classes=config.num_classes,
        learner=learner,
        base_evaluation=learner.evaluate("dev"),
        pool_tokens=int(pool.lengths[pool.has_labels].sum()),
        content=_content(config, base, data),
        auxiliary=auxiliary.identity,
        counts=_counts(data, pool, splits),
    )


def _shared_base(config: EnvConfig, source: str, lora: LoraSettings) -> BaseModel:
    """Return the base model; as long as anything uses it, all get the same."""
    key = (source, lora, config.dtype, config.device, config.activation_checkpointing)
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


def _first_adapter(config: EnvConfig, base: BaseModel) -> torch.Tensor:
    """Return the adapter that every episode begins from: the one to go on from, or a new one."""
    if config.adapter is None:
        return base.initial_parameters(config.seed_model)
    return read_adapter(Path(config.adapter), base)


def _learner(
    config: EnvConfig, base: BaseModel, pool: EncodedRows, splits: dict[Split, EvaluationSet], first: torch.Tensor
) -> LoraLearner:
    settings = UpdateSettings(
        config.learning_rate, config.weight_decay, config.max_grad_norm, config.micro_batch_tokens
    )
    return LoraLearner(base, pool, splits, settings, TrainingState.start(first))


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
    if config.columns.named() and not any(rows.uses_columns for rows in (pool, dev, test) if rows is not None):
        names = ", ".join(config.columns.named().values())
        raise SettingError(
            f"columns names {names}, but no first row of pool, dev or test has all of these; found "
            f"{', '.join(pool[0].fields)} in {pool.source}. Mend the names, or leave columns out."
        )
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
    return content


def _counts(data: Data, pool: EncodedRows, splits: dict[Split, EvaluationSet]) -> dict[str, dict[str, int]]:
    """Return what became of the rows on their way into tokens; see `Assets.counts`."""
    sources = {"pool": (data.pool, pool), "dev": (data.dev, splits["dev"].rows)}
    if data.test is not None:
        sources["test"] = (data.test, splits["test"].rows)
    counts = {}
    for name, (rows, encoded) in sources.items():
        num_left = int(encoded.has_labels.sum())  # an evaluation set holds no others
        counts[name] = {
            "rows": len(rows),
            "skipped": rows.num_skipped,
            "duplicates": rows.num_duplicates,
            "truncated": int((encoded.is_cut & encoded.has_labels).sum()),
            "left_out": len(rows) - num_left,
        }
    return counts


def _classes(auxiliary: _Auxiliary, features: StaticFeatures, offered: np.ndarray) -> np.ndarray:
    """Return the class of each row, from the cache or computed, shape (rows,), int64."""
    if isinstance(features, LazyFeatures):
        return features.classes
    num_rows, num_classes = len(offered), auxiliary.config.num_classes
    key = {
        **auxiliary.key,
        "num_classes": num_classes,
        "seed": FEATURE_SEED,
        "offered": hashlib.sha256(np.packbits(offered).tobytes()).hexdigest(),
    }
    # Kept not for K-means, which takes a moment, but for the import of scikit-learn, which takes a second.
    form = TableForm("classes", key, {"classes": Column("int64")}, num_rows, num_rows * 8)

    def blocks(first: int) -> Iterator[Block]:
        if first == 0:
            yield Block(num_rows, {"classes": _compute_classes(features, offered, num_classes)})

    table = stored_table(form, blocks, cache_folder(auxiliary.config.cache_dir), in_memory=True)
    return table.arrays["classes"]


def _compute_classes(features: StaticFeatures, offered: np.ndarray, num_classes: int) -> np.ndarray:
    classes = np.full(len(offered), -1, dtype=np.int64)
    rows = np.flatnonzero(offered)
    if len(rows) <= MAX_ROWS_IN_MEMORY:
        classes[rows] = kmeans_classes(features.rows(rows), num_classes, seed=FEATURE_SEED)
        return classes
    sample = np.sort(np.random.default_rng(FEATURE_SEED).choice(rows, MAX_ROWS_IN_MEMORY, replace=False))
    centres = kmeans_centres(features.rows(sample), num_classes, seed=FEATURE_SEED)
    for start in range(0, len(rows), FEATURE_BLOCK_ROWS):
        part = rows[start : start + FEATURE_BLOCK_ROWS]
        classes[part] = nearest_centres(features.rows(part), centres)
    return classes


def _encoded(config: EnvConfig, rows: Pool, encoder: Encoder, model: BaseModel, watcher: _Watcher) -> EncodedRows:
    return encoder.encode_pool(rows, model.content_hash, cache_folder(config.cache_dir), watcher)


# Features


@dataclass(frozen=True, eq=False)
class _Auxiliary:
    """The model that computes features, and the pool as it sees it."""

    config: EnvConfig
    model: BaseModel
    encoder: Encoder
    pool: Pool
    encoded: EncodedRows
    watcher: _Watcher
    is_trained: bool  # whether it is the model that is trained, and so begins where that does

    @functools.cached_property
    def warmed_up(self) -> tuple[torch.Tensor, int]:
        """The adapter that features are computed with, and the token forwards that it took."""
        ledger = Ledger()
        # Not from seed_model: the features are kept for all runs, and must not depend on which of them came first.
        first = dataclasses.replace(self.config, seed_model=FEATURE_SEED, adapter=self.adapter)
        learner = _learner(self.config, self.model, self.encoded, {}, _first_adapter(first, self.model))
        learner.ledger = ledger
        return _warmed_up(learner, self.config.num_auxiliary_updates), ledger.token_forwards

    @property
    def adapter(self) -> str | None:
        """The folder of the adapter that it begins with, where it does."""
        return self.config.adapter if self.is_trained else None

    @property
    def identity(self) -> dict[str, str | int]:
        """What decides what the columns mean: see `Assets.auxiliary`."""
        own = {} if self.adapter is None else {"adapter": content_hash(Path(self.adapter))}
        return {"model": self.model.content_hash, "updates": self.config.num_auxiliary_updates, **own}

    @property
    def key(self) -> dict[str, str | int | float]:
        """Everything that the features depend on."""
        return {
            "auxiliary": self.model.content_hash,
            **({} if self.adapter is None else {"adapter": content_hash(Path(self.adapter))}),
            "pool": self.pool.content_hash,
            **self.encoder.key,
            "max_length": self.encoder.max_length,
            "updates": self.config.num_auxiliary_updates,
            "lora": str(self.model.lora),
            "learning_rate": self.config.learning_rate,
            "device": self.model.device.type,
            "dtype": self.config.dtype,
            "schema": SCHEMA_VERSION,
        }

    def raw_rows(self, rows: np.ndarray, num_before: int = 0, total: int = 0) -> tuple[np.ndarray, int]:
        """Return the raw columns of some rows, computed together, and the token forwards that they took.

        Args:
            rows: Pool ids, shape (rows,).
            num_before: Rows done before, for the progress.
            total: Rows to do in all; 0: nobody is told.
        """
        done = 2 * num_before  # each row goes through the model twice

        def show(count: int) -> None:
            nonlocal done
            done += count
            if total:
                self.watcher("computing features", min(done // 2, total), total)

        adapter, _ = self.warmed_up
        pool, has_labels = self.encoded, self.encoded.has_labels[rows]
        raw = np.full((len(rows), NUM_STATIC), np.nan, dtype=np.float32)
        kept = rows[has_labels]
        if len(kept) == 0:
            return raw, 0
        responses = self.encoder.encode_responses([self.pool[int(row)] for row in kept])
        log_p, semantic = _scan(self.model, adapter, pool, kept, show)
        raw[has_labels, 0] = np.log1p((pool.lengths - pool.label_counts)[kept])
        raw[has_labels, 1] = np.log1p(pool.label_counts[kept])
        raw[has_labels, 2], raw[has_labels, 4:] = log_p, semantic
        raw[has_labels, 3] = _log_probabilities(self.model, adapter, responses, np.arange(len(kept)), show)
        return raw, int(pool.lengths[kept].sum() + responses.lengths.sum())

    def blocks(self, groups: list[np.ndarray], num_groups: int, first: int) -> Iterator[Block]:
        """Yield the raw columns of groups of rows from a row on, so many groups in a block, each computed by itself."""
        ends = np.cumsum([len(rows) for rows in groups])
        for start in range(0, len(groups), num_groups):
            part = range(start, min(start + num_groups, len(groups)))
            if ends[part[-1]] <= first:
                continue
            computed = [self.raw_rows(groups[g], int(ends[g]) - len(groups[g]), int(ends[-1])) for g in part]
            raw = np.concatenate([own for own, _ in computed])
            num_tokens = sum(tokens for _, tokens in computed) + (self.warmed_up[1] if start == 0 else 0)
            yield Block(len(raw), {"raw": raw}, {"num_tokens": num_tokens})


def _auxiliary(
    config: EnvConfig, rows: Pool, encoder: Encoder, pool: EncodedRows, base: BaseModel, watcher: _Watcher
) -> _Auxiliary:
    if config.auxiliary_model is None or config.auxiliary_model == config.model:
        return _Auxiliary(config, base, encoder, rows, pool, watcher, is_trained=True)
    model = _shared_base(config, config.auxiliary_model, config.lora)
    own = Encoder(model.tokenizer, _max_length(config, model), config.template)
    return _Auxiliary(config, model, own, rows, _encoded(config, rows, own, model, watcher), watcher, is_trained=False)


def _features(auxiliary: _Auxiliary) -> StaticFeatures:
    num_rows = len(auxiliary.pool)
    if not auxiliary.config.lazy_features:
        groups = _groups(np.arange(num_rows), FEATURE_BLOCK_ROWS)
        raw, num_tokens = _stored_raw("features", auxiliary, groups, 1, in_memory=not auxiliary.pool.is_large)
        return standardise(raw, num_tokens)
    order = random_order(num_rows)
    groups = _groups(sample_of(order), GROUP_ROWS)
    raw, num_tokens = _stored_raw("features-sample", auxiliary, groups, _GROUPS_AT_ONCE, in_memory=True)
    return LazyFeatures(order, auxiliary.raw_rows, raw, num_tokens, auxiliary.config.num_classes)


def _groups(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _stored_raw(
    name: str, auxiliary: _Auxiliary, groups: list[np.ndarray], num_groups: int, *, in_memory: bool
) -> tuple[np.ndarray, int]:
    """Return the raw columns of groups of rows, from the cache or computed, and the token forwards that they took."""
    num_rows = sum(len(rows) for rows in groups)
    form = TableForm(name, auxiliary.key, {"raw": Column("float32", NUM_STATIC)}, num_rows, num_rows * NUM_STATIC * 4)
    table = stored_table(
        form,
        lambda first: auxiliary.blocks(groups, num_groups, first),
        cache_folder(auxiliary.config.cache_dir),
        in_memory=in_memory,
    )
    return table.arrays["raw"], table.counts["num_tokens"]


def _warmed_up(learner: LoraLearner, num_updates: int) -> torch.Tensor:
    """Return an adapter trained on a few random rows, so that the auxiliary model knows what an answer looks like.

    The paper's auxiliary model is instruction-tuned; a bare base model tells right from wrong answers less well.
    """
    rng = np.random.default_rng(FEATURE_SEED)
    rows = np.flatnonzero(learner.pool.has_labels)
    for step in range(num_updates):
        batch = rng.choice(rows, min(AUXILIARY_BATCH_SIZE, len(rows)), replace=False)
        learner.update(batch, step / num_updates, seed=step)
    return learner.state.adapter


@torch.no_grad()
def _scan(
    auxiliary: BaseModel, adapter: torch.Tensor, rows: EncodedRows, chosen: np.ndarray, show: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's mean log-probability, shape (chosen,), and its pooled embedding, shape (chosen, 32)."""
    log_p = np.zeros(len(chosen), dtype=np.float32)
    semantic = np.zeros((len(chosen), NUM_SEMANTIC), dtype=np.float32)
    for places in token_batches(rows.lengths[chosen], FEATURE_BATCH_TOKENS):
        batch = collate(rows, chosen[places])
        losses, hidden = auxiliary.hidden_states(batch, adapter[None])
        log_p[places] = _row_means(losses, batch, rows.label_counts[chosen[places]])
        lengths = torch.from_numpy(rows.lengths[chosen[places]]).to(hidden.device)
        inside = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
        mean = (hidden * inside[..., None]).sum(1) / lengths[:, None]
        semantic[places] = torch.nn.functional.adaptive_avg_pool1d(mean[:, None], NUM_SEMANTIC)[:, 0].cpu().numpy()
        show(len(places))
    return log_p, semantic


@torch.no_grad()
def _log_probabilities(
    auxiliary: BaseModel, adapter: torch.Tensor, rows: EncodedRows, chosen: np.ndarray, show: Callable[[int], None]
) -> np.ndarray:
    """Return each row's mean log-probability, shape (chosen,)."""
    log_p = np.zeros(len(chosen), dtype=np.float32)
    for places in token_batches(rows.lengths[chosen], FEATURE_BATCH_TOKENS):
        batch = collate(rows, chosen[places])
        losses, _ = auxiliary.token_losses(batch, adapter[None])
        log_p[places] = _row_means(losses, batch, rows.label_counts[chosen[places]])
        show(len(places))
    return log_p


def _row_means(losses: torch.Tensor, batch: Batch, label_counts: np.ndarray) -> np.ndarray:
    """Return minus the mean of each row's label losses, shape (rows,)."""
    owners = torch.nonzero(batch.is_label, as_tuple=True)[0].to(losses.device)
    sums = torch.zeros(len(label_counts), device=losses.device).index_add(0, owners, losses)
    return np.asarray(-(sums.cpu().numpy() / label_counts))
