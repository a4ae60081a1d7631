"""Other forms of the action, for algorithms that cannot choose a subset.

A wrapper's step falls in two, the choice that an action stands for and the answer to it, so that a vector environment
can make the updates of several environments together in between.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, RecordEpisodeStatistics

from .env import RaiseSelectEnv, StepResult, action_array
from .errors import ActionError, SettingError
from .features import CLIP

__all__ = [
    "ActionForm",
    "PickOne",
    "TopKScores",
    "forgotten_by_errors",
    "require_no_form",
    "require_no_wrappers",
    "wrappers_of",
]


# Any for the two kinds of action: Gymnasium 1.4 takes them for one and the same in Wrapper.__init__.
class ActionForm(gym.Wrapper[np.ndarray, Any, np.ndarray, Any], RecordConstructorArgs):
    """Base of the wrappers that give the action another form.

    Args:
        env: A `RaiseSelectEnv`, wrapped or not.

    Raises:
        SettingError: Its action has another form already: that would take this one's 0/1 choices for its own actions.
    """

    def __init__(self, env: gym.Env[np.ndarray, np.ndarray]) -> None:
        require_no_form(env, f"{type(self).__name__} makes 0/1 choices")
        RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)
        self._size = _offered(env)

    def step(self, action: Any) -> StepResult:
        """Do what the action stands for; see `choice` and `answer`."""
        with forgotten_by_errors([self]):
            choice = self.choice(action)
            result = None if choice is None else self.env.step(choice)
        return self.answer(result)  # type: ignore[arg-type]

    def notes(self) -> Any:
        """Return what `choice` has noted so far, as a value that nothing changes: nothing, unless a form notes more."""
        return None

    def put_back(self, notes: Any) -> None:
        """Forget what was noted since `notes` returned this."""

    @abstractmethod
    def choice(self, action: Any) -> np.ndarray | None:
        """Return the 0/1 choice that the environment shall take, shape (num_candidates,), int8; None for none yet."""

    @abstractmethod
    def answer(self, result: StepResult | None) -> StepResult:
        """Return what `step` does, given what the environment's step returned, None where there was none."""

    @abstractmethod
    def action_masks(self) -> np.ndarray:
        """Return which candidates can be taken, shape (num_candidates,), bool."""


class TopKScores(ActionForm):
    """Takes a score for each candidate, and the best B/C of each class are trained on.

    This is the paper's rule (Lv et al. 2025, algorithm 1): top b of each of C classes, B = C b. What does not
    divide goes to the best rows left over, whatever their class. Of equal scores the earlier row is taken.

    Args:
        env: A `RaiseSelectEnv`, wrapped or not.
    """

    def __init__(self, env: gym.Env[np.ndarray, np.ndarray]) -> None:
        super().__init__(env)
        self.action_space = spaces.Box(-1.0, 1.0, (self._size,), dtype=np.float32)

    def action(self, action: np.ndarray) -> np.ndarray:
        """Return the 0/1 choice that scores stand for, shape (num_candidates,), int8.

        Raises:
            ActionError: The scores have another shape, or one is not a number.
        """
        scores = action_array(action).astype(np.float64)
        if scores.shape != (self._size,):
            raise ActionError(
                f"the scores have shape {scores.shape}; expected ({self._size},), one for each candidate."
            )
        if np.isnan(scores).any():
            raise ActionError(f"the score of candidate {int(np.isnan(scores).argmax())} is NaN; expected a number.")
        world = _world(self.env)
        return top_of_each_class(
            scores, world.candidate_classes, world.action_masks(), world.config.batch_size, world.config.num_classes
        )

    def choice(self, action: np.ndarray) -> np.ndarray:
        """Return `action(scores)`."""
        return self.action(action)

    def answer(self, result: StepResult | None) -> StepResult:
        """Return the environment's answer as it is."""
        assert result is not None, "scores always make a choice"
        return result

    def action_masks(self) -> np.ndarray:
        """Return which candidates can be taken, shape (num_candidates,), bool."""
        return _world(self.env).action_masks()


