"""PPO put together from TorchRL's parts learns which instructions to train on: it scores the candidates one by one.

What one sees: the mean return of the episodes of each iteration, and at last the test score of fine-tuning runs that
the policy chose for, beside those of random choice with the same candidates. The score is minus the loss in nats per
response token: higher is better. `--fast` only shows that everything works.
It needs `pip install -e '.[torchrl]'`.
"""

import argparse

import gymnasium as gym
import numpy as np
import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import GymWrapper, RewardSum, TransformedEnv
from torchrl.envs.utils import ExplorationType
from torchrl.modules import IndependentNormal, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

import raise_env
from raise_env import TopKScores
from raise_env.agents import RandomAgent, run_episode

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

torch.manual_seed(0)
# The paper's form of the action: a score for each candidate, of which the best of each class are taken.
world = TopKScores(gym.make("RaiseSelect-v0", **settings))
env = TransformedEnv(GymWrapper(world), RewardSum())
env.set_seed(0)
num_features = world.observation_space.shape[1]


class RowScores(nn.Module):
    """Scores each row by itself, so that neither order nor number of rows matter; exploration has one width for all."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Sequential(nn.Linear(num_features, 64), nn.Tanh(), nn.Linear(64, 1))
        self.log_width = nn.Parameter(torch.tensor(-0.5))

    def forward(self, observation):
        """Return mean and width of each row's score."""
        scores = self.rows(observation).squeeze(-1)
        return scores, self.log_width.exp().expand_as(scores)


class MeanValue(nn.Module):
    """Reads off the mean of the rows what return to expect."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Sequential(nn.Linear(num_features, 64), nn.Tanh())
        self.head = nn.Linear(64, 1)

    def forward(self, observation):
        """Return the value, shape (..., 1)."""
        return self.head(self.rows(observation).mean(-2))


scores = TensorDictModule(RowScores(), in_keys=["observation"], out_keys=["loc", "scale"])
actor = ProbabilisticActor(
    scores,
    in_keys=["loc", "scale"],
    spec=env.action_spec,
    distribution_class=IndependentNormal,
    return_log_prob=True,
    default_interaction_type=ExplorationType.RANDOM,
)
critic = ValueOperator(MeanValue(), in_keys=["observation"])
# gamma=0: an action shows in its very own reward.
advantage = GAE(gamma=0.0, lmbda=1.0, value_network=critic)
loss_of = ClipPPOLoss(actor, critic, entropy_coeff=0.0, critic_coeff=0.5, normalize_advantage=True)
optimiser = torch.optim.Adam(loss_of.parameters(), lr=3e-3)

num_steps = arguments.num_steps
total = num_steps * arguments.num_iterations
collector = Collector(env, actor, frames_per_batch=num_steps, total_frames=total, auto_register_policy_transforms=False)
for iteration, batch in enumerate(collector, start=1):
    for _ in range(8):
        advantage(batch)
        losses = loss_of(batch)
        optimiser.zero_grad()
        (losses["loss_objective"] + losses["loss_critic"]).backward()
        nn.utils.clip_grad_norm_(loss_of.parameters(), 0.5)
        optimiser.step()
    ended = batch["next", "episode_reward"][batch["next", "done"]]
    print(f"iteration {iteration}, step {iteration * num_steps}: return {ended.mean():.2f}")
collector.shutdown(close_env=False)


def test_score(seed: int) -> float:
    """Run one episode and return the test score."""
    observation, _ = world.reset(seed=seed)
    is_over = False
    while not is_over:
        with torch.no_grad():
            means, _ = scores.module(torch.from_numpy(observation))
        observation, _, is_over, _, info = world.step(means.numpy())
    return info["test_score"]


results = {
    "random": [run_episode(world.unwrapped, RandomAgent(), seed=seed, name="random").test_score for seed in (1, 2, 3)],
    "PPO": [test_score(seed) for seed in (1, 2, 3)],
}
for name, values in results.items():
    print(f"test score with {name}: {np.mean(values):.2f} ({', '.join(f'{value:.2f}' for value in values)})")
