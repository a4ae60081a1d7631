"""RAISE as published (Lv et al. 2025): PPO over whole runs, top b of each class, with the paper's constants.

One round is one episode: a batch is drawn at every step, the run's rewards are spread by generalised advantage
estimation, and the acquisition function F and the critic V are moved by gradient steps on all steps of the run.

Stated in the paper and kept: the 39 columns, K-means classes and b rows of each (algorithm 1), F as an MLP over each
row, PPO's clipped objective, gamma 0.99, lambda 1, clip 0.2, learning rates 0.1 and 0.2, weight decay 0.01, 20 rounds,
repeats over time.

Not stated, and chosen here:

- *Exploration.* The paper's text takes the top b without chance, with which PPO's ratio is not defined. While it
  learns, this agent draws b rows of each class by `BatchLaw`, with the scores as log weights.
- *The ratio.* The paper's product of softmax probabilities (eq. 11) is not the law of drawing without replacement.
  The default is the exact probability of what was drawn; `ratio="softmax_product"` is the paper's.
- *The optimiser.* Plain gradient descent: with it the stated learning rates are sensible. With AdamW each step would
  change each weight by about 0.1, and F would be saturated after a few.
- *The networks.* Sizes in `PpoSettings.hidden_dims`; the critic, which sees the mean of the embedded rows, in
  `networks.py`.
- *Passes over a round*, each over all its steps at once, the bound on the gradient's norm, and that advantages are
  standardised over a round. There is no bonus for entropy.
- *Columns* are standardised by the environment and not here.

References:
    Schulman et al., "Proximal Policy Optimization Algorithms", 2017 (arXiv 1707.06347), eq. 7.
    Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation", ICLR 2016, eq. 16.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from safetensors.torch import save_file
from scipy import sparse
from torch import Tensor, nn

from raise_env import RaiseSelectEnv
from raise_env.errors import SettingError, suggestion
from raise_env.features import BLOCKS, NUM_FEATURES
from raise_env.files import replaced_folder
from raise_env.wrappers import require_no_wrappers, top_of_each_class

from .base import Progress, world_of
from .class_law import BatchLaw
from .learned import Selector, stored_view
from .networks import ROWS_AT_ONCE, AcquisitionFunction, Critic
from .selector_files import check_room, read_config, stored_tensors, write_selector

__all__ = [
    "NUM_ROUNDS",
    "PRESETS",
    "PpoSettings",
    "RaisePpo",
    "Rollout",
    "advantages_of",
    "clipped_loss",
    "stage_advantages",
]

#: K, the paper's rounds of training; an episode each.
NUM_ROUNDS = 20

RATIOS = ("exact", "softmax_product")

BASELINES = ("critic", "stage")

OPTIMISERS: Mapping[str, type[torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}

#: Settings by name, as changes to the defaults: the paper's, and those that were seen to learn faster.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "published": {},
    "tuned": {
        "gamma": 0.0,
        "baseline": "stage",
        "optimiser": "adamw",
        "actor_learning_rate": 3e-3,
        "critic_learning_rate": 3e-3,
    },
}

#: Returns that differ by no more than this, in units of the reward, count as alike: at the end of a run the learning
#: rate is about 0, and differences are rounding.
_SMALL_RETURN = 1e-3

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PpoSettings:
    """How `RaisePpo` learns: the first six are the paper's, the others this project's choice.

    Attributes:
        gamma: Discount of the rewards of later steps, from 0 to 1.
        gae_lambda: What generalised advantage estimation weighs longer returns with, from 0 to 1; at 1 the advantage
            is the discounted return minus V.
        clip_range: How far the ratio may move from 1 before its gradient is cut.
        actor_learning_rate: F's, up to 1.
        critic_learning_rate: V's, up to 1.
        weight_decay: Of both, up to 1.
        baseline: What advantages are measured against: "critic", V by generalised advantage estimation; or "stage", the
            returns at the same step of all episodes so far, in their standard deviations, so that late steps with
            their small rewards count as much as the first. With it the first episode only serves for comparison.
        ratio: "exact", the probability of what was drawn; or "softmax_product", the paper's eq. 11.
        optimiser: "sgd" or "adamw".
        num_epochs: Gradient steps after each episode, each on all of its steps.
        max_grad_norm: Norm that each network's gradient is clipped to.
        hidden_dims: Widths of the hidden layers of F and of V.

    Raises:
        SettingError: A value cannot be used.
    """

    gamma: float = 0.99
    gae_lambda: float = 1.0
    clip_range: float = 0.2
    actor_learning_rate: float = 1e-1
    critic_learning_rate: float = 2e-1
    weight_decay: float = 1e-2
    baseline: str = "critic"
    ratio: str = "exact"
    optimiser: str = "sgd"
    num_epochs: int = 8
    max_grad_norm: float = 0.5
    hidden_dims: tuple[int, ...] = (64, 64)

    def __post_init__(self) -> None:
        for name in ("gamma", "gae_lambda", "actor_learning_rate", "critic_learning_rate", "weight_decay"):
            _require(_is_number(getattr(self, name), 0.0, 1.0), name, getattr(self, name), "a number from 0 to 1")
        for name in ("clip_range", "max_grad_norm"):
            good = _is_number(getattr(self, name), 0.0, math.inf) and getattr(self, name) > 0
            _require(good, name, getattr(self, name), "a finite number above 0")
        for name, known in (("baseline", BASELINES), ("ratio", RATIOS), ("optimiser", tuple(OPTIMISERS))):
            _require(getattr(self, name) in known, name, getattr(self, name), f"one of {', '.join(known)}")
        _require(_is_count(self.num_epochs), "num_epochs", self.num_epochs, "a whole number of at least 1")
        dims: Any = self.hidden_dims  # JSON knows no tuples
        good = isinstance(dims, (list, tuple)) and len(dims) > 0 and all(map(_is_count, dims))
        _require(good, "hidden_dims", dims, "a list of at least one whole number, each at least 1")
        object.__setattr__(self, "hidden_dims", tuple(dims))


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """What learning needs to know of an episode, without the 36 columns that never change.

    The paper names the memory of its buffer as a limit, at 200,000 rows. Where the whole pool is on offer, a step is
    kept in what was drawn, the counts of what was taken before, and two numbers: however large the pool.

    Attributes:
        candidates: Pool ids of each step, -1 for padding, each of shape (N,), int64; steps that are offered the same
            share one array.
        classes: Class of each candidate's place, padding included, the same at every step, shape (N,), int64.
        stage: The first two columns, shape (steps, 2), float32.
        times_selected: The last column, shape (steps, N), float32, its zeros left out.
        kinds: What was drawn, as `BatchLaw.sample` gives it, shape (steps, N), int8, its zeros left out.
        rewards: Shape (steps,), float32.
    """

    candidates: Sequence[np.ndarray]
    classes: np.ndarray
    stage: np.ndarray
    times_selected: sparse.csr_array
    kinds: sparse.csr_array
    rewards: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """Which places are no padding, bool: shape (N,) where that is the same at every step, else (steps, N).

        It differs where features are lazy: as many rows of a rare class are offered as were found.
        """
        first = self.candidates[0] >= 0
        distinct = {id(offered): offered for offered in self.candidates}.values()
        if all(np.array_equal(offered >= 0, first) for offered in distinct):
            return np.asarray(first)
        return np.stack([offered >= 0 for offered in self.candidates])

    def observations(self, columns: np.ndarray | ShownColumns, steps: slice) -> np.ndarray:
        """Return the observations of some steps again, shape (steps, N, 39), float32.

        Args:
            columns: Gives the static columns of pool ids as they were shown, float32.
            steps: Which steps.
        """
        candidates = np.stack(self.candidates[steps])
        observations = np.empty((*candidates.shape, NUM_FEATURES), dtype=np.float32)
        observations[:, :, :2] = self.stage[steps, None]
        for start in range(0, len(self.classes), ROWS_AT_ONCE):  # as a whole they would be there twice
            part = slice(start, start + ROWS_AT_ONCE)
            observations[:, part, 2:-1] = columns[candidates[:, part]]
        observations[:, :, -1] = self.times_selected[steps].toarray()
        observations[candidates < 0] = 0.0
        return observations

    def parts(self) -> list[slice]:
        """Return the steps in parts that the networks can take at once."""
        size = max(1, ROWS_AT_ONCE // len(self.classes))  # the networks share out the rows of a larger step
        return [slice(start, min(start + size, len(self.rewards))) for start in range(0, len(self.rewards), size)]


class ShownColumns:
    """The static columns, as observations show them, of the rows that an episode was offered.

    Args:
        world: The environment.
        candidates: The pool ids of each step, -1 for padding.
    """

    def __init__(self, world: RaiseSelectEnv, candidates: Sequence[np.ndarray]) -> None:
        distinct = {id(offered): offered for offered in candidates}.values()
        ids = np.unique(np.concatenate(list(distinct)))
        self._ids = ids[ids >= 0]
        is_hidden = np.zeros(NUM_FEATURES, dtype=bool)
        for name in world.config.hide:
            is_hidden[BLOCKS[name]] = True
        columns = world.assets.features.rows(self._ids)
        self._columns = np.where(is_hidden[2:-1], np.float32(0.0), columns)  # (offered, 36)

    def __getitem__(self, ids: np.ndarray) -> np.ndarray:
        """Return the columns of pool ids of any shape (...), shape (..., 36), float32; for padding any row's."""
        return np.asarray(self._columns[np.searchsorted(self._ids, np.maximum(ids, self._ids[0]))])


