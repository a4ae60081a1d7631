from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from joblib.externals.loky import get_reusable_executor

from raise_env import RaiseSelectEnv
from raise_env.agents import RaiseFork, load_selector
from raise_env.agents.baselines import RandomAgent
from raise_env.agents.benchmark import ALL_FEATURES, BenchPlan, ablation, bench
from raise_env.agents.feature_view import AUXILIARY
from raise_env.agents.job import OWN_TASK, Entry
from raise_env.agents.rollout import run_episode
from raise_env.agents.sb3 import Sb3Agent
from raise_env.agents.summary import summarise
from raise_env.assets import _cached_assets, load_data
from raise_env.base_model import load_tokenizer
from raise_env.config import OBSERVATION_BLOCKS, EnvConfig
from raise_env.encoding import Encoder
from raise_env.errors import DataError, OutputError, RaiseEnvError, RecordError, SettingError
from raise_env.record import read_records, replay, versions

PPO_SETTINGS = {"gamma": 0.5}

#: Agents of one's own that do everything an agent can do wrong, or right.
OWN_AGENTS = """
import os
import numpy as np
from raise_env.agents.baselines import RandomAgent
from raise_env.agents.base import world_of

class Dies(RandomAgent):
    def begin(self, env, seed):
        os._exit(9)

class Fails(RandomAgent):
    seeds = (1001,)
    def scores(self, observation):
        if self._seed in self.seeds:
            raise KeyError("lost")
        return super().scores(observation)
    def begin(self, env, seed):
        super().begin(env, seed)
        self._seed = seed

class Always(Fails):
    seeds = (1000, 1001)

class Silly(RandomAgent):
    episode_returns = [float("nan")]

class Shapeless(RandomAgent):
    def predict(self, observation, state=None, episode_start=None, deterministic=True):
        return np.ones(3), state

class Hooks(RandomAgent):
    uses_features = False
    prepared = []
    def prepare(self, env, seed):
        self.prepared.append((seed, world_of(env).config.horizon))
        world_of(env).row_losses([0, 1])
    def run_settings(self, config, num_rows):
        return {"horizon": config.horizon + 1}

class Learns(RandomAgent):
    learned = []
    def learn(self, env, episodes, seed=0, progress=None):
        self.learned.append((episodes, seed, world_of(env).config.hide))
        return self

class Watches(RandomAgent):
    seen = []
    def scores(self, observation):
        self.seen.append((self._world.config.hide, self._world.config.seed_model, observation))
        return super().scores(observation)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module with agents of one's own."""
    (tmp_path / "bench_agents.py").write_text(OWN_AGENTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bench_agents", raising=False)
    return importlib.import_module("bench_agents")


class Interrupts:
    """A reporter that interrupts once so many runs are done."""

    def __init__(self, done):
        self.done = done

    @contextlib.contextmanager
    def task(self, name, total):
        def show(done):
            if "runs" in name and done >= self.done:
                raise KeyboardInterrupt

        yield show


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda text: pytest.fail(f"{path}: {text}"))


def numbers(folder):
    """What a folder holds but for order and times: lines, records and selectors."""
    lines = [{**line, "seconds": None} for line in read_lines(folder / "results.jsonl")]
    summary = read_json(folder / "summary.json")
    for cost in summary["cost"].values():
        cost["seconds"] = None
    files = {str(p.relative_to(folder)): p.read_bytes() for p in (folder / "selectors").rglob("*") if p.is_file()}
    records = sorted((folder / "episodes.jsonl").read_text(encoding="utf-8").splitlines())
    return sorted(json.dumps(line) for line in lines), records, summary, files


@pytest.fixture(scope="module")
def plan(small_settings):
    names = ("random", "oracle", "ifd")
    entries = {name: Entry(name) for name in names} | {"sb3:PPO": Entry("sb3:PPO", PPO_SETTINGS, episodes=2)}
    return BenchPlan(small_settings, entries, num_seeds=2)


