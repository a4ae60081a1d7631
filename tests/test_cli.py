from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from raise_env import __version__
from raise_env.agents import cli
from raise_env.agents.catalogue import AGENTS
from raise_env.agents.estimate import Estimate
from raise_env.agents.job import Entry
from raise_env.agents.summary import summarise
from raise_env.config import EnvConfig
from raise_env.errors import SettingError
from raise_env.files import held
from raise_env.record import TOLERANCE

FORK_SETTINGS = {"num_states": 2, "num_rows": 16, "num_lookahead": 1, "num_networks": 2, "num_passes": 3}
FORK_ARGUMENTS = ",".join(f"{name}={value}" for name, value in FORK_SETTINGS.items())
SMALL_RUN = ["--episodes", "1", "--runs", "1", "--agent-args", FORK_ARGUMENTS]
ENTRY = [sys.executable, "-m", "raise_env.agents"]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def run(*arguments):
    """Run the command line in this process and return its exit code and what it wrote."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return Outcome(stop.value.code, out.getvalue(), err.getvalue())


def refused(*arguments):
    """Return the message of a command that cannot be done; it has to be the only thing that is written."""
    outcome = run(*arguments)
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("raise-env: ")
    assert outcome.err.count("raise-env: ") == 1
    assert "Traceback" not in outcome.err
    return outcome.err


def options(settings):
    return [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def question_rows(numbers):
    return [{"question": f"What is {i} plus {i}?", "answer": f"{2 * i}."} for i in numbers]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def small(small_settings):
    """The options of a small embedded environment."""
    return options(small_settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small):
    """A finished run, and what the command printed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    outcome = run("train", "--out", folder, *small, *SMALL_RUN)
    assert outcome.code == 0, outcome.err
    return folder, outcome


@pytest.fixture
def own_files(tmp_path):
    """Options for a pool and a dev set of one's own, which are in order, and a folder that is not there yet."""
    pool = write_jsonl(tmp_path / "pool.jsonl", question_rows(range(40)))
    dev = write_jsonl(tmp_path / "dev.jsonl", question_rows(range(40, 48)))
    own = {"pool": pool, "dev": dev, "num_candidates": 16, "horizon": 2, "auxiliary_updates": 2, "batch_size": 4}
    return ["--out", str(tmp_path / "out"), *SMALL_RUN, *options(own)]


@pytest.fixture(autouse=True)
def module_path(monkeypatch):
    """Put back what a command adds to Python's path."""
    monkeypatch.setattr(sys, "path", list(sys.path))


# What every command shares


@pytest.mark.parametrize("command", ["demo", "train", "finetune", "bench", "ablate", "audit", "validate", "info"])
def test_help__every_command__says_what_it_does(command):
    outcome = run(command, "--help")
    assert outcome.code == 0
    assert command in outcome.out
    assert len(outcome.out.splitlines()) > 4


def test_main__no_command__lists_them():
    outcome = run()
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == run("--help").out
    assert "validate" in outcome.out


def test_main__version__is_the_packages():
    assert run("--version") == Outcome(0, f"{__version__}\n", "")


@pytest.mark.parametrize("command", ["train", "finetune", "bench", "ablate", "audit"])
def test_help__every_setting_of_the_environment__has_an_option_with_words(command):
    text = " ".join(run(command, "--help").out.split())
    for entry in dataclasses.fields(EnvConfig):
        if entry.name != "render_mode":
            assert re.search(rf"--{entry.name.replace('_', '-')}( VALUE)? [A-Za-z\"0-9]", text), entry.name


def test_help__settings__say_their_defaults_and_how_they_are_written_here():
    text = " ".join(run("train", "--help").out.split())
    assert re.search(r"--num-candidates VALUE [^[]*\[64\]", text)
    assert re.search(r"--model VALUE [^[]*\[tiny\]", text)
    assert "prompt=q,response=a --choice-form" in text
    assert "stage, difficulty, semantic, availability --help" in text
    assert "exact_match, flexible_match" in text
    assert "[r=8,lora_alpha=16]" in text
    assert "{" not in text


def test_help__validate__says_the_tolerance():
    text = " ".join(run("validate", "--help").out.split())
    assert f"as a share of the score, instead of {TOLERANCE:g}." in text


def test_help__lora__says_how_modules_are_named():
    text = " ".join(run("train", "--help").out.split())
    assert """r=8,target_modules=q_proj or 'target_modules=["q_proj","v_proj"]'""" in text


@pytest.mark.parametrize("arguments", [["trane"], ["train"], ["train", "--out", "x", "--no-such-option"], ["validate"]])
def test_main__bad_usage__one_message_and_two(arguments):
    assert "--help" in refused(*arguments)


