"""docs/guarantees.md promises nothing that no test holds, and the form for reports asks for what a reader needs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
PROMISES = [line for line in PAGE.splitlines() if line.startswith("|") and not re.match(r"\|(---| promise )", line)]


@pytest.mark.parametrize("promise", PROMISES, ids=lambda line: line.split("|")[1].strip())
def test_promises__the_tests_they_name__are_there(promise):
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", promise.split("|")[2])
    assert named, "no test holds it"
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path}::{name}"


def test_bug_form__whoever_reports__is_asked_for_info_command_and_expectation():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8"))
    required = {part["id"]: part["attributes"] for part in form["body"] if part.get("validations", {}).get("required")}
    assert set(required) == {"info", "command", "found", "expected"}
    assert "raise-env info" in required["info"]["description"]
