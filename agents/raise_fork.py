"""RAISE learned from forks: what a subset is worth is seen by trying it beside others from one training state.

An ordinary algorithm sees one subset a step and has to tell its effect from the stage of training and from the
luck of the offer. Here several copies of the same training state each try a different subset of the same
candidates, and are scored on the same dev rows: what differs between their scores is the subsets' doing alone.

Credit goes from subsets to rows by regression: the acquisition function F is fitted so that, within a group of
forks, the sum of F over a fork's rows explains how far its score lies from the group's mean. Every group of every
episode is kept, so nothing that was paid for is thrown away.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from raise_env import RaiseSelectEnv
from raise_env.errors import RecordError, SettingError
from raise_env.features import FEATURE_NAMES, NUM_FEATURES
from raise_env.features import SCHEMA_VERSION as FEATURES_VERSION
from raise_env.files import replaced_folder, write_json

from .base import BatchAgent, Progress, world_of
from .networks import AcquisitionFunction

__all__ = ["ForkSettings", "Group", "RaiseFork", "fit_ensemble"]

SELECTOR_FORMAT = 1


@dataclass(frozen=True, slots=True)
class ForkSettings:
    """How `RaiseFork` learns.

    Attributes:
        num_forks: Subsets tried from each training state.
        num_dev: Dev rows that the forks of a group are scored on, drawn afresh for each group; None: all.
        num_steps: Steps of a learning episode, which is then left; None: to its end. The learning rate falls with
            the environment's own horizon, so a few steps see the rates at which most of a run is made.
        fork_steps: Updates that each fork makes before it is scored. One shows what a batch does at once, much of
            which the next updates would undo or do anyway; several show more of what lasts.
        num_networks: Networks whose mean is F; each is fitted to groups drawn with replacement.
        hidden_dims: Widths of a network's hidden layers.
        learning_rate: Adam's, for the fit.
        weight_decay: The fit's, decoupled.
        num_passes: Passes over all groups at most; each network stops where it explains the groups that it was
            not fitted to best.
        temperature: Scale of the Gumbel noise, in standard deviations of F, that makes the forks differ.
        max_repeats: How often `predict` takes a row in one episode while there are others.
    """

    num_forks: int = 8
    num_dev: int | None = 32
    num_steps: int | None = 16
    fork_steps: int = 1
    num_networks: int = 5
    hidden_dims: tuple[int, ...] = (64, 64)
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    num_passes: int = 60
    temperature: float = 1.0
    max_repeats: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_dims", tuple(self.hidden_dims))
        if self.num_forks < 2:
            raise SettingError(f"num_forks is {self.num_forks}; expected at least 2, or there is nothing to compare.")


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """What the forks of one training state showed.

    Attributes:
        rows: Features of each fork's rows, shape (forks, batch_size, 39), float32.
        gains: Each fork's score minus the group's mean, over the group's standard deviation, shape (forks,), float32.
    """

    rows: np.ndarray
    gains: np.ndarray


class RaiseFork(BatchAgent):
    """Learns F from forks; acts by taking the rows that it scores highest.

    Args:
        settings: Any of `ForkSettings`, by name.

    Raises:
        SettingError: A setting is unknown or cannot be used.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        try:
            self.settings = ForkSettings(**settings)
        except TypeError as error:
            raise SettingError(
                f"raise_fork: {error}. Known: {', '.join(ForkSettings.__dataclass_fields__)}."
            ) from error
        self.networks: list[AcquisitionFunction] = []
        self.groups: list[Group] = []
        self.episode_returns: list[float] = []
        self.training: dict[str, Any] = {}

    def learn(
        self, env: gym.Env[Any, Any], episodes: int, seed: int = 0, progress: Progress | None = None
    ) -> RaiseFork:
        """Learn for so many episodes; called again, it goes on with what it knows.

        Args:
            env: A RaiseSelect environment; it is left as it is.
            episodes: Episodes of `settings.num_steps` steps.
            seed: What candidates, forks and networks are drawn from.
            progress: Called after each episode with its number and return.

        Raises:
            SettingError: No fork scored differently from its siblings, so there is nothing to learn from.
        """
        world = self._learning_world(world_of(env))
        self.batch_size = None
        self.training = {"env": world.config.to_kwargs(), "content": world.assets.content, "seed": seed}
        for _ in range(episodes):
            number = len(self.episode_returns)
            rng = np.random.default_rng([seed, number])
            self.episode_returns.append(self._episode(world, rng))
            if not self.groups:
                raise SettingError(_nothing_seen(world))
            self.networks = fit_ensemble(self.groups, self.settings, seed=int(rng.integers(2**31)))
            if progress is not None:
                progress(number + 1, self.episode_returns[-1])
        return self

    def scores(self, observation: np.ndarray) -> np.ndarray:
        """Return F in its standard deviations, shape (rows,); rows taken `max_repeats` times come last.

        Raises:
            RuntimeError: Nothing was learned or loaded yet.
        """
        if not self.networks:
            raise RuntimeError("this selector has learned nothing yet: call learn(), or load one.")
        scores = ensemble_scores(self.networks, observation)
        taken = np.expm1(observation[:, -1])
        spent = taken > self.settings.max_repeats - 0.5
        return np.where(spent, scores - 1e3 * taken, scores)

    def _exploration(self, num_rows: int) -> np.ndarray:
        """Return the Gumbel noise that makes forks differ while learning."""
        return self.settings.temperature * self._rng.gumbel(size=num_rows)

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors; the folder appears whole or not at all."""
        weights = {
            f"network_{index}.{name}": value.contiguous()
            for index, network in enumerate(self.networks)
            for name, value in network.state_dict().items()
        }
        config = {
            "format": SELECTOR_FORMAT,
            "agent": "raise_fork",
            "settings": asdict(self.settings),
            "features": {"names": list(FEATURE_NAMES), "version": FEATURES_VERSION},
            "episode_returns": self.episode_returns,
            "training": self.training,
        }
        with replaced_folder(Path(folder)) as beside:
            save_file(weights, beside / "model.safetensors")
            write_json(beside / "config.json", config)

    @classmethod
    def load(cls, folder: str | Path) -> RaiseFork:
        """Read a selector that `save` wrote; nothing in the folder is run.

        Raises:
            RecordError: A file is missing or torn, or the selector is of another kind or for other features.
        """
        folder = Path(folder)
        config = _read_config(folder)
        agent = cls(**config["settings"])
        agent.episode_returns = list(config["episode_returns"])
        agent.training = dict(config["training"])
        try:
            weights = load_file(folder / "model.safetensors")
            for index in range(agent.settings.num_networks):
                network = AcquisitionFunction(NUM_FEATURES, agent.settings.hidden_dims, generator=torch.Generator())
                prefix = f"network_{index}."
                part = {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}
                network.load_state_dict(part)
                agent.networks.append(network)
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise RecordError(
                f"{folder / 'model.safetensors'}: not the weights that config.json names ({reason})."
            ) from error
        return agent

    def save_progress(self, folder: str | Path) -> None:
        """Write the selector with all that was seen, so that learning can go on from `load_progress`."""
        with replaced_folder(Path(folder)) as beside:
            self.save(beside / "selector")
            groups = {
                "rows": torch.from_numpy(_stacked_rows(self.groups)),
                "gains": torch.from_numpy(np.stack([group.gains for group in self.groups])),
            }
            save_file(groups, beside / "groups.safetensors")

    def load_progress(self, folder: str | Path) -> None:
        """Take up what `save_progress` wrote; the episodes that follow are those that would have followed.

        Raises:
            RecordError: A file is missing or torn.
        """
        loaded = RaiseFork.load(Path(folder) / "selector")
        try:
            groups = load_file(Path(folder) / "groups.safetensors")
        except (OSError, SafetensorError) as error:
            raise RecordError(f"{folder}: the groups cannot be read ({error}).") from error
        self.networks, self.episode_returns = loaded.networks, loaded.episode_returns
        self.training = loaded.training
        pairs = zip(groups["rows"].numpy(), groups["gains"].numpy(), strict=True)
        self.groups = [Group(rows, gains) for rows, gains in pairs]

    def _learning_world(self, world: RaiseSelectEnv) -> RaiseSelectEnv:
        # Forks are scored by probes; the trunk's own scores are not needed on the way.
        kwargs = {**world.config.to_kwargs(), "score_every": world.config.horizon}
        kwargs.pop("render_mode", None)
        return RaiseSelectEnv(assets=world.assets, **kwargs)

    def _episode(self, world: RaiseSelectEnv, rng: np.random.Generator) -> float:
        """Run one episode, keep what its forks showed, and return its return."""
        observation, _ = world.reset(seed=int(rng.integers(2**31)))
        over = False
        while not over and world.num_steps != self.settings.num_steps:
            group, observation, over = self._fork(world, observation, rng)
            if group is not None:
                self.groups.append(group)
        # An episode that is left before its end was not scored yet: taking nothing gives the score as it is.
        last = world.dev_scores[-1] if over else float(world.probe(_nothing(world))[0])
        return last - world.dev_scores[0]

    def _fork(
        self, world: RaiseSelectEnv, observation: np.ndarray, rng: np.random.Generator
    ) -> tuple[Group | None, np.ndarray, bool]:
        """Try batches in forks, go on from one of them, and return what they showed, what is offered, and the end."""
        if self.settings.fork_steps == 1:
            actions = self._actions(observation, world.action_masks(), world.config.batch_size, rng)
            scores = world.probe(actions, self.settings.num_dev)
            group = _group([observation[action == 1] for action in actions], scores)
            observation, _, over, _, _ = world.step(actions[rng.integers(len(actions))])
            return group, observation, over
        forks = world.fork(self.settings.num_forks)
        rows: list[list[np.ndarray]] = [[] for _ in forks]
        ended, diverged = [False] * len(forks), [False] * len(forks)
        for _ in range(self.settings.fork_steps):
            if any(ended) or forks[0].num_steps == self.settings.num_steps:
                break
            actions = self._actions(observation, forks[0].action_masks(), world.config.batch_size, rng)
            for place, (fork, action) in enumerate(zip(forks, actions, strict=True)):
                # What is offered, and when it ends, is the same for all forks but those that diverge.
                rows[place].append(fork.observation()[action == 1])
                observation, _, ended[place], _, info = fork.step(action)
                diverged[place] = bool(info["diverged"])
        over = all(ended)
        pairs = list(zip(forks, diverged, strict=True))
        scores = np.array([-np.inf if bad else _score(fork, over, self.settings.num_dev) for fork, bad in pairs])
        sound = [fork for fork, bad in pairs if not bad] or forks
        world.restore(sound[rng.integers(len(sound))].snapshot())
        return _group([np.concatenate(taken) for taken in rows], scores), world.observation(), over

    def _actions(self, observation: np.ndarray, mask: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        """Return the forks' 0/1 choices, shape (num_forks, rows), int8."""
        allowed = np.flatnonzero(mask)
        size = min(size, len(allowed))
        actions = np.zeros((self.settings.num_forks, len(mask)), dtype=np.int8)
        if not self.networks:
            for action, rows in zip(actions, _random_batches(allowed, size, len(actions), rng), strict=True):
                action[rows] = 1
            return actions
        scores = ensemble_scores(self.networks, observation)[allowed]
        for action in actions:
            noisy = scores + self.settings.temperature * rng.gumbel(size=len(allowed))
            action[allowed[np.argsort(-noisy)[:size]]] = 1
        return actions


