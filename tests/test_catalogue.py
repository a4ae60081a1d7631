"""Agents by name: those that are there, those of Stable-Baselines3, those of one's own."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from stable_baselines3 import PPO

from raise_env import RaiseSelectEnv, TopKScores
from raise_env.agents import RaiseFork, cli, load_selector, make_agent, run_episode
from raise_env.agents.base import Agent
from raise_env.agents.catalogue import (
    AGENTS,
    FunctionAgent,
    agent_name,
    reward_digest,
    selector_digest,
    source_digest,
)
from raise_env.agents.job import Entry
from raise_env.agents.sb3 import PRESETS
from raise_env.errors import AgentError, RecordError, RewardError, SettingError
from raise_env.testing import toy_env


@pytest.fixture
def my_module(tmp_path, monkeypatch):
    """Return a function that writes the module "mine" and forgets it afterwards."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source):
        (tmp_path / "mine.py").write_text(source)

    yield write
    sys.modules.pop("mine", None)


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_make_agent__every_name__an_agent(name):
    assert isinstance(make_agent(name, {"column": "rating"} if name == "quality" else None), Agent)


def test_make_agent__unknown_name__names_the_nearest():
    with pytest.raises(
        SettingError, match=r"unknown agent 'randon': did you mean 'random'\? Known: random, .*raise_fork"
    ):
        make_agent("randon")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("randon", "random"), ("Oracle", "oracle"), ("ppo", "sb3:PPO"), ("PPO", "sb3:PPO"), ("loss_lo", "loss_low")],
)
def test_make_agent__unknown_name__lists_all_the_nearest_first(name, nearest):
    with pytest.raises(SettingError, match=f"unknown agent '{name}': did you mean '{nearest}'") as caught:
        make_agent(name)
    names = str(caught.value).partition("Known: ")[2].removesuffix(".").split(", ")
    assert names[0] == nearest
    assert sorted(names) == sorted(
        [*AGENTS, *(f"sb3:{a}" for a in PRESETS), "placebo:AGENT", "selector:DIR", "my_module:name"]
    )


def test_make_agent__settings__reach_the_agent():
    assert make_agent("random", {"batch_size": 3}).batch_size == 3
    assert make_agent("raise_fork", {"num_forks": 4}).settings.num_forks == 4


@pytest.mark.parametrize("name", ["random", "raise_fork"])
def test_make_agent__unknown_setting__named(name):
    with pytest.raises(SettingError, match="num_frocks"):
        make_agent(name, {"num_frocks": 4})


def test_make_agent__quality_and_a_column__reads_that_column():
    assert make_agent("quality:rating").column == "rating"


TAKES_FIRST = """
import numpy as np

def choose(observation, size=8):
    return (np.arange(len(observation)) < size).astype(int)

class Mine:
    def __init__(self, size=8):
        self.size = size
    def predict(self, observation, state=None, **_):
        return choose(observation, self.size), state

model = Mine(3)
"""


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("mine:Mine", {}, 8),
        ("mine:Mine", {"size": 3}, 3),
        ("mine:model", {}, 3),
        ("mine:choose", {}, 8),
        ("mine:choose", {"size": 5}, 5),
    ],
)
def test_make_agent__class_object_or_function_of_ones_own__acts(name, arguments, size, my_module):
    my_module(TAKES_FIRST)
    agent = make_agent(name, arguments)
    record = run_episode(toy_env(horizon=2, num_classes=1, num_candidates=16), agent, seed=0, name=name)
    assert [len(rows) for rows in record.actions] == [size, size]


def test_make_agent__model_that_ones_own_file_has_loaded__acts_and_does_not_learn(my_module, tmp_path):
    model = PPO("MlpPolicy", TopKScores(toy_env()), device="cpu")
    model.save(tmp_path / "ppo.zip")
    my_module(f"from stable_baselines3 import PPO\nmodel = PPO.load({str(tmp_path / 'ppo.zip')!r}, device='cpu')")
    agent = make_agent("mine:model")
    observation, _ = toy_env().reset(seed=0)
    expected, _ = model.predict(observation, deterministic=True)
    np.testing.assert_array_equal(agent.predict(observation, deterministic=True)[0], expected)
    assert agent.action_space == model.action_space
    assert not hasattr(agent, "learn")  # SB3's takes a number of steps
    assert not hasattr(agent, "save")


