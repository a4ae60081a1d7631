"""RaiseSelect-v0: instruction selection during fine-tuning as a Markov decision process. Wiring only."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded

from .config import OF_TASK, OWN_SETTINGS, TASK_SETTINGS, EnvConfig
from .errors import ActionError, SettingError, memory_explained
from .features import FEATURE_NAMES, LoadingProgress, StaticFeatures, frame, observation_bounds, observe
from .learner_protocol import scheduled_rate
from .pool import Pool
from .rewards import (
    DIVERGENCE_PENALTY,
    Evaluation,
    RewardFunction,
    load_reward,
    needs_choices,
    needs_generation,
    step_reward,
    usable_rows,
)

if TYPE_CHECKING:
    from .learner_protocol import Learner, Ledger

__all__ = [
    "EnvAssets",
    "RaiseSelectEnv",
    "Round",
    "Snapshot",
    "StepOutcome",
    "StepRecord",
    "StepResult",
    "action_array",
    "step_together",
]

Observation = np.ndarray
Action = np.ndarray

#: What `step` returns: observation, reward, terminated, truncated, info.
StepResult = tuple[Observation, float, bool, bool, dict[str, Any]]

#: What needs less memory, the first thing first.
_LESS_MEMORY = (
    "Lower micro_batch_tokens (--micro-batch-tokens), then max_length or batch_size; activation_checkpointing=True "
    "keeps less for the backward pass; a smaller model or dtype needs less throughout. What was done before stands."
)

# What a round's seed is used for: each purpose draws from a stream of its own, so that the candidates of the
# next round are the same whatever is done in this one, and two policies can be compared on equal offers.
_CANDIDATES, _DROPPED, _DROPOUT, _DEV_SAMPLE = range(4)


@dataclass(frozen=True, slots=True, eq=False)
class Round:
    """What is on offer in one step; its arrays are read-only.

    Attributes:
        seed: Where this round's random choices come from.
        candidates: Pool ids, -1 for padding, shape (num_candidates,), int64.
        classes: K-means class of each, shape (num_candidates,), int64.
    """

    seed: int
    candidates: np.ndarray
    classes: np.ndarray

    def __post_init__(self) -> None:
        # The history gives them out, and where the whole pool is on offer they are those of every step to come.
        self.candidates.flags.writeable = self.classes.flags.writeable = False


@dataclass(frozen=True, slots=True, eq=False)
class _Choice:
    """What an action comes to: the pool ids to train on, shape (selected,), and how many the budget had no room for."""

    selected: np.ndarray
    num_dropped: int


@dataclass(frozen=True, slots=True, eq=False)
class StepRecord:
    """What happened in one step: the round, the pool ids trained on, and what came of it; its arrays are read-only."""

    candidates: np.ndarray
    classes: np.ndarray
    selected: np.ndarray
    reward: float
    dev_score: float
    train_loss: float | None

    def __post_init__(self) -> None:
        self.selected.flags.writeable = False  # the others are the round's


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A moment of an episode: with the same actions, what follows it is the same to the bit.

    `form` is what environments have in common that can go back to it.
    """

    learner_state: object
    generator_state: Mapping[str, Any]
    round: Round
    counts: np.ndarray
    num_steps: int
    num_spent: int
    dev_scores: tuple[float, ...]
    history: tuple[StepRecord, ...]
    is_over: bool
    is_scored: bool
    form: Mapping[str, int | float | str]


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a step came to, as far as it takes a model to find out.

    Attributes:
        dev_score: P after the step.
        train_loss: Mean loss over the response tokens before the update; None without one.
        diverged: Whether the loss stopped being finite.
        test_score: P on the test set, where the step ended an episode and there is one.
    """

    dev_score: float
    train_loss: float | None = None
    diverged: bool = False
    test_score: float | None = None


class EnvAssets(Protocol):
    """What the environment needs to be given: `assets.Assets`, or the toys of `testing`."""

    @property
    def pool(self) -> Pool: ...  # noqa: D102
    @property
    def features(self) -> StaticFeatures: ...  # noqa: D102
    @property
    def classes(self) -> np.ndarray: ...  # noqa: D102
    @property
    def members(self) -> tuple[np.ndarray, ...]: ...  # noqa: D102
    @property
    def classes_hash(self) -> str | None: ...  # noqa: D102
    @property
    def learner(self) -> Learner: ...  # noqa: D102
    @property
    def base_evaluation(self) -> Evaluation: ...  # noqa: D102
    @property
    def base_answers(self) -> Evaluation: ...  # noqa: D102
    @property
    def num_dev(self) -> int: ...  # noqa: D102
    @property
    def has_test(self) -> bool: ...  # noqa: D102
    @property
    def pool_tokens(self) -> int: ...  # noqa: D102
    @property
    def content(self) -> dict[str, str]: ...  # noqa: D102
    @property
    def adapter_form(self) -> dict[str, int | float | str]: ...  # noqa: D102
    @property
    def auxiliary(self) -> dict[str, str | int]: ...  # noqa: D102
    @property
    def counts(self) -> dict[str, dict[str, int]]: ...  # noqa: D102
    @property
    def save_auxiliary(self) -> Callable[[Path], None]: ...  # noqa: D102
    def draw(self, num_candidates: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]: ...  # noqa: D102
    def check_reward(self, reward: str) -> None: ...  # noqa: D102
    def without_test(self) -> EnvAssets: ...  # noqa: D102


class RaiseSelectEnv(gym.Env[Observation, Action]):
    """Choose the instructions that a language model is fine-tuned on, while it is being fine-tuned.

    ## Description
    A pool of instructions, a language model with a fresh LoRA adapter, and a dev set that says how good the
    model is. At every step some candidates of the pool are offered; the chosen ones make one optimiser step,
    and the reward is the gain on the dev set. One fine-tuning run is one episode. The process is that of RAISE
    (Lv et al. 2025, section 3); LoRA is this project's choice, as are the details that the paper leaves open.

    `gym.make("RaiseSelect-v0")` needs no download: it trains an embedded model of 0.84 million parameters on
    an embedded pool, most of whose rows are corrupted. Other embedded tasks, by `task` or by an id such as
    `RaiseSelect/Curriculum-v0`, ask other questions: docs/tasks/README.md.

    ## Action Space
    `MultiBinary(num_candidates)`: 1 takes a candidate. Every 0/1 vector is legal. The chosen rows are trained on
    in one AdamW update on the mean loss over their response tokens. None chosen: no update, reward 0, and the
    step counts. Chosen padding is ignored. Of more rows than the budget has left, a random part is dropped.

    ## Observation Space
    `Box(num_candidates, 39)`, float32, one row a candidate, class by class, in the paper's order of columns:

    | columns | content | range |
    |---|---|---|
    | 0 | dev score, as the gain since the start relative to its size | -5 to 5 |
    | 1 | share of the horizon behind, t/T | 0 to 1 |
    | 2-5 | length of prompt and response, log P(y given x), log P(y); standardised over the pool | -5 to 5 |
    | 6-37 | embedding by the auxiliary model, pooled to 32; standardised over the pool | -5 to 5 |
    | 38 | log(1 + times selected in this episode) | 0 to 5 |

    Rows of zeros are padding, where a class has fewer rows than its share. The paper calls the columns' blocks
    stage (0-1), difficulty (2-5), semantic (6-37) and availability (38); of difficulty and semantic only one can be
    hidden, or rows could not be told from padding.

    ## Rewards
    P(M_t) - P(M_{t-1}), where P is minus the dev loss in nats per response token unless `reward` says otherwise.
    The rewards of an episode add up to P(M_T) - P(M_0). A step after which the loss is no longer finite
    earns -10 and ends the episode. P goes by the names

    | reward | P, over the dev rows that have what it needs |
    |---|---|
    | "loss" | minus the mean loss in nats per response token |
    | "accuracy" | share of rows with `choices` whose right one has the highest log-likelihood |
    | "accuracy_norm" | the same with each log-likelihood divided by the choice's characters |
    | "choice_probability" | mean probability of the right choice among its row's own: smooth, where shares are not |
    | "exact_match" | share of rows answered right by greedy decoding: the whole response, or its `#### number` |
    | "flexible_match" | share of rows with a `#### number` where an answer's last number is the right one |

    "accuracy", "accuracy_norm" and, for rows with a `#### number`, both matches equal lm-eval's numbers. For such rows
    the matches generate answers at every score, of up to 256 tokens, which costs many times what a loss does.
    A function of one's own is given an `Evaluation` and returns a number, higher is better.

    ## Starting State
    Every episode starts from the same model M_0 (its adapter is drawn from `seed_model`), an optimiser without
    memory, and counts of zero. `reset(seed=...)` decides which candidates are offered, step by step.

    ## Episode End
    Terminates at the horizon, at the end of the budget, or when the loss stops being finite. It is never
    truncated: the horizon belongs to the task, and the observation shows it.

    ## Arguments
    | keyword | default | meaning |
    |---|---|---|
    | model | "tiny" | what is fine-tuned: "tiny" is the embedded model; else a folder or a hub id of a causal LM |
    | pool | None | instructions to choose from instead of the embedded task's: a file, a folder of files, or a hub id |
    | dev | None | rows that the reward is measured on, of a file, folder or hub id; it goes with a pool |
    | test | None | rows of a file, folder or hub id that are scored at the end of an episode, for the report alone |
    | task | "default" | which embedded task, where no pool is given; it brings defaults of its own for other keywords |
    | task_seed | 0 | what the embedded task is drawn from |
    | pool_size | 2000 | rows of the embedded task's pool |
    | num_dev | None | score on a fixed random part of so many dev rows, instead of all |
    | num_test | None | score on a fixed random part of so many test rows, instead of all |
    | allow_overlap | False | let dev or test rows be in the pool too |
    | skip_empty | False | leave out rows without prompt or response, instead of refusing the file |
    | columns | {} | what a file's columns hold, where it is not seen by their names: {"prompt": "q", "response": "a"} |
    | choice_form | "text" | what answers a multiple-choice row: the "text" of a choice, or its "letter" in a list |
    | num_candidates | 64 | rows offered at each step, as many of each class; "all" offers the whole pool |
    | num_classes | 4 | K-means classes that the pool is put into |
    | batch_size | 8 | rows that a step is meant to take: the wrappers and the budget are made for it |
    | horizon | 40 | steps of an episode |
    | budget | None | rows that may be trained on in an episode, repeats counted, instead of horizon x batch_size |
    | reward | "loss" | dev score: a name as under Rewards, such as "accuracy", or a function, "module:function" |
    | score_every | 1 | steps between two dev scores; those between earn 0, and the next scored step the whole gain |
    | lora | {"r": 8, "lora_alpha": 16} | the adapter, by PEFT's names; on all linear layers unless they say otherwise |
    | learning_rate | 3e-3 | AdamW's at the start; it falls by a cosine over the share of the episode that is used up |
    | weight_decay | 0.0 | AdamW's weight decay |
    | max_grad_norm | 1.0 | norm that the gradient is clipped to; 0 turns clipping off |
    | max_length | 256 | tokens that a row may have; a longer one loses its end |
    | template | None | Jinja text of `prompt` and `system`, instead of the tokenizer's chat template or a plain frame |
    | micro_batch_tokens | 16384 | tokens that go through the model at once at most, to fit into memory |
    | seed_model | 0 | what the first adapter is drawn from |
    | adapter | None | folder of a PEFT LoRA adapter to go on from, which also gives lora its form |
    | activation_checkpointing | False | keep less for the backward pass and compute it again: less memory, more time |
    | dtype | "float32" | of the base model: "float32", "bfloat16", or "nf4", four bits a weight (needs bitsandbytes) |
    | device | "auto" | "cpu", "cuda" or "cuda:1"; "auto" is a GPU where there is one |
    | auxiliary_model | None | folder or hub id of the model that computes the features, instead of the base model |
    | auxiliary_updates | None | updates on random rows before it does, instead of 60, or of 0 with a model of its own |
    | auxiliary_adapter | None | folder of the adapter that it does so with, such as `auxiliary` of a selector |
    | cache_dir | None | folder where features are kept, instead of $RAISE_ENV_CACHE or the user's cache folder |
    | lazy_features | False | compute only the features of rows that are drawn: for pools whose features take too long |
    | hide | () | blocks of the observation that are shown as zeros, for ablations: a list of their names |
    | render_mode | None | how the episode is drawn: "ansi" as text, "rgb_array" as a picture |

    ## Information
    Numbers and arrays of fixed shape: `candidates` (pool ids on offer, -1 for padding), `action_mask`,
    `selected` (pool ids trained on, in the first `num_selected` places, then -1), `num_selected`, `num_dropped`,
    `train_loss` (nats per response token before the update; left out where nothing was trained), `dev_score`,
    `budget_left`, `diverged`; on the last step `test_score` where there is a test set.

    ## Beyond Gymnasium
    `gym.make(...).unwrapped` has these besides; each has a docstring of its own, and docs/api.md lists the rest.

    - `snapshot()`, `restore(moment)`: keep a moment of the episode, and go back to it.
    - `fork(n)`, `variant(**settings)`: environments that go on from here by themselves; one with other settings.
    - `probe(actions)`: the dev score that each of several actions would lead to; `dev_direction(n)`: which way the
      adapter goes when a fork is trained on dev rows.
    - `row_losses(ids)`, `row_gradients(ids)`: the loss and the gradient of single pool rows, by the model as it is.
    - `evaluate("dev")`, `save_adapter(folder)`, `ledger`: scores, the adapter, and what was spent so far.

    ## References
    Lv et al., "RAISE: Reinforced Adaptive Instruction Selection For Large Language Models", Findings of
    EMNLP 2025, pages 11708-11723.

    ## Version History
    * v0: first version.
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}  # noqa: RUF012 - Gymnasium's own form

    def __init__(self, render_mode: str | None = None, assets: EnvAssets | None = None, **settings: Any) -> None:
        """Check the settings; nothing is loaded before the first reset.

        Args:
            render_mode: None, "ansi" or "rgb_array".
            assets: Live objects instead of what `settings` name; for tests and for forks.
            settings: The keywords above.

        Raises:
            SettingError: A keyword is unknown or its value cannot be used.
            DataError: `num_candidates` is "all" and the pool cannot be read.
        """
        self.config = EnvConfig.from_kwargs({"render_mode": render_mode, **settings})
        self.render_mode = render_mode
        self._assets = assets
        self._num_candidates = self._count_candidates()
        low, high = observation_bounds(self._num_candidates)
        self.observation_space = spaces.Box(low, high, dtype=np.float32)  # (num_candidates, 39)
        self.action_space = spaces.MultiBinary(self._num_candidates)
        self._reward: RewardFunction = load_reward(self.config.reward)
        self._learner: Learner | None = None
        self._round: Round | None = None
        self._frame: tuple[np.ndarray, np.ndarray] | None = None  # candidates, and what of them never changes
        self._counts = np.zeros(0, dtype=np.int32)  # (pool,), times trained on
        self._num_steps = 0
        self._num_spent = 0
        self._dev_scores: list[float] = []
        self._history: list[StepRecord] = []
        self._is_over = True
        self._is_scored = True  # whether the last dev score is that of the model as it is
        self._behind: list[tuple[np.ndarray, float, int]] = []  # updates that the model has still to make
        self._moment = object()  # another one after each reset, step and restore
        if assets is not None:
            assets.check_reward(self.config.reward)

    @memory_explained(_LESS_MEMORY)
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start a new run from the first model.

        Raises:
            DataError: The pool, dev or test set cannot be used.
            MemoryShortageError: The memory does not suffice for the model or for features.
            ModelError: A model cannot be loaded.
            OutputError: As `load`.
            RewardError: Dev or test rows lack what the reward needs, or the reward function failed or returned no
                finite number.
        """
        super().reset(seed=seed, options=options)
        assets = self.assets
        if self._learner is None:
            self._learner = self._new_learner()
        self._learner.reset()
        self._behind = []
        self._counts = np.zeros(len(assets.pool), dtype=np.int32)
        self._num_steps = self._num_spent = 0
        generates = self._learner.generates
        self._dev_scores = [self._reward(assets.base_answers if generates else assets.base_evaluation)]
        self._history = []
        self._is_over = False
        self._is_scored = True
        self._round = self._next_round()
        self._moment = object()
        return self._observation(), self._info(np.zeros(0, dtype=np.int64))

    @memory_explained(_LESS_MEMORY)
    def step(self, action: Action) -> StepResult:
        """Train on the chosen candidates, and return what it gained on the dev set.

        Args:
            action: 1 for each candidate taken, shape (num_candidates,).

        Raises:
            ActionError: It has another shape, or holds something other than 0 and 1.
            MemoryShortageError: The memory does not suffice for the update or a score; the step was not taken.
            ResetNeeded: There was no reset since the start or since the last episode's end.
            RewardError: The reward function failed or returned no finite number; the step was not taken.
        """
        choice = self._choose(action)
        with _undone_by_errors([self]):
            (train_loss,) = _update([self], [choice])
            diverged = self._score(choice, train_loss)
            return self._answer(choice, train_loss, diverged)

    def retrace(self, action: Action, outcome: StepOutcome) -> StepResult:
        """Take a step of which it is known what came of it, and return what `step` returned then.

        Nothing is trained or scored, and nothing is booked: the updates are made when the model is next asked for, if
        the episode is not over by then. So learning that was interrupted comes back to where it was in no time.

        Args:
            action: As for `step`.
            outcome: What `step` came to with the same action in the same episode.

        Raises:
            ActionError: As for `step`.
            ResetNeeded: As for `step`.
        """
        choice = self._choose(action)
        if len(choice.selected):
            self._is_scored = False
            self._behind.append((choice.selected, self.progress, int(self._stream(_DROPOUT).integers(2**31))))
        if not outcome.diverged and self._is_score_due(choice.selected):
            self._dev_scores.append(outcome.dev_score)
            self._is_scored = True
        else:
            self._dev_scores.append(self._dev_scores[-1])
        return self._answer(choice, outcome.train_loss, outcome.diverged, outcome.test_score)

    def render(self) -> Any:
        """Return the episode so far, as text or as a picture of shape (height, width, 3), uint8."""
        from . import render

        if self.render_mode is None:
            gym.logger.warn('render() needs a mode: gym.make("RaiseSelect-v0", render_mode="ansi" or "rgb_array").')
            return None
        self._require_reset()
        draw = render.render_ansi if self.render_mode == "ansi" else render.render_rgb_array
        return draw(self._render_view())

    def close(self) -> None:
        """Let go of the learner; what is shared stays for other environments."""
        self._learner = None
        self._behind = []
        self._is_over = True

    @memory_explained(_LESS_MEMORY)
    def load(self, progress: LoadingProgress | None = None) -> EnvAssets:
        """Load what the first reset would load, and return it.

        Args:
            progress: Is told what is being computed, how many rows are done, and how many there are.

        Raises:
            DataError: As `reset`.
            MemoryShortageError: As `reset`.
            ModelError: As `reset`.
            OutputError: The pool is large, and the cache folder cannot be written or has too little room.
            RewardError: Dev or test rows lack what the reward needs.
        """
        if self._assets is None:
            from .assets import load_assets

            self._assets = load_assets(self.config, progress)
        return self._assets

    @property
    def assets(self) -> EnvAssets:
        """Pool, features, classes and first model, shared by the environments of the process; loaded when asked for."""
        return self.load()

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the observation's 39 columns, in order."""
        return FEATURE_NAMES

    @property
    def candidates(self) -> np.ndarray:
        """Pool ids on offer, -1 for padding, shape (num_candidates,), int64."""
        return self._current_round.candidates.copy()

    @property
    def candidate_classes(self) -> np.ndarray:
        """K-means class of each candidate, that of its block for padding, shape (num_candidates,), int64."""
        return self._current_round.classes.copy()

    @property
    def num_steps(self) -> int:
        """Steps taken in this episode, t."""
        return self._num_steps

    @property
    def budget_left(self) -> int:
        """Instructions that may still be trained on in this episode."""
        return self.config.total_budget - self._num_spent

    @property
    def progress(self) -> float:
        """Share of the episode that is used up, 0 to 1: of its steps or of its budget, whichever ends it first."""
        return max(self._num_steps / self.config.horizon, self._num_spent / self.config.total_budget)

    @property
    def moment(self) -> object:
        """What tells this moment from others: another object after each reset, step and restore."""
        return self._moment

    @property
    def is_over(self) -> bool:
        """Whether the episode has ended, or none has begun."""
        return self._is_over

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return scheduled_rate(self.config.learning_rate, self.progress)

    @property
    def dev_scores(self) -> list[float]:
        """P before any update and after each step."""
        return list(self._dev_scores)

    @property
    def history(self) -> list[StepRecord]:
        """What happened in each step of this episode."""
        return list(self._history)

    @property
    def ledger(self) -> Ledger:
        """Tokens spent so far by all environments of the process over the same pool and model."""
        self._require_reset()
        return self._running_learner.ledger

    def action_masks(self) -> np.ndarray:
        """Return which candidates can be taken, shape (num_candidates,), bool; the others are padding."""
        return np.asarray(self._current_round.candidates >= 0)

    def snapshot(self) -> Snapshot:
        """Return this moment of the episode; it stays valid whatever happens afterwards.

        Raises:
            ResetNeeded: There was no reset yet.
        """
        return Snapshot(
            learner_state=self._running_learner.state,
            generator_state=self.np_random.bit_generator.state,
            round=self._current_round,
            counts=self._counts.copy(),
            num_steps=self._num_steps,
            num_spent=self._num_spent,
            dev_scores=tuple(self._dev_scores),
            history=tuple(self._history),
            is_over=self._is_over,
            is_scored=self._is_scored,
            form=self._form,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a moment of this environment's, or of one with the same settings.

        The observation of that moment is the one that was returned then; `observation()` gives it again.

        Raises:
            SettingError: It is a moment of an environment whose episodes, rows or adapter have another form.
        """
        self._require_like(snapshot)
        if self._learner is None:
            self._learner = self._new_learner()
        self._learner.restore(snapshot.learner_state)
        self._behind = []
        generator = np.random.Generator(np.random.PCG64())
        generator.bit_generator.state = snapshot.generator_state
        self.np_random = generator
        self._round = snapshot.round
        self._counts = snapshot.counts.copy()
        self._num_steps = snapshot.num_steps
        self._num_spent = snapshot.num_spent
        self._dev_scores = list(snapshot.dev_scores)
        self._history = list(snapshot.history)
        self._is_over = snapshot.is_over
        self._is_scored = snapshot.is_scored
        self._moment = object()

    def fork(self, n: int) -> list[RaiseSelectEnv]:
        """Return n environments that go on from here by themselves, over the same base model.

        They see the same candidates, now and later, as this one would: what differs is what is done.
        """
        snapshot = self.snapshot()
        forks = []
        for _ in range(n):
            fork = self.variant()
            fork._learner = self._running_learner.copy()
            fork.restore(snapshot)
            forks.append(fork)
        return forks

    def variant(self, **settings: Any) -> RaiseSelectEnv:
        """Return a new environment like this one but for some settings; what those settings let it share is shared.

        Args:
            settings: The keywords of the class that differ.

        Raises:
            SettingError: As for the class.
        """
        own = self.config.to_kwargs()
        if settings.get("pool") is not None:  # which takes the place of the embedded task, but not of what it had set
            task = TASK_SETTINGS.get(self.config.task, {})
            own = {**{name: getattr(self.config, name) for name in task}, **own}
            own = {name: value for name, value in own.items() if name not in OF_TASK}
        kwargs = {"render_mode": self.render_mode, **own, **settings}
        return RaiseSelectEnv(assets=self.assets if OWN_SETTINGS.issuperset(settings) else None, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> RaiseSelectEnv:
        """Return an environment that goes on from here by itself, over the same base model, as `fork` does.

        Wrappers that are copied with it are where they were, between two picks too.
        """
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        # What is shared stays so; states are never changed in place, and a learner's copy holds the same.
        memo[id(self._assets)] = self._assets
        if self._learner is not None:
            memo[id(self._learner)] = self._learner.copy()
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    @memory_explained(_LESS_MEMORY)
    def probe(self, actions: np.ndarray, num_dev: int | None = None) -> np.ndarray:
        """Return the dev score that each of several actions would lead to, from this very state.

        Nothing of the episode changes. One update is made for each action, where possible several in one pass,
        and all are scored on the same dev rows, so that their differences are theirs alone. An action that takes
        nothing gives the score of the model as it is.

        Args:
            actions: 0/1, shape (k, num_candidates).
            num_dev: Score on a random part of so many of the dev rows that have what the reward looks at, the same
                for all k and for every probe of this round; None: all rows.

        Returns:
            P after each action, shape (k,), float64; -inf where the loss is no longer finite.

        Raises:
            ActionError: An action has another shape, or holds something other than 0 and 1.
            ResetNeeded: As for `step`.
            RewardError: As for `step`.
            SettingError: `num_dev` is less than 1.
        """
        self._require_running()
        batches = [self._affordable(self._chosen(action))[0] for action in actions]
        subset = self._dev_sample(num_dev)
        seed = int(self._stream(_DROPOUT).integers(2**31))
        evaluations = self._running_learner.probe(batches, self.progress, seed, subset)
        return np.array([self._reward(e) if e.is_finite else -np.inf for e in evaluations])

    def info(self) -> dict[str, Any]:
        """Return what `reset` would tell of this moment, where nothing was just trained on."""
        self._require_reset()
        return self._info(np.zeros(0, dtype=np.int64))

    def _dev_sample(self, num_dev: int | None) -> np.ndarray:
        """Return the dev rows that a probe scores on, shape (rows,), int64."""
        if num_dev is None:
            return np.arange(self.assets.num_dev)
        if num_dev < 1:
            raise SettingError(
                f"num_dev is {num_dev}; expected a whole number of at least 1, or None for all dev rows."
            )
        learner = self._running_learner
        usable = usable_rows(
            self.config.reward, self.assets.base_answers if learner.generates else self.assets.base_evaluation
        )
        if num_dev >= len(usable):
            return usable
        return usable[np.sort(self._stream(_DEV_SAMPLE).choice(len(usable), num_dev, replace=False))]

    def observation(self) -> Observation:
        """Return the observation of this moment again, as a new array."""
        self._require_reset()
        return self._observation()

    @memory_explained(_LESS_MEMORY)
    def evaluate(self, split: str = "test") -> Evaluation:
        """Score the model as it is on the "dev" or "test" rows; for reports, never for rewards.

        Raises:
            ValueError: There is no such set.
        """
        if split not in ("dev", "test") or (split == "test" and not self.assets.has_test):
            raise ValueError(f"there is no {split!r} set to score on.")
        learner = self._running_learner
        has_more = not learner.scores_choices and self.assets.base_evaluation.accuracy is not None
        if split == "dev" and has_more:
            learner = learner.copy()  # what a step leaves out of the dev score is there for whoever asks
            learner.scores_choices = True
        return learner.evaluate(split)  # type: ignore[arg-type]

    @memory_explained(_LESS_MEMORY)
    def row_losses(self, rows: np.ndarray) -> np.ndarray:
        """Return the model's mean loss on pool rows as it is, nats per response token, shape (rows,), float64.

        Args:
            rows: Pool ids, shape (rows,), int.
        """
        return self._running_learner.row_losses(np.asarray(rows))

    @memory_explained(_LESS_MEMORY)
    def row_gradients(self, rows: np.ndarray, split: str = "pool", *, adam: bool = False) -> np.ndarray:
        """Return the gradient of each row's mean loss in the adapter's parameters, shape (rows, P), float32.

        Nothing of the episode changes; the ledger counts the tokens as forward and backward.

        Args:
            rows: Pool ids, or numbers of dev rows, shape (rows,), int.
            split: "pool" or "dev".
            adam: Return instead, for each row, the direction in which AdamW would go on it alone, per unit of learning
                rate: the gradient seen through the optimiser's moments so far.

        Raises:
            ValueError: There is no such split.
        """
        if split not in ("pool", "dev"):
            raise ValueError(f"split is {split!r}; expected 'pool' or 'dev'.")
        learner = self._running_learner
        return learner.row_gradients(np.asarray(rows), None if split == "pool" else "dev", adam=adam)

    @memory_explained(_LESS_MEMORY)
    def dev_direction(self, num_updates: int = 8, batch_size: int = 16) -> np.ndarray:
        """Return which way the adapter goes in a fork that is trained on dev rows and thrown away, shape (P,), float32.

        The gradient on the dev rows tells what one small update would gain now, most of which any later update would
        gain as well. A few updates use that up, and what is left shows what the dev set lacks for longer.

        Args:
            num_updates: Updates of the fork, at half the first learning rate, with moments of its own; 0: minus the
                gradient on one batch.
            batch_size: Dev rows of an update, drawn anew for each from this round's seed.
        """
        seed = int(self._stream(_DEV_SAMPLE).integers(2**31))
        return self._running_learner.dev_direction(num_updates, batch_size, progress=0.5, seed=seed)

    def save_adapter(self, folder: str | Path) -> None:
        """Write the model's adapter as it is; `peft.PeftModel.from_pretrained` loads it."""
        self._running_learner.save_adapter(Path(folder))

    @property
    def _current_round(self) -> Round:
        self._require_reset()
        assert self._round is not None
        return self._round

    @property
    def _running_learner(self) -> Learner:
        self._require_reset()
        assert self._learner is not None
        self._catch_up(self._learner)
        return self._learner

    def _catch_up(self, learner: Learner) -> None:
        """Make the updates of steps that were retraced; they were booked when they were made first."""
        if not self._behind:
            return
        ledger = learner.ledger
        booked = dataclasses.replace(ledger)
        try:
            while self._behind:
                learner.update(*self._behind[0])
                del self._behind[0]
        finally:  # interrupted, it is gone on with later
            for entry in dataclasses.fields(ledger):
                setattr(ledger, entry.name, getattr(booked, entry.name))

    def _new_learner(self) -> Learner:
        learner = self.assets.learner.copy()
        learner.generates = needs_generation(self.config.reward)
        learner.scores_choices = needs_choices(self.config.reward)
        return learner

    def _count_candidates(self) -> int:
        if self.config.num_candidates != "all":
            return self.config.num_candidates
        if self._assets is not None:
            return len(self._assets.pool)
        if self.config.is_embedded:
            return self.config.pool_size
        from .reading import read_pool

        config = self.config
        assert config.pool is not None
        settings: dict[str, Any] = {"columns": config.columns, "choice_form": config.choice_form}
        return len(read_pool(config.pool, skip_empty=config.skip_empty, **settings))

    @property
    def _form(self) -> dict[str, int | float | str]:
        """What an environment has in common with those whose moments it can go back to, in the words of a message."""
        config, content = self.config, self.assets.content
        return {
            "num_candidates": self._num_candidates,
            "num_classes": config.num_classes,
            "pool rows": len(self.assets.pool),
            "horizon": config.horizon,
            "budget": config.total_budget,
            "reward": config.reward,
            **{f"{name} hash": content.get(name, "")[:12] for name in ("model", "pool", "dev")},
            "max_length": config.max_length,
            "template hash": hashlib.sha256((config.template or "").encode()).hexdigest()[:12],
            **self.assets.adapter_form,
        }

    def _require_like(self, snapshot: Snapshot) -> None:
        own = self._form
        # What was pickled of old tells less of its form; before snapshots told it, no more than this.
        shapes = {"num_candidates": len(snapshot.round.candidates), "pool rows": len(snapshot.counts)}
        for name, found in getattr(snapshot, "form", shapes).items():
            if found != own.get(name):
                raise SettingError(
                    f"the snapshot is of an environment with {name} {found!r}, and this one has {own.get(name)!r}; "
                    "expected one of this environment, or of another with the same settings."
                )

    def _require_reset(self) -> None:
        if self._learner is None or self._round is None:
            raise ResetNeeded("call reset() first: nothing is offered yet.")

    def _require_running(self) -> None:
        self._require_reset()
        if self._is_over:
            raise ResetNeeded("the episode is over: call reset() to start the next one.")

    def _stream(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self._current_round.seed, purpose])

    def _next_round(self) -> Round:
        # Exactly one draw a round: what is offered later cannot depend on what was done before.
        seed = int(self.np_random.integers(2**63))
        if self.config.num_candidates == "all":
            if self._round is not None:  # always the same: the history of a long episode must not hold it many times
                return Round(seed, self._round.candidates, self._round.classes)
            members = self.assets.members
            offered = np.concatenate(members)
            classes = np.repeat(np.arange(len(members)), [len(ids) for ids in members])
            missing = self._num_candidates - len(offered)
            candidates = np.pad(offered, (0, missing), constant_values=-1).astype(np.int64)
            return Round(seed, candidates, np.pad(classes, (0, missing)).astype(np.int64))
        rng = np.random.default_rng([seed, _CANDIDATES])
        return Round(seed, *self.assets.draw(self._num_candidates, rng))

    def _chosen(self, action: Action) -> np.ndarray:
        """Return the pool ids that an action takes, padding left out."""
        mask = action_array(action)
        if mask.shape != (self._num_candidates,):
            raise ActionError(
                f"the action has shape {mask.shape}; expected ({self._num_candidates},), a 0 or 1 for each candidate."
            )
        if not ((mask == 0) | (mask == 1)).all():
            odd = mask[~((mask == 0) | (mask == 1))][0]
            raise ActionError(f"the action holds {odd!r}; expected only 0 and 1, 1 for each candidate taken.")
        ids = self._current_round.candidates[mask == 1]
        return np.asarray(ids[ids >= 0])

    def _affordable(self, chosen: np.ndarray) -> tuple[np.ndarray, int]:
        """Return the part of the chosen rows that the budget allows, in their order, and how many were dropped."""
        excess = max(0, len(chosen) - self.budget_left)
        if excess == 0:
            return chosen, 0
        kept = self._stream(_DROPPED).permutation(len(chosen))[excess:]
        return chosen[np.sort(kept)], excess

    def _choose(self, action: Action) -> _Choice:
        self._require_running()
        return _Choice(*self._affordable(self._chosen(action)))

    def _score(self, choice: _Choice, train_loss: float | None) -> bool:
        """Note the dev score after the update, where it is due; return whether the model diverged."""
        is_finite = train_loss is None or bool(np.isfinite(train_loss))
        if is_finite and self._is_score_due(choice.selected):
            evaluation = self._running_learner.evaluate("dev")
            is_finite = evaluation.is_finite
            if is_finite:
                self._dev_scores.append(self._reward(evaluation))
                self._is_scored = True
                return False
        # The last score that was one: neither observation nor info ever holds NaN.
        self._dev_scores.append(self._dev_scores[-1])
        return not is_finite

    def _answer(
        self, choice: _Choice, train_loss: float | None, diverged: bool, test_score: float | None = None
    ) -> StepResult:
        """Write the step down, go on to the next round, and return what `step` does."""
        selected = choice.selected
        train_loss = None if diverged else train_loss
        reward = DIVERGENCE_PENALTY if diverged else step_reward(self._dev_scores[-2], self._dev_scores[-1])
        offered = self._current_round
        record = StepRecord(offered.candidates, offered.classes, selected, reward, self._dev_scores[-1], train_loss)
        self._history.append(record)
        self.assets.learner.ledger.divergences += diverged
        self._num_steps += 1
        self._num_spent += len(selected)
        np.add.at(self._counts, selected, 1)
        self._round = self._next_round()
        self._is_over = diverged or self._num_steps >= self.config.horizon or self.budget_left <= 0
        self._moment = object()
        info = self._info(selected, choice.num_dropped, train_loss, diverged, test_score)
        return self._observation(), reward, self._is_over, False, info

    def _is_score_due(self, selected: np.ndarray) -> bool:
        step = self._num_steps + 1
        is_last = step >= self.config.horizon or len(selected) >= self.budget_left
        return not self._is_scored and (is_last or step % self.config.score_every == 0)

    def _observation(self) -> Observation:
        candidates = self._current_round.candidates
        if self._frame is None or self._frame[0] is not candidates:  # once an episode, where all are always on offer
            self._frame = candidates, frame(self.assets.features, candidates, self.config.hide)
        return observe(
            self._frame[1],
            candidates,
            self._counts,
            dev_score=self._dev_scores[-1],
            first_dev_score=self._dev_scores[0],
            progress=min(1.0, self._num_steps / self.config.horizon),
            hide=self.config.hide,
        )

    def _info(
        self,
        selected: np.ndarray,
        num_dropped: int = 0,
        train_loss: float | None = None,
        diverged: bool = False,
        test_score: float | None = None,
    ) -> dict[str, Any]:
        # Of fixed shape, so that vector environments of every make can stack it.
        padded = np.full(self._num_candidates, -1, dtype=np.int64)
        padded[: len(selected)] = selected
        info: dict[str, Any] = {
            "candidates": self.candidates,
            "action_mask": self.action_masks(),
            "selected": padded,
            "num_selected": len(selected),
            "num_dropped": num_dropped,
            "dev_score": self._dev_scores[-1],
            "budget_left": self.budget_left,
            "diverged": diverged,
        }
        if train_loss is not None:
            info["train_loss"] = train_loss
        if self._is_over and self.assets.has_test and not diverged:
            test_score = self._test_score() if test_score is None else test_score
            if test_score is not None:
                info["test_score"] = test_score
        return info

    def _test_score(self) -> float | None:
        """Return P on the test rows; None where the loss of one of them is not finite, though those of dev are."""
        evaluation = self.evaluate("test")
        return self._reward(evaluation) if evaluation.is_finite else None

    def _render_view(self) -> Any:
        from .render import RenderView

        last = self._history[-1] if self._history else None
        offered = last or self._current_round
        taken = np.isin(offered.candidates, last.selected) if last else np.zeros(self._num_candidates, dtype=bool)
        # By the records, not the pool: lazy features do not know the classes of rows that another process offered.
        taken_classes = [step.classes[np.isin(step.candidates, step.selected)] for step in self._history]
        rows = [np.bincount(own, minlength=self.config.num_classes) for own in taken_classes]
        return RenderView(
            step=self._num_steps,
            horizon=self.config.horizon,
            budget_left=self.budget_left,
            dev_scores=self.dev_scores,
            score_name="-dev loss (nats/token)" if self.config.reward == "loss" else f"dev {self.config.reward}",
            num_classes=self.config.num_classes,
            offered_classes=np.where(offered.candidates >= 0, offered.classes, -1),
            taken_mask=taken,
            taken_history=np.array(rows).reshape(-1, self.config.num_classes),
            last_reward=last.reward if last else None,
        )


