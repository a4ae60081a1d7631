"""RAISE learned from forks: what rows are worth is tried out from one training state, many at a time.

An ordinary algorithm sees one subset a step and has to tell its effect from the stage of training and from the
luck of the offer. Here forks of the same training state are compared with each other: what differs between them is the
rows' doing alone. `credit.py` has the two ways to compare them; here the acquisition function F is fitted by regression
so that, within a group of forks, the sum of F over a fork's rows explains what the fork was worth. Every group of every
episode is kept, so nothing that was paid for is thrown away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from raise_env import EnvConfig, RaiseSelectEnv
from raise_env.errors import SettingError, suggestion
from raise_env.features import BLOCKS, NUM_FEATURES, frame
from raise_env.files import replaced_folder
from raise_env.pool import Pool
from raise_env.rewards import DIVERGENCE_PENALTY
from raise_env.wrappers import require_no_wrappers

from .base import Progress, world_of
from .credit import Group, batch_group, row_group
from .learned import Selector, stored_view
from .networks import AcquisitionFunction
from .selector_files import check_room, read_config, stored_tensors, write_selector

__all__ = ["ForkSettings", "RaiseFork", "ensemble_scores", "fit_ensemble"]


#: The ways to find out what rows are worth; see `credit.py`.
CREDITS = ("rows", "batches")

#: Rows of the pool that tell F's mean and spread over it, where `least` asks for them.
NUM_SAMPLED = 512

#: Values that one step of the fit looks at: a group of many rows, or many groups of a few batches.
FIT_BATCH = 256


_COUNTS = (
    *("num_states", "num_rows", "num_lookahead", "lookahead_size", "num_forks", "num_networks", "num_passes"),
    "max_repeats",
)


@dataclass(frozen=True, slots=True)
class ForkSettings:
    """How `RaiseFork` learns. docs/results/raise_fork.md has the study that the defaults come from.

    Attributes:
        credit: "rows" values each row by where its own update goes; "batches" makes updates on whole batches and
            compares scores. None: rows where the reward is the dev loss, else batches.
        num_states: Training states of an episode from which forks are made.
        num_rows: With rows, how many are valued from a state.
        num_lookahead: With rows, updates of the fork that is trained on dev rows to see which way they point; 0 takes
            the dev gradient.
        lookahead_size: Dev rows of each such update.
        num_forks: With batches, how many are tried from a state.
        num_dev: With batches, dev rows that they are scored on, drawn for each state; None: all.
        temperature: Scale of the Gumbel noise, in standard deviations of F, under which batches are drawn while
            learning. In the first episode they are random.
        num_networks: Networks whose mean is F; each is fitted to groups drawn with replacement.
        hidden_dims: Widths of a network's hidden layers.
        learning_rate: Adam's, for the fit.
        weight_decay: The fit's, decoupled.
        num_passes: Passes over all groups at most; each network stops where it explains the groups that it was
            not fitted to best.
        max_repeats: How often `predict` takes a row in one episode while there are others.
        least: How many standard deviations F must lie above its mean over the pool for `predict` to take a row at all,
            so that a step may take few rows or none; None: a batch is always full.
    """

    credit: str | None = None
    num_states: int = 8
    num_rows: int = 256
    num_lookahead: int = 16
    lookahead_size: int = 16
    num_forks: int = 8
    num_dev: int | None = 32
    temperature: float = 1.0
    num_networks: int = 5
    hidden_dims: tuple[int, ...] = (256, 256)
    learning_rate: float = 3e-3
    weight_decay: float = 1.0
    num_passes: int = 60
    max_repeats: int = 1
    least: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.hidden_dims, (list, tuple)):
            raise SettingError(f"hidden_dims is {self.hidden_dims!r}; expected a list of widths, such as [256,256].")
        object.__setattr__(self, "hidden_dims", tuple(self.hidden_dims))
        counts = {name: getattr(self, name) for name in _COUNTS}
        counts |= {} if self.num_dev is None else {"num_dev": self.num_dev}
        for name, value in [*counts.items(), *(("hidden_dims", width) for width in self.hidden_dims)]:
            if not _is_count(value):
                raise SettingError(f"{name} is {value!r}; expected a whole number.")
        for name in ("temperature", "learning_rate", "weight_decay"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise SettingError(f"{name} is {value!r}; expected a number of at least 0.")
        if self.credit is not None and self.credit not in CREDITS:
            raise SettingError(f"credit is {self.credit!r}: {suggestion(str(self.credit), CREDITS)}")
        if self.num_forks < 2:
            raise SettingError(f"num_forks is {self.num_forks}; expected at least 2, or there is nothing to compare.")
        if self.num_rows < 2:
            raise SettingError(f"num_rows is {self.num_rows}; expected at least 2, or there is nothing to compare.")
        if self.least is not None and not (isinstance(self.least, (int, float)) and math.isfinite(self.least)):
            raise SettingError(f"least is {self.least!r}; expected a number of standard deviations, such as 2.")
        if self.num_states < 1:
            raise SettingError(f"num_states is {self.num_states}; expected at least 1.")

    def credit_for(self, reward: str) -> str:
        """Return "rows" or "batches".

        Raises:
            SettingError: Rows were asked for, and the reward has no gradient.
        """
        if self.credit == "rows" and reward != "loss":
            raise SettingError(
                f"credit 'rows' follows the gradient of the dev loss, and reward {reward!r} has none: take "
                "credit=batches, or reward 'loss'."
            )
        return self.credit or ("rows" if reward == "loss" else "batches")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class RaiseFork(Selector):
    """Learns F from forks; acts by taking the rows that it scores highest.

    Args:
        settings: Any of `ForkSettings`, by name.

    Raises:
        SettingError: A setting is unknown or cannot be used.
    """

    default_episodes: ClassVar[int] = 3

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        known = ForkSettings.__dataclass_fields__
        for name in settings:
            if name not in known:
                raise SettingError(f"raise_fork has no setting {name!r}: {suggestion(name, known)}")
        self.settings = ForkSettings(**settings)
        self.networks: list[AcquisitionFunction] = []
        self.groups: list[Group] = []
        self._sample: np.ndarray | None = None  # (rows, 39), of the pool of `_sampled`
        self._sampled: object = None

    def learn(
        self, env: gym.Env[Any, Any], episodes: int, seed: int = 0, progress: Progress | None = None
    ) -> RaiseFork:
        """Learn for so many episodes; called again, it goes on with what it has seen.

        Args:
            env: A RaiseSelect environment; it is left as it is, and others like it are made.
            episodes: Episodes, each left after the last of its `settings.num_states` states.
            seed: What candidates, forks and networks are drawn from.
            progress: Called after each episode with its number and return.

        Raises:
            SettingError: The reward does not go with the credit; no fork of any episode differed from its siblings, or
                all diverged, so that there is nothing to learn from; it has learned on another pool before, or was
                loaded without what it saw; or a wrapper would be left out.
        """
        require_no_wrappers(env)
        self._require_memory(episodes)
        world = self._learning_world(world_of(env))
        self.batch_size = None
        self._note_training(world, seed)
        last = len(self.episode_returns) + episodes
        for number in range(len(self.episode_returns), last):
            rng = np.random.default_rng([seed, number])
            self.episode_returns.append(self._episode(world, rng))
            if self.groups:
                self.networks = fit_ensemble(self.groups, self.settings, seed=int(rng.integers(2**31)))
            elif number + 1 == last:
                raise SettingError(_nothing_seen(world))
            if progress is not None:
                progress(number + 1, self.episode_returns[-1])
        return self

    def check(self, config: EnvConfig, pool: Pool, episodes: int) -> None:
        """Refuse what `learn` would refuse, and to act without ever having learned.

        Raises:
            SettingError: The reward does not go with the credit; it was loaded without what it saw, and is to learn; or
                it has not learned, and is not to learn.
        """
        super().check(config, pool, episodes)
        self._require_memory(episodes)
        if episodes:
            self.settings.credit_for(config.reward)

    def learning_steps(self, config: EnvConfig) -> int:
        """Return the steps of a learning episode: it is left after the last state that forks are made from."""
        return self._due_steps(config)[-1] + 1

    def scores(self, observation: np.ndarray) -> np.ndarray:
        """Return F in its standard deviations, shape (rows,); rows taken `max_repeats` times come last.

        Rows below `least` score -inf.

        Raises:
            RuntimeError: Nothing was learned or loaded yet.
        """
        standing, least = self._standing(observation), self.settings.least
        scores = self._spent_last(standing, observation)
        return scores if least is None else np.where(standing >= least, scores, -np.inf)

    def uncut_scores(self, observation: np.ndarray) -> np.ndarray:
        """Return `scores`, shape (rows,), without the cut: also rows below `least` have theirs.

        Raises:
            RuntimeError: Nothing was learned or loaded yet.
        """
        return self._spent_last(self._standing(observation), observation)

    def _standing(self, observation: np.ndarray) -> np.ndarray:
        """Return F in its standard deviations: over the rows shown, or over the pool where `least` counts in these."""
        if not self.networks:
            raise RuntimeError("this selector has learned nothing yet: call learn(), or load one.")
        reference = None if self.settings.least is None else self._translate(self._pool_sample(observation))
        return ensemble_scores(self.networks, self._translate(observation), reference)

    def _spent_last(self, standing: np.ndarray, observation: np.ndarray) -> np.ndarray:
        """Return scores by which rows taken `max_repeats` times come last."""
        taken = np.expm1(observation[:, -1])
        spent = taken > self.settings.max_repeats - 0.5
        return np.where(spent, standing - 1e3 * taken, standing)

    def _pool_sample(self, observation: np.ndarray) -> np.ndarray:
        """Return rows of the pool as they would be shown now, shape (rows, 39): what an offer is good or bad beside."""
        world = self._require_begun()
        if self._sample is None or self._sampled is not world.assets:
            ids = np.random.default_rng(0).permutation(len(world.assets.pool))[:NUM_SAMPLED]
            self._sample, self._sampled = frame(world.assets.features, ids, world.config.hide), world.assets
        sample = self._sample.copy()
        sample[:, BLOCKS["stage"]] = observation[observation.any(axis=1)][0, BLOCKS["stage"]]
        return sample

    def _exploration(self, num_rows: int) -> np.ndarray:
        """Return the Gumbel noise that makes batches differ."""
        return self.settings.temperature * self._rng.gumbel(size=num_rows)

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors; the folder appears whole or not at all."""
        weights = {
            f"network_{index}.{name}": value
            for index, network in enumerate(self.networks)
            for name, value in network.state_dict().items()
        }
        write_selector(
            Path(folder),
            "raise_fork",
            weights,
            settings=asdict(self.settings),
            view=self.view,
            episode_returns=self.episode_returns,
            training=self.training,
        )

    @classmethod
    def load(cls, folder: str | Path) -> RaiseFork:
        """Read a selector that `save` wrote; nothing in the folder is run.

        Raises:
            RecordError: A file is missing or torn, or the selector is of another kind or for other features.
        """
        folder = Path(folder)
        config = read_config(folder, "raise_fork")
        agent = cls(**config["settings"])
        agent.episode_returns = list(config["episode_returns"])
        agent.training = dict(config["training"])
        agent.view = stored_view(config, folder / "config.json")
        dims = (NUM_FEATURES, *agent.settings.hidden_dims, 1)
        with stored_tensors(folder / "model.safetensors") as weights:
            check_room(dims, weights, agent.settings.num_networks if weights else 0)
            for index in range(agent.settings.num_networks if weights else 0):
                network = AcquisitionFunction(NUM_FEATURES, agent.settings.hidden_dims, generator=torch.Generator())
                prefix = f"network_{index}."
                part = {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}
                network.load_state_dict(part)
                agent.networks.append(network)
        return agent

    def save_progress(self, folder: str | Path) -> None:
        """Write the selector with all that was seen, so that learning can go on from `load_progress`."""
        with replaced_folder(Path(folder)) as beside:
            self.save(beside / "selector")
            groups = {}
            if self.groups:  # else every episode diverged so far
                groups["rows"], groups["gains"] = _stacked(self.groups)
            save_file(groups, beside / "groups.safetensors")

    def load_progress(self, folder: str | Path) -> None:
        """Take up what `save_progress` wrote; the episodes that follow are those that would have followed.

        Raises:
            RecordError: A file is missing or torn.
        """
        loaded = RaiseFork.load(Path(folder) / "selector")
        self.networks, self.episode_returns = loaded.networks, loaded.episode_returns
        self.training, self.view = loaded.training, loaded.view
        with stored_tensors(Path(folder) / "groups.safetensors") as groups:
            pairs = zip(groups["rows"].numpy(), groups["gains"].numpy(), strict=True) if groups else ()
            self.groups = [Group(rows, gains) for rows, gains in pairs]

    def _require_memory(self, episodes: int) -> None:
        """Refuse to learn on without what was seen before: F is fitted to all of it, and would forget the rest."""
        if episodes and self.networks and not self.groups:
            raise SettingError(
                f"this selector of raise_fork has learned for {len(self.episode_returns)} episodes, and its folder "
                f"does not hold what it saw in them: after {episodes} more it would know of these alone. Take it as it "
                "is, with 0 episodes, or let a new one learn for as many as you want."
            )

    def _learning_world(self, world: RaiseSelectEnv) -> RaiseSelectEnv:
        """Return an environment over the same assets that offers as many rows as are valued, and scores no step."""
        own: dict[str, Any] = {"score_every": world.config.horizon}
        if self.settings.credit_for(world.config.reward) == "rows":
            num_classes = world.config.num_classes
            wanted = max(world.config.batch_size, min(self.settings.num_rows, len(world.assets.pool)))
            own["num_candidates"] = math.ceil(wanted / num_classes) * num_classes
        return world.variant(**own)

    def _episode(self, world: RaiseSelectEnv, rng: np.random.Generator) -> float:
        """Run an episode up to the last state that is looked at, keep what forks showed, and return its return."""
        observation, _ = world.reset(seed=int(rng.integers(2**31)))
        over = False
        due_steps = self._due_steps(world.config)
        for step in range(due_steps[-1] + 1):
            action, group = self._look(world, observation, rng, is_due=step in due_steps)
            if group is not None:
                self.groups.append(group)
            observation, _, over, _, info = world.step(action)
            if info["diverged"]:
                return world.dev_scores[-1] - world.dev_scores[0] + DIVERGENCE_PENALTY
            if over:
                break
        # An episode that is left before its end was not scored yet: taking nothing gives the score as it is.
        nothing = np.zeros((1, len(observation)), dtype=np.int8)
        score = world.dev_scores[-1] if over else float(world.probe(nothing)[0])
        if not math.isfinite(score):  # nobody has looked since the last update
            world.ledger.divergences += 1
            return DIVERGENCE_PENALTY
        return score - world.dev_scores[0]

    def _look(
        self, world: RaiseSelectEnv, observation: np.ndarray, rng: np.random.Generator, *, is_due: bool
    ) -> tuple[np.ndarray, Group | None]:
        """Return what to train on next, and what forks showed where they are due."""
        settings = self.settings
        mask, size = world.action_masks(), world.config.batch_size
        scores = ensemble_scores(self.networks, observation) if self.networks else np.zeros(0)
        if settings.credit_for(world.config.reward) == "rows":
            action = self._actions(scores, mask, size, 1, rng)[0]
            return action, row_group(world, settings.num_lookahead, settings.lookahead_size) if is_due else None
        # Of more rows than the budget has left a random part would be dropped, and the forks' rows be other ones.
        actions = self._actions(scores, mask, min(size, world.budget_left), settings.num_forks, rng)
        group = batch_group(world, actions, settings.num_dev) if is_due else None
        return actions[rng.integers(len(actions))], group

    def _due_steps(self, config: EnvConfig) -> list[int]:
        """Return before which steps forks are made: spread over the horizon, or, with batches, the first ones.

        Late in an episode, where the rate has fallen, updates on single batches hardly differ. Full batches are taken
        while learning: where the budget ends before the horizon does, so do the steps.
        """
        horizon = min(config.horizon, math.ceil(config.total_budget / config.batch_size))
        num_states = min(self.settings.num_states, horizon)
        if self.settings.credit_for(config.reward) == "batches":
            return list(range(num_states))
        return [place * horizon // num_states for place in range(num_states)]

    def _actions(
        self, scores: np.ndarray, mask: np.ndarray, size: int, count: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Return 0/1 choices, shape (count, rows), int8: random without scores, else the best under Gumbel noise."""
        allowed = np.flatnonzero(mask)
        size = min(size, len(allowed))
        actions = np.zeros((count, len(mask)), dtype=np.int8)
        if not len(scores):
            for action, rows in zip(actions, _random_batches(allowed, size, count, rng), strict=True):
                action[rows] = 1
            return actions
        for action in actions:
            noisy = scores[allowed] + self.settings.temperature * rng.gumbel(size=len(allowed))
            action[allowed[np.argsort(-noisy)[:size]]] = 1
        return actions


def fit_ensemble(groups: Sequence[Group], settings: ForkSettings, seed: int) -> list[AcquisitionFunction]:
    """Fit networks so that sums of F over a fork's rows explain the differences within each group.

    Args:
        groups: All that was seen.
        settings: How to fit.
        seed: What first weights and the networks' shares of the groups are drawn from.
    """
    rows, gains = _stacked(groups)
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


def ensemble_scores(
    networks: Sequence[AcquisitionFunction], observation: np.ndarray, reference: np.ndarray | None = None
) -> np.ndarray:
    """Return the mean of the networks' scores, each in its own standard deviations, shape (rows,).

    Args:
        networks: Who scores.
        observation: Shape (rows, 39).
        reference: The rows over which mean and standard deviation are taken, shape (any, 39); None: those scored.
    """
    with torch.no_grad():
        scores = torch.stack([network(torch.from_numpy(observation)) for network in networks])
        others = scores
        if reference is not None:
            others = torch.stack([network(torch.from_numpy(reference)) for network in networks])
        spread = others.std(dim=1, correction=0, keepdim=True).clamp(min=1e-6)
        return ((scores - others.mean(dim=1, keepdim=True)) / spread).mean(dim=0).double().numpy()


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
    num_groups = max(1, FIT_BATCH // seen[1].shape[1])
    for _ in range(settings.num_passes):
        for places in torch.randperm(len(seen[0]), generator=generator).split(num_groups):
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
    is_row = rows.any(dim=-1)  # rows of zeros are padding
    sums = (network(rows) * is_row).sum(dim=-1)  # (groups, forks)
    is_fork = is_row.any(dim=-1)
    num_forks = is_fork.sum(dim=1, keepdim=True).clamp(min=1)
    explained: Tensor = sums - sums.sum(dim=1, keepdim=True) / num_forks
    return ((explained - gains).square() * is_fork).sum() / num_forks.sum()


def _stacked(groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """Return all groups' rows, shape (groups, forks, rows of a fork, 39), and gains, shape (groups, forks), float32.

    Shorter forks end in rows of zeros, and groups of fewer forks, which an offer with padding gives, in forks of these.
    """
    most_forks, most_rows = np.max([group.rows.shape[:2] for group in groups], axis=0)
    rows = np.zeros((len(groups), most_forks, most_rows, NUM_FEATURES), dtype=np.float32)
    gains = np.zeros((len(groups), most_forks), dtype=np.float32)
    for place, group in enumerate(groups):
        num_forks, num_rows, _ = group.rows.shape
        rows[place, :num_forks, :num_rows], gains[place, :num_forks] = group.rows, group.gains
    return torch.from_numpy(rows), torch.from_numpy(gains)


def _nothing_seen(world: RaiseSelectEnv) -> str:
    return (
        f"in all episodes the forks of no step differed in reward {world.config.reward!r}, or one of them diverged: "
        "there is nothing to learn from. Take reward 'loss', more forks (num_forks), more dev rows, or a lower "
        "learning_rate."
    )


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
