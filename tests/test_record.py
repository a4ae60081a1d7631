from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from raise_env.env import RaiseSelectEnv
from raise_env.errors import RecordError
from raise_env.record import SCHEMA_VERSION, EpisodeRecord, _Comparison, read_records, replay, versions
from raise_env.testing import FakeLearner, ToyAssets, toy_env


def run(env, seed=3, count=3, agent="first rows"):
    """Make an episode of the first rows on offer, and return its record."""
    env.reset(seed=seed)
    over, info = False, {}
    while not over:
        action = np.zeros(env.action_space.n, dtype=np.int8)
        action[:count] = 1
        _, _, over, _, info = env.step(action)
    return EpisodeRecord.of(env, agent=agent, seed=seed, info=info)


@pytest.fixture(scope="module")
def record(embedded_env):
    return run(embedded_env(budget=8))


def changed(record, **values):
    """The record's JSON with some fields replaced; ... removes one."""
    value = {**json.loads(record.to_json()), **values}
    return json.dumps({name: item for name, item in value.items() if item is not ...})


def test_of__an_episode__says_what_was_done(embedded_env, record):
    env = embedded_env(budget=8)
    env.reset(seed=3)
    assert record.actions[0] == env.candidates[:3].tolist()
    assert [len(rows) for rows in record.actions] == [3, 3, 2]
    assert len(record.dev_scores) == 4
    assert record.dev_scores[0] == env.dev_scores[0]
    assert record.rewards == pytest.approx(np.diff(record.dev_scores).tolist())
    assert record.env == {"id": "RaiseSelect-v0", "kwargs": env.config.to_kwargs()}
    assert (record.agent, record.seed) == ("first rows", 3)
    assert record.content == {**env.assets.content, "classes": env.assets.classes_hash}
    assert set(env.assets.content) == {"model", "pool", "dev", "test"}
    assert record.versions == versions()
    assert set(record.versions) == {"python", "raise-env", "torch", "transformers", "peft", "numpy"}
    assert record.test_score == -record.final["test_loss"]
    assert 0 <= record.final["test_exact_match"] <= 1


def test_of__settings_of_the_machine__are_left_out(embedded_env, tmp_path):
    kwargs = run(embedded_env(cache_dir=str(tmp_path), device="cpu", render_mode="ansi")).env["kwargs"]
    assert not {"cache_dir", "device", "render_mode"} & set(kwargs)


def test_of__diverged_episode__has_no_test_score():
    env = toy_env(num_rows=4, num_candidates=4, num_classes=1, batch_size=4, diverges_on=0)
    record = run(env, count=4)
    assert record.rewards == [-10.0]
    assert record.test_score is None
    assert record.final == {}
    assert EpisodeRecord.from_json(record.to_json(), "here") == record


def test_diverged__a_reward_that_truly_falls_by_as_much__is_none():
    env = toy_env(num_rows=4, num_candidates=4, num_classes=1, batch_size=4, diverges_on=0)
    record = run(env, count=4)
    assert record.diverged
    fell = dataclasses.replace(record, rewards=[-10.0], dev_scores=[3.0, -7.0])
    assert not fell.diverged


def test_to_json__and_back__is_the_same_record(record):
    line = record.to_json()
    assert "\n" not in line
    assert EpisodeRecord.from_json(line, "here") == record
    assert set(json.loads(line)) >= {
        *("schema_version", "env", "agent", "seed", "actions", "rewards"),
        *("dev_scores", "test_score", "versions", "content"),
    }


def test_replay__as_recorded__is_equal_to_the_bit(record):
    assert replay(EpisodeRecord.from_json(record.to_json(), "here")) == (None, 0.0)


def test_replay__rows_in_another_order__are_the_same_action(record):
    actions = [rows[::-1] for rows in record.actions]
    assert replay(EpisodeRecord.from_json(changed(record, actions=actions), "here"))[0] is None


