"""What training on the whole pool comes to, on several targets: the reference of docs/results/targets.md.

    python benchmarks/full_reference.py --real runs/real --model stories260K-hf --out runs/full --seeds 3

The pool is trained on for three epochs once a seed, for it does not depend on the target, and the adapter is scored on
the dev and test rows of each. The learning rate is, for each target, the one with the lower dev loss with seed 0. Files
are those of real_targets.py; what is in the folder already is not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from raise_env import RaiseSelectEnv
from raise_env.agents import make_agent, run_episode
from raise_env.agents.evaluate import ScorePlan, score_model
from raise_env.agents.runs import FINAL_SEED, final_environment
from raise_env.files import replaced_folder, write_json

TARGETS = ("gsm8k", "arc", "commonsenseqa")
NUM_ROWS = {"dev": 256, "test": 512}

#: That of the runs that it is compared with, and one for a hundred times as many updates.
RATES = (5e-3, 1e-3)


def trained(out: Path, real: Path, model: str, rate: float, seed: int) -> tuple[Path, float]:
    """Return the adapter of a run over the whole pool, and the seconds that it took."""
    folder = out / f"full-{rate:g}-{seed}"
    note = folder / "seconds.json"
    if not note.exists():
        env = RaiseSelectEnv(
            model=model,
            pool=str(real / "alpaca.jsonl"),
            dev=str(real / f"{TARGETS[0]}-dev.jsonl"),
            num_dev=NUM_ROWS["dev"],
            lora={"r": 32, "lora_alpha": 64},
            learning_rate=rate,
            skip_empty=True,
            seed_model=seed,
        )
        agent: Any = make_agent("full")
        env = final_environment(env, agent)
        begun = time.perf_counter()
        run_episode(env, agent, seed=FINAL_SEED + seed, name="full")
        with replaced_folder(folder) as beside:
            env.save_adapter(beside)
            write_json(beside / note.name, time.perf_counter() - begun)
    return folder, json.loads(note.read_text())


def scores(adapter: Path | None, real: Path, model: str, target: str, split: str) -> dict[str, float]:
    """Return the scores of an adapter, or of the bare model, on the rows that `bench` takes with these numbers."""
    plan = ScorePlan(
        model,
        str(real / f"{target}-{split}.jsonl"),
        None if adapter is None else str(adapter),
        metrics=("loss",) if target == "gsm8k" else ("loss", "accuracy", "choice_probability"),
        max_length=256,
        skip_empty=True,
        num_rows=NUM_ROWS[split],
    )
    return {name: metric["value"] for name, metric in score_model(plan)["metrics"].items()}


def main() -> None:
    """Train, score, and write full.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, required=True, help="the folder that real_targets.py wrote")
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    out, real, model = arguments.out, arguments.real, arguments.model
    first = {rate: trained(out, real, model, rate, 0)[0] for rate in RATES}
    dev = {t: {rate: scores(first[rate], real, model, t, "dev")["loss"] for rate in RATES} for t in TARGETS}
    result: dict[str, Any] = {"dev_loss_by_rate": {t: {f"{r:g}": loss for r, loss in dev[t].items()} for t in TARGETS}}
    for target in TARGETS:
        rate = min(dev[target], key=lambda own: dev[target][own])
        runs = [trained(out, real, model, rate, seed) for seed in range(arguments.seeds)]
        result[target] = {
            "rate": rate,
            "base": scores(None, real, model, target, "test"),
            "full": [scores(folder, real, model, target, "test") for folder, _ in runs],
            "seconds": [seconds for _, seconds in runs],
        }
        write_json(out / "full.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
