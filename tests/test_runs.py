from __future__ import annotations

import contextlib
import errno
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
from peft import PeftModel
from transformers import AutoModelForCausalLM

from raise_env import RaiseSelectEnv
from raise_env.agents import RaisePpo, RandomAgent, Sb3Agent, load_selector
from raise_env.agents.estimate import estimate
from raise_env.agents.job import Entry, Job, run_job
from raise_env.agents.run_folder import RunFolder
from raise_env.agents.runs import Plan, Silent, _budget_told, _learn, finetune, train
from raise_env.assets import _cached_assets, load_data
from raise_env.base_model import load_tokenizer, model_folder
from raise_env.config import EnvConfig
from raise_env.encoding import Encoder, collate
from raise_env.errors import (
    AgentError,
    DataError,
    MemoryShortageError,
    OutputError,
    RaiseEnvError,
    RecordError,
    SettingError,
)
from raise_env.files import held
from raise_env.lazy import FeatureUse
from raise_env.learner import LoraLearner
from raise_env.record import read_records, replay, versions
from raise_env.testing import toy_env

FORK_SETTINGS = {"num_states": 2, "num_rows": 16, "num_lookahead": 1, "num_networks": 2, "num_passes": 3}
FILES = {
    "run.json",
    "episodes.jsonl",
    "selected.jsonl",
    "report.json",
    "report.html",
    "selector/config.json",
    "selector/model.safetensors",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
}


@pytest.mark.parametrize("how", ["train", "bench", "estimate"])
def test_learning__test_set__is_neither_scored_nor_told(small_settings, own_agent, tmp_path, how):
    plan = Plan(small_settings, "own_agent:Watches", episodes=1, compare=(), num_runs=1)
    env = RaiseSelectEnv(**small_settings)
    before = env.assets.learner.ledger.test_tokens
    if how == "train":
        train(tmp_path / "run", plan)
    elif how == "bench":
        run_job(Job("own", "Watches", 0, Entry(plan.agent, episodes=1), small_settings))
    else:
        estimate(plan)
    infos = own_agent.Watches.infos
    assert len(infos) == small_settings["horizon"]
    assert all("dev_score" in info and "test_score" not in info for info in infos)
    # The model as it is before, and as it is at the end; a benchmark tells of the latter alone.
    num_scored = env.assets.learner.ledger.test_tokens - before
    assert num_scored == {"train": 2, "bench": 1, "estimate": 1}[how] * env.assets.learner.splits["test"].num_tokens()


class Interrupts:
    """A reporter that interrupts the run when a task, by the beginning of its name, has come so far."""

    def __init__(self, name, done):
        self.name, self.done = name, done

    @contextlib.contextmanager
    def task(self, name, total):
        del total

        def show(done):
            if name.startswith(self.name) and done >= self.done:
                raise KeyboardInterrupt

        yield show


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda text: pytest.fail(f"{path}: {text}"))


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def without_clock(value):
    """Return a JSON value without what a clock or a date says."""
    if isinstance(value, dict):
        clocks = ("seconds", "start", "end", "date", "headline", "status")
        return {name: without_clock(item) for name, item in value.items() if name not in clocks}
    return value


@pytest.fixture(scope="module")
def plan(small_settings):
    return Plan(small_settings, agent_settings=FORK_SETTINGS, episodes=2, num_runs=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, plan):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(folder, plan)
    return folder


def test_train__features_to_compute__are_a_task_of_their_own_while_loading(tmp_path, plan):
    open_tasks, seen = [], []

    class Watching:
        @contextlib.contextmanager
        def task(self, name, total):
            def show(done):
                seen.append((tuple(open_tasks), done, total))
                if name == "computing features" and done == total:
                    raise KeyboardInterrupt

            open_tasks.append(name)
            yield show
            open_tasks.remove(name)

    own = Plan({**plan.settings, "cache_dir": str(tmp_path / "cache")}, agent="random")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", own, reporter=Watching())
    tasks = {names: total for names, _, total in seen}
    assert tasks == {("loading model, data and features", "computing features"): 64}
    assert [done for _, done, _ in seen][-1] == 64


# The folder


def test_train__folder__holds_what_is_promised(finished):
    found = files_of(finished)
    assert found >= FILES
    assert {name for name in found if name.startswith("plots/")} == {
        "plots/dev_curves.png",
        "plots/learning.png",
        "plots/selection.png",
    }


def test_train__folder__nothing_half_written_is_left(finished):
    assert not [name for name in files_of(finished) if any(part.startswith(".") for part in name.split("/"))]


def test_train__files__nothing_is_pickled_and_all_can_be_read_by_others(finished):
    for path in finished.rglob("*"):
        if path.is_file():
            assert path.suffix not in (".pkl", ".pickle", ".pt", ".pth", ".bin", ".zip")
            assert path.stat().st_mode & 0o044 == 0o044, path


def test_train__run_json__settings_versions_content_and_times(finished, plan):
    run = read_json(finished / "run.json")
    assert (run["schema_version"], run["command"], run["status"], run["device"]) == (1, "train", "done", "cpu")
    assert run["plan"] == plan.to_json()
    assert set(run["content"]) == {"model", "pool", "dev", "test"}
    assert all(len(digest) == 64 for digest in run["content"].values())
    assert set(run["data"]) == {"pool", "dev", "test"}
    assert set(run["data"]["pool"]) == {"rows", "skipped", "duplicates", "truncated", "left_out"}
    assert {"python", "torch", "raise-env"} <= set(run["versions"])
    assert run["start"] <= run["end"]


def test_train__episodes__two_runs_of_each_agent_over_the_same_seeds(finished):
    records = list(read_records(finished / "episodes.jsonl"))
    assert [(r.agent, r.seed) for r in records] == [
        ("raise_fork", 1000),
        ("raise_fork", 1001),
        ("random", 1000),
        ("random", 1001),
    ]
    assert all(len(r.actions) == 3 and all(len(rows) == 4 for rows in r.actions) for r in records)


