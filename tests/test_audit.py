from __future__ import annotations

import json
import sys
from collections import Counter

import numpy as np
import pytest

from raise_env.agents import RandomAgent, run_episode
from raise_env.agents.audit import AuditPlan, FixedRows, audit, probe_rewards
from raise_env.agents.findings import ADAPTER, ORDER, ROWS, audit_tables
from raise_env.agents.job import Entry
from raise_env.agents.validation import check_results, is_of_audit, read_bench
from raise_env.errors import OutputError, SettingError
from raise_env.record import versions
from raise_env.testing import toy_env

LEARNER = Entry(
    "raise_fork", {"num_networks": 1, "num_passes": 1, "num_states": 1, "num_rows": 4, "num_lookahead": 1}, 1
)


def plan_of(settings, **changes):
    return AuditPlan(settings, {"fork": LEARNER}, **{"num_seeds": 2, "num_noise": 2, "lengths": (2,), **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_settings):
    """A whole audit, small."""
    folder = tmp_path_factory.mktemp("audit") / "out"
    audit(folder, plan_of(small_settings))
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / "audit.json").read_text())


# Rows that are fixed


def rows_of(seed=0, num_rows=200, **arguments):
    env = toy_env(num_rows, num_candidates="all")
    record = run_episode(env, FixedRows(**arguments), seed=seed, name="fixed")
    return [tuple(sorted(step)) for step in record.actions]


def test_fixed_rows__any_seed__are_the_same_in_the_same_order():
    assert rows_of(seed=0) == rows_of(seed=1)
    assert len({row for step in rows_of() for row in step}) == 80
    assert rows_of(rows_seed=1) != rows_of()


def test_fixed_rows__shuffled__are_the_same_in_another_order():
    first, second = rows_of(seed=0, is_shuffled=True), rows_of(seed=1, is_shuffled=True)
    assert first != second
    assert sorted(first) == sorted(second) == sorted(rows_of())


def test_fixed_rows__of_the_run__are_others_in_each():
    assert rows_of(seed=0, rows_seed=None) != rows_of(seed=1, rows_seed=None)


@pytest.mark.parametrize("num_rows", [5, 8, 11, 40])
def test_fixed_rows__a_budget_beyond_the_pool__takes_all_rows_in_turn_and_none_twice_in_a_batch(num_rows):
    batches = rows_of(num_rows=num_rows, is_shuffled=True)
    assert [len(set(batch)) for batch in batches] == [min(8, num_rows)] * 10
    taken = Counter(row for batch in batches for row in batch)
    assert len(taken) == num_rows
    assert max(taken.values()) - min(taken.values()) <= 1


def test_fixed_rows__that_are_not_on_offer__are_refused():
    env = toy_env(num_candidates="all")
    env.reset(seed=0)
    agent = FixedRows()
    agent.begin(env, 0)
    agent._world = other = toy_env(num_candidates=8)
    other.reset(seed=0)
    with pytest.raises(SettingError, match="not on offer"):
        agent.predict(other.observation())


# The plan


def test_plan__a_learner__gets_a_placebo_and_other_lengths():
    plan = AuditPlan({}, {"raise_fork": Entry("raise_fork", {}, 3), "ifd": Entry("ifd")})
    entries = plan.runs().entries
    assert list(entries) == ["random", "raise_fork", "ifd", "placebo:raise_fork", "raise_fork after 6"]
    assert entries["placebo:raise_fork"] == Entry("placebo:raise_fork", {}, 3)
    assert entries["raise_fork after 6"].episodes == 6
    assert plan.learners == {"raise_fork": {"raise_fork": 3, "raise_fork after 6": 6}}


def test_plan__noise__differs_in_one_thing(tmp_path, small_settings):
    plan = plan_of(small_settings, num_noise=3)
    jobs = plan.noise().jobs(tmp_path / "noise")
    models = {
        label: [job.settings["seed_model"] for job in jobs if job.label == label] for label in plan.noise().entries
    }
    assert models.pop(ADAPTER) == [0, 1, 2]
    assert set(models) == {ORDER, ROWS, "candidates offered to random", "candidates offered to fork"}
    assert all(seeds == [0, 0, 0] for seeds in models.values())


