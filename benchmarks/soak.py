"""Whether long runs stay as they began: memory, open files and threads over thousands of episodes.

    make soak

One environment of the embedded task makes 5,000 episodes of four steps, and a vector of eight is reset and stepped 500
times. Every so often the process is looked at: resident memory after a collection of garbage, open files, threads,
child processes.

Memory counts as flat unless the line through what was seen after the first fifth rises by more than a KiB an episode,
and by two of its standard errors more: an observation that is kept would be 1.2 KiB for each of the four steps, an
adapter hundreds. Files and threads must not become more at all, and the first episode, made again at the end, must be
equal to the bit.
"""

from __future__ import annotations

import argparse
import csv
import gc
import hashlib
import io
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym
import numpy as np
import scipy.stats
from measure import machine, table

import raise_env
from raise_env.agents.plots import LEFT, Plot, add_axes, title
from raise_env.files import replaced, write_text
from raise_env.render import ACCENT, MUTED

gym.register_envs(raise_env)  # done by the import; this says so

#: The embedded task, as small as it can be with something left to do for every part.
SETTINGS = {
    "pool_size": 64,
    "num_candidates": 8,
    "num_classes": 2,
    "batch_size": 2,
    "horizon": 4,
    "num_dev": 4,
    "num_test": 4,
    "auxiliary_updates": 2,
}

#: What an episode may leave behind in the mean, bytes; in a vector each environment's counts.
MOST_BYTES = 1024

#: The share of looks that is left out of the line: caches fill, and the allocator settles.
WARM_UP = 0.2

_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Look:
    """What a process holds at a moment; memory in bytes."""

    episode: int
    resident: int
    files: int
    threads: int
    children: int

    @classmethod
    def now(cls, episode: int) -> Look:
        """Return what this process holds, garbage collected."""
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE
        files = len(os.listdir("/proc/self/fd"))
        return cls(episode, resident, files, threading.active_count(), len(multiprocessing.active_children()))


@dataclass(frozen=True, slots=True)
class Course:
    """A soak: the looks in order, and the hash of its first round and of the same one made again at the end."""

    most_bytes: float = MOST_BYTES
    looks: list[Look] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)

    @property
    def bytes_each(self) -> tuple[float, float]:
        """The slope of the line through memory after the warm-up, bytes an episode, and its standard error."""
        kept = self.looks[int(WARM_UP * len(self.looks)) :]
        line = scipy.stats.linregress([look.episode for look in kept], [look.resident for look in kept])
        return float(line.slope), float(line.stderr)

    def faults(self) -> list[str]:
        """Return in words what did not stay as it was."""
        first, last = self.looks[int(WARM_UP * len(self.looks))], self.looks[-1]
        slope, error = self.bytes_each
        found = [f"memory grows by {slope:.0f} bytes an episode"] if slope - 2 * error > self.most_bytes else []
        for name in ("files", "threads", "children"):
            before, after = getattr(first, name), getattr(last, name)
            found += [f"{name}: {before} became {after}"] if after > before else []
        return found + ([] if len(set(self.hashes)) == 1 else ["the first episode, made again, is another one"])


def soak(env: Any, rounds: int, every: int, play: Callable[[Any, int], str], most_bytes: float = MOST_BYTES) -> Course:
    """Play so many rounds, the first one once more, and close.

    Args:
        env: The environment, or a vector of them.
        rounds: How many, each with its number as seed.
        every: Rounds between two looks.
        play: Plays a round with a seed and returns a hash of all that it showed.
        most_bytes: What an episode may leave behind.
    """
    course = Course(most_bytes)
    for number in range(rounds):
        digest = play(env, number)
        if number == 0:
            course.hashes.append(digest)
        if number % every == every - 1:
            course.looks.append(Look.now((number + 1) * getattr(env, "num_envs", 1)))
    course.hashes.append(play(env, 0))
    env.close()
    return course


def episode(env: gym.Env[Any, Any], seed: int) -> str:
    """Make an episode of random rows and return a hash of observations, rewards and infos."""
    rng, digest, is_over = np.random.default_rng(seed), hashlib.sha256(), False
    observation, info = env.reset(seed=seed)
    _note(digest, observation, info)
    while not is_over:
        action = np.isin(np.arange(env.action_space.n), rng.choice(env.action_space.n, 2, replace=False))
        observation, reward, is_over, _, info = env.step(action.astype(np.int8))
        _note(digest, observation, {**info, "reward": reward})
    return digest.hexdigest()