def of_own(small_settings, *names, **changes):
    entries = {name: Entry(f"bench_agents:{name}") for name in names}
    return BenchPlan(small_settings, entries, **{"num_seeds": 2, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory, plan):
    """A benchmark that nothing disturbed, made by this process alone."""
    folder = tmp_path_factory.mktemp("finished") / "bench"
    bench(folder, plan)
    return folder


# What a run is


def test_bench__results__a_line_for_every_task_agent_and_seed(finished, plan):
    lines = read_lines(finished / "results.jsonl")
    expected = {("default", agent, seed) for agent in plan.entries for seed in (0, 1)}
    assert {(line["task"], line["agent"], line["seed"]) for line in lines} == expected
    assert len(lines) == 8
    for line in lines:
        assert line["error"] is None
        assert line["diverged"] is False
        assert set(line["phi_parts"]) == {"features", "preparation", "learning", "final"}
        assert set(line["seconds"]) == set(line["tokens"]) == {"features", "preparation", "learning", "final"}
        assert math.isfinite(line["dev_loss"] + line["test_loss"] + line["phi"])
        assert 0 <= line["test_accuracy"] <= 1


def test_bench__a_line__is_what_a_run_made_by_hand_comes_to(finished, embedded_env):
    (line,) = [e for e in read_lines(finished / "results.jsonl") if (e["agent"], e["seed"]) == ("random", 1)]
    env = embedded_env(seed_model=1)
    record = run_episode(env, RandomAgent(), seed=1001, name="random")
    assert record.to_json() in (finished / "episodes.jsonl").read_text().splitlines()
    assert line["dev_loss"] == pytest.approx(-record.dev_scores[-1], abs=1e-9)
    assert line["test_loss"] == record.final["test_loss"]
    assert line["test_accuracy"] == record.final["test_exact_match"]
    assert line["rows"] == len({row for rows in record.actions for row in rows})
    assert line["updates"] == 3


def test_bench__phi__tokens_counted_by_hand(finished, plan, embedded_env):
    data = load_data(EnvConfig.from_kwargs(plan.settings))
    encoder = Encoder(load_tokenizer("tiny"), 256)
    lengths, dev = encoder.encode(data.pool).lengths, int(encoder.encode(data.dev).lengths.sum())
    one = 9 * int(lengths.sum())
    features = embedded_env().assets.features.num_tokens
    for line, record in zip(
        read_lines(finished / "results.jsonl"), read_records(finished / "episodes.jsonl"), strict=True
    ):
        parts = line["phi_parts"]
        assert parts["final"] == pytest.approx(sum(3 * int(lengths[rows].sum()) + dev for rows in record.actions) / one)
        assert parts["features"] == pytest.approx(
            {"random": 0, "oracle": 0, "ifd": features, "sb3:PPO": features}[line["agent"]] / one
        )
        assert (parts["learning"] > 0) == (line["agent"] == "sb3:PPO")
        assert parts["preparation"] == 0
        assert line["phi"] == pytest.approx(sum(parts.values()))


def test_bench__agents_of_one_seed__begin_alike_and_are_offered_the_same(finished):
    records = list(read_records(finished / "episodes.jsonl"))
    assert {record.seed for record in records} == {1000, 1001}
    for record in records:
        assert record.env["kwargs"].get("seed_model", 0) == record.seed - 1000
    ways = [{tuple(map(tuple, record.actions)) for record in records if record.seed == seed} for seed in (1000, 1001)]
    assert all(len(way) > 1 for way in ways), "they choose differently"
    assert [replay(record, tolerance=0.0) for record in records[:4]] == [(None, 0.0)] * 4


def test_bench__an_agent_that_learns__does_so_with_the_runs_seed_and_is_kept(finished, embedded_env, tmp_path):
    folders = finished / "selectors" / "default"
    assert [path.name for path in folders.iterdir()] == ["sb3-PPO"]
    weights = [(folders / "sb3-PPO" / str(seed) / "model.safetensors").read_bytes() for seed in (0, 1)]
    assert weights[0] != weights[1]
    Sb3Agent("PPO", **PPO_SETTINGS).learn(embedded_env(seed_model=1), 2, seed=1).save(tmp_path / "by-hand")
    assert weights[1] == (tmp_path / "by-hand" / "model.safetensors").read_bytes()
    assert load_selector(folders / "sb3-PPO" / "0").hyperparameters == PPO_SETTINGS


def test_bench__agents_with_hooks__are_prepared_in_their_own_environment(own, tmp_path, small_settings):
    bench(tmp_path / "bench", of_own(small_settings, "Hooks"))
    assert own.Hooks.prepared == [(0, 4), (1, 4)]
    lines, records = (
        read_lines(tmp_path / "bench" / "results.jsonl"),
        read_records(tmp_path / "bench" / "episodes.jsonl"),
    )
    for line, record in zip(lines, records, strict=True):
        assert len(record.actions) == line["updates"] == 4
        assert line["phi_parts"]["preparation"] > 0
        assert line["seconds"]["preparation"] > 0
        assert line["phi_parts"]["features"] == 0, "it says that it uses none"


def test_bench__a_learned_selector_on_another_pool__sees_features_of_the_auxiliary_model_that_it_carries(
    tmp_path, plan, finished
):
    folder = finished / "selectors" / "default" / "sb3-PPO" / "0"
    entries = {"random": Entry("random"), "learned": Entry(f"selector:{folder}")}
    elsewhere = BenchPlan({**plan.settings, "task_seed": 1}, entries, num_seeds=1)
    assert bench(tmp_path / "bench", elsewhere)["missing"] == []
    random, learned = read_records(tmp_path / "bench" / "episodes.jsonl")
    assert learned.env["kwargs"]["auxiliary_adapter"] == str(folder / AUXILIARY)
    assert "auxiliary_adapter" not in random.env["kwargs"]
    assert learned.content.items() > random.content.items()


def test_bench__a_selector_for_other_features__is_named_before_anything_is_run(tmp_path, plan, finished):
    folder = finished / "selectors" / "default" / "sb3-PPO" / "0"
    entries = {"random": Entry("random"), "learned": Entry(f"selector:{folder}")}
    with pytest.raises(SettingError, match=r"'learned' on task 'default': .*after 2 updates.*after 1:"):
        bench(tmp_path / "bench", BenchPlan({**plan.settings, "auxiliary_updates": 1}, entries, num_seeds=1))
    assert not (tmp_path / "bench").exists()


def test_bench__threads__are_one_meanwhile_and_as_before_afterwards(own, tmp_path, small_settings, monkeypatch):
    counts = []
    monkeypatch.setattr(own.Watches, "begin", lambda self, env, seed: counts.append(torch.get_num_threads()))
    monkeypatch.setattr(own.Watches, "scores", lambda self, observation: np.arange(len(observation)))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        bench(tmp_path / "bench", of_own(small_settings, "Watches", num_seeds=1))
        assert counts == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_bench__another_reward_than_the_loss__still_reports_the_loss(tmp_path, small_settings, embedded_env):
    settings = {**small_settings, "reward": "exact_match"}
    bench(tmp_path / "bench", BenchPlan(settings, {"random": Entry("random")}, num_seeds=1))
    (line,) = read_lines(tmp_path / "bench" / "results.jsonl")
    env = embedded_env(reward="exact_match")
    run_episode(env, RandomAgent(), seed=1000, name="random")
    assert line["dev_loss"] == pytest.approx(env.evaluate("dev").loss)


# The folder


def test_bench__summary__is_that_of_the_lines(finished, plan):
    summary = read_json(finished / "summary.json")
    lines = read_lines(finished / "results.jsonl")
    assert summary == summarise(lines, ("default",), list(plan.entries), range(2), "random")
    assert summary["missing"] == []


def test_bench__run_json__says_what_was_asked_for(finished, plan):
    run = read_json(finished / "run.json")
    assert (run["command"], run["status"], run["plan"]) == ("bench", "done", plan.to_json())
    assert set(run["content"]["default"]) == {"model", "pool", "dev", "test"}


def test_bench__folder__nothing_half_written_is_left(finished):
    assert {path.name for path in finished.iterdir()} == {
        *("run.json", "results.jsonl", "episodes.jsonl", "summary.json", "selectors"),
        *("report.html", "results.csv", "plots"),
    }
    assert not list(finished.rglob(".*"))


def documented(heading):
    """Return the fields in the first table under a heading of docs/files.md."""
    text = (Path(__file__).parents[1] / "docs" / "files.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(.*?)`", cell)}


