"""The glue for Stable-Baselines3 and sb3-contrib: a law for batches of fixed size, policies over rows, an agent.

SB3 has no official place for a new action distribution; its maintainers advise editing its source (issues 703, 955 and
1046 of DLR-RM/stable-baselines3). Nothing is edited here: to SB3, `SubsetDistribution` *is* a Bernoulli distribution,
and the policies put networks that look at each row alone where SB3 would build flat ones. They mind neither the order
of the rows nor their number, so that what was learned on 64 candidates chooses from 10,000.

A row of nothing but zeros is padding: a subset never holds it, and the critic does not count it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn, SupportsFloat

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import ArrayLike
from safetensors import SafetensorError
from safetensors.torch import save_file
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.distributions import BernoulliDistribution, DiagGaussianDistribution
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, MlpExtractor
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from raise_env import EnvConfig, PickOne, RaiseSelectEnv, TopKScores
from raise_env.errors import OutputError, RecordError, SettingError, suggestion
from raise_env.features import NUM_FEATURES
from raise_env.files import replaced_folder, write_json
from raise_env.foreign_files import read_json
from raise_env.pool import Pool
from raise_env.vector import RaiseSelectVectorEnv
from raise_env.wrappers import require_no_form, require_no_wrappers

from .base import DEFAULT_BATCH_SIZE, Progress, world_of
from .feature_view import FeatureView, Translation, as_it_is
from .learned import NOT_LEARNED
from .networks import AcquisitionFunction, Critic
from .sb3_buffer import LeanRolloutBuffer
from .sb3_files import SavedModel, check_widths, observation_shape, shape_to_build, subset_size
from .sb3_vector import ReportingVecEnv, StackedVecEnv
from .selector_files import read_tensors
from .subset import SubsetLaw

__all__ = [
    "PRESETS",
    "RowExtractor",
    "RowPolicy",
    "Sb3Agent",
    "SubsetDistribution",
    "SubsetPolicy",
]

#: What a selector's folder can make these libraries stumble over.
_LOADING_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, OSError),
    *(RuntimeError, SafetensorError, TypeError, ValueError),
)

#: The format of config.json; counts up when `load` could no longer read what an earlier `save` wrote.
_FORMAT = 2

#: sb3-contrib is optional: it comes with the extra "sb3".
_HAS_CONTRIB = importlib.util.find_spec("sb3_contrib") is not None

# Why gamma is 0 almost everywhere: a choice shows in the very next reward, while the rewards of the steps after it are
# moved far more by the draw of candidates and by the stage of training. Weight on those is noise: PPO with gamma 1
# made no visible progress where gamma 0 did. Picks are rewarded with the last one of their batch, so they have to look
# as far ahead as a batch is long: about 1 / (1 - 0.9) = 10 picks.
_ON_POLICY = {"n_steps": 40, "gamma": 0.0, "gae_lambda": 1.0, "device": "cpu"}
_OFF_POLICY = {
    "learning_rate": 1e-3,
    "buffer_size": 10_000,
    "learning_starts": 40,
    "batch_size": 64,
    "train_freq": 1,
    "gamma": 0.0,
    "device": "cpu",
}
_PICK_GAMMA = 0.9

#: Hyperparameters by class, for an environment whose every step trains a language model: SB3's own defaults (2,048
#: steps before the first update, buffers of a million observations) expect one that is free.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "PPO": {**_ON_POLICY, "learning_rate": 3e-3, "batch_size": 40, "n_epochs": 8},
    "MaskablePPO": {**_ON_POLICY, "n_steps": 320, "learning_rate": 3e-3, "batch_size": 80, "n_epochs": 8},
    "RecurrentPPO": {**_ON_POLICY, "learning_rate": 1e-3, "batch_size": 40, "n_epochs": 8},
    "TRPO": {**_ON_POLICY, "batch_size": 40},
    "A2C": {**_ON_POLICY, "n_steps": 8, "learning_rate": 1e-3, "normalize_advantage": True},
    "SAC": _OFF_POLICY,
    "TQC": _OFF_POLICY,
    "CrossQ": _OFF_POLICY,
    "TD3": {**_OFF_POLICY, "action_noise": 0.3},
    "DDPG": {**_OFF_POLICY, "action_noise": 0.3},
    "DQN": {**_OFF_POLICY, "exploration_fraction": 0.5, "target_update_interval": 100},
    "QRDQN": {**_OFF_POLICY, "exploration_fraction": 0.5, "target_update_interval": 100},
    "ARS": {"n_delta": 4, "device": "cpu"},
}


#: Algorithms that take any rollout buffer; the others come with their own.
_LEAN = ("PPO", "A2C")

#: Who sets one of these decides how many updates there are.
_UPDATE_SETTINGS = {"train_freq", "gradient_steps"}


class SubsetDistribution(BernoulliDistribution):
    """`SubsetLaw` in the form that SB3 asks for: the law of a 0/1 vector with exactly `subset_size` ones.

    Args:
        action_dims: Length of the vector.
        subset_size: How many ones; where fewer rows may be chosen, all of these.
    """

    def __init__(self, action_dims: int, subset_size: int) -> None:
        super().__init__(action_dims)
        self.subset_size = subset_size

    def proba_distribution(self, action_logits: Tensor, mask: Tensor | None = None) -> SubsetDistribution:
        """Take logits of shape (batch, N), and a mask of the same shape, True where a row may be chosen."""
        self.law = SubsetLaw(action_logits, self.subset_size, mask)
        return self

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return the log-probabilities, shape (batch,), of 0/1 actions, shape (batch, N)."""
        return self.law.log_prob(actions)

    def entropy(self) -> Tensor:
        """Return the exact entropies in nats, shape (batch,)."""
        return self.law.entropy()

    def sample(self) -> Tensor:
        """Draw 0/1 actions, shape (batch, N), with torch's global generator, which SB3 seeds."""
        return self.law.sample()

    def mode(self) -> Tensor:
        """Return the most probable 0/1 actions, shape (batch, N)."""
        return self.law.mode()

    @property
    def distribution(self) -> NoReturn:  # type: ignore[override]  # there is no torch distribution
        """What TRPO takes its divergence of, after the first rollout: no earlier can it be told from PPO.

        Raises:
            SettingError: Always.
        """
        raise SettingError(
            "TRPO needs a divergence between two subset laws, which SubsetPolicy does not have: take PPO or A2C."
        )


