"""Independent pieces of work, spread over processes of this machine or over the machines of a Ray cluster.

What a piece gives depends on nothing but the piece. So a piece whose worker died is simply done again, and the number
and place of workers change nothing but time.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import platform
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from raise_env.errors import DataError, RaiseEnvError, SettingError

__all__ = ["MAX_DEATHS", "check_cluster", "spread"]

#: Deaths of workers with nothing done between them: then it is not chance, but lack of memory, or a piece that kills.
MAX_DEATHS = 3

_Item = TypeVar("_Item")
_Outcome = TypeVar("_Outcome")

logger = logging.getLogger(__name__)


def spread(
    work: Callable[[_Item], _Outcome],
    items: Iterable[_Item],
    workers: int | None = None,
    cluster: str | None = None,
    lost: Callable[[_Item], _Outcome] | None = None,
) -> Iterator[_Outcome]:
    """Yield what the work gives for each item, in the order in which it is done.

    No more items are handed out than there are workers: if this process is killed, they end after theirs.

    Args:
        work: A function of a module, for it is sent by its name.
        items: What to work on.
        workers: Processes side by side; None is one here, and as many as there are processors on a cluster.
        cluster: The address of a Ray cluster, "auto" for the one that this machine is of; None: this machine alone.
        lost: Returns what stands for a piece whose worker dies even where no other is at work; None: that is an error,
            as it always is on a cluster. One worker here is this process, which dies with the piece.

    Raises:
        SettingError: Ray is not installed, or no cluster answers.
        RaiseEnvError: Workers died again and again, or the cluster's part on this machine. (Where the head of the
            cluster goes away, Ray itself ends this process a minute later.)
    """
    if cluster is not None:
        yield from _on_cluster(work, list(items), workers, cluster)
    elif workers in (None, 1):
        yield from map(work, items)
    else:
        yield from _in_processes(work, list(items), workers, lost)


def _in_processes(
    work: Callable[[_Item], _Outcome], items: list[_Item], workers: int, lost: Callable[[_Item], _Outcome] | None
) -> Iterator[_Outcome]:
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    left, deaths = dict(enumerate(items)), 0
    while left:
        in_hand: set[int] = set()
        try:
            for number, outcome in _parallel(work, _noted(left, in_hand), workers):
                del left[number]
                in_hand.remove(number)
                deaths = 0
                yield outcome
            continue
        except TerminatedWorkerError as error:
            deaths += 1
            if deaths == MAX_DEATHS and lost is None:
                raise RaiseEnvError(
                    f"{MAX_DEATHS} times in a row one of {workers} workers was ended from outside, most likely for "
                    "lack of memory. What was done is on disk: go on with --resume and fewer workers."
                ) from error
        logger.warning("a worker was ended from outside; what the workers had in hand is done again")
        if deaths == MAX_DEATHS and lost is not None:
            deaths, workers = 0, max(2, workers // 2)  # one would be this process
            message = "%d times in a row, most likely for lack of memory: now piece by piece, then in %d processes"
            logger.warning(message, MAX_DEATHS, workers)
            for number in sorted(in_hand):
                yield _alone(work, left.pop(number), lost)


def _noted(items: Mapping[int, _Item], in_hand: set[int]) -> Iterator[tuple[int, _Item]]:
    """Yield items with their numbers, and note which have been handed out."""
    for number, item in list(items.items()):
        in_hand.add(number)
        yield number, item


def _alone(work: Callable[[_Item], _Outcome], item: _Item, lost: Callable[[_Item], _Outcome]) -> _Outcome:
    """Do a piece in a process that does nothing else; where that dies too, the piece is lost."""
    from joblib.externals.loky.process_executor import ProcessPoolExecutor, TerminatedWorkerError

    with ProcessPoolExecutor(max_workers=1) as pool:
        try:
            outcome: _Outcome = pool.submit(work, item).result()
        except TerminatedWorkerError:
            return lost(item)
    return outcome


def _parallel(
    work: Callable[[_Item], _Outcome], items: Iterable[tuple[int, _Item]], workers: int
) -> Iterator[tuple[int, _Outcome]]:
    from joblib import Parallel, delayed, parallel_config

    with parallel_config("loky", n_jobs=workers, inner_max_num_threads=1), warnings.catch_warnings():
        # A worker whose memory has grown is replaced by a new one between two runs: nothing that a user has to mend.
        warnings.filterwarnings("ignore", "A worker stopped while some jobs were given", UserWarning)
        parallel = Parallel(batch_size=1, pre_dispatch="n_jobs", return_as="generator_unordered")
        yield from parallel(delayed(_numbered)(work, number, item) for number, item in items)


def _numbered(work: Callable[[_Item], _Outcome], number: int, item: _Item) -> tuple[int, _Outcome]:
    return number, work(item)


def check_cluster(address: str) -> None:
    """Find out whether a cluster answers, before anything is done for it.

    Raises:
        SettingError: Ray is not installed, or no cluster answers.
    """
    with _connected(address):
        pass


# A cluster. joblib's own back end for Ray cannot hand out results as they come, and does not survive the death of a
# worker; Ray's tasks do both.


def _on_cluster(
    work: Callable[[_Item], _Outcome], items: list[_Item], workers: int | None, address: str
) -> Iterator[_Outcome]:
    with _connected(address) as ray:
        # What is imported here is found there; Ray itself does a task again whose worker or machine died.
        world = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}
        task = ray.remote(num_cpus=1, max_retries=MAX_DEATHS, runtime_env=world)(_there)
        todo = iter(items)
        waiting: list[Any] = []
        while True:
            places = workers or _num_processors(ray)
            for item in itertools.islice(todo, max(0, places - len(waiting))):
                waiting.append(task.remote(str(Path.cwd()), work, item))
            if not waiting:
                return
            done, waiting = ray.wait(waiting, num_returns=1)
            try:
                yield ray.get(done[0])
            except ray.exceptions.RayError as error:
                # A task's error is wrapped, and what it wraps may be Ray's own: a worker that lacks this package.
                cause = getattr(error, "cause", None)
                if cause is not None and not isinstance(cause, ray.exceptions.RayError):
                    raise cause from error
                raise RaiseEnvError(
                    f"the cluster could not do a piece of work, tried up to {MAX_DEATHS + 1} times "
                    f"({_first_line(cause or error)}). What was done is on disk: go on with --resume once the cluster "
                    "is in order."
                ) from error


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Give Ray, connected to a cluster; it is left as it was found.

    Raises:
        SettingError: Ray is not installed, or no cluster answers.
    """
    ends_by = signal.getsignal(signal.SIGTERM)
    try:
        import ray
    except ImportError as error:
        raise SettingError(
            f"--cluster {address} needs Ray, which is not installed: pip install ray, here and on each "
            "machine of the cluster."
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ends_by)  # importing Ray takes the place of what was there
    was_connected = ray.is_initialized()
    if not was_connected:
        _connect(ray, address)
    try:
        yield ray
    finally:
        if not was_connected:
            ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    # Workers write into their own machine's logs; what a run has to say is in its result.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # ask now for what Ray will do: it warns otherwise
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise SettingError(
            f"--cluster {address}: no Ray cluster answers ({_first_line(error)}). Start one with `ray start --head`, "
            "add machines with `ray start --address=HOST:6379`, and give auto or HOST:6379."
        ) from error


def _knock(address: str, patience_s: float = 10.0) -> None:
    """Find out soon whether anything listens at HOST:PORT: Ray itself would try for minutes.

    Raises:
        OSError: Nothing does.
        ValueError: The port is no number.
    """
    host, colon, port = address.rpartition(":")
    if colon and "//" not in host:
        with socket.create_connection((host, int(port)), timeout=patience_s):
            pass


def _num_processors(ray: Any) -> int:
    """Return how many processors the cluster has now; machines may come and go."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _there(folder: str, work: Callable[[_Item], _Outcome], item: _Item) -> _Outcome:
    """Do a piece of work on a machine of the cluster, as if it were done where the command was given.

    Raises:
        DataError: The machine lacks the working folder, which file names may begin from.
    """
    try:
        os.chdir(folder)
    except OSError as error:
        raise DataError(
            f"{platform.node()} has no folder {folder!r} ({error.strerror}): the machines of a cluster need the same "
            "files under the same names."
        ) from error
    return work(item)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