def test_files_md__fields__are_those_that_are_written(finished):
    assert set(read_lines(finished / "results.jsonl")[0]) == documented("results.jsonl")
    assert set(read_json(finished / "summary.json")) == documented("summary.json")


def test_files_md__run_json__has_the_fields_that_a_benchmark_writes(finished):
    text = (Path(__file__).parents[1] / "docs" / "files.md").read_text(encoding="utf-8")
    row = re.search(r"^\| `run.json` \| .*`reference`.*$", text, re.MULTILINE).group()
    assert set(re.findall(r"`(\w+)`", row)) & documented("run.json") == set(read_json(finished / "run.json"))


# Any order, any number of workers, any interruption


def test_bench__two_workers__equal_one_up_to_order_and_times(tmp_path, plan, finished):
    bench(tmp_path / "bench", plan, workers=2)
    assert numbers(tmp_path / "bench") == numbers(finished)


@pytest.mark.slow
def test_bench__worker_that_dies__fails_that_run_alone(own, tmp_path, small_settings):
    get_reusable_executor().shutdown()  # workers of another test do not know this one's module
    plan = of_own(small_settings, "Dies", "Hooks", num_seeds=1)
    summary = bench(tmp_path / "bench", plan, workers=2)
    errors = {line["agent"]: line["error"] for line in read_lines(tmp_path / "bench" / "results.jsonl")}
    assert set(errors) == {"Dies", "Hooks"}
    assert errors["Hooks"] is None
    assert summary["missing"] == [{"task": "default", "agent": "Dies", "seed": 0, "reason": errors["Dies"]}]
    assert "lack of memory" in errors["Dies"]
    assert read_json(tmp_path / "bench" / "run.json")["status"] == "done"


