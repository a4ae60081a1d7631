"""The hub, where models and data sets come from: asked without a note to the user for every try, nor a long wait."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["ANSWER_S", "hub_in_reach", "quiet_hub"]

#: How long the hub may take for its first answer, in seconds.
ANSWER_S = 5.0

#: The hub's libraries know one offline mode for the whole process.
_OFFLINE_LOCK = threading.RLock()


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


@contextlib.contextmanager
def hub_in_reach() -> Iterator[None]:
    """Ask the hub for what is loaded meanwhile, or, where it does not answer, only what it left on this machine.

    Its library tries six times and waits half a minute in all before it says that there is no network.
    """
    from huggingface_hub import constants

    with _OFFLINE_LOCK, quiet_hub():
        modules: list[Any] = [constants, *filter(None, [sys.modules.get("datasets.config")])]
        before = [module.HF_HUB_OFFLINE for module in modules]
        if not constants.HF_HUB_OFFLINE and not _answers(constants.ENDPOINT):
            for module in modules:
                module.HF_HUB_OFFLINE = True
        try:
            yield
        finally:
            for module, value in zip(modules, before, strict=True):
                module.HF_HUB_OFFLINE = value


def _answers(address: str) -> bool:
    from huggingface_hub import get_session

    try:
        get_session().head(address, timeout=ANSWER_S)
    except Exception:  # of whichever HTTP library the hub's own is built on: httpx by now, requests before
        return False
    return True