class PickOne(ActionForm):
    """Takes one candidate at a time; the update is made when B are picked.

    Until then the reward is 0 and the observation stays, but for the count of the picked rows, which shows one
    more unless availability is hidden. A candidate that is picked already, or is padding, is forbidden by
    `action_masks()`; picked all the same, it counts as a pick that adds nothing, so that every action is legal and
    episodes end. Picks belong to the moment that they were made in: after the environment's `restore`, and over a fork,
    a batch begins with nothing picked.

    Without the masks repeats use up picks. A pick changes one number of the observation, so that a policy which always
    takes its best, as `model.predict(observation, deterministic=True)` of Stable-Baselines3 does, mostly names the same
    row B times and trains on that row alone. MaskablePPO takes `action_masks=env.action_masks()`; with any other class,
    this package's `Sb3Agent` acts by the best row that is still free.

    Args:
        env: A `RaiseSelectEnv`, wrapped or not; wrappers that change the observation belong around this one.

    Raises:
        SettingError: There is one within, or another form of the action.
    """

    def __init__(self, env: gym.Env[np.ndarray, np.ndarray]) -> None:
        super().__init__(env)
        for layer in reversed(wrappers_of(env)):
            # Some change what is observed and not its space.
            if isinstance(layer, gym.ObservationWrapper) or layer.observation_space != _world(env).observation_space:
                raise SettingError(
                    f"{type(layer).__name__} changes the observation, and PickOne shows the environment's own with the "
                    "picks in it: put observation wrappers outside PickOne."
                )
        self.action_space = spaces.Discrete(self._size)
        self._taken = np.zeros(self._size, dtype=np.int8)  # (num_candidates,)
        self._num_picks = 0
        self._last: tuple[np.ndarray, dict[str, Any]] | None = None  # what the round began with; None before the first
        self._moment: object = None  # of the environment, when the round began

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start a new run, with nothing picked."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._start_round(observation, info)
        return observation, {**info, "action_mask": self.action_masks()}

    def choice(self, action: np.int64) -> np.ndarray | None:
        """Pick one candidate; return the picks when the batch is full, or nothing is left to pick.

        Raises:
            ActionError: There is no such candidate.
        """
        index = self._index(action)
        self._catch_up()
        self._taken[index] = 1
        self._num_picks += 1
        world = _world(self.env)
        # After an episode's end the environment says so at once, not when a batch is full.
        is_full = world.is_over or self._num_picks >= world.config.batch_size
        return self._taken if is_full or not self.action_masks().any() else None

    def answer(self, result: StepResult | None) -> StepResult:
        """Begin the next batch with the environment's answer; without one, show what is picked so far."""
        if result is None:
            return self._waiting()
        observation, reward, terminated, truncated, info = result
        self._start_round(observation, info)
        return observation, reward, terminated, truncated, {**info, "action_mask": self.action_masks()}

    def action_masks(self) -> np.ndarray:
        """Return which candidates can still be picked, shape (num_candidates,), bool."""
        self._catch_up()
        return np.asarray(_world(self.env).action_masks() & (self._taken == 0))

    def notes(self) -> tuple[np.ndarray, int, tuple[np.ndarray, dict[str, Any]] | None, object]:
        """Return the picks so far, and what they were made in."""
        return self._taken.copy(), self._num_picks, self._last, self._moment

    def put_back(self, notes: tuple[np.ndarray, int, tuple[np.ndarray, dict[str, Any]] | None, object]) -> None:
        """Forget later picks."""
        self._taken, self._num_picks, self._last, self._moment = notes

    def _index(self, action: Any) -> int:
        picked = action_array(action)
        if picked.size != 1 or picked.dtype.kind not in "iu" or not 0 <= picked.item() < self._size:
            raise ActionError(f"candidate {str(action)[:60]} was picked; expected 0 to {self._size - 1}.")
        return int(picked.item())

    def _catch_up(self) -> None:
        """Begin anew where the environment is somewhere else than this wrapper left it."""
        world = _world(self.env)
        if not world.is_over and world.moment is not self._moment:
            self._start_round(world.observation(), world.info())

    def _start_round(self, observation: np.ndarray, info: dict[str, Any]) -> None:
        self._taken = np.zeros(self._size, dtype=np.int8)
        self._num_picks = 0
        self._last = (observation.copy(), info)
        self._moment = _world(self.env).moment

    def _waiting(self) -> StepResult:
        """Return what a pick shows that trains on nothing yet."""
        assert self._last is not None
        observation, info = self._last
        shown = observation.copy()
        world = _world(self.env)
        picked = (self._taken == 1) & world.action_masks()
        if "availability" not in world.config.hide:
            shown[picked, -1] = np.log1p(np.expm1(shown[picked, -1]) + 1).clip(max=CLIP)
        fresh = {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in info.items()}
        fresh.pop("train_loss", None)
        fresh.update(num_selected=0, num_dropped=0, action_mask=self.action_masks())
        fresh["selected"] = np.full(self._size, -1, dtype=np.int64)
        return shown, 0.0, False, False, fresh