def action_array(action: Any) -> np.ndarray:
    """Return an action as an array of numbers.

    Raises:
        ActionError: It is none: ragged, text, times.
    """
    try:
        array = np.asarray(action)
        array = array.astype(np.float64) if array.dtype == object else array
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ActionError(f"the action is no array of numbers ({error}); expected one number for each.") from error
    if array.dtype.kind not in "biuf":
        raise ActionError(f"the action holds {array.dtype}; expected numbers.")
    return array


@memory_explained(_LESS_MEMORY)
def step_together(envs: Sequence[RaiseSelectEnv], actions: Sequence[Action]) -> list[StepResult]:
    """Step several environments, each once, with their updates in one pass where they share a base model.

    What comes of it is what `step` of each would give, but for the last bits of what the model computes: sums are
    made in another order. Where an action is refused, or anything else goes wrong, no environment has moved.

    Args:
        envs: Environments in the middle of an episode.
        actions: The action of each.

    Raises:
        ActionError: As for `step`.
        ResetNeeded: As for `step`.
        RewardError: As for `step`.
    """
    choices = [env._choose(action) for env, action in zip(envs, actions, strict=True)]
    with _undone_by_errors(envs):
        losses = _update(envs, choices)
        _evaluate(envs, choices, losses)
        results = []
        for env, choice, train_loss in zip(envs, choices, losses, strict=True):
            diverged = env._score(choice, train_loss)
            results.append(env._answer(choice, train_loss, diverged))
    return results


