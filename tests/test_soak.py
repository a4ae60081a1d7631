"""Long runs stay as they began: what `make soak` measures at full length, here in a shorter form."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raise_env.testing import toy_env

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    """benchmarks/soak.py, beside what it imports."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    import soak

    yield soak
    for name in ("soak", "measure"):
        sys.modules.pop(name, None)


def course_of(bench, resident, files=6, digests=("same", "same")):
    """A course of a hundred looks, one every ten episodes."""
    looks = [bench.Look(10 * look, resident(look), files if look > 50 else 6, 1, 0) for look in range(100)]
    return bench.Course(looks=looks, hashes=list(digests))


def test_faults__memory_that_grows_after_the_warm_up__are_named_with_the_slope(bench):
    assert course_of(bench, lambda look: 5 * 10**8 + 4096 * 10 * look).faults() == [
        "memory grows by 4096 bytes an episode"
    ]


def test_faults__memory_that_grows_while_warming_up_or_falls__are_none(bench):
    assert course_of(bench, lambda look: 5 * 10**8 + 10**6 * min(look, 20)).faults() == []
    assert course_of(bench, lambda look: 5 * 10**8 - 10**5 * look).faults() == []


def test_faults__more_files_and_another_last_episode__are_named(bench):
    faults = course_of(bench, lambda look: 5 * 10**8, files=7, digests=("one", "other")).faults()
    assert faults == ["files: 6 became 7", "the first episode, made again, is another one"]


def test_soak__files_that_stay_open__are_seen(bench, tmp_path):
    """A hundred a round: what else this process lets go of meanwhile is a file or two."""
    opened = []

    def play(env, seed):
        opened.extend((tmp_path / "file").open("w") for _ in range(100))
        return bench.episode(env, seed)

    course = bench.soak(toy_env(), 5, 1, play)
    for file in opened:
        file.close()
    files = [look.files for look in course.looks]
    assert [round((later - files[0]) / 100) for later in files] == [0, 1, 2, 3, 4]
    assert any(fault.startswith("files: ") for fault in course.faults())
    assert len(set(course.hashes)) == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of itself in /proc")
def test_main__a_thousand_episodes_and_a_hundred_resets__leave_nothing_behind(tmp_path):
    """In a process of its own: one with free memory would take a leak from that."""
    command = [sys.executable, str(BENCHMARKS / "soak.py"), "--episodes", "1000", "--resets", "100"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + (tmp_path / "soak.md").read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"soak.md", "soak.csv", "soak.png"}
    assert len((tmp_path / "soak.csv").read_text(encoding="utf-8").splitlines()) == 201