def test_module__as_a_program__is_the_command_line():
    result = subprocess.run([*ENTRY, "info"], capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.startswith("raise-env")


# info


def test_info__all_there_is__named():
    outcome = run("info")
    assert outcome.code == 0
    assert __version__ in outcome.out
    for name in ("RaiseSelect-v0", "torch", "cpu", "default", "sb3:CLASS", *AGENTS, os.environ["RAISE_ENV_CACHE"]):
        assert name in outcome.out


# train


def test_train__results__table_headline_and_where_the_report_is(trained):
    folder, outcome = trained
    assert re.search(r"^random +1 ", outcome.out, re.MULTILINE)
    assert re.search(r"^raise_fork +1 ", outcome.out, re.MULTILINE)
    assert f"Report: {folder / 'report.html'}" in outcome.out
    assert json.loads((folder / "report.json").read_text())["headline"] in outcome.out


def test_train__not_a_terminal__plain_lines_of_progress(trained):
    _, outcome = trained
    assert "learning to select (raise_fork)" in outcome.err
    assert "\r" not in outcome.err


def test_train__options__are_the_environments_settings(trained, small_settings):
    plan = json.loads((trained[0] / "run.json").read_text())["plan"]
    assert plan["settings"] == small_settings
    assert plan["agent_settings"] == FORK_SETTINGS


def test_train__lora_and_switches__are_read_as_such(tmp_path, small):
    lora = ["--lora", "r=2,lora_alpha=4", "--skip-empty", "--hide", "stage, availability"]
    run("train", "--out", tmp_path / "run", *small, *lora, "--agent", "random", "--episodes", "0", "--compare", "")
    plan = json.loads((tmp_path / "run" / "run.json").read_text())["plan"]
    assert plan["settings"]["lora"] == {"r": 2, "lora_alpha": 4}
    assert plan["settings"]["skip_empty"] is True
    assert plan["settings"]["hide"] == ["stage", "availability"]


def test_train__dry_run__prints_the_cost_and_writes_nothing(tmp_path, small):
    outcome = run("train", "--out", tmp_path / "run", *small, *SMALL_RUN, "--dry-run")
    assert outcome.code == 0
    spent = r"(?:\d+ min )?[\d.]+ s"
    counts = r"^[\d,]+ updates, [\d,]+ token forwards \(\d+\.\d\d Phi\)"
    assert re.match(rf"{counts}, about {spent} on this machine, [\d.]+ GB of memory\.", outcome.out)
    test_set = rf"^  of that time {spent} go to scores of the test set, [\d,]+ token forwards more\.$"
    assert re.search(test_set, outcome.out, re.MULTILINE)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(90, "1 min 30 s"), (7140, "1 h 59 min"), (2_732_520, "759 h 2 min")],
)
def test_train__dry_run__tells_long_times_as_one_reads_them(monkeypatch, seconds, expected):
    cost = Estimate(1, 2, 0.5, 3, seconds, seconds, 1.0)
    monkeypatch.setattr("raise_env.agents.estimate.estimate", lambda plan, reporter: cost)
    outcome = run("train", "--out", "run", "--dry-run")
    assert f"about {expected} on this machine" in outcome.out
    assert f"of that time {expected} go to scores of the test set, 3 token forwards more." in outcome.out


def test_train__dry_run__shows_how_far_it_is(tmp_path, small):
    outcome = run("train", "--out", tmp_path / "run", *small, *SMALL_RUN, "--dry-run")
    for task in ("loading model, data and features", "measuring steps with random", "measuring an episode of learning"):
        assert task in outcome.err
    assert "measuring" not in outcome.out


def test_train__folder_with_a_finished_run__two_and_says_how_to_go_on(trained, small):
    message = refused("train", "--out", trained[0], *small, *SMALL_RUN)
    assert str(trained[0]) in message
    assert "--resume" in message


def test_train__resume_of_a_finished_run__the_same_result(trained, small):
    folder, outcome = trained
    again = run("train", "--out", folder, *small, *SMALL_RUN, "--resume")
    assert again.code == 0
    assert again.out.splitlines()[:6] == outcome.out.splitlines()[:6]


# finetune


def test_train__every_run_diverges__one_and_the_table_says_so(tmp_path, small):
    outcome = run("train", "--out", tmp_path / "run", *small, "--agent", "random", "--runs", 1, "--learning-rate", 1e30)
    assert outcome.code == 1, outcome.err
    assert "1 diverged" in outcome.out
    assert (tmp_path / "run" / "report.html").is_file()


