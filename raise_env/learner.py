"""The model in training: LoRA updates, evaluation, and states that can be kept, forked and put back.

A training state is a value: adapter, moments and count, never changed in place. Taking a snapshot is keeping a
reference, a fork is a second reference, and an undone update was never done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .base_model import BaseModel, own_modes
from .config import EnvConfig
from .encoding import EncodedRows, collate, token_batches
from .evaluation import EVALUATION_BATCH_TOKENS, EvaluationSet, evaluate, score_rows
from .generation import answer
from .learner_protocol import Ledger, Split, scheduled_rate
from .rewards import Evaluation
from .side_by_side import side_by_side

__all__ = ["LoraLearner", "TrainingState", "UpdateSettings"]

Result = TypeVar("Result")

#: AdamW's constants: torch's own defaults.
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8

#: Tokens, padding included, whose rows get their gradients in one pass: each row needs memory for an adapter.
GRADIENT_BATCH_TOKENS = 2048

#: Tokens, padding included, that updates go through a processor with together, each with its adapter. Small updates
#: gain by it; of large ones every pass that no longer fits into the caches loses more, up to a third. On a GPU only
#: memory sets a limit.
STACKED_TOKENS = 512

#: Tokens, padding included, of a pass that scores on a GPU at most: logits of so many are a few gigabytes.
GPU_SCORED_TOKENS = 4096

#: On a processor passes of models of up to so many numbers go side by side, each with merged weights of its own. The
#: operators of larger ones keep all cores busy by themselves, and copies of these would fill the memory.
SIDE_BY_SIDE_WEIGHTS = 100_000_000


@dataclass(frozen=True, slots=True)
class UpdateSettings:
    """How an update is made; see `EnvConfig` for units and defaults."""

    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    micro_batch_tokens: int

    @classmethod
    def of(cls, config: EnvConfig) -> UpdateSettings:
        """Return what an environment's settings ask for."""
        return cls(config.learning_rate, config.weight_decay, config.max_grad_norm, config.micro_batch_tokens)


@dataclass(frozen=True, slots=True, eq=False)
class TrainingState:
    """One model in training.

    Attributes:
        adapter: LoRA parameters, shape (P,), float32.
        first_moment: AdamW's running mean of the gradient, shape (P,).
        second_moment: AdamW's running mean of its square, shape (P,).
        num_updates: Updates so far.
    """

    adapter: Tensor
    first_moment: Tensor
    second_moment: Tensor
    num_updates: int = 0

    @classmethod
    def start(cls, adapter: Tensor) -> TrainingState:
        """Return the state before any update."""
        return cls(adapter, torch.zeros_like(adapter), torch.zeros_like(adapter))

    def to(self, device: torch.device) -> TrainingState:
        """Return the state in a device's memory: this one, if it is there."""
        if self.adapter.device == device:
            return self
        first, second = self.first_moment.to(device), self.second_moment.to(device)
        return TrainingState(self.adapter.to(device), first, second, self.num_updates)

    def __reduce__(self) -> tuple[type[TrainingState], tuple[Tensor, Tensor, Tensor, int]]:
        # In a processor's memory: torch opens a tensor of a GPU only where there is one.
        return TrainingState, (self.adapter.cpu(), self.first_moment.cpu(), self.second_moment.cpu(), self.num_updates)


