"""Agents that follow gradients: how far training on a row would lower the dev loss, to first order.

LESS asks it once, of every pool row, with models that were warmed up for that alone. GREATS asks it at every step, of
the candidates, with the model as it is, and takes into account what the rows already chosen will do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

from raise_env import EnvConfig, RaiseSelectEnv
from raise_env.errors import SettingError
from raise_env.pool import Pool
from raise_env.store import Block, Column, TableForm, stored_table

from .base import BatchAgent
from .baselines import PoolScoreAgent, require_all_features

__all__ = ["GreatsAgent", "LessAgent", "choose_batch"]

#: Rows whose gradients are held at once.
BLOCK_ROWS = 64

#: Settings that say where a run is made, what it is measured on, or what is stated by content instead.
_NOT_OF_DIRECTIONS = frozenset(
    {*("pool", "dev", "test", "num_dev", "num_test", "task", "task_seed", "pool_size", "adapter", "model"), "device"}
    | {"cache_dir", "render_mode", "hide", "lazy_features", "num_classes", "reward", "micro_batch_tokens"}
)

Projection = Callable[[np.ndarray], np.ndarray]


class LessAgent(PoolScoreAgent):
    """Takes the rows on which AdamW would go where the dev gradient points: LESS.

    A model of its own is trained on a small random part of the pool. At the end of each epoch i, every pool row z gets
    the cosine between the direction in which Adam would go on z alone and the mean gradient of the dev rows; its
    score is the sum of these over the epochs, each times the epoch's mean learning rate (Xia et al. 2024, "LESS:
    Selecting Influential Data for Targeted Instruction Tuning", ICML, Definition 3.1):

        score(z) = sum over i of rate_i * cos(dev_gradient_i, adam_direction_i(z)).

    The defaults are the paper's: 5% of the pool, 4 epochs, gradients projected at random to 8192 numbers (section
    4.1). What differs: each number of a gradient goes with a random sign to one of the 8192 (Charikar et al. 2002,
    "Finding Frequent Items in Data Streams", ICALP), where the paper's signs send it to all of them: cosines are as
    near, for a fraction of the time. The warm-up has the environment's own batch size and cosine schedule. The dev set
    is one task, where the paper takes the highest score over a benchmark's subtasks. The published code takes the mean
    of the dev rows' cosines; this is the paper's cosine with their mean gradient.

    A block of rows is scored at a time: memory does not grow with the pool. Gradients are not kept, unless a folder is
    named: for another dev set, only the dev rows' gradients are computed anew then. They count at what they cost when
    they were made.

    Args:
        warmup_share: Share of the pool that the warm-up trains on, above 0 and up to 1.
        epochs: Epochs of the warm-up, each of which leaves one model to score with.
        projection_dim: Numbers that a gradient is projected to; None, or as many as the adapter has: not at all,
            which is exact.
        adam: Take Adam's directions; False takes the rows' plain gradients.
        datastore: Folder that keeps the projected gradients of the pool's rows, `epochs` * `projection_dim` * 4 bytes
            for each row and seed; None: they are not kept.
        batch_size: As for `BatchAgent`.

    Raises:
        SettingError: A setting is out of range; on `check`: features are lazy; on `check` and `prepare`: the reward is
            not the dev loss; on `prepare`: the warm-up's loss stopped being finite.
        OutputError: On `prepare`: the folder cannot be written, or has too little room.
    """

    def __init__(
        self,
        warmup_share: float = 0.05,
        epochs: int = 4,
        projection_dim: int | None = 8192,
        adam: bool = True,
        datastore: str | Path | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(batch_size)
        if not 0.0 < warmup_share <= 1.0:
            raise SettingError(f"less: warmup_share is {warmup_share!r}; expected a share above 0 and up to 1.")
        _require_count("less: epochs", epochs)
        if projection_dim is not None:
            _require_count("less: projection_dim", projection_dim)
        self.warmup_share = warmup_share
        self.epochs = epochs
        self.projection_dim = projection_dim
        self.adam = adam
        self.datastore = None if datastore is None else Path(datastore)

    def check(self, config: EnvConfig, pool: Pool, episodes: int) -> None:
        """Refuse a reward without gradient, and features that are not there for the warm-up, which offers all rows."""
        del pool, episodes
        _require_gradient(config)
        require_all_features(config)

    def score_pool(self, world: RaiseSelectEnv, seed: int) -> np.ndarray:
        """Return the influence of each pool row; rows that cannot be trained on have minus infinity."""
        _require_gradient(world.config)
        rng = np.random.default_rng(seed)
        rows = np.flatnonzero(world.assets.classes >= 0)
        warmup_rows = rng.choice(rows, max(1, round(self.warmup_share * len(rows))), replace=False)
        projection_rng, training_rng = rng.spawn(2)
        project: Projection | None = None
        influence = np.zeros(len(rows))
        warmed_up = _warmed_up(world, warmup_rows, self.epochs, training_rng)
        for epoch, (model, rate) in enumerate(warmed_up, start=1):
            dev_gradient = _mean_dev_gradient(model, np.arange(world.assets.num_dev))
            project = project or _projection(len(dev_gradient), self.projection_dim, projection_rng)
            (target,) = project(dev_gradient[None])
            directions = self._directions(model, rows, project, len(target), {"seed": seed, "epoch": epoch})
            influence += rate * np.concatenate([_cosines(block, target) for block in directions])
        scores = np.full(len(world.assets.pool), -np.inf)
        scores[rows] = influence
        return scores

    def _directions(
        self, model: RaiseSelectEnv, rows: np.ndarray, project: Projection, dim: int, drawn: Mapping[str, int]
    ) -> Iterator[np.ndarray]:
        """Yield the projected directions of blocks of rows, each of shape (block, dim), float32."""

        def computed(first: int) -> Iterator[np.ndarray]:
            for block in _blocks(rows[first:]):
                # In the order of the disk: BLAS adds the other order up in another way.
                yield np.ascontiguousarray(project(model.row_gradients(block, adam=self.adam)))

        if self.datastore is None:
            yield from computed(0)
            return
        ledger = model.ledger
        before = ledger.train_tokens

        def blocks(first: int) -> Iterator[Block]:
            done = before
            for directions in computed(first):
                yield Block(len(directions), {"directions": directions}, {"train_tokens": ledger.train_tokens - done})
                done = ledger.train_tokens

        form = TableForm(
            "gradients",
            {**self._key(model), **drawn},
            {"directions": Column("float32", dim)},
            len(rows),
            len(rows) * dim * 4,
        )
        table = stored_table(form, blocks, self.datastore, in_memory=False)
        # What was made before is paid for all the same.
        ledger.train_tokens = before + table.counts["train_tokens"]
        yield from _blocks(table.arrays["directions"])

    def _key(self, model: RaiseSelectEnv) -> dict[str, Any]:
        """Return what the directions depend on, but for the seed and the epoch."""
        settings = {k: v for k, v in model.config.to_kwargs().items() if k not in _NOT_OF_DIRECTIONS}
        content = {
            what: model.assets.content[what] for what in ("model", "pool", "adapter") if what in model.assets.content
        }
        own = {"warmup_share": self.warmup_share, "projection_dim": self.projection_dim, "adam": self.adam}
        return {"settings": settings, "content": content, "block_rows": BLOCK_ROWS, **own}


class GreatsAgent(BatchAgent):
    """Takes, one after another, the rows that promise most beside those already taken: GREATS.

    With g the gradients at the model as it is, the next row of a batch S is the one with the highest

        gain(z | S) = rate * (g_dev . g_z) - rate^2 * (sum over s in S of g_s . g_z),

    which is how far a step of plain gradient descent on S and z lowers the dev loss beyond one on S, by Taylor's
    expansion with the identity for the dev loss's Hessian (Wang et al. 2024, "GREATS: Online Selection of
    High-Quality Data for LLM Training in Every Iteration", NeurIPS, section 3). The first term seeks what helps, the
    second shuns what was taken already.

    What differs: the paper's step is on the sum of the rows' losses, the environment's AdamW step on the mean over the
    batch's tokens. AdamW moves each number by about the learning rate, however small its gradient, so that the true
    step is longer than the formula's and the second term, taken as it stands, is a weak one. The paper's code takes a
    few dev rows at a time; here they are all taken unless `num_dev` says otherwise.

    Args:
        num_dev: Dev rows whose mean gradient is followed, drawn anew at each step; None: all.
        adam: Put the directions in which AdamW would go on each candidate alone in the place of their gradients.
        max_candidates: Candidates whose gradients are computed in a step; where there are more, a random part. The
            paper draws such a part at each step too, and takes half of it.
        batch_size: As for `BatchAgent`.

    Raises:
        SettingError: A setting is out of range; on `check` and `begin`: the reward is not the dev loss.
    """

    is_live: ClassVar[bool] = True

    def __init__(
        self,
        num_dev: int | None = None,
        adam: bool = False,
        max_candidates: int = 256,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(batch_size)
        if num_dev is not None:
            _require_count("greats: num_dev", num_dev)
        _require_count("greats: max_candidates", max_candidates)
        self.num_dev = num_dev
        self.adam = adam
        self.max_candidates = max_candidates

    def check(self, config: EnvConfig, pool: Pool, episodes: int) -> None:
        """Refuse a reward without gradient."""
        del pool, episodes
        _require_gradient(config)

    def begin(self, env: gym.Env[Any, Any], seed: int) -> None:
        """Take note of the environment, whose reward must be the dev loss."""
        super().begin(env, seed)
        _require_gradient(self._require_begun().config)

    def scores(self, observation: np.ndarray) -> np.ndarray:
        """Return minus the place in the order of choice for the rows that are chosen, minus infinity for the others.

        Raises:
            RuntimeError: `begin` was not called.
        """
        world = self._require_begun()
        size = self._num_wanted
        places = _part(np.flatnonzero(world.action_masks()), max(size, self.max_candidates), self._rng)
        dev_rows = _part(np.arange(world.assets.num_dev), self.num_dev, self._rng)
        gradients = world.row_gradients(world.candidates[places], adam=self.adam)
        chosen = choose_batch(_mean_dev_gradient(world, dev_rows), gradients, size, world.learning_rate)
        scores = np.full(len(observation), -np.inf)
        scores[places[chosen]] = -np.arange(len(chosen))
        return scores


def choose_batch(dev_gradient: np.ndarray, gradients: np.ndarray, size: int, learning_rate: float) -> np.ndarray:
    """Return the rows that GREATS takes, in the order in which it takes them, shape (min(size, rows),), int64.

    Args:
        dev_gradient: Gradient of the dev loss, shape (P,).
        gradients: Those of the candidates' losses, shape (rows, P).
        size: Rows to take.
        learning_rate: That of the coming update.
    """
    # All gains divided by the learning rate: the order is the same, and a rate of 0 leaves one.
    gains = (gradients @ dev_gradient).astype(np.float64)
    interactions = learning_rate * (gradients @ gradients.T).astype(np.float64)
    chosen: list[int] = []
    for _ in range(min(size, len(gains))):
        best = int(np.argmax(gains))
        chosen.append(best)
        gains -= interactions[best]
        gains[best] = -np.inf
    return np.array(chosen, dtype=np.int64)


def _require_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SettingError(f"{name} is {value!r}; expected a whole number of at least 1.")


def _require_gradient(config: EnvConfig) -> None:
    if config.reward != "loss":
        raise SettingError(
            f"reward {config.reward!r} has no gradient to follow; expected reward 'loss'. "
            "Leave the reward as it is by default, or take an agent that needs no gradients."
        )


def _warmed_up(
    world: RaiseSelectEnv, rows: np.ndarray, epochs: int, rng: np.random.Generator
) -> Iterator[tuple[RaiseSelectEnv, float]]:
    """Train a model of its own on the rows; yield it after each epoch, with the epoch's mean learning rate."""
    num_batches = math.ceil(len(rows) / world.config.batch_size)
    horizon = epochs * num_batches
    model = world.variant(num_candidates="all", horizon=horizon, budget=None, score_every=horizon)
    model.reset(seed=int(rng.integers(2**31)))
    for epoch in range(1, epochs + 1):
        rates = []
        for batch in np.array_split(rng.permutation(rows), num_batches):
            rates.append(model.learning_rate)
            info = model.step(np.isin(model.candidates, batch))[-1]
            if info["diverged"]:
                raise SettingError(
                    f"the warm-up of LESS diverged in epoch {epoch}: its loss is no longer finite. "
                    f"Expected a run that learns; lower learning_rate, now {world.config.learning_rate:g}."
                )
        yield model, float(np.mean(rates))


