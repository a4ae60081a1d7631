"""What a selector that was learned on one pool is worth on another.

    python benchmarks/transfer.py --out runs/transfer --seeds 3
    python benchmarks/transfer.py --out runs/transfer_real --seeds 3 --runs 1 --model stories260K-hf \
        --real runs/real --learned runs/targets

For each seed a selector learns at home and chooses away, where it is compared with random rows and with a selector that
learned there (but for halves of one pool, which are alike). On another pool it chooses twice: with features of the
auxiliary model that it carries, as `finetune --selector` does, and with features of one that was made ready on that
pool. Real data are the files of real_targets.py; selectors that `bench` learned on them, a folder for each target, are
taken as they are. What is in the folder already is not made again. docs/results/transfer.md has the outcome.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from raise_env import RaiseSelectEnv
from raise_env.agents import RaiseFork, make_agent, run_episode
from raise_env.agents.feature_view import AUXILIARY
from raise_env.agents.statistics import mean_interval
from raise_env.files import append_line
from raise_env.tiny.task import EmbeddedTask, generate_task

OTHER_SKILLS = ("next", "opposite", "capital", "letter")

#: Those of docs/results/targets.md.
REAL_SETTINGS = {
    "horizon": 60,
    "num_candidates": 256,
    "learning_rate": 5e-3,
    "lora": {"r": 32, "lora_alpha": 64},
    "score_every": 5,
    "num_dev": 256,
    "num_test": 512,
    "skip_empty": True,
}


#: Where a selector has learned, and the target that it then chooses for, from the same pool.
PAIRS = (("gsm8k", "arc"), ("gsm8k", "commonsenseqa"), ("commonsenseqa", "gsm8k"))


@dataclass(frozen=True)
class Case:
    """Where a selector learns, and where it then chooses: keywords of the environment.

    Attributes:
        name: What is said of it.
        home: Where the selector learns.
        away: Where it chooses.
        learned_home: The folder of the selector that learns at home.
        learned_away: That of one that learns away, to be compared with; None where none does.
    """

    name: str
    home: dict[str, Any]
    away: dict[str, Any]
    learned_home: Path
    learned_away: Path | None


def embedded_cases(folder: Path, seed: int) -> Iterator[Case]:
    """Yield pools that differ from the one of learning in one thing each; their facts are drawn anew."""
    task = EmbeddedTask()
    others = {
        "another draw": task,
        # As many test rows as these skills have facts for.
        "other target skills": replace(task, target_skills=OTHER_SKILLS, num_test=160),
        "30% corrupted": replace(task, corruption=0.3),
        "90% corrupted": replace(task, corruption=0.9),
    }
    home = _written(folder / "data" / f"home-{seed}", "home", task, seed)
    selectors = folder / "selectors"
    for name, other in others.items():
        label = f"{name.replace(' ', '-')}-{seed}"
        away = _written(folder / "data" / label, name, other, 1000 + seed)
        yield Case(name, home, away, selectors / f"home-{seed}", selectors / label)


def _written(folder: Path, name: str, task: EmbeddedTask, seed: int) -> dict[str, Any]:
    data = generate_task(name, seed=seed, task=task)
    splits = {"pool": data.pool, "dev": data.dev, "test": data.test}
    return {split: _write(folder / f"{split}.jsonl", [row.fields for row in rows]) for split, rows in splits.items()}


def real_cases(folder: Path, arguments: argparse.Namespace, seed: int) -> Iterator[Case]:
    """Yield other targets, and the other half of the pool."""
    real = arguments.real
    targets = {
        target: {split: str(real / f"{target}-{split}.jsonl") for split in ("dev", "test")}
        for target in ("gsm8k", "arc", "commonsenseqa")
    }
    rows = [json.loads(line) for line in (real / "alpaca.jsonl").read_text(encoding="utf-8").splitlines()]
    halves = [_write(folder / "data" / f"half-{index}.jsonl", rows[index::2]) for index in range(2)]
    model = {"model": arguments.model, **REAL_SETTINGS}
    first, second = ({**model, "pool": half, **targets["gsm8k"]} for half in halves)
    for home, away in PAIRS:
        selectors = [arguments.learned / target / "selectors/own/raise_fork" / str(seed) for target in (home, away)]
        whole = {**model, "pool": str(real / "alpaca.jsonl")}
        settings = [{**whole, **targets[target]} for target in (home, away)]
        yield Case(f"{away}, learned on {home}", *settings, *selectors)
    # The halves are alike, so what a selector is worth on its own stands for what one would be that learned there.
    own = folder / "selectors" / f"half-{seed}"
    yield Case("its own half of Alpaca", first, first, own, None)
    yield Case("the other half of Alpaca", first, second, own, None)


def _write(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def learned_on(settings: dict[str, Any], seed: int, folder: Path) -> RaiseFork:
    """Return the selector of a folder; it learns where there is none yet."""
    if not (folder / "config.json").exists():
        learner = RaiseFork()
        learner.learn(RaiseSelectEnv(**settings), RaiseFork.default_episodes, seed=seed).save(folder)
    return RaiseFork.load(folder)


def measure(case: Case, seed: int, num_runs: int) -> dict[str, list[float]]:
    """Return the test losses of each way to choose away from home."""
    learned = learned_on(case.home, seed, case.learned_home)
    own = away = RaiseSelectEnv(**case.away)
    if case.away["pool"] != case.home["pool"]:
        away = RaiseSelectEnv(**case.away, auxiliary_adapter=str(case.learned_home / AUXILIARY))
    ways: dict[str, tuple[RaiseSelectEnv, Any]] = {
        "random": (away, make_agent("random")),
        "learned at home": (away, learned),
    }
    if away is not own and learned.view is not None:
        bare = copy.copy(learned)
        bare.view = replace(learned.view, adapter=None)  # so that other features are not refused
        ways["the same, features made there"] = own, bare
    if case.learned_away is not None:
        ways["learned there"] = own, learned_on(case.away, seed, case.learned_away)
    seeds = [1000 * (seed + 1) + run for run in range(num_runs)]
    return {name: [_test_loss(*way, run, name) for run in seeds] for name, way in ways.items()}


def _test_loss(env: RaiseSelectEnv, agent: Any, seed: int, name: str) -> float:
    run_episode(env, agent, seed=seed, name=name)
    return env.evaluate("test").loss


def table(lines: list[dict[str, Any]]) -> str:
    """Return the means over seeds with their intervals, as Markdown."""
    names = list(dict.fromkeys(name for line in lines for name in line["test_loss"]))
    rows = [f"| away | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for case in dict.fromkeys(line["case"] for line in lines):
        own = [line["test_loss"] for line in lines if line["case"] == case]
        cells = []
        for name in names:
            values = np.array([np.mean(seed[name]) for seed in own if name in seed])
            interval = mean_interval(values)
            cells.append(f"{interval.value:.3f} ± {interval.half_width:.3f}" if len(values) else "")
        rows.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=3, help="final runs of each way to choose")
    parser.add_argument("--real", type=Path, help="the folder that real_targets.py wrote, instead of embedded pools")
    parser.add_argument("--model", help="with --real, the model that is trained")
    parser.add_argument("--learned", type=Path, help="with --real, folders of bench by target, with selectors in them")
    arguments = parser.parse_args()
    results = arguments.out / "results.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {(line["case"], line["seed"]) for line in lines}
    for seed in range(arguments.seeds):
        cases = real_cases(arguments.out, arguments, seed) if arguments.real else embedded_cases(arguments.out, seed)
        for case in cases:
            if (case.name, seed) not in done:
                lines.append({"case": case.name, "seed": seed, "test_loss": measure(case, seed, arguments.runs)})
                append_line(results, json.dumps(lines[-1]))
    sys.stdout.write(table(lines) + "\n")


if __name__ == "__main__":
    main()