@dataclass(slots=True, eq=False)
class LoraLearner:
    """One adapter over a shared base model, trained by AdamW with a cosine schedule.

    RAISE trains with a cosine schedule without warm-up (Lv et al. 2025, section 4); AdamW, clipping and LoRA
    are this project's choices.

    Attributes:
        base: The shared model.
        pool: The pool's rows, encoded.
        splits: Dev, and test where there is one.
        settings: How updates are made.
        initial: The state that `reset` goes back to.
        ledger: Where costs are counted.
        generates: Whether rows whose response ends in a number are answered when they are scored.
        scores_choices: Whether the choices of dev rows are scored; those of test rows always are.
        state: The state as it is.
    """

    base: BaseModel
    pool: EncodedRows
    splits: dict[Split, EvaluationSet]
    settings: UpdateSettings
    initial: TrainingState
    ledger: Ledger = field(default_factory=Ledger)
    generates: bool = False
    scores_choices: bool = True
    state: TrainingState = field(init=False)
    _scored: dict[Split, tuple[TrainingState, Evaluation]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.state = self.initial

    def reset(self) -> None:
        """Go back to the initial adapter and an optimiser without memory."""
        self.state = self.initial

    def restore(self, state: TrainingState) -> None:
        """Go on from a state, of a model on another device too."""
        self.state = state.to(self.initial.adapter.device)

    def update(self, rows: np.ndarray, progress: float, seed: int) -> float:
        """Make one AdamW update on the mean loss over the rows' response tokens.

        Args:
            rows: Pool rows, shape (batch,), int.
            progress: Share of the episode that is used up, from 0 to 1: where on the cosine the step is.
            seed: For LoRA's dropout, where there is any.

        Returns:
            The mean loss in nats per response token before the update.
        """
        (loss,) = self.update_together([self], [rows], [progress], [seed])
        return loss

    @own_modes()
    def update_together(
        self,
        learners: Sequence[LoraLearner],
        batches: Sequence[np.ndarray],
        progress: Sequence[float],
        seeds: Sequence[int],
    ) -> list[float]:
        """Make one update of each of several copies of this learner, where possible several in one pass.

        Sums are made in another order than by `update`, so that results differ from its in the last bits; where the
        base holds one adapter at a time, not even there.

        Args:
            learners: Copies of this learner, or it itself, each once: they share base, pool and settings.
            batches: Pool rows of each, at least one.
            progress: Of each, as for `update`: their episodes may be at different steps.
            seeds: Of each, as for `update`.

        Returns:
            The mean loss of each before its update, as `update` returns it.
        """
        states, losses = self._train([learner.state for learner in learners], batches, progress, seeds)
        for learner, state in zip(learners, states, strict=True):
            learner.state = state
        return losses

    @own_modes()
    def evaluate(self, split: Split, subset: np.ndarray | None = None) -> Evaluation:
        """Score the model on dev or test rows, all of them or a subset of row numbers.

        All rows are scored once for a state, however often they are asked for: states never change.
        """
        known = self._known(split)
        if subset is None and known is not None:
            return known
        evaluation = self._evaluate(self.state, self._rows_of(split), subset)
        self._note(split, evaluation, subset)
        return evaluation

    @own_modes()
    def probe(self, batches: Sequence[np.ndarray], progress: float, seed: int, subset: np.ndarray) -> list[Evaluation]:
        """Score what one update on each batch would give; the learner's own state stays as it is.

        Args:
            batches: Pool rows of each update; an empty batch stands for no update.
            progress: As for `update`.
            seed: As for `update`.
            subset: Dev rows to score on, the same for all, so that differences between batches are paired.
        """
        states: list[TrainingState] = [self.state] * len(batches)
        trained = [place for place, rows in enumerate(batches) if len(rows)]
        count = len(trained)
        chosen = [batches[place] for place in trained]
        after, _ = self._train([self.state] * count, chosen, [progress] * count, [seed] * count)
        for place, state in zip(trained, after, strict=True):
            states[place] = state
        dev = self._rows_of("dev")
        evaluations = self._run([functools.partial(self._evaluate, state, dev, subset) for state in states])
        for evaluation in evaluations:
            self.ledger.forward_tokens += dev.num_tokens(subset) + evaluation.num_generating_tokens
        return evaluations

    @own_modes()
    def evaluate_together(self, learners: Sequence[LoraLearner], split: Split) -> None:
        """Score several copies of this learner on all rows, side by side; `evaluate` of each then has it at once.

        Args:
            learners: Copies of this learner, or it itself, each once.
            split: "dev" or "test".
        """
        due = [learner for learner in learners if learner._known(split) is None]
        # Of each its own rows: what is scored of them depends on its reward.
        found = self._run([functools.partial(own._evaluate, own.state, own._rows_of(split), None) for own in due])
        for learner, evaluation in zip(due, found, strict=True):
            learner._note(split, evaluation)

    @own_modes()
    def row_losses(self, rows: np.ndarray) -> np.ndarray:
        """Return the mean loss of each pool row as the model is, nats per response token, shape (rows,), float64.

        Rows of whose response nothing fits into the length have NaN.
        """
        self.ledger.forward_tokens += int(self.pool.lengths[rows].sum())
        with self._adapted(self.state) as adapters:
            losses_of = functools.partial(self.base.token_losses, adapters=adapters)
            sums, _ = score_rows(losses_of, self.pool, rows, max_tokens=self._scored_tokens)
        counts = self.pool.label_counts[rows]
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)

    @own_modes()
    def row_gradients(self, rows: np.ndarray, split: Split | None = None, *, adam: bool = False) -> np.ndarray:
        """Return the gradient of each row's mean loss in the adapter as it is, shape (rows, P), float32.

        One pass gives the gradients of many rows: each row gets a copy of the adapter to itself. Where the base
        cannot hold several adapters, rows go through it one by one.

        Args:
            rows: Row numbers, shape (rows,), int.
            split: The dev or test rows' instead of the pool's.
            adam: Return, for each row, the direction that AdamW would go on this row alone, per unit of learning rate
                and without weight decay: its gradient seen through the moments so far (Xia et al. 2024, section 3.1).
        """
        data = self.pool if split is None else self.splits[split].rows
        self.ledger.train_tokens += int(data.lengths[rows].sum())
        gradients = torch.zeros(len(rows), self.base.num_parameters)
        max_tokens = min(self.settings.micro_batch_tokens, GRADIENT_BATCH_TOKENS) if self.base.stackable else 1
        for places in token_batches(data.lengths[rows], max_tokens):
            adapters = self.state.adapter.expand(len(places), -1).clone().requires_grad_()
            batch = collate(data, rows[places])
            losses, _ = self.base.token_losses(batch, adapters)
            counts = data.label_counts[rows[places]].tolist()
            means = [part.sum() / max(count, 1) for part, count in zip(losses.split(counts), counts, strict=True)]
            (gradient,) = torch.autograd.grad(torch.stack(means).sum(), adapters)
            gradients[torch.from_numpy(places)] = (self._adam_directions(gradient) if adam else gradient).cpu()
        return gradients.numpy()

    @own_modes()
    def dev_direction(self, num_updates: int, batch_size: int, progress: float, seed: int) -> np.ndarray:
        """Return which way a fork goes that is trained on dev rows, shape (P,), float32; the state stays as it is.

        Args:
            num_updates: AdamW updates of the fork, with moments of its own; 0: minus the gradient on one dev batch.
            batch_size: Dev rows of an update, drawn without replacement; all where there are fewer.
            progress: As for `update`; the fork's rate does not fall.
            seed: What the dev rows are drawn from, and LoRA's dropout, where there is any.
        """
        dev = self.splits["dev"].rows
        usable = np.flatnonzero(dev.has_labels)
        rng, size = np.random.default_rng(seed), min(batch_size, len(usable))
        batches = [usable[rng.choice(len(usable), size, replace=False)] for _ in range(max(1, num_updates))]
        seeds = [seed, *rng.integers(2**31, size=len(batches) - 1).tolist()]  # for dropout: no two drop the same
        fork = LoraLearner(self.base, dev, {}, self.settings, TrainingState.start(self.state.adapter), self.ledger)
        if num_updates == 0:
            self.ledger.train_tokens += int(dev.lengths[batches[0]].sum())
            gradients, _ = fork._gradients([fork.state], batches, seeds)
            return np.asarray(-gradients[0].cpu().numpy())
        for rows, own in zip(batches, seeds, strict=True):
            fork.update(rows, progress, own)
        return np.asarray((fork.state.adapter - self.state.adapter).cpu().numpy())

    def copy(self) -> LoraLearner:
        """Return a learner over the same base that goes on from here by itself."""
        other = LoraLearner(self.base, self.pool, self.splits, self.settings, self.initial, self.ledger)
        other.generates, other.scores_choices = self.generates, self.scores_choices
        other.state = self.state
        return other

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in PEFT's form."""
        self.base.save_adapter(self.state.adapter, folder)

    def _adam_directions(self, gradients: Tensor) -> Tensor:
        count = self.state.num_updates + 1
        first, second = _moments(self.state, gradients)
        return (first / (1 - BETA_1**count)) / ((second / (1 - BETA_2**count)).sqrt() + EPSILON)

    def _known(self, split: Split) -> Evaluation | None:
        """Return how the state as it is was scored on all rows, where it was."""
        known = self._scored.get(split)
        return known[1] if known is not None and known[0] is self.state else None

    def _rows_of(self, split: Split) -> EvaluationSet:
        """Return what is scored of a split."""
        rows = self.splits[split]
        return rows if split == "test" or self.scores_choices else dataclasses.replace(rows, choices=None)

    def _note(self, split: Split, evaluation: Evaluation, subset: np.ndarray | None = None) -> None:
        """Book a score of the state as it is, and keep it if it is one on all rows."""
        tokens = self._rows_of(split).num_tokens(subset) + evaluation.num_generating_tokens
        if split == "test":
            self.ledger.test_tokens += tokens
        else:
            self.ledger.forward_tokens += tokens
        if subset is None:
            self._scored[split] = self.state, evaluation

    def _run(self, tasks: Sequence[Callable[[], Result]]) -> list[Result]:
        """Run passes through the base, at the same time where it takes several and that is worth the memory."""
        if self.base.stackable and self.base.device.type == "cpu" and self.base.num_weights <= SIDE_BY_SIDE_WEIGHTS:
            return side_by_side(tasks)
        return [task() for task in tasks]

    def _evaluate(self, state: TrainingState, data: EvaluationSet, subset: np.ndarray | None) -> Evaluation:
        with self._adapted(state) as adapters:
            generate = functools.partial(answer, self.base, adapters=adapters) if self.generates else None
            return evaluate(
                lambda batch: self.base.token_losses(batch, adapters),
                data,
                subset,
                generate,
                max_tokens=self._scored_tokens,
                shares_prompts=self.base.device.type == "cpu",
            )

    @property
    def _scored_tokens(self) -> int:
        """Tokens of a pass that scores: on a GPU each costs about the same however little goes through it."""
        if self.base.device.type == "cpu":
            return EVALUATION_BATCH_TOKENS
        return min(max(self.settings.micro_batch_tokens, EVALUATION_BATCH_TOKENS), GPU_SCORED_TOKENS)

    @contextlib.contextmanager
    def _adapted(self, state: TrainingState) -> Iterator[Tensor | None]:
        # In float32 the adapter is merged for the length of an evaluation; in bfloat16 merging would round it away.
        if self.base.stackable and self.base.is_float32:
            with self.base.merged(state.adapter):
                yield None
        else:
            yield state.adapter[None]

    def _train(
        self,
        states: Sequence[TrainingState],
        batches: Sequence[np.ndarray],
        progress: Sequence[float],
        seeds: Sequence[int],
    ) -> tuple[list[TrainingState], list[float]]:
        """Return each state after an update on its batch, at its own place in its episode, and the losses before."""
        if not states:
            return [], []
        for rows in batches:
            self.ledger.train_tokens += int(self.pool.lengths[rows].sum())
        self.ledger.updates += len(batches)
        gradients, losses = self._gradients(states, batches, seeds)
        rates = [scheduled_rate(self.settings.learning_rate, share) for share in progress]
        return _adamw(states, gradients, rates, self.settings), losses

    def _gradients(
        self, states: Sequence[TrainingState], batches: Sequence[np.ndarray], seeds: Sequence[int]
    ) -> tuple[Tensor, list[float]]:
        """Return the gradient of each state's loss on its batch, shape (states, P), and the losses."""
        limit = self.settings.micro_batch_tokens
        if self.base.device.type == "cpu":
            limit = min(limit, STACKED_TOKENS)
        groups = _groups(batches, self.pool.lengths, limit, self.base.stackable)
        # With dropout, which the seed is for, no two are ever in one group.
        tasks = [
            functools.partial(
                self._backward,
                torch.stack([states[place].adapter for place in group]),
                [batches[place] for place in group],
                seeds[group[0]],
            )
            for group in groups
        ]
        found = self._run(tasks)
        order = np.argsort(np.concatenate(groups))  # the places of the groups' members, one group after the other
        gradients = torch.cat([gradient for gradient, _ in found])[torch.from_numpy(order).to(self.base.device)]
        losses = [loss for _, own in found for loss in own]
        return gradients, [losses[place] for place in order]

    def _backward(self, adapters: Tensor, batches: list[np.ndarray], seed: int) -> tuple[Tensor, list[float]]:
        """Return the gradient of each adapter's loss on its batch, shape (k, P), and the losses."""
        adapters.requires_grad_()
        counts = np.array([self.pool.label_counts[rows].sum() for rows in batches])
        totals = np.zeros(len(batches))
        dropout_seed = seed if self.base.lora.lora_dropout else None
        parts = _micro_batches(batches, self.pool.lengths, self.settings.micro_batch_tokens)
        for place, part in enumerate(parts):
            batch = collate(self.pool, np.concatenate(part))
            losses, _ = self.base.token_losses(batch, adapters, dropout_seed=_part_seed(dropout_seed, place))
            labels = [int(self.pool.label_counts[rows].sum()) for rows in part]
            means = torch.stack([s.sum() / int(n) for s, n in zip(losses.split(labels), counts, strict=True)])
            means.sum().backward()
            totals += means.detach().double().cpu().numpy()
        assert adapters.grad is not None
        return adapters.grad, [float(total) for total in totals]


