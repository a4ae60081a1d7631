"""One fine-tuning run in which random instructions are chosen: the environment's whole interface in ten lines.

What one sees: the model's score on the dev set before and after, and on the test set, which no step has looked at.
The score is minus the loss in nats per response token, so higher is better. The first run takes some seconds longer,
for the features of the pool are computed; they are kept for the next one.
"""

import gymnasium as gym

import raise_env  # the import registers RaiseSelect-v0

env = raise_env.TopKScores(gym.make("RaiseSelect-v0"))  # an action is a score for each candidate; the best are taken
env.action_space.seed(0)
observation, info = env.reset(seed=0)
first_score, is_over = info["dev_score"], False
while not is_over:
    observation, reward, is_over, _, info = env.step(env.action_space.sample())
print(f"dev score {first_score:.2f} before, {info['dev_score']:.2f} after {env.unwrapped.num_steps} updates")
print(f"test score {info['test_score']:.2f}")