@contextlib.contextmanager
def forgotten_by_errors(envs: Sequence[gym.Env[Any, Any]]) -> Iterator[None]:
    """Let forms of the action forget what they noted in this block if it ends in an error: no step was taken then."""
    before = [(env, env.notes()) for env in envs if isinstance(env, ActionForm)]
    try:
        yield
    except BaseException:
        for env, notes in before:
            env.put_back(notes)
        raise


def top_of_each_class(
    scores: np.ndarray, classes: np.ndarray, mask: np.ndarray, batch_size: int, num_classes: int
) -> np.ndarray:
    """Return a 0/1 choice of the best batch_size/num_classes rows of each class, shape (rows,), int8.

    Where a class has fewer rows than its share, or the share does not divide, the best rows left over fill the
    batch: a batch is only smaller than batch_size if there are fewer rows.
    """
    choice = np.zeros(len(scores), dtype=np.int8)
    order = np.argsort(-scores, kind="stable")
    order = order[mask[order]]
    for label in range(num_classes):
        choice[order[classes[order] == label][: batch_size // num_classes]] = 1
    rest = order[choice[order] == 0]
    choice[rest[: batch_size - int(choice.sum())]] = 1
    return choice


def wrappers_of(env: gym.Env[Any, Any]) -> list[gym.Wrapper[Any, Any, Any, Any]]:
    """Return the wrappers around an environment, the outermost first."""
    found = []
    while isinstance(env, gym.Wrapper):
        found.append(env)
        env = env.env
    return found


def require_no_form(env: gym.Env[Any, Any], needed: str) -> None:
    """Refuse an environment whose action has another form already.

    Args:
        env: The environment.
        needed: What takes actions of which kind, for the message.

    Raises:
        SettingError: It is in a wrapper such as `TopKScores`.
    """
    for layer in wrappers_of(env):
        if isinstance(layer, ActionForm):
            name = type(layer).__name__
            raise SettingError(
                f"the environment is in {name} already, and {needed}: hand over the environment without {name}."
            )


def require_no_wrappers(env: gym.Env[Any, Any], or_else: str = "") -> None:
    """Refuse wrappers that whoever learns in environments like the given one would silently leave out.

    Those of `gym.make`, one that only counts, and another form of the action may be there: they change nothing that is
    learned from.

    Args:
        env: The environment.
        or_else: What else the user can do, for the end of the message.

    Raises:
        SettingError: There is another wrapper.
    """
    for layer in wrappers_of(env):
        if not isinstance(layer, ActionForm | OrderEnforcing | PassiveEnvChecker | RecordEpisodeStatistics):
            name = type(layer).__name__
            raise SettingError(
                f"{name} would have no effect: what learns makes environments of its own, like the given one but "
                f"without its wrappers. Hand over the environment without {name}, and set what it does by the "
                f'environment\'s keywords, such as reward="module:function" or horizon{or_else}.'
            )


def _world(env: gym.Env[Any, Any]) -> RaiseSelectEnv:
    world = env.unwrapped
    assert isinstance(world, RaiseSelectEnv), f"expected a RaiseSelectEnv, got {type(world).__name__}"
    return world


def _offered(env: gym.Env[Any, Any]) -> int:
    return int(_world(env).action_space.shape[0])  # type: ignore[index]
