"""How long it takes until an environment can be used, and until it can be used again.

- First reset of the embedded task, the start of Python included, against `import torch, transformers` alone and against
  the import of what makes a model there and in PEFT: `import transformers` puts most of itself off until it is asked
  for. Each runs in a process of its own, in turn. The features are in the cache, as they are after the first time.
- A later reset, against building the model anew with PEFT, as a loop without snapshots of the start would.

    python benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys

import torch
from measure import alternate, machine, table, with_spread
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from raise_env import RaiseSelectEnv
from raise_env.base_model import model_folder

IMPORTS = {
    "import torch, transformers": "import torch, transformers",
    "import of AutoModelForCausalLM and PEFT": "import torch, peft; from transformers import AutoModelForCausalLM",
}
FIRST_RESET = "import gymnasium, raise_env; gymnasium.make('RaiseSelect-v0').reset(seed=0)"


def run(code: str) -> None:
    """Run Python on it in a process of its own."""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def build(env: RaiseSelectEnv) -> None:
    """Load the base and put PEFT's adapter on it."""
    causal = AutoModelForCausalLM.from_pretrained(model_folder(env.config.model), dtype=torch.float32)
    lora = env.config.lora
    get_peft_model(
        causal, LoraConfig(task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.lora_alpha, target_modules="all-linear")
    )


def main() -> None:
    """Measure both, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each kind")
    repeats = parser.parse_args().repeats
    run(FIRST_RESET)  # the features are in the cache from now on
    sides = {name: functools.partial(run, code) for name, code in {"first reset": FIRST_RESET, **IMPORTS}.items()}
    starts = alternate(sides, repeats)
    env = RaiseSelectEnv()
    env.reset(seed=0)
    env.step(env.action_space.sample())
    resets = alternate({"reset": lambda: env.reset(seed=0), "build": lambda: build(env)}, 4 * repeats)
    rows = [
        {
            "what": "first reset, start of Python included",
            "seconds": with_spread(starts["first reset"]),
            "against": name,
            "its seconds": with_spread(starts[name]),
            "ratio": with_spread(starts["first reset"] / starts[name]),
        }
        for name in IMPORTS
    ]
    rows.append(
        {
            "what": "later reset",
            "seconds": with_spread(resets["reset"], 5),
            "against": "building the PEFT model anew",
            "its seconds": with_spread(resets["build"], 3),
            "ratio": "1 / " + with_spread(resets["build"] / resets["reset"], 0),
        }
    )
    print(table(rows))
    print(f"\n{machine()} Medians, in brackets the quartiles.")


if __name__ == "__main__":
    main()