def test_train__episodes__replay_to_the_bit(finished):
    records = list(read_records(finished / "episodes.jsonl"))
    assert [replay(record, tolerance=0.0) for record in (records[0], records[-1])] == [(None, 0.0), (None, 0.0)]


def test_train__selected__rows_of_the_first_final_run_with_their_own_fields(finished, plan):
    record = next(read_records(finished / "episodes.jsonl"))
    pool = load_data(EnvConfig.from_kwargs(plan.settings)).pool
    lines = read_lines(finished / "selected.jsonl")
    expected = [(step, row) for step, rows in enumerate(record.actions, start=1) for row in rows]
    assert [(line["step"], line["pool_id"]) for line in lines] == expected
    for line in lines:
        own = {name: value for name, value in line.items() if name not in ("step", "pool_id")}
        assert own == pool[line["pool_id"]].fields


@pytest.mark.parametrize(("more", "name"), [({}, "raise_step"), ({"raise_step": "mine"}, "raise_raise_step")])
def test_train__rows_with_columns_of_the_same_names__keep_them(tmp_path, small_settings, more, name):
    rows = [{"problem": f"{n}+{n}?", "step": f"{2 * n}", "pool_id": f"orig-{n}", **more} for n in range(40)]
    for part, own in (("pool", rows[:32]), ("dev", rows[32:])):
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    settings = {**own_files(small_settings, tmp_path), "columns": {"prompt": "problem", "response": "step"}}
    train(tmp_path / "run", Plan(settings, agent="random", compare=(), num_runs=1))
    record = next(read_records(tmp_path / "run" / "episodes.jsonl"))
    assert read_lines(tmp_path / "run" / "selected.jsonl") == [
        {**rows[row], name: step, "raise_pool_id": row}
        for step, chosen in enumerate(record.actions, start=1)
        for row in chosen
    ]


def test_train__selector__loads_and_chooses_what_the_record_says(finished, embedded_env):
    selector = load_selector(finished)
    env = embedded_env()
    observation, _ = env.reset(seed=1000)
    selector.begin(env, 1000)
    chosen = env.candidates[selector.predict(observation)[0] == 1]
    assert sorted(chosen.tolist()) == sorted(next(read_records(finished / "episodes.jsonl")).actions[0])


# transformers asks PEFT to rename an attribute; the result is the same.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_train__adapter__gives_the_recorded_test_loss_in_peft_alone(finished, plan):
    causal = AutoModelForCausalLM.from_pretrained(model_folder("tiny"))
    model = PeftModel.from_pretrained(causal, finished / "adapter")
    rows = Encoder(load_tokenizer("tiny"), 256).encode(load_data(EnvConfig.from_kwargs(plan.settings)).test)
    batch = collate(rows, range(len(rows)))
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids).logits[:, :-1][batch.is_label[:, 1:]]
    loss = torch.nn.functional.cross_entropy(logits, batch.targets).item()
    assert loss == pytest.approx(next(read_records(finished / "episodes.jsonl")).final["test_loss"], abs=1e-4)


def test_train__report_json__is_what_is_promised(finished, plan):
    report = read_json(finished / "report.json")
    records = list(read_records(finished / "episodes.jsonl"))
    assert report["schema_version"] == 1
    assert set(report["base"]) >= {"dev_loss", "test_loss", "test_accuracy"}
    assert list(report["agents"]) == ["raise_fork", "random"]
    for name, scores in report["agents"].items():
        own = [record for record in records if record.agent == name]
        assert scores["dev_loss"] == [-record.dev_scores[-1] for record in own]
        assert scores["test_loss"] == [record.final["test_loss"] for record in own]
        assert scores["test_accuracy"] == [record.final["test_exact_match"] for record in own]
    assert set(report["cost"]) >= {"phi", "tokens", "seconds"}
    phi = report["cost"]["phi"]
    assert set(phi) == {"features", "preparation", "learning", "final", "total"}
    assert phi["total"] == pytest.approx(phi["features"] + phi["learning"] + phi["final"])
    assert phi["preparation"] == 0, "raise_fork needs none"
    assert " with random rows, " in report["headline"]
    assert " with the learned selector. Each run trained on up to 48 of 64 instructions; the " in report["headline"]
    assert all(math.isfinite(value) and value > 0 for name, value in phi.items() if name != "preparation")


def test_train__cost__tokens_counted_by_hand(finished, plan):
    data = load_data(EnvConfig.from_kwargs(plan.settings))
    encoder = Encoder(load_tokenizer("tiny"), 256)
    lengths, dev = encoder.encode(data.pool).lengths, int(encoder.encode(data.dev).lengths.sum())
    runs = [r for r in read_records(finished / "episodes.jsonl") if r.agent == "raise_fork"]
    # A final run: each row it trains on counts three times, and the dev set once after every update.
    finals = [sum(3 * int(lengths[rows].sum()) + dev for rows in run.actions) for run in runs]
    tokens = read_json(finished / "report.json")["cost"]["tokens"]
    assert tokens["final"] == sum(finals) // 2
    phi = read_json(finished / "report.json")["cost"]["phi"]
    assert phi["final"] == pytest.approx(tokens["final"] / (9 * int(lengths.sum())))


def test_train__plots__are_pictures(finished):
    for path in (finished / "plots").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_train__conversations__are_shown_whole_in_the_report(tmp_path, small_settings):
    turns = [("user", "first question"), ("assistant", "first answer"), ("user", "second?"), ("assistant", "so")]
    chats = [{"messages": [{"role": role, "content": f"{text} {n}"} for role, text in turns]} for n in range(24)]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (tmp_path / "dev.jsonl").write_text('{"question": "What is asked?", "answer": "this"}\n')
    settings = {**own_files(small_settings, tmp_path), "num_dev": 1}
    train(tmp_path / "run", Plan(settings, agent="random", episodes=0, compare=(), num_runs=1))
    page = (tmp_path / "run" / "report.html").read_text()
    assert re.search(r"first question (\d+)\s+first answer \1\s+second\? \1", page)
    assert all("messages" in row for row in read_lines(tmp_path / "run" / "selected.jsonl"))


