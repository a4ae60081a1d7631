"""What rows and batches are worth to a model in training, tried out in forks of one and the same training state.

Two ways to find out, with one kind of result. `row_group` asks for every row by itself whether an update on it goes the
way that the dev set points: many rows at the price of a few updates, but only where the reward is the dev loss.
`batch_group` makes the updates and looks at the scores: it takes any reward, and sees whole batches only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raise_env import RaiseSelectEnv

__all__ = ["Group", "batch_group", "row_group"]

#: Rows whose gradients are held at once: each is as large as the adapter.
_ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """What the forks of one training state showed.

    Attributes:
        rows: Features of each fork's rows, shape (forks, rows of a fork, 39), float32; rows of zeros are padding, and
            forks of nothing else are.
        gains: What each fork was worth, less the group's mean, over the group's standard deviation, shape (forks,),
            float32; of a fork that is padding 0.
    """

    rows: np.ndarray
    gains: np.ndarray


def row_group(world: RaiseSelectEnv, num_updates: int, batch_size: int) -> Group | None:
    """Value each candidate: the cosine between its own AdamW update and the way that the dev set points.

    The way is that of a fork trained on dev rows for some updates and thrown away, not that of the dev gradient. On
    a real model the gradient mostly shows what training on anything would mend next (how often the end token comes,
    say), and swings as it does; with that used up, what is left is what the dev set lacks for longer.
    docs/results/raise_fork.md has the numbers. Without updates it is the first-order influence of Xia et al. 2024
    (LESS, eq. 3), at the present state instead of a few checkpoints.

    Args:
        world: The environment, in the state to look at; it is left as it is.
        num_updates: Updates of the fork that is trained on dev rows; 0 takes the dev gradient.
        batch_size: Dev rows of each.
    """
    places = np.flatnonzero(world.action_masks())
    direction = world.dev_direction(num_updates, batch_size)
    parts = np.array_split(world.candidates[places], math.ceil(len(places) / _ROWS_AT_ONCE))
    cosines = np.concatenate([_cosines(-world.row_gradients(part, adam=True), direction) for part in parts])
    return _group(list(world.observation()[places][:, None]), cosines)


def batch_group(world: RaiseSelectEnv, actions: np.ndarray, num_dev: int | None) -> Group | None:
    """Make one update with each action, and score all on the same dev rows.

    Args:
        world: The environment, in the state to try them from; it is left as it is.
        actions: 0/1 choices of equally many rows, shape (forks, candidates), and of no more than the budget has left:
            a probe leaves out a random part of what is beyond it.
        num_dev: Dev rows to score on, drawn for this state; None: all.
    """
    observation = world.observation()
    return _group([observation[action == 1] for action in actions], world.probe(actions, num_dev))


def _cosines(updates: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Return the cosine of each update, shape (rows, P), with the direction, shape (P,), in float64."""
    with np.errstate(over="ignore", invalid="ignore"):  # a fork that diverged; `_group` leaves it out
        norms = np.linalg.norm(updates, axis=1).astype(np.float64) * np.linalg.norm(direction)
        return np.asarray((updates @ direction) / np.maximum(norms, 1e-30))


def _group(rows: Sequence[np.ndarray], worth: np.ndarray) -> Group | None:
    """Return what a group of forks showed; None where it showed nothing, or a fork diverged."""
    spread = worth.std() if np.isfinite(worth).all() else 0.0
    if spread < 1e-9 or len({len(part) for part in rows}) > 1:
        return None
    return Group(np.stack(rows), ((worth - worth.mean()) / spread).astype(np.float32))
