"""Pieces of work on a processor, side by side in threads, as many as torch may use.

One small model's operators are too short to be shared out among cores; whole passes of it are not. Each thread keeps to
one core while it works here, so that no two get in each other's way, and what each computes does not depend on how many
there are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["one_thread", "one_thread_each", "side_by_side"]

Result = TypeVar("Result")


def side_by_side(tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    """Run tasks in threads and return their results in order; the first failure is raised once all have ended.

    With one thread of torch, or one task, they run here and now, one after the other: one task has all threads.

    Args:
        tasks: Functions that do not wait for each other.
    """
    return [task() for task in tasks] if len(tasks) < 2 else list(one_thread_each(tasks))


def one_thread_each(tasks: Sequence[Callable[[], Result]]) -> Iterator[Result]:
    """Run tasks side by side and yield their results in order; a failure is raised once all have ended.

    What a task computes is the same to the bit however many threads torch may use, a single task included.

    Args:
        tasks: Functions that do not wait for each other.
    """
    import torch

    num_threads = torch.get_num_threads()
    if num_threads == 1 or not tasks:
        yield from (task() for task in tasks)
        return
    try:
        workers = min(num_threads, len(tasks))
        with ThreadPoolExecutor(workers, "raise-env", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = [pool.submit(task) for task in tasks]
            yield from (future.result() for future in futures)
    finally:
        torch.set_num_threads(num_threads)  # a part of it holds for all threads


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread: sums that several share differ in their last digits with the number of threads."""
    import torch
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        torch.set_num_threads(before)
