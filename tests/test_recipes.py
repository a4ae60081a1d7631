"""What the pools of the embedded tasks are by construction, what their oracles do, and who wins on them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from raise_env import RaiseSelectEnv
from raise_env.agents import OracleAgent, make_agent, run_episode
from raise_env.agents.baselines import PoolScoreAgent
from raise_env.agents.statistics import paired_difference
from raise_env.record import EpisodeRecord, replay
from raise_env.tiny import recipes
from raise_env.tiny.rows import CLEAN, SHRUGS
from raise_env.tiny.skills import CODED_SKILLS, SKILLS
from raise_env.tiny.task import TASKS, generate_task

#: Task seed and rows of the pool; SHA-256 of all rows of the three sets, with their fields, as they always were.
DEFAULT_ROWS = [
    (0, 2000, "e38d6209c9548f04b700f45d9bc3cc91b8e195457d7aabf2b87138ddf33345c9"),
    (1, 500, "91adad89e9f62878ff5e0dcbd0a9dd2053134d74fc455eb5a675d43fce6b1a7a"),
]


@pytest.fixture(scope="module")
def tasks():
    return {name: generate_task(name, pool_size=4000) for name in TASKS}


def texts(pool):
    return [(row.prompt, row.response, row.fields) for row in pool]


def share(rows, name, value):
    return np.mean([row.fields[name] == value for row in rows])


# All tasks


@pytest.mark.parametrize(("seed", "size", "digest"), DEFAULT_ROWS)
def test_default__rows_and_labels__are_what_they_were_to_the_bit(seed, size, digest):
    task = generate_task("default", seed=seed, pool_size=size)
    rows = [[row.prompt, row.response, dict(row.fields)] for pool in (task.pool, task.dev, task.test) for row in pool]
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest() == digest


@pytest.mark.parametrize("name", TASKS)
def test_generate_task__same_name_seed_and_size__gives_the_same_rows(name):
    one, same, smaller = (generate_task(name, seed=3, pool_size=size) for size in (300, 300, 100))
    assert texts(one.pool) == texts(same.pool)
    assert texts(one.pool)[:100] == texts(smaller.pool)
    assert texts(one.dev) == texts(smaller.dev)
    assert texts(one.test) == texts(smaller.test)
    assert texts(one.pool) != texts(generate_task(name, seed=4, pool_size=300).pool)


@pytest.mark.parametrize("name", TASKS)
def test_generate_task__dev_and_test__are_clean_bare_and_as_many_as_said(name, tasks):
    task, kind = tasks[name], TASKS[name]
    assert (len(task.dev), len(task.test)) == (kind.num_dev, kind.num_test)
    answers = {fact.answer for skill in SKILLS if skill.name in kind.target_skills for fact in skill.facts}
    for rows in (task.dev, task.test):
        assert {row.fields["corruption"] for row in rows} == {CLEAN}
        assert {row.fields["skill"] for row in rows} == set(kind.target_skills)
        assert {row.response for row in rows} <= answers
        assert len({row.content_hash for row in rows}) == len(rows)
        assert not {"rating", "fact", "stage"} & {field for row in rows for field in row.fields}
    per_skill = set(Counter(row.fields["skill"] for row in task.test).values())
    assert per_skill == {kind.num_test // len(kind.target_skills)}


# Each family


@pytest.mark.parametrize("percent", [0, 30, 60, 90])
def test_noise__share_of_corrupted_rows__is_in_the_name(percent, tasks):
    assert 1 - share(tasks[f"noise-{percent}"].pool, "corruption", CLEAN) == pytest.approx(percent / 100, abs=0.03)


def test_noise__all_levels__are_scored_on_the_same_rows(tasks):
    assert len({tasks[f"noise-{percent}"].dev.content_hash for percent in (0, 30, 60, 90)}) == 1
    assert len({tasks[f"noise-{percent}"].test.content_hash for percent in (0, 30, 60, 90)}) == 1


def test_target__one_skill_of_ten__is_asked_by_a_code(tasks):
    pool = tasks["target"].pool
    assert share(pool, "skill", "plural") == pytest.approx(0.1, abs=0.02)
    assert share(pool, "corruption", CLEAN) == pytest.approx(0.9, abs=0.02)
    asked = [row.prompt for rows in (pool, tasks["target"].test) for row in rows if row.fields["skill"] == "plural"]
    assert all("zib" in prompt for prompt in asked)


def test_coded_skills__questions__never_occur_among_the_plain_ones():
    plain = {skill.ask(fact, wording) for skill in SKILLS for fact in skill.facts for wording in range(4)}
    coded = [new for new, old in zip(CODED_SKILLS, SKILLS, strict=True) if new != old]
    assert {skill.name for skill in coded} == {"plural", "past", "add", "larger"}
    for skill in coded:
        assert not plain & {skill.ask(fact, wording) for fact in skill.facts for wording in range(4)}


def test_redundancy__most_rows__are_near_copies_of_a_handful_of_facts(tasks):
    pool = tasks["redundancy"].pool
    facts = Counter(row.fields["fact"] for row in pool)
    handful = dict(facts.most_common(4))
    assert sum(handful.values()) / len(pool) == pytest.approx(recipes.COPY_SHARE, abs=0.02)
    assert {fact.split()[0] for fact in handful} == set(TASKS["redundancy"].target_skills)
    assert max(count for fact, count in facts.items() if fact not in handful) < 20
    copies = [row for row in pool if row.fields["fact"] in handful]
    assert len({row.prompt for row in copies}) > 500, "copies of a fact differ in wording, case or punctuation"
    assert len({(row.fields["fact"], row.response) for row in copies}) == 4, "and not in the answer"
    assert share(pool, "corruption", CLEAN) == 1.0


def test_curriculum__rows_of_each_stage__have_the_content_or_the_form_and_not_both(tasks):
    pool, targets = tasks["curriculum"].pool, set(TASKS["curriculum"].target_skills)
    content, form = ([row for row in pool if row.fields["stage"] == stage] for stage in recipes.STAGES)
    assert len(content) / len(pool) == pytest.approx(0.5, abs=0.03)
    assert len(content) + len(form) == len(pool)
    assert {row.fields["skill"] for row in content} == targets
    assert not {row.fields["skill"] for row in form} & targets
    assert all(row.response[0] == row.response[-1] == '"' for row in content)
    assert not any('"' in row.response for row in form)


def test_thrift__rows__are_a_few_useful_ones_and_one_shrug(tasks):
    pool, targets = tasks["thrift"].pool, set(TASKS["thrift"].target_skills)
    assert share(pool, "corruption", CLEAN) == pytest.approx(recipes.USEFUL_SHARE, abs=0.007)
    assert {row.fields["skill"] for row in pool if row.fields["corruption"] == CLEAN} <= targets
    assert {row.response for row in pool if row.fields["corruption"] != CLEAN} == {SHRUGS[0]}


def test_thrift__offers_of_an_episode__are_far_more_than_the_budget():
    config = RaiseSelectEnv(task="thrift").config
    assert config.horizon * config.num_candidates > 50 * config.total_budget
    assert config.horizon * config.batch_size >= 8 * config.total_budget, "whoever takes full batches is soon done"


def test_shift__dev__asks_mostly_two_of_the_four_skills_that_test_asks(tasks):
    assert Counter(row.fields["skill"] for row in tasks["shift"].dev) == {
        "plural": 54,
        "past": 54,
        "add": 2,
        "larger": 2,
    }
    assert set(Counter(row.fields["skill"] for row in tasks["shift"].test).values()) == {50}


def test_large__budget__is_one_per_cent_of_the_rows_three_times():
    config = RaiseSelectEnv(task="large").config
    assert config.total_budget == 3 * config.pool_size // 100 == 600
    assert (config.pool_size, config.horizon, config.batch_size) == (20_000, 75, 8)


# The oracle


def chosen(task, **settings):
    """What the oracle took, step by step, as rows; with a model that is hardly trained."""
    own = {"pool_size": 300, "auxiliary_updates": 1, "num_dev": 4, "num_test": 4, "num_classes": 1, "score_every": 1000}
    env = RaiseSelectEnv(**{"task": task, **own, **settings})
    record = run_episode(env, OracleAgent(), seed=0, name="oracle")
    return env, record, [[env.assets.pool[row] for row in rows] for rows in record.actions]


def test_oracle__redundancy__takes_each_fact_once_while_there_are_others():
    env, _, steps = chosen("redundancy", num_candidates="all", horizon=2)
    facts = [row.fields["fact"] for row in steps[0] + steps[1]]
    assert len(set(facts)) == len(facts) == 16
    assert len({row.fields["fact"] for row in env.assets.pool}) > 16


def test_oracle__curriculum__switches_from_content_to_form():
    _, _, steps = chosen("curriculum", horizon=5)
    stages = [{row.fields["stage"] for row in rows} for rows in steps]
    content, form = recipes.STAGES
    assert stages == [{content}, {content}, {form}, {form}, {form}]


def test_oracle__thrift__takes_useful_rows_alone_and_none_where_there_is_none():
    _, record, steps = chosen("thrift", horizon=12, num_candidates=32, budget=96)
    assert {row.fields["corruption"] for rows in steps for row in rows} == {CLEAN}
    sizes = [len(rows) for rows in steps]
    assert len(sizes) == 12
    assert min(sizes) == 0
    assert 0 < max(sizes) < 8
    assert replay(EpisodeRecord.from_json(record.to_json(), "here")) == (None, 0.0)


@pytest.mark.parametrize("task", TASKS)
def test_oracle__every_task__acts(task):
    _, record, steps = chosen(task, horizon=2, num_candidates=64)
    assert len(steps) == 2
    assert record.env["kwargs"].get("task", "default") == task


# Who wins


@pytest.fixture(scope="module")
def curriculum():
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "curriculum.py"
    spec = importlib.util.spec_from_file_location("curriculum", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_curriculum__order_against_mixtures__wins(curriculum):
    """The quick form: one seed, coarse grids, no features."""
    small = {"pool_size": 600, "horizon": 32, "auxiliary_updates": 0, "num_dev": 4, "num_test": 100}
    static = curriculum.losses([curriculum.mixture(number) for number in (0, 1, 4, 8)], [0], **small)
    dynamic = curriculum.losses([curriculum.order(switch) for switch in (0.3, 0.45)], [0], **small)
    assert dynamic.min() < static.min() - 0.3


@pytest.mark.slow
def test_curriculum__every_static_choice__loses_to_an_order_by_more_than_the_interval(curriculum):
    static = curriculum.losses([curriculum.mixture(number) for number in curriculum.MIXTURES], range(10))
    dynamic = curriculum.losses([curriculum.order(switch) for switch in curriculum.SWITCHES], range(10))
    assert curriculum.summary(static, dynamic)["static - dynamic"]["low"] > 0.3


class Labels(PoolScoreAgent):
    """Knows which rows are clean and of the target skills, and nothing else."""

    def score_pool(self, world, seed):
        task = TASKS[world.config.task]
        return np.array([recipes.clean_and_asked(row.fields, task.target_skills, 0.0) for row in world.assets.pool])


class DevLabels(PoolScoreAgent):
    """Takes clean rows of the skills that dev asks most."""

    def score_pool(self, world, seed):
        return np.array(
            [
                (row.fields["corruption"] == CLEAN) * (1 + (row.fields["skill"] in ("plural", "past")))
                for row in world.assets.pool
            ]
        )


def final_losses(task, agent, split="test", seeds=range(5)):
    """The loss after a run of each seed, shape (seeds,)."""
    losses = []
    for seed in seeds:
        env = RaiseSelectEnv(task=task, seed_model=seed, score_every=1000)
        run_episode(env, make_agent(agent) if isinstance(agent, str) else agent(), seed=1000 + seed, name="any")
        losses.append(env.evaluate(split).loss)
    return np.array(losses)


def wins(better, worse):
    """Whether the first runs have lower losses, pair by pair, by more than the interval."""
    return paired_difference(better, worse).high < 0


@pytest.mark.slow
@pytest.mark.parametrize("task", ["noise-30", "noise-60", "noise-90", "target", "curriculum", "thrift", "shift"])
def test_oracle__against_random_rows__wins(task):
    assert wins(final_losses(task, "oracle"), final_losses(task, "random"))


@pytest.mark.slow
def test_redundancy__distinct_facts__are_worth_more_than_labels():
    oracle, labels, random = (final_losses("redundancy", agent) for agent in ("oracle", Labels, "random"))
    assert wins(oracle, labels)
    assert wins(oracle, random)
    assert wins(final_losses("redundancy", "diversity"), random)


@pytest.mark.slow
def test_shift__best_on_dev__is_not_best_on_test():
    assert wins(final_losses("shift", DevLabels, "dev"), final_losses("shift", "oracle", "dev"))
    assert wins(final_losses("shift", "oracle", "test"), final_losses("shift", DevLabels, "test"))


@pytest.mark.slow
def test_thrift__spending_on_any_rows__is_worse_than_stopping():
    untrained = RaiseSelectEnv(task="thrift")
    untrained.reset(seed=0)
    before = np.full(5, untrained.evaluate("test").loss)
    assert wins(before, final_losses("thrift", "random"))
    assert wins(final_losses("thrift", "oracle"), before)