class RaisePpo(Selector):
    """Learns F by PPO; acts by taking the rows that it scores highest, as many of each class.

    Where the batch does not divide by the classes, or a class has too few rows, the best rows left over fill it, as
    in `raise_env.TopKScores`. F looks at rows one by one: learned on N candidates, it chooses from any number.

    Args:
        preset: "published", or "tuned": one of `PRESETS`.
        settings: Any of `PpoSettings`, by name, over the preset's.

    Raises:
        SettingError: A setting is unknown or cannot be used.
    """

    default_episodes: ClassVar[int] = NUM_ROUNDS

    def __init__(self, preset: str = "published", **settings: Any) -> None:
        super().__init__()
        if preset not in PRESETS:
            raise SettingError(f"raise_ppo has no preset {preset!r}: {suggestion(str(preset), PRESETS)}")
        known = [field.name for field in fields(PpoSettings)]
        for name in settings:
            if name not in known:
                raise SettingError(f"raise_ppo has no setting {name!r}: {suggestion(name, ['preset', *known])}")
        self.settings = PpoSettings(**{**PRESETS[preset], **settings})
        self.acquisition: AcquisitionFunction | None = None
        self._rewards: list[np.ndarray] = []  # of each episode, shape (steps,)
        self._learners: dict[str, _Learner] = {}

    def learn(
        self, env: gym.Env[Any, Any], episodes: int = NUM_ROUNDS, seed: int = 0, progress: Progress | None = None
    ) -> RaisePpo:
        """Learn for so many rounds of one episode; called again, it goes on with what it knows.

        Args:
            env: A RaiseSelect environment; it is left as it is, and others like it are made.
            episodes: Rounds.
            seed: What candidates, draws and first weights are drawn from.
            progress: Called after each episode with its number and return.

        Raises:
            SettingError: It has learned on another pool before, or a wrapper would be left out.
        """
        require_no_wrappers(env)
        world = world_of(env).variant()  # the given one is left as it is
        self._note_training(world, seed)
        self._make_learners(seed)
        for _ in range(episodes):
            number = len(self.episode_returns)
            rollout = self._run(world, np.random.default_rng([seed, number]))
            self._rewards.append(rollout.rewards)
            self._fit(rollout, world)
            self.episode_returns.append(float(rollout.rewards.sum(dtype=np.float64)))
            if progress is not None:
                progress(number + 1, self.episode_returns[-1])
        return self

    def predict(
        self,
        observation: np.ndarray,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,  # noqa: ARG002 (Stable-Baselines3's signature)
        deterministic: bool = True,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return a 0/1 choice, shape (rows,), int8: the best rows of each class, or a draw.

        Classes are those of the environment that `begin` gave. Without one, or for other rows than those that it
        offers, all rows are of one class.

        Args:
            observation: Shape (rows, 39); rows of zeros are padding.
            state: Passed through.
            episode_start: Not used.
            deterministic: False draws as in learning.
        """
        scores = self.scores(observation)
        mask = np.asarray(observation.any(axis=1))
        classes, num_classes = self._classes(len(mask))
        if deterministic:
            return top_of_each_class(scores, classes, mask, self._num_wanted, num_classes), state
        law = BatchLaw(torch.from_numpy(scores), classes, mask, self._num_wanted, num_classes)
        drawn = law.sample(torch.Generator().manual_seed(int(self._rng.integers(2**63))))
        return (drawn.numpy() > 0).astype(np.int8), state

    def scores(self, observation: np.ndarray) -> np.ndarray:
        """Return F, shape (rows,), float32.

        Raises:
            RuntimeError: Nothing was learned or loaded yet.
        """
        if self.acquisition is None:
            raise RuntimeError("this selector has learned nothing yet: call learn(), or load one.")
        with torch.no_grad():
            scores: np.ndarray = self.acquisition(torch.from_numpy(self._translate(observation))).numpy()
        return scores

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, F's weights; the folder appears whole or not at all."""
        write_selector(
            Path(folder),
            "raise_ppo",
            {} if self.acquisition is None else self.acquisition.state_dict(),
            settings=asdict(self.settings),
            view=self.view,
            episode_returns=self.episode_returns,
            training=self.training,
        )

    @classmethod
    def load(cls, folder: str | Path) -> RaisePpo:
        """Read a selector that `save` wrote; nothing in the folder is run.

        Raises:
            RecordError: A file is missing or torn, or the selector is of another kind or for other features.
            SettingError: A setting is unknown or cannot be used.
        """
        config = read_config(Path(folder), "raise_ppo")
        agent = cls(**config["settings"])
        agent.episode_returns = list(config["episode_returns"])
        agent.training = dict(config["training"])
        agent.view = stored_view(config, Path(folder) / "config.json")
        with stored_tensors(Path(folder) / "model.safetensors") as weights:
            check_room((NUM_FEATURES, *agent.settings.hidden_dims, 1), weights)
            agent.acquisition = _acquisition(agent.settings, torch.Generator())
            agent.acquisition.load_state_dict(weights)
        return agent

    def save_progress(self, folder: str | Path) -> None:
        """Write the selector with all that learning needs to go on from `load_progress`."""
        with replaced_folder(Path(folder)) as beside:
            self.save(beside / "selector")
            parts = {name: learner.tensors() for name, learner in self._learners.items()}
            tensors = {f"{name}.{entry}": value for name, part in parts.items() for entry, value in part.items()}
            tensors |= {f"rewards.{number}": torch.from_numpy(rewards) for number, rewards in enumerate(self._rewards)}
            save_file(tensors, beside / "learners.safetensors")

    def load_progress(self, folder: str | Path) -> None:
        """Take up what `save_progress` wrote; the episodes that follow are those that would have followed.

        Raises:
            RecordError: A file is missing or torn.
        """
        loaded = RaisePpo.load(Path(folder) / "selector")
        self.episode_returns, self.training, self.view = loaded.episode_returns, loaded.training, loaded.view
        self._make_learners(seed=0)
        with stored_tensors(Path(folder) / "learners.safetensors") as tensors:
            for name, learner in self._learners.items():
                prefix = f"{name}."
                learner.take({n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)})
            num_episodes = sum(name.startswith("rewards.") for name in tensors)
            self._rewards = [tensors[f"rewards.{number}"].numpy() for number in range(num_episodes)]

    def _make_learners(self, seed: int) -> None:
        """Make the networks that are not there yet, and their optimisers."""
        generator = torch.Generator().manual_seed(seed)
        if self.acquisition is None:
            self.acquisition, self._learners = _acquisition(self.settings, generator), {}
        if not self._learners:
            critic = Critic(NUM_FEATURES, self.settings.hidden_dims, generator=generator)
            self._learners = {
                "actor": _Learner(self.acquisition, self.settings.actor_learning_rate, self.settings),
                "critic": _Learner(critic, self.settings.critic_learning_rate, self.settings),
            }

    def _classes(self, num_rows: int) -> tuple[np.ndarray, int]:
        """Return the class of each row, shape (rows,), and the number of classes."""
        if self._world is not None and len(self._world.candidates) == num_rows:
            return self._world.candidate_classes, self._world.config.num_classes
        return np.zeros(num_rows, dtype=np.int64), 1

    def _run(self, world: RaiseSelectEnv, rng: np.random.Generator) -> Rollout:
        """Run one episode with drawn batches."""
        observation, _ = world.reset(seed=int(rng.integers(2**31)))
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        classes = world.candidate_classes
        candidates: list[np.ndarray] = []
        seen: dict[str, list[Any]] = {"stage": [], "times_selected": [], "kinds": [], "rewards": []}
        over = False
        while not over:
            mask = world.action_masks()
            law = _law(torch.from_numpy(self.scores(observation)), classes, mask, world)
            kinds = law.sample(generator).numpy()
            offered = world.candidates
            candidates.append(candidates[-1] if candidates and np.array_equal(candidates[-1], offered) else offered)
            seen["stage"].append(observation[mask.argmax(), :2].copy())  # a view would keep the whole observation
            seen["times_selected"].append(sparse.csr_array(observation[None, :, -1]))
            seen["kinds"].append(sparse.csr_array(kinds[None]))
            observation, reward, over, _, _ = world.step((kinds > 0).astype(np.int8))
            seen["rewards"].append(np.float32(reward))
        shown = {name: sparse.vstack(seen.pop(name), format="csr") for name in ("times_selected", "kinds")}
        return Rollout(candidates, classes, **shown, **{name: np.stack(values) for name, values in seen.items()})

    def _fit(self, rollout: Rollout, world: RaiseSelectEnv) -> None:
        """Move F and V by what a round has shown."""
        columns = ShownColumns(world, rollout.candidates)
        with torch.no_grad():
            before = [self._evaluate(rollout, part, columns, world) for part in rollout.parts()]
        log_probs, values = (torch.cat(tensors) for tensors in zip(*before, strict=True))
        rewards = torch.from_numpy(rollout.rewards)
        advantages = advantages_of(rewards, values, self.settings.gamma, self.settings.gae_lambda)
        returns = advantages + values
        if self.settings.baseline == "stage":
            advantages = stage_advantages([_discounted(past, self.settings.gamma) for past in self._rewards])
        advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
        for _ in range(self.settings.num_epochs):
            for part in rollout.parts():
                new_log_probs, new_values = self._evaluate(rollout, part, columns, world)
                log_ratio = new_log_probs - log_probs[part]
                losses = clipped_loss(log_ratio, advantages[part], self.settings.clip_range)
                errors = (new_values - returns[part]).square() / 2
                ((losses.sum() + errors.sum()) / len(rewards)).backward()
            moved = [learner.step() for learner in self._learners.values()]
            if not all(moved):
                logger.warning("raise_ppo: a gradient was not finite; the weights stay as they were")

    def _evaluate(
        self, rollout: Rollout, part: slice, columns: ShownColumns, world: RaiseSelectEnv
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of what was drawn, and values, each of shape (steps,), with gradients."""
        rows = torch.from_numpy(rollout.observations(columns, part))
        kinds = torch.from_numpy(rollout.kinds[part].toarray())
        mask, scores = rollout.mask, self._learners["actor"].network(rows)
        if mask.ndim == 1:
            log_probs = self._log_probs(scores, kinds, rollout.classes, mask, world)
        else:  # a law knows one padding
            mask = mask[part]
            steps = zip(scores, kinds, mask, strict=True)
            log_probs = torch.stack([self._log_probs(s, k, rollout.classes, m, world) for s, k, m in steps])
        return log_probs, self._learners["critic"].network(rows, torch.from_numpy(mask))

    def _log_probs(
        self, scores: Tensor, kinds: Tensor, classes: np.ndarray, mask: np.ndarray, world: RaiseSelectEnv
    ) -> Tensor:
        """Return the log of what the ratio is made of, shape (...,), of draws of shape (..., N)."""
        law = _law(scores, classes, mask, world)
        return law.log_prob(kinds) if self.settings.ratio == "exact" else law.log_softmax_product(kinds)


class _Learner:
    """A network and its optimiser."""

    def __init__(self, network: nn.Module, learning_rate: float, settings: PpoSettings) -> None:
        self.network = network
        self._max_grad_norm = settings.max_grad_norm
        make: Any = OPTIMISERS[settings.optimiser]
        self._optimiser: torch.optim.Optimizer = make(
            network.parameters(), lr=learning_rate, weight_decay=settings.weight_decay
        )

    def step(self) -> bool:
        """Move by the gathered gradient and forget it; return False, having stayed, where it is not finite."""
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self._max_grad_norm)
        is_finite = bool(torch.isfinite(norm))
        if is_finite:
            self._optimiser.step()
        self._optimiser.zero_grad()
        return is_finite

    def tensors(self) -> dict[str, Tensor]:
        """Return weights and the optimiser's memory by name."""
        tensors = {f"weights.{name}": value for name, value in self.network.state_dict().items()}
        for place, memory in self._optimiser.state_dict()["state"].items():
            tensors |= {f"memory.{place}.{name}": value for name, value in memory.items()}
        return tensors

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to what `tensors` returned."""
        weights: dict[str, Tensor] = {}
        memory: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "weights":
                weights[rest] = value
            else:
                place, _, entry = rest.partition(".")
                memory.setdefault(int(place), {})[entry] = value
        self.network.load_state_dict(weights)
        self._optimiser.load_state_dict({**self._optimiser.state_dict(), "state": memory})


def advantages_of(rewards: Tensor, values: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Return the generalised advantage estimates of a whole episode, shape (steps,); nothing follows its last step.

    Args:
        rewards: Shape (steps,).
        values: V before each step, shape (steps,).
        gamma: Discount.
        gae_lambda: Weight of longer returns.
    """
    advantages = torch.zeros_like(rewards)
    following = next_value = torch.zeros(())
    for step in reversed(range(len(rewards))):
        error = rewards[step] + gamma * next_value - values[step]
        following = error + gamma * gae_lambda * following
        advantages[step], next_value = following, values[step]
    return advantages


def stage_advantages(returns: Sequence[Tensor]) -> Tensor:
    """Return how the last episode's returns lie among those of all at the same step, shape (steps,).

    Args:
        returns: Discounted return from each step on, of each episode, shape (steps,); episodes may differ in length.
            An episode stands for itself where no other got as far: its advantage is 0 there.
    """
    last = returns[-1]
    advantages = torch.zeros_like(last)
    for step in range(len(last)):
        others = torch.stack([own[step] for own in returns if len(own) > step])
        advantages[step] = (last[step] - others.mean()) / (others.std(correction=0) + _SMALL_RETURN)
    return advantages


def clipped_loss(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Return minus PPO's clipped objective for each step, shape (steps,)."""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)


def _discounted(rewards: np.ndarray, gamma: float) -> Tensor:
    return advantages_of(torch.from_numpy(rewards), torch.zeros(len(rewards)), gamma, 1.0)


def _acquisition(settings: PpoSettings, generator: torch.Generator) -> AcquisitionFunction:
    return AcquisitionFunction(NUM_FEATURES, settings.hidden_dims, generator=generator)


def _law(scores: Tensor, classes: np.ndarray, mask: np.ndarray, world: RaiseSelectEnv) -> BatchLaw:
    return BatchLaw(scores, classes, mask, world.config.batch_size, world.config.num_classes)


def _require(good: bool, name: str, value: Any, expected: str) -> None:
    if not good:
        raise SettingError(f"raise_ppo: {name} is {value!r}; expected {expected}.")


def _is_number(value: Any, low: float, high: float) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and low <= value <= high


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
