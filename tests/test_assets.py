from __future__ import annotations

import json
import logging
import os
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from raise_env.assets import _cached_data, load_assets, load_data
from raise_env.base_model import model_folder
from raise_env.config import EnvConfig
from raise_env.env import RaiseSelectEnv, step_together
from raise_env.errors import DataError, ModelError, OutputError, RewardError, SettingError
from raise_env.frames import PLAIN_TEMPLATE


def rows(first, count, extra=""):
    return [{"instruction": f"Say {number}{extra}.", "output": str(number)} for number in range(first, first + count)]


@pytest.fixture
def files(tmp_path):
    """Return a function that writes pool, dev and test set, and returns the settings that name them."""

    def write(pool=None, dev=None, test=None, **settings):
        parts = {"pool": pool or rows(0, 24), "dev": dev or rows(100, 6), "test": test or rows(200, 6)}
        for name, lines in parts.items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
        named = {name: str(tmp_path / f"{name}.jsonl") for name in parts}
        small = {"num_candidates": 8, "num_classes": 2, "batch_size": 2, "horizon": 2, "auxiliary_updates": 0}
        return {**named, **small, **settings}

    return write


def test_env__files_of_ones_own__are_trained_and_scored_on(files):
    env = RaiseSelectEnv(**files())
    env.reset(seed=0)
    assert [len(rows) for rows in (env.assets.pool, env.assets.data.dev, env.assets.data.test)] == [24, 6, 6]
    assert env.assets.pool[3].prompt == "Say 3."
    action = np.array([1, 0, 0, 0, 1, 0, 0, 0])
    assert env.step(action)[1] != 0
    assert "test_score" in env.step(action)[4]


def test_env__no_test_set__has_no_test_score(files):
    settings = files()
    del settings["test"]
    env = RaiseSelectEnv(**settings)
    env.reset(seed=0)
    info = env.step([1, 0] * 4)[4]
    assert env.budget_left == 0
    assert "test_score" not in info
    assert set(env.assets.content) == {"model", "pool", "dev"}


def test_env__all_candidates_of_a_file__are_counted_before_anything_is_loaded(files):
    assert RaiseSelectEnv(**files(num_candidates="all")).action_space.n == 24
    with pytest.raises(DataError, match="no such file"):
        RaiseSelectEnv(pool="none.jsonl", dev="dev.jsonl", num_candidates="all")


def test_load_data__row_of_dev_or_test_in_the_pool__is_refused_unless_allowed(files):
    settings = files(dev=rows(5, 1) + rows(100, 5), test=rows(100, 1) + rows(200, 5))
    with pytest.raises(DataError, match=r"(?s)dev\.jsonl.*line 1.*Say 5.*test\.jsonl.*Say 100"):
        load_data(EnvConfig.from_kwargs(settings))
    assert len(load_data(EnvConfig.from_kwargs({**settings, "allow_overlap": True})).dev) == 6


def test_load_data__part_of_dev_and_test__is_a_fixed_part(files):
    config = EnvConfig.from_kwargs(files(num_dev=3, num_test=2))
    first, again = load_data(config), load_data(config)
    assert (len(first.dev), len(first.test), len(first.pool)) == (3, 2, 24)
    assert [row.prompt for row in first.dev] == [row.prompt for row in again.dev]
    with pytest.raises(SettingError, match="7 rows were asked for"):
        load_data(EnvConfig.from_kwargs(files(num_dev=7)))


def test_load_data__embedded_task__takes_part_of_it_likewise():
    data = load_data(EnvConfig(num_dev=3, num_test=2, pool_size=70))
    assert (len(data.pool), len(data.dev), len(data.test)) == (70, 3, 2)


def test_load_data__other_model_or_seed__reads_nothing_again(files):
    settings = files()
    first = load_data(EnvConfig.from_kwargs(settings))
    others = {"seed_model": 3, "model": "other", "lazy_features": True}
    assert load_data(EnvConfig.from_kwargs({**settings, **others})) is first
    assert load_data(EnvConfig.from_kwargs({**settings, "num_dev": 2})) is not first


