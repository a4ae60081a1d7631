"""The hub, where models and data sets come from: asked without a note to the user for every try."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

__all__ = ["quiet_hub"]


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep the hub's library from telling of each of its tries: what came of them is one error, or nothing."""
    from huggingface_hub.utils import logging as hub_logging

    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)
