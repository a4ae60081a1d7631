"""What earlier versions wrote is still read: a little of everything, in tests/samples, by the version that wrote it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from raise_env import RaiseSelectEnv, __version__
from raise_env.agents import run_episode
from raise_env.agents.catalogue import load_selector
from raise_env.agents.run_folder import read_json
from raise_env.agents.summary import SUMMARY_VERSION
from raise_env.agents.validation import check_results, read_bench
from raise_env.auxiliary import Auxiliary
from raise_env.features import SCHEMA_VERSION as FEATURES_VERSION
from raise_env.record import read_records, replay

SAMPLES = sorted(
    path for path in (Path(__file__).parent / "samples").iterdir() if path.is_dir() and path.name[0].isdigit()
)


@pytest.fixture(params=SAMPLES, ids=lambda path: path.name)
def sample(request):
    """The folder of one version."""
    return request.param


@pytest.fixture
def records(sample):
    """The record of each learned selector by its name."""
    return {record.agent: record for record in read_records(sample / "episodes.jsonl")}


def test_samples__this_version__has_some():
    assert __version__ in {path.name for path in SAMPLES}, "make them: python tests/samples/make.py"


def test_records__of_earlier_versions__replay(records):
    assert {name: replay(record)[0] for name, record in records.items()} == dict.fromkeys(records)


def test_selectors__of_earlier_versions__choose_what_they_chose(sample, records):
    for name, record in records.items():
        env = RaiseSelectEnv(**record.env["kwargs"])
        again = run_episode(env, load_selector(sample / name), seed=record.seed, name=name)
        assert [sorted(rows) for rows in again.actions] == [sorted(rows) for rows in record.actions], name


def test_cache__of_earlier_versions__is_read_and_nothing_computed(sample, records, tmp_path, monkeypatch):
    (index,) = (sample / "cache").glob("features-*/index.json")
    if json.loads(index.read_text(encoding="utf-8"))["key"]["schema"] != FEATURES_VERSION:
        pytest.skip("the columns mean something else since then: they are computed again")
    shutil.copytree(sample / "cache", tmp_path / "cache")
    monkeypatch.setattr(Auxiliary, "raw_rows", lambda *_: pytest.fail("features were computed"))
    monkeypatch.setattr("raise_env.auxiliary.kmeans_classes", lambda *_: pytest.fail("classes were computed"))
    kwargs = next(iter(records.values())).env["kwargs"]
    RaiseSelectEnv(**kwargs, device="cpu", cache_dir=str(tmp_path / "cache")).load()


def test_benchs__of_earlier_versions__lines_and_records_are_read_and_agree(sample):
    lines, recorded = read_bench(sample / "bench")
    assert {(line["agent"], line["seed"]) for line in lines} == {
        (agent, seed) for agent in ("random", "oracle") for seed in (0, 1)
    }
    assert check_results(lines, recorded) == {}
    assert [replay(own.record)[0] for own in recorded] == [None] * 4


def test_benchs__of_earlier_versions__run_and_summary_are_read(sample):
    assert read_json(sample / "bench" / "run.json")["status"] == "done"
    assert read_json(sample / "bench" / "summary.json")["schema_version"] <= SUMMARY_VERSION
