import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces

from raise_env import RaiseSelectEnv
from raise_env.agents import estimate as estimate_module
from raise_env.agents.base import world_of
from raise_env.agents.estimate import CHARACTERS_PER_TOKEN, estimate
from raise_env.agents.runs import Plan, train
from raise_env.base_model import model_folder
from raise_env.errors import AgentError, ModelError, SettingError

FORK_SETTINGS = {"num_states": 2, "num_rows": 16, "num_lookahead": 1, "num_networks": 2, "num_passes": 3}


@pytest.fixture(scope="module")
def plan(small_settings):
    return Plan(small_settings, agent_settings=FORK_SETTINGS, episodes=2, num_runs=2)


@pytest.fixture
def shapes_alone(tmp_path, monkeypatch):
    """The embedded model's folder without its weights."""
    monkeypatch.setattr("raise_env.model_size._RATE_SECONDS", 0.01)
    folder = tmp_path / "shapes"
    shutil.copytree(model_folder("tiny"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def with_model(plan, folder, **settings):
    return dataclasses.replace(plan, settings={**plan.settings, "model": str(folder), **settings})


def test_estimate__tokens__as_counted_afterwards(plan, tmp_path):
    cost = estimate(plan)
    report = train(tmp_path / "run", plan)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    features = report["cost"]["tokens"]["features"]
    assert cost.tokens == pytest.approx(sum(run["phi_tokens"].values()) + features, rel=0.2)
    assert cost.seconds > 0
    assert cost.memory_gb > 0
    assert cost.notes == ()


def test_estimate__test_set__is_counted_as_it_is_scored_afterwards(plan, tmp_path):
    env = RaiseSelectEnv(**plan.settings)
    cost, before = estimate(plan), env.assets.learner.ledger.test_tokens
    train(tmp_path / "run", plan)
    assert cost.test_tokens == env.assets.learner.ledger.test_tokens - before
    assert 0 < cost.test_seconds < cost.seconds


@pytest.mark.parametrize("horizon", [1, 4])
def test_estimate__scores_of_the_test_set__are_one_before_and_one_a_run(small_settings, monkeypatch, horizon):
    plan = Plan({**small_settings, "horizon": horizon}, agent="random", num_runs=3, compare=("full",))
    once = RaiseSelectEnv(**plan.settings).assets.learner.splits["test"].num_tokens()
    assert estimate(plan).test_tokens == 7 * once
    monkeypatch.setattr(estimate_module, "_SCORED_ROWS", 4)
    assert estimate(plan).test_tokens == pytest.approx(7 * once, abs=7)


@pytest.fixture
def own_files(small_settings, tmp_path):
    """Settings with files of one's own, whose dev and test rows end in a number; no test file among them."""
    sets = {"pool": "abcdefgh" * 4, "dev": "xyz", "test": "uvwxy"}
    for name, words in sets.items():
        rows = [{"instruction": f"{name} {word} {i}", "output": f"{word} #### {i}"} for i, word in enumerate(words)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("pool", "dev")}
    rest = {name: value for name, value in small_settings.items() if name not in ("pool_size", "num_dev", "num_test")}
    return {**rest, **files, "model": "tiny"}


def test_estimate__no_test_set__takes_no_time(own_files, shapes_alone):
    plan = Plan(own_files, agent="random", num_runs=1, compare=())
    for own in (plan, with_model(plan, shapes_alone)):
        cost = estimate(own)
        assert (cost.test_tokens, cost.test_seconds) == (0, 0.0)


def test_estimate__answers_that_are_generated__count_too(own_files, tmp_path):
    settings = {**own_files, "test": str(tmp_path / "test.jsonl"), "reward": "exact_match"}
    plan = Plan(settings, agent="random", num_runs=1, compare=())
    env = RaiseSelectEnv(**settings)
    env.reset(seed=0)
    ledger, learner = env.ledger, env.assets.learner.copy()
    learner.generates = True
    before = ledger.test_tokens
    learner.evaluate("test")
    once = ledger.test_tokens - before
    assert once > learner.splits["test"].num_tokens()
    assert estimate(plan).test_tokens == 2 * once


@pytest.fixture(scope="module", params=[1, 2, 4])
def trained(request, small_settings, tmp_path_factory):
    """Settings with a dev score after so many steps and the last, and the tokens booked: by agent, and of features."""
    settings = {**small_settings, "horizon": 5, "score_every": request.param}
    folder = tmp_path_factory.mktemp("trained") / "run"
    report = train(folder, Plan(settings, agent="random", compare=("greats", "greedy", "full"), num_runs=1))
    booked = json.loads((folder / "run.json").read_text())["phi_tokens"]
    return settings, booked, report["cost"]["tokens"]["features"]


@pytest.mark.parametrize("agent", ["random", "greats", "greedy", "full"])
def test_estimate__final_runs__cost_what_is_booked_afterwards(trained, agent):
    settings, booked, features = trained
    cost = estimate(Plan(settings, agent=agent, compare=(), num_runs=1))
    assert cost.tokens - features == pytest.approx(booked[f"final/{agent}"], rel=0.15)


def test_estimate__dev_score_after_some_steps__is_in_those_alone(small_settings):
    def tokens(score_every):
        settings = {**small_settings, "horizon": 6, "score_every": score_every}
        return estimate(Plan(settings, agent="random", compare=(), num_runs=1)).tokens

    dev = RaiseSelectEnv(**small_settings).assets.learner.splits["dev"].num_tokens(None)
    assert [tokens(1) - tokens(every) for every in (2, 4, 9)] == [3 * dev, 4 * dev, 5 * dev]


def test_estimate__work_of_begin__counts_once_a_run(own_agent, small_settings):
    class Begins(own_agent.RandomAgent):
        def begin(self, env, seed):
            super().begin(env, seed)
            world_of(env).row_losses(list(range(8)))

    own_agent.Begins = Begins
    plan = Plan(small_settings, agent="own_agent:Begins", compare=(), num_runs=2)
    looks = 2 * int(RaiseSelectEnv(**small_settings).assets.learner.pool.lengths[:8].sum())
    assert estimate(plan).tokens == estimate(dataclasses.replace(plan, agent="random")).tokens + looks


def test_estimate__agent_that_picks_row_by_row__counts_whole_steps(own_agent, small_settings):
    class Picks:
        action_space = spaces.Discrete(small_settings["num_candidates"])

        def predict(self, observation, state=None, episode_start=None, deterministic=True, action_masks=None):
            return np.flatnonzero(action_masks)[0], state

    own_agent.Picks = Picks
    assert estimate(Plan(small_settings, agent="own_agent:Picks", compare=(), num_runs=2)).updates == 2 * 3


def test_estimate__agent_that_fails__told_as_in_a_run(own_agent, small_settings):
    own_agent.fails = lambda observation: "all of them"
    with pytest.raises(AgentError, match=r"agent 'own_agent:fails', episode seed 0, step 1: predict returned"):
        estimate(Plan(small_settings, agent="own_agent:fails", compare=(), num_runs=1))


def test_estimate__agents_that_prepare__are_named_and_not_prepared(own_agent, small_settings, shapes_alone):
    plan = Plan(small_settings, agent="less", compare=("random", "own_agent:Prepares"), num_runs=1)
    for own in (plan, with_model(plan, shapes_alone)):
        assert "the preparation of less and own_agent:Prepares is left out" in estimate(own).notes[-1]
    assert own_agent.Prepares.calls == []


def test_estimate__agent_that_prepares__costs_what_random_rows_do(small_settings):
    prepares, random = (
        estimate(Plan(small_settings, agent=name, compare=(), num_runs=1)) for name in ("less", "random")
    )
    assert (prepares.tokens, prepares.updates) == (random.tokens, random.updates)


def test_estimate__agent_with_settings_of_its_own__counts_its_own_runs(own_agent, small_settings):
    plan = Plan(small_settings, agent="own_agent:OwnRuns", episodes=0, compare=("random",), num_runs=1)
    assert estimate(plan).updates == 2 + 3


def test_estimate__agent_that_learns__counts_its_episodes(own_agent, small_settings):
    plan = Plan(small_settings, agent="own_agent:Learns", episodes=5, compare=("random",), num_runs=2)
    # An episode tries 4 batches and takes a step; then 2 final runs of 3 steps for 2 agents.
    assert estimate(plan).updates == 5 * 5 + 2 * 2 * 3
    assert estimate(dataclasses.replace(plan, episodes=0)).updates == 2 * 2 * 3


@pytest.mark.parametrize(
    ("agent", "settings", "episodes", "expected"),
    [
        ("sb3:PPO", {"n_steps": 12, "batch_size": 12, "n_epochs": 1}, 6, 24),  # two rollouts of 12 steps for 18
        ("sb3:A2C", {"n_steps": 8, "action_form": "pick"}, 4, 12),  # six rollouts, of two steps of four picks each
        ("placebo:sb3:PPO", {"n_steps": 12, "batch_size": 12, "n_epochs": 1}, 6, 24),
    ],
)
def test_estimate__rollouts_longer_than_an_episode__count_once(small_settings, agent, settings, episodes, expected):
    plan = Plan(small_settings, agent, settings, episodes=episodes, compare=(), num_runs=1)
    assert estimate(plan).updates == expected + 3  # and a final run


def test_estimate__the_folder__is_not_touched(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    estimate(plan)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("has_weights", [True, False])
def test_estimate__what_takes_time__is_told_task_by_task(plan, shapes_alone, tmp_path, has_weights):
    tasks = {}

    class Watching:
        @contextlib.contextmanager
        def task(self, name, total):
            tasks[name] = (0, total)
            yield lambda done: tasks.update({name: (done, total)})

    model = "tiny" if has_weights else shapes_alone
    # With a dev score after the second and the third step there are two kinds of steps.
    estimate(with_model(plan, model, cache_dir=str(tmp_path / "cache"), score_every=2), reporter=Watching())
    assert tasks == {
        "loading model, data and features": (1, 1),
        "computing features": (64, 64),
        "measuring scores of test rows": (1, 1),
        "measuring steps with raise_fork": (6, 6),
        "measuring steps with random": (6, 6),
        "measuring an episode of learning (raise_fork)": (1, 1),
    }


def test_estimate__agent_that_is_unknown__told_before_anything_is_computed(plan, tmp_path):
    cache = tmp_path / "cache"
    own = dataclasses.replace(with_model(plan, "tiny", cache_dir=str(cache)), compare=("randon",))
    with pytest.raises(SettingError, match="did you mean 'random'"):
        estimate(own)
    assert not cache.exists()


# Without weights


def test_estimate__tokenizer_and_no_weights__counts_the_same_tokens(plan, shapes_alone):
    reckoned, measured = estimate(with_model(plan, shapes_alone)), estimate(plan)
    assert reckoned.updates == measured.updates
    assert reckoned.tokens == pytest.approx(measured.tokens, rel=0.02)
    assert reckoned.phi == pytest.approx(measured.phi, rel=0.02)
    assert reckoned.test_tokens == measured.test_tokens
    assert "small model in the place" in reckoned.notes[0]


def test_estimate__neither_tokenizer_nor_weights__characters_stand_for_tokens(plan, shapes_alone):
    for path in Path(shapes_alone).glob("*token*"):
        path.unlink()
    reckoned, measured = estimate(with_model(plan, shapes_alone)), estimate(plan)
    assert reckoned.tokens == pytest.approx(measured.tokens / CHARACTERS_PER_TOKEN, rel=0.1)
    assert reckoned.test_tokens == pytest.approx(measured.test_tokens / CHARACTERS_PER_TOKEN, rel=0.1)
    assert any("no tokenizer" in note for note in reckoned.notes)


def test_estimate__pool_larger_than_the_sample__scaled_up(plan, shapes_alone, monkeypatch):
    whole = estimate(with_model(plan, shapes_alone))
    monkeypatch.setattr(estimate_module, "SAMPLE_ROWS", 32)
    part = estimate(with_model(plan, shapes_alone))
    assert part.tokens == pytest.approx(whole.tokens, rel=0.1)
    assert part.phi == pytest.approx(whole.phi, rel=0.1)
    assert any("32 of the pool's 64 rows" in note for note in part.notes)


@pytest.mark.parametrize("agent", ["full", "own_agent:OwnRuns"])
def test_estimate__runs_of_a_length_of_their_own__as_long_as_with_the_whole_pool(
    small_settings, shapes_alone, own_agent, monkeypatch, agent
):
    # The pool decides on how long `full` runs, and not on how long OwnRuns does. Nor do updates before the features.
    plan = with_model(Plan(small_settings, agent=agent, compare=(), num_runs=2), shapes_alone, auxiliary_updates=0)
    whole = estimate(plan)
    monkeypatch.setattr(estimate_module, "SAMPLE_ROWS", 32)
    part = estimate(plan)
    assert part.updates == whole.updates
    assert part.tokens == pytest.approx(whole.tokens, rel=0.2)  # of a step there are but eight rows
    assert part.phi == pytest.approx(whole.phi, rel=0.2)


def test_estimate__larger_model__takes_longer_and_more_memory(plan, shapes_alone, monkeypatch):
    monkeypatch.setattr(estimate_module, "matrix_rate", lambda config, size: 1e9)
    small = estimate(with_model(plan, shapes_alone))
    form = json.loads((shapes_alone / "config.json").read_text())
    (shapes_alone / "config.json").write_text(json.dumps({**form, "num_hidden_layers": 3 * form["num_hidden_layers"]}))
    large = estimate(with_model(plan, shapes_alone))
    assert large.tokens == small.tokens
    assert 2.5 < large.seconds / small.seconds < 3.0  # the head is no layer
    assert large.test_seconds / large.seconds == pytest.approx(small.test_seconds / small.seconds)
    assert large.memory_gb > 1.5 * small.memory_gb
    checkpointed = estimate(with_model(plan, shapes_alone, activation_checkpointing=True))
    assert checkpointed.memory_gb < large.memory_gb


def test_estimate__folder_without_config__model_error(plan, tmp_path):
    with pytest.raises(ModelError, match=r"without config\.json"):
        estimate(with_model(plan, tmp_path))


@pytest.mark.parametrize(("agent", "size", "updates"), [("random", 2, 5), ("random", 8, 3), ("ifd", 8, 3)])
def test_estimate__batch_size_of_the_agents_own__is_what_is_counted(small_settings, agent, size, updates):
    settings = {**small_settings, "horizon": 5, "budget": 20}
    plan = Plan(settings, agent=agent, agent_settings={"batch_size": size}, compare=(), num_runs=1)
    assert estimate(plan).updates == updates


def test_estimate__budget_that_ends_the_run_early__is_what_is_counted(small_settings):
    plan = Plan({**small_settings, "horizon": 5, "budget": 6}, agent="random", compare=(), num_runs=2)
    assert estimate(plan).updates == 2 * 2, "of four rows and of the two that are left"