def test_train__same_plan_again__same_numbers(finished, plan, tmp_path):
    train(tmp_path / "again", plan)
    for name in ("episodes.jsonl", "selected.jsonl", "selector/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes(), name


def test_train__an_agent_that_does_not_learn__needs_no_selector(tmp_path, small_settings):
    report = train(tmp_path / "run", Plan(small_settings, agent="ifd", episodes=0, compare=(), num_runs=1))
    assert list(report["agents"]) == ["ifd"]
    assert files_of(tmp_path / "run") >= FILES - {"selector/config.json", "selector/model.safetensors"}


def test_train__no_test_set__reports_dev_alone(tmp_path, small_settings, plan):
    data = load_data(EnvConfig.from_kwargs(plan.settings))
    write_rows(tmp_path / "pool.jsonl", data.pool)
    write_rows(tmp_path / "dev.jsonl", data.dev)
    settings = own_files(small_settings, tmp_path)
    report = train(tmp_path / "run", Plan(settings, agent="random", episodes=0, compare=(), num_runs=1))
    assert set(report["base"]) == {"dev_loss"}
    assert set(report["agents"]["random"]) == {"dev_loss"}


# What agents may ask for


def test_train__agent_that_prepares__does_so_once_before_its_runs_and_it_is_booked(own_agent, tmp_path, plan):
    own = Plan(plan.settings, agent="own_agent:Prepares", episodes=0, seed=4, num_runs=2)
    report = train(tmp_path / "run", own)
    assert own_agent.Prepares.calls == [4]
    lengths = Encoder(load_tokenizer("tiny"), 256).encode(load_data(EnvConfig.from_kwargs(plan.settings)).pool).lengths
    tokens = report["cost"]["tokens"]
    assert tokens["preparation"] == lengths[:3].sum()
    assert tokens["total"] == tokens["features"] + tokens["preparation"] + tokens["final"]
    assert report["cost"]["seconds"]["preparation"] > 0


def test_train__agent_that_prepares_interrupted_and_resumed__books_it_once(own_agent, tmp_path, plan):
    own = Plan(plan.settings, agent="own_agent:Prepares", episodes=0, compare=(), num_runs=2)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", own, reporter=Interrupts("fine-tuning", 4))
    train(tmp_path / "run", own, resume=True)
    train(tmp_path / "undisturbed", own)
    booked = [read_json(tmp_path / name / "run.json")["phi_tokens"] for name in ("run", "undisturbed")]
    assert booked[0] == booked[1]
    assert len(own_agent.Prepares.calls) == 3
    train(tmp_path / "run", own, resume=True)
    assert len(own_agent.Prepares.calls) == 3, "nothing is left to prepare for"


@pytest.mark.parametrize("name", ["OwnRuns", "OwnRate"])
def test_train__agent_with_settings_of_its_own__has_its_own_runs(own_agent, tmp_path, plan, embedded_env, name):
    own = Plan(plan.settings, agent=f"own_agent:{name}", episodes=0, num_runs=1)
    train(tmp_path / "run", own)
    mine, random = read_records(tmp_path / "run" / "episodes.jsonl")
    (world,) = getattr(own_agent, name).worlds
    assert (world.config.num_candidates, world.config.horizon, world.config.total_budget) == ("all", 2, 8)
    assert (len(mine.actions), len(random.actions)) == (2, 3)
    assert {"horizon": 2, "budget": 8}.items() <= mine.env["kwargs"].items()
    assert replay(mine, tolerance=0.0) == (None, 0.0)
    # The report and the card say what was done, and do not call an agent learned that has learned nothing.
    report, card = (tmp_path / "run" / name for name in ("report.json", "adapter/README.md"))
    told = f"with own_agent:{name}. Each run trained on up to 48 of 64 instructions, with own_agent:{name} on up to 8."
    assert told in read_json(report)["headline"]
    assert (
        f"learning rate {0.001 if name == 'OwnRate' else 0.003} with a cosine to 0, 4 rows an update"
        in card.read_text()
    )
    # Another learning rate makes other features, so that nothing but the model can be shared.
    assert (world.assets is embedded_env().assets) == (name == "OwnRuns")


# Learning on, and what learning costs


def learned_in_toy(folder, agent, episodes, *, resume=False, reporter=None):
    """Let an agent learn in a toy world as `train` does; return what run.json holds, and the tokens that it took."""
    plan = Plan({}, agent="random", episodes=episodes, compare=())
    folder.mkdir(exist_ok=True)
    env = toy_env()
    env.reset(seed=plan.seed)
    before = env.ledger.token_forwards
    run = RunFolder.open(folder, "train", plan.to_json(), resume)
    with run:
        _learn(run, plan, env, agent, FeatureUse(env.assets.features), reporter or Silent())
    return run.state, env.ledger.token_forwards - before


def test_train__learned_selector_learns_on_and_is_interrupted__does_so_for_all_its_episodes(tmp_path):
    RaisePpo(num_epochs=1).learn(toy_env(), 3).save(tmp_path / "selector")
    whole, _ = learned_in_toy(tmp_path / "whole", load_selector(tmp_path / "selector"), 3)
    for done in (1, 2):
        agent = load_selector(tmp_path / "selector")
        with pytest.raises(KeyboardInterrupt):
            learned_in_toy(tmp_path / "torn", agent, 3, resume=done > 1, reporter=Interrupts("learning", done))
    torn, _ = learned_in_toy(tmp_path / "torn", load_selector(tmp_path / "selector"), 3, resume=True)
    assert list(whole["costs"]["learning"]) == ["1", "2", "3"]
    assert len(load_selector(tmp_path / "torn").episode_returns) == 6
    assert torn["episode_returns"] == whole["episode_returns"] == load_selector(tmp_path / "whole").episode_returns[3:]
    assert without_clock(torn) == without_clock(whole)
    name = "selector/config.json"
    assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


class GoesOn(RandomAgent):
    """Takes a step after its last episode."""

    def learn(self, env, episodes, seed=0, progress=None):
        for episode in range(episodes):
            env.reset(seed=seed + episode)
            rewards = [env.step(np.eye(32)[0])[1] for _ in range(env.config.horizon)]
            progress(episode + 1, sum(rewards))
        env.reset(seed=99)
        env.step(np.eye(32)[0])
        return self


@pytest.mark.parametrize("agent", [GoesOn, lambda: Sb3Agent("PPO", num_envs=8)], ids=["own", "eight environments"])
def test_train__steps_after_the_last_finished_episode__are_booked(tmp_path, agent):
    state, tokens = learned_in_toy(tmp_path / "run", agent(), 4)
    assert state["phi_tokens"]["learning"] == tokens > 0
    for reporter in (Interrupts("learning", 3), None):
        with contextlib.suppress(KeyboardInterrupt):
            torn, _ = learned_in_toy(tmp_path / "torn", agent(), 4, resume=reporter is None, reporter=reporter)
    assert without_clock(torn) == without_clock(state)
    again, _ = learned_in_toy(tmp_path / "torn", agent(), 4, resume=True)
    assert without_clock(again) == without_clock(state)


# Interrupted and resumed


@pytest.mark.parametrize(
    ("task", "done"),
    [
        ("loading", 1),
        ("learning", 1),
        ("learning", 2),
        ("fine-tuning with raise_fork", 2),
        ("fine-tuning with raise_fork", 5),
        ("fine-tuning with random", 1),
    ],
)
def test_train__interrupted_then_resumed__equals_an_undisturbed_run(tmp_path, plan, finished, task, done):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(folder, plan, reporter=Interrupts(task, done))
    if task != "loading":
        assert read_json(folder / "run.json")["status"] == "interrupted"
    train(folder, plan, resume=True)
    assert files_of(folder) == files_of(finished)
    for name in sorted(files_of(finished) - {"run.json", "report.json", "report.html"}):
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name
    for name in ("run.json", "report.json"):
        assert without_clock(read_json(folder / name)) == without_clock(read_json(finished / name))


@pytest.mark.parametrize("torn", [("0002",), ("0001", "0002")], ids=["the last", "both"])
def test_train__checkpoints_are_torn__goes_on_from_what_is_whole(tmp_path, plan, finished, torn, caplog):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(folder, plan, reporter=Interrupts("fine-tuning with raise_fork", 2))
    for number in torn:
        path = folder / "learning" / f"episode-{number}" / "state" / "groups.safetensors"
        path.write_bytes(path.read_bytes()[:100])
    train(folder, plan, resume=True)
    assert all(f"episode-{number} cannot be used (groups.safetensors not as written)" in caplog.text for number in torn)
    assert files_of(folder) == files_of(finished)
    for name in ("episodes.jsonl", "selector/model.safetensors", "learning/episode-0002/state/groups.safetensors"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name
    booked = read_json(folder / "run.json")["phi_tokens"]
    assert booked == read_json(finished / "run.json")["phi_tokens"]
    assert booked["learning"] > 0


def test_train__what_a_killed_process_was_writing__is_cleared_away(tmp_path, plan, finished):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(folder, plan, reporter=Interrupts("fine-tuning with raise_fork", 2))
    for name in (".run.json.a.unfinished", "learning/.episode-0003.b.unfinished/state/c", "plots/.x.unfinished.old/d"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{")
    train(folder, plan, resume=True)
    assert files_of(folder) == files_of(finished)
    assert not list(folder.rglob("*unfinished*"))


def test_train__folder_that_another_process_writes_in__is_refused(tmp_path, plan):
    with held(tmp_path / "run"), pytest.raises(OutputError, match="another process is writing"):
        train(tmp_path / "run", plan)
    assert files_of(tmp_path / "run") == set()


def test_finetune__interrupted_then_resumed__equals_an_undisturbed_one(tmp_path, plan, finished):
    with pytest.raises(KeyboardInterrupt):
        finetune(tmp_path / "run", finished, plan.settings, reporter=Interrupts("fine-tuning", 2))
    finetune(tmp_path / "run", finished, plan.settings, resume=True)
    finetune(tmp_path / "undisturbed", finished, plan.settings)
    assert files_of(tmp_path / "run") == files_of(tmp_path / "undisturbed")
    for name in ("episodes.jsonl", "selected.jsonl", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name


@pytest.mark.parametrize("agent", ["raise_fork", "sb3:PPO"])
@pytest.mark.parametrize("after", [2, 7])
def test_train__memory_does_not_suffice__says_so_once_and_is_gone_on_with(tmp_path, plan, monkeypatch, agent, after):
    settings = FORK_SETTINGS if agent == "raise_fork" else {"n_steps": 3, "batch_size": 3}
    own = Plan(plan.settings, agent, settings, episodes=2, compare=(), num_runs=1)
    train(tmp_path / "undisturbed", own)
    update, left = LoraLearner.update_together, [after]

    def full(self, *given):
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return update(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(LoraLearner, "update_together", full)
        with pytest.raises(MemoryShortageError, match=r"CUDA out of memory.*micro_batch_tokens"):
            train(tmp_path / "run", own)
    assert read_json(tmp_path / "run" / "run.json")["status"] == "failed"
    train(tmp_path / "run", own, resume=True)
    assert files_of(tmp_path / "run") == files_of(tmp_path / "undisturbed")
    for name in ("episodes.jsonl", "selector/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name


def test_train__folder_that_becomes_read_only__says_so_and_is_gone_on_with(tmp_path, plan, finished, monkeypatch):
    replace = os.replace

    def denied(source, target):
        if Path(target).name == "selected.jsonl":
            raise OSError(errno.EROFS, "Read-only file system", str(target))
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", denied)
        with pytest.raises(
            OutputError, match=r"selected\.jsonl' cannot be written \(Read-only file system\).*--resume"
        ):
            train(tmp_path / "run", plan)
    train(tmp_path / "run", plan, resume=True)
    assert files_of(tmp_path / "run") == files_of(finished)
    assert (tmp_path / "run" / "episodes.jsonl").read_bytes() == (finished / "episodes.jsonl").read_bytes()


def test_train__last_line_of_the_records_is_torn__is_run_again(tmp_path, plan, finished):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(folder, plan, reporter=Interrupts("fine-tuning with random", 1))
    path = folder / "episodes.jsonl"
    path.write_bytes(path.read_bytes()[:-100])
    train(folder, plan, resume=True)
    assert path.read_bytes() == (finished / "episodes.jsonl").read_bytes()


def test_train__resume_of_a_finished_run__changes_nothing(tmp_path, plan):
    folder = tmp_path / "run"
    first = train(folder, plan)
    again = train(folder, plan, resume=True)
    assert without_clock(again) == without_clock(first)


def test_train__resume_with_other_settings__names_them(tmp_path, plan, finished):
    other = Plan(plan.settings, agent_settings=FORK_SETTINGS, episodes=3, num_runs=2)
    with pytest.raises(SettingError, match=r"run\.json.*episodes: then 2, now 3"):
        train(finished, other, resume=True)
    longer = Plan({**plan.settings, "horizon": 4}, agent_settings=FORK_SETTINGS, episodes=2, num_runs=2)
    with pytest.raises(SettingError, match=r"\(settings\.horizon: then 3, now 4\)"):
        train(finished, longer, resume=True)
    with pytest.raises(SettingError, match=r"command: then 'train', now 'demo'"):
        train(finished, plan, command="demo", resume=True)
    assert read_json(finished / "run.json")["status"] == "done"


def test_train__resume_with_other_data__refuses(tmp_path, small_settings, plan):
    data = load_data(EnvConfig.from_kwargs(plan.settings))
    write_rows(tmp_path / "pool.jsonl", data.pool)
    write_rows(tmp_path / "dev.jsonl", data.dev)
    own = Plan(own_files(small_settings, tmp_path), agent="random", episodes=0, compare=(), num_runs=1)
    train(tmp_path / "run", own)
    write_rows(tmp_path / "pool.jsonl", list(data.pool)[::-1])
    with pytest.raises(DataError, match=r"run\.json.*pool"):
        train(tmp_path / "run", own, resume=True)


def test_train__resume_with_changed_code_of_ones_own__refuses_and_names_it(own_agent, tmp_path, plan):
    own = Plan(plan.settings, agent="own_agent:Prepares", episodes=0, compare=(), num_runs=1)
    train(tmp_path / "run", own)
    train(tmp_path / "run", own, resume=True)
    source = tmp_path / "own_agent.py"
    source.write_text(source.read_text() + "\n# changed\n")
    with pytest.raises(SettingError, match=r"\(sources\.own_agent:Prepares: then '[0-9a-f]+', now '[0-9a-f]+'\)"):
        train(tmp_path / "run", own, resume=True)


def begun(folder, plan, *, resume=False, unsaid=()):
    """Begin a run's folder, or go on with it; then take out of its plan what was not said of old."""
    run = RunFolder.open(folder, "train", plan.to_json(), resume)
    for kind, name in unsaid:
        del run.state["plan"][kind][name]
    run.note()


def test_resume__another_model_to_load_or_other_code_of_the_reward__is_refused_and_named(tmp_path, monkeypatch):
    source, model, selector = (tmp_path / name for name in ("my_reward.py", "ppo.zip", "selector"))
    selector.mkdir()
    for path in (source, model, selector / "config.json"):
        path.write_text("def score(evaluation): return -evaluation.loss\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_reward", raising=False)
    learned = f"selector:{selector}"
    settings = {"reward": "my_reward:score"}
    plan = Plan(settings, "sb3:PPO", {"load": str(model)}, episodes=0, compare=("random", learned))
    (tmp_path / "run").mkdir()
    begun(tmp_path / "run", plan, unsaid=[("selectors", "sb3:PPO"), ("sources", "my_reward:score")])
    begun(tmp_path / "run", plan, resume=True)
    told = read_json(tmp_path / "run" / "run.json")["plan"]
    assert (set(told["selectors"]), set(told["sources"])) == ({"sb3:PPO", learned}, {"my_reward:score"})
    for path, words in ((model, r"\(selectors\.sb3:PPO: then"), (source, r"\(sources\.my_reward:score: .* a reward's")):
        before = path.read_text()
        path.write_text(f"{before}# changed\n")
        with pytest.raises(SettingError, match=words):
            begun(tmp_path / "run", plan, resume=True)
        path.write_text(before)
    begun(tmp_path / "run", plan, resume=True)


def test_train__resume_with_other_versions__refuses_and_names_them(finished, plan, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setattr(RaiseSelectEnv, "load", lambda *_: pytest.fail("that would take long"))
    monkeypatch.setattr("raise_env.agents.run_folder.versions", lambda: {**versions(), "torch": "9.9"})
    with pytest.raises(SettingError, match=rf"run\.json.*torch {re.escape(versions()['torch'])}, now 9\.9"):
        train(tmp_path / "run", plan, resume=True)


def test_train__folder_with_a_run__refuses_and_says_how_to_go_on(finished, plan):
    before = (finished / "run.json").read_bytes()
    with pytest.raises(OutputError, match=r"holds a run already.*--resume"):
        train(finished, plan)
    assert (finished / "run.json").read_bytes() == before


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_train__resume_of_a_broken_run_json__names_it(tmp_path, plan, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RecordError, match=r"run\.json"):
        train(tmp_path, plan, resume=True)


# Bad input


@pytest.mark.parametrize(
    "changes",
    [
        {"agent": "raise_frok"},
        {"compare": ("randon",)},
        {"settings": {"pool": "no-such-file.jsonl", "dev": "neither.jsonl"}},
        {"settings": {"model": "./no-such-folder"}},
        {"settings": {"auxiliary_model": "./no-such-folder"}},
        {"settings": {"task": "no-such-task"}},
        {"settings": {"num_candidates": 64, "pool_size": 10}},
        {"settings": {"reward": "no_such_module:function"}},
    ],
    ids=lambda changes: next(iter(changes.get("settings", changes))),
)
def test_train__bad_input__an_error_before_anything_is_written(tmp_path, changes):
    with pytest.raises(RaiseEnvError):
        train(tmp_path / "run", Plan(**{"settings": {}, **changes}))
    assert not (tmp_path / "run").exists()


UNFIT = {
    "reward without gradient, less": ({"reward": "exact_match"}, {"compare": ("less",)}, "'less': .*no gradient"),
    "reward without gradient, greats": ({"reward": "exact_match"}, {"compare": ("greats",)}, "'greats': .*no gradient"),
    "reward without gradient, credit": (
        {"reward": "exact_match"},
        {"agent": "raise_fork", "agent_settings": {"credit": "rows"}},
        "credit 'rows' follows the gradient",
    ),
    "column, quality": ({}, {"compare": ("quality:typo",)}, "no field 'typo'"),
    "column, deita": ({}, {"agent": "deita", "agent_settings": {"quality": "typo"}}, "no field 'typo'"),
    "settings of its own": ({}, {"agent": "full", "agent_settings": {"learning_rate": -1.0}}, "'full': learning_rate"),
    "nothing learned, raise_ppo": ({}, {"compare": ("raise_ppo",)}, "'raise_ppo': it has learned nothing yet"),
    "nothing learned, sb3": ({}, {"compare": ("sb3:PPO",)}, "'sb3:PPO': it has learned nothing yet"),
    "nothing learned, placebo": ({}, {"compare": ("placebo:raise_ppo",)}, "'placebo:raise_ppo': it has learned"),
    "no episodes": ({}, {"agent": "raise_fork", "episodes": 0}, "'raise_fork': it has learned nothing yet"),
    "episodes for nothing": ({}, {"agent": "ifd", "episodes": 5}, "'ifd' does not learn, and episodes is 5"),
} | {
    f"lazy features, {name}": ({"lazy_features": True}, {"compare": (name,)}, f"'{name}': .*Leave lazy_features out")
    for name in ("full", "ifd", "deita", "diversity", "less")
}


@pytest.mark.parametrize("do", ["train", "estimate"])
@pytest.mark.parametrize(("settings", "changes", "words"), UNFIT.values(), ids=UNFIT)
def test_train__agent_that_cannot_be_used_so__told_before_anything_is_computed(
    tmp_path, small_settings, monkeypatch, settings, changes, words, do
):
    monkeypatch.setattr(RaiseSelectEnv, "load", lambda *_: pytest.fail("that would take long"))
    plan = Plan({**small_settings, **settings}, **{"agent": "random", **changes})
    with pytest.raises(RaiseEnvError, match=words):
        train(tmp_path / "run", plan) if do == "train" else estimate(plan)
    assert not (tmp_path / "run").exists()


def test_train__oracle_and_a_pool_of_ones_own__told_before_anything_is_computed(tmp_path, small_settings, monkeypatch):
    monkeypatch.setattr(RaiseSelectEnv, "load", lambda *_: pytest.fail("that would take long"))
    data = load_data(EnvConfig.from_kwargs(small_settings))
    write_rows(tmp_path / "pool.jsonl", data.pool)
    write_rows(tmp_path / "dev.jsonl", data.dev)
    plan = Plan(own_files(small_settings, tmp_path), agent="random", compare=("oracle",))
    with pytest.raises(SettingError, match=r"agent 'oracle': .* hidden labels .*pool\.jsonl has none"):
        train(tmp_path / "run", plan)


def test_train__check_of_ones_own__is_asked_with_settings_pool_and_episodes(own_agent, tmp_path, small_settings):
    asked = []

    class Picky(own_agent.Learns):
        def check(self, config, pool, episodes):
            asked.append((config.horizon, len(pool), episodes))
            if len(asked) == 2:
                raise SettingError("not with me.")
            if len(asked) == 3:
                raise KeyError("lost")

    own_agent.Picky, own_agent.Other = Picky, type("Other", (Picky,), {})
    plan = Plan(small_settings, agent="own_agent:Picky", episodes=4, compare=("own_agent:Other",))
    with pytest.raises(SettingError, match=r"^agent 'own_agent:Other': not with me\.$"):
        train(tmp_path / "run", plan)
    assert asked == [(3, 64, 4), (3, 64, 0)]
    with pytest.raises(AgentError, match=r"(?s)agent 'own_agent:Picky', check: .*KeyError: 'lost'"):
        train(tmp_path / "run", plan)
    assert not (tmp_path / "run").exists()


def test_train__reward_fails_in_the_middle__run_json_says_failed(tmp_path, small_settings, monkeypatch):
    (tmp_path / "rewards_that_tire.py").write_text(
        "calls = []\ndef score(e):\n    calls.append(1)\n    return -e.loss if len(calls) < 4 else float('nan')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plan = Plan({**small_settings, "reward": "rewards_that_tire:score"}, agent="random", episodes=0, compare=())
    with pytest.raises(RaiseEnvError, match="finite"):
        train(tmp_path / "run", plan)
    assert read_json(tmp_path / "run" / "run.json")["status"] == "failed"


# Fine-tuning with a selector


def write_rows(path, rows):
    """Write rows as a user's own file would hold them: other columns, and one that nobody reads."""
    lines = [
        json.dumps({"question": row.prompt, "answer": row.response, "id": f"row-{i}"}) for i, row in enumerate(rows)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def own_files(small_settings, folder):
    settings = {"pool": str(folder / "pool.jsonl"), "dev": str(folder / "dev.jsonl"), **small_settings}
    return {name: value for name, value in settings.items() if name not in ("pool_size", "num_test")}


def test_finetune__own_pool_and_another_number_of_candidates__one_run(tmp_path, small_settings, plan, finished):
    data = load_data(EnvConfig.from_kwargs({**plan.settings, "task_seed": 1}))
    write_rows(tmp_path / "pool.jsonl", data.pool)
    write_rows(tmp_path / "dev.jsonl", data.dev)
    settings = {**own_files(small_settings, tmp_path), "num_candidates": "all"}
    report = finetune(tmp_path / "run", finished / "selector", settings, seed=3)
    assert list(report["agents"]) == ["selector"]
    lines = read_lines(tmp_path / "run" / "selected.jsonl")
    assert len(lines) == 12
    assert all(line["id"] == f"row-{line['pool_id']}" for line in lines)
    assert files_of(tmp_path / "run") >= FILES - {"selector/config.json", "selector/model.safetensors"}
    state = read_json(tmp_path / "run" / "run.json")
    assert state["command"] == "finetune"
    # The features of this pool are those of the auxiliary model that the selector learned with.
    assert state["plan"]["settings"]["auxiliary_adapter"] == str(finished / "selector" / "auxiliary")
    assert "auxiliary_adapter" in state["content"]
    record = next(read_records(tmp_path / "run" / "episodes.jsonl"))
    allowed = [str(tmp_path), str(finished)]
    assert replay(record, allowed=allowed)[0] is None
    with pytest.raises(RecordError, match=r"would open .*auxiliary_adapter .*auxiliary'"):
        replay(record, allowed=allowed[:1])


@pytest.mark.parametrize("chosen", ["dev", "test"])
def test_train__choices_in_dev_or_test_alone__right_answers_are_those_of_test(tmp_path, small_settings, chosen):
    data = load_data(EnvConfig.from_kwargs(small_settings))
    for name, rows in {"pool": data.pool, "dev": data.dev, "test": data.test}.items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
    lines = read_lines(tmp_path / f"{chosen}.jsonl")
    choices = [{**line, "choices": [line["answer"], "no"]} for line in lines]
    (tmp_path / f"{chosen}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in choices))
    settings = {**own_files(small_settings, tmp_path), "test": str(tmp_path / "test.jsonl")}
    report = train(tmp_path / "run", Plan(settings, agent="random", compare=(), num_runs=1))
    (record,) = read_records(tmp_path / "run" / "episodes.jsonl")
    measures = {name: record.final[name] for name in record.final if "choice" in name or "accuracy" in name}
    assert bool(measures) == (chosen == "test")
    scores = report["agents"]["random"]
    assert {name: scores[name] for name in measures} == {name: [value] for name, value in measures.items()}
    assert set(report["base"]) - {"dev_loss", "test_loss"} == set(measures)


def test_train__runs_that_diverge__are_no_curves(tmp_path, small_settings):
    settings = {**small_settings, "learning_rate": 1e20}
    report = train(tmp_path / "run", Plan(settings, agent="random", compare=(), num_runs=2))
    assert report["diverged"]["final"] == {"random": 2}
    assert report["curves"] == {"random": []}
    assert "dev_curves" not in (tmp_path / "run" / "report.html").read_text()


def test_finetune__selector_for_other_features__refused_before_any_is_computed(finished, tmp_path, small_settings):
    settings = {**small_settings, "auxiliary_updates": 1, "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(SettingError, match="after 2 updates, and here they are computed after 1"):
        finetune(tmp_path / "run", finished, settings)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


def test_finetune__resumed_with_another_selector_at_the_same_place__refuses(tmp_path, small_settings, plan, finished):
    shutil.copytree(finished / "selector", tmp_path / "selector")
    settings = {**small_settings, "horizon": 1}
    finetune(tmp_path / "run", tmp_path / "selector", settings)
    finetune(tmp_path / "run", tmp_path / "selector", settings, resume=True)
    config = read_json(tmp_path / "selector" / "config.json")
    (tmp_path / "selector" / "config.json").write_text(json.dumps(config, indent=3))
    with pytest.raises(SettingError, match=r"other settings.*selectors\.selector:"):
        finetune(tmp_path / "run", tmp_path / "selector", settings, resume=True)


def test_finetune__begun_before_selectors_were_noted__is_gone_on_with(tmp_path, small_settings, finished):
    settings = {**small_settings, "horizon": 1}
    finetune(tmp_path / "run", finished / "selector", settings)
    state = read_json(tmp_path / "run" / "run.json")
    del state["plan"]["selectors"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(state))
    finetune(tmp_path / "run", finished / "selector", settings, resume=True)
    assert "selectors" in read_json(tmp_path / "run" / "run.json")["plan"]


def test_train__folder_with_things_of_ones_own__is_not_taken_for_a_run(tmp_path, small_settings):
    for name in ("learning/notes.txt", "results.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine\n")
    train(tmp_path, Plan({**small_settings, "horizon": 1}, agent="random", compare=(), num_runs=1))
    assert (tmp_path / "learning" / "notes.txt").read_text() == (tmp_path / "results.jsonl").read_text() == "mine\n"


def test_finetune__no_selector_there__nothing_is_written(tmp_path, small_settings):
    with pytest.raises(RecordError, match=r"config\.json"):
        finetune(tmp_path / "run", tmp_path / "nowhere", small_settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("budgets", "words"),
    [
        ({"random": 320, "ifd": 320}, "up to 320 of 2,000 instructions"),
        ({"a": 320, "full": 6000}, "up to 320 of 2,000 instructions, with full on up to 6,000, repeats counted"),
        ({"full": 6000}, "up to 6,000 of 2,000 instructions, repeats counted"),
        ({"full": 2000, "own": 500}, "up to 2,000 of 2,000 instructions, with own on up to 500"),
    ],
)
def test_headline__runs_of_their_own_length__are_told_apart(budgets, words):
    assert _budget_told(320, budgets, 2000) == f" Each run trained on {words}"


def test_episode_record__seeds__differ_between_plans():
    assert not set(Plan({}, seed=0).final_seeds) & set(Plan({}, seed=1).final_seeds)


def test_plan__as_json__comes_back():
    plan = Plan({"horizon": 3}, compare=("random", "ifd"), num_runs=2)
    value = json.loads(json.dumps(plan.to_json()))
    assert Plan(**{**value, "compare": tuple(value["compare"])}) == plan


# What docs/files.md says


def documented(heading):
    """Return the fields in the first table under a heading of docs/files.md."""
    text = (Path(__file__).parents[1] / "docs" / "files.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(.*?)`", cell)}


def test_files_md__fields__are_those_that_are_written(finished, plan):
    assert set(read_json(finished / "run.json")) == documented("run.json")
    assert set(read_json(finished / "report.json")) == documented("report.json")
    assert set(read_json(finished / "selector" / "config.json")) == documented("selector/")
    assert set(read_lines(finished / "episodes.jsonl")[0]) == documented("episodes.jsonl")
    own = set(load_data(EnvConfig.from_kwargs(plan.settings)).pool[0].fields)
    assert set(read_lines(finished / "selected.jsonl")[0]) - own == documented("selected.jsonl")


@pytest.mark.parametrize("hook", ["learn", "prepare"])
def test_train__own_agent_fails_while_it_learns_or_prepares__its_lines_are_shown(
    tmp_path, small_settings, monkeypatch, hook
):
    (tmp_path / "agents_that_fail.py").write_text(
        f"class Fails:\n    def {hook}(self, *args, **kwargs):\n        raise KeyError('lost')\n"
        "    def predict(self, observation, **kwargs):\n        raise AssertionError('never asked')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plan = Plan(small_settings, agent="agents_that_fail:Fails", compare=(), num_runs=1)
    with pytest.raises(AgentError, match=r"(?s)agents_that_fail:Fails.*raise KeyError\('lost'\)"):
        train(tmp_path / "run", plan)


def test_plan__two_selectors__refused_as_their_results_would_have_one_name():
    message = r"selector:a and selector:b would both be listed as 'selector'.*--agents a=selector:a,b=selector:b\."
    with pytest.raises(SettingError, match=message):
        Plan({}, agent="selector:a", compare=("random", "selector:b"))
    with pytest.raises(SettingError, match=message):
        Plan({}, agent="random", compare=("selector:a", "ifd", "selector:b"))
    assert Plan({}, agent="selector:a", compare=("random", "selector:a")).names == ["selector:a", "random"]


@pytest.mark.parametrize("left", ["learning", "episodes.jsonl"])
def test_train__what_a_run_left_without_its_run_json__is_refused(tmp_path, plan, finished, left):
    folder = tmp_path / "run"
    folder.mkdir()
    if left == "learning":
        shutil.copytree(finished / left, folder / left)
    else:
        shutil.copy(finished / "episodes.jsonl", folder / left)
    before = files_of(folder)
    for resume in (False, True):
        with pytest.raises(OutputError, match=rf"holds {left} without the run\.json .* put run\.json back"):
            train(folder, plan, resume=resume)
    assert files_of(folder) == before


def test_train__run_json_is_gone__nothing_of_another_plan_is_added(tmp_path, plan, finished):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "run.json").unlink()
    other = Plan({**plan.settings, "learning_rate": 1e-2}, agent_settings=FORK_SETTINGS, episodes=2, num_runs=3)
    with pytest.raises(OutputError, match=r"holds episodes\.jsonl and learning without the run\.json"):
        train(folder, other)
    assert (folder / "episodes.jsonl").read_bytes() == (finished / "episodes.jsonl").read_bytes()


# What lazy features cost


@pytest.fixture
def lazy_settings(small_settings, monkeypatch, tmp_path):
    """Settings under which most rows are outside of the sample."""
    monkeypatch.setattr("raise_env.lazy.SAMPLE_ROWS", 32)
    return {**small_settings, "pool_size": 400, "lazy_features": True, "cache_dir": str(tmp_path / "cache")}


def forget_features():
    """Be as a process that has computed nothing yet."""
    _cached_assets.cache_clear()


LAZY_LEARNERS = {
    "raise_fork": FORK_SETTINGS,
    "sb3:PPO": {"n_steps": 3, "batch_size": 3, "n_epochs": 1},
}


@pytest.mark.parametrize("agent", LAZY_LEARNERS)
def test_train__lazy_features_and_interruptions__cost_what_an_undisturbed_run_costs(tmp_path, lazy_settings, agent):
    plan = Plan(lazy_settings, agent, LAZY_LEARNERS[agent], episodes=3, num_runs=2)
    forget_features()
    whole = train(tmp_path / "whole", plan)
    features = whole["cost"]["tokens"]["features"]
    groups = read_json(tmp_path / "whole" / "run.json")["feature_groups"]
    assert 0 < sum(groups.values()) < features, "the sample has its cost too"
    assert train(tmp_path / "again", plan)["cost"]["tokens"] == whole["cost"]["tokens"], "all was known before"
    for name, done in (("learning", 2), ("fine-tuning with random", 1)):
        forget_features()
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "torn", plan, resume=True, reporter=Interrupts(name, done))
    forget_features()
    assert train(tmp_path / "torn", plan, resume=True)["cost"]["tokens"] == whole["cost"]["tokens"]
    assert read_json(tmp_path / "torn" / "run.json")["feature_groups"] == groups
    forget_features()
    assert train(tmp_path / "torn", plan, resume=True)["cost"]["tokens"] == whole["cost"]["tokens"]


@pytest.mark.parametrize("groups", [[], {"3": "many"}, {"3": None}])
def test_train__resume_with_feature_groups_of_another_form__names_them(tmp_path, plan, finished, groups):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    state = read_json(folder / "run.json")
    (folder / "run.json").write_text(json.dumps({**state, "feature_groups": groups}))
    with pytest.raises(RecordError, match="feature_groups"):
        train(folder, plan, resume=True)