class RowExtractor(BaseFeaturesExtractor):
    """Hands observations on as rows, shape (batch, N, num_features); SB3's default would flatten them.

    Args:
        observation_space: A Box of shape (N, num_features).

    Raises:
        SettingError: It has another number of dimensions.
    """

    def __init__(self, observation_space: spaces.Box) -> None:
        _require_rows(len(observation_space.shape or ()) == 2, observation_space)
        super().__init__(observation_space, features_dim=observation_space.shape[-1])

    def forward(self, observations: Tensor) -> Tensor:
        """Return the observations as they are."""
        return observations


class _ValueNet(Critic):
    """A critic that leaves padding out, and returns a column, as SB3 expects."""

    def forward(self, rows: Tensor, row_mask: Tensor | None = None) -> Tensor:
        mask = _is_real(rows) if row_mask is None else row_mask
        return super().forward(rows, mask).unsqueeze(-1)


class _RowWise(BasePolicy):
    """What the policies below share, to be mixed in before SB3's actor-critic policy of choice.

    `net_arch` keeps SB3's form, {"pi": widths, "vf": widths}: the actor's and the critic's hidden layers, none where it
    does not name them.
    """

    net_arch: list[int] | dict[str, list[int]]
    activation_fn: type[nn.Module]
    features_dim: int
    value_net: Any  # SB3 insists on a linear layer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", RowExtractor)
        super().__init__(*args, **kwargs)

    def scores(self, observation: ArrayLike | Tensor) -> Tensor:
        """Return every row's score, higher is better: shape (..., N) for rows of shape (..., N, num_features)."""
        rows = torch.as_tensor(observation, dtype=torch.float32, device=self.device)
        scores: Tensor = self.action_net(rows)
        return scores

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,  # noqa: ARG002 (SB3's signature)
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return the action for any number of rows, which SB3's own method would force into the number trained on.

        Args:
            observation: Shape (N, num_features), or (batch, N, num_features).
            state: Passed through: there is no memory.
            episode_start: Not used.
            deterministic: Whether to take the most probable action rather than to draw one.
            action_masks: What may be picked, shape (..., N); for MaskablePPO's policy alone.
        """
        self.set_training_mode(False)
        masks = {} if action_masks is None else {"action_masks": action_masks}
        rows, is_batch = self.obs_to_tensor(observation)
        with torch.no_grad():
            action = self._predict(rows, deterministic=deterministic, **masks).cpu().numpy()
        if isinstance(self.action_space, spaces.Box):
            action = action.clip(self.action_space.low.min(), self.action_space.high.max())
        action = action.astype(self.action_space.dtype)
        return (action if is_batch else action[0]), state

    def obs_to_tensor(self, observation: Any) -> tuple[Tensor, bool]:
        """Return rows of shape (batch, N, num_features), and whether there was a batch dimension already."""
        rows = torch.as_tensor(np.asarray(observation), device=self.device)
        return (rows, True) if rows.dim() == 3 else (rows.unsqueeze(0), False)

    def _build(self, lr_schedule: Schedule) -> None:
        if isinstance(self.features_extractor, RowExtractor):  # a stack of flattened observations has two sides as well
            num_rows, _ = self.observation_space.shape or (0, 0)
            _require_rows(num_rows == spaces.flatdim(self.action_space), self.observation_space)
        dims = self.net_arch if isinstance(self.net_arch, dict) else {"pi": self.net_arch, "vf": self.net_arch}
        # Without layers this is the identity: the networks below get the rows themselves.
        self.mlp_extractor = MlpExtractor(self.features_dim, net_arch=[], activation_fn=self.activation_fn)
        self.action_net = self._actor(AcquisitionFunction(self.features_dim, dims.get("pi", []), self.activation_fn))
        self.value_net = _ValueNet(self.features_dim, dims.get("vf", []), self.activation_fn)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]  # every optimiser has a learning rate

    def _actor(self, acquisition: AcquisitionFunction) -> nn.Module:
        return acquisition


class RowPolicy(_RowWise, ActorCriticPolicy):
    """One score a row, from which SB3's distribution for the action space draws; for PPO, A2C and TRPO.

    Discrete: the scores are the logits. MultiBinary: each row is drawn for itself, so that the size of the set varies.
    Box: the scores, through a tanh, are the means, with one learned deviation for all rows. It starts small and the
    tanh stays, as SB3 clips to the bounds and a ranking of clipped scores is a ranking of ties.

    Args:
        args: As for `ActorCriticPolicy`.
        log_std_init: Log of the first deviation, for Box.
        kwargs: As for `ActorCriticPolicy`.

    Raises:
        SettingError: State-dependent exploration (`use_sde`) was asked for.
    """

    def __init__(self, *args: Any, log_std_init: float = -1.5, **kwargs: Any) -> None:
        if kwargs.get("use_sde"):
            raise SettingError("use_sde=True does not work with policies over rows: leave it out.")
        super().__init__(*args, log_std_init=log_std_init, **kwargs)

    def _actor(self, acquisition: AcquisitionFunction) -> nn.Module:
        if not isinstance(self.action_dist, DiagGaussianDistribution):
            return acquisition
        self.log_std = nn.Parameter(torch.full((1,), self.log_std_init))
        return nn.Sequential(acquisition, nn.Tanh())


class SubsetPolicy(RowPolicy):
    """A policy over batches of a fixed size, for MultiBinary actions with PPO and A2C.

    `PPO(SubsetPolicy, env, policy_kwargs={"subset_size": 8})` is all there is to do.

    Args:
        args: As for `ActorCriticPolicy`.
        subset_size: How many rows to choose.
        kwargs: As for `ActorCriticPolicy`.

    Raises:
        SettingError: The action space is not MultiBinary.
    """

    def __init__(self, *args: Any, subset_size: int, **kwargs: Any) -> None:
        self.subset_size = subset_size
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        if not isinstance(self.action_dist, BernoulliDistribution):
            raise SettingError(f"SubsetPolicy needs a MultiBinary action space; got {self.action_space}.")
        self.action_dist = SubsetDistribution(self.action_dist.action_dims, self.subset_size)
        super()._build(lr_schedule)

    def set_subset_size(self, subset_size: int) -> None:
        """Let it choose so many rows from now on: scores of rows say nothing of how many are taken."""
        assert isinstance(self.action_dist, SubsetDistribution)
        self.subset_size = self.action_dist.subset_size = subset_size

    def _get_action_dist_from_latent(self, latent_pi: Tensor) -> SubsetDistribution:
        assert isinstance(self.action_dist, SubsetDistribution)
        return self.action_dist.proba_distribution(self.action_net(latent_pi), mask=_is_real(latent_pi))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "subset_size": self.subset_size}


if _HAS_CONTRIB:
    from sb3_contrib.common.maskable.distributions import MaskableCategoricalDistribution
    from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy

    __all__ += ["MaskableRowPolicy"]

    class MaskableRowPolicy(_RowWise, MaskableActorCriticPolicy):
        """One logit a row for Discrete actions with MaskablePPO: picks row after row, of those that the mask allows."""

        def _get_action_dist_from_latent(self, latent_pi: Tensor) -> MaskableCategoricalDistribution:
            logits = self.action_net(latent_pi)
            # A new one each time: SB3's is fixed to the number of rows in training.
            return MaskableCategoricalDistribution(logits.shape[-1]).proba_distribution(logits)


class Sb3Agent:
    """Any algorithm of Stable-Baselines3 or sb3-contrib as an agent: what it needs around it, and safe files.

    How an algorithm acts is its action form. "subset" draws batches of exactly the environment's batch size;
    "multibinary" decides on each row for itself; "scores" ranks the rows, through `TopKScores`; "pick" names one row
    after another, through `PickOne`: when it acts, the best that is still free; while it learns, but for MaskablePPO,
    any, and one that is picked already uses up a pick. PPO, A2C, TRPO and MaskablePPO get policies over rows, the
    others SB3's own networks over the flattened observation, which fit one number of candidates only.

    Args:
        algorithm: Name of the class, such as "PPO"; a leading "sb3:" may stay.
        action_form: One of the four, or None for that of the loaded model, or the best that the class can take.
        policy: Name of one of SB3's own policies, such as "MlpPolicy", in place of one over rows; None: what the loaded
            model was made with, or the best.
        load: A file that SB3's `model.save` wrote, to act and to go on learning with its weights.
        num_envs: Environments to learn from at once, over one base model; ARS takes one only. Between two updates,
            algorithms that learn from rollouts make as many steps as with one environment, unless `n_steps` is given;
            those with a replay buffer step each environment once, and then make as many updates as there are
            environments, unless `train_freq` or `gradient_steps` is given. `n_steps` and `train_freq` are SB3's, steps
            of each environment.
        hyperparameters: The class's own arguments, as plain data, over those in `PRESETS`; `action_noise` is the
            deviation of Gaussian noise.

    Attributes:
        name: "sb3:" and the name of the class.
        model: The SB3 model, once it has learned or been loaded; an agent in its own right.
        view: The features that it learned on; None before it has learned, and for a file that SB3 saved.

    Raises:
        SettingError: The class, the action form, the policy or a hyperparameter is unknown, or they do not go together.
        RecordError: The file cannot be read, or its weights do not fit the model that these settings make.
    """

    default_episodes: ClassVar[int] = 16

    def __init__(
        self,
        algorithm: str,
        *,
        action_form: str | None = None,
        policy: str | None = None,
        load: str | Path | None = None,
        num_envs: int = 1,
        **hyperparameters: Any,
    ) -> None:
        self._class = _find_class(algorithm.removeprefix("sb3:"))
        self.name = f"sb3:{self._class.__name__}"
        if not isinstance(num_envs, int) or isinstance(num_envs, bool) or num_envs < 1:
            raise SettingError(f"{self.name}: num_envs is {num_envs!r}; expected a whole number of at least 1.")
        if num_envs > 1 and self._class.__name__ == "ARS":
            raise SettingError(
                f"{self.name}: num_envs is {num_envs}; expected 1: ARS scores each variant in one episode, and those "
                "of the other environments would be run for nothing."
            )
        self.num_envs = num_envs
        _check_hyperparameters(self._class, hyperparameters)
        self.hyperparameters = hyperparameters
        self.model: BaseAlgorithm | None = None
        self.view: FeatureView | None = None
        self._translate: Translation = as_it_is
        self._subset_size = 0
        saved = None if load is None else SavedModel.read(load)
        if saved is not None:
            action_form = action_form or saved.action_form
            if policy is None and "value_net.weight" in saved.weights:  # SB3's own critic is one linear layer
                policy = next(iter(self._class.policy_aliases))
        self.policy = _checked_policy(self._class, policy)
        self.action_form = _checked_form(self._class, action_form, self.policy)
        if saved is not None:
            self._take_over(saved, load)

    def wrap(self, env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
        """Return the environment with the action space of this agent's action form.

        Raises:
            SettingError: It is wrapped for another form already.
        """
        return _wrap(env, self.action_form)

    def check(self, config: EnvConfig, pool: Pool, episodes: int) -> None:
        """Refuse to act without ever having learned, and what the model that there is could not read.

        Raises:
            SettingError: It has not learned, and is to learn for no episodes; or it has, on another number of
                candidates, and its network is flat.
        """
        del pool
        if not episodes and self.model is None:
            raise SettingError(NOT_LEARNED)
        # How many rows of a whole pool can be offered is not known yet.
        if self.model is not None and config.num_candidates != "all":
            self._check_fit((config.num_candidates, NUM_FEATURES), self.model)

    def learn(
        self,
        env: gym.Env[Any, Any],
        episodes: int,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Sb3Agent:
        """Learn for about as many steps as full episodes would have; the global generators stay put.

        Weights that there are already, loaded or learned before, are where it begins. Only the weights: what an
        optimiser remembers, a replay buffer, and the schedule of exploration are new each time.

        Args:
            env: The environment as `gym.make` returns it; its `config` tells horizon and batch size. With `num_envs`
                above 1 it is left as it is, and others like it are made, without the wrappers around it.
            episodes: How many episodes of `config.horizon` steps. Algorithms that learn from whole rollouts may take
                a few steps more.
            seed: Seed of the environment, of the first weights and of exploration.
            progress: Called after each episode with its number, from 1, and its return.

        Returns:
            This agent.

        Raises:
            SettingError: The weights that there are, or its wrappers, do not fit the environment.
        """
        config = env.get_wrapper_attr("config")
        before = self.model
        if before is not None:
            self._check_fit(env.observation_space.shape or (), before)
        num_steps = episodes * self._episode_steps(config)
        self._subset_size = config.batch_size
        with _global_generators_kept():
            offers_all = getattr(config, "num_candidates", None) == "all"
            model = self._build(self._to_learn_in(env, progress), num_steps, seed, offers_all)
            if before is not None:
                _set_weights(model, before.policy.state_dict())
            model.set_logger(Logger(None, []))  # SB3's default one makes a folder
            model.learn(num_steps)
        # What learned before on another pool, and learns on here, knows these features from now on.
        world = env.unwrapped
        self.view = FeatureView.of(world) if isinstance(world, RaiseSelectEnv) else None
        model.env = None  # so that the agent can be copied and stored without the language model
        self.model = model
        return self

    def episodes_taken(self, config: EnvConfig) -> float:
        """Return for as many steps as how many full episodes the last `learn` went on: with whole rollouts for more.

        Args:
            config: The settings of the environment that it learned in.

        Raises:
            SettingError: The agent has not learned yet.
        """
        return self._trained().num_timesteps / self._episode_steps(config)

    def _episode_steps(self, config: EnvConfig) -> int:
        """Return the steps of a full episode as SB3 counts them: where rows are picked, each pick is one."""
        return config.horizon * (config.batch_size if self.action_form == "pick" else 1)

    def _to_learn_in(self, env: gym.Env[Any, Any], progress: Progress | None) -> gym.Env[Any, Any] | VecEnv:
        if self.num_envs == 1:
            return _Learning(self.wrap(env), progress)
        require_no_wrappers(env, ", or learn in one environment, num_envs=1")
        envs = [self.wrap(world_of(env).variant()) for _ in range(self.num_envs)]
        stacked = StackedVecEnv(RaiseSelectVectorEnv.over(envs))
        return stacked if progress is None else ReportingVecEnv(stacked, progress)

    def begin(self, env: gym.Env[Any, Any], seed: int) -> None:
        """Check that the model can act in the environment, whose pool and batch size may be others than in learning.

        Raises:
            SettingError: The agent has not learned yet, not on as many candidates, or on other features.
        """
        del seed
        model = self._trained()
        self._check_fit(env.observation_space.shape or (), model)
        if isinstance(model.policy, SubsetPolicy):
            model.policy.set_subset_size(env.get_wrapper_attr("config").batch_size)
        world = env.unwrapped
        self._translate = as_it_is
        if self.view is not None and isinstance(world, RaiseSelectEnv):
            self._translate = self.view.translation(world)

    def predict(
        self,
        observation: np.ndarray,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return the model's action and state; see `BaseAlgorithm.predict`.

        Args:
            observation: Shape (N, num_features), or with a batch dimension before.
            state: What the last call returned, for algorithms with a memory.
            episode_start: Whether an episode has just begun, shape (batch,), for algorithms with a memory.
            deterministic: Whether to take the best action rather than to draw one (from torch's global generator), for
                algorithms that draw from a law of their own.
            action_masks: What may be picked, shape (N,), as `PickOne` tells it; the other forms need none. Without it a
                row may be picked again.

        Raises:
            SettingError: The agent has not learned yet.
        """
        policy = self._trained().policy
        with _free_rows_alone(policy, action_masks if self.action_form == "pick" else None):
            # Past the model's own method: DQN's would now and then explore, and name any row at all.
            return policy.predict(self._translate(observation), state, episode_start, deterministic)

    @property
    def action_space(self) -> spaces.Space[Any]:
        """The action space that the model was trained on, which tells a rollout which wrapper it needs.

        Raises:
            SettingError: The agent has not learned yet.
        """
        return self._trained().action_space

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, the weights of the policy; nothing is pickled.

        Args:
            folder: Appears whole or not at all, in place of what may be there.

        Raises:
            SettingError: The agent has not learned yet.
            OutputError: The folder cannot be written.
        """
        model = self._trained()
        num_candidates, num_features = model.observation_space.shape or (0, 0)
        config = {
            "format": _FORMAT,
            "agent": self.name,
            "action_form": self.action_form,
            "policy": self.policy,
            "num_envs": self.num_envs,
            "hyperparameters": self.hyperparameters,
            "num_candidates": num_candidates,
            "num_features": num_features,
            "subset_size": self._subset_size,
        }
        weights = {name: tensor.cpu() for name, tensor in model.policy.state_dict().items()}
        try:
            with replaced_folder(Path(folder)) as beside:
                config["features"] = None if self.view is None else self.view.save(beside)
                write_json(beside / "config.json", config)
                save_file(weights, beside / "model.safetensors")
        except OSError as error:
            raise OutputError(f"{folder}: cannot write the selector: {error}") from error

    @classmethod
    def load(cls, folder: str | Path) -> Sb3Agent:
        """Return the agent that `save` wrote. Reading runs no code from the files.

        Raises:
            RecordError: A file is missing, or not what `save` writes, or the features have changed since.
        """
        try:
            config = read_json(Path(folder, "config.json"), inside=Path(folder))
            if not isinstance(config, dict) or config["format"] != _FORMAT:
                raise ValueError("it is of another format; learn it again with this version")
            weights = read_tensors(Path(folder, "model.safetensors"))
            form, policy = config["action_form"], config.get("policy")
            # Where learning would write is not for a file to say.
            hyperparameters = {n: v for n, v in config["hyperparameters"].items() if n != "tensorboard_log"}
            check_widths(hyperparameters.get("policy_kwargs"), weights)
            shape = observation_shape([config["num_candidates"], config["num_features"]])
            num_envs = config.get("num_envs", 1)
            agent = cls(config["agent"], action_form=form, policy=policy, num_envs=num_envs, **hyperparameters)
            agent._subset_size = subset_size(config["subset_size"], shape[0])
            agent.view = None if config["features"] is None else FeatureView.read(config["features"], Path(folder))
            model = agent._build_untrained(agent._shape_to_build(shape, weights))
            _set_weights(model, weights)
            agent.model = model
        except _LOADING_ERRORS as error:
            # A RuntimeError is torch's, on weights that do not fit.
            reason = f"no field {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
            raise RecordError(f"{folder}: not a selector that can be read: {reason}") from error
        return agent

    def _trained(self) -> BaseAlgorithm:
        if self.model is None:
            raise SettingError(
                f"{self.name} has not learned yet: let it learn for some episodes, or load what has: a model that "
                "Stable-Baselines3 saved (load=FILE), or a selector."
            )
        return self.model

    def _take_over(self, saved: SavedModel, path: str | Path | None) -> None:
        """Make the model that was saved; `path` is for messages."""
        given = self.hyperparameters.get("policy_kwargs", {})
        policy_kwargs = {**saved.policy_kwargs, **given}
        size = policy_kwargs.pop("subset_size", DEFAULT_BATCH_SIZE)
        if policy_kwargs:
            self.hyperparameters = {**self.hyperparameters, "policy_kwargs": policy_kwargs}
        try:
            self._subset_size = subset_size(size, saved.num_candidates)
            check_widths(policy_kwargs, saved.weights)
            shape = self._shape_to_build((saved.num_candidates, saved.num_features), saved.weights)
        except ValueError as error:
            raise RecordError(f"{path}: the weights are not those of {self.name}: {error}.") from error
        try:
            model = self._build_untrained(shape)
        except TypeError as error:  # a setting that the policy does not know
            raise RecordError(
                f"{path}: {self.name} cannot be built with policy_kwargs {policy_kwargs}: {error}. Was it another "
                "algorithm that was saved?"
            ) from error
        misfit = _misfit(model.policy.state_dict(), saved.weights)
        if misfit:
            policy = type(model.policy).__name__
            raise RecordError(
                f"{path}: the weights are not those of {self.name} in the form {self.action_form!r} with {policy}: "
                f"{misfit}. Name the algorithm, action_form, policy and "
                "policy_kwargs that it was made with."
            )
        _set_weights(model, saved.weights)
        self.model = model

    def _check_fit(self, offered: tuple[int, ...], model: BaseAlgorithm) -> None:
        """Refuse observations, of the shape that is offered, which the model cannot read.

        Raises:
            SettingError: Another number of features, or of candidates where the network is flat.
        """
        learned_on = model.observation_space.shape or ()
        compared = slice(1, None) if isinstance(model.policy, _RowWise) else slice(None)
        if offered[compared] != learned_on[compared]:
            raise SettingError(
                f"{self.name} learned on observations of shape {learned_on}, and this environment's have {offered}: "
                "set num_candidates to what it learned on, or take an algorithm that looks at rows one by one."
            )

    def _shape_to_build(self, shape: tuple[int, int], weights: Mapping[str, Tensor]) -> tuple[int, int]:
        """Return the shape of the observations that a model for these weights is to be built for.

        Raises:
            ValueError: They are not made for what they are said to have learned on.
        """
        is_flat = isinstance(self.policy or _policy(self._class, self.action_form), str)
        return shape_to_build(shape, weights, is_flat=is_flat)

    def _build_untrained(self, shape: tuple[int, int]) -> BaseAlgorithm:
        """Return a model for weights that are there already."""
        with _global_generators_kept():
            return self._build(_SpacesOnly(self.action_form, *shape), num_steps=1, seed=None)

    def _build(
        self, env: gym.Env[Any, Any] | VecEnv, num_steps: int, seed: int | None, offers_all: bool = False
    ) -> BaseAlgorithm:
        settings = self._settings(num_steps, env.num_envs if isinstance(env, VecEnv) else 1)
        if offers_all and self._class.__name__ in _LEAN:
            settings["rollout_buffer_class"] = LeanRolloutBuffer
        if isinstance(settings.get("action_noise"), int | float):
            shape = env.action_space.shape or ()
            settings["action_noise"] = NormalActionNoise(np.zeros(shape), np.full(shape, settings["action_noise"]))
        policy = self.policy or _policy(self._class, self.action_form)
        if self.action_form == "subset":
            settings["policy_kwargs"] = {**settings.get("policy_kwargs", {}), "subset_size": self._subset_size}
        return self._class(policy, env, seed=seed, **settings)

    def _settings(self, num_steps: int, num_envs: int) -> dict[str, Any]:
        """Return preset and own hyperparameters, those that nobody has set fitted to a run of so many steps."""
        settings = dict(PRESETS.get(self._class.__name__, {"device": "cpu"}))
        if self.action_form == "pick" and "gamma" in _parameters(self._class):
            settings["gamma"] = _PICK_GAMMA
        own = self.hyperparameters
        settings |= own
        if issubclass(self._class, OnPolicyAlgorithm):
            if "n_steps" in settings and "n_steps" not in own:
                num_rollouts = max(1, num_steps // settings["n_steps"])
                # The last one ends with the run.
                settings["n_steps"] = max(2, math.ceil(num_steps / num_rollouts / num_envs))
            if "batch_size" in settings and "batch_size" not in own:
                size = settings["n_steps"] * num_envs
                if size % settings["batch_size"]:
                    settings["batch_size"] = size  # SB3 warns of minibatches of unequal size
        elif issubclass(self._class, OffPolicyAlgorithm) and "buffer_size" in settings and "buffer_size" not in own:
            settings["buffer_size"] = min(settings["buffer_size"], num_steps)
        if num_envs > 1 and "gradient_steps" in _parameters(self._class) and not own.keys() & _UPDATE_SETTINGS:
            settings["gradient_steps"] = -1  # as many as there were steps in all environments
        return settings


def _wrap(env: gym.Env[Any, Any], action_form: str) -> gym.Env[Any, Any]:
    form = {"scores": TopKScores, "pick": PickOne}.get(action_form)
    if form is not None and is_wrapped(env, form):
        return env
    require_no_form(env, f"action_form is {action_form!r}")
    return env if form is None else form(env)


class _Learning(gym.Wrapper[Any, Any, Any, Any]):
    """Tells number and return of each episode that ends, and lets the language model train whatever SB3 is doing."""

    def __init__(self, env: gym.Env[Any, Any], progress: Progress | None) -> None:
        super().__init__(env)
        self._progress = progress or (lambda _number, _total: None)
        self._num_episodes = 0
        self._return = 0.0

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self._return = 0.0
        return super().reset(**kwargs)

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        with torch.enable_grad():  # ARS needs no gradients, and turns them off around everything that it does
            result = super().step(action)
        _, reward, terminated, truncated, _ = result
        self._return += float(reward)
        if terminated or truncated:
            self._num_episodes += 1
            self._progress(self._num_episodes, self._return)
        return result


class _SpacesOnly(gym.Env[Any, Any]):
    """Spaces without a world: what SB3 needs to build a model that shall not be trained."""

    def __init__(self, action_form: str, num_candidates: int, num_features: int) -> None:
        self._num_candidates = num_candidates
        self.observation_space = spaces.Box(-np.inf, np.inf, (num_candidates, num_features), np.float32)
        if action_form == "scores":
            self.action_space: spaces.Space[Any] = spaces.Box(-1.0, 1.0, (num_candidates,), np.float32)
        elif action_form == "pick":
            self.action_space = spaces.Discrete(num_candidates)
        else:
            self.action_space = spaces.MultiBinary(num_candidates)

    def action_masks(self) -> np.ndarray:
        """Return that everything may be picked: sb3-contrib builds no masked model without."""
        return np.ones(self._num_candidates, dtype=bool)


def _find_class(name: str) -> type[BaseAlgorithm]:
    """Return the algorithm of that name.

    Raises:
        SettingError: Neither library has it.
    """
    libraries = ["stable_baselines3", *(["sb3_contrib"] if _HAS_CONTRIB else [])]
    modules = [importlib.import_module(library) for library in libraries]
    found = {entry: getattr(module, entry) for module in modules for entry in module.__all__}
    known = {entry: cls for entry, cls in found.items() if isinstance(cls, type) and issubclass(cls, BaseAlgorithm)}
    if name not in known:
        advice = "" if _HAS_CONTRIB else " More with sb3-contrib: pip install sb3-contrib."
        raise SettingError(f"no algorithm is called {name!r}: {suggestion(name, known)}{advice}")
    return known[name]


def _checked_policy(algorithm: type[BaseAlgorithm], policy: str | None) -> str | None:
    """Return the name of a policy of SB3's own, or None for the best.

    Raises:
        SettingError: The class has no such policy, or one for other observations.
    """
    known = [alias for alias in algorithm.policy_aliases if not alias.startswith(("Cnn", "MultiInput"))]
    if policy is not None and policy not in known:
        raise SettingError(f"{algorithm.__name__} has no policy {policy!r}: {suggestion(policy, known)}")
    return policy


def _checked_form(algorithm: type[BaseAlgorithm], action_form: str | None, policy: str | None) -> str:
    """Return the form in which a model acts.

    Raises:
        SettingError: The class cannot act in the form that was asked for, or not with such a policy.
    """
    forms = _action_forms(algorithm)
    if policy is not None:
        forms = tuple(form for form in forms if form != "subset")  # that is a policy of its own
    if not forms:
        raise SettingError(f"sb3:{algorithm.__name__} takes none of this environment's action spaces: take another.")
    if action_form is not None and action_form not in forms:
        raise SettingError(
            f"sb3:{algorithm.__name__} cannot act in the form {action_form!r}"
            f"{f' with {policy}' if policy else ''}: {suggestion(action_form, forms)}"
        )
    return action_form or forms[0]


def _misfit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Return the first thing in which weights differ from those expected, in words; empty where they fit."""
    for name, tensor in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name].shape != tensor.shape:
            return f"{name} has shape {tuple(found[name].shape)}, and {tuple(tensor.shape)} was expected"
    return next((f"there is {name} too" for name in found if name not in expected), "")


