"""Features and classes of the rows that are drawn, and of no others: for pools whose features would take too long.

Decisions:
    The pool is put into a random order, the same for every run, and cut into groups of `GROUP_ROWS`. A group goes
    through the auxiliary model together and by itself: what a row's features are, to the bit, depends on the row and
    its group, and never on what was drawn before. A batch of what happens to be wanted would make them depend on it.

    Candidates are drawn by group, so that nothing is computed in vain. Rows of one group come together again only
    where the group does, which in a large pool is rare.

    Mean, deviation and the centres of the classes come from the first groups in that order, a fixed random sample.
    A row's class is its nearest centre.

    What a run's features cost is what they would have cost it alone: those of the sample and of all groups that it
    asked for, also where an earlier run of the process had them computed. So it does not depend on the order of runs.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping

import numpy as np

from .errors import SettingError
from .features import NUM_STATIC, StaticFeatures, standardise
from .pool import kmeans_centres, nearest_centres

__all__ = ["GROUP_ROWS", "SAMPLE_ROWS", "FeatureUse", "LazyFeatures", "random_order", "sample_of"]

#: Rows that are computed together. More of them make better use of a GPU, and more rows that are not needed.
GROUP_ROWS = 16

#: Rows that mean, deviation and classes come from; a multiple of a group.
SAMPLE_ROWS = 4096

#: A step draws at most so many times the candidates that it offers: a class that is rarer stays short.
MAX_DRAWS = 4

#: What the order of the pool and the first centres are drawn from.
_SEED = 0


def random_order(num_rows: int) -> np.ndarray:
    """Return the order in which a pool of so many rows is cut into groups, shape (pool,), int64."""
    return np.random.default_rng(_SEED).permutation(num_rows)


def sample_of(order: np.ndarray) -> np.ndarray:
    """Return the pool ids of the fixed sample: `SAMPLE_ROWS`, or all where there are fewer."""
    return order[:SAMPLE_ROWS]


class LazyFeatures(StaticFeatures):
    """The columns that never change, computed when they are asked for and kept for the process.

    Args:
        order: What `random_order` gives.
        compute: Gives the raw columns of a group's rows, shape (rows, 36), and the token forwards that they took.
        sample_raw: What it gives for the groups of `sample_of(order)`, shape (sample, 36).
        sample_tokens: The token forwards that those took.
        num_classes: K-means classes.

    Attributes:
        classes: Class of every row that was computed so far, -1 for all others and for those that are never offered,
            shape (pool,), int64; it fills up as rows are drawn.

    Raises:
        SettingError: The sample has fewer rows that can be offered than there are classes.
    """

    def __init__(
        self,
        order: np.ndarray,
        compute: Callable[[np.ndarray], tuple[np.ndarray, int]],
        sample_raw: np.ndarray,
        sample_tokens: int,
        num_classes: int,
        sample_seconds: float = 0.0,
    ) -> None:
        sample = standardise(sample_raw, sample_tokens)
        # In the pool's random order; memory that is never written to is never taken.
        nothing_yet = np.zeros((len(order), NUM_STATIC), np.float32)
        super().__init__(nothing_yet, sample.mean, sample.std, sample_tokens, sample_seconds)
        self._order = order
        self._places = np.empty_like(order)  # (pool,), each row's place in the order
        self._places[order] = np.arange(len(order))
        self._compute = compute
        self._lock = threading.Lock()  # environments in several threads may share these features
        num_groups = math.ceil(len(order) / GROUP_ROWS)
        self._is_known = np.zeros(num_groups, dtype=bool)  # (groups,)
        self._tokens = np.zeros(num_groups, dtype=np.int64)  # (groups,), beyond the sample
        self._times = np.zeros(num_groups)  # (groups,), seconds
        self._sample_cost = sample_seconds, sample_tokens
        self._mark = 0
        self._last_asked = np.full(num_groups, -1, dtype=np.int64)  # (groups,), the mark that stood then
        self.classes = np.full(len(order), -1, dtype=np.int64)
        offered = sample.columns[~np.isnan(sample_raw).any(axis=1)]
        self._centres = kmeans_centres(offered, num_classes, _SEED)
        self._keep(0, sample_raw)
        self._is_known[: math.ceil(len(sample_raw) / GROUP_ROWS)] = True

    @property
    def raw(self) -> np.ndarray:
        """There is no such array here.

        Raises:
            SettingError: Always.
        """
        raise SettingError(
            "lazy_features computes the features of those rows alone that are offered; found something that needs "
            "those of all rows. Leave lazy_features out, or take another agent."
        )

    def mark(self) -> int:
        """Return a number by which `asked_since` knows this moment."""
        with self._lock:
            self._mark += 1
            return self._mark

    def asked_since(self, mark: int) -> dict[int, tuple[float, int]]:
        """Return the groups beyond the sample that were asked for since a moment, known before or not.

        Returns:
            By the group's number the seconds and the token forwards that it took.
        """
        with self._lock:
            groups = np.flatnonzero((self._last_asked >= mark) & (self._tokens > 0)).tolist()
            return {group: (float(self._times[group]), int(self._tokens[group])) for group in groups}

    @property
    def sample_cost(self) -> tuple[float, int]:
        """Seconds and token forwards that the features of the sample took."""
        return self._sample_cost

    def draw(self, num_candidates: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw the candidates of one step, as `pool.draw_candidates` does, without knowing every row's class.

        Groups are drawn without replacement from the whole pool until each class has its share, or until `MAX_DRAWS`
        times as many rows were seen as are offered.

        Args:
            num_candidates: N, a multiple of the number of classes C.
            rng: The round's own generator; it moves on.

        Returns:
            Pool ids, shape (N,), in the order drawn, N/C of each class; a class for which fewer were found ends in -1.
            The class of each place, shape (N,), padding included.
        """
        num_classes = len(self._centres)
        quota = num_candidates // num_classes
        candidates = np.full((num_classes, quota), -1, dtype=np.int64)
        found = np.zeros(num_classes, dtype=np.int64)
        most = min(math.ceil(MAX_DRAWS * num_candidates / GROUP_ROWS), len(self._is_known))
        for group in rng.choice(len(self._is_known), size=most, replace=False):
            self._know(int(group))
            ids = self._order[GROUP_ROWS * group : GROUP_ROWS * (group + 1)]
            for row in rng.permutation(ids):
                label = self.classes[row]
                if label >= 0 and found[label] < quota:
                    candidates[label, found[label]] = row
                    found[label] += 1
            if (found == quota).all():
                break
        return candidates.reshape(-1), np.repeat(np.arange(num_classes, dtype=np.int64), quota)

    def _raw_rows(self, ids: np.ndarray) -> np.ndarray:
        places = self._places[ids]
        for group in np.unique(places // GROUP_ROWS):
            self._know(int(group))
        return np.asarray(self._raw[places])

    def _know(self, group: int) -> None:
        with self._lock:
            self._last_asked[group] = self._mark
            if self._is_known[group]:
                return
            start = GROUP_ROWS * group
            begun = time.perf_counter()
            raw, self._tokens[group] = self._compute(self._order[start : start + GROUP_ROWS])
            self._keep(start, raw)
            self._times[group] = time.perf_counter() - begun
            self._num_tokens += int(self._tokens[group])
            self._seconds += float(self._times[group])
            self._is_known[group] = True

    def _keep(self, start: int, raw: np.ndarray) -> None:
        self._raw[start : start + len(raw)] = raw
        offered = ~np.isnan(raw).any(axis=1)
        ids = self._order[start : start + len(raw)][offered]
        self.classes[ids] = nearest_centres(self._shown(raw[offered]), self._centres)


class FeatureUse:
    """What features a run uses from here on, and what they cost, whoever had them computed.

    Args:
        features: Those of the run's environments, shared with other runs of the process.
    """

    def __init__(self, features: StaticFeatures) -> None:
        self._features = features
        self._mark = features.mark() if isinstance(features, LazyFeatures) else 0

    def groups(self) -> dict[str, int]:
        """Return the token forwards of the groups that were asked for, by number; none where all rows were computed."""
        return {str(group): tokens for group, (_, tokens) in self._asked().items()}

    def cost(self) -> tuple[float, int]:
        """Return the seconds and the token forwards that the features took."""
        seconds, tokens = self._fixed_cost()
        asked = self._asked().values()
        return seconds + sum(own for own, _ in asked), tokens + sum(own for _, own in asked)

    def num_tokens(self, groups: Mapping[str, int]) -> int:
        """Return the token forwards of the features where these groups were asked for."""
        return self._fixed_cost()[1] + sum(groups.values())

    def _asked(self) -> dict[int, tuple[float, int]]:
        return self._features.asked_since(self._mark) if isinstance(self._features, LazyFeatures) else {}

    def _fixed_cost(self) -> tuple[float, int]:
        features = self._features
        return features.sample_cost if isinstance(features, LazyFeatures) else (features.seconds, features.num_tokens)