def reset_and_step(vector: Any, seed: int) -> str:
    """Reset a vector, step it once, and return a hash of what it showed."""
    digest, num_rows = hashlib.sha256(), vector.single_action_space.n
    _note(digest, *vector.reset(seed=seed))
    observations, rewards, *_, infos = vector.step(
        np.tile(np.arange(num_rows) < 2, (vector.num_envs, 1)).astype(np.int8)
    )
    _note(digest, observations, {**infos, "reward": rewards})
    return digest.hexdigest()


def _note(digest: Any, observation: np.ndarray, info: dict[str, Any]) -> None:
    digest.update(observation.tobytes())
    for name in sorted(info):
        digest.update(name.encode() + np.asarray(info[name]).tobytes())


def memory_plot(courses: dict[str, Course]) -> Plot:
    """Return the figure of resident memory over episodes, a panel for each course."""

    def draw(figure: Any, narrow: bool) -> None:
        del narrow
        axes = add_axes(figure, LEFT, 14, 24, 34)
        title(axes, "Resident memory, MB")
        for (name, course), colour in zip(courses.items(), (ACCENT, MUTED), strict=True):
            shares = [100 * look.episode / course.looks[-1].episode for look in course.looks]
            axes.plot(shares, [look.resident / 1e6 for look in course.looks], color=colour, label=name)
        axes.set_xlabel("% of the run")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, loc="lower right")

    return Plot("soak", "Resident memory over thousands of episodes: a flat line.", draw)


def as_csv(courses: dict[str, Course]) -> str:
    """Return every look as a line of a table."""
    file = io.StringIO()
    writer = csv.DictWriter(file, ["course", *(column.name for column in fields(Look))], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"course": name, **asdict(look)} for name, course in courses.items() for look in course.looks)
    return file.getvalue()


def page(courses: dict[str, Course], seconds: float) -> str:
    """Return docs/results/soak.md."""
    rows = [
        {
            "course": name,
            "episodes": f"{course.looks[-1].episode:,}",
            "memory, MB": f"{course.looks[0].resident / 1e6:.1f} to {course.looks[-1].resident / 1e6:.1f}",
            "slope, bytes an episode": "{:.0f} ± {:.0f}".format(*course.bytes_each),
            "files": f"{course.looks[0].files} to {course.looks[-1].files}",
            "threads": f"{course.looks[0].threads} to {course.looks[-1].threads}",
            "faults": "; ".join(course.faults()) or "none",
        }
        for name, course in courses.items()
    ]
    words = (__doc__ or "").strip().split("\n\n", 2)[2]
    return (
        f"# Long runs\n\nWritten by `make soak` in {seconds / 60:.0f} minutes.\n\n{words}\n\n{table(rows)}\n\n"
        f"![Resident memory over the course of both](soak.png)\n\nEvery look: [soak.csv](soak.csv). {machine()}\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak, write page, figure and table, and return 1 if anything grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=5000)
    parser.add_argument("--resets", type=int, default=500)
    parser.add_argument("--most-bytes", type=float, default=MOST_BYTES, help="that an episode may leave behind")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "results")
    given = parser.parse_args(arguments)
    start = time.monotonic()
    single, vector = gym.make("RaiseSelect-v0", **SETTINGS), gym.make_vec("RaiseSelect-v0", num_envs=8, **SETTINGS)
    courses = {
        "one environment": soak(single, given.episodes, max(1, given.episodes // 100), episode, given.most_bytes),
        "a vector of eight": soak(vector, given.resets, max(1, given.resets // 100), reset_and_step, given.most_bytes),
    }
    figure = memory_plot(courses)
    write_text(given.out / "soak.csv", as_csv(courses))
    with replaced(given.out / "soak.png") as beside:
        beside.write_bytes(figure.png())
    write_text(given.out / "soak.md", page(courses, time.monotonic() - start))
    return 1 if any(course.faults() for course in courses.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
