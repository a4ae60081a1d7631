"""What sets the rows that were chosen apart from the pool that they come from, and what the selector wants of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raise_env import RaiseSelectEnv
from raise_env.features import frame, observe
from raise_env.pool import MAX_ROWS_IN_MEMORY, Instruction, Pool

from .learned import Selector

__all__ = [
    "ScoredRow",
    "Trait",
    "Word",
    "columns_of_few_values",
    "looked_at",
    "pool_scores",
    "traits",
    "wanted",
    "words_apart",
]

#: A column of the pool with more different values is text, and not a kind of row.
MAX_VALUES = 12

#: Words that are shown of each side, and in how many rows of the pool a word has to be.
NUM_WORDS = 12
MIN_ROWS = 5

#: Rows that are shown of each end.
NUM_WANTED = 5

#: A word has to be this many standard errors more or less frequent.
LEAST_SURPRISE = 1.96

_WORD = re.compile(r"[^\W_]+(?:['\N{RIGHT SINGLE QUOTATION MARK}][^\W_]+)?")

#: The static columns that are told, by place and in words.
_TRAITS = {
    0: ("prompt length", "tokens"),
    1: ("response length", "tokens"),
    2: ("log P of the response given its prompt", "nats per token"),
    3: ("log P of the response by itself", "nats per token"),
}


@dataclass(frozen=True, slots=True)
class Trait:
    """A property of rows: its mean over those chosen and over the pool, and how far these lie apart.

    `difference` is counted in the pool's standard deviations.
    """

    name: str
    unit: str
    chosen: float
    pool: float
    difference: float


@dataclass(frozen=True, slots=True)
class Word:
    """A word, and in what share of the chosen rows and of the pool's rows it is."""

    text: str
    chosen: float
    pool: float


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """A row of the pool and its score in standard deviations over the pool."""

    score: float
    pool_id: int


def looked_at(pool: Pool, rows: Sequence[int]) -> np.ndarray:
    """Return the pool ids that stand for a pool beside some of its rows, sorted, shape (looked at,), int64.

    All of them; of a large pool a random part, and those rows.

    Args:
        pool: The pool.
        rows: Pool ids of the rows that were chosen.
    """
    if len(pool) <= MAX_ROWS_IN_MEMORY:
        return np.arange(len(pool))
    drawn = np.random.default_rng(0).choice(len(pool), size=MAX_ROWS_IN_MEMORY, replace=False)
    return np.union1d(drawn, np.asarray(rows, dtype=np.int64))


def traits(env: RaiseSelectEnv, rows: np.ndarray, places: np.ndarray) -> list[Trait]:
    """Return how the chosen rows differ in length and difficulty; nothing where features are lazy.

    Args:
        env: The environment.
        rows: Pool ids, shape (chosen,); one that was chosen twice counts twice.
        places: What `looked_at` gives.
    """
    if env.config.lazy_features:
        return []
    raw = env.assets.features.raw
    pool, chosen = (raw[ids, : len(_TRAITS)].astype(np.float64) for ids in (places, rows))
    pool = pool[~np.isnan(pool).any(axis=1)]
    pool[:, :2], chosen[:, :2] = np.expm1(pool[:, :2]), np.expm1(chosen[:, :2])  # lengths are kept as logarithms
    found = []
    for column, (name, unit) in _TRAITS.items():
        mean, own = float(pool[:, column].mean()), float(chosen[:, column].mean())
        spread = float(pool[:, column].std())
        found.append(Trait(name, unit, own, mean, (own - mean) / spread if spread > 0 else 0.0))
    return found


def words_apart(pool: Pool, rows: Sequence[int], places: np.ndarray) -> tuple[list[Word], list[Word]]:
    """Return the words that most set the chosen rows apart: those more frequent in them, and those less frequent.

    A word counts once a row. Words are ordered by the z-score of their log odds, the pool's frequencies as the prior
    (Monroe, Colaresi and Quinn 2008, "Fightin' Words", eq. 16 and 22), and kept where it is beyond 1.96.

    Args:
        pool: The pool.
        rows: Pool ids of those chosen; one that was chosen twice counts once.
        places: What `looked_at` gives.
    """
    among = set(rows)
    counts: Counter[str] = Counter()
    own: Counter[str] = Counter()
    for place in places:
        row = pool[int(place)]
        found = {word.lower() for word in _WORD.findall(f"{row.prompt}\n{row.response}")}
        counts.update(found)
        if int(place) in among:
            own.update(found)
    num_rows = len(places)
    if not among or num_rows == len(among):
        return [], []
    known = [word for word, count in counts.items() if MIN_ROWS <= count < num_rows]
    chosen = np.array([own[word] for word in known], dtype=np.float64)
    left = np.array([counts[word] for word in known]) - chosen
    surprise = _log_odds(chosen, left, len(among), num_rows - len(among))
    order = np.argsort(surprise, kind="stable")
    shares = zip(known, chosen / len(among), (chosen + left) / num_rows, strict=True)
    words = [Word(word, float(a), float(b)) for word, a, b in shares]
    more = [words[place] for place in order[::-1][:NUM_WORDS] if surprise[place] > LEAST_SURPRISE]
    less = [words[place] for place in order[:NUM_WORDS] if surprise[place] < -LEAST_SURPRISE]
    return more, less