def fit_ensemble(groups: Sequence[Group], settings: ForkSettings, seed: int) -> list[AcquisitionFunction]:
    """Fit networks so that sums of F over a fork's rows explain the differences within each group.

    Args:
        groups: All that was seen.
        settings: How to fit.
        seed: What first weights and the networks' shares of the groups are drawn from.
    """
    rows = torch.from_numpy(_stacked_rows(groups))  # (groups, forks, most rows of a fork, 39)
    gains = torch.from_numpy(np.stack([group.gains for group in groups]))  # (groups, forks)
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    networks = []
    for _ in range(settings.num_networks):
        drawn = torch.from_numpy(rng.integers(len(groups), size=len(groups)))
        left_out = torch.from_numpy(np.setdiff1d(np.arange(len(groups)), drawn.numpy()))
        network = AcquisitionFunction(NUM_FEATURES, settings.hidden_dims, generator=generator)
        _fit(network, (rows[drawn], gains[drawn]), (rows[left_out], gains[left_out]), settings, generator)
        networks.append(network)
    return networks


def ensemble_scores(networks: Sequence[AcquisitionFunction], observation: np.ndarray) -> np.ndarray:
    """Return the mean of the networks' scores, each in its own standard deviations over the rows, shape (rows,)."""
    with torch.no_grad():
        scores = torch.stack([network(torch.from_numpy(observation)) for network in networks])
        spread = scores.std(dim=1, correction=0, keepdim=True).clamp(min=1e-6)
        return ((scores - scores.mean(dim=1, keepdim=True)) / spread).mean(dim=0).double().numpy()


