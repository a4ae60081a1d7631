"""How fast static features are computed, against bare forward passes of the same tokens.

The features need two passes: each row (its embedding, and log P of its response given the prompt) and each response
by itself. The bare passes put as many tokens through the same model, without an adapter, in batches of rows that are
all of the mean length: no padding, no logits, nothing kept. Some log-probabilities are held against transformers' loss.

    python benchmarks/features.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from measure import alternate, machine, require_equal, table, with_spread
from transformers import AutoModelForCausalLM

from raise_env import RaiseSelectEnv, auxiliary
from raise_env.base_model import BaseModel, model_folder
from raise_env.encoding import EncodedRows, Encoder

#: Rows whose log-probabilities are held against transformers' loss.
NUM_CHECKED = 32


def bare_passes(base: BaseModel, lengths: list[np.ndarray]) -> Callable[[], None]:
    """Return what puts as many tokens through the model as there are in rows of these lengths, perfectly packed."""
    batches = []
    for own in lengths:
        length = round(float(own.mean()))
        num_rows = round(own.sum() / length)
        ids = torch.randint(3, 200, (num_rows, length), generator=torch.Generator().manual_seed(0))
        batches += ids.split(max(1, auxiliary.FEATURE_BATCH_TOKENS // length))
    body = base.peft_model.get_base_model().model

    @torch.no_grad()
    def run() -> None:
        for ids in batches:
            body(input_ids=ids, use_cache=False)

    return run


def plain_log_probabilities(rows: EncodedRows) -> np.ndarray:
    """Return minus transformers' loss of each row's response, without an adapter, shape (NUM_CHECKED,)."""
    model = AutoModelForCausalLM.from_pretrained(model_folder("tiny"), dtype=torch.float32)
    losses = []
    for row in range(NUM_CHECKED):
        tokens, is_label = rows.row(row)
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=ids.where(torch.from_numpy(is_label), -100)).loss))
    return -np.array(losses)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000, help="rows of the embedded task's pool")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    env = RaiseSelectEnv(pool_size=arguments.rows)
    learner = env.assets.learner
    base, pool = learner.base, learner.pool
    responses = Encoder(base.tokenizer, env.config.max_length).encode_responses(list(env.assets.pool))
    rows = np.arange(len(pool))
    adapter = torch.zeros(base.num_parameters)
    found: list[np.ndarray] = []

    def features() -> None:
        log_p, _ = auxiliary._scan(base, adapter, pool, rows, lambda _done: None)
        auxiliary._log_probabilities(base, adapter, responses, rows, lambda _done: None)
        found[:] = [log_p[:NUM_CHECKED]]

    seconds = alternate(
        {"features": features, "bare": bare_passes(base, [pool.lengths, responses.lengths])}, arguments.repeats
    )
    require_equal("log-probabilities", found[0], plain_log_probabilities(pool))
    line = {
        "rows": str(len(rows)),
        "rows a second": with_spread(len(rows) / seconds["features"], 0),
        "bare passes": with_spread(len(rows) / seconds["bare"], 0),
        "features / bare": with_spread(seconds["bare"] / seconds["features"]),
    }
    print(table([line]))
    print(f"\n{machine()} Medians, in brackets the quartiles.")


if __name__ == "__main__":
    main()
