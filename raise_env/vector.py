"""Several environments over one base model: what `gym.make_vec("RaiseSelect-v0", num_envs=8)` returns."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from gymnasium.vector import SyncVectorEnv

from .env import RaiseSelectEnv

__all__ = ["RaiseSelectVectorEnv"]


if TYPE_CHECKING:
    _SyncVectorEnv = SyncVectorEnv[Any, Any]
else:  # Gymnasium 1.2's class takes no type arguments
    _SyncVectorEnv = SyncVectorEnv


class RaiseSelectVectorEnv(_SyncVectorEnv):
    """Environments that step one after the other in this process and share everything but their adapters.

    An environment whose episode has ended is reset in the step after, as Gymnasium's next-step autoreset
    defines it: that step's action is ignored and its reward is 0.

    Args:
        num_envs: How many.
        settings: As for `RaiseSelectEnv`, the same for all.
    """

    def __init__(self, num_envs: int = 1, **settings: Any) -> None:
        super().__init__([functools.partial(RaiseSelectEnv, **settings)] * num_envs)
