"""What a pool of a million rows costs: a step's time and the memory, against a pool of two thousand.

    python benchmarks/pool_size.py --rows 1000000 --steps 40

Both pools are the embedded task's, with a number after each question so that no two rows are alike, and both have
`lazy_features`. Two environments of one process step in turn, on one thread. The first episode computes the features
of the rows that it is offered; it is then made again, with all of them known. Both must be the same to the bit.

Memory is measured in a process of its own for each size: VmRSS once the libraries and the model are loaded and an
update was made on a pool of 64 rows, then after an episode, and the highest in between. Mapped files count as far as
they were touched.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np

from raise_env import RaiseSelectEnv
from raise_env.tiny.task import generate_task

SMALL = 2000
TEMPLATE_ROWS = 20_000
SEED = 0


def write_data(folder: Path, num_rows: int) -> tuple[Path, Path]:
    """Write a pool of so many rows and a dev set; return both files."""
    task = generate_task("default", pool_size=min(num_rows, TEMPLATE_ROWS))
    texts = [(json.dumps(row.prompt)[:-1], json.dumps(row.response)) for row in task.pool]
    pool, dev = folder / f"pool-{num_rows}.jsonl", folder / "dev.jsonl"
    with pool.open("w", encoding="utf-8") as file:
        for number, (prompt, response) in zip(range(num_rows), itertools.cycle(texts), strict=False):
            file.write(f'{{"instruction": {prompt} ({number})", "output": {response}, "number": {number}}}\n')
    lines = [json.dumps({"instruction": row.prompt, "output": row.response}) for row in task.dev]
    dev.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return pool, dev


def settings(folder: Path, pool: Path, dev: Path, num_steps: int) -> dict[str, Any]:
    """Return the environment's keywords."""
    files = {"pool": str(pool), "dev": str(dev), "cache_dir": str(folder / "cache")}
    return {**files, "lazy_features": True, "horizon": num_steps, "device": "cpu"}


def actions(num_steps: int) -> list[np.ndarray]:
    """Return an action for each step, eight rows of the 64, the same for every pool."""
    rng = np.random.default_rng(SEED)
    taken = [rng.choice(64, 8, replace=False) for _ in range(num_steps)]
    return [np.isin(np.arange(64), places).astype(np.int8) for places in taken]


def opened(keywords: dict[str, Any]) -> tuple[RaiseSelectEnv, float]:
    """Return an environment whose pool is open, and the seconds that it took."""
    env = RaiseSelectEnv(**keywords)
    start = time.perf_counter()
    env.load()
    return env, time.perf_counter() - start


def episode_in_turn(envs: Sequence[RaiseSelectEnv], num_steps: int) -> tuple[np.ndarray, list[str]]:
    """Make an episode in each environment, step by step in turn.

    Returns:
        Seconds of each step, shape (envs, steps), and a hash of each environment's observations and rewards.
    """
    digests = [hashlib.sha256() for _ in envs]
    for env, digest in zip(envs, digests, strict=True):
        digest.update(env.reset(seed=SEED)[0].tobytes())
    seconds = np.zeros((len(envs), num_steps))
    for step, action in enumerate(actions(num_steps)):
        turns = range(len(envs)) if step % 2 else reversed(range(len(envs)))
        for place in turns:
            start = time.perf_counter()
            observation, reward, *_ = envs[place].step(action)
            seconds[place, step] = time.perf_counter() - start
            digests[place].update(observation.tobytes() + repr(reward).encode())
    return seconds, [digest.hexdigest() for digest in digests]


def status(name: str) -> int:
    """Return a size of this process in bytes, as Linux gives it: VmRSS, or VmHWM for the highest so far."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}: memory is measured on Linux alone.")


def measure_memory(keywords: dict[str, Any]) -> None:
    """Print what opening a pool and an episode on it take, as JSON: run in a process of its own."""
    first = RaiseSelectEnv(pool_size=64, num_dev=8, auxiliary_updates=0, horizon=1, device="cpu")
    first.reset(seed=SEED)
    first.step(actions(1)[0])
    before = status("VmRSS")
    start = time.perf_counter()
    env = RaiseSelectEnv(**keywords)
    env.reset(seed=SEED)
    opening = time.perf_counter() - start
    episode_in_turn([env], env.config.horizon)
    resident, highest = status("VmRSS") - before, status("VmHWM") - before
    print(json.dumps({"opening": opening, "resident": resident, "highest": highest}))


def memory_of(keywords: dict[str, Any]) -> dict[str, float]:
    """Measure in a fresh process."""
    command = [sys.executable, __file__, "--measure", json.dumps(keywords)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def spread(values: np.ndarray) -> str:
    """Return median and quartiles of seconds in milliseconds."""
    low, middle, high = np.percentile(values * 1000, [25, 50, 75])
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


def ratio(seconds: np.ndarray) -> float:
    """Return how much longer the second environment's steps took than the first's, in the median."""
    return float(np.median(seconds[1]) / np.median(seconds[0]))


def measure(folder: Path, num_rows: int, num_steps: int) -> int:
    """Measure everything and print it; return the exit code."""
    sizes = [SMALL, num_rows]
    keywords = [settings(folder, *write_data(folder, size), num_steps) for size in sizes]
    fresh = [memory_of(own) for own in keywords]  # also computes and keeps tokens and the sample's features
    envs, opening = zip(*(opened(own) for own in keywords), strict=True)
    new, first_hashes = episode_in_turn(envs, num_steps)
    known, second_hashes = episode_in_turn(envs, num_steps)
    print(f"| | {sizes[0]:,} rows | {sizes[1]:,} rows | ratio |\n|---|---|---|---|")
    print(f"| step, ms, features known | {spread(known[0])} | {spread(known[1])} | {ratio(known):.2f} |")
    print(f"| step, ms, features computed | {spread(new[0])} | {spread(new[1])} | {ratio(new):.2f} |")
    print(f"| open for the first time, s | {fresh[0]['opening']:.1f} | {fresh[1]['opening']:.1f} | |")
    print(f"| open again, s | {opening[0]:.1f} | {opening[1]:.1f} | |")
    for name, key in (("resident beyond the model, MB", "resident"), ("the highest until then, MB", "highest")):
        print(f"| {name} | {fresh[0][key] / 1e6:.0f} | {fresh[1][key] / 1e6:.0f} | |")
    print("\nMedian (quartiles) of", num_steps, "steps each, 64 candidates, taken in turn.")
    if first_hashes != second_hashes:
        print("The second episode differs from the first.", file=sys.stderr)
        return 1
    print("Episodes made twice are the same to the bit.")
    return 0


def main() -> int:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the large pool")
    parser.add_argument("--steps", type=int, default=40, help="steps of an episode")
    parser.add_argument("--folder", type=Path, help="where the pools and the cache are for so long; needs about 1 GB")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        measure_memory(json.loads(arguments.measure))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        return measure(Path(folder), arguments.rows, arguments.steps)


if __name__ == "__main__":
    sys.exit(main())