def _fit(
    network: AcquisitionFunction,
    seen: tuple[Tensor, Tensor],
    unseen: tuple[Tensor, Tensor],
    settings: ForkSettings,
    generator: torch.Generator,
) -> None:
    """Fit by Adam, and go back to where the groups that were left out are explained best."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    best_loss, best = float("inf"), network.state_dict()
    for _ in range(settings.num_passes):
        for places in torch.randperm(len(seen[0]), generator=generator).split(32):
            loss = _loss(network, seen[0][places], seen[1][places])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if len(unseen[0]):
            with torch.no_grad():
                loss_unseen = _loss(network, *unseen).item()
            if loss_unseen < best_loss:
                best_loss, best = loss_unseen, {n: v.clone() for n, v in network.state_dict().items()}
    network.load_state_dict(best)


def _loss(network: AcquisitionFunction, rows: Tensor, gains: Tensor) -> Tensor:
    sums = (network(rows) * rows.any(dim=-1)).sum(dim=-1)  # (groups, forks); rows of zeros are padding
    explained: Tensor = sums - sums.mean(dim=1, keepdim=True)
    return (explained - gains).square().mean()


def _stacked_rows(groups: Sequence[Group]) -> np.ndarray:
    """Return all groups' rows, shape (groups, forks, most rows of a fork, 39); shorter forks end in rows of zeros."""
    most = max(group.rows.shape[1] for group in groups)
    return np.stack([np.pad(group.rows, ((0, 0), (0, most - group.rows.shape[1]), (0, 0))) for group in groups])


