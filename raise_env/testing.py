"""An environment without a language model, for testing policies in milliseconds.

Every row of the toy pool has a hidden value; training on rows adds their values to the model's skill, with
diminishing returns, and the dev loss falls with skill. A column of the features tells the value, under noise.
The rest, from the action's rules to snapshots, is the real environment.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .env import RaiseSelectEnv
from .features import NUM_STATIC, StaticFeatures, standardise
from .learner_protocol import Ledger, Split
from .pool import Instruction, Pool, classes_hash, draw_candidates
from .rewards import Evaluation

__all__ = ["FakeLearner", "ToyAssets", "toy_env", "toy_pool"]

#: Loss of the untrained toy model, nats per token.
FIRST_LOSS = 2.0


def toy_pool(num_rows: int = 200) -> Pool:
    """Return a pool of made-up questions, numbered."""
    rows = [Instruction(f"Question {i}?", f"Answer {i}.", fields={"row": i}) for i in range(num_rows)]
    return Pool(rows, "toy")


@dataclass(slots=True, eq=False)
class FakeLearner:
    """A model in training that is one number: its skill.

    Attributes:
        values: What training on each pool row adds to the skill, shape (rows,).
        num_dev: Dev rows, all alike but for a fixed offset.
        diverges_on: A pool row whose training loss is infinite; None for no such row.
        state: The skill.
        generates: Without effect: no toy row asks for a number.
        scores_choices: Without effect: no toy row has choices.
    """

    values: np.ndarray
    num_dev: int = 16
    diverges_on: int | None = None
    ledger: Ledger = field(default_factory=Ledger)
    state: float = 0.0
    generates: bool = False
    scores_choices: bool = True

    def reset(self) -> None:
        """Forget everything."""
        self.state = 0.0

    def restore(self, state: float) -> None:
        """Go back to a skill."""
        self.state = state

    def update(self, rows: np.ndarray, progress: float, seed: int) -> float:
        """Add the rows' values to the skill."""
        del progress, seed
        before = self._loss(self.state)
        if self.diverges_on is not None and self.diverges_on in rows:
            self.state = math.nan
            return math.inf
        self.state += float(self.values[rows].mean())
        self.ledger.train_tokens += len(rows)
        self.ledger.updates += 1
        return before

    def update_together(
        self,
        learners: Sequence[FakeLearner],
        batches: Sequence[np.ndarray],
        progress: Sequence[float],
        seeds: Sequence[int],
    ) -> list[float]:
        """Update one after the other."""
        parts = zip(learners, batches, progress, seeds, strict=True)
        return [learner.update(rows, share, seed) for learner, rows, share, seed in parts]

    def evaluate_together(self, learners: Sequence[FakeLearner], split: Split) -> None:
        """Do nothing: scoring is cheap."""

    def evaluate(self, split: Split, subset: np.ndarray | None = None) -> Evaluation:
        """Score the skill."""
        del split
        return self._evaluation(self.state, subset)

    def probe(self, batches: Sequence[np.ndarray], progress: float, seed: int, subset: np.ndarray) -> list[Evaluation]:
        """Score the skill after each batch."""
        states = []
        for rows in batches:
            other = self.copy()
            if len(rows):
                other.update(rows, progress, seed)
            states.append(other.state)
        return [self._evaluation(state, subset) for state in states]

    def row_losses(self, rows: np.ndarray) -> np.ndarray:
        """Return a loss that is lower for rows of higher value."""
        self.ledger.forward_tokens += len(rows)
        return np.asarray(self._loss(self.state) - self.values[rows])

    def row_gradients(self, rows: np.ndarray, split: Split | None = None, *, adam: bool = False) -> np.ndarray:
        """Return what training on each row does to the skill, which is the toy model's one parameter."""
        del adam
        self.ledger.train_tokens += len(rows)
        slopes = -self.values[rows] if split is None else np.full(len(rows), -self._loss(self.state))
        return slopes[:, None].astype(np.float32)

    def dev_direction(self, num_updates: int, batch_size: int, progress: float, seed: int) -> np.ndarray:
        """Return that more skill is better."""
        del progress, seed
        self.ledger.train_tokens += max(1, num_updates) * batch_size
        return np.ones(1, dtype=np.float32)

    def copy(self) -> FakeLearner:
        """Return another with the same skill."""
        return FakeLearner(self.values, self.num_dev, self.diverges_on, self.ledger, self.state, self.generates)

    def save_adapter(self, folder: Path) -> None:
        """Write the skill."""
        (folder / "skill.txt").write_text(repr(self.state), encoding="utf-8")

    def _loss(self, skill: float) -> float:
        return FIRST_LOSS * math.exp(-skill)

    def _evaluation(self, skill: float, subset: np.ndarray | None) -> Evaluation:
        rows = np.arange(self.num_dev) if subset is None else subset
        tokens = np.full(len(rows), 10)
        offsets = 1.0 + 0.1 * np.sin(rows)
        losses = self._loss(skill) * offsets * tokens
        dev = _dev_rows(self.num_dev)
        return Evaluation(losses, tokens, losses < 10.0, rows=tuple(dev[int(row)] for row in rows))


