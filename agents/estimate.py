"""What a run would cost: measured on a few steps, or reckoned where the model's weights are not there yet."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from raise_env import EnvConfig, RaiseSelectEnv
from raise_env.assets import load_data
from raise_env.base_model import resolve_device
from raise_env.files import scratch_folder
from raise_env.learner import GPU_SCORED_TOKENS
from raise_env.model_size import ModelSize, has_weights, matrix_rate, save_stand_in, size_of
from raise_env.pool import sample_rows
from raise_env.rewards import needs_generation

from .base import Agent
from .baselines import RandomAgent
from .catalogue import agent_name
from .rollout import run_episode
from .runs import (
    Plan,
    Reporter,
    Silent,
    agents_of,
    check_agents,
    check_inputs,
    check_selectors,
    final_environment,
    parts_shown,
    phi_tokens,
    without_test,
)

__all__ = ["CHARACTERS_PER_TOKEN", "Estimate", "estimate"]

#: Rows of the pool that stand for all of it where its features cannot be computed.
SAMPLE_ROWS = 2000

#: What is reckoned with where there is no tokenizer either; English text and the usual vocabularies of 32,000 and more.
CHARACTERS_PER_TOKEN = 4

#: Steps of a kind that are made with each agent; the first warms up, and does not count.
_STEPS = 3

#: Test rows that stand for all of them where the time of scoring is measured.
_SCORED_ROWS = 32

#: Bytes that a layer of Llama's form with LoRA keeps of a token for the backward pass, per unit of the hidden width, by
#: the bytes of a number; measured at widths of 128 and 256 and an inner width of 3.5 times as much.
_LAYER_BYTES = {2: 77, 4: 114}

#: What comes to the matrix products of a large model: docs/results/speed.md and gpu.md.
_REST = {"cpu": "half as much again", "cuda": "three to five times as much"}

_STAND_IN_SETTINGS = {"device": "cpu", "dtype": "float32", "activation_checkpointing": False}


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run would cost.

    Attributes:
        updates: Optimiser steps, the forks' included.
        tokens: Token forwards, forward and backward counted as 3; the test set's are no part of what selection costs.
        phi: The same in Phi.
        test_tokens: Tokens of the test set, which is scored before and after each final run. A choice counts with its
            prompt.
        seconds: As measured on this machine, or the least that its matrix products would take; of all tokens.
        test_seconds: Of these, the test set's.
        memory_gb: The most that this process has used so far, or what model and activations would take; 10^9 bytes.
        notes: What it rests on, where it was not measured, and what it leaves out.
    """

    updates: int
    tokens: int
    phi: float
    test_tokens: int
    seconds: float
    test_seconds: float
    memory_gb: float
    notes: tuple[str, ...] = ()


def estimate(plan: Plan, *, reporter: Reporter | None = None) -> Estimate:
    """Return what the whole plan would cost, from an episode of learning and a few steps of each agent's final runs.

    Where the folder of a model has its config.json and no weights, tokens are counted with a small model in its place
    and time and memory are reckoned from its shapes. Agents' preparations are left out, and noted: they cannot be
    measured but by making them.

    Args:
        plan: What to do.
        reporter: Where progress is shown: with weights, features are computed and an episode is learned.

    Raises:
        RaiseEnvError: As `train`.
    """
    config, reporter = EnvConfig.from_kwargs(plan.settings), reporter or Silent()
    check_inputs(config)
    agents = agents_of(plan)
    check_agents(config, plan, agents)
    models = [config.model, config.auxiliary_model or config.model]
    if all(has_weights(model) for model in models):
        check_selectors(config, agents.values())
        return _measured(plan, agents, RaiseSelectEnv(**plan.settings), reporter)
    return _reckoned(plan, agents, config, reporter)


def _measured(
    plan: Plan, agents: Mapping[str, Agent], env: RaiseSelectEnv, reporter: Reporter, num_rows: int | None = None
) -> Estimate:
    """Return what the plan would cost with a pool of so many rows, of which the environment may hold a sample."""
    with reporter.task("loading model, data and features", 1) as show, parts_shown(reporter) as progress:
        pool = env.load(progress).pool
        show(1)
    share = (num_rows or len(pool)) / len(pool)
    num_scores = 1 + plan.num_runs * len(agents)  # before, and after each run
    test_tokens, test_seconds = num_scores * _scoring(env, reporter)
    total = np.zeros(3)
    for name, agent in agents.items():
        final = without_test(final_environment(env, agent, share))
        total += _run(final, agent, agent_name(name), reporter) * plan.num_runs
    total += _learning(plan, without_test(env), agents[plan.agent], reporter)
    updates, tokens, seconds = total
    tokens += env.assets.features.num_tokens
    return Estimate(
        updates=round(updates),
        tokens=round(tokens),
        phi=tokens / phi_tokens(env),
        test_tokens=round(test_tokens),
        seconds=seconds + test_seconds,
        test_seconds=test_seconds,
        memory_gb=_used(env) / 1e9,
        notes=_left_out(agents),
    )