def _part_seed(seed: int | None, place: int) -> int | None:
    """Return what dropout is drawn from in one of an update's parts, so that no two drop the same."""
    if seed is None or place == 0:
        return seed
    return int(np.random.default_rng([seed, place]).integers(2**31))


def _groups(batches: Sequence[np.ndarray], lengths: np.ndarray, max_tokens: int, stackable: bool) -> list[list[int]]:
    """Share updates out into groups that go through the model together: alike in rows, small enough in tokens."""
    longest = [int(lengths[rows].max()) for rows in batches]
    groups: list[list[int]] = []
    # By length too, so that little is padded; the last one in a group is then its longest.
    for place in sorted(range(len(batches)), key=lambda place: (len(batches[place]), longest[place])):
        size = len(batches[place])
        last = groups[-1] if groups else []
        alike = bool(last) and len(batches[last[0]]) == size
        if stackable and alike and (len(last) + 1) * size * longest[place] <= max_tokens:
            last.append(place)
        else:
            groups.append([place])
    return groups


def _micro_batches(batches: list[np.ndarray], lengths: np.ndarray, max_tokens: int) -> list[list[np.ndarray]]:
    """Cut one large batch into parts that fit; several batches fit already, or they would not be together."""
    if len(batches) > 1:
        return [batches]
    rows = batches[0]
    return [[rows[places]] for places in token_batches(lengths[rows], max_tokens)]


