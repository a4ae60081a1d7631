"""Text from files and names within Markdown: it stays text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from raise_env.errors import printable

__all__ = ["escaped", "table"]

#: What opens code, columns, tags or entities, and what makes a link, a picture or a definition of brackets.
_MARKUP = re.compile(r"[\\`|<>&]|(?<=\])[(\[:]|!(?=\[)")


def escaped(text: str) -> str:
    """Return a text on one line that Markdown shows as it is, in a paragraph or a table's cell."""
    return _MARKUP.sub(r"\\\g<0>", printable(" ".join(text.split())))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], rule: Sequence[str] | None = None) -> str:
    """Return a table.

    Args:
        header: Names of the columns.
        rows: Cells by row.
        rule: What stands below the header, by column; None: all to the left.
    """
    lines = [list(map(escaped, header)), rule or ["---"] * len(header), *(map(escaped, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