# What is measured


def test_audit__whole_folder__holds_all_parts(folder, found):
    assert {path.name for path in folder.iterdir()} == {"run.json", "runs", "noise", "rewards.jsonl", "audit.json"}
    assert found["missing"] == []
    assert set(found["noise"]["default"]) >= {ADAPTER, ORDER, ROWS, "all of it, random", "all of it, fork"}
    assert {label: gap["episodes"] for label, gap in found["gap"]["default"].items()} == {
        "random": None,
        "fork": 1,
        "fork after 2": 2,
        "placebo:fork": None,
    }
    assert set(found["placebo"]["default"]["fork"]) == {
        "agent_against_random",
        "placebo_against_random",
        "agent_against_placebo",
    }
    assert "### Placebo" in audit_tables(found)


@pytest.mark.parametrize("part", ["runs", "noise"])
def test_audit__both_benchmarks_within__stand_before_their_records(folder, part):
    assert is_of_audit(folder / part)
    assert check_results(*read_bench(folder / part), of_audit=True) == {}


def test_audit__noise_of_a_learned_agent__acts_with_what_it_learned(folder):
    lines = [json.loads(line) for line in (folder / "noise" / "results.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if (line["agent"], line["seed"]) == ("candidates offered to fork", 0)]
    own = [json.loads(line) for line in (folder / "runs" / "results.jsonl").read_text().splitlines()]
    (same,) = [line for line in own if (line["agent"], line["seed"]) == ("fork", 0)]
    # The same adapter, selector and candidates: the same run.
    assert line["test_loss"] == same["test_loss"]
    assert line["phi_parts"]["learning"] == 0


def test_audit__again_in_the_same_folder__needs_resume_and_makes_nothing_twice(folder, found, small_settings):
    with pytest.raises(OutputError, match="resume"):
        audit(folder, plan_of(small_settings))
    before = {name: (folder / name).read_text() for name in ("rewards.jsonl", "runs/results.jsonl")}
    assert audit(folder, plan_of(small_settings), resume=True) == found
    assert {name: (folder / name).read_text() for name in before} == before


def test_audit__torn_line_of_rewards__is_made_again(folder, found, small_settings):
    path = folder / "rewards.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-40])
    assert audit(folder, plan_of(small_settings), resume=True) == found
    assert path.read_text() == whole


@pytest.mark.slow
def test_audit__resumed_with_more_seeds__tries_the_steps_of_all_runs_as_at_once(
    tmp_path, folder, found, small_settings
):
    audit(tmp_path / "out", plan_of(small_settings, num_seeds=1))
    assert audit(tmp_path / "out", plan_of(small_settings), resume=True) == found
    assert (tmp_path / "out" / "rewards.jsonl").read_text() == (folder / "rewards.jsonl").read_text()


def bytes_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_audit__resumed_with_other_versions__is_refused_and_nothing_is_written(folder, small_settings, monkeypatch):
    before = bytes_of(folder)
    monkeypatch.setattr("raise_env.agents.run_folder.versions", lambda: {**versions(), "peft": "9.9"})
    with pytest.raises(SettingError, match=r"runs/run\.json: .*peft .*, now 9\.9"):
        audit(folder, plan_of(small_settings, num_seeds=3), resume=True)
    with pytest.raises(SettingError, match=r"noise/run\.json: .*peft .*, now 9\.9"):
        audit(folder, plan_of(small_settings, num_noise=3), resume=True)
    assert bytes_of(folder) == before


def test_audit__resumed_without_lengths_that_are_there__says_which_to_name(folder, small_settings):
    before = bytes_of(folder)
    with pytest.raises(SettingError, match=r"further numbers of episodes, 2, .*: name them too, --episodes 2,3\."):
        audit(folder, plan_of(small_settings, lengths=(3,)), resume=True)
    assert bytes_of(folder) == before


OWN = """
from raise_env.agents.baselines import RandomAgent

class Forgets(RandomAgent):
    def learn(self, env, episodes, seed=0, progress=None):
        return self

class Fails(Forgets):
    def learn(self, env, episodes, seed=0, progress=None):
        raise KeyError("lost")

    def save(self, folder):
        pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module with agents of one's own."""
    (tmp_path / "audited_agents.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "audited_agents", raising=False)


def test_audit__agent_that_cannot_save_what_it_learned__is_refused_before_anything_is_run(
    own, tmp_path, small_settings
):
    plan = AuditPlan(small_settings, {"mine": Entry("audited_agents:Forgets", {}, 1), "fork": LEARNER})
    with pytest.raises(SettingError, match=r"which mine has no save\(folder\) to write"):
        audit(tmp_path / "out", plan)
    assert not (tmp_path / "out").exists()


def test_audit__agent_whose_learning_failed__does_not_act_unlearned_under_its_name(own, tmp_path, small_settings):
    agents = {"mine": Entry("audited_agents:Fails", {}, 1)}
    found = audit(tmp_path / "out", AuditPlan(small_settings, agents, (), num_seeds=2, num_noise=2))
    assert found["noise"]["default"]["candidates offered to mine"]["num_runs"] == 0
    assert "candidates offered to mine" in {run["agent"] for run in found["missing"]}


def test_audit__changed_code_of_ones_own__is_refused_and_nothing_is_written(own, tmp_path, small_settings):
    agents = {"mine": Entry("audited_agents:Forgets")}
    audit(tmp_path / "out", AuditPlan(small_settings, agents, num_seeds=2, num_noise=2))
    (tmp_path / "audited_agents.py").write_text(OWN + "# changed")
    before = bytes_of(tmp_path / "out")
    with pytest.raises(SettingError, match=r"runs/run\.json: .*entries\.mine\.source"):
        audit(tmp_path / "out", AuditPlan(small_settings, agents, num_seeds=3, num_noise=2), resume=True)
    assert bytes_of(tmp_path / "out") == before


def test_audit__other_settings__are_refused(folder, small_settings):
    with pytest.raises(SettingError, match="other settings"):
        audit(folder, plan_of({**small_settings, "horizon": 2}), resume=True)


# Steps made again


def random_records(num_records=3):
    return [run_episode(toy_env(), RandomAgent(), seed=1000 + s, name="random") for s in range(num_records)]


def test_probe_rewards__a_runs_own_steps__get_the_rewards_that_they_had():
    records = random_records()
    probe = probe_rewards(toy_env(num_candidates="all"), records[1], {"random": records})
    assert [state["step"] for state in probe["states"]] == [0, 1, 2, 3, 5, 6, 7, 8]
    for state in probe["states"]:
        # In this state the second batch is that of the run which is followed.
        assert state["rewards"]["random"][1] == pytest.approx(records[1].rewards[state["step"]])
        assert len(state["rewards"]["random"]) == 12
    assert probe["base"]["dev_loss"] == pytest.approx(-records[1].dev_scores[0])


def test_probe_rewards__toy_dev_rows__agree_on_everything():
    records = random_records()
    probe = probe_rewards(toy_env(num_candidates="all"), records[0], {"random": records})
    # All rows of the toy dev set are alike but for a factor.
    assert all(state["halves"] == pytest.approx({"random": 1.0, "all": 1.0}) for state in probe["states"])


def test_probe_rewards__the_run_that_is_followed__goes_on_undisturbed():
    records = random_records(1)
    env = toy_env(num_candidates="all")
    probe_rewards(env, records[0], {"random": records})
    np.testing.assert_allclose(env.dev_scores, records[0].dev_scores[: len(env.dev_scores)])
