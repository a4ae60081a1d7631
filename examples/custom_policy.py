"""A policy of one's own, without any library for reinforcement learning: a linear score, fitted to what forks show.

At every step some batches are tried on copies of the model as it is (`probe`), so that nothing but the batch makes
the difference between them. Least squares then finds the weights with which the sums of a batch's features explain
what it gained, and the rows with the highest score are chosen.

What one sees: the weights that matter most after each episode, and at last the test score of runs that the learned
score chose for, beside those of random choice. The score is minus the loss in nats per response token: higher is
better. `--fast` only shows that everything works.
"""

import sys

import gymnasium as gym
import numpy as np

import raise_env

gym.register_envs(raise_env)  # done by the import; this says so

BATCH_SIZE, NUM_FORKS, NUM_EPISODES = 8, 8, 2
COLUMNS = slice(2, 38)  # what differs between rows and never changes: difficulty and meaning

settings = {"horizon": 20, "num_dev": 32, "pool_size": 1000}
if "--fast" in sys.argv:
    settings = {"horizon": 3, "num_dev": 8, "num_test": 8, "pool_size": 100, "auxiliary_updates": 2}
    NUM_EPISODES = 1
env = gym.make("RaiseSelect-v0", **settings)
world = env.unwrapped  # probe() is beyond Gymnasium's interface
rng = np.random.default_rng(0)


class LinearPolicy:
    """Takes the rows with the highest weighted sum of features; rows that were taken before come last."""

    def __init__(self, weights: np.ndarray) -> None:
        self.weights = weights

    def predict(self, observation, state=None, deterministic=True, **_):
        """Choose, in the form of Stable-Baselines3: `raise_env.agents.run_episode` takes such a policy too."""
        scores = observation[:, COLUMNS] @ self.weights - 1e6 * observation[:, -1]
        if not deterministic:
            scores = scores + scores.std() * rng.gumbel(size=len(scores))
        scores[~observation.any(axis=1)] = -np.inf  # rows of zeros are padding
        action = np.zeros(len(scores), dtype=np.int8)
        action[np.argsort(-scores)[:BATCH_SIZE]] = 1
        return action, state


def random_batches(num_rows: int) -> np.ndarray:
    """Return 0/1 actions, shape (forks, rows), that share no row."""
    actions = np.zeros((NUM_FORKS, num_rows), dtype=np.int8)
    for action, rows in zip(actions, rng.permutation(num_rows).reshape(NUM_FORKS, BATCH_SIZE), strict=True):
        action[rows] = 1
    return actions


def run(choose, seed: int) -> float:
    """Run one episode and return the test score."""
    observation, info = env.reset(seed=seed)
    is_over = False
    while not is_over:
        observation, _, is_over, _, info = env.step(choose(observation))
    return info["test_score"]


sums, gains = [], []
for episode in range(NUM_EPISODES):
    observation, info = env.reset(seed=100 + episode)
    is_over = False
    while not is_over:
        actions = random_batches(len(observation))
        scores = world.probe(actions)
        batch_sums = actions @ observation[:, COLUMNS]  # (forks, 36)
        sums.append(batch_sums - batch_sums.mean(axis=0))
        gains.append((scores - scores.mean()) / (scores.std() + 1e-9))
        observation, _, is_over, _, info = env.step(actions[0])
    X, y = np.concatenate(sums), np.concatenate(gains)
    weights = np.linalg.solve(X.T @ X + 0.1 * len(y) * np.eye(X.shape[1]), X.T @ y)  # ridge regression
    strongest = np.argsort(-np.abs(weights))[:4]
    names = [f"{world.feature_names[COLUMNS][place]} {weights[place]:+.3f}" for place in strongest]
    print(f"episode {episode + 1}, {len(y)} batches tried: {', '.join(names)}")

policy = LinearPolicy(weights)
choices = {"random rows": lambda rows: random_batches(len(rows))[0], "the policy": lambda rows: policy.predict(rows)[0]}
for name, choose in choices.items():
    test_scores = [run(choose, seed) for seed in (1, 2, 3)]
    print(f"test score with {name}: {np.mean(test_scores):.2f} ({', '.join(f'{score:.2f}' for score in test_scores)})")