@pytest.mark.parametrize("done", [1, 4, 7])
def test_bench__interrupted_then_resumed__equals_an_undisturbed_one(tmp_path, plan, finished, done):
    folder = tmp_path / "bench"
    with pytest.raises(KeyboardInterrupt):
        bench(folder, plan, reporter=Interrupts(done))
    assert read_json(folder / "run.json")["status"] == "interrupted"
    assert len(read_lines(folder / "results.jsonl")) == done
    before = read_json(folder / "run.json")["seconds"]
    assert before["runs"] == seconds_told(folder)
    assert min(before.values()) > 0
    bench(folder, plan, resume=True)
    assert all(value > before[kind] for kind, value in read_json(folder / "run.json")["seconds"].items())
    assert numbers(folder) == numbers(finished)


def seconds_told(folder):
    """What the lines of results say of time, all together."""
    lines = read_lines(folder / "results.jsonl")
    return pytest.approx(sum(seconds for line in lines for seconds in (line["seconds"] or {}).values()))


def test_bench__time_of_processes_that_were_killed__is_that_of_their_lines(tmp_path, plan, finished):
    folder = copy_of(finished, tmp_path / "bench")
    state = read_json(folder / "run.json")
    state["seconds"] = {"runs": 0.001, "elapsed": 0.001}  # as it was when another process went on
    (folder / "run.json").write_text(json.dumps(state))
    bench(folder, plan, resume=True)
    assert read_json(folder / "run.json")["seconds"]["runs"] == seconds_told(folder)


def copy_of(finished, folder):
    shutil.copytree(finished, folder)
    return folder


def test_bench__killed_between_the_first_record_and_its_line__makes_that_run_again(tmp_path, plan, finished):
    folder = copy_of(finished, tmp_path / "bench")
    (folder / "results.jsonl").unlink()
    first, *_ = (finished / "episodes.jsonl").read_text().splitlines(keepends=True)
    (folder / "episodes.jsonl").write_text(first)
    bench(folder, plan, resume=True)
    assert (folder / "episodes.jsonl").read_bytes() == (finished / "episodes.jsonl").read_bytes()
    assert numbers(folder) == numbers(finished)


@pytest.mark.parametrize("name", ["results.jsonl", "episodes.jsonl"])
@pytest.mark.parametrize("lost", [1, 100])
def test_bench__last_line_is_torn__that_run_is_made_again(tmp_path, plan, finished, name, lost):
    folder = copy_of(finished, tmp_path / "bench")
    (folder / name).write_bytes((folder / name).read_bytes()[:-lost])
    bench(folder, plan, resume=True)
    assert numbers(folder) == numbers(finished)


def test_bench__a_record_without_its_line__that_run_is_made_again(tmp_path, plan, finished):
    folder = copy_of(finished, tmp_path / "bench")
    lines = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    (folder / "results.jsonl").write_text("".join(lines[:-1]))
    bench(folder, plan, resume=True)
    assert numbers(folder) == numbers(finished)


def test_bench__resume_of_a_finished_one__runs_nothing(tmp_path, plan, finished, monkeypatch):
    folder = copy_of(finished, tmp_path / "bench")
    monkeypatch.setattr("raise_env.agents.benchmark.run_job", lambda job: pytest.fail(f"{job} is done"))
    assert bench(folder, plan, resume=True) == read_json(finished / "summary.json")


def test_bench__lines_and_records_that_do_not_go_together__are_refused(tmp_path, plan, finished):
    folder = copy_of(finished, tmp_path / "bench")
    records = (folder / "episodes.jsonl").read_text().splitlines(keepends=True)
    (folder / "episodes.jsonl").write_text("".join(records[::-1]))
    before = (folder / "episodes.jsonl").read_bytes()
    with pytest.raises(RecordError, match=r"episodes\.jsonl, record 1"):
        bench(folder, plan, resume=True)
    assert (folder / "episodes.jsonl").read_bytes() == before


def test_bench__folder_with_a_run__refuses_and_says_how_to_go_on(finished, plan):
    with pytest.raises(OutputError, match=r"holds a run already.*--resume"):
        bench(finished, plan)


def test_bench__resume_with_more_seeds_and_agents__equals_one_that_had_them_at_once(tmp_path, plan, finished):
    first = next(iter(plan.entries))
    fewer = dataclasses.replace(plan, entries={first: plan.entries[first]}, num_seeds=1)
    bench(tmp_path / "bench", fewer)
    bench(tmp_path / "bench", plan, resume=True)
    assert numbers(tmp_path / "bench") == numbers(finished)
    assert read_json(tmp_path / "bench" / "run.json")["plan"] == plan.to_json()


@pytest.mark.parametrize("label", ["..", ".", "", "--", "///"])
def test_check__label_that_names_no_folder_of_its_own__is_refused(small_settings, label):
    with pytest.raises(SettingError, match=f"agent {label!r} would have no folder"):
        BenchPlan(small_settings, {label: Entry("random")}).check()