def test_finetune__selector_of_a_run__on_a_pool_of_ones_own(trained, tmp_path, own_files):
    own = own_files[: own_files.index("--episodes")] + own_files[own_files.index("--pool") :]
    outcome = run("finetune", "--selector", trained[0] / "selector", *own, "--seed", "1")
    assert outcome.code == 0, outcome.err
    rows = [json.loads(line) for line in (tmp_path / "out" / "selected.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 4
    assert all(row["question"].startswith("What is") and row["step"] in (1, 2) for row in rows)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_finetune__folder_of_the_run__finds_the_selector_in_it(trained, tmp_path, small):
    outcome = run("finetune", "--selector", trained[0], "--out", tmp_path / "out", *small)
    assert outcome.code == 0, outcome.err


# audit


def test_audit__agents_that_do_not_learn__tables_and_where_the_numbers_are(tmp_path, small):
    outcome = run(
        "audit", "--out", tmp_path / "audit", *small, "--agents", "random", "--seeds", "2", "--noise-runs", "2"
    )
    assert outcome.code == 0
    assert "### Noise floor" in outcome.out
    assert str(tmp_path / "audit" / "audit.json") in outcome.out


@pytest.mark.parametrize("value", ["0", "3,few"])
def test_audit__episodes_that_are_no_number__two_and_what_was_expected(value, tmp_path):
    assert "episodes" in refused("audit", "--out", tmp_path / "audit", "--episodes", value)
    assert not (tmp_path / "audit").exists()


def test_audit__unknown_agent__two_and_nothing_written(tmp_path):
    assert "randon" in refused("audit", "--out", tmp_path / "audit", "--agents", "randon")
    assert not (tmp_path / "audit").exists()


# bench and ablate


@pytest.fixture(scope="module")
def benched(tmp_path_factory, small):
    """A finished benchmark, and what the command printed."""
    folder = tmp_path_factory.mktemp("benched") / "bench"
    outcome = run("bench", "--out", folder, *small, "--agents", "random,oracle", "--seeds", "2")
    assert outcome.code == 0, outcome.err
    return folder, outcome


def test_bench__results__table_progress_and_where_the_numbers_are(benched):
    folder, outcome = benched
    assert re.search(r"^random +2 +\d", outcome.out, re.MULTILINE)
    assert f"4 of 4 runs. All numbers: {folder / 'summary.json'}" in outcome.out
    assert "2 agents, 4 runs" in outcome.err


def test_bench__table__prints_a_finished_folder_again(benched):
    outcome = run("bench", "--out", benched[0], "--table")
    assert outcome.code == 0
    assert outcome.out.startswith("| agent | runs | test loss |")
    assert re.search(r"^\| oracle \| 2 \| ", outcome.out, re.MULTILINE)


def test_bench__table_of_what_is_no_benchmark__named(tmp_path):
    message = refused("bench", "--out", tmp_path, "--table")
    assert f"{tmp_path / 'summary.json'} is not there: there is no benchmark" in message


def test_bench__table_of_an_unfinished_folder__says_how_to_finish_it(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    message = refused("bench", "--out", tmp_path, "--table")
    assert "the benchmark is not finished. Go on with it with --resume" in message


def test_bench__records__can_be_validated(benched):
    assert run("validate", benched[0] / "episodes.jsonl").code == 0


def test_bench__resume_of_a_finished_one__the_same_table(benched, small):
    folder, outcome = benched
    again = run("bench", "--out", folder, *small, "--agents", "random,oracle", "--seeds", "2", "--resume")
    assert (again.code, again.out) == (0, outcome.out)


@pytest.fixture
def asked_for(monkeypatch):
    """Return a function that gives what a command would have done, without doing it."""
    from raise_env.agents import benchmark

    calls = []

    def bench(out, plan, **options):
        calls.append((plan, options))
        return summarise([], plan.tasks, list(plan.entries), range(plan.num_seeds), plan.reference)

    monkeypatch.setattr(benchmark, "bench", bench)

    def ask(*arguments):
        outcome = run(*arguments)
        assert calls, outcome.err
        return *calls.pop(), outcome

    return ask


def test_bench__options__are_shared_out_among_the_agents(asked_for):
    args = ["--agent-args", "raise_fork:num_forks=4", "--agent-args", "sb3:PPO:gamma=0.5,action_form=scores"]
    more = ["--agent-args", "raise_fork:num_passes=3", "--episodes", "4", "--episodes", "sb3:PPO=9"]
    names = "raise_fork, sb3:PPO,selector:run/selector"
    plan, options, _ = asked_for(
        "bench", "--out", "x", "--agents", names, *args, *more, "--workers", "3", "--horizon", "5"
    )
    assert plan.settings == {"horizon": 5}
    assert plan.entries == {
        "raise_fork": Entry("raise_fork", {"num_forks": 4, "num_passes": 3}, 4),
        "sb3:PPO": Entry("sb3:PPO", {"gamma": 0.5, "action_form": "scores"}, 9),
        "selector:run/selector": Entry("selector:run/selector", {}, 0),
    }
    assert (options["workers"], options["resume"], options["command"]) == (3, False, "bench")


@pytest.mark.parametrize(
    ("text", "lora"),
    [
        ('target_modules=["q_proj","v_proj"],r=4', {"target_modules": ["q_proj", "v_proj"], "r": 4}),
        ("target_modules=[q_proj, v_proj]", {"target_modules": ["q_proj", "v_proj"]}),  # a shell took the quotes
        ("r=4, target_modules=q_proj", {"r": 4, "target_modules": ["q_proj"]}),
        ("target_modules=all-linear", {"target_modules": "all-linear"}),
        ("target_modules=.*(q|v)_proj,r=4", {"target_modules": ".*(q|v)_proj", "r": 4}),
        ("target_modules=.*[0-9]{1,2}.q,use_dora=true", {"target_modules": ".*[0-9]{1,2}.q", "use_dora": True}),
        (r"target_modules=.*\(?q_proj,r=4", {"target_modules": r".*\(?q_proj", "r": 4}),
    ],
)
def test_bench__lora__names_lists_and_patterns_of_modules(asked_for, text, lora):
    plan, *_ = asked_for("bench", "--out", "x", "--lora", text)
    assert plan.settings == {"lora": lora}


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('a={"b":[1,2],"c":"d,e"},f=3', {"a": {"b": [1, 2], "c": "d,e"}, "f": 3}),
        ('a="x,\\"(,y",b=z', {"a": 'x,"(,y', "b": "z"}),
        ("a=(b,c=d", {"a": "(b", "c": "d"}),
        ("a=b),c=(d", {"a": "b)", "c": "(d"}),
        ('a=5",b=6', {"a": '5"', "b": 6}),
    ],
)
def test_bench__agent_args__commas_in_brackets_and_quotes_divide_nothing(asked_for, text, arguments):
    plan, *_ = asked_for("bench", "--out", "x", "--agents", "own=mine:Agent", "--agent-args", f"own:{text}")
    assert plan.entries["own"].arguments == arguments


def test_bench__nothing_said_of_episodes__is_each_agents_own_number(asked_for):
    names = "random,raise_fork,raise_ppo,sb3:PPO,selector:run/selector"
    plan, *_ = asked_for("bench", "--out", "x", "--agents", names)
    assert [entry.episodes for entry in plan.entries.values()] == [0, 3, 20, 16, 0]


def test_bench__episodes_for_all__are_not_for_learned_selectors_whatever_their_names(asked_for):
    names = "random,a=selector:run/a,selector:run/b,c=selector:run/c"
    episodes = ["--episodes", "16", "--episodes", "c=2"]
    plan, *_ = asked_for("bench", "--out", "x", "--agents", names, *episodes)
    assert [entry.episodes for entry in plan.entries.values()] == [16, 0, 0, 2]


def test_bench__an_agent_under_two_names__has_settings_for_each(asked_for):
    names = "raise_ppo,fast=raise_ppo"
    plan, *_ = asked_for(
        "bench", "--out", "x", "--agents", names, "--agent-args", "fast:preset=tuned", "--episodes", "fast=2"
    )
    assert plan.entries == {"raise_ppo": Entry("raise_ppo", {}, 20), "fast": Entry("raise_ppo", {"preset": "tuned"}, 2)}


@pytest.mark.parametrize(
    ("arguments", "tasks"),
    [
        ([], ("default",)),
        (["--task", "other"], ("other",)),
        (["--tasks", "one, two"], ("one", "two")),
        (["--pool", "pool.jsonl", "--dev", "dev.jsonl"], ("own",)),
    ],
)
def test_bench__tasks__are_the_embedded_ones_or_the_pool(asked_for, arguments, tasks):
    plan, _, _ = asked_for("bench", "--out", "x", *arguments)
    assert plan.tasks == tasks
    assert "task" not in plan.settings


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--agents", "randon,random,orakle"], ["'randon'", "'orakle'", "did you mean 'random'"]),
        (["--tasks", "defualt,hrad"], ["'defualt'", "'hrad'"]),
        (["--task", "default", "--tasks", "default"], ["--task", "--tasks"]),
        (["--tasks", ","], ["--tasks is ','", "expected names"]),
        (["--agents", ""], ["--agents is ''", "expected names"]),
        (["--agents", "a=less,random,a=ifd"], ["--agents names less and ifd both 'a'", "another name"]),
        (["--agents", "random,random=ifd"], ["--agents names random and ifd both 'random'"]),
        (["--agent-args", "raise_ppo:gamma=0"], ["--agent-args", "'raise_ppo:gamma=0'", "raise_fork"]),
        (["--agent-args", "raise_fork:forks=0"], ["forks", "num_forks"]),
        (["--episodes", "raise_ppo=3"], ["--episodes", "'raise_ppo'"]),
        (["--episodes", "many"], ["--episodes", "'many'"]),
        (["--episodes", "raise_fork=-1"], ["--episodes", "at least 0"]),
        (["--seed-model", "3"], ["seed_model"]),
        (["--seeds", "0"], ["--seeds"]),
    ],
)
def test_bench__bad_input__says_which_and_nothing_is_written(tmp_path, arguments, words):
    message = refused("bench", "--out", tmp_path / "out", *arguments)
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


