"""What a step of the environment costs, against a plain loop and against its bare matrix products.

The plain loop is what one would write with PEFT and transformers alone: the batch padded to its longest row, the dev
rows as one padded batch, logits at every position, transformers' own loss, torch's AdamW. It trains on the same rows
from the same adapter, and the dev losses of both are held against each other after every step.

The bare matrix products are those of the environment's own step, forward and backward, taken down in a first run of the
same episode and replayed on random numbers of the same shapes and strides: the rest is what goes to anything else.

    python benchmarks/step.py
    python benchmarks/step.py --real DIR    # models/stories260K-hf on Alpaca for GSM8K, at most 256 tokens a row
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from measure import alternate, machine, require_equal, table, with_spread
from peft import PeftModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from raise_env import RaiseSelectEnv
from raise_env.base_model import model_folder
from raise_env.encoding import EncodedRows
from raise_env.learner import LoraLearner

aten = torch.ops.aten

#: The operators that multiply matrices, by where their two matrices stand among the arguments.
PRODUCTS = {aten.mm: (0, 1), aten.bmm: (0, 1), aten.addmm: (1, 2), aten.baddbmm: (1, 2)}
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
}

#: Rows of the real pool: what a step costs does not depend on their number.
NUM_REAL_ROWS = 1000

#: Sizes and strides of the two matrices of a product.
Shape = tuple[tuple[int, ...], ...]


class Products(TorchDispatchMode):
    """Takes down the shapes of all matrix products that are made within it; attention is two, and five backward."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Shape] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = function.overloadpacket
        if packet in PRODUCTS:
            first, second = PRODUCTS[packet]
            self._note(args[first], args[second])
        elif packet in ATTENTION:
            is_backward = packet is aten._scaled_dot_product_flash_attention_for_cpu_backward
            parts = args[1:4] if is_backward else args[:3]
            # Several queries may share a key: there are as many products as queries all the same.
            query, key, value = (part.repeat_interleave(len(parts[0][0]) // len(part[0]), 1) for part in parts)
            query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
            weights = torch.empty(len(query), query.shape[1], key.shape[1])
            self._note(query, key.mT)  # backward, the weights are computed anew
            self._note(weights, value)
            if is_backward:
                self._note(weights.mT, value)
                self._note(weights, key)
                self._note(weights.mT, query)
        return function(*args, **(kwargs or {}))

    def _note(self, first: Tensor, second: Tensor) -> None:
        self.made.append((tuple(first.shape), first.stride(), tuple(second.shape), second.stride()))


class PlainLoop:
    """The same episode with PEFT, transformers and torch as their pages show them."""

    def __init__(self, env: RaiseSelectEnv, rows: list[np.ndarray], adapter: str) -> None:
        source = model_folder(env.config.model)
        causal = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, env.config.dtype)).to(
            env.assets.learner.base.device
        )
        self.model = PeftModel.from_pretrained(causal, adapter, is_trainable=True)
        self.config, self.rows = env.config, rows
        self.parameters = [value for value in self.model.parameters() if value.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=env.config.learning_rate, weight_decay=env.config.weight_decay
        )
        learner = env.assets.learner
        self.pool, self.dev = learner.pool, learner.splits["dev"].rows
        self.dev_losses: list[float] = []

    def step(self) -> None:
        """Train on the next rows, and note the dev loss."""
        number = len(self.dev_losses)
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.learning_rate * (1 + math.cos(math.pi * number / self.config.horizon)) / 2
        self.optimiser.zero_grad()
        self.model(**self._batch(self.pool, self.rows[number])).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimiser.step()
        with torch.no_grad():
            loss = self.model(**self._batch(self.dev, np.arange(len(self.dev)))).loss
        self.dev_losses.append(float(loss))

    def _batch(self, data: EncodedRows, rows: np.ndarray) -> dict[str, Tensor]:
        pairs = [data.row(int(row)) for row in rows]
        length = max(len(tokens) for tokens, _ in pairs)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        labels = torch.full((len(rows), length), -100)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for place, (tokens, is_label) in enumerate(pairs):
            values = torch.from_numpy(tokens.astype(np.int64))
            ids[place, : len(tokens)] = values
            labels[place, : len(tokens)] = values.where(torch.from_numpy(is_label), -100)
            mask[place, : len(tokens)] = 1
        device = self.model.device
        return {"input_ids": ids.to(device), "labels": labels.to(device), "attention_mask": mask.to(device)}