def test_bench__resumed_with_another_selector_at_the_same_place__refuses(tmp_path, small_settings):
    agent = RaiseFork(num_networks=1, num_passes=1, num_states=1, num_rows=4, num_lookahead=1)
    selector = tmp_path / "selector"
    agent.learn(RaiseSelectEnv(**small_settings), 1).save(selector)
    plan = BenchPlan(small_settings, {"learned": Entry(f"selector:{selector}")}, num_seeds=1)
    bench(tmp_path / "bench", plan)
    bench(tmp_path / "bench", plan, resume=True)
    agent.learn(RaiseSelectEnv(**small_settings), 1, seed=1).save(selector)
    with pytest.raises(SettingError, match=r"entries\.learned\.selector: then '[0-9a-f]+', now"):
        bench(tmp_path / "bench", dataclasses.replace(plan, num_seeds=2), resume=True)


def test_bench__resume_with_other_settings__all_are_named(finished, plan):
    entries = {**plan.entries, "sb3:PPO": Entry("sb3:PPO", PPO_SETTINGS, episodes=3)}
    other = BenchPlan({**plan.settings, "horizon": 4}, entries, num_seeds=1)
    with pytest.raises(SettingError) as caught:
        bench(finished, other, resume=True)
    for words in ("settings.horizon: then 3, now 4", "num_seeds: then 2, now 1", "entries.sb3:PPO.episodes: then 2"):
        assert words in str(caught.value)


def test_bench__more_seeds_with_other_versions__is_refused_and_nothing_is_run(tmp_path, plan, finished, monkeypatch):
    folder = copy_of(finished, tmp_path / "bench")
    before = bytes_of(folder)
    monkeypatch.setattr("raise_env.agents.run_folder.versions", lambda: {**versions(), "peft": "9.9"})
    monkeypatch.setattr("raise_env.agents.benchmark._contents", lambda *_: pytest.fail("that would take long"))
    with pytest.raises(SettingError, match=rf"peft {re.escape(versions()['peft'])}, now 9\.9"):
        bench(folder, dataclasses.replace(plan, num_seeds=3), resume=True)
    assert bytes_of(folder) == before


def bytes_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_bench__no_cluster_answers__is_refused_before_anything_is_written(tmp_path, plan, finished, monkeypatch):
    folder = copy_of(finished, tmp_path / "bench")
    before = bytes_of(folder)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingError, match="pip install ray"):
        bench(folder, dataclasses.replace(plan, num_seeds=3), resume=True, cluster="auto")
    assert bytes_of(folder) == before


def test_bench__other_code_of_the_package__is_warned_of_where_something_is_added(tmp_path, plan, finished, caplog):
    folder = copy_of(finished, tmp_path / "bench")
    state = read_json(folder / "run.json")
    (folder / "run.json").write_text(json.dumps({**state, "code": "0123456789abcdef"}))
    bench(folder, plan, resume=True)
    assert caplog.text == ""
    more = dataclasses.replace(plan, entries={**plan.entries, "again": Entry("random")})
    bench(folder, more, resume=True)
    assert "the code of raise-env has changed since the run was begun" in caplog.text


def test_bench__begun_when_run_json_had_no_code__is_gone_on_with(tmp_path, plan, finished, caplog):
    folder = copy_of(finished, tmp_path / "bench")
    state = read_json(folder / "run.json")
    (folder / "run.json").write_text(json.dumps({name: value for name, value in state.items() if name != "code"}))
    bench(folder, dataclasses.replace(plan, entries={**plan.entries, "again": Entry("random")}), resume=True)
    assert caplog.text == ""


def write_own(folder, text):
    """Write a module of one's own with an agent that is random's but for its name."""
    source = f"from raise_env.agents.baselines import RandomAgent\n\nclass Mine(RandomAgent):\n    {text}\n"
    (folder / "coded_agents.py").write_text(source)


@pytest.mark.parametrize("agent", ["coded_agents:Mine", "placebo:coded_agents:Learns"])
def test_bench__resumed_with_changed_code_of_ones_own__is_refused_by_name(tmp_path, small_settings, monkeypatch, agent):
    learns = "\nclass Learns(Mine):\n    def learn(self, env, episodes, seed=0, progress=None):\n        return self\n"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "coded_agents", raising=False)
    write_own(tmp_path, f"size = 1\n{learns}")
    plan = BenchPlan(small_settings, {"mine": Entry(agent)}, num_seeds=1)
    bench(tmp_path / "bench", plan)
    bench(tmp_path / "bench", plan, resume=True)
    write_own(tmp_path, f"size = 2\n{learns}")
    before = bytes_of(tmp_path / "bench")
    with pytest.raises(
        SettingError, match=r"entries\.mine\.source: then '[0-9a-f]+', now .* digest of an agent's code"
    ):
        bench(tmp_path / "bench", dataclasses.replace(plan, num_seeds=2), resume=True)
    assert bytes_of(tmp_path / "bench") == before


