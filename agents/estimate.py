"""What a run would cost: measured on a few steps, or reckoned where the model's weights are not there yet."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from raise_env import EnvConfig, RaiseSelectEnv
from raise_env.assets import load_data
from raise_env.files import scratch_folder
from raise_env.model_size import ModelSize, has_weights, matrix_rate, save_stand_in, size_of
from raise_env.pool import sample_rows

from .catalogue import make_agent
from .runs import Plan, check_inputs, final_environment, phi_tokens

__all__ = ["CHARACTERS_PER_TOKEN", "Estimate", "estimate"]

#: Rows of the pool that stand for all of it where its features cannot be computed.
SAMPLE_ROWS = 2000

#: What is reckoned with where there is no tokenizer either; English text and the usual vocabularies of 32,000 and more.
CHARACTERS_PER_TOKEN = 4

_STAND_IN_SETTINGS = {"device": "cpu", "dtype": "float32", "activation_checkpointing": False}


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run would cost.

    Attributes:
        updates: Optimiser steps, the forks' included.
        tokens: Token forwards, forward and backward counted as 3.
        phi: The same in Phi.
        seconds: As measured on this machine, or the least that its matrix products would take.
        memory_gb: The most that this process has used so far, or what model and activations would take; 10^9 bytes.
        notes: What it rests on, where it was not measured.
    """

    updates: int
    tokens: int
    phi: float
    seconds: float
    memory_gb: float
    notes: tuple[str, ...] = ()


def estimate(plan: Plan) -> Estimate:
    """Return what the whole plan would cost, from an episode of learning and a few steps of each agent's final runs.

    Where the folder of a model has its config.json and no weights, tokens are counted with a small model in its place
    and time and memory are reckoned from its shapes. Agents' preparations are left out: they cannot be measured but by
    making them.

    Raises:
        RaiseEnvError: As `train`.
    """
    config = EnvConfig.from_kwargs(plan.settings)
    check_inputs(config)
    models = [config.model, config.auxiliary_model or config.model]
    if all(has_weights(model) for model in models):
        return _measured(plan, RaiseSelectEnv(**plan.settings))
    return _reckoned(plan, config)


def _measured(plan: Plan, env: RaiseSelectEnv) -> Estimate:
    import resource

    agent: Any = make_agent(plan.agent, plan.agent_settings)
    total = np.zeros(3)
    for name in plan.names:
        final = final_environment(env, agent if name == plan.agent else make_agent(name))
        steps = [_measure(final, lambda world: world.step(_first_rows(world))) for _ in range(3)]
        total += np.mean(steps[1:], axis=0) * final.config.horizon * plan.num_runs  # the first step warms up
    if plan.episodes and hasattr(agent, "learn"):
        total += _measure(env, lambda world: agent.learn(world, 1, seed=plan.seed)) * plan.episodes
    updates, tokens, seconds = total
    tokens += env.assets.features.num_tokens
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return Estimate(round(updates), round(tokens), tokens / phi_tokens(env), seconds, memory)


def _measure(env: RaiseSelectEnv, work: Callable[[RaiseSelectEnv], object]) -> np.ndarray:
    """Return updates, token forwards and seconds of a piece of work on a new episode, shape (3,)."""
    env.reset(seed=0)
    ledger = env.ledger
    before = np.array([ledger.updates, ledger.token_forwards, time.perf_counter()])
    work(env)
    return np.asarray(np.array([ledger.updates, ledger.token_forwards, time.perf_counter()]) - before)


def _first_rows(env: RaiseSelectEnv) -> np.ndarray:
    action = np.zeros(env.action_space.shape or (0,), dtype=np.int8)
    action[np.flatnonzero(env.action_masks())[: env.config.batch_size]] = 1
    return action


def _reckoned(plan: Plan, config: EnvConfig) -> Estimate:
    """Return what the plan would cost with a model of which only the shapes are known."""
    with scratch_folder() as folder:
        scale, settings, notes = _stood_in(config, folder)
        env = RaiseSelectEnv(**settings)
        counted = _measured(replace(plan, settings=settings), env)
        features = env.assets.features.num_tokens
        num_rows = len(load_data(config).pool)
        share = num_rows / len(env.assets.pool)
        phi = share * phi_tokens(env) / scale
    features_tokens = share * features / scale
    run_tokens = (counted.tokens - features) / scale
    size, auxiliary = size_of(config, config.model), size_of(config, config.auxiliary_model or config.model)
    rate = matrix_rate(config, size)
    seconds = 2 * (run_tokens * size.num_matrix + features_tokens * auxiliary.num_matrix) / rate
    tokens = run_tokens + features_tokens
    notes.append(
        f"time is that of the matrix products alone, at the {rate / 1e9:,.0f} billion operations a second that this "
        "machine reached in a product of the model's shapes: reckon with half as much again"
    )
    memory = _memory(config, size, auxiliary)
    return Estimate(counted.updates, round(tokens), tokens / phi, seconds, memory / 1e9, tuple(notes))


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

    A layer keeps 34 values of the hidden width a token at two bytes each (Korthikanti et al. 2022, "Reducing Activation
    Recomputation in Large Transformer Models", section 4.1, without the part of attention, which is never kept whole);
    with activation checkpointing one, and those of one layer. Logits of the labels are kept in float32, and their
    gradients.
    """
    width = 4 if config.dtype == "float32" else 2
    weights = _weight_bytes(config, size)
    if config.auxiliary_model not in (None, config.model):
        weights += _weight_bytes(config, auxiliary)
    layer = 34 / 2 * width * size.hidden_dim
    kept = (size.num_layers * width * size.hidden_dim + layer) if config.activation_checkpointing else None
    activations = size.num_layers * layer if kept is None else kept
    adapters = 4 * 4 * size.num_adapter  # adapter, gradient and two moments in float32
    tokens = min(config.micro_batch_tokens, config.batch_size * config.max_length)
    return weights + adapters + tokens * (activations + 2 * 4 * size.num_words)


def _weight_bytes(config: EnvConfig, size: ModelSize) -> float:
    if config.dtype != "nf4":
        return (4 if config.dtype == "float32" else 2) * size.num_parameters
    # Four bits and a scale for every 64 weights; what is no matrix, and the head, stays in two bytes.
    head = size.num_words * size.hidden_dim
    packed = size.num_matrix - head
    return (0.5 + 4 / 64) * packed + 2 * (size.num_parameters - packed)
