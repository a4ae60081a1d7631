"""Several ways to select are compared over the same seeds: two that do not learn, two that do, and one that knows.

Each learner learns anew with every seed; then everyone makes a fine-tuning run with the candidates of that seed, so
that the runs can be compared in pairs. `raise-env bench` does the same on disk and in several processes, and can be
interrupted.

What one sees: a line for each, with the mean test loss in nats per response token (lower is better), how far it lies
below that of random choice, run by run, both with 95% intervals, and the time that learning took. It takes about ten
minutes on one core; `--quick` only shows that everything works.
"""

import argparse
import time

import numpy as np

from raise_env import RaiseSelectEnv
from raise_env.agents import make_agent, run_episode
from raise_env.agents.statistics import mean_interval, paired_difference

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--seeds", type=int, default=3, help="how many seeds to repeat everything with")
parser.add_argument("--quick", action="store_true", help="two seeds, short episodes, a small pool")
arguments = parser.parse_args()

episodes = {"random": 0, "ifd": 0, "sb3:PPO": 16, "raise_fork": 4, "oracle": 0}  # to learn for
settings = {}
if arguments.quick:
    settings = {"horizon": 3, "num_dev": 8, "num_test": 8, "pool_size": 100, "auxiliary_updates": 2}
    episodes = {name: min(number, 1) for name, number in episodes.items()}
    arguments.seeds = 2

env = RaiseSelectEnv(**settings)
losses, seconds = {}, {}
for name, number in episodes.items():
    losses[name], seconds[name] = np.zeros(arguments.seeds), 0.0
    for seed in range(arguments.seeds):
        agent = make_agent(name)  # a new one: nothing is remembered from the last seed
        start = time.perf_counter()
        if number:
            agent.learn(env, number, seed=seed)
        seconds[name] += (time.perf_counter() - start) / arguments.seeds
        record = run_episode(env, agent, seed=1000 + seed, name=name)
        losses[name][seed] = -record.test_score  # the default score is minus the loss

print(f"{'agent':<11} {'test loss':<19} {'below random':<19} learning")
for name, values in losses.items():
    loss, gain = mean_interval(values), paired_difference(losses["random"], values)
    columns = [f"{number.value:.2f} ({number.low:.2f}, {number.high:.2f})" for number in (loss, gain)]
    print(f"{name:<11} {columns[0]:<19} {columns[1]:<19} {seconds[name]:.0f} s")
