"""Run all benchmarks of speed and memory, one after the other, and write docs/results/speed.md.

Each runs in a process of its own. One that fails, or refuses to report because its sides computed different numbers, is
named in the page and ends this one with status 1.

    make bench-speed
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

from raise_env.files import write_text

HERE = Path(__file__).resolve().parent

#: The scripts in the order of the page, with what they are given.
SCRIPTS: tuple[tuple[str, ...], ...] = (
    ("step.py",),
    ("forks.py",),
    ("forks.py", "--threads", "1"),
    ("vector.py", "--repeats", "3", "--processes", "2", "4"),
    ("features.py",),
    ("pool_size.py", "--rows", "200000", "--steps", "20"),
    ("rollout_memory.py",),
    ("startup.py",),
)


def section(script: tuple[str, ...], environment: dict[str, str]) -> tuple[str, bool]:
    """Run a script; return its part of the page, and whether it reported."""
    command = [sys.executable, str(HERE / script[0]), *script[1:]]
    print(f"{' '.join(script)} ...", file=sys.stderr, flush=True)
    start = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(f"  {time.monotonic() - start:.0f} s", file=sys.stderr)
    text = done.stdout.strip()
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        text = f"{text}\n\nNot reported: {reason[0]}".strip()
        print(done.stderr, file=sys.stderr)
    title = (HERE / script[0]).read_text(encoding="utf-8").partition('"""')[2].partition("\n")[0].rstrip('."')
    given = ["DIR" if before == "--real" else value for before, value in itertools.pairwise(script)]
    shown = " ".join(("python", f"benchmarks/{script[0]}", *given))
    return f"## {title}\n\n`{shown}`\n\n{text}\n", done.returncode == 0


def main() -> int:
    """Run all and write the page; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "results" / "speed.md")
    parser.add_argument("--real", type=Path, help="folder with models/stories260K-hf and data, for a real model too")
    arguments = parser.parse_args()
    scripts = list(SCRIPTS)
    if arguments.real is not None:
        scripts.insert(1, ("step.py", "--real", str(arguments.real), "--steps", "12"))
    environment = {**os.environ, "GOMP_SPINCOUNT": "30000", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # as the commands have
    sections = [section(script, environment) for script in scripts]
    heading = (
        "# Speed and size\n\n"
        f"Written by `make bench-speed` on {datetime.date.today()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}. Sides took turns in one process; what counts is the ratios. "
        "What holds them where they are: [../speed.md](../speed.md).\n"
    )
    write_text(arguments.out, "\n".join([heading, *(text for text, _ in sections)]))
    print(f"written: {arguments.out}", file=sys.stderr)
    return 0 if all(good for _, good in sections) else 1


if __name__ == "__main__":
    sys.exit(main())