def test_bench__one_agent_named_twice__is_there_once(asked_for):
    plan, *_ = asked_for("bench", "--out", "x", "--agents", "random,ifd,random")
    assert list(plan.entries) == ["random", "ifd"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--agents", " ,"], "--agents is ' ,'"),
        (["--agents", "a=less,a=ifd"], "--agents names less and ifd both 'a'"),
        (["--tasks", ","], "--tasks is ','"),
    ],
)
def test_audit__names_that_are_none_or_given_twice__are_refused(tmp_path, arguments, words):
    assert words in refused("audit", "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_bench__every_run_fails__one_and_why(own_agent, small, tmp_path):
    def begin(self, env, seed):
        raise SettingError("not today.")

    own_agent.Tired = type("Tired", (own_agent.RandomAgent,), {"begin": begin})
    outcome = run("bench", "--out", tmp_path / "out", *small, "--agents", "own_agent:Tired", "--seeds", "1")
    assert outcome.code == 1
    assert "missing: default, own_agent:Tired, seed 0: not today." in outcome.out
    assert "Traceback" not in outcome.err


def test_bench__many_runs_are_missing__a_few_are_shown(asked_for):
    # Nothing was run, so all are missing.
    _, _, outcome = asked_for("bench", "--out", "x", "--agents", "random", "--seeds", "9")
    assert outcome.code == 1
    assert outcome.out.count("missing: default, random, seed") == 5
    assert "missing: 4 more" in outcome.out
    assert "0 of 9 runs" in outcome.out


def test_ablate__results__differences_to_all_features(tmp_path, small):
    outcome = run("ablate", "--out", tmp_path / "out", *small, "--agent", "random", "--seeds", "1")
    assert outcome.code == 0, outcome.err
    assert "difference to all features" in outcome.out
    assert re.search(r"^without semantic +1 ", outcome.out, re.MULTILINE)
    assert "6 of 6 runs" in outcome.out
    plan = json.loads((tmp_path / "out" / "run.json").read_text())["plan"]
    assert plan["entries"]["without stage"]["settings"] == {"hide": ["stage"]}


def test_ablate__options__are_the_plans(asked_for):
    plan, options, _ = asked_for(
        "ablate", "--out", "x", "--agent", "sb3:PPO", "--seeds", "3", "--task", "default", "--resume"
    )
    assert (plan.num_seeds, plan.tasks, plan.settings) == (3, ("default",), {})
    assert plan.entries["all features"] == Entry("sb3:PPO", {}, 16)
    assert (options["command"], options["resume"]) == ("ablate", True)


# validate


def test_validate__untouched_records__zero(trained):
    outcome = run("validate", trained[0] / "episodes.jsonl")
    assert (outcome.code, outcome.out) == (0, "2 episodes replayed: equal to the bit.\n")


def tampered(source, path, change):
    records = [json.loads(line) for line in source.read_text().splitlines()]
    change(records)
    return write_jsonl(path, records)


def test_validate__tampered_reward__one_and_its_name(trained, tmp_path):
    def change(records):
        records[1]["rewards"][2] += 0.01

    path = tampered(trained[0] / "episodes.jsonl", tmp_path / "tampered.jsonl", change)
    outcome = run("validate", trained[0] / "episodes.jsonl", path)
    assert outcome.code == 1
    assert re.search(
        rf"{re.escape(str(path))}, record 2 \(random, seed 1000\): reward of step 3: recorded", outcome.out
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda records: records[0]["actions"][0].__setitem__(0, 10**6), "action of step 1"),
        (lambda records: records[0].update(test_score=0.0), "test score"),
        (lambda records: records[0]["content"].update(pool="0" * 64), "content of pool"),
        (lambda records: records[0]["dev_scores"].__setitem__(0, 0.0), "dev score 0"),
    ],
)
def test_validate__tampered_otherwise__one_and_its_name(trained, tmp_path, change, words):
    path = tampered(trained[0] / "episodes.jsonl", tmp_path / "tampered.jsonl", change)
    outcome = run("validate", path)
    assert outcome.code == 1
    assert f"{path}, record 1 (raise_fork, seed 1000): {words}" in outcome.out


