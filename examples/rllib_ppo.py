"""PPO of RLlib learns which instructions to train on: it scores the candidates, and the best of each class are taken.

What one sees: the mean return of the episodes of each iteration, and at last the test score of fine-tuning runs that
the policy chose for, beside those of random choice with the same candidates. The score is minus the loss in nats per
response token: higher is better. `--fast` only shows that everything works. It needs `pip install -e '.[rllib]'`.
"""

import argparse
import logging
import os

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as it will be; Ray warns of it else

import gymnasium as gym
import numpy as np
import ray
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.columns import Columns
from ray.tune.registry import register_env

import raise_env
from raise_env import TopKScores
from raise_env.agents import RandomAgent, run_episode

logging.getLogger("ray.rllib").setLevel(logging.ERROR)  # it praises its newer interface
gym.register_envs(raise_env)  # done by the import; this says so

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--num-iterations", type=int, default=10)
parser.add_argument("--num-steps", type=int, default=80, help="steps of an iteration")
parser.add_argument("--fast", action="store_true", help="learn for two short episodes on a small pool")
arguments = parser.parse_args()

settings = {"horizon": 20, "num_dev": 32, "pool_size": 1000}
if arguments.fast:
    settings = {"horizon": 4, "num_dev": 8, "num_test": 8, "pool_size": 100, "auxiliary_updates": 2}
    arguments.num_iterations, arguments.num_steps = 2, 4


def make(config):
    """Return the environment in the form that RLlib's networks take: scores as action, one row as observation."""
    return gym.wrappers.FlattenObservation(TopKScores(gym.make("RaiseSelect-v0", **config)))


ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR")  # never a cluster that is there
register_env("RaiseSelect", make)
# gamma=0: an action shows in its very own reward. No processes of Ray's own: all happens in this one.
config = (
    PPOConfig()
    .environment("RaiseSelect", env_config=settings)
    .env_runners(num_env_runners=0, batch_mode="complete_episodes")
    .learners(num_learners=0)
    .training(
        gamma=0.0,
        lambda_=1.0,
        lr=1e-3,
        train_batch_size=arguments.num_steps,
        minibatch_size=arguments.num_steps,
        num_epochs=8,
    )
    .debugging(seed=0, log_level="ERROR")
)
algorithm = config.build_algo()
for iteration in range(1, arguments.num_iterations + 1):
    result = algorithm.train()["env_runners"]
    steps = result["num_env_steps_sampled_lifetime"]
    print(f"iteration {iteration}, step {steps:.0f}: return {result['episode_return_mean']:.2f}")

module = algorithm.get_module()


def choose(observation: np.ndarray) -> np.ndarray:
    """Return the mean of the scores that the policy draws from."""
    batch = {Columns.OBS: torch.from_numpy(observation)[None]}
    with torch.no_grad():
        return module.forward_inference(batch)[Columns.ACTION_DIST_INPUTS][0].chunk(2)[0].numpy()


def test_score(seed: int) -> float:
    """Run one episode and return the test score."""
    observation, _ = env.reset(seed=seed)
    is_over = False
    while not is_over:
        observation, _, is_over, _, info = env.step(choose(observation))
    return info["test_score"]


env = make(settings)
scores = {
    "random": [run_episode(env.unwrapped, RandomAgent(), seed=seed, name="random").test_score for seed in (1, 2, 3)],
    "PPO": [test_score(seed) for seed in (1, 2, 3)],
}
for name, values in scores.items():
    print(f"test score with {name}: {np.mean(values):.2f} ({', '.join(f'{value:.2f}' for value in values)})")
algorithm.stop()
ray.shutdown()
