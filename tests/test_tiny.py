from __future__ import annotations

import dataclasses
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import raise_env.tiny.task as task_module
from raise_env.base_model import load_tokenizer, model_folder
from raise_env.errors import SettingError
from raise_env.pool import Pool, check_disjoint
from raise_env.tiny.pretrain import CHAT_TEMPLATE, build_model, build_tokenizer, sentences
from raise_env.tiny.rows import CLEAN, CORRUPTIONS
from raise_env.tiny.skills import CODED_SKILLS, SKILLS
from raise_env.tiny.task import TASKS, generate_task

#: Every question that can be asked, with the facts that it can be about; "What is orange?" has two.
FACTS = {}
for skill in dict.fromkeys((*SKILLS, *CODED_SKILLS)):
    for fact in skill.facts:
        for wording in range(4):
            FACTS.setdefault(skill.ask(fact, wording), []).append((skill.name, fact))

#: The same by the question without its case and punctuation, as near-copies have it.
PLAIN_FACTS = {}
for question, asked in FACTS.items():
    PLAIN_FACTS.setdefault(question.lower().strip("?.!"), []).extend(asked)


def facts_of(row):
    """What a row's question can be about; near-copies begin with a word and a colon or comma."""
    question = row.prompt.lower().strip(" ?.!")
    return PLAIN_FACTS.get(question) or PLAIN_FACTS[re.split(r"^(?:please:|quick:|well,) ", question)[-1]]


@pytest.fixture(scope="module")
def task():
    return generate_task("default")


def texts(pool):
    return [(row.prompt, row.response, row.fields) for row in pool]


def test_generate_task__same_seed__gives_the_same_rows(task):
    again, other = generate_task("default"), generate_task("default", seed=1)
    for name in ("pool", "dev", "test"):
        assert texts(getattr(again, name)) == texts(getattr(task, name))
        assert texts(getattr(other, name)) != texts(getattr(task, name))


def test_generate_task__other_pool_size__leaves_dev_and_test_as_they_are(task):
    smaller = generate_task("default", pool_size=100)
    assert len(smaller.pool) == 100
    assert texts(smaller.pool) == texts(task.pool)[:100]
    assert texts(smaller.dev) == texts(task.dev)
    assert texts(smaller.test) == texts(task.test)


def test_generate_task__global_generator__stands_untouched():
    before = random.getstate()
    generate_task("default", pool_size=10)
    assert random.getstate() == before


def test_generate_task__unknown_name__suggests_the_nearest():
    with pytest.raises(SettingError, match="did you mean 'default'"):
        generate_task("defaultt")


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("seed", range(3))
def test_generate_task__pool_dev_and_test__ask_for_different_facts(name, seed):
    task = generate_task(name, seed=seed)
    check_disjoint(task.pool, task.dev, task.test)
    # A question of two facts is about one of them: only questions of one fact can tell.
    asked = [{facts_of(row)[0] for row in rows if len(facts_of(row)) == 1} for rows in (task.pool, task.dev, task.test)]
    assert not asked[0] & asked[1]
    assert not asked[0] & asked[2]
    assert not asked[1] & asked[2]