def test_make_agent__object_that_learns_as_agents_do__is_a_new_one_each_time(my_module):
    my_module("from raise_env.agents import RaiseFork\nmodel = RaiseFork()")
    first, second = make_agent("mine:model"), make_agent("mine:model")
    assert isinstance(first, RaiseFork)
    first.episode_returns.append(1.0)
    assert second.episode_returns == [], "what one run learned is there in the next"


def test_make_agent__object_that_has_learned__acts_with_what_it_learned(my_module, small_settings, caplog):
    settings = "num_networks=1, num_passes=1, num_states=1, num_rows=4, num_lookahead=1"
    my_module(
        "from raise_env import RaiseSelectEnv\nfrom raise_env.agents import RaiseFork\n"
        f"model = RaiseFork({settings}).learn(RaiseSelectEnv(**{small_settings!r}), 1)"
    )
    agent = make_agent("mine:model")
    assert not hasattr(agent, "learn")
    assert "name its class to have it learn" in caplog.text
    record = run_episode(RaiseSelectEnv(**small_settings), agent, seed=0, name="mine")
    assert [len(rows) for rows in record.actions] == [4, 4, 4]


def test_make_agent__object_that_learns_and_cannot_be_copied__acts_as_it_is(my_module, caplog):
    learns = "    def learn(self, env, episodes, seed=0, progress=None): return self\n"
    my_module(
        f"import threading\n{TAKES_FIRST}class Locked(Mine):\n{learns}model = Locked()\nmodel.lock = threading.Lock()\n"
    )
    assert not hasattr(make_agent("mine:model"), "learn")
    assert "'mine:model' cannot be copied" in caplog.text


def test_selector_digest__another_selector_in_its_place__is_another(tmp_path):
    for name, content in {"config.json": "{}", "auxiliary/adapter_config.json": "{}"}.items():
        (tmp_path / "run" / "selector" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / "selector" / name).write_text(content)
    first = selector_digest(f"selector:{tmp_path / 'run'}")
    assert first == selector_digest(f"selector:{tmp_path / 'run' / 'selector'}")
    (tmp_path / "run" / "selector" / "auxiliary" / "adapter_config.json").write_text("{ }")
    assert selector_digest(f"selector:{tmp_path / 'run'}") != first
    assert selector_digest("random") is None


