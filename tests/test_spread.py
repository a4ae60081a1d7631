"""Work spread over processes and over a Ray cluster: each piece done once, whatever happens to the workers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from joblib.externals.loky import get_reusable_executor

from raise_env.agents.benchmark import BenchPlan, bench
from raise_env.agents.job import Entry
from raise_env.agents.spread import MAX_DEATHS, check_cluster, spread
from raise_env.errors import DataError, RaiseEnvError, SettingError

#: What is spread: square a number; kill this worker the first `deaths` times that the piece is 3.
WORK = """
import os, signal, time
from pathlib import Path
from raise_env.errors import DataError

def square(piece):
    number, folder, deaths = piece
    mark = Path(folder) / f"death-{len(list(Path(folder).glob('death-*')))}"
    if number == 3 and len(list(Path(folder).glob("death-*"))) < deaths:
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number

def here(_):
    return os.getcwd(), os.getpid()

def rests(_):
    time.sleep(1)

def refuses(piece):
    raise DataError(f"piece {piece} cannot be used.")
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A module that workers can import."""
    (tmp_path / "spread_work.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "spread_work", raising=False)
    get_reusable_executor().shutdown()  # workers of another test do not know this one's module
    import spread_work

    return spread_work


@pytest.mark.parametrize("workers", [None, 1, 2])
def test_spread__any_number_of_workers__does_each_piece_once(work, tmp_path, workers):
    pieces = [(number, str(tmp_path), 0) for number in range(7)]
    assert sorted(spread(work.square, pieces, workers)) == [number * number for number in range(7)]


def test_spread__one_worker_is_killed__its_piece_is_done_again(work, tmp_path, caplog):
    pieces = [(number, str(tmp_path), 1) for number in range(7)]
    assert sorted(spread(work.square, pieces, 2)) == [number * number for number in range(7)]
    assert "done again" in caplog.text


def test_spread__workers_that_always_die__is_an_error(work, tmp_path):
    pieces = [(3, str(tmp_path), 100)]
    with pytest.raises(RaiseEnvError, match=r"memory.*--resume"):
        list(spread(work.square, pieces, 2))
    assert len(list(tmp_path.glob("death-*"))) == MAX_DEATHS


def test_spread__a_piece_that_always_kills__is_lost_and_the_others_are_done(work, tmp_path):
    pieces = [(number, str(tmp_path), 100) for number in range(7)]
    found = list(spread(work.square, pieces, 2, lost=lambda piece: -piece[0]))
    assert sorted(found) == [-3, 0, 1, 4, 16, 25, 36]


def test_spread__a_piece_that_kills_beside_others__is_done_alone(work, tmp_path):
    pieces = [(3, str(tmp_path), MAX_DEATHS)]
    assert list(spread(work.square, pieces, 2, lost=lambda piece: -piece[0])) == [9]
    assert len(list(tmp_path.glob("death-*"))) == MAX_DEATHS


@pytest.mark.skipif("ray" in sys.modules, reason="Ray is loaded")
def test_spread__no_ray__says_what_to_install(work, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingError, match="pip install ray"):
        list(spread(work.here, [1], cluster="auto"))


#: As Ray does when it is imported.
RAY = """
import signal
signal.signal(signal.SIGTERM, lambda *_: None)

def is_initialized():
    return True
"""


def test_check_cluster__importing_ray__leaves_what_sigterm_does(tmp_path, monkeypatch):
    (tmp_path / "ray.py").write_text(RAY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    try:
        check_cluster("auto")
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.modules.pop("ray", None)


# A cluster of two machines, both of them this one.


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    # So much memory and room for plasma as a small machine has; Ray asks for a third of all otherwise.
    node = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(**{name: node[name] for name in ("num_cpus", "object_store_memory")})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def on_cluster(cluster, work):
    """The cluster's address; workers find the module with the work by the path that comes with each piece."""
    return cluster.address