def _scoring(env: RaiseSelectEnv, reporter: Reporter) -> np.ndarray:
    """Return the tokens and seconds of a score of the test set, shape (2,), from some of its rows."""
    if not env.assets.has_test:
        return np.zeros(2)
    learner = env.assets.learner.copy()
    learner.generates = needs_generation(env.config.reward)
    rows = learner.splits["test"]  # type: ignore[attr-defined]
    some = np.random.default_rng(0).permutation(len(rows))[:_SCORED_ROWS]
    with reporter.task("measuring scores of test rows", 1) as show:
        before, start = learner.ledger.test_tokens, time.perf_counter()
        learner.evaluate("test", np.sort(some))
        found = np.array([learner.ledger.test_tokens - before, time.perf_counter() - start])
        show(1)
    return np.asarray(found * rows.num_tokens() / rows.num_tokens(some))


def _used(env: RaiseSelectEnv) -> float:
    """Return the most bytes used so far where the model is: of the GPU's memory, or of this process."""
    import resource

    import torch

    device = env.assets.learner.base.device  # type: ignore[attr-defined]
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _run(env: RaiseSelectEnv, agent: Any, name: str, reporter: Reporter) -> np.ndarray:
    """Return what `_spent` counts in one of an agent's final runs, from first steps with and without a dev score."""
    horizon = env.config.horizon
    size = getattr(agent, "batch_size", None) or env.config.batch_size
    num_steps = min(horizon, math.ceil(env.config.total_budget / size))  # of whole batches
    num_scored = math.ceil(num_steps / env.config.score_every)  # the last one always is
    kinds = [(1, num_scored), (horizon, num_steps - num_scored)]
    worlds = [(env.variant(score_every=every), count) for every, count in kinds if count]
    # One that has to learn or to prepare first takes as many rows, with next to no work in a step.
    actor = RandomAgent(batch_size=size) if _has(agent, "learn") or _has(agent, "prepare") else agent
    total, begun = np.zeros(3), np.zeros(3)
    with reporter.task(f"measuring steps with {name}", _STEPS * len(worlds)) as show:
        for place, (world, count) in enumerate(worlds):
            found = []
            for seed in range(_STEPS):
                found.append(_first_step(world, actor, name, seed))
                show(place * _STEPS + seed + 1)
            begun, step = np.mean(found[1:], axis=0)
            total += count * step
    return np.asarray(total + begun)


class _Enough(Exception):
    """Ends an episode of which enough was seen."""


def _first_step(env: RaiseSelectEnv, agent: Any, name: str, seed: int) -> np.ndarray:
    """Return what `_spent` counts in an agent's `begin`, which a run has once, and in its first step, shape (2, 3)."""
    seen = []

    def begin(world: Any, seed: int) -> None:
        seen.append(_spent(env))
        if _has(agent, "begin"):
            agent.begin(world, seed)
        seen.append(_spent(env))

    def stop(step: int) -> None:
        if step:  # one that picks row by row is at its first step for a while
            seen.append(_spent(env))
            raise _Enough

    action_space = getattr(agent, "action_space", None)
    watched: Any = SimpleNamespace(begin=begin, predict=agent.predict, action_space=action_space)
    with contextlib.suppress(_Enough):
        run_episode(env, watched, seed=seed, name=name, on_step=stop)
    return np.diff(seen, axis=0)


def _learning(plan: Plan, env: RaiseSelectEnv, agent: Any, reporter: Reporter) -> np.ndarray:
    """Return what `_spent` would count in all of the learning, from its first episode.

    Algorithms that learn from whole rollouts take more than that episode, and say for how many it stands.
    """
    if not plan.episodes or not _has(agent, "learn"):
        return np.zeros(3)
    env.reset(seed=0)
    with reporter.task(f"measuring an episode of learning ({plan.agent})", 1) as show:
        before = _spent(env)
        agent.learn(env, 1, seed=plan.seed)
        found = _spent(env) - before
        show(1)
    taken = agent.episodes_taken(env.config) if _has(agent, "episodes_taken") else 1
    return np.asarray(found * math.ceil(plan.episodes / taken))


def _spent(env: RaiseSelectEnv) -> np.ndarray:
    """Return updates, token forwards and seconds until now, shape (3,)."""
    ledger = env.ledger
    return np.array([ledger.updates, ledger.token_forwards, time.perf_counter()])


def _has(agent: Any, hook: str) -> bool:
    return getattr(agent, hook, None) is not None