@contextlib.contextmanager
def _undone_by_errors(envs: Sequence[RaiseSelectEnv]) -> Iterator[None]:
    """Put environments back to where they are now if the block ends in an error: whoever steps again, steps once."""
    before = [(env.snapshot(), env.moment) for env in envs]
    try:
        yield
    except BaseException:
        for env, (snapshot, moment) in zip(envs, before, strict=True):
            env.restore(snapshot)
            env._moment = moment  # it is the same: what a wrapper keeps of it still holds
        raise


def _update(envs: Sequence[RaiseSelectEnv], choices: Sequence[_Choice]) -> list[float | None]:
    """Train each environment's model on what was chosen there; return the training losses, None without an update."""
    losses: list[float | None] = [None] * len(envs)
    for group in _sharing(envs, [place for place, choice in enumerate(choices) if len(choice.selected)]):
        members = [envs[place] for place in group]
        for env in members:
            env._is_scored = False
        found = members[0]._running_learner.update_together(
            [env._running_learner for env in members],
            [choices[place].selected for place in group],
            [env.progress for env in members],
            [int(env._stream(_DROPOUT).integers(2**31)) for env in members],
        )
        for place, loss in zip(group, found, strict=True):
            losses[place] = loss
    return losses


def _evaluate(envs: Sequence[RaiseSelectEnv], choices: Sequence[_Choice], losses: Sequence[float | None]) -> None:
    """Score those models of which a dev score is due, together; each environment then asks for its own."""
    due = [
        place
        for place, (env, choice, loss) in enumerate(zip(envs, choices, losses, strict=True))
        if (loss is None or np.isfinite(loss)) and env._is_score_due(choice.selected)
    ]
    for group in _sharing(envs, due):
        learners = [envs[place]._running_learner for place in group]
        learners[0].evaluate_together(learners, "dev")


def _sharing(envs: Sequence[RaiseSelectEnv], places: Sequence[int]) -> list[list[int]]:
    """Return the places in groups of environments that share base model, pool and settings."""
    groups: dict[int, list[int]] = {}
    for place in places:
        groups.setdefault(id(envs[place].assets), []).append(place)
    return list(groups.values())
