"""The table of docs/results/targets.md, out of what `bench` and full_reference.py wrote.

    python benchmarks/targets_table.py --runs runs/targets runs/less --full runs/full/full.json

A row is an agent: its means over the seeds with Student's 95% intervals, how much lower than random rows' its loss is,
seed by seed, the share of full data's gain over the bare model that its mean reaches, and what a run costs. Seconds are
the least of the runs: those that had the machine most to themselves.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from raise_env.agents.statistics import Interval, mean_interval, paired_difference

TITLES = {
    "gsm8k": "GSM8K, loss of the worked answer",
    "arc": "ARC-Challenge, loss of the right answer",
    "commonsenseqa": "CommonsenseQA, loss of the right answer",
}

#: By what bench calls a score, what full_reference.py calls it.
SCORES = {"test_loss": "loss", "test_choice_probability": "choice_probability", "test_accuracy": "accuracy"}

HEADS = {"test_loss": "test loss", "test_choice_probability": "P(right choice), %", "test_accuracy": "right choices, %"}


def runs_of(folders: list[Path], target: str) -> dict[str, list[dict[str, Any]]]:
    """Return the lines of each agent on a target, by seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        path = folder / target / "results.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            run = json.loads(line)
            found.setdefault(run["agent"], []).append(run)
    return {agent: sorted(runs, key=lambda run: int(run["seed"])) for agent, runs in found.items()}


def shown(interval: Interval, name: str) -> str:
    """Return a mean with its interval, as text; of one run the number alone."""
    scale, digits = (100, 1) if name != "test_loss" else (1, 3)
    spread = f" ± {scale * interval.half_width:.{digits}f}" if interval.has_ends else ""
    return f"{scale * interval.value:.{digits}f}{spread}"


def table(target: str, agents: dict[str, list[dict[str, Any]]], full: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a target's table, lowest loss first."""
    base = full["base"]
    best = {name: np.array([run[own] for run in full["full"]]) for name, own in SCORES.items() if own in base}
    names = list(best)
    yield f"### {TITLES[target]}"
    yield ""
    yield f"| | {' | '.join(HEADS[name] for name in names)} | less than random | share of full's gain | Phi | seconds |"
    yield f"|---|{'---|' * (len(names) + 4)}"
    gain = base["loss"] - best["test_loss"].mean()
    rows = [(base["loss"], "before", [_plain(base[SCORES[name]], name) for name in names], "", "0", "", "")]
    cells = [shown(mean_interval(best[name]), name) for name in names]
    label = f"full, 3 epochs, rate {full['rate']:g}{', one seed' if len(full['full']) == 1 else ''}"
    rows.append((best["test_loss"].mean(), label, cells, "", "100%", "1.00", f"{min(full['seconds']):.0f}"))
    for agent, runs in agents.items():
        values = {name: np.array([run[name] for run in runs], dtype=float) for name in names}
        same = agents["random"]
        assert [run["seed"] for run in runs] == [run["seed"] for run in same], f"{target}, {agent}: other seeds"
        ahead = paired_difference(np.array([run["test_loss"] for run in same], dtype=float), values["test_loss"])
        rows.append(
            (
                values["test_loss"].mean(),
                agent,
                [shown(mean_interval(values[name]), name) for name in names],
                "" if agent == "random" else shown(ahead, "test_loss"),
                f"{(base['loss'] - values['test_loss'].mean()) / gain:.0%}",
                f"{np.mean([run['phi'] for run in runs]):.2f}",
                f"{min(sum(run['seconds'].values()) for run in runs):.0f}",
            )
        )
    for _, agent, cells, ahead, share, phi, seconds in sorted(rows):
        yield f"| {' | '.join([agent, *cells, ahead, share, phi, seconds])} |"
    yield ""


def _plain(value: float, name: str) -> str:
    return f"{value:.3f}" if name == "test_loss" else f"{100 * value:.1f}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders with one of bench for each target")
    parser.add_argument("--full", type=Path, required=True, help="full.json of full_reference.py")
    arguments = parser.parse_args()
    full = json.loads(arguments.full.read_text(encoding="utf-8"))
    for target in TITLES:
        agents = runs_of(arguments.runs, target)
        if agents and target in full:
            sys.stdout.write("\n".join(table(target, agents, full[target])) + "\n")


if __name__ == "__main__":
    main()
