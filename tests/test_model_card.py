import json
import re

import pytest

from raise_env import RaiseSelectEnv
from raise_env.agents.model_card import write_model_card
from raise_env.agents.run_folder import whole_records
from raise_env.agents.runs import Plan, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_settings):
    """A run with merged weights, and its environment."""
    folder = tmp_path_factory.mktemp("cards") / "run"
    settings = {**small_settings, "horizon": 2}
    plan = Plan(settings, "loss_low", {"batch_size": 3}, episodes=0, num_runs=2, merge=True)
    train(folder, plan)
    return folder, RaiseSelectEnv(**settings)


def test_write_model_card__adapter__tells_data_scores_and_how_to_load(finished):
    folder, env = finished
    card = (folder / "adapter" / "README.md").read_text()
    report = json.loads((folder / "report.json").read_text())
    front = card.split("---")[1]
    assert "library_name: peft" in front
    assert "base_model:" not in front  # "tiny" is nothing that could be looked up
    first = whole_records(folder / "episodes.jsonl")[0]
    rows = [row for step in first.actions for row in step]
    assert f"{len(rows)} rows, {len(set(rows))} of them different" in card
    assert report["verdict"] in card
    assert re.search(r"\| loss_low \| 2 \| [\d.]+ ± [\d.]+ \|", card)
    env.reset(seed=0)
    for content in env.assets.content.values():
        assert f"`{content}`" in card
    assert "with a cosine to 0, 3 rows an update" in card
    assert "PeftModel.from_pretrained" in card
    assert "[More Information Needed]" not in card


def test_write_model_card__merged__loads_without_peft(finished):
    card = (finished[0] / "merged" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert 'AutoModelForCausalLM.from_pretrained("merged")' in card
    assert "peft" not in card.lower()
    assert (finished[0] / "merged" / "model.safetensors").is_file()


def test_write_model_card__names_of_the_hub_and_of_files__whole_and_without_the_way(finished, tmp_path, monkeypatch):
    folder, env = finished
    env.reset(seed=0)
    report = json.loads((folder / "report.json").read_text())
    record = whole_records(folder / "episodes.jsonl")[0]
    (tmp_path / "dev.jsonl").write_text("")
    monkeypatch.setattr(env.assets.pool, "source", "cais/mmlu/all:test")
    config = {"model": "gpt2", "dev": str(tmp_path / "dev.jsonl"), "test": "owner/rows@main:test"}
    before = {name: getattr(env.config, name) for name in config}
    for name, value in config.items():
        object.__setattr__(env.config, name, value)
    try:
        write_model_card(tmp_path / "README.md", report, record, env)
    finally:
        for name, value in before.items():
            object.__setattr__(env.config, name, value)
    card = (tmp_path / "README.md").read_text()
    assert "base_model: gpt2\n" in card
    assert "| pool | cais/mmlu/all:test, " in card
    assert "on the dev set dev.jsonl |" in card
    assert "On owner/rows@main:test, which" in card


def test_write_model_card__hub_id_and_template_of_ones_own__named(finished, tmp_path):
    folder, env = finished
    env.reset(seed=0)
    report = json.loads((folder / "report.json").read_text())
    record = whole_records(folder / "episodes.jsonl")[0]
    object.__setattr__(env.config, "model", "someone/some-model")
    object.__setattr__(env.config, "template", "Q: {{ prompt }} A: ")
    try:
        write_model_card(tmp_path / "README.md", report, record, env)
    finally:
        object.__setattr__(env.config, "model", "tiny")
        object.__setattr__(env.config, "template", None)
    card = (tmp_path / "README.md").read_text()
    assert "base_model: someone/some-model\n" in card
    assert "Q: {{ prompt }} A: " in card
