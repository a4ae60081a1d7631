from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raise_env.config import AUXILIARY_UPDATES, ENV_IDS, TASK_SETTINGS, EnvConfig, LoraSettings
from raise_env.errors import RaiseEnvError, SettingError, suggestion


def test_defaults__env_config__are_the_documented_ones():
    config = EnvConfig()
    shown = (config.model, config.num_candidates, config.num_classes, config.batch_size, config.horizon, config.reward)
    assert shown == ("tiny", 64, 4, 8, 40, "loss")
    assert config.total_budget == 320
    assert config.is_embedded
    assert hash(config) == hash(EnvConfig())


def test_total_budget__given__replaces_horizon_times_batch_size():
    assert EnvConfig(budget=7).total_budget == 7
    assert EnvConfig(horizon=3, batch_size=2).total_budget == 6


def test_num_auxiliary_updates__not_given__depends_on_whose_model_it_is():
    assert EnvConfig().num_auxiliary_updates == AUXILIARY_UPDATES
    assert EnvConfig(auxiliary_model="other").num_auxiliary_updates == 0
    assert EnvConfig(auxiliary_model="other", auxiliary_updates=5).num_auxiliary_updates == 5
    assert EnvConfig(auxiliary_updates=0).num_auxiliary_updates == 0


BAD = {
    "num_candidates": [0, -4, 2.0, "some", True, None],
    "num_classes": [0, 1.5],
    "batch_size": [0, 65],
    "horizon": [0, 1.5, True, "4"],
    "budget": [0, 2.5],
    "score_every": [0, 1.0],
    "pool_size": [0],
    "max_length": [0],
    "micro_batch_tokens": [0],
    "num_dev": [0],
    "num_test": [-1],
    "task_seed": [-1, 1.0],
    "seed_model": [-1, 2**64],
    "auxiliary_updates": [-1],
    "learning_rate": [-1e-3, math.inf, math.nan, "1e-3", None],
    "weight_decay": [-0.1],
    "max_grad_norm": [-1, math.nan],
    "reward": ["bleu", "module:", ":function", "module:not a name", 5],
    "dtype": ["float16", None],
    "device": [None],
    "model": [5, None],
    "task": [3],
    "template": [3],
    "cache_dir": [1],
    "render_mode": ["human", 1],
    "allow_overlap": ["yes", None],
    "skip_empty": [1],
    "choice_form": ["number", None],
    "columns": [5, "prompt=q", {"prompt": 3}, {"prompt": ""}],
    "hide": ["stage", 3, None, ["stage", 1]],
    "lora": [
        *(5, "r=8", {"r": 0}, {"r": 1.5}, {"r": "8"}, {"lora_dropout": 1.0}, {"lora_dropout": "x"}),
        *({"target_modules": modules} for modules in (None, 5, True, "", [], (), ["q_proj", 3], [""], {"q_proj": 1})),
    ],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_from_kwargs__bad_value__is_named_with_what_is_expected(name, value):
    with pytest.raises(SettingError, match=name) as caught:
        EnvConfig.from_kwargs({name: value})
    shown = next(iter(value.values())) if isinstance(value, dict) else value
    assert repr(shown) in str(caught.value)
    assert "expected" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"reward": len}, r'reward is <built-in .*>; expected a name, or "module:function"'),
        (
            {"pool": [{"prompt": "a"}] * 5000, "dev": "d.jsonl"},
            "pool is .*; expected the name of a file, a folder or a",
        ),
        ({"model": object()}, "model is <object .*>; expected the name of a folder or of a model"),
    ],
    ids=["function", "rows", "model"],
)
def test_from_kwargs__live_object_in_place_of_a_name__says_in_short_what_is_named(settings, expected):
    with pytest.raises(SettingError, match=expected) as caught:
        EnvConfig.from_kwargs(settings)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": "q"},
        {"response": "a"},
        {"prompt": "q", "answer": "a"},
        {"prompt": "q", "response": "a", "answer": "b", "choices": "c"},
        {"prompt": "q", "choices": "c"},
        {"messages": "m", "prompt": "q"},
        {"messages": "m", "input": "i"},
        {"system": "s"},
    ],
)
def test_columns__names_that_make_no_row__are_refused(columns):
    with pytest.raises(SettingError, match=r"columns is .* expected prompt with response"):
        EnvConfig(columns=columns, pool="p", dev="d")


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": "q", "response": "a", "input": "i", "system": "s"},
        {"prompt": "q", "choices": "c", "answer": "a"},
        {"prompt": "q", "choices": "c", "response": "a"},
        {"messages": "m", "system": "s"},
    ],
)
def test_columns__names_that_make_a_row__come_back_as_plain_data(columns):
    config = EnvConfig(columns=columns, pool="p", dev="d")
    assert config.to_kwargs()["columns"] == columns
    assert EnvConfig.from_kwargs(config.to_kwargs()) == config
    assert hash(config.shared_part()) == hash(config.shared_part())
    with pytest.raises(SettingError, match="columns names those of a file"):
        EnvConfig(columns=columns)


