"""The 39 numbers that the paper gives every candidate (Lv et al. 2025, eq. 2-6), in the paper's order.

36 of them never change during a run: they are computed once for a pool by the auxiliary model, standardised
over that pool, clipped, and kept on disk. The other three, the two of the stage and the count of how often a
row was taken, are filled in at every step.

What the paper leaves open is this project's choice: lengths are logarithms of tokens; log-probabilities are
means per token; the embedding is the mean of the last hidden layer over the row's tokens, averaged over
neighbouring dimensions down to 32; the dev score is measured from its start, relative to it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .files import replaced

__all__ = [
    "BLOCKS",
    "CLIP",
    "FEATURE_NAMES",
    "NUM_FEATURES",
    "NUM_SEMANTIC",
    "SCHEMA_VERSION",
    "StaticFeatures",
    "cache_folder",
    "cached_features",
    "observation_bounds",
    "observe",
    "standardise",
]

NUM_SEMANTIC = 32

STAGE_NAMES = ("dev_score", "progress")
DIFFICULTY_NAMES = ("prompt_length", "response_length", "log_p_response_given_prompt", "log_p_response")
SEMANTIC_NAMES = tuple(f"semantic_{index}" for index in range(NUM_SEMANTIC))

#: Names of the observation's columns, in order.
FEATURE_NAMES = (*STAGE_NAMES, *DIFFICULTY_NAMES, *SEMANTIC_NAMES, "times_selected")

NUM_FEATURES = len(FEATURE_NAMES)

#: The columns of each part of the observation, by the names of `config.OBSERVATION_BLOCKS`.
BLOCKS = {"stage": slice(0, 2), "difficulty": slice(2, 6), "semantic": slice(6, 38), "availability": slice(38, 39)}

#: Standardised values further than this from the pool's mean are cut: the observation is bounded.
CLIP = 5.0

#: Counts up whenever the same pool and model would give other features.
SCHEMA_VERSION = 1

logger = logging.getLogger(__name__)

_STATIC = slice(2, 38)


@dataclass(frozen=True, slots=True, eq=False)
class StaticFeatures:
    """The columns that never change.

    Attributes:
        raw: Difficulty and semantic columns as computed, shape (rows, 36), float32; a row of NaN where nothing
            of the response is left to learn.
        columns: The same, standardised over the pool and clipped to [-CLIP, CLIP], shape (rows, 36), float32;
            zeros where raw is NaN.
        mean: What was subtracted, shape (36,), float32.
        std: What was divided by, shape (36,), float32.
        num_tokens: Token forwards that computing them took, a forward and backward counted as 3.
    """

    raw: np.ndarray
    columns: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    num_tokens: int

    @property
    def log_p_response_given_prompt(self) -> np.ndarray:
        """Mean log-probability of each response after its prompt, nats per token, shape (rows,)."""
        return self.raw[:, 2]

    @property
    def log_p_response(self) -> np.ndarray:
        """Mean log-probability of each response by itself, nats per token, shape (rows,)."""
        return self.raw[:, 3]


def standardise(raw: np.ndarray, num_tokens: int) -> StaticFeatures:
    """Standardise raw columns, shape (rows, 36), over the rows that have them, and clip."""
    mean = np.asarray(np.nanmean(raw, axis=0, dtype=np.float64), dtype=np.float32)
    std = np.asarray(np.nanstd(raw, axis=0, dtype=np.float64), dtype=np.float32)
    # A column that is the same in every row says nothing: it becomes zeros.
    std = np.where(std > 1e-6, std, np.float32(1.0))
    columns = np.nan_to_num(((raw - mean) / std).clip(-CLIP, CLIP), nan=0.0)
    return StaticFeatures(raw, columns.astype(np.float32), mean, std, num_tokens)


def observation_bounds(num_candidates: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and highest observation, each of shape (num_candidates, 39), float32."""
    low = np.full((num_candidates, NUM_FEATURES), -CLIP, dtype=np.float32)
    high = np.full((num_candidates, NUM_FEATURES), CLIP, dtype=np.float32)
    low[:, 1], high[:, 1] = 0.0, 1.0
    low[:, -1] = 0.0
    return low, high