def test_validate__difference_within_the_tolerance__zero_and_says_how_large(trained, tmp_path):
    def change(records):
        records[0]["rewards"][0] += 0.01

    path = tampered(trained[0] / "episodes.jsonl", tmp_path / "tampered.jsonl", change)
    outcome = run("validate", path, "--tolerance", "0.5")
    assert outcome.code == 0
    assert "2 episodes replayed: 1 equal to the bit, 1 within 0.5 of each score" in outcome.out
    assert "largest difference 1.0e-02" in outcome.out


def test_validate__broken_line__names_file_and_line(trained, tmp_path):
    lines = (trained[0] / "episodes.jsonl").read_text().splitlines()
    (tmp_path / "broken.jsonl").write_text(f"{lines[0]}\n{lines[1][:50]}\n")
    assert f"{tmp_path / 'broken.jsonl'}, line 2" in refused("validate", tmp_path / "broken.jsonl")


def test_validate__missing_field__names_it(trained, tmp_path):
    path = tampered(trained[0] / "episodes.jsonl", tmp_path / "t.jsonl", lambda records: records[1].pop("rewards"))
    message = refused("validate", path)
    assert f"{path}, line 2" in message
    assert "rewards" in message


def test_validate__no_file__named(tmp_path):
    assert str(tmp_path / "nothing.jsonl") in refused("validate", tmp_path / "nothing.jsonl")


# demo


def small_demo(monkeypatch, small_settings):
    """Let `demo` do its work on a small environment: the whole takes minutes."""
    from raise_env.agents import runs

    def plan(_, **changes):
        return dataclasses.replace(Plan(small_settings, num_runs=1, agent_settings=FORK_SETTINGS), **changes)

    Plan = runs.Plan
    monkeypatch.setattr(runs, "Plan", plan)


def test_demo__end_to_end__compares_with_random_ifd_and_oracle(monkeypatch, small_settings, tmp_path):
    small_demo(monkeypatch, small_settings)
    outcome = run("demo", "--out", tmp_path / "demo", "--episodes", "1", "--seed", "2")
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert set(report["agents"]) == {"raise_fork", "random", "ifd", "oracle"}
    assert (tmp_path / "demo" / "report.html").is_file()
    assert "hidden labels known" in outcome.out


def test_demo__again_in_the_same_folder__replaces_the_last(monkeypatch, small_settings, tmp_path):
    small_demo(monkeypatch, small_settings)
    for seed in (0, 1):
        assert run("demo", "--out", tmp_path / "demo", "--episodes", "1", "--seed", seed).code == 0
    assert json.loads((tmp_path / "demo" / "run.json").read_text())["plan"]["seed"] == 1


def test_demo__folder_of_another_run__is_not_touched(monkeypatch, small_settings, trained):
    small_demo(monkeypatch, small_settings)
    message = refused("demo", "--out", trained[0])
    assert message.endswith("holds a run already: name another folder.\n"), "demo has no --resume"
    assert (trained[0] / "selector" / "model.safetensors").is_file()


def test_demo__again_beside_files_of_ones_own__leaves_those(monkeypatch, small_settings, tmp_path):
    small_demo(monkeypatch, small_settings)
    monkeypatch.chdir(tmp_path)
    own = {"thesis.txt", "notes/report.md", "report.pdf"}
    (tmp_path / "notes").mkdir()
    for name in own:
        (tmp_path / name).write_text("mine")
    assert run("demo", "--out", ".", "--episodes", "1").code == 0
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / ".adapter.abcdefgh.unfinished").mkdir()
    (tmp_path / ".report.html.abcdefgh.unfinished").write_text("torn")
    assert run("demo", "--out", ".", "--episodes", "1", "--seed", "1").code == 0
    assert json.loads((tmp_path / "run.json").read_text())["plan"]["seed"] == 1
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == written
    assert not list(tmp_path.glob(".*"))
    assert all((tmp_path / name).read_text() == "mine" for name in own)
    cli._remove_last_demo(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.txt", "notes", "report.pdf"}


def test_demo__another_one_still_at_work_in_the_folder__is_not_touched(monkeypatch, small_settings, tmp_path):
    small_demo(monkeypatch, small_settings)
    (tmp_path / "run.json").write_text('{"command": "demo"}')
    (tmp_path / "selector").mkdir()
    with held(tmp_path):
        assert "another process is writing" in refused("demo", "--out", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "selector"}


def test_demo__last_one_that_cannot_be_removed__is_one_message(monkeypatch, small_settings, tmp_path):
    small_demo(monkeypatch, small_settings)
    (tmp_path / "run.json").write_text('{"command": "demo"}')
    (tmp_path / "selector").mkdir()

    def fail(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("shutil.rmtree", fail)
    assert "cannot be removed (Permission denied); name another folder" in refused("demo", "--out", tmp_path)
    assert (tmp_path / "run.json").is_file(), "it tells that the rest is a demo's"


# Bad input: exit code 2, one message that names file, line and field, and nothing written


def test_bad_input__pool_is_missing__named(own_files, tmp_path):
    (tmp_path / "pool.jsonl").unlink()
    assert f"{tmp_path / 'pool.jsonl'}: there is no such file" in refused("train", *own_files)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], ["it has no rows"]),
        (['{"frage": "a", "antwort": "b"}'], ["line 1", "'frage'", "'antwort'", "question and answer"]),
        (['{"question": "a", "answer": "b"}', '{"question": "c"'], ["line 2", "JSON"]),
        (['{"question": "a", "answer": "b"}', '{"question": "c", "answer": " "}'], ["line 2", "'answer'"]),
        (['{"question": "a", "answer": "b"}', '{"question": "c", "answer": 3}'], ["line 2", "'answer'", "3"]),
        (['{"question": "a", "answer": "b"}', '{"question": "c"}'], ["line 2", "'answer'"]),
    ],
    ids=["empty", "columns", "json", "blank", "number", "field"],
)
@pytest.mark.parametrize("which", ["pool", "dev"])
def test_bad_input__file_at_fault__names_file_line_and_field(own_files, tmp_path, which, lines, words):
    path = tmp_path / f"{which}.jsonl"
    path.write_text("\n".join(lines))
    message = refused("train", *own_files)
    assert str(path) in message
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


