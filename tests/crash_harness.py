"""Kills commands at any moment, for the tests of what is left and gone on with.

Run as a program this is a *nursery*: it has imported everything, and forks a child for each line of JSON that it reads,
`{"work": NAME, "arguments": {...}, "die_at": N, "die_after_s": S, "cache": FOLDER, "file_bytes": LIMIT}`, the last four
where they are wanted. A child does its work with the real functions. It kills itself with SIGKILL as it is about to do
its N-th thing to the disk (a write is done by half before), or is killed after so many seconds. The answer is a line
too: `{"status": ..., "seconds": ..., "num_deeds": ..., "error": ...}`, the last two of those that were not killed.
"""

from __future__ import annotations

import builtins
import contextlib
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

#: Nothing is torn by half where there is but one byte.
SOME = 2

# What children do


def train(out: str, plan: dict[str, Any]) -> None:
    from raise_env.agents.runs import Plan
    from raise_env.agents.runs import train as run_train

    run_train(out, Plan(**{**plan, "compare": tuple(plan.get("compare", ("random",)))}), resume=True)


def finetune(out: str, selector: str, settings: dict[str, Any]) -> None:
    from raise_env.agents.runs import finetune as run_finetune

    run_finetune(out, selector, settings, resume=True)


def bench(out: str, settings: dict[str, Any], entries: dict[str, dict[str, Any]], num_seeds: int) -> None:
    from raise_env.agents.benchmark import BenchPlan
    from raise_env.agents.benchmark import bench as run_bench
    from raise_env.agents.job import Entry

    run_bench(out, BenchPlan(settings, {n: Entry(**e) for n, e in entries.items()}, num_seeds=num_seeds), resume=True)


def features(settings: dict[str, Any], in_memory: int | None = None) -> None:
    """Compute the features of a pool; one of more rows than `in_memory` is large."""
    from raise_env import RaiseSelectEnv, auxiliary, encoding, pool

    auxiliary.FEATURE_BLOCK_ROWS = 16
    encoding.ENCODING_BLOCK_ROWS = 16
    if in_memory is not None:
        pool.MAX_ROWS_IN_MEMORY = auxiliary.MAX_ROWS_IN_MEMORY = in_memory
    env = RaiseSelectEnv(**settings)
    assert env.load().pool.is_large == (in_memory is not None)
    env.reset(seed=0)


def step_in(more_bytes: int, settings: dict[str, Any]) -> None:
    """Make a step where no more memory is to be had than so much, then one where there is enough."""
    import resource

    import numpy as np
    import pytest

    from raise_env import RaiseSelectEnv
    from raise_env.errors import MemoryShortageError

    env = RaiseSelectEnv(**settings)
    observation, _ = env.reset(seed=0)
    action = env.action_masks().astype(np.int8)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_size_of_this() + more_bytes, hard))
    with pytest.raises(MemoryShortageError, match="--micro-batch-tokens"):
        env.step(action)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    assert np.array_equal(env.observation(), observation)
    _, reward, _, _, _ = env.step(action)
    other = RaiseSelectEnv(**settings)
    other.reset(seed=0)
    assert other.step(action)[1] == reward