def _log_odds(chosen: np.ndarray, left: np.ndarray, num_chosen: int, num_left: int) -> np.ndarray:
    """Return the z-score of the difference in log odds of each word, shape (words,)."""
    prior = (chosen + left) / (num_chosen + num_left)  # worth one row
    a, b = chosen + prior, left + prior
    odds = np.log(a / (num_chosen + 1 - a)) - np.log(b / (num_left + 1 - b))
    return np.asarray(odds / np.sqrt(1 / a + 1 / b))


def columns_of_few_values(pool: Pool, places: np.ndarray) -> dict[str, dict[int, str]]:
    """Return the columns that say what kind of row each is: texts, two to twelve different ones in all rows.

    Args:
        pool: The pool.
        places: What `looked_at` gives.

    Returns:
        By column the value of each row that was looked at, by its pool id.
    """
    values: dict[str, dict[int, str]] = {}
    seen: dict[str, set[str]] = {}
    for number, place in enumerate(places):
        fields = pool[int(place)].fields
        if number == 0:
            values = {name: {} for name, value in fields.items() if isinstance(value, str)}
            seen = {name: set() for name in values}
        for name in list(values):
            value = fields.get(name)
            seen[name].add(str(value))
            if not isinstance(value, str) or len(seen[name]) > MAX_VALUES:
                del values[name], seen[name]
            else:
                values[name][int(place)] = value
    return {name: column for name, column in values.items() if len(seen[name]) > 1}


def pool_scores(env: RaiseSelectEnv, agent: object, places: np.ndarray, seed: int) -> np.ndarray | None:
    """Return what an agent thinks of rows of the pool at the start of a run, shape (pool,), float64.

    In standard deviations over the rows that were looked at; NaN for all others, and for rows that are never offered.
    Rows that the agent never takes, as they score below its `least`, have one too.

    Args:
        env: The environment, after its first reset.
        agent: The agent.
        places: What `looked_at` gives.
        seed: What the agent's own choices begin from.

    Returns:
        None where the agent is no learned selector with a score for each row, or features are lazy.
    """
    if not isinstance(agent, Selector) or env.config.lazy_features:
        return None
    offered = places[env.assets.classes[places] >= 0]
    still = frame(env.assets.features, offered, env.config.hide)
    untouched = np.zeros(len(env.assets.pool), dtype=np.int32)
    start = {"dev_score": 0.0, "first_dev_score": 0.0, "progress": 0.0}
    agent.begin(env, seed)
    scored = getattr(agent, "uncut_scores", agent.scores)  # -inf for rows below `least` would leave no mean to any
    own = scored(observe(still, offered, untouched, **start, hide=env.config.hide))
    scores = np.full(len(env.assets.pool), np.nan)
    scores[offered] = own
    spread = float(np.std(own))
    return (scores - float(np.mean(own))) / spread if spread > 0 else None


def wanted(scores: np.ndarray, pool: Sequence[Instruction]) -> tuple[list[ScoredRow], list[ScoredRow]]:
    """Return the rows that are wanted most, best first, and least, worst first.

    Rows that are never offered are left out, and of those with one text all but the first.

    Args:
        scores: What `pool_scores` gives.
        pool: The rows.
    """
    order = np.argsort(-scores, kind="stable")
    order = order[np.isfinite(scores[order])]
    return _first_texts(order, scores, pool), _first_texts(order[::-1], scores, pool)


def _first_texts(order: np.ndarray, scores: np.ndarray, pool: Sequence[Instruction]) -> list[ScoredRow]:
    found: dict[str, ScoredRow] = {}
    for index in order:
        found.setdefault(pool[int(index)].content_hash, ScoredRow(float(scores[index]), int(index)))
        if len(found) == NUM_WANTED:
            break
    return list(found.values())