def test_bad_input__dev_row_in_the_pool__both_places_are_named(own_files, tmp_path):
    write_jsonl(tmp_path / "dev.jsonl", question_rows([50, 51, 7]))
    message = refused("train", *own_files)
    for words in (
        f"{tmp_path / 'dev.jsonl'}",
        f"{tmp_path / 'pool.jsonl'}",
        "line 3, there line 8",
        "What is 7 plus 7?",
    ):
        assert words in message
    assert not (tmp_path / "out").exists()


def test_bad_input__fewer_rows_than_candidates__both_numbers(own_files, tmp_path):
    write_jsonl(tmp_path / "pool.jsonl", question_rows(range(10)))
    message = refused("train", *own_files)
    assert "num_candidates is 16" in message
    assert "10 rows" in message
    assert not (tmp_path / "out").exists()


def test_bad_input__fewer_rows_than_classes__both_numbers(own_files, tmp_path):
    write_jsonl(tmp_path / "pool.jsonl", question_rows(range(3)))
    outcome = run("train", *own_files, "--num-candidates", "all")
    assert outcome.code == 2
    assert "num_classes is 4" in outcome.err
    assert "3 rows" in outcome.err
    assert not any((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("kind", ["missing", "empty folder", "file"])
def test_bad_input__model_that_is_none__named(own_files, tmp_path, kind):
    model = tmp_path / "model"
    if kind == "empty folder":
        model.mkdir()
    elif kind == "file":
        model.write_text("")
    assert str(model) in refused("train", *own_files, "--model", model)
    assert not (tmp_path / "out").exists()


def test_bad_input__reward_is_not_a_number__names_the_function(own_files, tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text("def score(evaluation):\n    return float('nan')\n")
    monkeypatch.chdir(tmp_path)
    outcome = run("train", *own_files, "--reward", "own_rewards:score")
    assert outcome.code == 2
    assert "own_rewards:score" in outcome.err
    assert "nan" in outcome.err
    assert "Traceback" not in outcome.err
    assert not any((tmp_path / "out").glob("*"))


def test_bad_input__reward_that_is_not_there__named(own_files):
    assert "no_such_module" in refused("train", *own_files, "--reward", "no_such_module:score")


@pytest.mark.parametrize("command", ["train", "demo"])
def test_bad_input__output_folder_cannot_be_made__named(command, tmp_path, small):
    (tmp_path / "file").write_text("")
    arguments = [*small, *SMALL_RUN] if command == "train" else []
    assert str(tmp_path / "file" / "out") in refused(command, "--out", tmp_path / "file" / "out", *arguments)


@pytest.mark.parametrize("option", ["--agent", "--compare"])
def test_bad_input__unknown_agent__the_nearest_is_named(own_files, tmp_path, option):
    assert "did you mean 'oracle'?" in refused("train", *own_files, option, "orakle")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--horizon", "many"], ["--horizon", "'many'"]),
        (["--horizon", "0"], ["horizon is 0"]),
        (["--num-candidates", "10"], ["num_candidates=10", "num_classes=4"]),
        (["--learning-rate", "nan"], ["learning_rate is nan"]),
        (["--lora", "r"], ["--lora", "NAME=VALUE"]),
        (["--lora", "target_modules=5"], ["lora target_modules is 5", '"all-linear"']),
        (["--lora", "target_modules=null"], ["lora target_modules is None", '"all-linear"']),
        (["--lora", 'target_modules=["q_proj","v_proj"'], ["--lora has '\"v_proj\"'", 'NAME=["a","b"]']),
        (["--lora", "target_modules=.*(q|v_proj"], ["--lora target_modules is '.*(q|v_proj'", "unterminated", "NAME"]),
        (["--columns", "prompt"], ["--columns", "'prompt'", "KEY=COLUMN"]),
        (["--columns", "promt=q,response=a"], ["'promt'", "did you mean 'prompt'"]),
        (["--columns", "prompt=q"], ["columns is", "prompt with response"]),
        (["--choice-form", "number"], ["choice_form", "text, letter"]),
        (["--pool", "no/such-rows", "--dev", "d.jsonl"], ["no/such-rows", "as a data set of the hub"]),
        (["--lora", "rank=4"], ["'rank'", "lora_alpha"]),
        (["--hide", "stages"], ["'stages'", "did you mean 'stage'"]),
        (["--agent-args", "forks=4"], ["forks", "num_forks"]),
        (["--task", "unheard-of", "--pool-size", "20"], ["unheard-of", "default"]),
        (["--device", "abacus"], ["abacus"]),
        (["--episodes", "-1"], ["--episodes"]),
    ],
)
def test_bad_input__setting__says_which_and_what_was_expected(tmp_path, arguments, words):
    outcome = run("train", "--out", tmp_path / "out", *arguments)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err
    assert not any((tmp_path / "out").glob("*"))


def test_bad_input__selector_that_is_none__named(tmp_path, small):
    message = refused("finetune", "--selector", tmp_path, "--out", tmp_path / "out", *small)
    assert str(tmp_path / "config.json") in message
    assert not (tmp_path / "out").exists()


def test_main__own_modules__are_found_in_the_working_folder(own_files, tmp_path, monkeypatch):
    (tmp_path / "halved_reward.py").write_text("def score(evaluation):\n    return -evaluation.loss / 2\n")
    monkeypatch.chdir(tmp_path)
    outcome = run(
        "train",
        *own_files,
        "--reward",
        "halved_reward:score",
        "--episodes",
        "0",
        "--agent-args",
        "",
        "--agent",
        "random",
    )
    assert outcome.code == 0, outcome.err


def test_main__a_fault_of_ours__keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "app", lambda **_: [][1])
    with pytest.raises(IndexError):
        cli.main(["info"])


