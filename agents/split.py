"""What `split` does: one file of rows into a pool, a dev and a test set, so that no row is in two of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from raise_env.errors import OutputError, SettingError
from raise_env.files import prepare_folder, write_text
from raise_env.pool import Pool

__all__ = ["split_rows", "write_split"]


def split_rows(rows: Pool, sizes: Mapping[str, int], seed: int) -> dict[str, list[int]]:
    """Return the places of the rows of each part, at random, in the order of the file; "pool" is what is left.

    Rows of the same text go to the same part, all of them: a copy in the pool would tell what is asked in the test. A
    part has at least as many rows as it is to have, and more only by such copies.

    Args:
        rows: All of them.
        sizes: How many rows parts are to have, by name, in the order in which they are drawn.
        seed: What the draw begins from.

    Raises:
        SettingError: Nothing would be left for the pool.
    """
    texts: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        texts.setdefault(row.content_hash, []).append(place)
    groups = list(texts.values())
    order = iter(np.random.default_rng(seed).permutation(len(groups)))
    parts: dict[str, list[int]] = {}
    for name, size in sizes.items():
        part: list[int] = []
        while len(part) < size and (group := next(order, None)) is not None:
            part += groups[group]
        parts[name] = sorted(part)
    left = sorted(place for group in order for place in groups[group])
    if not left:
        raise SettingError(
            f"{rows.source} has {len(rows)} rows, and {sum(sizes.values())} were asked for dev and test: nothing is "
            "left for the pool. Ask for fewer."
        )
    return {"pool": left, **parts}


def write_split(rows: Pool, sizes: Mapping[str, int], seed: int, folder: Path) -> dict[str, tuple[Path, int]]:
    """Write pool.jsonl and a file for each part, rows as they were read; return each file and its number of rows.

    Raises:
        OutputError: A file is there already, or the folder cannot be written.
        SettingError: Nothing would be left for the pool.
    """
    parts = split_rows(rows, sizes, seed)
    prepare_folder(folder)
    paths = {name: folder / f"{name}.jsonl" for name in parts}
    for path in paths.values():
        if path.exists():
            raise OutputError(f"{str(path)!r} is there already: name another folder with --out, or remove it.")
    for name, places in parts.items():
        lines = (json.dumps(dict(rows[place].fields), ensure_ascii=False) + "\n" for place in places)
        write_text(paths[name], "".join(lines))
    return {name: (paths[name], len(places)) for name, places in parts.items()}