def test_load_data__fewer_rows_than_candidates__is_said(files):
    with pytest.raises(SettingError, match="num_candidates is 64, but the pool has 24 rows"):
        load_data(EnvConfig.from_kwargs(files(num_candidates=64)))


def test_load_data__empty_rows__are_refused_or_skipped(files):
    settings = files(pool=[*rows(0, 10), {"instruction": "Say nothing.", "output": ""}])
    with pytest.raises(DataError, match="line 11"):
        load_data(EnvConfig.from_kwargs(settings))
    assert len(load_data(EnvConfig.from_kwargs({**settings, "skip_empty": True})).pool) == 10


def test_assets__file_changed_on_disk__is_read_again(files):
    settings = files()
    first = RaiseSelectEnv(**settings).assets
    assert RaiseSelectEnv(**settings).assets is first
    files(pool=rows(40, 24))
    os.utime(settings["pool"], ns=(1, 1))
    second = RaiseSelectEnv(**settings).assets
    assert second.pool[0].prompt == "Say 40."
    assert second.content["pool"] != first.content["pool"]
    assert second.content["dev"] == first.content["dev"]


def test_assets__rows_that_do_not_fit__are_never_offered(files):
    long = rows(0, 3, extra=" and then a lot more than fits") + rows(3, 21)
    env = RaiseSelectEnv(**files(pool=long, max_length=30, num_candidates="all"))
    env.reset(seed=0)
    assert env.assets.classes[:3].tolist() == [-1] * 3
    assert (env.assets.classes[3:] >= 0).all()
    assert not np.isin(env.candidates, [0, 1, 2]).any()
    assert env.action_masks().sum() == 21
    assert (env.assets.features.columns[:3] == 0).all()
    assert np.isfinite(env.observation()).all()


def test_assets__dev_rows_that_do_not_fit__are_left_out_and_said(files, caplog):
    dev = rows(100, 5) + rows(105, 1, extra=" and then a lot more than fits")
    env = RaiseSelectEnv(**files(dev=dev, max_length=30))
    with caplog.at_level(logging.WARNING, logger="raise_env"):
        assert env.assets.num_dev == 5
    assert "1 of 6 dev rows are left out" in caplog.text


def test_assets__counts__say_what_became_of_the_rows(files, caplog):
    long = {"instruction": "a" * 300, "output": "b"}
    cut = {"instruction": "a" * 30, "output": "b" * 300}
    empty = {"instruction": "", "output": "b"}
    pool = [*rows(0, 20), *rows(0, 2), {**long, "n": 1}, cut, empty]
    settings = files(
        pool=pool, dev=[*rows(100, 6), cut | {"output": "c" * 300}, long | {"output": "c"}], skip_empty=True
    )
    del settings["test"]
    with caplog.at_level(logging.WARNING, logger="raise_env"):
        counts = load_assets(EnvConfig.from_kwargs(settings)).counts
    assert counts == {
        "pool": {"rows": 24, "skipped": 1, "duplicates": 2, "truncated": 1, "left_out": 1},
        "dev": {"rows": 8, "skipped": 0, "duplicates": 0, "truncated": 1, "left_out": 1, "unscored_choices": 0},
    }
    assert [record.message for record in caplog.records] == [
        "1 of 8 dev rows are left out: nothing of their response fits into max_length=256",
        "1 of 24 pool rows are never offered: nothing of their response fits into max_length=256",
    ]


def with_choices(lines, *others):
    return [{**row, "choices": [row["output"], *others]} for row in lines]


def test_assets__counts_of_choices__say_which_rows_are_scored(files):
    long = {"instruction": "a" * 300, "output": "b"}
    dev = with_choices([*rows(100, 5), long], "no") + with_choices(rows(300, 2), "c" * 300)
    env = RaiseSelectEnv(**files(dev=dev, test=with_choices(rows(200, 6), "no"), reward="accuracy"))
    env.reset(seed=0)
    counts = env.assets.counts["dev"]
    assert (counts["rows"], counts["left_out"], counts["unscored_choices"]) == (8, 0, 2)
    known = env.evaluate("dev").row_accuracies
    assert len(known) == 8
    assert np.isnan(known).sum() == 2