def _cosines(directions: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the cosine of each direction, shape (rows, dim), and the target, shape (dim,)."""
    norms = np.linalg.norm(directions, axis=1) * np.linalg.norm(target)
    return np.asarray(directions @ target / np.maximum(norms, np.finfo(np.float32).tiny))


def _mean_dev_gradient(world: RaiseSelectEnv, rows: np.ndarray) -> np.ndarray:
    sums = [world.row_gradients(block, "dev").sum(axis=0) for block in _blocks(rows)]
    return np.asarray(np.sum(sums, axis=0) / len(rows))


def _blocks(rows: np.ndarray) -> list[np.ndarray]:
    return np.split(rows, range(BLOCK_ROWS, len(rows), BLOCK_ROWS))


def _part(rows: np.ndarray, size: int | None, rng: np.random.Generator) -> np.ndarray:
    """Return a random part of the rows, in their order, or all where there are no more."""
    if size is None or size >= len(rows):
        return rows
    return np.sort(rng.choice(rows, size, replace=False))


def _projection(num_parameters: int, dim: int | None, rng: np.random.Generator) -> Projection:
    """Return what maps gradients, shape (rows, num_parameters), to (rows, dim), nearly keeping their angles."""
    if dim is None or dim >= num_parameters:
        return lambda gradients: gradients
    from scipy.sparse import csr_array

    signs = rng.choice(np.array([-1, 1], dtype=np.float32), num_parameters)
    places = rng.integers(dim, size=num_parameters)
    matrix = csr_array((signs, places, np.arange(num_parameters + 1)), shape=(num_parameters, dim))

    def project(gradients: np.ndarray) -> np.ndarray:
        return np.asarray(gradients @ matrix)

    return project