def _set_weights(model: BaseAlgorithm, weights: Mapping[str, Any]) -> None:
    """Give the model's policy these weights; the optimiser stays new.

    Raises:
        RuntimeError: They are of other names or shapes.
    """
    model.policy.load_state_dict(weights)
    if hasattr(model, "weights"):  # ARS keeps those that it varies beside the policy
        model.weights = nn.utils.parameters_to_vector(model.policy.parameters()).detach()


def _action_forms(algorithm: type[BaseAlgorithm]) -> tuple[str, ...]:
    """Return the action forms that the class can take, the best first."""
    if algorithm.__name__ == "MaskablePPO":
        return ("pick",)  # its masks for MultiBinary hold two numbers a row
    accepted = [form for form in ("scores", "pick") if _accepts(algorithm, form)]
    # Others take MultiBinary by name only (RecurrentPPO 2.9.2 fails in its first update).
    if ActorCriticPolicy in algorithm.policy_aliases.values():
        accepted.append("multibinary")
    # TRPO would need the divergence of two subset laws.
    return ("subset", *accepted) if algorithm.__name__ in ("PPO", "A2C") else tuple(accepted)


def _accepts(algorithm: type[BaseAlgorithm], action_form: str) -> bool:
    """Whether the constructor, which checks the action space, goes through; no networks are built."""
    build: Any = algorithm
    try:
        env = _SpacesOnly(action_form, num_candidates=2, num_features=1)
        build(next(iter(algorithm.policy_aliases)), env, device="cpu", _init_setup_model=False)
    except (AssertionError, StopIteration):
        return False
    return True