def observe(
    static: StaticFeatures,
    candidates: np.ndarray,
    counts: np.ndarray,
    *,
    dev_score: float,
    first_dev_score: float,
    progress: float,
    hide: Sequence[str] = (),
) -> np.ndarray:
    """Return a new observation, shape (candidates, 39), float32.

    Args:
        static: The pool's static columns.
        candidates: Pool ids offered, -1 for padding, shape (candidates,); padding rows are zeros.
        counts: How often each pool row was trained on in this episode, shape (rows,).
        dev_score: P of the model as it is.
        first_dev_score: P before any update; the column holds the gain since then relative to its size.
        progress: Share of the horizon behind, t/T, from 0 to 1.
        hide: Names of `BLOCKS` whose columns are shown as zeros.
    """
    observation = np.empty((len(candidates), NUM_FEATURES), dtype=np.float32)
    observation[:, 0] = np.clip((dev_score - first_dev_score) / max(abs(first_dev_score), 0.1), -CLIP, CLIP)
    observation[:, 1] = progress
    observation[:, _STATIC] = static.columns[candidates]
    observation[:, -1] = np.log1p(counts[candidates]).clip(max=CLIP)
    for name in hide:
        observation[:, BLOCKS[name]] = 0.0
    observation[candidates < 0] = 0.0
    return observation


def cache_folder(cache_dir: str | None) -> Path:
    """Return where features are kept: as asked, else $RAISE_ENV_CACHE, else the user's cache folder."""
    if cache_dir is not None:
        return Path(cache_dir)
    if "RAISE_ENV_CACHE" in os.environ:
        return Path(os.environ["RAISE_ENV_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "raise-env"


def cached_features(
    key: dict[str, str | int | float], folder: Path, compute: Callable[[], tuple[np.ndarray, int]]
) -> StaticFeatures:
    """Return features from the cache, or compute and keep them.

    A file that is torn or foreign is named in the log and replaced; a folder that cannot be written costs
    only the time saved.

    Args:
        key: Everything that the features depend on.
        folder: The cache.
        compute: Gives the raw columns, shape (rows, 36), float32, and the token forwards that they took.
    """
    digest = hashlib.sha256(json.dumps({**key, "schema": SCHEMA_VERSION}, sort_keys=True).encode()).hexdigest()
    path = folder / f"features-{digest[:32]}.safetensors"
    stored = _read(path, digest)
    if stored is not None:
        return standardise(*stored)
    raw, num_tokens = compute()
    _write(path, digest, raw, num_tokens)
    return standardise(raw, num_tokens)


def _read(path: Path, digest: str) -> tuple[np.ndarray, int] | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            raw = file.get_tensor("raw")
        whole = metadata.get("key") == digest and metadata.get("sha256") == _checksum(raw)
        if whole and raw.dtype == np.float32 and raw.ndim == 2 and raw.shape[1] == NUM_FEATURES - 3:
            return raw, int(metadata["num_tokens"])
        reason = "its content does not match its name"
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        reason = str(error)
    logger.warning("cached features %s cannot be used (%s); computing them again", path, reason)
    return None


def _write(path: Path, digest: str, raw: np.ndarray, num_tokens: int) -> None:
    metadata = {"key": digest, "sha256": _checksum(raw), "num_tokens": str(num_tokens)}
    try:
        with replaced(path) as beside:
            save_file({"raw": raw}, beside, metadata=metadata)
    except OSError as error:
        logger.warning("features cannot be kept in %s (%s); they will be computed again next time", path.parent, error)


def _checksum(raw: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(raw).tobytes()).hexdigest()