@pytest.mark.parametrize(("reward", "few"), [("accuracy", 1), ("choice_probability", 2)])
def test_probe__few_dev_rows_with_choices__are_those_that_it_scores_on(files, reward, few):
    dev = [*rows(100, 12 - few), *with_choices(rows(300, few), "no")]
    env = RaiseSelectEnv(**files(dev=dev, test=with_choices(rows(200, 6), "no"), reward=reward))
    env.reset(seed=0)
    actions = np.eye(8, dtype=np.int8)[:2]
    for _ in range(2):
        np.testing.assert_allclose(env.probe(actions, num_dev=few), env.probe(actions), rtol=1e-6)
        env.step(actions[0])


def test_variant__pool_of_ones_own__takes_the_place_of_the_embedded_task(files):
    settings = files()
    env = RaiseSelectEnv(task="thrift", pool_size=500, task_seed=1).variant(**settings)
    assert (env.config.task, env.config.pool_size, env.config.task_seed) == ("default", 2000, 0)


@pytest.mark.parametrize(("own", "expected"), [({}, (96, 96)), ({"horizon": 7}, (7, 96)), ({"budget": 9}, (96, 9))])
def test_variant__pool_of_ones_own__keeps_what_the_task_had_set(files, own, expected):
    settings = {name: value for name, value in files().items() if name not in ("horizon", "budget")}
    for env in (
        RaiseSelectEnv(task="thrift", **own).variant(**settings),
        RaiseSelectEnv(task="thrift").variant(**settings, **own),
    ):
        assert (env.config.horizon, env.config.budget) == expected


def test_variant__reward_that_the_test_rows_do_not_allow__is_refused_at_once(files):
    env = RaiseSelectEnv(**files(dev=with_choices(rows(100, 6), "no")))
    env.reset(seed=0)
    with pytest.raises(RewardError, match="needs test rows with a column `choices`"):
        env.variant(reward="accuracy")


def test_reset__reward_on_choices_that_do_not_fit__says_so_before_anything_is_trained(files):
    dev = with_choices(rows(100, 6), "c" * 300)
    env = RaiseSelectEnv(**files(dev=dev, test=with_choices(rows(200, 6), "no"), reward="accuracy"))
    with pytest.raises(RewardError, match="this dev set has none that fits into max_length"):
        env.reset(seed=0)


def test_step_together__other_rewards__are_scored_on_what_each_looks_at(files):
    settings = files(dev=with_choices(rows(100, 6), "no"), test=with_choices(rows(200, 6), "no"))
    first = RaiseSelectEnv(**settings)
    envs = [first, first.variant(reward="choice_probability")]
    for env in envs:
        env.reset(seed=0)
    alone = [env.fork(1)[0] for env in envs]
    action = np.array([1, 0, 0, 0, 1, 0, 0, 0])
    found = [result[1] for result in step_together(envs, [action, action])]
    np.testing.assert_allclose(found, [env.step(action)[1] for env in alone], atol=1e-4)


@pytest.mark.parametrize("own", [{"weight_decay": 0.5}, {"max_grad_norm": 0.01}])
def test_features__auxiliary_updates_made_otherwise__are_computed_anew(small_settings, tmp_path, own):
    def raw(cache, **settings):
        config = EnvConfig(**{**small_settings, "auxiliary_updates": 8, **settings}, cache_dir=str(tmp_path / cache))
        return load_assets(config).features.raw

    first, second = raw("one"), raw("one", **own)
    assert (first != second).any()
    np.testing.assert_array_equal(second, raw("other", **own))


def edited(folder, name, **values):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **values}))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("config.json", {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}),
        ("config.json", {"rms_norm_eps": 1e-3}),
        ("tokenizer_config.json", {"eos_token": "<pad>"}),
    ],
)
def test_content__model_that_computes_something_else__is_another(files, tmp_path, name, values):
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        shutil.copytree(model_folder("tiny"), folder)
    edited(folders[1], name, **values)
    one, other = (RaiseSelectEnv(**files(model=str(folder))).assets.content["model"] for folder in folders)
    assert one != other


def test_content__model_saved_by_another_version__is_the_same(files, tmp_path):
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        shutil.copytree(model_folder("tiny"), folder)
    edited(folders[1], "config.json", transformers_version="9.9.9", use_cache=True)
    one, other = (RaiseSelectEnv(**files(model=str(folder))).assets.content["model"] for folder in folders)
    assert one == other


