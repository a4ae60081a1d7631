"""From a data set of the hub to rows, by the library `datasets`, which keeps what it has downloaded."""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass

from .errors import DataError, excerpt
from .hub import hub_in_reach
from .row_files import Row, plain_row

__all__ = ["HubName", "rows_of_dataset"]

_NAME = re.compile(
    r"(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<config>[^/@:]+))?(?:@(?P<revision>[^:]+))?(?::(?P<split>.+))?"
)


@dataclass(frozen=True, slots=True)
class HubName:
    """A data set of the hub: owner/name[/config][@revision][:split]."""

    repository: str
    config: str | None = None
    revision: str | None = None
    split: str | None = None

    @classmethod
    def parse(cls, source: str) -> HubName | None:
        """Return what a text names, or None where it cannot be such a name."""
        found = _NAME.fullmatch(source)
        return cls(**found.groupdict()) if found else None


def rows_of_dataset(source: str) -> Generator[tuple[int, Row]]:
    """Yield each row's number, from 1, and the row.

    Args:
        source: A name that `HubName.parse` takes.

    Raises:
        DataError: There is no such data set, it has several splits and none is named, or it cannot be loaded.
        DataError: Bytes in a row are no text.
    """
    import datasets

    name = HubName.parse(source)
    assert name is not None
    try:
        with hub_in_reach():
            split = name.split or _only_split(source, name)
            table = datasets.load_dataset(name.repository, name.config, split=split, revision=name.revision)
        for number, row in enumerate(table, start=1):
            yield number, plain_row(row, f"{source}, row {number}")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{source}: there is no such file, and as a data set of the hub it cannot be loaded "
            f"({excerpt(str(error), 300)}). Check the name, owner/name[/config][@revision][:split], and the network."
        ) from error


def _only_split(source: str, name: HubName) -> str:
    import datasets

    splits = datasets.get_dataset_split_names(name.repository, name.config, revision=name.revision)
    if len(splits) != 1:
        raise DataError(
            f"{source}: found the splits {', '.join(splits) or 'none'}; expected one of them by name. "
            f"Write {source}:{splits[0] if splits else 'SPLIT'}."
        )
    return str(splits[0])