def _left_out(agents: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the note on agents whose preparation is left out, where there are such."""
    names = [agent_name(name) for name, agent in agents.items() if _has(agent, "prepare")]
    if not names:
        return ()
    return (f"the preparation of {' and '.join(names)} is left out: only making it would tell what it costs",)


def _reckoned(plan: Plan, agents: Mapping[str, Agent], config: EnvConfig, reporter: Reporter) -> Estimate:
    """Return what the plan would cost with a model of which only the shapes are known."""
    with scratch_folder() as folder:
        scale, settings, notes = _stood_in(config, folder)
        env = RaiseSelectEnv(**settings)
        num_rows = len(load_data(config).pool)
        counted = _measured(replace(plan, settings=settings), agents, env, reporter, num_rows)
        features = env.assets.features.num_tokens
        share = num_rows / len(env.assets.pool)
        phi = share * phi_tokens(env) / scale
    features_tokens = share * features / scale
    run_tokens, test_tokens = (counted.tokens - features) / scale, counted.test_tokens / scale
    size, auxiliary = size_of(config, config.model), size_of(config, config.auxiliary_model or config.model)
    rate = matrix_rate(config, size)
    test_seconds = 2 * test_tokens * size.num_matrix / rate
    seconds = 2 * (run_tokens * size.num_matrix + features_tokens * auxiliary.num_matrix) / rate + test_seconds
    tokens = run_tokens + features_tokens
    on_gpu = resolve_device(config.device).type == "cuda"
    notes.append(
        f"time is that of the matrix products alone, at the {rate / 1e9:,.0f} billion operations a second that this "
        f"machine reached in a product of the model's shapes: reckon with {_REST['cuda' if on_gpu else 'cpu']}"
    )
    return Estimate(
        updates=counted.updates,
        tokens=round(tokens),
        phi=tokens / phi,
        test_tokens=round(test_tokens),
        seconds=seconds,
        test_seconds=test_seconds,
        memory_gb=_memory(config, size, auxiliary) / 1e9,
        notes=(*notes, *counted.notes),
    )


def _stood_in(config: EnvConfig, folder: Path) -> tuple[int, dict[str, Any], list[str]]:
    """Return by what token counts are to be divided, settings with a small model and a part of the pool, and notes."""
    has_tokenizer = save_stand_in(config.model, folder / "model")
    scale = 1 if has_tokenizer else CHARACTERS_PER_TOKEN
    notes = ["tokens were counted with a small model in the place of the one whose weights are not there"]
    if not has_tokenizer:
        notes.append(f"there is no tokenizer either: a token was taken for {CHARACTERS_PER_TOKEN} characters")
    own: dict[str, Any] = {"model": str(folder / "model"), "max_length": scale * config.max_length}
    own |= {"cache_dir": str(folder / "cache"), "auxiliary_model": None, "adapter": None, "auxiliary_adapter": None}
    own |= _STAND_IN_SETTINGS
    own["auxiliary_updates"] = config.num_auxiliary_updates
    own["lora"] = {"r": config.lora.r, "lora_alpha": config.lora.lora_alpha}
    pool = load_data(config).pool
    if len(pool) > SAMPLE_ROWS:
        own |= _sampled(config, folder)
        notes.append(f"{SAMPLE_ROWS:,} of the pool's {len(pool):,} rows stood for all of them")
    return scale, {**config.to_kwargs(), **own}, notes


def _sampled(config: EnvConfig, folder: Path) -> Mapping[str, Any]:
    if config.pool is None:
        return {"pool_size": SAMPLE_ROWS}
    part = sample_rows(load_data(config).pool, SAMPLE_ROWS, seed=0)
    path = folder / "pool.jsonl"
    path.write_text("".join(json.dumps(dict(row.fields)) + "\n" for row in part), encoding="utf-8")
    return {"pool": str(path)}


def _memory(config: EnvConfig, size: ModelSize, auxiliary: ModelSize) -> float:
    """Return the bytes that weights, adapters and the activations of an update take.

    With activation checkpointing a layer keeps one value of the hidden width a token, and one layer all that it has.
    Logits of the labels are kept in float32, and their gradients, or what a score makes of them. In float32 weights
    with the adapter merged in stand beside the frozen ones, for an update as for a score.
    """
    width = 4 if config.dtype == "float32" else 2
    weights = _weight_bytes(config, size) + (4 * size.num_matrix if config.dtype == "float32" else 0)
    if config.auxiliary_model not in (None, config.model):
        weights += _weight_bytes(config, auxiliary)
    layer = _LAYER_BYTES[width] * size.hidden_dim
    kept = (size.num_layers * width * size.hidden_dim + layer) if config.activation_checkpointing else None
    activations = size.num_layers * layer if kept is None else kept
    adapters = 4 * 4 * size.num_adapter  # adapter, gradient and two moments in float32
    tokens = min(config.micro_batch_tokens, config.batch_size * config.max_length)
    logits = max(tokens, GPU_SCORED_TOKENS) * 2 * 4 * size.num_words
    return weights + adapters + tokens * activations + logits


def _weight_bytes(config: EnvConfig, size: ModelSize) -> float:
    if config.dtype != "nf4":
        return (4 if config.dtype == "float32" else 2) * size.num_parameters
    # Four bits and a scale for every 64 weights; what is no matrix, and the head, stays in two bytes.
    head = size.num_words * size.hidden_dim
    packed = size.num_matrix - head
    return (0.5 + 4 / 64) * packed + 2 * (size.num_parameters - packed)
