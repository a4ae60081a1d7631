"""What environments share: pool, dev and test, the base model, features and classes, loaded once a process.

Nothing here changes during an episode. Two environments that ask for the same model and data get the same
objects, so that eight of them cost one base model and eight adapters.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .base_model import BaseModel
from .config import EnvConfig, LoraSettings
from .encoding import Batch, EncodedRows, Encoder, collate, token_batches
from .errors import DataError
from .evaluation import EvaluationSet
from .features import NUM_FEATURES, NUM_SEMANTIC, StaticFeatures, cache_folder, cached_features
from .learner import LoraLearner, TrainingState, UpdateSettings
from .learner_protocol import Ledger, Split
from .pool import Pool, check_disjoint, check_enough, kmeans_classes, read_pool, sample_rows
from .rewards import Evaluation

__all__ = ["Assets", "Data", "load_assets", "load_data"]

logger = logging.getLogger(__name__)

#: Tokens of one forward pass of the auxiliary model, padding included.
FEATURE_BATCH_TOKENS = 4096

#: The paper does not say how the auxiliary model was made ready, or in what feature space K-means ran: fixed here.
AUXILIARY_BATCH_SIZE = 8
FEATURE_SEED = 0

#: When each file of a configuration was written, and its size.
Stamps = tuple[tuple[int, int] | None, ...]

#: The base models in use. Weak: one that no assets hold is let go, and two assets never hold two of a kind.
_BASES: weakref.WeakValueDictionary[tuple[str, LoraSettings, str, str, bool], BaseModel] = weakref.WeakValueDictionary()


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """The three sets of rows, as text. `test` is None where there is none."""

    pool: Pool
    dev: Pool
    test: Pool | None


@dataclass(frozen=True, slots=True, eq=False)
class Assets:
    """Everything that an environment reads and never writes.

    Attributes:
        data: The rows as text.
        features: The static columns of every pool row.
        classes: K-means class of every pool row, shape (rows,), int64; -1 for rows that are never offered because
            nothing of their response is left within `max_length`.
        members: The pool ids of each class.
        learner: A learner at its initial state; each environment takes a copy.
        base_evaluation: Dev scores before any update.
        pool_tokens: Tokens of the whole pool, each row once.
        content: Content hashes by the names "model", "pool", "dev", "test".
    """

    data: Data
    features: StaticFeatures
    classes: np.ndarray
    members: tuple[np.ndarray, ...]
    learner: LoraLearner
    base_evaluation: Evaluation
    pool_tokens: int
    content: dict[str, str]

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
    data = _cached_data(config.shared_part(), _stamps(config))
    if config.num_candidates != "all":
        check_enough(len(data.pool), config.num_candidates)
    return data


def load_assets(config: EnvConfig) -> Assets:
    """Return the assets that a configuration asks for; the last few are kept.

    Raises:
        DataError: As `load_data`, or nothing of any row's response fits into `max_length`.
        ModelError: A model cannot be loaded.
        SettingError: As `load_data`.
    """
    load_data(config)  # bad rows, or too few, are told before anything is computed
    return _cached_assets(config.shared_part(), _stamps(config))


def _stamps(config: EnvConfig) -> Stamps:
    return tuple(_stamp(path) for path in (config.pool, config.dev, config.test))


def _stamp(path: str | None) -> tuple[int, int] | None:
    """Return what changes when a file does."""
    if path is None or not Path(path).is_file():
        return None
    status = Path(path).stat()
    return status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=1)
def _cached_data(config: EnvConfig, _stamps: Stamps) -> Data:
    return _embedded_data(config) if config.pool is None else _read_data(config)


@functools.lru_cache(maxsize=4)
def _cached_assets(config: EnvConfig, _stamps: Stamps) -> Assets:
    data = _cached_data(config, _stamps)
    base = _shared_base(config, config.model)
    encoder = Encoder(base.tokenizer, _max_length(config, base), config.template)
    pool = encoder.encode(data.pool, what="pool")
    splits: dict[Split, EvaluationSet] = {"dev": EvaluationSet.build(data.dev, encoder, "dev")}
    if data.test is not None:
        splits["test"] = EvaluationSet.build(data.test, encoder, "test")
    if not pool.has_labels.any():
        raise DataError(f"{data.pool.source}: no response fits into max_length={encoder.max_length}; raise it.")
    features = _features(config, data.pool, encoder, pool, base)
    classes = _classes(features, pool.has_labels, config.num_classes)
    learner = _learner(config, base, pool, splits)
    return Assets(
        data=data,
        features=features,
        classes=classes,
        members=tuple(np.flatnonzero(classes == label) for label in range(config.num_classes)),
        learner=learner,
        base_evaluation=learner.evaluate("dev"),
        pool_tokens=int(pool.lengths[pool.has_labels].sum()),
        content=_content(base, data),
    )


def _shared_base(config: EnvConfig, source: str) -> BaseModel:
    """Return the base model; as long as anything uses it, all get the same."""
    key = (source, config.lora, config.dtype, config.device, config.activation_checkpointing)
    base = _BASES.get(key)
    if base is None:
        base = _BASES[key] = BaseModel(
            source,
            config.lora,
            dtype=config.dtype,
            device=config.device,
            activation_checkpointing=config.activation_checkpointing,
        )
    return base


def _learner(config: EnvConfig, base: BaseModel, pool: EncodedRows, splits: dict[Split, EvaluationSet]) -> LoraLearner:
    settings = UpdateSettings(
        config.learning_rate, config.weight_decay, config.max_grad_norm, config.micro_batch_tokens
    )
    initial = TrainingState.start(base.initial_parameters(config.seed_model))
    return LoraLearner(base, pool, splits, settings, initial)


def _embedded_data(config: EnvConfig) -> Data:
    from .tiny.task import generate_task

    task = generate_task(config.task, seed=config.task_seed, pool_size=config.pool_size)
    return Data(task.pool, _sampled(task.dev, config.num_dev), _sampled(task.test, config.num_test))


def _read_data(config: EnvConfig) -> Data:
    assert config.pool is not None
    assert config.dev is not None
    pool = read_pool(config.pool, skip_empty=config.skip_empty)
    dev = _sampled(read_pool(config.dev, skip_empty=config.skip_empty), config.num_dev)
    test = None
    if config.test is not None:
        test = _sampled(read_pool(config.test, skip_empty=config.skip_empty), config.num_test)
    if not config.allow_overlap:
        check_disjoint(pool, dev, test)
    return Data(pool, dev, test)


def _sampled(rows: Pool, count: int | None) -> Pool:
    return rows if count is None else sample_rows(rows, count, seed=FEATURE_SEED)


def _max_length(config: EnvConfig, base: BaseModel) -> int:
    return min(config.max_length, base.max_positions or config.max_length)


def _content(base: BaseModel, data: Data) -> dict[str, str]:
    content = {"model": base.content_hash, "pool": data.pool.content_hash, "dev": data.dev.content_hash}
    return content if data.test is None else {**content, "test": data.test.content_hash}


def _classes(features: StaticFeatures, offered: np.ndarray, num_classes: int) -> np.ndarray:
    classes = np.full(len(offered), -1, dtype=np.int64)
    classes[offered] = kmeans_classes(features.columns[offered], num_classes, seed=FEATURE_SEED)
    return classes


def _features(config: EnvConfig, rows: Pool, encoder: Encoder, pool: EncodedRows, base: BaseModel) -> StaticFeatures:
    auxiliary, auxiliary_encoder = base, encoder
    if config.auxiliary_model is not None and config.auxiliary_model != config.model:
        auxiliary = _shared_base(config, config.auxiliary_model)
        auxiliary_encoder = Encoder(auxiliary.tokenizer, _max_length(config, auxiliary), config.template)
        pool = auxiliary_encoder.encode(rows, what="pool (for the auxiliary model)")
    key: dict[str, str | int | float] = {
        "auxiliary": auxiliary.content_hash,
        "pool": rows.content_hash,
        "template": auxiliary_encoder.description,
        "max_length": auxiliary_encoder.max_length,
        "updates": config.num_auxiliary_updates,
        "lora": str(config.lora),
        "learning_rate": config.learning_rate,
        "device": auxiliary.device.type,
        "dtype": config.dtype,
    }

    def compute() -> tuple[np.ndarray, int]:
        responses = auxiliary_encoder.encode_responses(rows)
        return _compute_features(config, auxiliary, pool, responses)

    return cached_features(key, cache_folder(config.cache_dir), compute)


def _compute_features(
    config: EnvConfig, auxiliary: BaseModel, pool: EncodedRows, responses: EncodedRows
) -> tuple[np.ndarray, int]:
    ledger = Ledger()
    adapter = _warmed_up(config, auxiliary, pool, ledger)
    raw = np.full((len(pool), NUM_FEATURES - 3), np.nan, dtype=np.float32)
    kept = np.flatnonzero(pool.has_labels)
    raw[kept, 0] = np.log1p((pool.lengths - pool.label_counts)[kept])
    raw[kept, 1] = np.log1p(pool.label_counts[kept])
    logger.info("computing the features of %d rows", len(kept))
    raw[kept, 2], raw[kept, 4:] = _scan(auxiliary, adapter, pool, kept)
    raw[kept, 3] = _log_probabilities(auxiliary, adapter, responses, kept)
    ledger.forward_tokens += int(pool.lengths[kept].sum() + responses.lengths[kept].sum())
    return raw, ledger.token_forwards


def _warmed_up(config: EnvConfig, auxiliary: BaseModel, pool: EncodedRows, ledger: Ledger) -> torch.Tensor:
    """Return an adapter trained on a few random rows, so that the auxiliary model knows what an answer looks like.

    The paper's auxiliary model is instruction-tuned; a bare base model tells right from wrong answers less well.
    """
    # Not from seed_model: the features are kept for all runs, and must not depend on which of them came first.
    learner = _learner(dataclasses.replace(config, seed_model=FEATURE_SEED), auxiliary, pool, {})
    learner.ledger = ledger
    rng = np.random.default_rng(FEATURE_SEED)
    rows = np.flatnonzero(pool.has_labels)
    for step in range(config.num_auxiliary_updates):
        batch = rng.choice(rows, min(AUXILIARY_BATCH_SIZE, len(rows)), replace=False)
        learner.update(batch, step / config.num_auxiliary_updates, seed=step)
    return learner.state.adapter


@torch.no_grad()
def _scan(
    auxiliary: BaseModel, adapter: torch.Tensor, rows: EncodedRows, chosen: np.ndarray
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
    return log_p, semantic


@torch.no_grad()
def _log_probabilities(
    auxiliary: BaseModel, adapter: torch.Tensor, rows: EncodedRows, chosen: np.ndarray
) -> np.ndarray:
    """Return each row's mean log-probability, shape (chosen,)."""
    log_p = np.zeros(len(chosen), dtype=np.float32)
    for places in token_batches(rows.lengths[chosen], FEATURE_BATCH_TOKENS):
        batch = collate(rows, chosen[places])
        losses, _ = auxiliary.token_losses(batch, adapter[None])
        log_p[places] = _row_means(losses, batch, rows.label_counts[chosen[places]])
    return log_p


def _row_means(losses: torch.Tensor, batch: Batch, label_counts: np.ndarray) -> np.ndarray:
    """Return minus the mean of each row's label losses, shape (rows,)."""
    owners = torch.nonzero(batch.is_label, as_tuple=True)[0].to(losses.device)
    sums = torch.zeros(len(label_counts), device=losses.device).index_add(0, owners, losses)
    return np.asarray(-(sums.cpu().numpy() / label_counts))