@pytest.mark.parametrize("settings", [{"bias": "all"}, {"lora_alpha": -1}, {"use_dora": "yes"}, {"use_rslora": 1}])
def test_lora__bad_value__is_named(settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        EnvConfig(lora=settings)


@pytest.mark.parametrize("modules", ["all-linear", "q_proj", ".*(q|v)_proj", ["q_proj"], ("q_proj", "v_proj")])
def test_lora__target_modules__are_taken_as_peft_takes_them(modules):
    taken = LoraSettings(target_modules=modules).target_modules
    assert taken == (tuple(modules) if isinstance(modules, list) else modules)


def test_from_kwargs__unknown_name__suggests_the_nearest():
    with pytest.raises(SettingError, match="did you mean 'batch_size'"):
        EnvConfig.from_kwargs({"batchsize": 8})
    with pytest.raises(SettingError, match="did you mean 'lora_alpha'"):
        EnvConfig.from_kwargs({"lora": {"loraalpha": 8}})


def test_from_kwargs__candidates_that_classes_do_not_share__names_a_number_that_they_do():
    with pytest.raises(SettingError, match="such as 8"):
        EnvConfig.from_kwargs({"num_candidates": 10})
    with pytest.raises(SettingError, match="such as 4"):
        EnvConfig.from_kwargs({"num_candidates": 3, "batch_size": 1})


def test_from_kwargs__data_that_contradict_each_other__says_which_to_add():
    with pytest.raises(SettingError, match="pool=FILE"):
        EnvConfig(dev="dev.jsonl")
    with pytest.raises(SettingError, match="dev=FILE"):
        EnvConfig(pool="pool.jsonl")
    assert not EnvConfig(pool="pool.jsonl", dev="dev.jsonl").is_embedded


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"horizon": 3, "reward": "package.module:score"},
        {"num_candidates": "all", "batch_size": 200},
        {"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"], "use_dora": True}},
        {"pool": "pool.jsonl", "dev": "dev.jsonl", "learning_rate": 1},
        {"hide": ["stage", "semantic"]},
    ],
    ids=str,
)
def test_to_kwargs__any_settings__come_back_through_json(kwargs):
    config = EnvConfig.from_kwargs(kwargs)
    plain = json.loads(json.dumps(config.to_kwargs()))
    assert plain == kwargs, "defaults are left out"
    assert EnvConfig.from_kwargs(plain) == config
    hash(config)


@pytest.mark.parametrize("task", TASK_SETTINGS)
def test_from_kwargs__task__has_settings_of_its_own_where_none_are_given(task):
    config = EnvConfig.from_kwargs({"task": task})
    for name, value in TASK_SETTINGS[task].items():
        assert getattr(config, name) == value
    assert config.to_kwargs() == {"task": task}
    assert EnvConfig.from_kwargs({"task": task, "horizon": 5}).to_kwargs() == {"task": task, "horizon": 5}


def test_from_kwargs__task_beside_a_pool__leaves_the_settings_alone():
    config = EnvConfig.from_kwargs({"task": "thrift", "pool": "pool.jsonl", "dev": "dev.jsonl"})
    assert config == EnvConfig(task="thrift", pool="pool.jsonl", dev="dev.jsonl")
    assert EnvConfig.from_kwargs(config.to_kwargs()) == config


@pytest.mark.parametrize(("name", "value"), [("task_seed", 1), ("pool_size", 500)])
def test_from_kwargs__rows_of_an_embedded_task_beside_a_pool__are_refused(name, value):
    files = {"pool": "pool.jsonl", "dev": "dev.jsonl"}
    with pytest.raises(SettingError, match=rf"{name}=.* is of the embedded tasks, and pool='pool\.jsonl'"):
        EnvConfig.from_kwargs({name: value, **files})
    EnvConfig.from_kwargs({name: getattr(EnvConfig(), name), **files})


def test_from_kwargs__default_task__is_as_if_there_were_no_others():
    assert EnvConfig.from_kwargs({}) == EnvConfig.from_kwargs({"task": "default"}) == EnvConfig()


#: Values of the settings that tasks have of their own, the general defaults and the tasks' among them.
OWN_VALUES = {
    name: st.sampled_from([getattr(EnvConfig(), name), *(s[name] for s in TASK_SETTINGS.values() if name in s)])
    for name in sorted({name for settings in TASK_SETTINGS.values() for name in settings})
}


@given(
    task=st.sampled_from(["default", "unheard of", *TASK_SETTINGS]),
    own=st.fixed_dictionaries({}, optional=OWN_VALUES),
    more=st.fixed_dictionaries({}, optional={"batch_size": st.integers(1, 32), "weight_decay": st.floats(0, 1)}),
)
def test_to_kwargs__task_with_any_settings__come_back_through_json(task, own, more):
    kwargs = {"task": task, **own, **more}
    config = EnvConfig.from_kwargs(kwargs)
    assert all(getattr(config, name) == value for name, value in kwargs.items()), "what is given is taken"
    plain = json.loads(json.dumps(config.to_kwargs()))
    assert EnvConfig.from_kwargs(plain) == config
    assert set(plain) <= set(kwargs), "what has the task's default is left out"


