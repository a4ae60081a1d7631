"""A journal of the steps of learning, so that any algorithm can be interrupted and gone on with, equal to the bit.

What an algorithm will do follows from its seed and from what the environment has answered so far. So its state need not
be kept: not networks, optimisers, replay buffers, schedules or generators, each in the form of each algorithm. It is
enough to keep the answers. On `--resume` the algorithm begins anew and is given them again, without a model being
trained, until they are used up: learning that took hours is back where it was in the seconds that the algorithm itself
takes. The model then makes the updates of the last episode again, and learning goes on.

Decisions:
    A line is added when a step is done, and is on the disk before the algorithm hears of the step. A line that a crash
    has torn ends the journal.

    Each line says what state of the environment it is about, and what was chosen. Where the algorithm does something
    else than it did, because it draws from a generator that nobody seeded, the journal ends there, and the rest is
    learned anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from raise_env import RaiseSelectEnv
from raise_env.env import Action, StepOutcome, StepResult
from raise_env.files import append_line, write_text
from raise_env.learner_protocol import Ledger

from .run_folder import whole_lines

__all__ = ["Journal", "JournaledEnv"]

logger = logging.getLogger(__name__)


class Journal:
    """The lines of a file; those of an earlier process come first.

    Args:
        path: The file; made with the first line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines = _steps(path)
        self._num_used = 0
        if path.exists():
            self._cut(len(self._lines))

    @property
    def num_left(self) -> int:
        """Steps of an earlier process that were not taken again yet."""
        return len(self._lines) - self._num_used

    def next(self, step: str) -> tuple[StepOutcome, Ledger] | None:
        """Return what a step came to and what was booked for it, None where it was not taken before.

        Args:
            step: What the step is told by: see `_name`.
        """
        if not self.num_left:
            return None
        line = self._lines[self._num_used]
        if line["step"] != step:
            logger.warning(
                "%s: step %d of learning is another one than before the interruption; learning from there anew. Does "
                "the agent draw from a generator that its seed does not decide on?",
                self._path,
                self._num_used + 1,
            )
            self._cut(self._num_used)
            return None
        self._num_used += 1
        return StepOutcome(**line["outcome"]), Ledger(**line["booked"])

    def add(self, step: str, outcome: StepOutcome, booked: Ledger) -> None:
        """Write down what a new step came to."""
        line = {"step": step, "outcome": asdict(outcome), "booked": asdict(booked)}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        append_line(self._path, json.dumps(line, allow_nan=False))
        self._lines.append(line)
        self._num_used += 1

    def _cut(self, length: int) -> None:
        self._lines = self._lines[:length]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in self._lines))


class JournaledEnv(RaiseSelectEnv):
    """An environment that keeps a journal of its steps, and takes those again that are in it.

    Its variants and forks, and vectors over it, keep none: whoever learns in those begins anew.

    Args:
        world: The environment to be like.
        journal: What is kept.
    """

    def __init__(self, world: RaiseSelectEnv, journal: Journal) -> None:
        super().__init__(world.render_mode, world.assets, **world.config.to_kwargs())
        self._journal = journal

    def step(self, action: Action) -> StepResult:
        """Train on the chosen candidates, or take the step again that the journal tells of.

        Raises:
            RaiseEnvError: As for `RaiseSelectEnv.step`.
        """
        name, ledger = _name(self, action), self.assets.learner.ledger
        known = self._journal.next(name)
        before = asdict(ledger)
        if known is not None:
            outcome, booked = known
            result = self.retrace(action, outcome)
            for count, now in asdict(booked).items():
                setattr(ledger, count, before[count] + now)
            return result
        result = super().step(action)
        booked = Ledger(**{name: count - before[name] for name, count in asdict(ledger).items()})
        self._journal.add(name, _outcome(result), booked)
        return result


def _name(env: RaiseSelectEnv, action: Action) -> str:
    """Return what tells a step from all others: the generator that decides on all offers, the place, the choice."""
    state: Any = env.np_random.bit_generator.state
    told = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    told.update(f"step {env.num_steps}".encode())
    told.update(np.asarray(action, dtype=np.float64).tobytes())
    return told.hexdigest()[:32]


def _outcome(result: StepResult) -> StepOutcome:
    _, _, _, _, info = result
    return StepOutcome(info["dev_score"], info.get("train_loss"), info["diverged"], info.get("test_score"))


def _steps(path: Path) -> list[dict[str, Any]]:
    """Return the lines up to the first one that is torn, or none of ours."""
    steps: list[dict[str, Any]] = []
    for line in whole_lines(path):
        try:
            StepOutcome(**line["outcome"])
            Ledger(**line["booked"])
            steps.append({"step": line["step"], "outcome": line["outcome"], "booked": line["booked"]})
        except (KeyError, TypeError):
            break
    return steps
