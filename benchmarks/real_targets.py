"""Write the pool and the targets that docs/results/targets.md is measured on, out of a folder of real data.

    python benchmarks/real_targets.py --shared ../shared --out runs/real

The pool is Alpaca's unbiased rows (random_9k and alpaca_5000, two uniform samples) with a column `claude`: 5 for those
that Claude rated at least 4.5, else 1. GSM8K and ARC have a train and a test file of their own; ARC's questions are
taken out of the instructions that they stand in there, with choices as texts. CommonsenseQA's one file is cut into dev
and test at random. Alpaca's licence is CC BY-NC 4.0: keep what is written to yourself.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

UNBIASED = {"random_9k", "alpaca_5000"}

QUESTION = re.compile(
    r"Please choose the correct answer to the question: (?P<question>.*?)"
    r"\s+(?P<choices>Answer1: .*)\s+Answer format: .*",
    re.DOTALL,
)

#: CommonsenseQA's dev rows, as many as the paper has (Lv et al. 2025, appendix).
NUM_DEV = 280


def main() -> None:
    """Write the files, and say how many rows each has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/alpaca and the others in it")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    data = arguments.shared / "data"
    alpaca = [row for row in _lines(data / "alpaca/alpaca.jsonl") if UNBIASED & set(row["in"])]
    pool = [{**row, "claude": 5.0 if "claude_t45" in row["in"] else 1.0} for row in alpaca if row["output"].strip()]
    questions = _lines(data / "commonsenseqa/dev.jsonl")
    random.Random(0).shuffle(questions)
    files = {
        "alpaca": pool,
        "gsm8k-dev": _lines(data / "gsm8k/train.jsonl"),
        "gsm8k-test": _lines(data / "gsm8k/test.jsonl"),
        "arc-dev": _questions(data / "arc_challenge/train.json"),
        "arc-test": _questions(data / "arc_challenge/test.json"),
        "commonsenseqa-dev": questions[:NUM_DEV],
        "commonsenseqa-test": questions[NUM_DEV:],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        path = arguments.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows):,} rows")


def _questions(path: Path) -> list[dict[str, Any]]:
    rows = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        found = QUESTION.fullmatch(row["instruction"])
        assert found is not None, row
        choices = [part.strip() for part in re.split(r"Answer\d+: ", found["choices"])[1:]]
        rows.append({"question": found["question"], "choices": choices, "answer": choices[int(row["answer"][-1]) - 1]})
    return rows


def _lines(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


if __name__ == "__main__":
    main()
