"""The auxiliary model: it computes the columns that never change, once for a pool, and from them come the classes.

Both are kept in the cache under all that they depend on. The auxiliary model is another one by name, or the model that
is trained itself, made ready by a few updates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .adapter_files import content_hash, first_adapter, read_adapter
from .base_model import BaseModel, own_modes
from .config import EnvConfig
from .encoding import Batch, EncodedRows, Encoder, collate, token_batches
from .errors import ModelError
from .features import NUM_SEMANTIC, NUM_STATIC, SCHEMA_VERSION, LoadingProgress, StaticFeatures, standardise
from .lazy import GROUP_ROWS, LazyFeatures, random_order, sample_of
from .learner import LoraLearner, TrainingState, UpdateSettings
from .learner_protocol import Ledger
from .pool import MAX_ROWS_IN_MEMORY, Pool, kmeans_centres, kmeans_classes, nearest_centres
from .side_by_side import one_thread, one_thread_each
from .store import Block, Column, TableForm, cache_folder, stored_table

__all__ = [
    "FEATURE_BATCH_TOKENS",
    "FEATURE_SEED",
    "Auxiliary",
    "adapter_of",
    "classes_of",
    "features_of",
    "identity_of",
]

logger = logging.getLogger(__name__)

#: Tokens of one forward pass, padding included.
FEATURE_BATCH_TOKENS = 4096

#: Logits of one forward pass on a processor, where a pass runs in each thread: 256 MB of float32.
_LOGITS_OF_A_THREAD = 2**26

#: Rows whose features are computed, sorted by length, and written to disk together.
FEATURE_BLOCK_ROWS = 32_768

#: Groups of a lazy pool's sample that are written to disk together.
_GROUPS_AT_ONCE = 16

#: The paper does not say how the auxiliary model was made ready, or in what feature space K-means ran: fixed here.
AUXILIARY_BATCH_SIZE = 8
FEATURE_SEED = 0


@dataclass(frozen=True, eq=False)
class Auxiliary:
    """The model that computes features, and the pool as it sees it."""

    config: EnvConfig
    model: BaseModel
    encoder: Encoder
    pool: Pool
    encoded: EncodedRows
    watcher: LoadingProgress
    is_trained: bool  # whether it is the model that is trained, and so begins where that does

    @functools.cached_property
    def warmed_up(self) -> tuple[torch.Tensor, int]:
        """The adapter that features are computed with, and the token forwards that it took."""
        if self.config.auxiliary_adapter is not None:
            return read_adapter(Path(self.config.auxiliary_adapter), self.model), 0
        ledger = Ledger()
        # Not from seed_model: the features are kept for all runs, and must not depend on which of them came first.
        first = dataclasses.replace(self.config, seed_model=FEATURE_SEED, adapter=self.adapter)
        start = TrainingState.start(first_adapter(first, self.model))
        learner = LoraLearner(self.model, self.encoded, {}, UpdateSettings.of(self.config), start)
        learner.ledger = ledger
        with one_thread() if self._is_in_one_thread else contextlib.nullcontext():
            adapter = _warmed_up(learner, self.config.num_auxiliary_updates)
        num_tokens = ledger.token_forwards
        if not _is_sound(learner):
            logger.warning(
                "with learning_rate=%g the auxiliary model diverged in its %d updates; features come without them",
                self.config.learning_rate,
                self.config.num_auxiliary_updates,
            )
            adapter = start.adapter
        return adapter, num_tokens

    @property
    def _is_in_one_thread(self) -> bool:
        """Whether each piece of the work keeps to one thread, so that its digits do not depend on their number."""
        return self.model.stackable and self.model.device.type == "cpu"

    @property
    def adapter(self) -> str | None:
        """The folder of the adapter that it begins with, where it does."""
        return adapter_of(self.config, is_trained=self.is_trained)

    @property
    def identity(self) -> dict[str, str | int]:
        """What decides what the columns mean: see `Assets.auxiliary`."""
        return identity_of(self.config, self.model, self.adapter)

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
            **self._own_training,
            "device": self.model.device.type,
            "threads": 1 if self._is_in_one_thread else torch.get_num_threads(),
            "dtype": self.config.dtype,
            "schema": SCHEMA_VERSION,
        }

    @property
    def _own_training(self) -> dict[str, float]:
        """How the updates before are made otherwise than by default, where there are any."""
        if not self.config.num_auxiliary_updates:
            return {}
        own, usual = (dataclasses.asdict(UpdateSettings.of(config)) for config in (self.config, EnvConfig()))
        return {name: value for name, value in own.items() if value != usual[name] and name != "learning_rate"}

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter that features are computed with, in PEFT's form: what `auxiliary_adapter` takes."""
        self.model.save_adapter(self.warmed_up[0], folder)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's form of a model card, with nothing filled in

    @own_modes()
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

        pool, has_labels = self.encoded, self.encoded.has_labels[rows]
        raw = np.full((len(rows), NUM_STATIC), np.nan, dtype=np.float32)
        kept = rows[has_labels]
        if len(kept) == 0:
            return raw, 0
        responses = self.encoder.encode_responses([self.pool[int(row)] for row in kept])
        seen = self._passes(pool, kept, _embedded, show)
        alone = self._passes(responses, np.arange(len(kept)), _scored, show)
        raw[has_labels, 0] = np.log1p((pool.lengths - pool.label_counts)[kept])
        raw[has_labels, 1] = np.log1p(pool.label_counts[kept])
        raw[has_labels, 2], raw[has_labels, 4:] = seen[:, 0], seen[:, 1:]
        raw[has_labels, 3] = alone[:, 0]
        if not np.isfinite(raw[has_labels]).all():
            row = int(kept[~np.isfinite(raw[has_labels]).all(axis=1)][0])
            raise ModelError(
                f"auxiliary model {self.config.auxiliary_model or self.config.model!r}: the features of pool row {row} "
                "are not finite. Weights that are NaN or infinite do that, or a dtype that they do not fit into."
            )
        return raw, int(pool.lengths[kept].sum() + responses.lengths.sum())

    def _passes(
        self, encoded: EncodedRows, rows: np.ndarray, look: Callable[..., np.ndarray], show: Callable[[int], None]
    ) -> np.ndarray:
        """Return what a look at each row through the model tells, shape (rows, numbers)."""
        adapter, _ = self.warmed_up
        limit = FEATURE_BATCH_TOKENS
        if self.model.device.type == "cpu":
            limit = min(limit, max(1, _LOGITS_OF_A_THREAD // self.model.num_words))
        batches = token_batches(encoded.lengths[rows], limit)
        tasks = [functools.partial(look, self.model, adapter, encoded, rows[places]) for places in batches]
        found = one_thread_each(tasks) if self._is_in_one_thread else (task() for task in tasks)
        told: list[np.ndarray] = []
        for part in found:
            told.append(part)
            show(len(part))
        return np.concatenate(told)[np.argsort(np.concatenate(batches))]

    def blocks(self, groups: list[np.ndarray], num_groups: int, first: int) -> Iterator[Block]:
        """Yield the raw columns of groups of rows from a row on, so many groups in a block, each computed by itself."""
        ends = np.cumsum([len(rows) for rows in groups])
        for start in range(0, len(groups), num_groups):
            part = range(start, min(start + num_groups, len(groups)))
            if ends[part[-1]] <= first:
                continue
            begun = time.perf_counter()
            computed = [self.raw_rows(groups[g], int(ends[g]) - len(groups[g]), int(ends[-1])) for g in part]
            raw = np.concatenate([own for own, _ in computed])
            num_tokens = sum(tokens for _, tokens in computed) + (self.warmed_up[1] if start == 0 else 0)
            milliseconds = round(1000 * (time.perf_counter() - begun))
            yield Block(len(raw), {"raw": raw}, {"num_tokens": num_tokens, "milliseconds": milliseconds})


def adapter_of(config: EnvConfig, *, is_trained: bool) -> str | None:
    """Return the folder of the adapter that an auxiliary model begins with, or None where it has a new one.

    Args:
        config: The settings.
        is_trained: Whether the auxiliary model is the one that is trained.
    """
    if config.auxiliary_adapter is not None:
        return config.auxiliary_adapter
    return config.adapter if is_trained else None


def identity_of(config: EnvConfig, model: BaseModel, adapter: str | None) -> dict[str, str | int]:
    """Return what decides what the columns mean: the model, its updates before, and the adapter that it begins with."""
    own = {} if adapter is None else {"adapter": content_hash(Path(adapter))}
    return {"model": model.content_hash, "updates": config.num_auxiliary_updates, **own}


def features_of(auxiliary: Auxiliary) -> StaticFeatures:
    """Return the columns that never change, from the cache or computed; lazy ones where they are asked for.

    Raises:
        OutputError: The pool is large, and the cache folder cannot be written or has too little room.
    """
    num_rows = len(auxiliary.pool)
    if not auxiliary.config.lazy_features:
        groups = _groups(np.arange(num_rows), FEATURE_BLOCK_ROWS)
        raw, counts = _stored_raw("features", auxiliary, groups, 1, in_memory=not auxiliary.pool.is_large)
        return standardise(raw, counts["num_tokens"], counts["milliseconds"] / 1000)
    order = random_order(num_rows)
    groups = _groups(sample_of(order), GROUP_ROWS)
    raw, counts = _stored_raw("features-sample", auxiliary, groups, _GROUPS_AT_ONCE, in_memory=True)
    return LazyFeatures(
        order,
        auxiliary.raw_rows,
        raw,
        counts["num_tokens"],
        auxiliary.config.num_classes,
        counts["milliseconds"] / 1000,
    )


def classes_of(auxiliary: Auxiliary, features: StaticFeatures, offered: np.ndarray) -> np.ndarray:
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

    def check(arrays: Mapping[str, np.ndarray]) -> None:
        classes = arrays["classes"]
        if (offered != (classes >= 0)).any() or not (classes < num_classes).all():
            raise ValueError("it has other classes than there are")

    form = TableForm("classes", key, {"classes": Column("int64")}, num_rows, num_rows * 8, check=check)

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


def _groups(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _stored_raw(
    name: str, auxiliary: Auxiliary, groups: list[np.ndarray], num_groups: int, *, in_memory: bool
) -> tuple[np.ndarray, Mapping[str, int]]:
    """Return the raw columns of groups of rows, from the cache or computed, and what they took."""
    num_rows = sum(len(rows) for rows in groups)
    columns = {"raw": Column("float32", NUM_STATIC)}
    counts = ("num_tokens", "milliseconds")
    form = TableForm(name, auxiliary.key, columns, num_rows, num_rows * NUM_STATIC * 4, counts)
    table = stored_table(
        form,
        lambda first: auxiliary.blocks(groups, num_groups, first),
        cache_folder(auxiliary.config.cache_dir),
        in_memory=in_memory,
    )
    return table.arrays["raw"], table.counts


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


def _is_sound(learner: LoraLearner) -> bool:
    """Return whether the model as it is has a finite loss on a few rows; nothing is booked for it."""
    other = learner.copy()
    other.ledger = Ledger()
    losses = other.row_losses(np.flatnonzero(learner.pool.has_labels)[:AUXILIARY_BATCH_SIZE])
    return bool(np.isfinite(losses).all())


@torch.no_grad()  # which is of the thread
def _embedded(auxiliary: BaseModel, adapter: torch.Tensor, encoded: EncodedRows, rows: np.ndarray) -> np.ndarray:
    """Return each row's mean log-probability and its pooled embedding, shape (rows, 33)."""
    batch = collate(encoded, rows)
    losses, hidden = auxiliary.hidden_states(batch, adapter[None])
    lengths = torch.from_numpy(encoded.lengths[rows]).to(hidden.device)
    inside = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
    mean = (hidden * inside[..., None]).sum(1) / lengths[:, None]
    semantic = torch.nn.functional.adaptive_avg_pool1d(mean[:, None], NUM_SEMANTIC)[:, 0].cpu().numpy()
    return np.column_stack([_row_means(losses, batch, encoded.label_counts[rows]), semantic])


@torch.no_grad()  # which is of the thread
def _scored(auxiliary: BaseModel, adapter: torch.Tensor, encoded: EncodedRows, rows: np.ndarray) -> np.ndarray:
    """Return each row's mean log-probability, shape (rows, 1)."""
    batch = collate(encoded, rows)
    losses, _ = auxiliary.token_losses(batch, adapter[None])
    return _row_means(losses, batch, encoded.label_counts[rows])[:, None]


def _row_means(losses: torch.Tensor, batch: Batch, label_counts: np.ndarray) -> np.ndarray:
    """Return minus the mean of each row's label losses, shape (rows,)."""
    owners = torch.nonzero(batch.is_label, as_tuple=True)[0].to(losses.device)
    sums = torch.zeros(len(label_counts), device=losses.device).index_add(0, owners, losses)
    return np.asarray(-(sums.cpu().numpy() / label_counts))