@functools.cache
def _dev_rows(num_rows: int) -> tuple[Instruction, ...]:
    return tuple(Instruction(f"Dev question {i}?", f"Dev answer {i}.", fields={"row": i}) for i in range(num_rows))


@dataclass(frozen=True, slots=True, eq=False)
class ToyAssets:
    """What the environment is given in place of a model and files."""

    pool: Pool
    features: StaticFeatures
    classes: np.ndarray
    members: tuple[np.ndarray, ...]
    learner: FakeLearner
    base_evaluation: Evaluation
    num_dev: int
    has_test: bool
    pool_tokens: int
    content: dict[str, str]
    auxiliary: dict[str, str | int]
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def classes_hash(self) -> str:
        """A digest of the classes."""
        return classes_hash(self.classes)

    @property
    def adapter_form(self) -> dict[str, int | float | str]:
        """Nothing: a skill has no form."""
        return {}

    @property
    def base_answers(self) -> Evaluation:
        """The same as `base_evaluation`: nothing is generated."""
        return self.base_evaluation

    def draw(self, num_candidates: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw the candidates of one step."""
        return draw_candidates(self.members, num_candidates, rng)

    def check_reward(self, reward: str) -> None:
        """Refuse nothing: toy rows have no choices, and whoever asks for them hears so from the first score."""

    def save_auxiliary(self, folder: Path) -> None:
        """Write nothing: no model computed the features."""

    def without_test(self) -> ToyAssets:
        """Return the same without a test set."""
        return replace(self, has_test=False)

    @classmethod
    def build(
        cls, num_rows: int, num_classes: int, seed: int, *, has_test: bool = True, diverges_on: int | None = None
    ) -> ToyAssets:
        """Return a toy world drawn from a seed."""
        rng = np.random.default_rng(seed)
        values = rng.normal(0.0, 0.1, num_rows)
        raw = rng.normal(size=(num_rows, NUM_STATIC)).astype(np.float32)
        raw[:, 2] = 10 * values + rng.normal(0.0, 0.3, num_rows)
        classes = np.arange(num_rows) % num_classes
        learner = FakeLearner(values, diverges_on=diverges_on)
        pool = toy_pool(num_rows)
        return cls(
            pool=pool,
            features=standardise(raw, num_tokens=0),
            classes=classes,
            members=tuple(np.flatnonzero(classes == label) for label in range(num_classes)),
            learner=learner,
            base_evaluation=learner.evaluate("dev"),
            num_dev=learner.num_dev,
            has_test=has_test,
            pool_tokens=num_rows,
            content={"model": "toy", "pool": pool.content_hash, "dev": "toy"},
            auxiliary={"model": "toy", "updates": 0},
        )


def toy_env(
    num_rows: int = 200,
    seed: int = 0,
    *,
    has_test: bool = True,
    diverges_on: int | None = None,
    render_mode: str | None = None,
    **settings: Any,
) -> RaiseSelectEnv:
    """Return a RaiseSelect environment over the toy world.

    Args:
        num_rows: Rows of the pool.
        seed: What rows' values and features are drawn from.
        has_test: Whether the last step gives a test score.
        diverges_on: A pool row that makes the model diverge.
        render_mode: As for `RaiseSelectEnv`.
        settings: Any of `RaiseSelectEnv`'s keywords.
    """
    settings = {"num_candidates": 32, "horizon": 10, **settings}
    num_classes = settings.get("num_classes", 4)
    assets = ToyAssets.build(num_rows, num_classes, seed, has_test=has_test, diverges_on=diverges_on)
    return RaiseSelectEnv(render_mode, assets, **settings)