TAMPERED = {
    "reward": (lambda r: {"rewards": [r.rewards[0], r.rewards[1] + 0.01, r.rewards[2]]}, "reward of step 2"),
    "not a number": (lambda r: {"rewards": [math.nan, *r.rewards[1:]]}, "reward of step 1"),
    "first dev score": (lambda r: {"dev_scores": [0.0, *r.dev_scores[1:]]}, "dev score 0"),
    "last dev score": (lambda r: {"dev_scores": [*r.dev_scores[:3], 0.0]}, "dev score 3"),
    "a row less": (lambda r: {"actions": [r.actions[0][1:], *r.actions[1:]]}, "reward of step 1"),
    "a row twice": (lambda r: {"actions": [[*r.actions[0], r.actions[0][0]], *r.actions[1:]]}, "action of step 1"),
    "a row that is not offered": (lambda r: {"actions": [r.actions[0], [-1], r.actions[2]]}, "action of step 2"),
    "test score": (lambda r: {"test_score": r.test_score + 0.01}, "test score"),
    "no test score": (lambda r: {"test_score": None}, "test score"),
    "test loss": (lambda r: {"final": {**r.final, "test_loss": 0.0}}, "test_loss"),
    "unknown final score": (lambda r: {"final": {"bleu": 1.0}}, "bleu"),
    "no final scores": (lambda r: {"final": {}}, "test_loss"),
    "a final score less": (lambda r: {"final": {"test_loss": r.final["test_loss"]}}, "test_exact_match"),
    "no test set and no final scores": (
        lambda r: {"content": {n: d for n, d in r.content.items() if n != "test"}, "final": {}},
        "test_loss",
    ),
    "pool": (lambda r: {"content": {**r.content, "pool": "0" * 64}}, "content of pool"),
    "model": (lambda r: {"content": {**r.content, "model": "0" * 64}}, "content of model"),
    "setting": (
        lambda r: {"env": {"id": r.env["id"], "kwargs": {**r.env["kwargs"], "task_seed": 1}}},
        "content of pool",
    ),
    "seed": (lambda r: {"seed": r.seed + 1}, "action of step 1"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_replay__tampered__names_what_differs_first(record, name):
    change, what = TAMPERED[name]
    difference, _ = replay(EpisodeRecord.from_json(changed(record, **change(record)), "here"))
    assert difference is not None
    assert difference.what == what
    assert str(difference) == f"{what}: recorded {difference.recorded}, replayed {difference.replayed}"


#: By tampering: what was recorded and what came of it, in words or as a function of the record.
BOTH_SIDES = {
    "reward": (lambda r: r.rewards[1] + 0.01, lambda r: r.rewards[1]),
    "a row twice": (lambda r: [*r.actions[0], r.actions[0][0]], lambda r: r.actions[0]),
    "a row that is not offered": (lambda r: "pool ids [-1]", lambda r: "not among the candidates offered"),
    "no test score": (lambda r: None, lambda r: r.test_score),
    "unknown final score": (lambda r: 1.0, lambda r: None),
    "no final scores": (lambda r: None, lambda r: r.final["test_loss"]),
    "pool": (lambda r: "0" * 64, lambda r: r.content["pool"]),
}


@pytest.mark.parametrize("name", BOTH_SIDES)
def test_replay__tampered__tells_both_sides(record, name):
    change, _ = TAMPERED[name]
    difference, _ = replay(EpisodeRecord.from_json(changed(record, **change(record)), "here"))
    assert (difference.recorded, difference.replayed) == tuple(side(record) for side in BOTH_SIDES[name])


def classed_otherwise(**settings):
    """A toy world whose rows fall into the same classes but for two."""
    assets = ToyAssets.build(200, 4, seed=0)
    classes = assets.classes.copy()
    classes[[0, 1]] = classes[[1, 0]]
    members = tuple(np.flatnonzero(classes == label) for label in range(4))
    own = dataclasses.replace(assets, classes=classes, members=members)
    return RaiseSelectEnv(None, own, **{"num_candidates": 32, "horizon": 10, **settings})


def test_replay__classes_that_come_out_otherwise_here__are_named_as_what_they_are(monkeypatch):
    record = run(toy_env())
    monkeypatch.setattr("raise_env.record.RaiseSelectEnv", lambda **_: classed_otherwise())
    difference, _ = replay(record)
    assert difference.what == "content of classes"
    assert difference.recorded == record.content["classes"] != difference.replayed
    said = "come out otherwise on this machine, .* cannot be replayed here; .* Replay it where it was made"
    assert re.search(said, str(difference))
    content = {name: record.content[name] for name in ("classes", "model", "pool", "dev")}
    other = EpisodeRecord.from_json(changed(record, content={**content, "pool": "0" * 64}), "here")
    assert replay(other)[0].what == "content of pool", "they follow from it"


def test_replay__record_of_old_without_a_digest_of_the_classes__replays(record):
    old = {name: digest for name, digest in record.content.items() if name != "classes"}
    assert replay(EpisodeRecord.from_json(changed(record, content=old), "here")) == (None, 0.0)


def test_replay__whole_pool_on_offer__does_not_ask_for_its_classes(monkeypatch):
    record = run(toy_env(num_candidates="all"))
    assert "classes" not in record.content
    monkeypatch.setattr("raise_env.record.RaiseSelectEnv", lambda **_: classed_otherwise(num_candidates="all"))
    assert replay(record)[0] is None


def test_replay__a_test_score_where_there_is_no_test_set__is_found(monkeypatch):
    record = run(toy_env(has_test=False))
    monkeypatch.setattr("raise_env.record.RaiseSelectEnv", lambda **_: toy_env(has_test=False))
    assert replay(record) == (None, 0.0)
    difference, _ = replay(EpisodeRecord.from_json(changed(record, test_score=0.5), "here"))
    assert str(difference) == "test score: recorded 0.5, replayed None"


def test_replay__no_tolerance__is_equal_to_the_bit(record):
    assert replay(record, tolerance=0.0) == (None, 0.0)


def test_from_json__no_final_scores__as_records_without_a_test_set_have_it(record):
    assert EpisodeRecord.from_json(changed(record, final=...), "here").final == {}


def test_replay__more_rows_than_the_budget_had__is_found(record, embedded_env):
    env = embedded_env(budget=8)
    env.reset(seed=3)
    for _ in range(2):
        env.step(np.isin(np.arange(16), [0, 1, 2]))
    spare = int(env.candidates[5])
    actions = [*record.actions[:2], [*record.actions[2], spare]]
    difference, _ = replay(EpisodeRecord.from_json(changed(record, actions=actions), "here"))
    assert difference.what == "action of step 3"


def test_replay__steps_missing_or_too_many__is_found(record):
    shorter = changed(record, actions=record.actions[:2], rewards=record.rewards[:2], dev_scores=record.dev_scores[:3])
    difference, _ = replay(EpisodeRecord.from_json(shorter, "here"))
    assert (difference.what, difference.recorded, difference.replayed) == ("length of the episode", 2, "goes on")
    longer = changed(
        record,
        actions=[*record.actions, []],
        rewards=[*record.rewards, 0.0],
        dev_scores=[*record.dev_scores, record.dev_scores[-1]],
    )
    difference, _ = replay(EpisodeRecord.from_json(longer, "here"))
    assert (difference.what, difference.replayed) == ("length of the episode", "ends")


def test_replay__small_distance__is_told_and_tolerated(record):
    rewards = [record.rewards[0] + 1e-5, *record.rewards[1:]]
    text = changed(record, rewards=rewards)
    difference, largest = replay(EpisodeRecord.from_json(text, "here"))
    assert difference is None
    assert largest == pytest.approx(1e-5, rel=1e-3)
    assert replay(EpisodeRecord.from_json(text, "here"), tolerance=1e-6)[0].what == "reward of step 1"


@pytest.mark.parametrize(
    ("num_test", "num_rows", "is_tolerated"),
    [(256, 5, True), (256, 6, False), (40, 1, True), (40, 2, False), (8, 1, True), (8, 2, False)],
)
def test_replay__share_of_right_answers__may_differ_by_a_few_rows(embedded_env, num_test, num_rows, is_tolerated):
    record, change = run(embedded_env(budget=8, num_test=num_test)), num_rows / num_test
    final = {**record.final, "test_exact_match": record.final["test_exact_match"] + change}
    difference, largest = replay(EpisodeRecord.from_json(changed(record, final=final), "here"))
    assert (difference is None) == is_tolerated
    assert largest == pytest.approx(change, rel=1e-3)


def test_replay__share_of_few_right_answers__is_held_to_a_tolerance_that_is_given(record):
    final = {**record.final, "test_exact_match": record.final["test_exact_match"] + 1 / 8}
    tipped = EpisodeRecord.from_json(changed(record, final=final), "here")
    assert replay(tipped)[0] is None
    for tolerance in (0.0, 1e-6):
        assert replay(tipped, tolerance)[0].what == "test_exact_match"


@pytest.mark.parametrize("reward", ["exact_match", "flexible_match"])
@pytest.mark.parametrize("num_rows", [40, 200])
def test_replay__one_row_of_dev_and_test_tipped_over__is_tolerated(monkeypatch, reward, num_rows):
    whole = FakeLearner._evaluation

    def answered(self, skill, subset):
        """Half of the rows are answered right, the last four are not asked for a number."""
        self.num_dev = num_rows + 4
        right = np.where(np.arange(num_rows + 4) < num_rows, np.arange(num_rows + 4) % 2, np.nan)
        known = {"row_tokens": np.where(np.isnan(right), 0, 10)}  # nothing else counts for an exact match
        return dataclasses.replace(whole(self, skill, subset), strict_matches=right, flexible_matches=right, **known)

    monkeypatch.setattr(FakeLearner, "_evaluation", answered)
    monkeypatch.setattr("raise_env.record.RaiseSelectEnv", lambda **_: toy_env(reward=reward))
    record = run(toy_env(reward=reward))
    assert set(record.dev_scores) == {0.5}
    for count, what in ((1, None), (max(2, num_rows // 40), "dev score 2")):
        tipped = count / num_rows
        scores = [score + tipped * (step == 2) for step, score in enumerate(record.dev_scores)]
        rewards = [*np.diff(scores)]
        final = {**record.final, f"test_{reward}": record.final[f"test_{reward}"] + tipped}
        again = dataclasses.replace(
            record, dev_scores=scores, rewards=rewards, test_score=record.test_score + tipped, final=final
        )
        difference, largest = replay(again)
        assert largest == pytest.approx(tipped)
        assert (difference is None) == (what is None), (count, difference)


@pytest.mark.parametrize(("share", "is_tolerated"), [(0.0019, True), (0.0021, False)])
def test_replay__loss__may_differ_by_its_share(record, share, is_tolerated):
    final = {**record.final, "test_loss": record.final["test_loss"] * (1 + share)}
    difference, _ = replay(EpisodeRecord.from_json(changed(record, final=final), "here"))
    assert (difference is None) == is_tolerated


def test_replay__small_score__is_held_to_its_size():
    check = _Comparison(tolerance=2e-3)
    check.number("loss near zero", 0.01, 0.010099)
    check.number("small loss", 0.1, 0.100199)
    assert check.first is None
    check.number("loss near zero", 0.01, 0.010101)
    assert check.first is not None


def test_replay__early_steps__are_held_closer():
    for step, limit in ((0, 1e-5), (1, 1e-4), (2, 1e-3), (3, 2e-3), (400, 2e-3)):
        for factor in (0.99, 1.01):
            check = _Comparison(tolerance=2e-3)
            check.number("dev score", 1.0 + factor * limit, 1.0, step=step)
            assert (check.first is None) == (factor < 1), (step, factor)


def test_replay__infinite_number__is_a_difference():
    check = _Comparison(tolerance=2e-3)
    check.number("loss", 1.0, math.inf)
    assert check.first is not None


#: What makes a record no record: changed fields, the field that is named, and what was expected of it.
BAD = {
    "missing fields": ({"rewards": ..., "agent": ...}, "record", "the fields agent, rewards too"),
    "unknown fields": ({"extra": 1, "and": 2}, "record", "no fields and, extra"),
    "other env": (
        {"env": {"id": "CartPole-v1", "kwargs": {}}},
        "env",
        '{"id": "RaiseSelect-v0", "kwargs": ...}',
    ),
    "env no object": ({"env": "RaiseSelect-v0"}, "env", '{"id": "RaiseSelect-v0", "kwargs": ...}'),
    "kwargs": ({"env": {"id": "RaiseSelect-v0", "kwargs": []}}, "env.kwargs", "a JSON object of settings"),
    "agent": ({"agent": 1}, "agent", "a name"),
    "seed": ({"seed": 1.5}, "seed", "a whole number of at least 0"),
    "negative seed": ({"seed": -1}, "seed", "a whole number of at least 0"),
    "bool seed": ({"seed": True}, "seed", "a whole number of at least 0"),
    "actions": ({"actions": [["a"], [], []]}, "actions", "lists of pool ids"),
    "no actions": ({"actions": [], "rewards": [], "dev_scores": [0.0]}, "actions", "at least one step"),
    "rewards": ({"rewards": ["a", 0, 0]}, "rewards", "a list of numbers"),
    "fewer rewards": ({"rewards": [0.0]}, "rewards", "3 of them, one for each step"),
    "dev_scores": ({"dev_scores": [True, 0, 0, 0]}, "dev_scores", "a list of numbers"),
    "fewer dev scores": ({"dev_scores": [0.0]}, "dev_scores", "4 of them"),
    "test_score": ({"test_score": "high"}, "test_score", "a number, or null"),
    "versions": ({"versions": {"torch": 2}}, "versions", "versions by name"),
    "content": ({"content": []}, "content", "hashes of model, pool and dev at least"),
    "no content": ({"content": {}}, "content", "hashes of model, pool and dev at least"),
    "final": ({"final": {"test_loss": "low"}}, "final", "scores by name"),
}


@pytest.mark.parametrize("name", BAD)
def test_from_json__not_as_promised__names_the_place_and_the_field(record, name):
    values, field, expected = BAD[name]
    with pytest.raises(RecordError) as caught:
        EpisodeRecord.from_json(changed(record, **values), "episodes.jsonl, line 7")
    assert str(caught.value) == f"episodes.jsonl, line 7: field {field!r} is not as promised; expected {expected}."


@pytest.mark.parametrize(("kwargs", "said"), [({"horizont": 1}, ".*horizon"), ({"model": 5}, "model")])
def test_from_json__settings_that_cannot_be__are_named(record, kwargs, said):
    env = {"id": "RaiseSelect-v0", "kwargs": kwargs}
    with pytest.raises(RecordError, match=f"^here: field 'env.kwargs': {said}"):
        EpisodeRecord.from_json(changed(record, env=env), "here")


def test_from_json__record_of_another_version__says_which_is_read(record):
    with pytest.raises(
        RecordError, match=f"^here: schema_version is 7; this version of raise-env reads {SCHEMA_VERSION}"
    ):
        EpisodeRecord.from_json(changed(record, schema_version=7), "here")


def test_from_json__whole_numbers_and_seed_0__are_numbers(record):
    whole = {"seed": 0, "rewards": [0, 1, 2], "dev_scores": [0, 0, 1, 3], "test_score": 1, "final": {"test_loss": 1}}
    read = EpisodeRecord.from_json(changed(record, **whole), "here")
    assert {name: getattr(read, name) for name in whole} == whole


def test_to_json__not_a_number__is_refused(record):
    with pytest.raises(ValueError, match="JSON"):
        dataclasses.replace(record, rewards=[math.nan]).to_json()


@pytest.mark.parametrize("text", ["{", "[]", "5", "null", "[" * 100_000, ""], ids=lambda text: text[:4] or "empty")
def test_from_json__no_record__is_said(text):
    said = "^here: (not JSON|field 'record' is not as promised; expected a JSON object.$)"
    with pytest.raises(RecordError, match=said):
        EpisodeRecord.from_json(text, "here")


def test_read_records__several_lines__yields_them_in_order(record, tmp_path):
    path = tmp_path / "episodes.jsonl"
    path.write_text(record.to_json() + "\n\n" + changed(record, agent="other") + "\n")
    assert [r.agent for r in read_records(path)] == ["first rows", "other"]


def test_read_records__letters_of_all_languages__come_back(record, tmp_path):
    path = tmp_path / "episodes.jsonl"
    path.write_bytes(json.dumps({**json.loads(record.to_json()), "agent": "é水"}, ensure_ascii=False).encode())
    assert [r.agent for r in read_records(path)] == ["é水"]


def test_read_records__bad_line__is_named(record, tmp_path):
    path = tmp_path / "episodes.jsonl"
    path.write_text(record.to_json() + "\n{}\n")
    with pytest.raises(RecordError, match="line 2"):
        list(read_records(path))


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"\xff\xfe"], ids=["absent", "empty", "blank", "binary"])
def test_read_records__no_records__is_an_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "episodes.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecordError, match=r"episodes\.jsonl"):
        list(read_records(path))


def test_replay__reward_is_a_function__runs_only_what_the_caller_names(record, tmp_path, monkeypatch):
    (tmp_path / "strangers_code.py").write_text("raise SystemExit('it was run')\n")
    monkeypatch.syspath_prepend(tmp_path)
    kwargs = {**record.env["kwargs"], "reward": "strangers_code:score"}
    strange = EpisodeRecord.from_json(changed(record, env={"id": "RaiseSelect-v0", "kwargs": kwargs}), "here")
    for overrides in ({}, {"reward": "another:score"}):
        with pytest.raises(RecordError, match="--reward strangers_code:score"):
            replay(strange, **overrides)
    with pytest.raises(SystemExit, match="it was run"):
        replay(strange, reward="strangers_code:score")
