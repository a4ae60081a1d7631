r"""What steps, forks and memory of a model of 1.24 billion parameters come to, on the device that there is.

The model has the shapes of Llama-3.2-1B and random weights: its losses mean nothing, but its steps cost what those of
the trained one would. Texts are cut into tokens by another tokenizer, so that rows are longer than they would be with
its own; rates are given by token. The plain loop is that of step.py: PEFT, transformers and torch's AdamW, with
the same base, adapter and rows.

    python benchmarks/real_targets.py --shared ../shared --out runs/real
    python benchmarks/billion.py --pool runs/real/alpaca.jsonl --dev runs/real/arc-dev.jsonl \
        --tokenizer ../shared/models/stories260K-hf
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import alternate, machine, table, with_spread
from step import EnvironmentSide, PlainLoop
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from raise_env import RaiseSelectEnv
from raise_env.vector import RaiseSelectVectorEnv

NUM_FORKS = 8

#: Dev rows that probes of raise_fork are scored on.
NUM_PROBED = 32

#: Llama-3.2-1B's config.json, but for the scaling of positions beyond 8,192.
SHAPES: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}

#: The same form, to try this program with.
SMALL: dict[str, Any] = {
    **SHAPES,
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def write_model(folder: Path, tokenizer: str, shapes: dict[str, Any]) -> None:
    """Write a model with random weights in bfloat16, and a tokenizer beside it."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(**shapes, dtype="bfloat16"))
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def wait() -> None:
    """Wait until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def part(name: str, lines: list[dict[str, str]]) -> Iterator[None]:
    """Note the seconds and the greatest memory of what is done within."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    yield
    wait()
    taken = time.perf_counter() - start
    memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if torch.cuda.is_available() else "not measured"
    lines.append({"once": name, "seconds": f"{taken:.2f}", "GPU memory at most, GB": memory})
    print(lines[-1], flush=True)


def random_actions(env: RaiseSelectEnv, count: int, seed: int) -> np.ndarray:
    """Return random batches of the candidates that are there, shape (count, num_candidates), int8."""
    rng = np.random.default_rng(seed)
    actions = np.zeros((count, env.config.num_candidates), dtype=np.int8)
    for action in actions:
        action[rng.choice(np.flatnonzero(env.action_masks()), env.config.batch_size, replace=False)] = 1
    return actions


def episode(env: RaiseSelectEnv) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Run an episode on random rows; return its actions and the rows of each."""
    env.reset(seed=0)
    actions, rows = [], []
    for number in range(env.config.horizon):
        action = random_actions(env, 1, number)[0]
        info = env.step(action)[-1]
        actions.append(action)
        rows.append(info["selected"][: info["num_selected"]])
    return actions, rows


def steps(env: RaiseSelectEnv, lines: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the line of the environment's steps against the plain loop's."""
    with part(f"{env.config.horizon} steps and the reset before them", lines):
        actions, rows = episode(env)
    side = EnvironmentSide(env, actions)
    with tempfile.TemporaryDirectory() as folder:
        env.save_adapter(folder)
        plain = PlainLoop(env, rows, folder)
    with part("as many, in turns with the plain loop's", lines):
        seconds = alternate({"environment": side.step, "plain": plain.step}, env.config.horizon - 2, warmups=2)
    learner: Any = env.assets.learner
    lengths = learner.pool.lengths
    tokens = 3 * sum(float(lengths[chosen].sum()) for chosen in rows) / len(rows)
    tokens += float(learner.splits["dev"].rows.lengths.sum())
    return [
        {
            "token forwards of a step": f"{tokens:,.0f}",
            "step, ms": with_spread(seconds["environment"] * 1e3, 0),
            "plain loop, ms": with_spread(seconds["plain"] * 1e3, 0),
            "times faster": with_spread(seconds["plain"] / seconds["environment"]),
            "greatest difference in dev loss": f"{np.abs(np.subtract(side.dev_losses, plain.dev_losses)).max():.1g}",
        }
    ]


def forks(env: RaiseSelectEnv, repeats: int) -> list[dict[str, str]]:
    """Return lines of what looking ahead costs from one moment, and say whether it comes out the same twice."""
    env.reset(seed=0)
    env.step(random_actions(env, 1, 1)[0])
    moment, actions = env.snapshot(), random_actions(env, NUM_FORKS, 2)
    rewards: list[float] = []

    def step() -> None:
        env.restore(moment)
        rewards.append(float(env.step(actions[0])[1]))
        env.restore(moment)

    def waited(call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            call()
            wait()

        return run

    sides = {
        "snapshot": waited(env.snapshot),
        "restore": waited(lambda: env.restore(moment)),
        "one step, undone": waited(step),
        f"fork({NUM_FORKS}) stepped together": waited(
            lambda: RaiseSelectVectorEnv.over(env.fork(NUM_FORKS)).step(actions)
        ),
        f"probe of {NUM_FORKS}, all dev rows": waited(lambda: env.probe(actions)),
        f"probe of {NUM_FORKS}, {NUM_PROBED} dev rows": waited(lambda: env.probe(actions, NUM_PROBED)),
    }
    seconds = alternate(sides, repeats)
    same = "the same to the bit" if len(set(rewards)) == 1 else f"apart by up to {np.ptp(rewards):.2g}"
    print(f"{len(rewards)} times the same step from the same moment: rewards {same}.")
    apart = np.abs(env.probe(actions) - env.dev_scores[-1] - _rewards(env, actions)).max()
    print(f"Gains that probes tell and that forks have: apart by up to {apart:.2g}.")
    return [{"from one moment": name, "ms": with_spread(taken * 1e3, 1)} for name, taken in seconds.items()]


def _rewards(env: RaiseSelectEnv, actions: np.ndarray) -> np.ndarray:
    return np.asarray(RaiseSelectVectorEnv.over(env.fork(NUM_FORKS)).step(actions)[1])


def main() -> None:
    """Measure, and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--dev", required=True)
    parser.add_argument("--tokenizer", required=True, help="folder of a model whose tokenizer is taken")
    parser.add_argument("--model", type=Path, help="where the model is, or is written to; left out: for this run alone")
    parser.add_argument("--num-dev", type=int, default=64)
    parser.add_argument("--horizon", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a model of the same form of 0.2 million parameters")
    arguments = parser.parse_args()
    lines: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model or Path(scratch) / "model"
        if not folder.exists():
            write_model(folder, arguments.tokenizer, SMALL if arguments.small else SHAPES)
        env = RaiseSelectEnv(
            model=str(folder), pool=arguments.pool, dev=arguments.dev, num_dev=arguments.num_dev, skip_empty=True,
            batch_size=16, horizon=arguments.horizon, max_length=512, learning_rate=2e-4, dtype="bfloat16",
            lora={"r": 16, "lora_alpha": 32}, cache_dir=str(Path(scratch) / "cache"),
        )  # fmt: skip
        with part("model, data, features", lines):
            env.load()
        features = env.assets.features.num_tokens
        found = [steps(env, lines), forks(env, arguments.repeats)]
        print(f"\n{len(env.assets.pool):,} rows; features took {features:,} token forwards.")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    for rows in [lines, *found]:
        print(f"\n{table(rows)}")
    print(f"\n{name}, torch {torch.__version__}; {machine()}")


if __name__ == "__main__":
    main()
