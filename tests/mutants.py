"""Change the sources in small ways, one at a time, and see whether the tests notice: `make mutants`.

mutmut does it, for it forks a process that has everything loaded already: a mutant costs its tests and no import of
torch. It wants packages where their names say, so a copy of the project is laid out as it is installed, with
raise_env.agents in raise_env/agents. What is changed, and by which tests it has to be noticed, is in pyproject.toml.

docs/results/mutants.md tells what was found, and of each mutant that lives why it may.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / ".mutants"


def lay_out() -> None:
    """Copy sources and tests as they are installed; what earlier runs found stays, for what has not changed."""
    for source, target in {"raise_env": "raise_env", "agents": "raise_env/agents", "tests": "tests"}.items():
        shutil.copytree(
            ROOT / source, COPY / target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "samples")
        )
    shutil.copy(ROOT / "pyproject.toml", COPY / "pyproject.toml")


def main() -> int:
    """Run mutmut on the copy, with what else is given to it, and list what lives."""
    lay_out()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    mutmut = str(Path(sys.executable).with_name("mutmut"))
    done = subprocess.run([mutmut, "run", *sys.argv[1:]], cwd=COPY, env=environment, check=False)
    subprocess.run([mutmut, "results"], cwd=COPY, env=environment, check=False)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
