"""What the pages of a run and of a benchmark have in common: template, figures, colours, files.

What is shown is untrusted, a pool's rows above all: templates escape every value, and a page's own policy lets nothing
in from outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raise_env.errors import OutputError
from raise_env.files import replaced

from .plots import COLOURS, Plot

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["NOTHING", "TEMPLATES", "css", "divergences_told", "inline", "load_template", "pairs", "write_files"]

#: Stands where there is no value.
NOTHING = "\N{EN DASH}"

#: The folder of templates.
TEMPLATES = Path(__file__).with_name("templates")


def load_template(name: str, *, escapes: bool) -> Template:
    """Return a template of this package; one that escapes what it is given is for pages that a browser opens."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=escapes,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)


def inline(plot: Plot | None) -> dict[str, Any] | None:
    """Return a figure in the two forms that a page has of it; None where there is none."""
    from markupsafe import Markup

    if plot is None:
        return None
    # Drawn by matplotlib, which escapes what it is given.
    wide, narrow = (Markup(plot.svg(narrow=narrow)) for narrow in (False, True))
    return {"description": plot.description, "wide": wide, "narrow": narrow}


def pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return names and values as text; a mapping within one is written as `name=value` pairs."""
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key}={item}" for key, item in value.items())
        elif isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        found.append((str(name), NOTHING if value is None or value == "" else str(value)))
    return found


def css(colour: str) -> str:
    """Return the CSS variable of one of the palette's colours."""
    return next(f"var(--{name})" for name, (light, _) in COLOURS.items() if light == colour)


def divergences_told(learning: int, final: int) -> str:
    """Return a sentence on episodes of learning and final runs whose loss stopped being finite, empty without any."""
    if not learning + final:
        return ""
    return f" The loss stopped being finite in {learning} episodes of learning and in {final} final runs."


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files by name; each appears whole or not at all.

    Raises:
        OutputError: The folder or a file in it cannot be written.
    """
    try:
        for name, content in files.items():
            with replaced(folder / name) as beside:
                beside.write_bytes(content)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"cannot write {folder / name}: {reason}; free the path or choose another.") from error
