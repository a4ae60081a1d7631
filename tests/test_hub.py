import logging

from huggingface_hub.utils import logging as hub_logging

from raise_env.hub import quiet_hub


def test_quiet_hub__notes_of_tries__are_not_shown_and_errors_are():
    logger = hub_logging.get_logger("huggingface_hub.utils._http")
    before = hub_logging.get_verbosity()
    with quiet_hub():
        assert not logger.isEnabledFor(logging.WARNING)
        assert logger.isEnabledFor(logging.ERROR)
    assert hub_logging.get_verbosity() == before