class EnvironmentSide:
    """The environment's steps, with the rows that an agent picked at random in a first run.

    `model_s` holds what of each step was spent in the model: its update and its dev score.
    """

    def __init__(self, env: RaiseSelectEnv, actions: list[np.ndarray]) -> None:
        self.env, self.actions = env, actions
        env.reset(seed=0)
        self.dev_losses: list[float] = []
        self.model_s: list[float] = []

    def step(self) -> None:
        """Make the next step: update, dev score, features of the next candidates, info, record."""
        self.model_s.append(0.0)
        with mock.patch.multiple(LoraLearner, _train=self._timed("_train"), evaluate=self._timed("evaluate")):
            info = self.env.step(self.actions[len(self.dev_losses)])[-1]
        self.dev_losses.append(-info["dev_score"])

    def _timed(self, name: str) -> Callable[..., Any]:
        method = getattr(LoraLearner, name)

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = method(*arguments)
            self.model_s[-1] += time.perf_counter() - start
            return result

        return timed


def first_run(env: RaiseSelectEnv) -> tuple[list[np.ndarray], list[np.ndarray], list[list[Shape]]]:
    """Run an episode on random rows; return its actions, the rows of each, and the matrix products of each step."""
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    actions, rows, products = [], [], []
    for _ in range(env.config.horizon):
        action = np.zeros(env.config.num_candidates, dtype=np.int8)
        action[rng.choice(np.flatnonzero(env.action_masks()), env.config.batch_size, replace=False)] = 1
        with Products() as seen:
            info = env.step(action)[-1]
        actions.append(action)
        rows.append(info["selected"][: info["num_selected"]])
        products.append(seen.made)
    return actions, rows, products


def replay(products: list[list[Shape]]) -> Callable[[], None]:
    """Return what makes the products of one step after another, on matrices that are made beforehand."""
    shapes = {shape for step in products for shape in step}
    operands = {
        shape: (torch.empty_strided(*shape[:2]).normal_(), torch.empty_strided(*shape[2:]).normal_())
        for shape in shapes
    }
    results = {shape: first @ second for shape, (first, second) in operands.items()}
    steps = iter(products)

    def make() -> None:
        for shape in next(steps):
            torch.matmul(*operands[shape], out=results[shape])

    return make


def measure(env: RaiseSelectEnv, steps: int) -> dict[str, str]:
    """Return a line of the table: seconds of a step and both ratios, after the losses were found equal."""
    actions, rows, products = first_run(env)
    side = EnvironmentSide(env, actions)
    with tempfile.TemporaryDirectory() as folder:
        env.save_adapter(folder)
        plain = PlainLoop(env, rows, folder)
    seconds = alternate(
        {"environment": side.step, "plain": plain.step, "products": replay(products)}, steps - 2, warmups=2
    )
    require_equal("dev losses", side.dev_losses, plain.dev_losses)
    data = env.assets.learner
    return {
        "model": env.config.model.rstrip("/").rpartition("/")[2],
        "tokens of a dev row": f"{data.splits['dev'].rows.lengths.mean():.0f}",
        "step, ms": with_spread(seconds["environment"] * 1e3, 0),
        "plain loop, ms": with_spread(seconds["plain"] * 1e3, 0),
        "times faster": with_spread(seconds["plain"] / seconds["environment"]),
        "step / its matrix products": with_spread(seconds["environment"] / seconds["products"]),
        "of it not the model's": with_spread(100 * (1 - np.array(side.model_s[2:]) / seconds["environment"])) + "%",
        "greatest difference in loss": f"{np.abs(np.subtract(side.dev_losses, plain.dev_losses)).max():.1g}",
    }


def real_settings(source: Path, folder: Path) -> dict[str, Any]:
    """Return the settings of a real model and real rows: the first of Alpaca that have an answer, and GSM8K."""
    lines = (source / "data" / "alpaca" / "alpaca.jsonl").read_text(encoding="utf-8").splitlines()
    answered = [line for line in lines if json.loads(line)["output"].strip()]
    (folder / "pool.jsonl").write_text("\n".join(answered[:NUM_REAL_ROWS]), encoding="utf-8")
    return {
        "model": str(source / "models" / "stories260K-hf"),
        "pool": str(folder / "pool.jsonl"),
        "dev": str(source / "data" / "gsm8k" / "train.jsonl"),
        "auxiliary_updates": 0,
    }


def main() -> None:
    """Measure what the command line asks for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, help="folder with models/stories260K-hf, data/alpaca and data/gsm8k")
    parser.add_argument("--num-dev", type=int, default=64, help="dev rows that are scored")
    parser.add_argument("--steps", type=int, default=30, help="steps that are measured")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--dtype", default="float32", help="of the base model, on the environment's side")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = {"num_dev": arguments.num_dev, "horizon": arguments.steps, "dtype": arguments.dtype}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.real is not None:
            settings |= real_settings(arguments.real, Path(folder))
        print(table([measure(RaiseSelectEnv(**settings), arguments.steps)]))
    print(f"\n{machine()} Medians, in brackets the quartiles.")


if __name__ == "__main__":
    main()
