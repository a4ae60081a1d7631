"""A selection method of one's own in thirty lines: a response is believed where similar questions have similar ones.

`PoolScoreAgent` has what all methods share that score the pool before training: the best rows on offer are taken, those
that were taken before come last. What is left to write is the score. Any other class with `predict` is a method as
well. From this folder, `raise-env train --out run --agent plug_in_method:Agreement` compares it by the command line.

What one sees: the test score of fine-tuning runs that the method chose for, beside those of random choice with the same
candidates. The score is minus the loss in nats per response token: higher is better. `--fast` only shows that
everything works.
"""

import sys

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors

from raise_env import RaiseSelectEnv
from raise_env.agents import RandomAgent, run_episode
from raise_env.agents.baselines import PoolScoreAgent


class Agreement(PoolScoreAgent):
    """Scores a row by how like its response is to those of the five rows that ask for the most similar things."""

    def score_pool(self, world: RaiseSelectEnv, seed: int) -> np.ndarray:
        """Return the mean cosine with the neighbours' responses, shape (pool,)."""
        del seed  # nothing is drawn
        pool = world.assets.pool
        prompts = self.vectors([row.prompt for row in pool])
        responses = self.vectors([row.response for row in pool])
        neighbours = NearestNeighbors(n_neighbors=5, metric="cosine").fit(prompts).kneighbors(return_distance=False)
        cosines = [responses.multiply(responses[column]).sum(axis=1) for column in neighbours.T]
        return np.asarray(np.mean(cosines, axis=0)).ravel()

    def vectors(self, texts: list[str]):
        """Return TF-IDF vectors of short pieces of words, of length 1, shape (texts, pieces), sparse."""
        return TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4)).fit_transform(texts)


if __name__ == "__main__":
    settings = {}
    if "--fast" in sys.argv:
        settings = {"horizon": 3, "num_dev": 8, "num_test": 8, "pool_size": 100, "auxiliary_updates": 2}
    env = RaiseSelectEnv(**settings)
    for name, agent in {"random": RandomAgent(), "the method": Agreement()}.items():
        scores = [run_episode(env, agent, seed=seed, name=name).test_score for seed in (1, 2, 3)]
        print(f"test score with {name}: {np.mean(scores):.2f} ({', '.join(f'{score:.2f}' for score in scores)})")