def test_assets__model_written_anew_in_its_folder__is_loaded_anew(files, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder("tiny"), folder)
    before = RaiseSelectEnv(**files(model=str(folder))).assets
    weights = load_file(folder / "model.safetensors")
    save_file({name: value / 2 for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    after = RaiseSelectEnv(**files(model=str(folder))).assets
    assert after.content["model"] != before.content["model"]
    assert after.base_evaluation.loss != before.base_evaluation.loss
    assert RaiseSelectEnv(**files(model=str(folder))).assets.learner is not before.learner


def forms_of(lines):
    """The same rows in each form."""
    chats = [
        [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        for row in lines
    ]
    pairs = [("instruction", "response"), ("question", "answer"), ("prompt", "completion"), ("prompt", "response")]
    forms = [
        [{asked: row["instruction"], given: row["output"]} for row in lines] for asked, given in [*pairs, ("q", "a")]
    ]
    forms.append([{"messages": chat} for chat in chats])
    names = {"user": "human", "assistant": "gpt"}
    forms.append(
        [
            {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in chat]}
            for chat in chats
        ]
    )
    return forms


@pytest.mark.parametrize("template", [None, PLAIN_TEMPLATE])
def test_assets__same_rows_in_each_form__same_tokens(files, template):
    """The pool in one form after the other, dev and test in Alpaca's."""
    settings = files(template=template)
    wanted = load_assets(EnvConfig.from_kwargs(settings))
    for form in forms_of(rows(0, 24)):
        columns = {"prompt": "q", "response": "a"} if "q" in form[0] else {}
        found = load_assets(EnvConfig.from_kwargs(files(pool=form, template=template, columns=columns)))
        for name in ("tokens", "offsets", "is_label"):
            np.testing.assert_array_equal(getattr(found.learner.pool, name), getattr(wanted.learner.pool, name))
        assert found.content == wanted.content
        assert found.pool[3].fields == form[3]


def test_env__conversations__are_trained_and_scored_on(files):
    def chats(first, count):
        return [
            {
                "messages": [
                    {"role": role, "content": f"{n}{role}{t}"}
                    for t in range(n % 3 + 1)
                    for role in ("user", "assistant")
                ]
            }
            for n in range(first, first + count)
        ]

    env = RaiseSelectEnv(**files(pool=chats(0, 24), dev=chats(100, 6), test=chats(200, 6)))
    env.reset(seed=0)
    assert env.step([1, 0] * 4)[1] != 0
    assert env.assets.learner.pool.label_counts[2] > 2 * env.assets.learner.pool.label_counts[0]


def test_load_data__columns_that_no_file_has__are_refused(files):
    settings = files(columns={"prompt": "instruction", "response": "answer"})
    with pytest.raises(
        SettingError, match=r"columns names instruction, answer, .* found instruction, output in .*pool"
    ):
        load_data(EnvConfig.from_kwargs(settings))
    dev = [{"instruction": "x", "answer": "y", "output": "z"}]
    data = load_data(EnvConfig.from_kwargs({**files(dev=dev), "columns": settings["columns"]}))
    assert (data.dev[0].response, data.pool[0].response) == ("y", "0"), "each file by its own first row"


def test_load_data__folder_that_changes__is_read_again(files, tmp_path):
    settings = files()
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "pool.jsonl").rename(folder / "a.jsonl")
    config = EnvConfig.from_kwargs({**settings, "pool": str(folder)})
    first = load_data(config)
    assert load_data(config) is first
    (folder / "b.jsonl").write_text(json.dumps(rows(50, 1)[0]))
    assert len(load_data(config).pool) == 25


def test_load_data__choice_form__is_that_of_all_sets(files):
    asked = [{"question": f"Which {n}?", "choices": ["one", "two"], "answer": n % 2} for n in range(40)]
    settings = files(pool=asked[:24], dev=asked[24:30], test=asked[30:36], choice_form="letter")
    data = load_data(EnvConfig.from_kwargs(settings))
    assert {row.choices for part in (data.pool, data.dev, data.test) for row in part} == {("A", "B")}
    assert RaiseSelectEnv(**{**settings, "num_candidates": "all"}).action_space.n == 24


def test_assets__nothing_fits__says_what_to_raise(files):
    with pytest.raises(DataError, match="max_length"):
        RaiseSelectEnv(**files(max_length=4)).reset()


def test_assets__what_an_environment_keeps_to_itself__does_not_matter(embedded_env):
    own = {"horizon": 2, "budget": 5, "batch_size": 3, "reward": "exact_match", "score_every": 2, "hide": ["stage"]}
    assert embedded_env(**own).assets is embedded_env().assets


def test_assets__classes__share_the_rows_out(embedded_env):
    assets = embedded_env().assets
    assert sorted(np.concatenate(assets.members)) == list(range(64))
    for label, ids in enumerate(assets.members):
        assert (assets.classes[ids] == label).all()
    assert assets.pool_tokens == assets.learner.pool.lengths.sum()
    assert set(assets.content) == {"model", "pool", "dev", "test"}


def test_accuracy__dev_rows_with_choices__is_a_reward(files):
    choices = [{**row, "choices": [row["output"], "no"]} for row in rows(100, 6)]
    settings = files(dev=choices, test=[{**row, "choices": [row["output"], "x"]} for row in rows(200, 4)])
    env, other = RaiseSelectEnv(**settings), RaiseSelectEnv(**{**settings, "reward": "accuracy"})
    env.reset(seed=0)
    other.reset(seed=0)
    assert 0 <= other.dev_scores[0] <= 1
    assert env.evaluate("dev").accuracy == other.dev_scores[0]


def test_load_assets__another_first_adapter__same_features(small_settings, tmp_path):
    # Each with a cache of its own: what was kept by one run must be what the other would have computed.
    raw = [
        load_assets(EnvConfig(**small_settings, seed_model=seed, cache_dir=str(tmp_path / str(seed)))).features.raw
        for seed in (0, 1)
    ]
    np.testing.assert_array_equal(*raw)


def test_env__activation_checkpointing__same_episode(embedded_env):
    plain, lean = (embedded_env(pool_size=32, activation_checkpointing=value) for value in (False, True))
    action = np.ones(plain.config.num_candidates, dtype=np.int8)
    results = []
    for env in (plain, lean):
        env.reset(seed=0)
        results.append([env.step(action)[1] for _ in range(2)])
    np.testing.assert_allclose(results[1], results[0], atol=1e-6)
    assert lean.assets.learner.base is not plain.assets.learner.base


# Large pools


@pytest.fixture
def large(files, monkeypatch, tmp_path):
    """Return a function that makes an environment of 24 rows that are too many for memory."""

    def make(cache, **settings):
        monkeypatch.setattr("raise_env.pool.MAX_ROWS_IN_MEMORY", 5)
        _cached_data.cache_clear()
        env = RaiseSelectEnv(**files(auxiliary_updates=2, cache_dir=str(tmp_path / cache), **settings))
        assert load_data(env.config).pool.is_large
        return env

    yield make
    _cached_data.cache_clear()


def episode(env):
    seen = [env.reset(seed=0)[0].tobytes()]
    for step in range(2):
        observation, reward, *_ = env.step(np.arange(8) % 4 == step)
        seen.append((observation.tobytes(), reward))
    return seen


def test_env__large_pool__is_equal_to_one_in_memory_to_the_bit(files, large, tmp_path):
    small = RaiseSelectEnv(**files(auxiliary_updates=2, cache_dir=str(tmp_path / "small")))
    wanted, features, classes = episode(small), small.assets.features, small.assets.classes
    env = large("large")
    assert episode(env) == wanted
    assert env.assets is not small.assets
    assert not env.assets.features.raw.flags.owndata, "memory-mapped"
    assert features.raw.flags.owndata
    np.testing.assert_array_equal(env.assets.features.raw, features.raw)
    np.testing.assert_array_equal(env.assets.features.columns, features.columns)
    np.testing.assert_array_equal(env.assets.classes, classes)
    assert env.assets.features.num_tokens == features.num_tokens
    assert (env.assets.content, env.assets.pool_tokens) == (small.assets.content, small.assets.pool_tokens)


def test_load_assets__killed_between_blocks__goes_on_to_equal_bytes(large, monkeypatch, tmp_path):
    monkeypatch.setattr("raise_env.auxiliary.FEATURE_BLOCK_ROWS", 7)
    seen = []
    whole = large("whole").load(lambda *progress: seen.append(progress)).features
    of_features = [done for what, done, total in seen if (what, total) == ("computing features", 24)]
    assert of_features == sorted(of_features)
    assert of_features[-1] == 24
    assert next(what for what, _, _ in seen) == "encoding the pool"

    def interrupt(what, done, total):
        if what == "computing features" and done > 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        large("torn").load(interrupt)
    seen.clear()
    features = large("torn").load(lambda *progress: seen.append(progress)).features
    assert min(done for _, done, _ in seen) > 14
    assert features.num_tokens == whole.num_tokens
    contents = [
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.bin") if "features" in str(path)}
        for name in ("whole", "torn")
    ]
    assert len(contents[0]) == 1
    assert contents[0] == contents[1]


def test_assets__more_rows_than_are_classed_at_once__are_classed_by_a_sample(embedded_env, monkeypatch, tmp_path):
    monkeypatch.setattr("raise_env.auxiliary.MAX_ROWS_IN_MEMORY", 40)
    monkeypatch.setattr("raise_env.auxiliary.FEATURE_BLOCK_ROWS", 30)
    first, again = (embedded_env(cache_dir=str(tmp_path / name)).assets for name in ("a", "b"))
    np.testing.assert_array_equal(first.classes, again.classes)
    columns = first.features.columns
    means = np.stack([columns[first.classes == label].mean(axis=0) for label in range(2)])
    nearest = ((columns[:, None] - means) ** 2).sum(-1).argmin(1)
    assert (nearest == first.classes).mean() > 0.8
    assert set(first.classes) == {0, 1}


def test_env__large_pool_and_cache_that_cannot_be_written__says_what_to_do(large, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"--cache-dir"):
        large("file").reset(seed=0)


def test_load_assets__classes__are_kept_with_the_features(embedded_env, tmp_path, monkeypatch):
    first = embedded_env(cache_dir=str(tmp_path)).assets
    monkeypatch.setattr("raise_env.auxiliary.kmeans_classes", None)
    again = embedded_env(cache_dir=str(tmp_path), seed_model=1).assets
    assert again is not first
    np.testing.assert_array_equal(again.classes, first.classes)
    with pytest.raises(TypeError, match="not callable"):
        embedded_env(cache_dir=str(tmp_path), num_classes=4).assets  # noqa: B018 - asking for them loads them


def numbered(first, count):
    return [{"instruction": f"Say {n}.", "output": f"So.\n#### {n}"} for n in range(first, first + count)]


@pytest.mark.parametrize(
    ("reward", "part"), [("accuracy_norm", "dev"), ("choice_probability", "dev"), ("flexible_match", "test")]
)
def test_load_assets__no_row_that_the_reward_needs__is_said_before_anything_is_computed(
    files, reward, part, monkeypatch
):
    monkeypatch.setattr("raise_env.assets._cached_assets", lambda *_: pytest.fail("computed"))
    env = RaiseSelectEnv(**files(dev=numbered(100, 3), reward=reward))
    with pytest.raises(RewardError, match=f"reward '{reward}' needs {part} rows"):
        env.reset(seed=0)


@pytest.mark.parametrize("reward", ["exact_match", "flexible_match"])
def test_env__rows_that_end_in_a_number__are_answered_by_the_model_of_the_moment(files, reward, monkeypatch):
    answered = []

    def made_up(base, prompts, adapters):
        answered.append(len(prompts))
        right = "So.\n#### 100" if len(answered) == 1 else "So.\n#### 101"
        return [right] * len(prompts), 1000

    monkeypatch.setattr("raise_env.learner.answer", made_up)
    settings = files(dev=numbered(100, 4) + rows(110, 2), test=numbered(200, 3), reward=reward, score_every=1)
    env = RaiseSelectEnv(**settings)
    env.reset(seed=0)
    before = env.ledger.forward_tokens
    share = 1 / 6 if reward == "exact_match" else 1 / 4  # the plain rows are wrong, or do not count
    assert env.dev_scores == [share]
    env.reset(seed=1)
    assert answered == [4], "the first model's answers are kept for every episode"
    _, gain, _, _, _ = env.step(np.array([1, 0, 0, 0] * 2))
    assert gain == 0.0
    assert env.ledger.forward_tokens > before + 1000
    _, _, over, _, info = env.step(np.array([1, 0, 0, 0] * 2))
    assert over
    assert info["test_score"] == 0.0
    assert env.evaluate("test").flexible_match == 0.0
    (probed,) = env.fork(1)
    assert probed._learner.generates


def test_env__reward_that_needs_no_answers__never_generates_any(files, monkeypatch):
    monkeypatch.setattr("raise_env.learner.answer", lambda *_, **__: pytest.fail("generated"))
    env = RaiseSelectEnv(**files(dev=numbered(100, 4), test=numbered(200, 3)))
    env.reset(seed=0)
    env.probe(np.eye(8)[:2])
    for _ in range(2):
        _, _, _, _, info = env.step(np.array([1, 0, 0, 0] * 2))
    assert "test_score" in info
    assert env.evaluate("test").flexible_match is None


def test_probe__reward_by_generation__is_update_then_score(files):
    env = RaiseSelectEnv(
        **files(dev=numbered(100, 2), test=numbered(200, 1), reward="flexible_match", learning_rate=0.01)
    )
    env.reset(seed=0)
    action = np.array([1, 0, 0, 0] * 2)
    expected = env.probe(action[None])[0]
    env.step(action)
    assert env.dev_scores[1] == expected
    assert env.assets is RaiseSelectEnv(**{**env.config.to_kwargs(), "reward": "loss"}).assets, "one base for both"


# Weights that are no numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_load_assets__model_with_spoilt_weights__is_refused_before_anything_is_computed(
    tmp_path, small_settings, value
):
    folder = tmp_path / "spoilt"
    shutil.copytree(model_folder("tiny"), folder)
    weights = load_file(folder / "model.safetensors")
    weights[sorted(weights)[-1]].flatten()[0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    cache = tmp_path / "cache"
    config = EnvConfig.from_kwargs({**small_settings, "model": str(folder), "cache_dir": str(cache)})
    with pytest.raises(ModelError, match=r"spoilt.*not finite before any update"):
        load_assets(config)
    assert not list(cache.glob("features-*"))
    auxiliary = EnvConfig.from_kwargs({**small_settings, "auxiliary_model": str(folder), "cache_dir": str(cache)})
    with pytest.raises(ModelError, match=r"auxiliary model .*spoilt.*pool row 0 are not finite"):
        load_assets(auxiliary)


def test_load_assets__updates_of_the_auxiliary_model_diverge__features_come_without_them(
    tmp_path, small_settings, caplog
):
    settings = {**small_settings, "cache_dir": str(tmp_path)}
    assets = load_assets(EnvConfig.from_kwargs({**settings, "learning_rate": 1e30}))
    assert "diverged in its 2 updates" in caplog.text
    plain = load_assets(EnvConfig.from_kwargs({**settings, "auxiliary_updates": 0}))
    rows = np.arange(64)
    np.testing.assert_array_equal(assets.features.rows(rows), plain.features.rows(rows))


def test_load_assets__another_first_adapter__takes_the_same_tokens(small_settings):
    first, second = (load_assets(EnvConfig(**small_settings, seed_model=seed)) for seed in (0, 1))
    assert second.learner.pool is first.learner.pool
    assert second.learner.splits["dev"] is first.learner.splits["dev"]
    assert second.learner.splits is not first.learner.splits


@pytest.mark.parametrize("other", [{"max_length": 40}, {"template": "Q: {{ prompt }}"}, {"task_seed": 1}])
def test_load_assets__other_texts_or_another_way_to_cut_them__takes_others(small_settings, other):
    first, second = (load_assets(EnvConfig(**small_settings, **more)) for more in ({}, other))
    assert second.learner.pool is not first.learner.pool
    assert not np.array_equal(second.learner.pool.lengths, first.learner.pool.lengths)
