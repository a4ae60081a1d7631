"""Print pip constraints that hold each direct dependency at the lowest version that pyproject.toml allows.

`make test-lowest` installs by them and runs the tests. Torch stays at the version of constraints.txt: older CPU builds
are not to be had from every index, and another build is gigabytes of CUDA.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def lowest() -> Iterator[str]:
    """Yield `name==version` for what the package and its tests ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for line in dict.fromkeys(project["dependencies"] + project["optional-dependencies"]["test"]):
        name, version = re.fullmatch(r"([\w.-]+)>=([\d.]+)(?:,<[\d.]+)?", line).groups()
        if name != "torch":
            yield f"{name}=={version}"
    yield next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))


if __name__ == "__main__":
    print("\n".join(lowest()))
