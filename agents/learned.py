"""What learned selectors have in common: what they learned on, and how they look at another pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym

from raise_env import EnvConfig, RaiseSelectEnv
from raise_env.errors import RecordError, SettingError
from raise_env.pool import Pool

from .base import BatchAgent, world_of
from .feature_view import FeatureView, Translation, as_it_is

__all__ = ["NOT_LEARNED", "Selector", "stored_view"]

#: What is said of a selector that could do nothing but act, and has learned nothing.
NOT_LEARNED = (
    "it has learned nothing yet, and is to learn for 0 episodes. Give it some, or name one that has learned, "
    "selector:DIR. (Of the agents of train the first alone learns, and not those that it is compared with; bench lets "
    "all learn.)"
)


class Selector(BatchAgent):
    """A batch agent that learns F, a score of each row by its features.

    Attributes:
        episode_returns: The return of each episode of learning.
        training: What it learned on, for the reader of its config.json.
        view: The features that it learned on; None before it has learned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.episode_returns: list[float] = []
        self.training: dict[str, Any] = {}
        self.view: FeatureView | None = None
        self._translate: Translation = as_it_is

    def check(self, config: EnvConfig, pool: Pool, episodes: int) -> None:
        """Refuse to act without ever having learned.

        Raises:
            SettingError: It has not, and is to learn for no episodes.
        """
        del config, pool
        if not episodes and self.view is None:
            raise SettingError(NOT_LEARNED)

    def begin(self, env: gym.Env[Any, Any], seed: int) -> None:
        """Take note of the environment to act in, which may offer another pool than that of learning.

        Raises:
            SettingError: Its features are not those that the selector learned on.
        """
        super().begin(env, seed)
        self._translate = as_it_is if self.view is None else self.view.translation(world_of(env))

    def _note_training(self, world: RaiseSelectEnv, seed: int) -> None:
        """Keep what is learned on.

        Raises:
            SettingError: It has learned before, on features in other units.
        """
        if self.view is not None and not self.view.is_that_of(world):
            raise SettingError(
                "this selector has learned on the features of another pool, and what it saw there cannot be put beside "
                "what it would see here: let it act here as it is, or a new one learn."
            )
        self.view = FeatureView.of(world)
        self.training = {"env": world.config.to_kwargs(), "content": world.assets.content, "seed": seed}


def stored_view(config: dict[str, Any], path: Path) -> FeatureView | None:
    """Return the features that a selector's config.json names; None where it had not learned yet.

    Raises:
        RecordError: They are not those of this version, or not as promised.
    """
    if config.get("features") is None:
        return None
    try:
        return FeatureView.read(config["features"], path.parent)
    except (TypeError, ValueError) as error:
        raise RecordError(f"{path}: {error}.") from error
