"""Pieces of work on a processor, side by side in threads, as many as torch may use.

One small model's operators are too short to be shared out among cores; whole passes of it are not. Each thread keeps to
one core while it works here, so that no two get in each other's way, and what each computes does not depend on how many
there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["side_by_side"]

Result = TypeVar("Result")


def side_by_side(tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    """Run tasks in threads and return their results in order; the first failure is raised once all have ended.

    With one thread of torch, or one task, they run here and now, one after the other.

    Args:
        tasks: Functions that do not wait for each other.
    """
    num_threads = torch.get_num_threads()
    if num_threads == 1 or len(tasks) < 2:
        return [task() for task in tasks]
    try:
        workers = min(num_threads, len(tasks))
        with ThreadPoolExecutor(workers, "raise-env", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = [pool.submit(task) for task in tasks]
        return [future.result() for future in futures]
    finally:
        torch.set_num_threads(num_threads)  # a part of it holds for all threads
