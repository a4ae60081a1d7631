import contextlib
import logging
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import logging as hub_logging

from raise_env import hub
from raise_env.hub import hub_in_reach, quiet_hub


def test_quiet_hub__notes_of_tries__are_not_shown_and_errors_are():
    logger = hub_logging.get_logger("huggingface_hub.utils._http")
    before = hub_logging.get_verbosity()
    with quiet_hub():
        assert not logger.isEnabledFor(logging.WARNING)
        assert logger.isEnabledFor(logging.ERROR)
    assert hub_logging.get_verbosity() == before


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A network on which "http://here" answers; returns what was asked."""
    addresses: list[str] = []

    def head(address: str, timeout: float) -> None:
        assert timeout == hub.ANSWER_S
        addresses.append(address)
        if address != "http://here":
            raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.get_session", lambda: SimpleNamespace(head=head))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return addresses


def test_hub_in_reach__no_answer__is_not_tried_again(asked: list[str], monkeypatch: pytest.MonkeyPatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://nowhere")
    with contextlib.suppress(ZeroDivisionError), hub_in_reach():
        assert constants.is_offline_mode()
        assert datasets.config.HF_HUB_OFFLINE
        raise ZeroDivisionError
    assert asked == ["http://nowhere"]
    assert not constants.is_offline_mode()
    assert not datasets.config.HF_HUB_OFFLINE


def test_hub_in_reach__an_answer__changes_nothing(asked: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://here")
    with hub_in_reach():
        assert not constants.is_offline_mode()
    assert asked == ["http://here"]


def test_hub_in_reach__told_to_be_offline__asks_nobody(asked: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with hub_in_reach():
        assert constants.is_offline_mode()
    assert not asked
    assert constants.is_offline_mode()