@pytest.mark.slow
def test_spread__a_cluster__works_in_this_folder_in_other_processes(on_cluster, work, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = list(spread(work.here, range(6), cluster=on_cluster))
    assert {folder for folder, _ in found} == {str(tmp_path)}
    assert os.getpid() not in {process for _, process in found}


@pytest.mark.slow
def test_spread__a_clusters_worker_is_killed__its_piece_is_done_again(on_cluster, work, tmp_path):
    pieces = [(number, str(tmp_path), 1) for number in range(5)]
    assert sorted(spread(work.square, pieces, cluster=on_cluster)) == [0, 1, 4, 9, 16]


@pytest.mark.slow
def test_spread__a_clusters_workers_always_die__is_an_error(on_cluster, work, tmp_path):
    with pytest.raises(RaiseEnvError, match=r"4 times.*--resume"):
        list(spread(work.square, [(3, str(tmp_path), 100)], cluster=on_cluster))


@pytest.mark.slow
def test_spread__an_error_on_a_cluster__is_the_works_own(on_cluster, work):
    with pytest.raises(DataError, match="piece 7 cannot be used"):
        list(spread(work.refuses, [7], cluster=on_cluster))


@pytest.mark.slow
def test_spread__no_cluster_answers__says_how_to_start_one():
    pytest.importorskip("ray", reason="Ray is not installed")
    with pytest.raises(SettingError, match="ray start --head"):
        list(spread(print, [1], cluster="127.0.0.1:1"))


GOES_AWAY = """
import sys
from ray.cluster_utils import Cluster
from raise_env.agents.spread import spread
from raise_env.errors import RaiseEnvError
import spread_work

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80_000_000})
try:
    for _ in spread(spread_work.rests, range(50), cluster=cluster.address):
        print("done", flush=True)
        cluster.head_node.kill_raylet()
except RaiseEnvError as error:
    print(f"says: {error}")
"""


@pytest.mark.slow
def test_spread__this_machines_part_of_the_cluster_dies__says_how_to_go_on(work, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    script = tmp_path / "goes_away.py"
    script.write_text(GOES_AWAY)
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=True)
    assert re.search(r"^says: the cluster could not do a piece of work", ran.stdout, re.MULTILINE)
    assert "--resume" in ran.stdout


def numbers(folder: Path) -> list:
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    records = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    pairs = [({**line, "seconds": None}, record) for line, record in zip(lines, records, strict=True)]
    return sorted(pairs, key=lambda pair: (pair[0]["agent"], pair[0]["seed"]))


@pytest.mark.slow
def test_bench__serial_two_workers_and_a_cluster_with_a_killed_worker__are_equal(on_cluster, tmp_path, small_settings):
    entries = {
        name: Entry(name, episodes=1 if name == "raise_fork" else 0) for name in ("random", "oracle", "raise_fork")
    }
    plan = BenchPlan(small_settings, entries, num_seeds=3)
    bench(tmp_path / "serial", plan)
    bench(tmp_path / "workers", plan, workers=2)
    killed = []

    class KillsOne:
        """A reporter that kills one of the cluster's workers after the second run."""

        def task(self, name, total):
            import contextlib

            @contextlib.contextmanager
            def shown():
                def show(done):
                    if "runs" in name and done == 2 and not killed:
                        killed.append(_kill_a_worker())

                yield show

            return shown()

    bench(tmp_path / "cluster", plan, cluster=on_cluster, reporter=KillsOne())
    assert killed[0] is not None
    assert numbers(tmp_path / "serial") == numbers(tmp_path / "workers") == numbers(tmp_path / "cluster")


def _kill_a_worker(patience: float = 20.0) -> int | None:
    """Kill a process that Ray shows as busy with a piece of work; None where none was found."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                title = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith(b"ray::_there"):
                os.kill(int(folder.name), signal.SIGKILL)
                return int(folder.name)
        time.sleep(0.05)
    return None
