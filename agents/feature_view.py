"""What a selector saw while it learned, and how other pools are shown to it in the same terms.

A selector is a function of 39 columns. On another pool it means what it meant only if the columns do: computed by the
same auxiliary model, and in the units of the pool that it learned on rather than of the one that it chooses from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from raise_env import EnvConfig, RaiseSelectEnv
from raise_env.errors import SettingError
from raise_env.features import BLOCKS, CLIP, FEATURE_NAMES, NUM_STATIC, SCHEMA_VERSION, STATIC

__all__ = ["FeatureView", "Translation", "as_it_is"]

Translation = Callable[[np.ndarray], np.ndarray]


def as_it_is(observation: np.ndarray) -> np.ndarray:
    """Translate nothing: for what has learned on nothing else, or not yet."""
    return observation


@dataclass(frozen=True, slots=True, eq=False)
class FeatureView:
    """The features that a selector learned on.

    Attributes:
        auxiliary: The model that computed them, as `EnvAssets.auxiliary` names it.
        mean: What was subtracted from the static columns, shape (36,), float32.
        std: What they were divided by, shape (36,), float32.
        hide: The blocks that were shown as zeros.
    """

    auxiliary: Mapping[str, str | int]
    mean: np.ndarray
    std: np.ndarray
    hide: tuple[str, ...] = ()

    @classmethod
    def of(cls, world: RaiseSelectEnv) -> FeatureView:
        """Return how an environment shows its rows."""
        features = world.assets.features
        return cls(world.assets.auxiliary, features.mean, features.std, world.config.hide)

    @classmethod
    def from_json(cls, value: Any) -> FeatureView:
        """Return what `to_json` gave.

        Raises:
            ValueError: It is something else, or the columns are not those of this version.
        """
        if not isinstance(value, dict) or value.get("names") != list(FEATURE_NAMES):
            raise ValueError("the selector was learned on other features; learn it again with this version")
        if value.get("version") != SCHEMA_VERSION:
            raise ValueError("the selector's features were computed otherwise; learn it again with this version")
        auxiliary, hide = value.get("auxiliary"), value.get("hide")
        if not isinstance(auxiliary, dict) or not isinstance(hide, list) or not set(hide) <= set(BLOCKS):
            raise ValueError("the fields 'auxiliary' and 'hide' of its features are not as promised")
        mean, std = (np.asarray(value.get(name), dtype=np.float32) for name in ("mean", "std"))
        good = mean.shape == std.shape == (NUM_STATIC,) and np.isfinite([mean, std]).all() and (std > 0).all()
        if not good:
            raise ValueError(f"the scaling of its features is not {NUM_STATIC} means and deviations")
        return cls(auxiliary, mean, std, tuple(hide))

    def to_json(self) -> dict[str, Any]:
        """Return the view as plain data."""
        return {
            "names": list(FEATURE_NAMES),
            "version": SCHEMA_VERSION,
            "auxiliary": dict(self.auxiliary),
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "hide": list(self.hide),
        }

    def is_that_of(self, world: RaiseSelectEnv) -> bool:
        """Return whether an environment shows its rows in just this way."""
        own = FeatureView.of(world)
        is_scaled_alike = np.array_equal(own.mean, self.mean) and np.array_equal(own.std, self.std)
        return is_scaled_alike and dict(own.auxiliary) == dict(self.auxiliary) and own.hide == self.hide

    def translation(self, world: RaiseSelectEnv) -> Translation:
        """Return what turns an environment's observations, shape (..., 39), into what the selector learned on.

        Raises:
            SettingError: Another auxiliary model computes the environment's features, or hides what was seen.
        """
        self.check(world.assets.auxiliary, world.config)
        if self.is_that_of(world):
            return as_it_is
        own = FeatureView.of(world)
        hidden = [name for name in self.hide if name not in own.hide]
        scale, shift = own.std / self.std, (own.mean - self.mean) / self.std

        def translate(observation: np.ndarray) -> np.ndarray:
            seen = np.array(observation)
            static = (seen[..., STATIC] * scale + shift).clip(-CLIP, CLIP)
            is_row = observation.any(axis=-1, keepdims=True)  # padding stays padding
            seen[..., STATIC] = np.where(is_row, static, 0.0)
            for name in hidden:
                seen[..., BLOCKS[name]] = 0.0
            return seen

        return translate

    def check(self, here: Mapping[str, str | int], config: EnvConfig) -> None:
        """Check that an environment's features are those that the selector learned on.

        Args:
            here: The auxiliary model that computes them, as `EnvAssets.auxiliary` names it.
            config: The environment's settings.

        Raises:
            SettingError: Another auxiliary model computes them, or what was seen is hidden.
        """
        if any(here.get(part) != self.auxiliary.get(part) for part in ("model", "adapter")):
            name = config.auxiliary_model or config.model
            raise SettingError(
                f"the selector was learned on features of another auxiliary model than {name!r} (content "
                f"{_short(self.auxiliary.get('model'))}, here {_short(here['model'])}): its static columns would mean "
                "something else. Name the model that computed them as auxiliary_model (--auxiliary-model), or learn a "
                "selector with this one."
            )
        updates = self.auxiliary.get("updates")
        if here["updates"] != updates:
            raise SettingError(
                f"the selector was learned on features of an auxiliary model after {updates} updates, and here they "
                f"are computed after {here['updates']}: set auxiliary_updates={updates} (--auxiliary-updates)."
            )
        unseen = [name for name in config.hide if name not in self.hide]
        if unseen:
            raise SettingError(
                f"the environment hides {', '.join(unseen)}, which the selector learned to look at; leave hide out."
            )


def _short(content: object) -> str:
    return str(content)[:12]
