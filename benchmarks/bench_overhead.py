"""What share of its time `bench` spends outside its runs: reading and writing, statistics, the page.

    python benchmarks/bench_overhead.py --out runs/overhead --seeds 50 --workers 2

Two tasks, two agents that cost nothing but their final run: the shortest runs that there are. What is outside is what
the whole command takes, features apart, times the workers, less what the workers spent in runs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from measure import machine

from raise_env.agents.benchmark import BenchPlan, bench
from raise_env.agents.job import Entry


def main() -> None:
    """Run it and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    plan = BenchPlan(
        {},
        {"random": Entry("random"), "quality": Entry("quality", {"column": "rating"})},
        ("noise-60", "target"),
        arguments.seeds,
    )
    bench(arguments.out / "before", BenchPlan({}, plan.entries, plan.tasks, 1))  # features are computed once
    begun = time.perf_counter()
    bench(arguments.out / "measured", plan, workers=arguments.workers)
    whole = arguments.workers * (time.perf_counter() - begun)
    in_runs = json.loads((arguments.out / "measured" / "run.json").read_text())["seconds"]["runs"]
    num_runs = 4 * arguments.seeds
    print(
        f"{num_runs} runs by {arguments.workers} workers: {whole / num_runs:.2f} s a run and worker, "
        f"{in_runs / num_runs:.2f} s of it in the run; outside {100 * (1 - in_runs / whole):.1f}%. {machine()}"
    )


if __name__ == "__main__":
    main()