def _size_of_this() -> int:
    """Return the address space in use, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


WORK = {function.__name__: function for function in (train, finetune, bench, features, step_in)}


# How they die


class Doom:
    """Counts what is done to the disk, and ends the process when the count is full.

    Args:
        die_at: Which deed is the last; None: none is.
    """

    def __init__(self, die_at: int | None) -> None:
        self.num_deeds = 0
        self._die_at = die_at

    def falls_due(self) -> bool:
        self.num_deeds += 1
        return self.num_deeds == self._die_at

    def arm(self) -> None:
        """Put itself between the program and the disk."""
        for name in ("replace", "rename", "fsync", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self._before(getattr(os, name)))
        opened = io.open

        def open_file(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            handle = opened(file, mode, *args, **kwargs)
            if set(mode) & set("wax+"):
                with contextlib.suppress(AttributeError):
                    handle.write = self._by_half(handle, handle.write)
            return handle

        builtins.open = io.open = open_file  # type: ignore[assignment]
        # safetensors writes past Python: what a kill in the middle leaves is a file cut off.
        import safetensors.torch

        save = safetensors.torch.serialize_file

        def serialize_file(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            save(tensors, path, *args, **kwargs)
            if self.falls_due():
                os.truncate(path, os.path.getsize(path) // SOME)
                _die()

        safetensors.torch.serialize_file = serialize_file

    def _before(self, deed: Any) -> Any:
        def done(*args: Any, **kwargs: Any) -> Any:
            if self.falls_due():
                _die()
            return deed(*args, **kwargs)

        return done

    def _by_half(self, handle: Any, write: Any) -> Any:
        def written(data: Any) -> Any:
            if self.falls_due():
                write(data[: len(data) // SOME])
                handle.flush()
                _die()
            return write(data)

        return written


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# The nursery


def _child(order: dict[str, Any], log: Path, told: int) -> None:
    if order.get("cache") is not None:
        os.environ["RAISE_ENV_CACHE"] = order["cache"]
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    doom = Doom(order.get("die_at"))
    doom.arm()
    code, error = 0, ""
    try:
        if order.get("file_bytes") is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"],) * 2)
        WORK[order["work"]](**order["arguments"])
    except BaseException as raised:
        import traceback

        code, error = 3, f"{type(raised).__name__}: {raised}"
        with contextlib.suppress(OSError):
            traceback.print_exc()
            sys.stderr.flush()
    os.write(told, json.dumps({"num_deeds": doom.num_deeds, "error": error}).encode())
    os._exit(code)


def _serve(log: Path) -> None:
    for text in sys.stdin:
        order, begun = json.loads(text), time.monotonic()
        heard, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            _child(order, log, told)
        os.close(told)
        if order.get("die_after_s") is not None:
            deadline = begun + order["die_after_s"]
            while (
                time.monotonic() < deadline and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
            ):
                time.sleep(0.001)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        with os.fdopen(heard, "rb") as pipe:
            last_words = json.loads(pipe.read() or "{}")
        answer = {"status": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - begun, **last_words}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _import_all() -> None:
    """Import what children need, in one thread: a fork of several would keep locks that nobody lets go of."""
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    import sklearn.cluster  # noqa: F401
    import torch

    import raise_env.agents.audit
    import raise_env.agents.benchmark
    import raise_env.agents.sb3
    import raise_env.assets
    import raise_env.tiny.task  # noqa: F401

    torch.set_num_threads(1)


class Nursery:
    """The nursery, from the outside.

    Args:
        folder: For its log.
        cache: Where children keep features, unless their settings say otherwise.
    """

    def __init__(self, folder: Path, cache: Path) -> None:
        self.log = folder / "children.log"
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(self.log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAISE_ENV_CACHE": str(cache)},
            cwd=Path(__file__).resolve().parents[1],
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders, self._answers = self._process.stdin, self._process.stdout

    def run(self, work: str, arguments: dict[str, Any], **order: Any) -> dict[str, Any]:
        """Let a child do some work, and return how it ended.

        Args:
            work: Its name.
            arguments: Its keywords.
            order: What else an order holds, such as when the child dies; `may_fail` lets it raise an error.
        """
        may_fail = order.pop("may_fail", False)
        self._orders.write(json.dumps({"work": work, "arguments": arguments, **order}) + "\n")
        self._orders.flush()
        answer = self._answers.readline()
        assert answer, f"the nursery is gone:\n{self._told()}"
        ended: dict[str, Any] = json.loads(answer)
        assert ended["status"] in (0, -signal.SIGKILL) or may_fail, self._told()
        return ended

    def close(self) -> None:
        self._orders.close()
        self._answers.close()
        self._process.wait()

    def _told(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-5000:] if self.log.exists() else ""


# What is compared


#: Names of what tells time, wherever they are.
CLOCKS = ("seconds", "elapsed", "start", "end", "date", "milliseconds")

#: A date, a time as pages and cards tell it, and the last column of a benchmark's costs.
TIMES = re.compile(
    r"\d{4}-\d\d-\d\d|\b\d+ min \d+ s\b|\b[\d.]+ (?:s|seconds|min|h|hours)\b|<td class=\"number\">[\d,]+</td></tr>"
)


def without_time(path: Path) -> Any:
    """Return what a file of a run holds, without what tells time: the one place that says what may differ."""
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".jsonl":
        return [_timeless(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.name == "results.csv":
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
        return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]
    if path.suffix in (".html", ".md"):
        return TIMES.sub("TIME", path.read_text(encoding="utf-8"))
    return path.read_bytes()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(own) for name, own in value.items() if name not in CLOCKS}
    if isinstance(value, list):
        return [_timeless(own) for own in value]
    return TIMES.sub("TIME", value) if isinstance(value, str) else value


def content(folder: Path) -> dict[str, Any]:
    """Return all that is in a folder, by path: of files what they hold, of folders None."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): None if p.is_dir() else without_time(p) for p in paths}


def assert_equal(found: Path, expected: Path) -> None:
    """Compare two folders, file by file."""
    here, there = content(found), content(expected)
    assert sorted(here) == sorted(there)
    for name, value in there.items():
        assert here[name] == value, name


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    _import_all()
    _serve(Path(sys.argv[1]))
