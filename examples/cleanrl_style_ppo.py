"""PPO in one file, to be read from top to bottom and changed: torch and Gymnasium, and no library for learning.

The policy is a small network that scores each candidate by itself, and the law of drawing eight of them with these
scores as log weights (`SubsetLaw`, which knows the exact log-probability of a batch). The rest is PPO as everybody
knows it.

What one sees: a line for each iteration, and at last the test score of fine-tuning runs that the policy chose for,
beside those of random choice with the same candidates. The score is minus the loss in nats per response token: higher
is better. `--fast` only shows that everything works. The columns of a line:

- return: mean over the episodes that ended in this iteration, the gain on the dev set in nats per token;
- entropy: of the policy, in nats; it begins near log(64 choose 8) = 22.2, where every batch is as likely;
- kl: how far the iteration moved the policy, as mean log ratio of old and new probability of what was drawn;
- clipped: share of the steps whose ratio lies outside of 1 +- clip after the last epoch;
- explained: share of the variance of the returns that the critic had foreseen; below 0 it was worse than their mean.
"""

import argparse

import gymnasium as gym
import numpy as np
import torch
from torch import nn

import raise_env
from raise_env.agents import SubsetLaw

gym.register_envs(raise_env)  # done by the import; this says so

BATCH_SIZE = 8

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--num-iterations", type=int, default=8)
parser.add_argument("--num-steps", type=int, default=40, help="steps of an iteration")
parser.add_argument("--num-epochs", type=int, default=8, help="gradient steps of an iteration, each on all its steps")
# An action shows in its very own reward: what its batch gained on the dev set. The rewards after it depend far more on
# which candidates come up and on how far the run is, and with a larger gamma PPO has to learn through that noise.
parser.add_argument("--gamma", type=float, default=0.0)
parser.add_argument("--gae-lambda", type=float, default=0.95, help="without effect while gamma is 0")
parser.add_argument("--clip", type=float, default=0.2)
parser.add_argument("--learning-rate", type=float, default=3e-3)
parser.add_argument("--value-weight", type=float, default=0.5)
parser.add_argument("--entropy-weight", type=float, default=0.0)
parser.add_argument("--max-grad-norm", type=float, default=0.5)
parser.add_argument("--fast", action="store_true", help="learn for two short episodes on a small pool")
args = parser.parse_args()

settings = {"horizon": 20, "num_dev": 32, "pool_size": 1000}
if args.fast:
    settings = {"horizon": 4, "num_dev": 8, "num_test": 8, "pool_size": 100, "auxiliary_updates": 2}
    args.num_iterations, args.num_steps = 2, 4
torch.manual_seed(args.seed)
env = gym.make("RaiseSelect-v0", batch_size=BATCH_SIZE, **settings)
num_rows, num_features = env.observation_space.shape


def linear(num_inputs, num_outputs, gain):
    """Return a layer with orthogonal weights and no bias at first."""
    layer = nn.Linear(num_inputs, num_outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def rows_network():
    """Return what turns each row into 64 numbers, by itself, so that neither order nor number of rows matter."""
    gain = 2**0.5
    return nn.Sequential(linear(num_features, 64, gain), nn.Tanh(), linear(64, 64, gain), nn.Tanh())


class ActorCritic(nn.Module):
    """The actor scores rows; the critic reads the mean of the rows off."""

    def __init__(self):
        super().__init__()
        self.actor = nn.Sequential(rows_network(), linear(64, 1, 0.01))  # scores near 0: almost uniform at first
        self.critic_rows = rows_network()
        self.critic_head = linear(64, 1, 1.0)

    def law(self, observations):
        """Return the law of drawing a batch; rows of zeros are padding and never drawn."""
        return SubsetLaw(self.actor(observations).squeeze(-1), BATCH_SIZE, mask=observations.any(-1))

    def value(self, observations):
        """Return what return to expect, shape (...,)."""
        is_real = observations.any(-1, keepdim=True)
        mean = (self.critic_rows(observations) * is_real).sum(-2) / is_real.sum(-2)
        return self.critic_head(mean).squeeze(-1)


agent = ActorCritic()
optimiser = torch.optim.Adam(agent.parameters(), lr=args.learning_rate)

observations = torch.zeros(args.num_steps, num_rows, num_features)
actions = torch.zeros(args.num_steps, num_rows)
log_probs, rewards, values, overs = torch.zeros(4, args.num_steps)

next_observation, _ = env.reset(seed=args.seed)
episode_return = 0.0
for iteration in range(1, args.num_iterations + 1):
    # Collect steps.
    returns_of_episodes = []
    for step in range(args.num_steps):
        observations[step] = torch.from_numpy(next_observation)
        with torch.no_grad():
            law = agent.law(observations[step])
            actions[step] = law.sample()
            log_probs[step] = law.log_prob(actions[step])
            values[step] = agent.value(observations[step])
        next_observation, reward, is_over, _, _ = env.step(actions[step].numpy().astype(np.int8))
        rewards[step], overs[step] = reward, is_over
        episode_return += reward
        if is_over:
            returns_of_episodes.append(episode_return)
            next_observation, _ = env.reset()
            episode_return = 0.0

    # Generalised advantage estimation; nothing follows the last step of an episode.
    with torch.no_grad():
        next_value = agent.value(torch.from_numpy(next_observation))
    advantages = torch.zeros(args.num_steps)
    following = 0.0
    for step in reversed(range(args.num_steps)):
        goes_on = 1.0 - overs[step]
        error = rewards[step] + args.gamma * goes_on * next_value - values[step]
        following = error + args.gamma * args.gae_lambda * goes_on * following
        advantages[step] = following
        next_value = values[step]
    returns = advantages + values
    standardised = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

    # Move policy and critic.
    for _ in range(args.num_epochs):
        law = agent.law(observations)
        log_ratio = law.log_prob(actions) - log_probs
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
        policy_loss = -torch.minimum(ratio * standardised, clipped * standardised).mean()
        value_loss = 0.5 * (agent.value(observations) - returns).square().mean()
        entropy = law.entropy().mean()
        loss = policy_loss + args.value_weight * value_loss - args.entropy_weight * entropy
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
        optimiser.step()

    print(
        f"iteration {iteration}, step {iteration * args.num_steps}: return {np.mean(returns_of_episodes):.2f}, "
        f"entropy {entropy.item():.1f}, kl {-log_ratio.mean().item():.2f}, "
        f"clipped {(ratio != clipped).float().mean().item():.0%}, "
        f"explained {1 - ((returns - values).var() / returns.var()).item():.2f}"
    )


def test_score(choose, seed):
    """Run one episode and return the test score."""
    observation, _ = env.reset(seed=seed)
    is_over = False
    while not is_over:
        observation, _, is_over, _, info = env.step(choose(torch.from_numpy(observation)).numpy().astype(np.int8))
    return info["test_score"]


# The most probable batch, and any batch: scores that are all the same.
choices = {
    "random rows": lambda rows: SubsetLaw(torch.zeros(len(rows)), BATCH_SIZE, mask=rows.any(-1)).sample(),
    "PPO": lambda rows: agent.law(rows).mode(),
}
for name, choose in choices.items():
    scores = [test_score(choose, seed) for seed in (1, 2, 3)]
    print(f"test score with {name}: {np.mean(scores):.2f} ({', '.join(f'{score:.2f}' for score in scores)})")