@pytest.mark.parametrize("name", ["sb3:PPO", "placebo:sb3:PPO"])
def test_selector_digest__model_of_sb3_to_load__is_that_of_its_file(tmp_path, name):
    (tmp_path / "ppo.zip").write_bytes(b"one")
    arguments = {"load": str(tmp_path / "ppo.zip"), "n_steps": 8}
    first = selector_digest(name, arguments)
    assert first == Entry(name, arguments).to_json()["selector"] is not None
    (tmp_path / "ppo.zip").write_bytes(b"two")
    assert selector_digest(name, arguments) != first
    assert selector_digest(name, {"n_steps": 8}) is selector_digest(name) is None
    (tmp_path / "ppo.zip").unlink()
    with pytest.raises(RecordError, match=f"agent '{name}': what it has learned cannot be read"):
        selector_digest(name, arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("no.such.module:Class", {}, r"no module 'no' in the working folder and the installed packages\.$"),
        ("no_such_file.py:Class", {}, "no module 'no_such_file' .*Leave out the ending: no_such_file:Class"),
        ("mine:Mime", {}, r"'mine' has no 'Mime': did you mean 'Mine'\? Known: Mine, "),
        ("mine:TAKEN", {}, "is int, which has no predict"),
        ("mine:Mine", {"sise": 3}, "'mine:Mine' does not take these settings: .*sise"),
        ("mine:choose", {"sise": 3}, "function choose .*cannot be called with an observation and the settings .*sise"),
        ("mine:model", {"size": 3}, "is there already, built by its module, and takes no settings; got size"),
        ("raise_env.pool:Pool", {"instructions": (), "source": ""}, "has no predict"),
        ("raise_env.testing:no_such", {}, "has no 'no_such': .*Known: "),
    ],
)
def test_make_agent__agent_of_ones_own_that_cannot_be_used__says_why(name, arguments, words, my_module):
    my_module(TAKES_FIRST + "TAKEN = 8\n")
    with pytest.raises(SettingError, match=words):
        make_agent(name, arguments)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import no_such_library", "importing 'mine': .*line 1.*No module named 'no_such_library'"),
        ("class Mine\n", "importing 'mine': .*line 1.*SyntaxError"),
        ("open('no such file')", "importing 'mine': .*line 1, in <module>.*FileNotFoundError"),
        ("class Mine:\n    def __init__(self):\n        1 / 0\n", "building it: .*line 3, in __init__.*ZeroDivision"),
    ],
)
def test_make_agent__code_of_ones_own_that_fails__shows_the_lines(source, words, my_module):
    my_module(source)
    with pytest.raises(AgentError, match=f"(?s)^agent 'mine:Mine', {words}") as caught:
        make_agent("mine:Mine")
    assert "importlib" not in str(caught.value)
    assert "catalogue" not in str(caught.value)


def test_function_agent__arguments_that_it_does_not_take__are_refused_at_once():
    for function, arguments in ((lambda observation: observation, {"sise": 3}), (lambda: None, {})):
        with pytest.raises(SettingError, match="cannot be called with an observation"):
            FunctionAgent(function, **arguments)


@pytest.mark.parametrize(
    ("name", "short"), [("selector:a/b", "selector"), ("random", "random"), ("sb3:PPO", "sb3:PPO")]
)
def test_agent_name__form__short(name, short):
    assert agent_name(name) == short


