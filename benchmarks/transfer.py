"""What a selector that was learned on one pool is worth on another.

    python benchmarks/transfer.py --out runs/transfer --seeds 3
    python benchmarks/transfer.py --out runs/transfer_real --seeds 3 --runs 1 --model stories260K-hf \
        --real runs/real --learned runs/targets

For each seed a selector learns at home and chooses away, where it is compared with random rows, with a selector that
learned there (but for halves of one pool, which are alike), and on embedded pools with the oracle. It chooses twice:
shown the other pool in the units of the one that it learned on, as `finetune --selector` does, and in those of the
other pool, which is what would be seen without that. All final runs of a seed are offered the same candidates. Real
data are the files of real_targets.py; selectors that `bench` learned on them, a folder for each target, are taken as
they are. Lines of results.jsonl that are there already are not made again. docs/results/transfer.md has the outcome.
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
        has_oracle: Whether labels are known there.
        has_native: Whether a selector learns there too, to be compared with.
        learned_home: The folder of a selector that has learned at home already.
        learned_away: The same, away.
    """

    name: str
    home: dict[str, Any]
    away: dict[str, Any]
    has_oracle: bool = True
    has_native: bool = True
    learned_home: Path | None = None
    learned_away: Path | None = None


def embedded_cases(folder: Path, seed: int) -> Iterator[Case]:
    """Yield pools that differ from the one of learning in one thing each; their facts are drawn anew."""
    task = EmbeddedTask()
    others = {
        "another draw": task,
        "other target skills": replace(task, target_skills=OTHER_SKILLS),
        "30% corrupted": replace(task, corruption=0.3),
        "90% corrupted": replace(task, corruption=0.9),
    }
    home = _written(folder / f"home-{seed}", "home", task, seed)
    for name, other in others.items():
        yield Case(name, home, _written(folder / f"{name.replace(' ', '-')}-{seed}", name, other, 1000 + seed))


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
    halves = [_write(folder / f"half-{index}.jsonl", rows[index::2]) for index in range(2)]
    model = {"model": arguments.model, **REAL_SETTINGS}
    first, second = ({**model, "pool": half, **targets["gsm8k"]} for half in halves)
    for home, away in PAIRS:
        selectors = [arguments.learned / target / "selectors/own/raise_fork" / str(seed) for target in (home, away)]
        whole = {**model, "pool": str(real / "alpaca.jsonl")}
        settings = [{**whole, **targets[target]} for target in (home, away)]
        yield Case(f"{away}, learned on {home}", *settings, False, True, *selectors)
    # The halves are alike, so what a selector is worth on its own stands for what one would be that learned there.
    yield Case("its own half of Alpaca", first, first, has_oracle=False, has_native=False)
    yield Case("the other half of Alpaca", first, second, has_oracle=False, has_native=False)


def _write(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def learned_on(settings: dict[str, Any], seed: int, folder: Path | None) -> RaiseFork:
    """Return a selector that has learned on a pool, now or before."""
    if folder is not None:
        return RaiseFork.load(folder)
    return RaiseFork().learn(RaiseSelectEnv(**settings), RaiseFork.default_episodes, seed=seed)


def measure(case: Case, seed: int, learned: RaiseFork, num_runs: int) -> dict[str, list[float]]:
    """Return the test losses of each way to choose away from home."""
    away = RaiseSelectEnv(**case.away)
    agents: dict[str, Any] = {"random": make_agent("random"), "learned at home": learned}
    if case.away["pool"] != case.home["pool"]:
        as_it_is = copy.copy(learned)
        as_it_is.view = None  # so that nothing is translated
        agents["the same, in the other pool's units"] = as_it_is
    if case.has_native:
        agents["learned there"] = learned_on(case.away, seed, case.learned_away)
    if case.has_oracle:
        agents["oracle"] = make_agent("oracle")
    seeds = [1000 * (seed + 1) + run for run in range(num_runs)]
    return {name: [_test_loss(away, agent, own, name) for own in seeds] for name, agent in agents.items()}


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
        learned: dict[str, RaiseFork] = {}  # by home, which several cases share
        data = arguments.out / "data"
        cases = real_cases(data, arguments, seed) if arguments.real else embedded_cases(data, seed)
        for case in cases:
            if (case.name, seed) in done:
                continue
            home = json.dumps(case.home)
            learned[home] = learned.get(home) or learned_on(case.home, seed, case.learned_home)
            test_loss = measure(case, seed, learned[home], arguments.runs)
            lines.append({"case": case.name, "seed": seed, "test_loss": test_loss})
            append_line(results, json.dumps(lines[-1]))
    sys.stdout.write(table(lines) + "\n")


if __name__ == "__main__":
    main()
