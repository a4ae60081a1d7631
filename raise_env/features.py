"""The 39 numbers that the paper gives every candidate (Lv et al. 2025, eq. 2-6), in the paper's order.

36 of them never change during a run: they are computed once for a pool by the auxiliary model, kept on disk, and
standardised over that pool and clipped where they are shown. The other three, the two of the stage and the count of
how often a row was taken, are filled in at every step.

What the paper leaves open is this project's choice: lengths are logarithms of tokens; log-probabilities are
means per token; the embedding is the mean of the last hidden layer over the row's tokens, averaged over
neighbouring dimensions down to 32; the dev score is measured from its start, relative to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

__all__ = [
    "BLOCKS",
    "CLIP",
    "FEATURE_NAMES",
    "LoadingProgress",
    "NUM_FEATURES",
    "NUM_SEMANTIC",
    "NUM_STATIC",
    "SCHEMA_VERSION",
    "STATIC",
    "StaticFeatures",
    "frame",
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

#: Columns that never change: difficulty and semantic.
NUM_STATIC = NUM_FEATURES - 3
STATIC = slice(2, 2 + NUM_STATIC)

#: The columns of each part of the observation, by the names of `config.OBSERVATION_BLOCKS`.
BLOCKS = {"stage": slice(0, 2), "difficulty": slice(2, 6), "semantic": slice(6, 38), "availability": slice(38, 39)}

#: Standardised values further than this from the pool's mean are cut: the observation is bounded.
CLIP = 5.0

#: Counts up whenever the same pool and model would give other features.
SCHEMA_VERSION = 2

#: Is told what is being done, how much of it is done, and how much there is to do.
LoadingProgress = Callable[[str, int, int], None]

#: Rows whose moments are computed at once: beyond it they are put together from those of the parts.
_ROWS_AT_ONCE = 32_768


class StaticFeatures:
    """The columns that never change, of every row of a pool.

    Args:
        raw: Difficulty and semantic columns as computed, shape (rows, 36), float32; a row of NaN where nothing
            of the response is left to learn. May be memory-mapped: rows are read where they are asked for.
        mean: What is subtracted, shape (36,), float32.
        std: What is divided by, shape (36,), float32.
        num_tokens: Token forwards that computing them took, a forward and backward counted as 3.
        seconds: Time that it took, on the machine that did it.
    """

    def __init__(
        self, raw: np.ndarray, mean: np.ndarray, std: np.ndarray, num_tokens: int, seconds: float = 0.0
    ) -> None:
        self._raw = raw
        self.mean = mean
        self.std = std
        self._num_tokens = num_tokens
        self._seconds = seconds

    @property
    def raw(self) -> np.ndarray:
        """The columns as computed, shape (rows, 36), float32."""
        return self._raw

    @property
    def num_tokens(self) -> int:
        """Token forwards that computing them took, a forward and backward counted as 3."""
        return self._num_tokens

    @property
    def seconds(self) -> float:
        """Time that computing them took, also where they come from the cache."""
        return self._seconds

    @property
    def columns(self) -> np.ndarray:
        """All rows as they are shown, shape (pool, 36), float32: a new array, as large as `raw`."""
        return self._shown(self.raw)

    @property
    def log_p_response_given_prompt(self) -> np.ndarray:
        """Mean log-probability of each response after its prompt, nats per token, shape (rows,)."""
        return self.raw[:, 2]

    @property
    def log_p_response(self) -> np.ndarray:
        """Mean log-probability of each response by itself, nats per token, shape (rows,)."""
        return self.raw[:, 3]

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Return rows as they are shown: standardised over the pool and clipped to [-CLIP, CLIP].

        Args:
            ids: Pool ids, of any shape (...).

        Returns:
            Shape (..., 36), float32; zeros where raw is NaN.
        """
        return self._shown(self._raw_rows(ids))

    def _raw_rows(self, ids: np.ndarray) -> np.ndarray:
        return np.asarray(self.raw[ids])

    def _shown(self, raw: np.ndarray) -> np.ndarray:
        columns = np.nan_to_num(((raw - self.mean) / self.std).clip(-CLIP, CLIP), nan=0.0)
        return np.asarray(columns, dtype=np.float32)