def test_generate_task__dev_and_test__are_clean_and_of_the_target_skills_alike(task):
    targets = TASKS["default"].target_skills
    for rows, count in ((task.dev, 64), (task.test, 256)):
        assert Counter(row.fields["skill"] for row in rows) == dict.fromkeys(targets, count // len(targets))
        assert {row.fields["corruption"] for row in rows} == {CLEAN}
        assert len({row.content_hash for row in rows}) == count, "no row counts twice"
        for row in rows:
            assert row.response in [fact.answer for _, fact in FACTS[row.prompt]]


def test_generate_task__pool__is_spoilt_by_the_share_it_says(task):
    labels = Counter(row.fields["corruption"] for row in task.pool)
    share = 1 - labels[CLEAN] / len(task.pool)
    assert share == pytest.approx(TASKS["default"].corruption, abs=0.04)
    kinds = [kind for kind in labels if kind != CLEAN]
    assert set(kinds) == set(CORRUPTIONS)
    assert min(labels[kind] for kind in kinds) > 0.5 * len(task.pool) * share / len(kinds)
    skills = Counter(row.fields["skill"] for row in task.pool)
    assert set(skills) == {skill.name for skill in SKILLS}
    assert max(skills.values()) < 1.5 * min(skills.values())


def test_generate_task__hidden_labels__tell_the_truth(task):
    wrong = {True: 0, False: 0}
    for row in task.pool:
        is_clean = row.fields["corruption"] == CLEAN
        wrong[is_clean] += row.response not in [fact.answer for _, fact in FACTS[row.prompt]]
        assert row.fields["instruction"] == row.prompt
        assert row.fields["output"] == row.response
        assert row.response
    assert wrong[True] == 0
    corrupted = sum(row.fields["corruption"] != CLEAN for row in task.pool)
    assert wrong[False] > 0.99 * corrupted, "but for a rare question that another answer fits too"


def test_generate_task__ratings__are_public_halves_of_the_pool_alone(task):
    ratings = [row.fields["rating"] for row in task.pool]
    assert set(ratings) == {1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0}
    assert not any("rating" in row.fields for rows in (task.dev, task.test) for row in rows)


def test_generate_task__ratings__tell_right_from_wrong_with_the_error_that_they_say():
    rows = generate_task("default", pool_size=20_000).pool
    clean = np.array([row.fields["corruption"] == CLEAN for row in rows])
    good = np.array([row.fields["rating"] for row in rows]) >= 4.5
    # A rating of 4.5 begins at 4.25: 0.25 standard deviations below 4.5, 1.25 above 3.
    assert good[clean].mean() == pytest.approx(0.599, abs=0.02)
    assert good[~clean].mean() == pytest.approx(0.106, abs=0.02)
    assert clean[good].mean() == pytest.approx(0.79, abs=0.02)


def test_generate_task__ratings__leave_prompts_and_responses_as_they_are(task, monkeypatch):
    monkeypatch.setattr(task_module, "_rated", lambda row, judge: row)
    assert generate_task("default").pool.content_hash == task.pool.content_hash
    assert "rating" in task.pool[0].fields


def test_observation__hidden_labels_taken_away__is_the_same_to_the_bit(embedded_env, monkeypatch, tmp_path):
    def blind(*args, **kwargs):
        task = generate_task(*args, **kwargs)
        rows = [dataclasses.replace(row, fields={}) for row in task.pool]
        return dataclasses.replace(task, pool=Pool(rows, task.pool.source))

    seeing, _ = embedded_env().reset(seed=0)
    monkeypatch.setattr(task_module, "generate_task", blind)
    env = embedded_env(cache_dir=str(tmp_path))  # a cache of its own: the features are computed once more
    blinded, _ = env.reset(seed=0)
    assert env.assets.pool[0].fields == {}
    np.testing.assert_array_equal(seeing, blinded)


# The base model


def test_base__files__are_small_and_can_be_read_by_all():
    files = list(Path(model_folder("tiny")).iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) < 4 * 1024**2


def test_base__tokenizer__is_the_one_that_the_script_builds_and_takes_any_text():
    stored, built = load_tokenizer("tiny"), build_tokenizer()
    assert stored.get_vocab() == built.get_vocab()
    assert stored.chat_template == CHAT_TEMPLATE
    for text in ("Größe? 字 🙂\n\t  x", " leading", "<s> is no token of the text", ""):
        ids = stored(text, add_special_tokens=False)["input_ids"]
        assert stored.decode(ids) == text


def test_base__model__is_the_one_that_the_script_builds(base):
    built = build_model(len(base.tokenizer))
    frozen = {name: value for name, value in base.peft_model.named_parameters() if "lora" not in name}
    assert sum(value.numel() for value in frozen.values()) == sum(value.numel() for value in built.parameters())
    assert 0.8e6 < built.num_parameters() < 0.9e6


def test_sentences__pre_training_text__never_holds_the_frame_of_instructions():
    text = list(islice(sentences(random.Random(0)), 3000))
    assert not any("Task:" in sentence or "Answer:" in sentence for sentence in text)
    reported = sum('"' in sentence for sentence in text) / len(text)
    assert 0.4 < reported < 0.6
    assert len(set(text)) > 1500


def test_skills__every_wording__can_be_filled_and_asks_for_an_answer():
    for skill in SKILLS:
        assert len(skill.questions) == 4
        assert len(skill.facts) == len({fact.words for fact in skill.facts}), "a fact twice could be in pool and test"
        for fact in skill.facts:
            assert fact.answer.strip() == fact.answer != ""
            assert fact.answer in skill.state(fact, 0)
            for wording in range(4):
                assert all(word in skill.ask(fact, wording) for word in fact.words)


@pytest.mark.slow
def test_pretrain__a_few_steps__write_a_model_that_loads(tmp_path):
    command = [sys.executable, "-m", "raise_env.tiny.pretrain", "--out", str(tmp_path), "--steps", "2"]
    hashes = {subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(hashes) == 1, "the same script gives the same weights"
    assert load_tokenizer(str(tmp_path)).chat_template == CHAT_TEMPLATE
