"""What the documents say of the files must be so: a map that lists what is not there is worse than none."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import api_page
import pytest

from raise_env import EnvConfig
from raise_env.config import ENV_IDS
from raise_env.tiny.task import TASKS

ROOT = Path(__file__).resolve().parents[1]
DOCS = [
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("docs/tasks/*.md")),
    *sorted(ROOT.glob("docs/results/*.md")),
    ROOT / "README.md",
    ROOT / "SECURITY.md",
]
MAP = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def rows_of(heading):
    """Return the file names in the first column of the table under a heading."""
    section = MAP.split(f"## {heading}")[1].split("\n## ")[0]
    return {
        name for line in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(.*?)`", line)
    }


@pytest.mark.parametrize(("heading", "folder"), [("The world", "raise_env"), ("The agents", "agents")])
def test_map__of_each_wing__names_every_file_and_no_other(heading, folder):
    files = {path.name for path in (ROOT / folder).glob("*.py")}
    if folder == "agents":
        files.remove("__init__.py")
    named = rows_of(heading)
    assert {name for name in named if name.endswith(".py")} == files
    assert all((ROOT / folder / name).is_dir() for name in named if name.endswith("/"))


def test_targets__tables_of_the_page__come_out_of_the_data_beside_it():
    data = ROOT / "docs" / "results" / "targets"
    command = [ROOT / "benchmarks" / "targets_table.py", "--runs", data, "--full", data / "full.json"]
    printed = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True).stdout
    page, readme = (ROOT / "docs/results/targets.md").read_text("utf-8"), (ROOT / "README.md").read_text("utf-8")
    assert printed.count("###") == 3
    assert printed in page
    for loss in re.findall(r"^\| (?:random|raise_fork|full.*?) \| (\S+ ± \S+)", printed, re.MULTILINE):
        assert loss in readme


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links__to_files__lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_anchors__within_a_page__are_headings_of_it(path):
    text = path.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lower()).strip().replace(" ", "-")
        for line in re.findall(r"^#+ (.*)", text, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def test_tasks__all_of_them__are_in_the_table_with_id_steps_and_pool():
    table = (ROOT / "docs" / "tasks" / "README.md").read_text(encoding="utf-8").split("## What all")[0]
    for env_id, task in ENV_IDS.items():
        (line,) = [line for line in table.splitlines() if f"`{env_id}`" in line]
        config = EnvConfig.from_kwargs({"task": task})
        assert f"| {config.pool_size:,} |" in line
        assert f"| {config.horizon} " in line
        assert task.split("-")[0] in line


def test_task_pages__what_they_say_of_settings__is_so():
    for task in TASKS:
        path = ROOT / "docs" / "tasks" / f"{task.split('-')[0]}.md"
        if task == "default":
            continue
        text, config = path.read_text(encoding="utf-8"), EnvConfig.from_kwargs({"task": task})
        assert re.search(rf"\b{config.horizon}\s(updates|offers)", text), task
        assert f"{config.pool_size:,}" in text, task
        assert re.search(rf"[Dd]ev \({TASKS[task].num_dev} rows\)", text), task
        assert re.search(rf"[Tt]est \({TASKS[task].num_test}( rows)?\)", text), task


def test_api_page__public_names__are_all_there_as_their_docstrings_say():
    assert api_page.PAGE.read_text(encoding="utf-8") == api_page.page(), "write it anew: make api"