def standardise(raw: np.ndarray, num_tokens: int, seconds: float = 0.0) -> StaticFeatures:
    """Return features of raw columns, shape (rows, 36), with mean and deviation over the rows that have them."""
    mean, std = _moments(raw[start : start + _ROWS_AT_ONCE] for start in range(0, len(raw), _ROWS_AT_ONCE))
    # A column that is the same in every row says nothing: it becomes zeros.
    return StaticFeatures(raw, mean, np.where(std > 1e-6, std, np.float32(1.0)), num_tokens, seconds)


def _moments(parts: Iterator[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each column over all parts, each of shape (36,), float32.

    Parts are put together as in Chan, Golub and LeVeque 1983, "Algorithms for Computing the Sample Variance"; a single
    one is what NumPy makes of it.
    """
    count: np.ndarray = np.zeros(NUM_STATIC)
    mean: np.ndarray = np.zeros(NUM_STATIC)
    variance: np.ndarray = np.zeros(NUM_STATIC)
    for part in parts:
        own_count = (~np.isnan(part)).sum(axis=0)
        if not own_count.all():
            continue
        own_mean = np.asarray(np.nanmean(part, axis=0, dtype=np.float64))
        own_variance = np.asarray(np.nanvar(part, axis=0, dtype=np.float64))
        total = count + own_count
        share, gap = own_count / total, own_mean - mean
        mean = own_mean if not count.any() else mean + gap * share
        between = gap**2 * share * (1 - share)
        variance = own_variance if not count.any() else variance * (1 - share) + own_variance * share + between
        count = total
    return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)


def observation_bounds(num_candidates: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and highest observation, each of shape (num_candidates, 39), float32."""
    low = np.full((num_candidates, NUM_FEATURES), -CLIP, dtype=np.float32)
    high = np.full((num_candidates, NUM_FEATURES), CLIP, dtype=np.float32)
    low[:, 1], high[:, 1] = 0.0, 1.0
    low[:, -1] = 0.0
    return low, high


def frame(static: StaticFeatures, candidates: np.ndarray, hide: Sequence[str] = ()) -> np.ndarray:
    """Return an observation without what changes from step to step, shape (candidates, 39), float32.

    Args:
        static: The pool's static columns.
        candidates: Pool ids offered, -1 for padding, shape (candidates,); padding rows are zeros.
        hide: Names of `BLOCKS` whose columns are shown as zeros.
    """
    still = np.zeros((len(candidates), NUM_FEATURES), dtype=np.float32)
    is_row = candidates >= 0
    still[is_row, STATIC] = static.rows(candidates[is_row])
    for name in hide:
        still[:, BLOCKS[name]] = 0.0
    return still


def observe(
    still: np.ndarray,
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
        still: What `frame` gives for the same candidates and `hide`; it stays as it is.
        candidates: As for `frame`.
        counts: How often each pool row was trained on in this episode, shape (rows,).
        dev_score: P of the model as it is.
        first_dev_score: P before any update; the column holds the gain since then relative to its size.
        progress: Share of the horizon behind, t/T, from 0 to 1.
        hide: As for `frame`.
    """
    observation = still.copy()
    is_row = candidates >= 0
    if "stage" not in hide:
        gain = np.clip((dev_score - first_dev_score) / max(abs(first_dev_score), 0.1), -CLIP, CLIP)
        observation[:, 0] = np.where(is_row, gain, 0.0)
        observation[:, 1] = np.where(is_row, progress, 0.0)
    if "availability" not in hide:
        observation[:, -1] = np.where(is_row, np.log1p(counts[candidates]).clip(max=CLIP), 0.0)
    return observation