def test_load_selector__no_folder__says_what_was_expected(tmp_path):
    with pytest.raises(RecordError, match=r"config\.json.*raise-env train"):
        load_selector(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", json.dumps({"agent": "raise_fork", "format": 99})])
def test_load_selector__broken_config__record_error(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RecordError, match=r"config\.json"):
        load_selector(tmp_path)


def test_load_selector__folder_of_a_run__its_selector(tmp_path):
    agent = RaiseFork(num_forks=2, num_networks=1, num_passes=1)
    agent.learn(toy_env(horizon=1), episodes=1)
    agent.save(tmp_path / "selector")
    observation, _ = toy_env().reset(seed=0)
    np.testing.assert_array_equal(load_selector(tmp_path).scores(observation), agent.scores(observation))


def test_make_agent__selector_with_settings__names_them_and_says_that_it_brings_its_own(tmp_path):
    agent = RaiseFork(num_forks=2, num_networks=1, num_passes=1)
    agent.learn(toy_env(horizon=1), episodes=1)
    agent.save(tmp_path)
    assert make_agent(f"selector:{tmp_path}", {}).settings == agent.settings
    for name in (f"selector:{tmp_path}", f"placebo:selector:{tmp_path}"):
        with pytest.raises(SettingError, match=r"brings the settings .*; got least, num_rows\. Leave them out"):
            make_agent(name, {"least": 2.0, "num_rows": 8})


# By the command line, from learning elsewhere to records that replay


def raise_env(*arguments):
    """Run the command line and return its exit code."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code


@pytest.fixture
def small(small_settings, monkeypatch, tmp_path):
    """Options of a small environment; the working folder is one of the test's own."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return [text for name, value in small_settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def test_train_and_validate__model_that_sb3_saved__acts_and_its_records_replay(small, small_settings, tmp_path):
    model = PPO("MlpPolicy", TopKScores(toy_env(num_candidates=small_settings["num_candidates"])), device="cpu")
    model.save("ppo.zip")
    agent = ["--agent", "sb3:PPO", "--agent-args", "load=ppo.zip", "--episodes", "0"]
    assert raise_env("train", "--out", "run", *small, *agent, "--runs", 1, "--compare", "") == 0
    assert raise_env("validate", "run/episodes.jsonl") == 0
    record = json.loads((tmp_path / "run" / "episodes.jsonl").read_text())
    assert record["agent"] == "sb3:PPO"

    again = run_episode(RaiseSelectEnv(**small_settings), PPO.load("ppo.zip"), seed=record["seed"], name="again")
    assert again.actions == record["actions"]  # SB3's own way to load it chooses the same


def test_train_and_validate__function_of_ones_own__acts_and_its_records_replay(small, tmp_path):
    (tmp_path / "mine.py").write_text(TAKES_FIRST)
    agent = ["--agent", "mine:choose", "--agent-args", "size=2"]
    try:
        assert raise_env("train", "--out", "run", *small, *agent, "--runs", 1, "--compare", "") == 0
    finally:
        sys.modules.pop("mine", None)
    assert raise_env("validate", "run/episodes.jsonl") == 0
    record = json.loads((tmp_path / "run" / "episodes.jsonl").read_text())
    assert (record["agent"], [len(rows) for rows in record["actions"]]) == ("mine:choose", [2, 2, 2])


def test_train__function_that_fails__two_and_its_lines_on_stderr(small, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def choose(observation):\n    return observation[99]\n")
    try:
        assert raise_env("train", "--out", "run", *small, "--agent", "mine:choose", "--runs", 1) == 2
    finally:
        sys.modules.pop("mine", None)
    message = capsys.readouterr().err.partition("raise-env: ")[2]
    assert message.startswith("agent 'mine:choose', episode seed 1000, step 1: the agent's own code failed.")
    assert 'mine.py", line 2, in choose' in message
    assert message.rstrip().endswith("IndexError: index 99 is out of bounds for axis 0 with size 16")


# Which code it was


@pytest.mark.parametrize("name", ["random", "quality:rating", "sb3:PPO", "selector:somewhere", "placebo:raise_fork"])
def test_source_digest__agent_of_this_package__none(name):
    assert source_digest(name) is None


def test_source_digest__class_of_this_package_by_its_module__none():
    assert source_digest("raise_env.agents.audit:FixedRows") is None


@pytest.mark.parametrize("name", ["mine:Mine", "mine:choose", "mine:model"])
def test_source_digest__code_of_ones_own__changes_with_its_file_alone(my_module, name):
    my_module(TAKES_FIRST)
    before = source_digest(name)
    assert before == source_digest(name)
    assert before is not None
    my_module(TAKES_FIRST.replace("size=8", "size=7"))
    assert source_digest(name) != before


def test_source_digest__placebo_of_ones_own__is_that_of_its_agent(my_module):
    my_module(TAKES_FIRST)
    assert source_digest("placebo:mine:Mine") == source_digest("mine:Mine")


def test_reward_digest__function_of_ones_own__changes_with_its_file(my_module):
    assert reward_digest("loss") is None
    my_module("def score(evaluation):\n    return -evaluation.loss\n")
    before = reward_digest("mine:score")
    assert before == reward_digest("mine:score") is not None
    my_module("def score(evaluation):\n    return -2 * evaluation.loss\n")
    assert reward_digest("mine:score") != before
    with pytest.raises(RewardError, match="'mine:scores' cannot be loaded"):
        reward_digest("mine:scores")


def test_source_digest__class_that_another_file_defines__changes_with_that_too(my_module, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "mine_too", raising=False)
    (tmp_path / "mine_too.py").write_text(TAKES_FIRST)
    my_module("from mine_too import Mine")
    before = source_digest("mine:Mine")
    (tmp_path / "mine_too.py").write_text(TAKES_FIRST.replace("size=8", "size=7"))
    assert source_digest("mine:Mine") != before