def test_bench__resumed_with_other_code_of_the_reward__is_refused(tmp_path, small_settings, monkeypatch):
    source = tmp_path / "bench_reward.py"
    source.write_text("def score(evaluation): return -evaluation.loss\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bench_reward", raising=False)
    settings = {**small_settings, "reward": "bench_reward:score"}
    plan = BenchPlan(settings, {"random": Entry("random")}, num_seeds=1)
    bench(tmp_path / "bench", plan)
    more = dataclasses.replace(plan, num_seeds=2)
    source.write_text("def score(evaluation): return -2 * evaluation.loss\n")
    with pytest.raises(SettingError, match=r"\(sources\.bench_reward:score: then '[0-9a-f]+', now .* a reward's"):
        bench(tmp_path / "bench", more, resume=True)
    source.write_text("def score(evaluation): return -evaluation.loss\n")
    assert bench(tmp_path / "bench", more, resume=True)["missing"] == []


def test_bench__code_of_an_agent_that_always_failed__may_be_mended(tmp_path, small_settings, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "coded_agents", raising=False)
    write_own(tmp_path, "def begin(self, env, seed):\n        raise KeyError('lost')")
    plan = BenchPlan(small_settings, {"mine": Entry("coded_agents:Mine"), "random": Entry("random")}, num_seeds=1)
    assert len(bench(tmp_path / "bench", plan)["missing"]) == 1
    write_own(tmp_path, "pass")
    monkeypatch.delitem(sys.modules, "coded_agents")
    assert bench(tmp_path / "bench", plan, resume=True)["missing"] == []


def test_bench__finished_with_other_versions__is_summed_up_anew(tmp_path, plan, finished, monkeypatch):
    folder = copy_of(finished, tmp_path / "bench")
    monkeypatch.setattr("raise_env.agents.run_folder.versions", lambda: {**versions(), "peft": "9.9"})
    assert bench(folder, plan, resume=True) == read_json(finished / "summary.json")


# Failures


def test_bench__one_run_fails__is_noted_and_the_others_go_on(own, tmp_path, small_settings, caplog):
    summary = bench(tmp_path / "bench", of_own(small_settings, "Fails", "Hooks"))
    lines = {(line["agent"], line["seed"]): line for line in read_lines(tmp_path / "bench" / "results.jsonl")}
    assert len(lines) == 4
    failed = lines.pop(("Fails", 1))
    assert "lost" in failed["error"]
    assert failed["test_loss"] is failed["phi"] is failed["rows"] is None
    assert all(line["error"] is None for line in lines.values())
    assert len(list(read_records(tmp_path / "bench" / "episodes.jsonl"))) == 3
    assert summary["missing"] == [{"task": "default", "agent": "Fails", "seed": 1, "reason": failed["error"]}]
    assert "default, Fails, seed 1 failed: " in caplog.text


def test_bench__what_failed_once__is_tried_again(own, tmp_path, small_settings, monkeypatch):
    plan = of_own(small_settings, "Fails", "Hooks")
    bench(tmp_path / "bench", plan)
    monkeypatch.setattr(own.Fails, "seeds", ())
    own.Hooks.prepared.clear()
    summary = bench(tmp_path / "bench", plan, resume=True)
    assert summary["missing"] == []
    assert own.Hooks.prepared == []
    assert [line["error"] for line in read_lines(tmp_path / "bench" / "results.jsonl")] == [None] * 4
    assert len(list(read_records(tmp_path / "bench" / "episodes.jsonl"))) == 4


def test_bench__an_action_of_the_wrong_shape__is_that_runs_failure(own, tmp_path, small_settings):
    summary = bench(tmp_path / "bench", of_own(small_settings, "Shapeless", num_seeds=1))
    assert "shape" in summary["missing"][0]["reason"]


def test_bench__a_loss_that_is_no_longer_finite__is_missing_as_diverged(tmp_path, small_settings):
    settings = {**small_settings, "learning_rate": 1e30, "auxiliary_updates": 0}
    summary = bench(tmp_path / "bench", BenchPlan(settings, {"random": Entry("random")}, num_seeds=1))
    (line,) = read_lines(tmp_path / "bench" / "results.jsonl")
    assert line["diverged"] is True
    assert line["dev_loss"] is line["test_loss"] is line["error"] is None
    assert summary["missing"][0]["reason"] == "diverged"


# Bad input


def test_bench__several_unknown_names__all_are_named_and_nothing_is_written(tmp_path, small_settings):
    entries = {name: Entry(name) for name in ("random", "randon", "orakle")}
    with pytest.raises(SettingError) as caught:
        bench(tmp_path / "bench", BenchPlan(small_settings, entries, tasks=("default", "defualt", "hrad")))
    for name in ("randon", "orakle", "defualt", "hrad"):
        assert repr(name) in str(caught.value)
    assert not (tmp_path / "bench").exists()