@pytest.mark.parametrize(
    "error", [MemoryError("Unable to allocate 8 GiB"), torch.OutOfMemoryError("CUDA out of memory")]
)
def test_main__too_little_memory_anywhere__one_message_and_code_2(monkeypatch, error):
    def fails(**_):
        raise error

    monkeypatch.setattr(cli, "app", fails)
    outcome = run("train", "--out", "run")
    assert outcome.code == 2
    assert "too little memory" in outcome.err
    assert str(error) in outcome.err
    assert "raise-env train --out run --resume" in outcome.err


# Ctrl-C


def interrupt_once_learning_has_begun(command, folder, environment, by=signal.SIGINT):
    """Start a command, interrupt it after its first episode, and return the code and what it wrote on stderr."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    try:
        deadline = time.monotonic() + 300
        while not (folder / "learning").is_dir() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(by)
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, err


def test_train__ctrl_c_then_resume__equals_an_undisturbed_run(tmp_path, small):
    # Many episodes, so that the first is over long before the last.
    arguments = [*small, "--runs", "1", "--episodes", "8", "--agent-args", FORK_ARGUMENTS]
    folder = tmp_path / "run"
    # Started from a job in the background, a program would ignore Ctrl-C.
    heeds = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = [sys.executable, "-c", f"{heeds}; from raise_env.agents.cli import main; main()"]
    command = [*program, "train", "--out", str(folder), *arguments]
    # Sums in another order are other sums: as many threads as here.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    code, err = interrupt_once_learning_has_begun(command, folder, environment)
    assert code == 130, err
    assert "Traceback" not in err
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    told = re.search(r"Go on with: raise-env (.*)", err)
    assert told is not None, err
    assert told[1].split() == [*command[3:], "--resume"]

    assert run(*told[1].split()).code == 0
    assert run("train", "--out", tmp_path / "undisturbed", *arguments).code == 0
    for name in ("episodes.jsonl", "selected.jsonl", "selector/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name


def test_train__sigterm__ends_as_by_ctrl_c(tmp_path, small):
    folder = tmp_path / "run"
    learner = ["--agent", "sb3:DQN", "--agent-args", "learning_starts=4,batch_size=4", "--episodes", "400"]
    command = [*ENTRY, "train", "--out", str(folder), *small, "--runs", "1", *learner]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    code, err = interrupt_once_learning_has_begun(command, folder, environment, by=signal.SIGTERM)
    assert code == 130, err
    assert "Go on with: raise-env train" in err
    assert "Traceback" not in err
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"


def test_main__sigterm_meanwhile_and_afterwards__is_put_back(monkeypatch):
    def ended(**_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(cli, "app", ended)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert run("validate", "x").code == 130
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_main__whoever_hosts_it_handles_sigterm__is_left_to(monkeypatch):
    monkeypatch.setattr(cli, "app", lambda **_: handlers.append(signal.getsignal(signal.SIGTERM)))
    handlers = []
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert run("validate", "x").code == 0
        assert handlers == [signal.SIG_IGN]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_main__ctrl_c_elsewhere__130_without_a_resume_command(monkeypatch):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    outcome = run("validate", "x")
    assert outcome.code == 130
    assert "--resume" not in outcome.err


def test_entry_point__is_installed__beside_python():
    script = Path(sys.executable).with_name("raise-env")
    assert script.is_file() or shutil.which("raise-env")


def test_evaluate__a_model_and_a_file__prints_a_line_a_metric_and_writes_them(tmp_path):
    rows = tmp_path / "rows.jsonl"
    row = {"instruction": "2 + 2?", "output": "4", "choices": ["4", "5"]}
    rows.write_text(f"{json.dumps(row)}\n" * 3, encoding="utf-8")
    out = tmp_path / "scores.json"
    outcome = run("evaluate", "--model", "tiny", "--data", rows, "--metric", "loss,accuracy", "--out", out)
    assert outcome.code == 0
    names = [line.split()[0] for line in outcome.out.splitlines()[:2]]
    assert names == ["loss", "accuracy"]
    found = json.loads(out.read_text(encoding="utf-8"))
    assert f"{found['metrics']['loss']['value']:.4f}" in outcome.out
    assert (found["model"], found["data"], found["adapter"]) == ("tiny", str(rows), None)


def test_evaluate__what_cannot_be_used__is_one_message(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "2 + 2?", "output": "4"}) + "\n", encoding="utf-8")
    common = ("evaluate", "--model", "tiny", "--data", rows)
    assert "needs rows with a column `choices`" in refused(*common, "--metric", "accuracy_norm")
    assert "dtype is 'float16'" in refused(*common, "--dtype", "float16")
    assert "adapter_config.json" in refused(*common, "--adapter", tmp_path)
    assert "never shows" in refused(*common, "--template", "no prompt")
    blocked = run(*common, "--out", rows / "below")
    assert blocked.code == 2
    assert "cannot be written" in blocked.err


# split


def test_split__columns_by_name__rows_as_they_were(tmp_path):
    rows = [{"q": f"What is {n}?", "a": str(n)} for n in range(10)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    common = ("split", "--data", data, "--dev", "2", "--test", "3", "--out", tmp_path / "out")
    assert run(*common, "--columns", "prompt=q,response=a").code == 0
    lines = (tmp_path / "out" / "pool.jsonl").read_text().splitlines()
    assert len(lines) == 5
    assert all(json.loads(line) in rows for line in lines)


def test_split__rows_without_text__are_counted(tmp_path):
    rows = [*question_rows(range(10)), {"question": "What is left?", "answer": " "}]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    common = ("split", "--data", data, "--dev", "2", "--test", "3", "--out")
    outcome = run(*common, tmp_path / "out", "--skip-empty")
    assert outcome.code == 0
    assert outcome.out.startswith("Rows skipped, as they have an empty prompt or response: 1.\n")
    write_jsonl(data, rows[:-1])
    assert "skipped" not in run(*common, tmp_path / "whole", "--skip-empty").out


def test_split__columns_that_the_file_has_not__two_and_nothing_is_written(tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", question_rows(range(10)))
    common = ("split", "--data", data, "--dev", "2", "--test", "3", "--out", tmp_path / "out")
    message = refused(*common, "--columns", "prompt=question,response=anser")
    assert f"columns names question, anser, but no first row of {data} has all of these" in message
    assert f"found question, answer in {data}" in message
    assert not (tmp_path / "out").exists()


# leaderboard


def test_tasks__suite__stands_for_its_tasks_each_once():
    from raise_env.agents.benchmark import SUITE
    from raise_env.agents.cli import _tasks

    assert _tasks("target,suite,large") == ("target", *(task for task in SUITE if task != "target"), "large")
    assert "large" not in SUITE


def test_leaderboard__runs_with_settings_of_their_own__nobody_to_rank_between(benched):
    message = refused("leaderboard", benched[0], "--tasks", "default", "--seeds", "2", "--replays", "0")
    assert "settings of its own" in message
    assert "horizon" in message


@pytest.mark.parametrize("is_at_fault", [False, True])
def test_leaderboard__references__are_no_fault(monkeypatch, is_at_fault):
    from raise_env.agents import leaderboard as module

    def ranked(*_, **__):
        reference = module.Entrant("full", "full", Path("suite"), settings=["horizon"])
        unranked = [module.Entrant("mine", "mine", Path("mine"), faults=["runs are missing"])] if is_at_fault else []
        summary = {"normalised": {}, "against_random": {}, "cost": {}}
        return module.Board([], [reference], unranked, summary, [])

    monkeypatch.setattr(module, "leaderboard", ranked)
    outcome = run("leaderboard", "suite")
    assert outcome.code == is_at_fault
    assert "| full | suite | horizon |" in outcome.out


def test_leaderboard__no_tasks__two_and_what_was_expected():
    assert "--tasks is ','; expected names" in refused("leaderboard", "suite", "--tasks", ",")


def test_leaderboard__unknown_task__two_and_the_nearest():
    assert "unknown task 'defualt': did you mean 'default'" in refused("leaderboard", "suite", "--tasks", "defualt")


def test_leaderboard__no_benchmark__is_named(tmp_path):
    assert str(tmp_path / "results.jsonl") in refused("leaderboard", tmp_path)


def test_validate__a_benchmarks_folder__replays_it_and_holds_results_against_records(benched):
    outcome = run("validate", benched[0], "--workers", "2")
    assert outcome.code == 0
    assert outcome.out == ("4 episodes replayed: equal to the bit.\n4 lines of results say what their records say.\n")


def test_validate__a_line_that_its_record_does_not_bear__one_and_its_name(benched, tmp_path):
    folder = shutil.copytree(benched[0], tmp_path / "bench")
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    lines[2]["test_loss"] = 0.0
    write_jsonl(folder / "results.jsonl", lines)
    outcome = run("validate", folder)
    assert outcome.code == 1
    assert re.search(r"results\.jsonl, default, \w+, seed \d: test_loss is 0\.0; its record says", outcome.out)


def test_validate__a_cost_that_its_record_disproves__one_and_its_name(benched, tmp_path):
    folder = shutil.copytree(benched[0], tmp_path / "bench")
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    nothing = {name: dict.fromkeys(lines[2][name], 0) for name in ("phi_parts", "tokens", "seconds")}
    write_jsonl(folder / "results.jsonl", [*lines[:2], {**lines[2], "phi": 0.0, **nothing}, *lines[3:]])
    outcome = run("validate", folder)
    assert outcome.code == 1
    assert re.search(r"record 3 \(\w+, seed \d+\): tokens of the final run are 0; making its steps again", outcome.out)
