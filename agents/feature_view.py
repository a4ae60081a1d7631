"""What a selector saw while it learned, and how other pools are shown to it in the same terms.

A selector is a function of 39 columns. On another pool it means what it meant only if the columns do: computed by the
same auxiliary model, and in the units of the pool that it learned on rather than of the one that it chooses from. The
auxiliary model is made ready by updates on rows of its pool, and made ready on other rows it is another one; so a
selector carries the adapter that these updates led to. docs/results/transfer.md has what it is worth with and without.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raise_env import EnvConfig, RaiseSelectEnv
from raise_env.errors import ModelError, SettingError
from raise_env.features import BLOCKS, CLIP, FEATURE_NAMES, NUM_STATIC, SCHEMA_VERSION, STATIC
from raise_env.foreign_files import check_inside

__all__ = ["AUXILIARY", "FeatureView", "Translation", "as_it_is"]

#: The folder within a selector's that holds the adapter that its features were computed with.
AUXILIARY = "auxiliary"

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
        pool: The content hash of the pool; None in selectors of before.
        adapter: The content hash of the auxiliary model's adapter, of a selector that was loaded with it.
        write_adapter: Writes that adapter into a folder; None where the auxiliary model has none.
    """

    auxiliary: Mapping[str, str | int]
    mean: np.ndarray
    std: np.ndarray
    hide: tuple[str, ...] = ()
    pool: str | None = None
    adapter: str | None = None
    write_adapter: Callable[[Path], None] | None = None

    @classmethod
    def of(cls, world: RaiseSelectEnv) -> FeatureView:
        """Return how an environment shows its rows."""
        features, auxiliary = world.assets.features, world.assets.auxiliary
        has_adapter = bool(auxiliary["updates"]) or "adapter" in auxiliary
        return cls(
            auxiliary,
            features.mean,
            features.std,
            world.config.hide,
            world.assets.content["pool"],
            write_adapter=world.assets.save_auxiliary if has_adapter else None,
        )

    @classmethod
    def read(cls, value: Any, folder: Path) -> FeatureView:
        """Return what `save` wrote.

        Args:
            value: What `save` returned.
            folder: The selector's folder.

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
        pool, adapter = value.get("pool"), value.get("adapter")
        if not all(content is None or isinstance(content, str) for content in (pool, adapter)):
            raise ValueError("the fields 'pool' and 'adapter' of its features are not as promised")
        copy = None if adapter is None else functools.partial(_copy_adapter, folder / AUXILIARY)
        return cls(auxiliary, mean, std, tuple(hide), pool, adapter, copy)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the auxiliary model's adapter into a selector's folder, and return the rest as plain data."""
        from raise_env.adapter_files import content_hash

        adapter = None
        if self.write_adapter is not None:
            (folder / AUXILIARY).mkdir(parents=True)
            self.write_adapter(folder / AUXILIARY)
            adapter = content_hash(folder / AUXILIARY)
        return {
            "names": list(FEATURE_NAMES),
            "version": SCHEMA_VERSION,
            "auxiliary": dict(self.auxiliary),
            "adapter": adapter,
            "pool": self.pool,
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
        self.check(world.assets.auxiliary, world.config, world.assets.content["pool"])
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

    def check(self, here: Mapping[str, str | int], config: EnvConfig, pool: str) -> None:
        """Check that an environment's features are those that the selector learned on.

        Args:
            here: The auxiliary model that computes them, as `EnvAssets.auxiliary` names it.
            config: The environment's settings.
            pool: The content hash of its pool.

        Raises:
            SettingError: Another auxiliary model computes them, or what was seen is hidden.
        """
        is_carried = self.adapter is not None and here.get("adapter") == self.adapter
        if not is_carried or here["model"] != self.auxiliary.get("model"):
            self._check_same(here, config, pool)
        unseen = [name for name in config.hide if name not in self.hide]
        if unseen:
            raise SettingError(
                f"the environment hides {', '.join(unseen)}, which the selector learned to look at; leave hide out."
            )

    def _check_same(self, here: Mapping[str, str | int], config: EnvConfig, pool: str) -> None:
        """Check that the features are made as those of learning were, without what the selector carries."""
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
        if self.adapter is not None and updates and pool != self.pool:
            raise SettingError(
                "the selector was learned on another pool, and the auxiliary model that computes the features here was "
                "made ready on rows of this one: the columns would mean something else. The one that it learned with "
                f"goes with it: name the folder {AUXILIARY!r} in the selector's as auxiliary_adapter "
                "(--auxiliary-adapter)."
            )


def _copy_adapter(source: Path, target: Path) -> None:
    """Copy a LoRA adapter's two files, if they lie where they seem to."""
    from raise_env.adapter_files import ADAPTER_FILES

    for name in ADAPTER_FILES:
        try:
            check_inside(source / name, source.parent)
            shutil.copyfile(source / name, target / name)
        except (OSError, ValueError) as error:
            raise ModelError(f"the selector's auxiliary adapter {str(source)!r} cannot be read: {error}.") from error


def _short(content: object) -> str:
    return str(content)[:12]