def _group(rows: Sequence[np.ndarray], scores: np.ndarray) -> Group | None:
    """Return what a group of forks showed; None where it showed nothing, or a fork diverged."""
    spread = scores.std() if np.isfinite(scores).all() else 0.0
    if spread < 1e-9 or len({len(part) for part in rows}) > 1:
        return None
    return Group(np.stack(rows), ((scores - scores.mean()) / spread).astype(np.float32))


def _nothing_seen(world: RaiseSelectEnv) -> str:
    return (
        f"in a whole episode the forks of no step differed in reward {world.config.reward!r}, or one of them diverged: "
        "there is nothing to learn from. Take reward 'loss', more forks (num_forks), more dev rows, or a lower "
        "learning_rate."
    )


def _score(fork: RaiseSelectEnv, over: bool, num_dev: int | None) -> float:
    """Return a fork's dev score: on the group's common sample while the episode goes on, else its last."""
    return fork.dev_scores[-1] if over else float(fork.probe(_nothing(fork), num_dev)[0])


def _nothing(world: RaiseSelectEnv) -> np.ndarray:
    """Return one action that takes no row, shape (1, candidates), int8."""
    return np.zeros((1, len(world.candidates)), dtype=np.int8)


def _random_batches(allowed: np.ndarray, size: int, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return random batches that share no row as long as there are rows: then each row's effect is seen."""
    batches: list[np.ndarray] = []
    left = rng.permutation(allowed)
    while len(batches) < count:
        if len(left) < size:
            left = rng.permutation(allowed)
        batches.append(left[:size])
        left = left[size:]
    return batches


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise RecordError(
            f"{path}: not a selector ({error}). Expected a folder that `raise-env train` wrote."
        ) from error
    if not isinstance(config, dict) or config.get("agent") != "raise_fork" or config.get("format") != SELECTOR_FORMAT:
        raise RecordError(f"{path}: not a raise_fork selector of format {SELECTOR_FORMAT}.")
    features = config.get("features")
    if features != {"names": list(FEATURE_NAMES), "version": FEATURES_VERSION}:
        raise RecordError(f"{path}: the selector was learned on other features; learn it again with this version.")
    if not isinstance(config.get("settings"), dict) or not isinstance(config.get("training"), dict):
        raise RecordError(f"{path}: the fields 'settings' and 'training' are not as promised.")
    if not isinstance(config.get("episode_returns"), list):
        raise RecordError(f"{path}: the field 'episode_returns' is not as promised.")
    return config