@pytest.mark.parametrize(
    ("changes", "tasks", "words"),
    [
        ({"seed_model": 1}, ("default",), "seed_model"),
        ({"pool": "pool.jsonl", "dev": "dev.jsonl"}, ("default",), "not both"),
        ({}, (OWN_TASK,), "not both"),
        ({"model": "./no-such-folder"}, ("default",), "no-such-folder"),
        ({"pool": "no-such.jsonl", "dev": "dev.jsonl"}, (OWN_TASK,), "no-such.jsonl"),
    ],
)
def test_bench__settings_that_cannot_be__an_error_before_anything_is_written(tmp_path, changes, tasks, words):
    with pytest.raises(RaiseEnvError, match=words):
        bench(tmp_path / "bench", BenchPlan(changes, {"random": Entry("random")}, tasks))
    assert not (tmp_path / "bench").exists()


def test_bench__names_that_would_share_a_folder__are_refused(tmp_path, small_settings):
    entries = {"a b": Entry("random"), "a-b": Entry("random")}
    with pytest.raises(SettingError, match="share a folder"):
        bench(tmp_path / "bench", BenchPlan(small_settings, entries))


def own_settings(folder, small_settings):
    """Write a pool, dev and test set of one's own and return the settings that name them."""
    files = {"pool": range(40), "dev": range(40, 48), "test": range(50, 58)}
    for name, rows in files.items():
        texts = [json.dumps({"question": f"What is {i} plus {i}?", "answer": f"{2 * i}."}) for i in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(texts))
    settings = {name: value for name, value in small_settings.items() if name != "pool_size"}
    return settings | {name: str(folder / f"{name}.jsonl") for name in files}


def test_bench__a_pool_of_ones_own__is_a_task_too(tmp_path, small_settings):
    settings = own_settings(tmp_path, small_settings)
    summary = bench(tmp_path / "bench", BenchPlan(settings, {"random": Entry("random")}, (OWN_TASK,), num_seeds=1))
    (random,) = read_lines(tmp_path / "bench" / "results.jsonl")
    assert random["task"] == "own"
    assert random["test_accuracy"] is None, "of a free answer none is expected"
    assert summary["normalised"] == {}


def test_bench__an_agent_that_says_no__told_by_name_before_anything_is_begun(own, tmp_path, small_settings):
    asked = []

    class Picky(own.Learns):
        def check(self, config, pool, episodes):
            asked.append((config.horizon, len(pool), episodes))
            raise SettingError("not with me.")

    own.Picky = Picky
    plan = of_own(small_settings, "Picky")
    entries = {"random": Entry("random"), "fussy": dataclasses.replace(plan.entries["Picky"], episodes=4)}
    plan = dataclasses.replace(plan, entries=entries)
    with pytest.raises(SettingError, match=r"^agent 'fussy' on task 'default': not with me\.$"):
        bench(tmp_path / "bench", plan)
    assert asked == [(small_settings["horizon"], small_settings["pool_size"], 4)]
    assert not (tmp_path / "bench").exists()
    entries = {"random": Entry("random"), "oracle": Entry("oracle")}
    plan = BenchPlan(own_settings(tmp_path, small_settings), entries, (OWN_TASK,), num_seeds=1)
    with pytest.raises(SettingError, match=r"agent 'oracle' on task 'own': .* hidden labels .*pool\.jsonl has none"):
        bench(tmp_path / "bench", plan)


def test_bench__an_agents_numbers_that_nobody_can_write__are_that_runs_failure(own, tmp_path, small_settings):
    plan = of_own(small_settings, "Silly", num_seeds=1)
    summary = bench(tmp_path / "bench", plan)
    assert [run["agent"] for run in summary["missing"]] == ["Silly"]
    assert "episode_returns" in summary["missing"][0]["reason"]
    assert bench(tmp_path / "bench", plan, resume=True)["missing"] == summary["missing"]


def test_bench__results_without_the_plan_that_they_are_of__are_refused(tmp_path, plan, finished):
    folder = copy_of(finished, tmp_path / "bench")
    (folder / "run.json").unlink()
    before = (folder / "results.jsonl").read_bytes()
    for resume in (False, True):
        with pytest.raises(OutputError, match=r"results\.jsonl and episodes\.jsonl without the run\.json"):
            bench(folder, plan, resume=resume)
    assert (folder / "results.jsonl").read_bytes() == before


def test_bench__records_that_are_gone__are_told_and_no_result_is_dropped(tmp_path, plan, finished):
    folder = copy_of(finished, tmp_path / "bench")
    (folder / "episodes.jsonl").unlink()
    before = (folder / "results.jsonl").read_bytes()
    with pytest.raises(RecordError, match="0 whole records"):
        bench(folder, plan, resume=True)
    assert (folder / "results.jsonl").read_bytes() == before


