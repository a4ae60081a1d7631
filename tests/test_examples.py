"""The examples run as a reader would run them; `--fast` makes them small."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name, *arguments):
    """Run an example in a process of its own, where a warning is an error of this project as it is in the tests."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    return result.stdout


def test_examples__every_one__is_run_here():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    others = {"quickstart", "compare_algorithms", "custom_reward", *LIBRARIES}
    assert names == {*others, *(name for name, _ in CONTESTANTS)}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples__docstring__says_what_one_sees(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring is not None
    assert "What one sees" in docstring


def test_quickstart__whole__the_model_becomes_better():
    output = run("quickstart")
    before, after = re.search(r"dev score (\S+) before, (\S+) after 40 updates", output).groups()
    assert float(after) > float(before) + 1
    assert re.search(r"^test score -\d+\.\d\d$", output, re.MULTILINE)


CONTESTANTS = [
    *(("sb3_ppo", "PPO"), ("cleanrl_style_ppo", "PPO")),
    *(("custom_policy", "the policy"), ("plug_in_method", "the method")),
]


@pytest.mark.parametrize(("name", "policy"), CONTESTANTS)
def test_example__fast__prints_both_results(name, policy):
    output = run(name, "--fast")
    for words in ("random", policy):
        assert re.search(rf"test score with {words}.*: -\d+\.\d\d \(-\d+\.\d\d, -\d+\.\d\d, -\d+\.\d\d\)", output)


def test_compare_algorithms__quick__a_line_with_intervals_for_each():
    number = r"-?\d+\.\d\d"
    lines = run("compare_algorithms", "--quick").splitlines()[1:]
    cells = [
        re.fullmatch(rf"(\S+) +({number}) \({number}, {number}\) +({number}) \({number}, {number}\) +\d+ s", line)
        for line in lines
    ]
    assert [cell[1] for cell in cells] == ["random", "ifd", "sb3:PPO", "raise_fork", "oracle"]
    means = {cell[1]: float(cell[2]) for cell in cells}
    for cell in cells:
        assert float(cell[3]) == pytest.approx(means["random"] - float(cell[2]), abs=0.011)


#: Examples with libraries that few have: by name, the library and the extra that brings it.
LIBRARIES = {"rllib_ppo": ("ray.rllib", "rllib"), "torchrl_ppo": ("torchrl", "torchrl")}


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARIES)
def test_example__of_another_library__learns_and_prints_both_results(name):
    library, extra = LIBRARIES[name]
    found = subprocess.run([sys.executable, "-c", f"import {library}"], capture_output=True, check=False)
    if found.returncode:
        pytest.skip(f'{library} is not installed: pip install "raise-env[{extra}]"')
    output = run(name, "--fast")
    assert re.search(r"^iteration 2, step 8: return \d", output, re.MULTILINE)
    for policy in ("random", "PPO"):
        assert re.search(rf"test score with {policy}: -\d+\.\d\d \(-\d+\.\d\d, -\d+\.\d\d, -\d+\.\d\d\)", output)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "policy"), CONTESTANTS)
def test_example__whole__what_was_learned_beats_random(name, policy):
    output = run(name)
    results = dict(re.findall(r"test score with (.*): (-\d+\.\d\d) \(", output))
    random_name = next(label for label in results if label.startswith("random"))
    assert float(results[policy]) > float(results[random_name]) + 0.1


def plural_rows(*arguments):
    """How many of the chosen rows ask for a plural, of how many, with the loss and with the example's own reward."""
    lines = re.findall(
        r"^reward (\S+): (\d+) of (\d+) rows ask for a plural$", run("custom_reward", *arguments), re.MULTILINE
    )
    assert [name for name, _, _ in lines] == ["loss", "custom_reward:plurals_first"]
    return [(int(count), int(total)) for _, count, total in lines]


def test_custom_reward__fast__counts_with_both_rewards():
    assert [total for _, total in plural_rows("--fast")] == [16, 16]


@pytest.mark.slow
def test_custom_reward__whole__the_agent_follows_it():
    (with_loss, total), (with_own, again) = plural_rows()
    assert total == again == 40
    assert with_own > with_loss
