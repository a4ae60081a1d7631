"""The environment under whatever is done to it, in any order: what its contract says holds after every call.

`make test` runs a few sequences, `make test-all` thousands; what is drawn is the same each time.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from raise_env.env import RaiseSelectEnv
from raise_env.errors import ActionError, RaiseEnvError
from raise_env.testing import toy_env
from raise_env.vector import RaiseSelectVectorEnv
from raise_env.wrappers import PickOne

NUM = 8
COUNTS: Counter[str] = Counter()

SETTINGS = {"num_rows": 20, "num_candidates": NUM, "num_classes": 2, "batch_size": 3, "horizon": 5, "budget": 11}

seeds = st.integers(0, 3)
choices = st.lists(st.integers(0, 1), min_size=NUM, max_size=NUM).map(lambda bits: np.array(bits, dtype=np.int8))

#: What is no action, each in a form of its own.
BAD_ACTIONS: list[Any] = [
    np.zeros(NUM - 1),
    np.zeros((NUM, 1)),
    np.zeros(0),
    np.full(NUM, 2),
    np.full(NUM, -1),
    np.full(NUM, np.nan),
    np.full(NUM, np.inf),
    np.full(NUM, 0.5),
    np.full(NUM, "1"),
    np.array([None] * NUM),
    np.array([{}] * NUM, dtype=object),
    [[0] * NUM],
    [0] * (NUM - 1),
    None,
    3,
    "no action",
    10**400,
    [10**400] * NUM,
    [[0], [0, 1], 2],
    {"action": 1},
    np.zeros(NUM, dtype=complex) + 1j,
    np.zeros(NUM, dtype="datetime64[s]"),
]


def globals_now() -> tuple[Any, ...]:
    """The states of the generators that belong to everybody."""
    state: Any = np.random.get_state()  # noqa: NPY002 (the global generator is the point)
    return random.getstate(), state[1].tobytes(), state[2], torch.get_rng_state().numpy().tobytes()


def played(env: RaiseSelectEnv, actions: list[np.ndarray]) -> list[Any]:
    """What some actions bring, to the bit; the end of the episode ends it."""
    found: list[Any] = []
    for action in actions:
        try:
            observation, reward, over, truncated, info = env.step(action)
        except ResetNeeded:
            break
        shown = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in info.items()}
        found.append((observation.tobytes(), reward, over, truncated, shown))
    return found


class EnvironmentMachine(RuleBasedStateMachine):
    """One environment, its forks, and moments that were kept."""

    snapshots = Bundle("snapshots")
    kind = "environment: calls"

    def make(self, **more: Any) -> RaiseSelectEnv:
        return toy_env(**{**SETTINGS, **more})

    def __init__(self) -> None:
        super().__init__()
        self.before = globals_now()
        self.env = self.make()
        self.closed = self.make()
        self.offered: np.ndarray | None = None
        self.is_over = True
        self.tokens = 0

    @initialize(target=snapshots)
    def foreign_snapshot(self) -> Any:
        other = self.make()
        other.reset(seed=9)
        other.step(np.ones(NUM, dtype=np.int8))
        snapshot = other.snapshot()
        other.close()
        return snapshot

    def count(self) -> None:
        COUNTS[self.kind] += 1

    def check(self, observation: np.ndarray, info: dict[str, Any]) -> None:
        assert self.env.observation_space.contains(observation)
        assert np.isfinite(observation).all()
        mask = self.env.action_masks()
        assert (info["action_mask"] == mask).all()
        assert (observation.any(axis=1) == mask).all()  # padding is a row of zeros, and nothing else is
        assert ((info["candidates"] >= 0) == mask).all()
        numbers = [value for value in info.values() if isinstance(value, float)]
        assert np.isfinite(numbers).all()
        assert info["dev_score"] == self.env.dev_scores[-1]

    @rule(seed=st.none() | seeds)
    def reset(self, seed: int | None) -> None:
        self.count()
        observation, info = self.env.reset(seed=seed)
        self.is_over = False
        self.check(observation, info)
        if seed is not None:
            again, info_again = self.make().reset(seed=seed)
            assert again.tobytes() == observation.tobytes()
            assert info_again["candidates"].tolist() == info["candidates"].tolist()

    @rule(action=choices)
    def step(self, action: np.ndarray) -> None:
        self.count()
        if self.is_over:
            with pytest.raises(ResetNeeded):
                self.env.step(action)
            return
        before = self.env.budget_left
        observation, reward, over, truncated, info = self.env.step(action)
        self.check(observation, info)
        assert not truncated
        assert isinstance(reward, float)
        assert info["num_selected"] + info["num_dropped"] <= action.sum()
        assert self.env.budget_left == before - info["num_selected"] >= 0
        assert sum(step.reward for step in self.env.history) == pytest.approx(
            self.env.dev_scores[-1] - self.env.dev_scores[0], abs=1e-9
        )
        self.is_over = over
        assert over == (self.env.num_steps == 5 or self.env.budget_left == 0)

    @rule(action=st.sampled_from(range(len(BAD_ACTIONS))))
    def step_with_what_is_no_action(self, action: int) -> None:
        self.count()
        before = None if self.is_over else played(self.env.fork(1)[0], [np.ones(NUM, dtype=np.int8)])
        with pytest.raises(ResetNeeded if self.is_over else ActionError):
            self.env.step(BAD_ACTIONS[action])
        if before is not None:
            assert played(self.env.fork(1)[0], [np.ones(NUM, dtype=np.int8)]) == before

    @rule(actions=st.lists(choices, max_size=3), num_dev=st.none() | st.integers(1, 20))
    def probe(self, actions: list[np.ndarray], num_dev: int | None) -> None:
        self.count()
        if self.is_over:
            with pytest.raises(ResetNeeded):
                self.env.probe(np.array(actions).reshape(-1, NUM), num_dev)
            return
        shown = self.env.observation().tobytes(), self.env.dev_scores
        scores = self.env.probe(np.array(actions).reshape(-1, NUM), num_dev)
        assert scores.shape == (len(actions),)
        assert (self.env.observation().tobytes(), self.env.dev_scores) == shown
        if num_dev is None:
            for action, score in zip(actions, scores, strict=True):
                fork = self.env.fork(1)[0]
                fork.step(action)
                assert fork.dev_scores[-1] == score

    @rule(target=snapshots)
    def snapshot(self) -> Any:
        self.count()
        try:
            return self.env.snapshot()
        except ResetNeeded:
            self.env.reset(seed=0)
            self.is_over = False
            return self.env.snapshot()

    @rule(snapshot=snapshots, actions=st.lists(choices, max_size=4))
    def restore(self, snapshot: Any, actions: list[np.ndarray]) -> None:
        self.count()
        self.env.restore(snapshot)
        self.is_over = self.env._is_over
        found = [played(fork, actions) for fork in self.env.fork(2)]
        assert found[0] == found[1]
        self.env.restore(snapshot)
        assert played(self.env.fork(1)[0], actions) == found[0]

    @rule(snapshot=snapshots)
    def restore_what_is_closed(self, snapshot: Any) -> None:
        self.count()
        self.closed.close()
        self.closed.restore(snapshot)
        assert self.closed.observation().shape == self.env.observation_space.shape

    @rule(first=choices, second=choices)
    def fork(self, first: np.ndarray, second: np.ndarray) -> None:
        self.count()
        if self.env._learner is None or self.env._round is None:
            with pytest.raises(ResetNeeded):
                self.env.fork(2)
            return
        shown = self.env.observation().tobytes(), self.env.dev_scores, self.env.candidates.tolist()
        one, other = self.env.fork(2)
        alone = played(self.env.fork(1)[0], [second, first])
        played(one, [first, second])
        assert played(other, [second, first]) == alone
        one.close()
        assert (self.env.observation().tobytes(), self.env.dev_scores, self.env.candidates.tolist()) == shown

    @rule(times=st.integers(1, 2))
    def close(self, times: int) -> None:
        self.count()
        for _ in range(times):
            self.env.close()
        self.is_over = True
        with pytest.raises(ResetNeeded):
            self.env.observation()

    @invariant()
    def nobody_elses_generator_is_touched(self) -> None:
        assert globals_now() == self.before

    @invariant()
    def the_ledger_never_falls(self) -> None:
        if self.env._learner is not None:
            tokens = self.env.assets.learner.ledger.token_forwards
            assert tokens >= self.tokens
            self.tokens = tokens


def run_machine(machine: type[RuleBasedStateMachine], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("examples", [20, pytest.param(250, marks=pytest.mark.slow)])
def test_environment__any_calls_in_any_order__keeps_its_contract(examples: int) -> None:
    run_machine(EnvironmentMachine, examples, 30)


@pytest.mark.slow
def test_embedded_environment__any_calls_in_any_order__keeps_its_contract(embedded_env: Any) -> None:
    class EmbeddedMachine(EnvironmentMachine):
        kind = "embedded environment: calls"

        def make(self, **more: Any) -> RaiseSelectEnv:
            env: RaiseSelectEnv = embedded_env(
                num_candidates=NUM, num_classes=2, batch_size=3, horizon=5, budget=11, **more
            )
            return env

    embedded_env(num_candidates=NUM, num_classes=2).reset(seed=0)
    run_machine(EmbeddedMachine, 12, 12)


class VectorMachine(RuleBasedStateMachine):
    """Three environments in one, against three by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.before = globals_now()
        self.single = [toy_env(**SETTINGS) for _ in range(3)]
        self.vector = RaiseSelectVectorEnv.over([toy_env(**SETTINGS) for _ in range(3)])
        self.is_reset = False
        self.is_over = [False] * 3

    @rule(seed=seeds)
    def reset(self, seed: int) -> None:
        COUNTS["vector environment: calls"] += 1
        observations, info = self.vector.reset(seed=seed)
        assert np.isfinite(observations).all()
        for place, env in enumerate(self.single):
            observation, _ = env.reset(seed=seed + place)
            assert observations[place].tobytes() == observation.tobytes()
        assert info["candidates"].shape == (3, NUM)
        self.is_reset, self.is_over = True, [False] * 3

    @rule(actions=st.lists(choices, min_size=3, max_size=3))
    def step(self, actions: list[np.ndarray]) -> None:
        COUNTS["vector environment: calls"] += 1
        if not self.is_reset:
            with pytest.raises(ResetNeeded):
                self.vector.step(np.array(actions))
            return
        observations, rewards, over, truncated, _ = self.vector.step(np.array(actions))
        assert np.isfinite(observations).all()
        assert not truncated.any()
        for place, env in enumerate(self.single):
            if self.is_over[place]:  # the next step after the end is the reset
                observation, reward, ended = env.reset()[0], 0.0, False
            else:
                observation, reward, ended, _, _ = env.step(actions[place])
            assert observations[place].tobytes() == observation.tobytes()
            assert rewards[place] == reward
            assert over[place] == ended
            self.is_over[place] = ended

    @rule(place=st.integers(0, 2), action=st.sampled_from([0, 3, 5]))
    def step_with_what_is_no_action(self, place: int, action: int) -> None:
        COUNTS["vector environment: calls"] += 1
        actions: list[Any] = [np.ones(NUM)] * 3
        actions[place] = BAD_ACTIONS[action]
        if self.is_reset and not any(self.is_over):
            with pytest.raises(RaiseEnvError):
                self.vector.step(actions)

    @invariant()
    def nobody_elses_generator_is_touched(self) -> None:
        assert globals_now() == self.before


@pytest.mark.parametrize("examples", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_vector_environment__any_calls_in_any_order__is_as_its_parts(examples: int) -> None:
    run_machine(VectorMachine, examples, 20)


def test_pick_one__what_is_no_row__is_refused() -> None:
    env = PickOne(toy_env(**SETTINGS))
    env.reset(seed=0)
    for action in (-1, NUM, 10**400, 1.5, np.nan, None, "a", [0, 1]):
        with pytest.raises(ActionError):
            env.step(action)


def test_fuzz__cases__counted(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        for kind, count in COUNTS.items():
            print(f"\n  {kind:<40}{count:>7}", end="")
