"""PPO of Stable-Baselines3 learns which instructions to train on, with a policy over batches of eight rows.

What one sees: the return of the episodes while PPO learns, and at last the test score of fine-tuning runs that PPO
chose for, beside those of random choice with the same candidates. The score is minus the loss in nats per response
token: higher is better. `--fast` only shows that everything works.
"""

import argparse

import gymnasium as gym
import numpy as np
from stable_baselines3 import PPO

import raise_env
from raise_env.agents import RandomAgent, SubsetPolicy, run_episode

gym.register_envs(raise_env)  # done by the import; this says so

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--num-steps", type=int, default=320, help="steps to learn for")
parser.add_argument("--fast", action="store_true", help="learn for two short episodes on a small pool")
arguments = parser.parse_args()

settings = {"horizon": 20, "num_dev": 32, "pool_size": 1000}
if arguments.fast:
    settings = {"horizon": 4, "num_dev": 8, "num_test": 8, "pool_size": 100, "auxiliary_updates": 2}
    arguments.num_steps = 8
env = gym.make("RaiseSelect-v0", **settings)

# gamma=0: an action shows in its very own reward. What follows depends far more on which candidates come up and on how
# far the run is, and with a long horizon PPO would have to learn through that noise.
num_steps = min(40, arguments.num_steps)
model = PPO(
    SubsetPolicy,
    env,
    policy_kwargs={"subset_size": 8},
    gamma=0.0,
    gae_lambda=1.0,
    n_steps=num_steps,
    batch_size=num_steps,
    n_epochs=8,
    learning_rate=3e-3,
    seed=0,
    device="cpu",
)


returns = []


def report(local_variables, _) -> bool:
    """Print the mean return of every four episodes, and go on learning."""
    returns.extend(info["episode"]["r"] for info in local_variables["infos"] if "episode" in info)
    if len(returns) == 4:
        print(f"step {model.num_timesteps}: return {np.mean(returns):.2f}")
        returns.clear()
    return True


model.learn(arguments.num_steps, callback=report)

# A trained model is an agent as it is.
for name, agent in {"random": RandomAgent(), "PPO": model}.items():
    scores = [run_episode(env, agent, seed=seed, name=name).test_score for seed in (1, 2, 3)]
    print(f"test score with {name}: {np.mean(scores):.2f} ({', '.join(f'{score:.2f}' for score in scores)})")