def test_hide__names_in_any_order__are_the_same_setting():
    hidden = EnvConfig(hide=("availability", "stage", "stage"))
    assert hidden.hide == ("stage", "availability")
    assert hidden == EnvConfig(hide=["stage", "availability"])


def test_hide__unknown_block__suggests_the_nearest():
    with pytest.raises(SettingError, match="did you mean 'semantic'"):
        EnvConfig(hide=("semantics",))


@pytest.mark.parametrize("more", [(), ("stage",), ("stage", "availability")])
def test_hide__all_that_tells_rows_apart__is_refused(more):
    EnvConfig(hide=("difficulty", *more))
    EnvConfig(hide=("semantic", *more))
    with pytest.raises(SettingError, match="padding"):
        EnvConfig(hide=("difficulty", "semantic", *more))


def test_from_kwargs__path_objects__become_plain_text():
    config = EnvConfig(model=Path("model"), pool=Path("pool.jsonl"), dev=Path("dev.jsonl"))
    assert config.to_kwargs() == {"model": "model", "pool": "pool.jsonl", "dev": "dev.jsonl"}


NUMPY_SCALARS = {
    "horizon": np.int64(3),
    "budget": np.uint8(9),
    "num_candidates": np.int32(8),
    "learning_rate": np.float32(0.5),
    "skip_empty": np.bool_(True),
    "reward": np.str_("accuracy"),
    "lora": {"r": np.int64(4), "lora_dropout": np.float64(0.25), "use_dora": np.bool_(True)},
}


@pytest.mark.parametrize("name", NUMPY_SCALARS)
def test_from_kwargs__numpy_scalars__become_pythons_own(name):
    value = NUMPY_SCALARS[name]
    plain = {key: own.item() for key, own in value.items()} if name == "lora" else value.item()
    config = EnvConfig.from_kwargs({name: value})
    assert repr(config) == repr(EnvConfig.from_kwargs({name: plain}))
    assert json.loads(json.dumps(config.to_kwargs())) == {name: plain}


@pytest.mark.parametrize(
    ("name", "value"), [("horizon", np.int64(0)), ("horizon", np.float64(3)), ("budget", np.True_)]
)
def test_from_kwargs__numpy_scalar_that_is_no_such_number__is_named(name, value):
    with pytest.raises(SettingError, match=rf"{name} is {re.escape(repr(value.item()))}; expected"):
        EnvConfig.from_kwargs({name: value})


def test_lora_settings__fields__are_pefts_own():
    from peft import LoraConfig

    known = {entry.name for entry in dataclasses.fields(LoraConfig)}
    assert {entry.name for entry in dataclasses.fields(LoraSettings)} <= known


def test_suggestion__nothing_near__lists_what_is_known():
    assert suggestion("zzz", ["b", "a"]) == "Known: a, b."


def test_errors__every_one__is_caught_by_the_base():
    import raise_env.errors as errors

    kinds = [getattr(errors, name) for name in errors.__all__ if isinstance(getattr(errors, name), type)]
    assert all(issubclass(kind, RaiseEnvError) for kind in kinds)


def test_lazy_features__whole_pool_on_offer__is_refused():
    with pytest.raises(SettingError, match=r'num_candidates="all" .* leave one of the two out'):
        EnvConfig(lazy_features=True, num_candidates="all")


def test_shared_part__any_settings_of_ones_own__are_as_if_never_set():
    shared = EnvConfig(num_classes=3, num_candidates=6, batch_size=5, lazy_features=True).shared_part()
    assert shared == EnvConfig(num_classes=3, num_candidates=9, batch_size=2, lazy_features=True).shared_part()
    assert shared != EnvConfig(num_classes=3, num_candidates=6, batch_size=5).shared_part()
    assert EnvConfig(num_candidates="all").shared_part() == EnvConfig(batch_size=64).shared_part()


def test_tasks__names_in_every_list__are_those_of_the_tasks():
    from raise_env.tiny.task import TASKS

    assert {"default", *TASK_SETTINGS} == set(TASKS)
    assert set(ENV_IDS.values()) <= set(TASKS)


def test_config__auxiliary_model_that_is_ready_and_made_ready__contradict():
    assert EnvConfig(auxiliary_adapter="adapter").num_auxiliary_updates == 0
    with pytest.raises(SettingError, match=r"auxiliary_adapter='adapter'.*auxiliary_updates=3.*leave one"):
        EnvConfig(auxiliary_adapter="adapter", auxiliary_updates=3)


def test_from_kwargs__checkpointing_in_four_bits__is_refused_with_what_to_take():
    with pytest.raises(SettingError, match=r"does not go with dtype='nf4'.*bfloat16"):
        EnvConfig.from_kwargs({"dtype": "nf4", "activation_checkpointing": True})
