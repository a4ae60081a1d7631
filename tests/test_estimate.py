import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from raise_env.agents import estimate as estimate_module
from raise_env.agents.estimate import CHARACTERS_PER_TOKEN, estimate
from raise_env.agents.runs import Plan, train
from raise_env.base_model import model_folder
from raise_env.errors import ModelError

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


def test_estimate__agent_with_settings_of_its_own__counts_its_own_runs(own_agent, small_settings):
    plan = Plan(small_settings, agent="own_agent:OwnRuns", episodes=0, compare=("random",), num_runs=1)
    assert estimate(plan).updates == 2 + 3


def test_estimate__agent_that_learns__counts_its_episodes(own_agent, small_settings):
    plan = Plan(small_settings, agent="own_agent:Learns", episodes=5, compare=("random",), num_runs=2)
    # An episode tries 4 batches and takes a step; then 2 final runs of 3 steps for 2 agents.
    assert estimate(plan).updates == 5 * 5 + 2 * 2 * 3
    assert estimate(dataclasses.replace(plan, episodes=0)).updates == 2 * 2 * 3


def test_estimate__the_folder__is_not_touched(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    estimate(plan)
    assert list(tmp_path.iterdir()) == []


# Without weights


def test_estimate__tokenizer_and_no_weights__counts_the_same_tokens(plan, shapes_alone):
    reckoned, measured = estimate(with_model(plan, shapes_alone)), estimate(plan)
    assert reckoned.updates == measured.updates
    assert reckoned.tokens == pytest.approx(measured.tokens, rel=0.02)
    assert reckoned.phi == pytest.approx(measured.phi, rel=0.02)
    assert "small model in the place" in reckoned.notes[0]


def test_estimate__neither_tokenizer_nor_weights__characters_stand_for_tokens(plan, shapes_alone):
    for path in Path(shapes_alone).glob("*token*"):
        path.unlink()
    reckoned, measured = estimate(with_model(plan, shapes_alone)), estimate(plan)
    assert reckoned.tokens == pytest.approx(measured.tokens / CHARACTERS_PER_TOKEN, rel=0.1)
    assert any("no tokenizer" in note for note in reckoned.notes)


def test_estimate__pool_larger_than_the_sample__scaled_up(plan, shapes_alone, monkeypatch):
    whole = estimate(with_model(plan, shapes_alone))
    monkeypatch.setattr(estimate_module, "SAMPLE_ROWS", 32)
    part = estimate(with_model(plan, shapes_alone))
    assert part.tokens == pytest.approx(whole.tokens, rel=0.1)
    assert part.phi == pytest.approx(whole.phi, rel=0.1)
    assert any("32 of the pool's 64 rows" in note for note in part.notes)


def test_estimate__larger_model__takes_longer_and_more_memory(plan, shapes_alone, monkeypatch):
    monkeypatch.setattr(estimate_module, "matrix_rate", lambda config, size: 1e9)
    small = estimate(with_model(plan, shapes_alone))
    form = json.loads((shapes_alone / "config.json").read_text())
    (shapes_alone / "config.json").write_text(json.dumps({**form, "num_hidden_layers": 3 * form["num_hidden_layers"]}))
    large = estimate(with_model(plan, shapes_alone))
    assert large.tokens == small.tokens
    assert 2.5 < large.seconds / small.seconds < 3.0  # the head is no layer
    assert large.memory_gb > 1.5 * small.memory_gb
    checkpointed = estimate(with_model(plan, shapes_alone, activation_checkpointing=True))
    assert checkpointed.memory_gb < large.memory_gb


def test_estimate__folder_without_config__model_error(plan, tmp_path):
    with pytest.raises(ModelError, match=r"without config\.json"):
        estimate(with_model(plan, tmp_path))
