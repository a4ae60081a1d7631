"""The commands of docs/guide.md, one after the other, as they stand there but with less work."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from raise_env.agents import cli
from raise_env.base_model import model_folder
from raise_env.tiny.task import generate_task

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "guide.md"
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```bash\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    for line in block.splitlines()
]
#: What makes a command's work small, by its name.
ENVIRONMENT = [
    "--num-dev",
    "16",
    "--num-test",
    "16",
    "--horizon",
    "2",
    "--num-candidates",
    "16",
    "--auxiliary-updates",
    "2",
]
SMALL = {
    "split": [],
    "train": [
        *ENVIRONMENT,
        "--runs",
        "1",
        "--episodes",
        "1",
        "--agent-args",
        "num_states=1,num_rows=16,num_lookahead=1",
    ],
    "evaluate": ["--num-rows", "16"],
    "finetune": ENVIRONMENT,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the guide's reader has: a model, a file of rows, and later some more."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder("tiny"), tmp_path / "model")
    for name, seed, count in (("rows", 0, 1500), ("more", 1, 300)):
        rows = generate_task("default", seed=seed, pool_size=count).pool
        texts = {row.content_hash: json.dumps(dict(row.fields)) + "\n" for row in rows}
        (tmp_path / f"{name}.jsonl").write_text("".join(texts.values()))
    return tmp_path


def test_guide__every_command__runs_and_leaves_what_is_said(folder, capsys):
    assert [command[:2] for command in COMMANDS] == [
        ["raise-env", name] for name in ("split", "train", "train", "evaluate", "evaluate", "finetune")
    ]
    for command in COMMANDS:
        extra = ["--allow-overlap"] if command[1] == "finetune" else []  # more.jsonl asks some of the same
        with pytest.raises(SystemExit) as stop:
            cli.main([*command[1:], *SMALL[command[1]], *extra])
        assert stop.value.code == 0, (command, capsys.readouterr())
    for name in ("run/report.html", "run/selected.jsonl", "run/adapter/README.md", "run/merged/model.safetensors"):
        assert (folder / name).is_file(), name
    assert (folder / "next" / "adapter" / "adapter_model.safetensors").is_file()
    assert "loss" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["guide", "paper", "data", "files", "agents", "architecture", "speed"])
def test_docs__links__lead_somewhere(name):
    page = GUIDE.with_name(f"{name}.md")
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link
