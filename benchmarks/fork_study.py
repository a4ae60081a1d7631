"""How raise_fork came to its defaults: variants of how it learns, on the embedded task, over seeds.

    python benchmarks/fork_study.py --out runs/fork_study --seeds 2 --workers 2

Each variant learns and makes one final run a seed, as in `raise-env bench`; the folder is a benchmark's, and can be
gone on with by --resume. docs/results/raise_fork.md tells what came out. What the package has no setting for, because
it did not help, is written out here: learning by policy gradient, states of random runs alone, the best fork going on,
and a column with the live loss.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from raise_env import RaiseSelectEnv
from raise_env.agents.base import BatchAgent, Progress, world_of
from raise_env.agents.benchmark import BenchPlan, bench
from raise_env.agents.credit import Group, batch_group, row_group
from raise_env.agents.job import Entry
from raise_env.agents.networks import AcquisitionFunction
from raise_env.agents.raise_fork import RaiseFork, ensemble_scores
from raise_env.agents.subset import SubsetLaw
from raise_env.features import CLIP, NUM_FEATURES

#: Forks of batches, with the fit that was best for them; so many values of a group want smaller networks.
BATCHES = {"credit": "batches", "num_states": 16, "hidden_dims": [64, 64], "weight_decay": 0.1}


class PolicyGradient(BatchAgent):
    """Forks of batches as one group of a policy gradient: no value of rows is fitted, their probability is moved.

    Args:
        law: "exact", the probability of the set; or "plackett_luce", that of the order in which noise drew it.
    """

    def __init__(self, law: str = "exact", learning_rate: float = 3e-3, entropy: float = 0.0, num_epochs: int = 4):
        super().__init__()
        self.law, self.entropy, self.num_epochs = law, entropy, num_epochs
        self.network = AcquisitionFunction(NUM_FEATURES, generator=torch.Generator().manual_seed(0))
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=learning_rate)

    def learn(self, env: gym.Env[Any, Any], episodes: int, seed: int = 0, progress: Progress | None = None) -> Any:
        """Learn from as many forks as raise_fork with batches."""
        del progress
        world = world_of(env).fork(1)[0]
        rng = np.random.default_rng(seed)
        for _ in range(episodes):
            observation, _ = world.reset(seed=int(rng.integers(2**31)))
            groups = []
            for _ in range(BATCHES["num_states"]):
                orders = self._draw(observation, world.config.batch_size, rng)
                actions = np.zeros((len(orders), len(observation)), dtype=np.int8)
                np.put_along_axis(actions, orders, 1, axis=1)
                scores = world.probe(actions, 32)
                if np.isfinite(scores).all() and scores.std() > 1e-9:
                    groups.append((observation, orders, (scores - scores.mean()) / scores.std()))
                observation, *_ = world.step(actions[rng.integers(len(actions))])
            self._improve(groups)
        return self

    def scores(self, observation: np.ndarray) -> np.ndarray:
        """Return F, rows taken before last."""
        with torch.no_grad():
            scores = self.network(torch.from_numpy(observation)).double().numpy()
        return np.asarray(scores - 1e3 * np.expm1(observation[:, -1]))

    def _draw(self, observation: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        with torch.no_grad():
            logits = self.network(torch.from_numpy(observation)).numpy()
        return np.argsort(-(logits + rng.gumbel(size=(8, len(logits)))), axis=1)[:, :size]

    def _improve(self, groups: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
        old = [self._log_probs(*group[:2])[0].detach() for group in groups]
        for _ in range(self.num_epochs):
            for (observation, orders, gains), before in zip(groups, old, strict=True):
                log_probs, entropy = self._log_probs(observation, orders)
                ratio = (log_probs - before).exp()
                advantage = torch.from_numpy(gains).float()
                clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                loss = -clipped.mean() - self.entropy * entropy
                self.optimiser.zero_grad()
                loss.backward()
                self.optimiser.step()

    def _log_probs(self, observation: np.ndarray, orders: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.network(torch.from_numpy(observation))
        if self.law == "exact":
            law = SubsetLaw(logits, orders.shape[1])
            actions = torch.zeros(len(orders), len(logits)).scatter(1, torch.from_numpy(orders), 1.0)
            return SubsetLaw(logits.expand(len(orders), -1), orders.shape[1]).log_prob(actions), law.entropy()
        chosen = logits[torch.from_numpy(orders)]  # (forks, size), in the order drawn
        taken = torch.cat([torch.zeros(len(orders), 1), chosen.exp().cumsum(1)[:, :-1]], dim=1)
        log_probs = (chosen - (logits.exp().sum() - taken).clamp(min=1e-6).log()).sum(1)
        return log_probs, -(logits.softmax(0) * logits.log_softmax(0)).sum()


class RandomStates(RaiseFork):
    """Rows are valued at the states of random runs in every episode, not in the first one alone."""

    def _look(
        self, world: RaiseSelectEnv, observation: np.ndarray, rng: np.random.Generator, *, is_due: bool
    ) -> tuple[np.ndarray, Group | None]:
        del observation
        action = self._actions(np.zeros(0), world.action_masks(), world.config.batch_size, 1, rng)[0]
        settings = self.settings
        return action, row_group(world, settings.num_lookahead, settings.lookahead_size) if is_due else None


class BestFork(RaiseFork):
    """Forks of batches, of which the best goes on instead of a random one."""

    def _look(
        self, world: RaiseSelectEnv, observation: np.ndarray, rng: np.random.Generator, *, is_due: bool
    ) -> tuple[np.ndarray, Group | None]:
        scores = ensemble_scores(self.networks, observation) if self.networks else np.zeros(0)
        settings = self.settings
        actions = self._actions(scores, world.action_masks(), world.config.batch_size, settings.num_forks, rng)
        group = batch_group(world, actions, settings.num_dev) if is_due else None
        return actions[0 if group is None else int(group.gains.argmax())], group


class LiveLoss(RaiseFork):
    """A column beside the 39: the live loss of each candidate, in the auxiliary model's units.

    The network takes it in place of the second column of the stage, so that it keeps its width; the first one stays.
    """

    def scores(self, observation: np.ndarray) -> np.ndarray:
        """Return F of the rows with their live loss."""
        world = self._require_begun()
        return super().scores(_with_loss(world, observation))

    def _look(
        self, world: RaiseSelectEnv, observation: np.ndarray, rng: np.random.Generator, *, is_due: bool
    ) -> tuple[np.ndarray, Group | None]:
        action, group = super()._look(world, observation, rng, is_due=is_due)
        if group is not None:
            places = np.flatnonzero(world.action_masks())
            group = Group(_with_loss(world, observation)[places][:, None], group.gains)
        return action, group


def _with_loss(world: RaiseSelectEnv, observation: np.ndarray) -> np.ndarray:
    static = world.assets.features
    rows = observation.copy()
    real = world.candidates >= 0
    losses = world.row_losses(world.candidates[real])
    rows[real, 1] = ((losses + static.mean[2]) / static.std[2]).clip(-CLIP, CLIP)
    return rows


def entries() -> dict[str, Entry]:
    """Return the variants by name."""
    here = f"{Path(__file__).stem}:"

    def fork(episodes: int = 3, agent: str = "raise_fork", env: dict[str, Any] | None = None, **settings: Any) -> Entry:
        return Entry(agent, settings, episodes, env or {})

    return {
        # The ways to give credit, batches first.
        "batches, policy gradient": fork(6, f"{here}PolicyGradient"),
        "batches, policy gradient, Plackett-Luce": fork(6, f"{here}PolicyGradient", law="plackett_luce"),
        "batches, policy gradient, entropy 0.01": fork(6, f"{here}PolicyGradient", entropy=0.01),
        "batches": fork(6, **BATCHES),
        "batches, large networks": fork(6, credit="batches", num_states=16),
        "batches, the best goes on": fork(6, f"{here}BestFork", **BATCHES),
        "batches, 4 forks": fork(12, **BATCHES, num_forks=4),
        "batches, 16 forks": fork(3, **BATCHES, num_forks=16),
        "batches, 8 dev rows": fork(6, **BATCHES, num_dev=8),
        "batches, single rows": fork(6, **BATCHES, num_forks=8, env={"batch_size": 1, "budget": 320}),
        "rows, dev gradient of 64": fork(num_lookahead=0, lookahead_size=64),
        "rows, 4 updates ahead": fork(num_lookahead=4),
        "rows, 16 updates ahead": fork(),
        "rows, 16 updates of 8 ahead": fork(lookahead_size=8),
        "rows, 32 updates ahead": fork(num_lookahead=32),
        # How much of it.
        "1 episode": fork(1),
        "6 episodes": fork(6),
        "64 rows at 4 times the states": fork(num_rows=64, num_states=32),
        "rows of the first states only": fork(12, num_states=2),
        # What it sees.
        "bare auxiliary model": fork(env={"auxiliary_updates": 0}),
        "auxiliary model after 150 updates": fork(env={"auxiliary_updates": 150}),
        "live loss column": fork(agent=f"{here}LiveLoss"),
        "states of random runs": fork(agent=f"{here}RandomStates"),
        "one network": fork(num_networks=1),
        "small networks": fork(hidden_dims=[64, 64], weight_decay=0.1),
        # The scale.
        "random": Entry("random"),
        "oracle": Entry("oracle"),
    }


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    from raise_env.agents.cli import TerminalReporter
    from raise_env.agents.summary import markdown_tables

    plan = BenchPlan({}, entries(), num_seeds=arguments.seeds)
    options = {"resume": arguments.resume, "workers": arguments.workers}
    summary = bench(arguments.out, plan, command="fork_study", reporter=TerminalReporter(), **options)
    sys.stdout.write(markdown_tables(summary))


if __name__ == "__main__":
    main()
