"""How the benchmarks of speed and memory measure: sides in turn in one process, medians with their spread.

Times of a busy machine mean little by themselves, and drift. What means something is the ratio of two sides that took
turns, if both computed the same: every benchmark here first holds the numbers of its sides against each other, and
reports nothing where they differ.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from raise_env.agents.runs import processor_name

# PEFT 0.21 asks plain loops' models by an old name; transformers 5.23 says so to whoever measures.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

__all__ = ["alternate", "machine", "memory_bytes", "require_equal", "speedups", "table", "with_spread"]

#: How far numbers may differ that two sides compute in another order, in the units of the numbers.
TOLERANCE = 1e-5


def alternate(sides: Mapping[str, Callable[[], Any]], repeats: int, warmups: int = 1) -> dict[str, np.ndarray]:
    """Call each side in turn, so many times, and return the seconds of each call by side, shape (repeats,).

    Who begins changes from turn to turn, so that none always runs behind the same other.

    Args:
        sides: What is measured, by name.
        repeats: Turns that count.
        warmups: Turns before them that do not.
    """
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmups + repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            sides[name]()
            taken = time.perf_counter() - start
            if turn >= warmups:
                seconds[name].append(taken)
    return {name: np.array(values) for name, values in seconds.items()}


def require_equal(name: str, found: ArrayLike, expected: ArrayLike, tolerance: float = TOLERANCE) -> None:
    """End the program, with status 1 and a message, if numbers of two sides differ by more than the tolerance.

    Args:
        name: What is compared, for the message.
        found: Numbers of one side; NaN equals nothing.
        expected: Those of the other, of the same shape.
        tolerance: The greatest difference that is allowed; 0: none.
    """
    one, other = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    if one.shape != other.shape:
        raise SystemExit(f"{name}: shapes {one.shape} and {other.shape} differ; nothing is reported.")
    difference = np.abs(one - other).max() if one.size else 0.0
    if not difference <= tolerance:
        raise SystemExit(f"{name}: the sides differ by {difference:.3g}, more than {tolerance:g}; nothing is reported.")


def speedups(seconds: Mapping[str, np.ndarray], baseline: str) -> dict[str, np.ndarray]:
    """Return how many times faster each side was than the baseline in the same turn, each of shape (repeats,)."""
    return {name: seconds[baseline] / taken for name, taken in seconds.items()}


def with_spread(values: ArrayLike, digits: int = 2) -> str:
    """Return median and interquartile range as text, such as "1.52 (1.49-1.58)"."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table; the first one's keys are the heading."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([str(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def machine() -> str:
    """Return processor, cores and torch's threads as a line for under a table."""
    import torch

    return f"{processor_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch."


def memory_bytes(pid: int | None = None) -> int:
    """Return the memory of a process and all below it, shared pages shared out between them (PSS), in bytes.

    Args:
        pid: The process; None: this one.

    Raises:
        OSError: The system has no /proc, as only Linux does.
    """
    root = os.getpid() if pid is None else pid
    return sum(_pss(process) for process in [root, *_descendants(root)])


def _pss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{pid}/smaps_rollup tells no Pss.")


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text(encoding="ascii").split()):
            found += [child, *_descendants(child)]
    return found
