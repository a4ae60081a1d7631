"""Write docs/api.md: every public name with the first line of its docstring.

`make api` runs this; tests/test_docs.py holds the page to what it would write.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"

HEAD = """# Public names

Every name here has a docstring with meaning, shapes, units, errors and sources: `help(name)` shows it. Names that are
not listed may change without notice; [architecture.md](architecture.md) says what the modules behind them do. The
command line is documented by `raise-env --help`, and what it reads and writes by [files.md](files.md).

Written by `make api`.
"""

#: Modules with public names, and what each is for.
MODULES = {
    "raise_env": "The environment",
    "raise_env.vector": "Many environments over one base model",
    "raise_env.record": "Episode records",
    "raise_env.testing": "An environment without a language model, for unit tests",
    "raise_env.errors": "Errors that a user can act on",
    "raise_env.agents": "Agents",
    "raise_env.agents.base": "To write an agent",
    "raise_env.agents.statistics": "What many runs say together",
    "raise_env.agents.significance": "Tests of paired runs",
}

#: Classes of which the public methods are listed too: those that other packages have no names for.
OPEN = ("RaiseSelectEnv",)


def page() -> str:
    """Return the whole page."""
    return HEAD + "".join(text for name, what in MODULES.items() for text in section(name, what))


def section(name: str, what: str) -> Iterator[str]:
    """Yield a module's heading and tables."""
    module = importlib.import_module(name)
    entries = [entry for entry in module.__all__ if is_listed(name, getattr(module, entry))]
    yield f"\n## {what}: `{name}`\n\n| name | what it is |\n|---|---|\n"
    yield from (line(entry, getattr(module, entry)) for entry in sorted(entries, key=str.lower))
    for entry in (entry for entry in OPEN if entry in entries):
        yield f"\n### `{entry}`\n\n| member | what it is |\n|---|---|\n"
        members = sorted(inspect.getmembers_static(getattr(module, entry)))
        yield from (line(member, value) for member, value in members if is_own(member, value))


def is_listed(module: str, value: Any) -> bool:
    """Return whether a name of a module is for users: of the errors' module, only what can be caught."""
    return documented(value) and (module != "raise_env.errors" or isinstance(value, type))


def is_own(name: str, value: Any) -> bool:
    """Return whether a member of a class is public, and this package's rather than Gymnasium's."""
    function = value.fget if isinstance(value, property) else value
    is_here = str(getattr(function, "__module__", None)).startswith("raise_env.")
    return is_here and not name.startswith("_") and documented(value)


def documented(value: Any) -> bool:
    """Return whether a value is a class, function or property: a constant says what it is by its name and value."""
    return (inspect.isroutine(value) or isinstance(value, (type, property))) and bool(inspect.getdoc(value))


def line(name: str, value: Any) -> str:
    """Return a table's line for a name."""
    first = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
    return f"| `{name}` | {first} |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