def _adamw(
    states: Sequence[TrainingState], gradients: Tensor, rates: Sequence[float], settings: UpdateSettings
) -> list[TrainingState]:
    """Return each state after one AdamW step (Loshchilov and Hutter 2019, algorithm 2) on a clipped gradient.

    Written out because torch's optimiser changes parameters in place and keeps one count for all of them.
    """
    if settings.max_grad_norm > 0:
        norms = gradients.norm(dim=1, keepdim=True)
        gradients = gradients * (settings.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
    after = []
    for state, gradient, rate in zip(states, gradients, rates, strict=True):
        count = state.num_updates + 1
        first, second = _moments(state, gradient)
        scale = (second.sqrt() / math.sqrt(1 - BETA_2**count)).add_(EPSILON)
        decayed = state.adapter * (1 - rate * settings.weight_decay)
        adapter = decayed.addcdiv_(first, scale, value=-rate / (1 - BETA_1**count))
        after.append(TrainingState(adapter, first, second, count))
    return after


def _moments(state: TrainingState, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Return AdamW's running means after a gradient, or after each of several, before their bias is corrected."""
    first = state.first_moment.lerp(gradients, 1 - BETA_1)
    return first, (state.second_moment * BETA_2).addcmul(gradients, gradients, value=1 - BETA_2)
