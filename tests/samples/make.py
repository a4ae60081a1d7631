"""Make the samples anew: a little of everything that raise-env writes and later versions must still read.

    python tests/samples/make.py

A new sample goes beside the old ones, into a folder by the version that wrote it: what a release wrote is never written
over. tests/test_samples.py loads and replays each.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from raise_env import RaiseSelectEnv, __version__
from raise_env.agents import run_episode
from raise_env.agents.benchmark import BenchPlan, bench
from raise_env.agents.catalogue import make_agent
from raise_env.agents.job import Entry

#: The embedded task, made small.
SETTINGS: dict[str, Any] = {
    "pool_size": 64,
    "num_candidates": 16,
    "num_classes": 2,
    "batch_size": 4,
    "horizon": 3,
    "num_dev": 8,
    "num_test": 8,
    "auxiliary_updates": 2,
    "device": "cpu",
}

#: Agents that learn, by the name of their selector's folder: what they are made with, kept to a few KB.
LEARNING: dict[str, tuple[str, dict[str, Any]]] = {
    "raise_fork": ("raise_fork", {"num_networks": 2, "hidden_dims": [8], "num_rows": 16, "num_lookahead": 2}),
    "raise_ppo": ("raise_ppo", {"hidden_dims": [8]}),
    "sb3": ("sb3:PPO", {"policy_kwargs": {"net_arch": {"pi": [8], "vf": [8]}}, "n_steps": 3, "batch_size": 3}),
}


def make(folder: Path) -> None:
    """Write all samples into a folder."""
    os.environ["RAISE_ENV_CACHE"] = str(folder / "cache")  # not a setting: selectors tell those that they learned with
    env = RaiseSelectEnv(**SETTINGS)
    records = []
    for name, (agent_name, arguments) in LEARNING.items():
        agent: Any = make_agent(agent_name, arguments)
        agent.learn(env, 1, seed=0)
        agent.save(folder / name)
        records.append(run_episode(env, agent, seed=1, name=name).to_json())
    (folder / "episodes.jsonl").write_text("".join(f"{line}\n" for line in records), encoding="utf-8")
    for lock in (folder / "cache").glob("*.lock"):
        lock.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        entries = {name: Entry(name, {}, 0) for name in ("random", "oracle")}
        bench(Path(scratch) / "bench", BenchPlan(SETTINGS, entries, num_seeds=2))
        (folder / "bench").mkdir()
        for name in ("run.json", "results.jsonl", "episodes.jsonl", "summary.json"):
            shutil.copy(Path(scratch) / "bench" / name, folder / "bench" / name)


if __name__ == "__main__":
    target = Path(__file__).resolve().parent / __version__
    if target.exists():
        raise SystemExit(f"{target} is there: a sample is never written over. Raise the version, or remove the folder.")
    target.mkdir()
    make(target)
