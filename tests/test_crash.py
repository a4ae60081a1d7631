"""What is killed at any moment and gone on with leaves what an undisturbed run leaves, to the bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from crash_harness import Nursery, assert_equal, content
from data_files import jsonl

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")

FORK = {"num_states": 2, "num_rows": 16, "num_lookahead": 1, "num_networks": 2, "num_passes": 3}
#: Rollouts of four steps and episodes of three: learning is interrupted in the middle of both.
LEARNERS = {
    "raise_fork": FORK,
    "raise_ppo": {"num_epochs": 2},
    "sb3:PPO": {"n_steps": 4, "batch_size": 4, "n_epochs": 2},
    "sb3:DQN": {"learning_starts": 4, "batch_size": 4},
    "sb3:SAC": {"learning_starts": 3, "batch_size": 4},
    "placebo:raise_ppo": {},
}


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nursery")
    nursery = Nursery(folder, folder / "cache")
    yield nursery
    nursery.close()


class Trial:
    """Some work, done once undisturbed and then again and again with deaths on the way.

    Args:
        nursery: Where it is done.
        folder: For everything.
        work: What is done.
        own_cache: Whether features are computed in front of it each time.
        arguments: Of the work; "OUT" stands for the folder that is written.
    """

    def __init__(self, nursery, folder, work, *, own_cache=False, **arguments):
        self._nursery, self._folder, self._work, self._arguments = nursery, folder, work, arguments
        self._own_cache = own_cache
        self.num_kills = self.num_tried = 0
        whole = self.run("undisturbed")
        assert whole["status"] == 0
        self._num_deeds, self._seconds = whole["num_deeds"], whole["seconds"]

    def survive(self, rng, kills_at_most=4):
        """Do the work, dying on the way a few times, and compare what is there in the end."""
        name = f"killed-{self.num_tried}"
        self.num_tried += 1
        deaths = []
        while len(deaths) < kills_at_most:
            death = {"die_at": rng.randint(1, self._num_deeds)}
            if rng.random() < 0.4:
                death = {"die_after_s": rng.uniform(0.0, self._seconds)}
            if self.run(name, **death)["status"] == 0:
                break
            deaths.append(death)
        self.num_kills += len(deaths)
        assert self.run(name)["status"] == 0, deaths
        try:
            assert_equal(self._folder / name, self._folder / "undisturbed")
        except AssertionError as error:
            raise AssertionError(f"after {deaths}: {error}") from error

    def run(self, name, **death):
        """Do the work in a folder of that name."""
        out = self._folder / name
        if self._own_cache:
            death["cache"] = str(out / "cache")
        arguments = {key: str(out / "out") if value == "OUT" else value for key, value in self._arguments.items()}
        if "settings" in arguments and arguments["settings"].get("cache_dir") == "OUT":
            arguments["settings"] = {**arguments["settings"], "cache_dir": str(out)}
        return self._nursery.run(self._work, arguments, **death)


def plan_of(agent, small_settings, **more):
    own = {"agent": agent, "agent_settings": LEARNERS[agent], "episodes": 3, "num_runs": 2, **more}
    return {"settings": small_settings, **own}


def train_trial(nursery, folder, small_settings, agent, **more):
    return Trial(nursery, folder, "train", own_cache=True, out="OUT", plan=plan_of(agent, small_settings, **more))


def features_trial(nursery, folder, small_settings, in_memory):
    settings = {**small_settings, "cache_dir": "OUT"}
    if in_memory is not None:  # a pool that is large is one of a file
        for name, start, count in (("pool", 0, 60), ("dev", 1000, 8)):
            rows = [{"prompt": f"What is {i} and one?", "response": str(i + 1)} for i in range(start, start + count)]
            settings[name] = str(folder / f"{name}.jsonl")
            Path(settings[name]).write_text(jsonl(*rows))
        settings = {k: v for k, v in settings.items() if k not in ("pool_size", "num_test", "num_dev")}
    return Trial(nursery, folder, "features", settings=settings, in_memory=in_memory)


def bench_trial(nursery, folder, small_settings):
    entries = {
        "random": {"agent": "random"},
        "sb3:PPO": {"agent": "sb3:PPO", "episodes": 1, "arguments": LEARNERS["sb3:PPO"]},
        "raise_fork": {"agent": "raise_fork", "episodes": 1, "arguments": FORK},
    }
    return Trial(nursery, folder, "bench", out="OUT", settings=small_settings, entries=entries, num_seeds=2)


def finetune_trial(nursery, folder, small_settings, own_cache=True):
    made = folder / "selector-of"
    plan = plan_of("raise_ppo", small_settings, episodes=1, num_runs=1)
    assert nursery.run("train", {"out": str(made), "plan": plan})["status"] == 0
    selector = str(made / "selector")
    given = {"out": "OUT", "selector": selector, "settings": small_settings}
    return Trial(nursery, folder, "finetune", own_cache=own_cache, **given)


def test_train__killed_again_and_again__equals_an_undisturbed_run(nursery, tmp_path, small_settings):
    trial = train_trial(nursery, tmp_path, small_settings, "sb3:PPO", num_runs=1, episodes=2, compare=())
    trial.survive(random.Random(1), kills_at_most=2)
    assert trial.num_kills


def test_features__killed_again_and_again__equal_those_made_in_one_go(nursery, tmp_path, small_settings):
    trial = features_trial(nursery, tmp_path, small_settings, in_memory=None)
    trial.survive(random.Random(3), kills_at_most=2)
    assert trial.num_kills


def test_finetune__killed_at_each_of_its_first_deeds__leaves_nothing_behind(nursery, tmp_path, small_settings):
    """Before run.json is there, and so before anything tells that the folder holds a run."""
    trial = finetune_trial(nursery, tmp_path, small_settings, own_cache=False)
    for deed in range(1, 6):
        assert trial.run("killed", die_at=deed)["status"] == -signal.SIGKILL
    assert trial.run("killed")["status"] == 0
    assert_equal(tmp_path / "killed", tmp_path / "undisturbed")


MAKERS = {
    **{f"train {name}": lambda *given, name=name: train_trial(*given, name) for name in LEARNERS},
    "bench": bench_trial,
    "finetune": finetune_trial,
    "features": lambda *given: features_trial(*given, None),
    "features of a large pool": lambda *given: features_trial(*given, 40),
}

#: Kills of each kind of work; together more than a hundred.
NUM_KILLS = 12


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_everything__killed_many_times__equals_an_undisturbed_run(nursery, tmp_path, small_settings, capsys, kind):
    trial = MAKERS[kind](nursery, tmp_path, small_settings)
    rng = random.Random(f"kills of {kind}")
    while trial.num_kills < NUM_KILLS:
        trial.survive(rng)
    with capsys.disabled():
        print(f"\n{kind}: {trial.num_kills} kills in {trial.num_tried} runs, all of them survived")


@pytest.mark.slow
def test_main__command_killed_while_it_works__is_gone_on_with(tmp_path, small_settings):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in small_settings.items()]
    learner = ["--agent=sb3:DQN", "--agent-args=learning_starts=4,batch_size=4", "--episodes=40", "--runs=1"]
    command = [sys.executable, "-m", "raise_env.agents", "train", *options, *learner]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def begin(folder):
        return subprocess.Popen([*command, "--out", str(folder), "--resume"], env=environment)

    killed, rng = tmp_path / "killed", random.Random(5)
    for _ in range(3):
        process, journal = begin(killed), killed / "learning" / "steps.jsonl"
        had = len(journal.read_bytes()) if journal.exists() else 0
        while process.poll() is None and not (journal.exists() and len(journal.read_bytes()) > had):
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was over before: take more episodes"
    assert begin(killed).wait() == 0
    assert begin(tmp_path / "undisturbed").wait() == 0
    assert_equal(killed, tmp_path / "undisturbed")


# Disk and memory


def mounted(folder, num_kilobytes):
    """Mount, or mount again, a disk of that size; skip where nobody may."""
    options = f"size={num_kilobytes}k"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if folder.is_mount():
        command = ["mount", "-o", f"remount,{options}", str(folder)]
    folder.mkdir(exist_ok=True)
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no small disk can be mounted here: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["train raise_fork", "train sb3:PPO", "bench"])
def test_everything__disk_that_is_full_again_and_again__says_so_and_ends_equal(nursery, tmp_path, small_settings, kind):
    trial = MAKERS[kind](nursery, tmp_path, small_settings)
    disk, size, told = tmp_path / "killed-0", 4, []
    try:
        while not told or told[-1]["status"]:
            mounted(disk, size)
            told.append(trial.run("killed-0", may_fail=True))
            size = round(1.4 * size)
        for ended in told[:-1]:
            assert ended["error"].startswith("OutputError"), ended["error"]
            assert "No space left on device" in ended["error"]
        assert len(told) > 5
        assert_equal(disk, tmp_path / "undisturbed")
    finally:
        subprocess.run(["umount", str(disk)], check=False, capture_output=True)


@pytest.mark.slow
def test_train__files_that_may_not_grow__says_so_and_ends_equal(nursery, tmp_path, small_settings):
    trial = train_trial(nursery, tmp_path, small_settings, "raise_ppo")
    size, told = 100, []
    while not told or told[-1]["status"]:
        told.append(trial.run("killed-0", may_fail=True, file_bytes=size))
        size *= 2
    for ended in told[:-1]:
        assert ended["error"].startswith("OutputError"), ended["error"]
        assert "File too large" in ended["error"]
    assert len(told) > 5
    assert_equal(tmp_path / "killed-0" / "out", tmp_path / "undisturbed" / "out")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of a process is read from /proc")
@pytest.mark.slow
def test_step__processor_without_memory__says_what_needs_less_and_the_episode_goes_on(nursery, small_settings):
    settings = {**small_settings, "num_candidates": 64, "num_classes": 1}
    ended = nursery.run("step_in", {"more_bytes": 2_000_000, "settings": settings})
    assert ended["status"] == 0


def test_content__what_tells_time__is_all_that_is_left_out(tmp_path):
    (tmp_path / "run.json").write_text('{"start": "2020-01-01", "seconds": {"a": 1.5}, "told": "in 3 seconds", "n": 3}')
    (tmp_path / "report.html").write_text("<p>2020-01-01, 12.5 s, 7 of 8</p>")
    assert content(tmp_path) == {"report.html": "<p>TIME, TIME, 7 of 8</p>", "run.json": {"told": "in TIME", "n": 3}}