def _policy(algorithm: type[BaseAlgorithm], action_form: str) -> str | type[BasePolicy]:
    """Return a policy over rows where the class can use one, else the name of its own for plain vectors."""
    alias, default = next(iter(algorithm.policy_aliases.items()))
    if action_form == "subset":
        return SubsetPolicy
    if default is ActorCriticPolicy:
        return RowPolicy
    return MaskableRowPolicy if algorithm.__name__ == "MaskablePPO" else alias


def _check_hyperparameters(algorithm: type[BaseAlgorithm], given: Mapping[str, Any]) -> None:
    """Refuse what the class does not know, and what config.json could not hold.

    Raises:
        SettingError: A name is unknown, or a value is not plain data.
    """
    known = _parameters(algorithm) - {"policy", "env", "seed", "_init_setup_model"}
    for name, value in given.items():
        if name not in known:
            raise SettingError(f"{algorithm.__name__} has no hyperparameter {name!r}: {suggestion(name, known)}")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise SettingError(f"hyperparameter {name} is {value!r}; expected plain data, as in JSON.") from error


def _parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def _is_real(rows: Tensor) -> Tensor:
    """Return which rows are not padding, shape (..., N), of rows of shape (..., N, num_features)."""
    return (rows != 0).any(-1)


def _require_rows(are_rows: bool, observation_space: spaces.Space[Any]) -> None:
    if not are_rows:
        raise SettingError(
            f"a policy over rows got observations of shape {observation_space.shape}; expected (candidates, features): "
            'leave out wrappers that flatten or stack them, or take one of SB3\'s own policies, such as "MlpPolicy".'
        )


@contextlib.contextmanager
def _free_rows_alone(policy: BasePolicy, mask: np.ndarray | None) -> Iterator[None]:
    """Let a policy over Discrete actions say -inf of each row that the mask forbids; None forbids none.

    What it says is what one of its modules returns, whatever the algorithm: logits, shape (batch, N), of actors and of
    ARS; values, shape (batch, N), of DQN; their quantiles, shape (batch, any, N), of QRDQN.

    Args:
        policy: A policy of any algorithm that picks.
        mask: What may be picked, shape (N,).
    """
    if mask is None:
        yield
        return
    forbidden = ~torch.as_tensor(mask, dtype=torch.bool, device=policy.device)
    (module,) = (getattr(policy, name) for name in ("action_net", "q_net", "quantile_net") if hasattr(policy, name))
    hook = module.register_forward_hook(lambda _module, _rows, said: said.masked_fill(forbidden, -math.inf))
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _global_generators_kept() -> Iterator[None]:
    """Put the global generators of Python, NumPy and torch back afterwards: SB3 seeds and uses all three."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002 (the global generator is the point)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