def test_bench__data_changed_since__is_refused(tmp_path, small_settings):
    settings = own_settings(tmp_path, small_settings)
    plan = BenchPlan(settings, {"random": Entry("random")}, (OWN_TASK,), num_seeds=2)
    with pytest.raises(KeyboardInterrupt):
        bench(tmp_path / "bench", plan, reporter=Interrupts(1))
    path = tmp_path / "pool.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[::-1]))
    os.utime(path, ns=(1, 1))
    before = bytes_of(tmp_path / "bench")
    with pytest.raises(DataError, match="own"):
        bench(tmp_path / "bench", dataclasses.replace(plan, num_seeds=3), resume=True)
    assert bytes_of(tmp_path / "bench") == before


# Ablation


def test_ablation__rows__all_features_then_without_each_block_then_random(small_settings):
    plan = ablation(small_settings, "sb3:PPO", PPO_SETTINGS, episodes=2, num_seeds=3)
    assert list(plan.entries) == [ALL_FEATURES, *(f"without {block}" for block in OBSERVATION_BLOCKS), "random"]
    assert plan.reference == ALL_FEATURES
    assert plan.entries[ALL_FEATURES] == Entry("sb3:PPO", PPO_SETTINGS, 2)
    assert plan.entries["without stage"] == Entry("sb3:PPO", PPO_SETTINGS, 2, {"hide": ["stage"]})
    assert ablation({"pool": "p", "dev": "d"}, "sb3:PPO", episodes=1, num_seeds=1).tasks == (OWN_TASK,)


def test_ablation__settings_that_hide_something__are_refused():
    with pytest.raises(SettingError, match="hide"):
        ablation({"hide": ("stage",)}, "sb3:PPO", episodes=1, num_seeds=1)


def test_ablation__each_row__acts_on_what_it_may_see(own, tmp_path, small_settings):
    own.Watches.seen.clear()
    plan = ablation(small_settings, "bench_agents:Watches", episodes=0, num_seeds=2)
    summary = bench(tmp_path / "bench", plan, command="ablate")
    assert {(hide, seed) for hide, seed, _ in own.Watches.seen} == {
        (hide, seed) for hide in [(), *((block,) for block in OBSERVATION_BLOCKS)] for seed in (0, 1)
    }
    hidden = [observation for hide, _, observation in own.Watches.seen if hide == ("semantic",)]
    assert not any(observation[:, 6:38].any() for observation in hidden)
    # This agent does not look at what it sees: nothing is worth anything.
    without = summary["differences"]["default"]["without stage"]
    assert {name: without[name] for name in ("mean", "low", "high", "p")} == {"mean": 0, "low": 0, "high": 0, "p": 1}


def test_ablation__an_agent_that_learns__learns_without_the_block(own, tmp_path, small_settings):
    own.Learns.learned.clear()
    plan = ablation(small_settings, "bench_agents:Learns", episodes=7, num_seeds=1)
    bench(tmp_path / "bench", plan)
    assert own.Learns.learned == [(7, 0, hide) for hide in ((), *((block,) for block in OBSERVATION_BLOCKS))]


# What lazy features cost


@pytest.mark.slow
def test_bench__lazy_features__cost_the_same_in_any_order_and_after_interruptions(
    tmp_path, small_settings, monkeypatch
):
    monkeypatch.setattr("raise_env.lazy.SAMPLE_ROWS", 32)
    settings = {**small_settings, "pool_size": 400, "lazy_features": True, "cache_dir": str(tmp_path / "cache")}
    fork = {"num_states": 1, "num_rows": 16, "num_lookahead": 1, "num_networks": 1, "num_passes": 1}
    entries = {
        "random": Entry("random"),
        "sb3:PPO": Entry("sb3:PPO", PPO_SETTINGS, episodes=2),
        "raise_fork": Entry("raise_fork", fork, episodes=1),
    }

    def costs(folder):
        lines = read_lines(tmp_path / folder / "results.jsonl")
        assert [line["error"] for line in lines] == [None] * 6
        return {(line["agent"], line["seed"]): (line["tokens"], line["phi"]) for line in lines}

    _cached_assets.cache_clear()
    bench(tmp_path / "one", BenchPlan(settings, entries, num_seeds=2))
    found = costs("one")
    assert found["random", 0][0]["features"] == 0
    assert len({found[label, 0][0]["features"] for label in ("sb3:PPO", "raise_fork")}) == 2
    bench(tmp_path / "again", BenchPlan(settings, entries, num_seeds=2))
    assert costs("again") == found, "all was known before"
    backwards = BenchPlan(settings, dict(reversed(entries.items())), num_seeds=2)
    for done in (1, 2, 100):
        _cached_assets.cache_clear()
        with contextlib.suppress(KeyboardInterrupt):
            bench(tmp_path / "other", backwards, resume=True, reporter=Interrupts(done))
    assert costs("other") == found
