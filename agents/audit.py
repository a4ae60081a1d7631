"""What `audit` does: how far results and rewards can be trusted, from runs that differ in one thing at a time.

Three kinds of runs, all resumable: a benchmark of the audited agents, for other numbers of learning episodes, and of
their placebos; runs of which only the first adapter, the order of rows fixed before, the rows or the offers differ; and
steps of recorded runs made again in the training states of other runs. `findings.py` makes numbers and tables of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from raise_env import EnvConfig, RaiseSelectEnv
from raise_env.errors import SettingError
from raise_env.files import append_line, held, write_json, write_text
from raise_env.record import EpisodeRecord
from raise_env.rewards import Evaluation
from raise_env.side_by_side import one_thread

from .base import world_of
from .benchmark import BenchPlan, carry_out, ready, selector_folder
from .catalogue import make_agent
from .findings import ADAPTER, ORDER, ROWS, draws_of, findings_of, length_of, placebo_of, shares_adapter
from .job import Entry, Job
from .run_folder import RunFolder, whole_lines, whole_records
from .runs import FINAL_SEED, Reporter, Silent
from .statistics import correlation
from .summary import RANDOM

__all__ = ["AuditPlan", "FixedRows", "NoisePlan", "audit", "probe_rewards"]

#: Runs of each source of noise: the spread of ten is known within a factor of 0.7 to 1.8.
NUM_NOISE = 10

#: Training states of a run in which recorded steps are made again, spread over the horizon.
NUM_STATES = 8

#: Recorded batches of each agent that are tried in each of them.
NUM_BATCHES = 12

#: Ways to cut the dev set in halves.
NUM_SPLITS = 20

#: What the folder of an audit holds: two benchmarks, and the lines of what was tried again.
RUNS = "runs"
NOISE = "noise"
REWARDS = "rewards.jsonl"


class FixedRows:
    """Trains on rows that were drawn before the run, whatever they are.

    Args:
        rows_seed: What the rows are drawn from; None: the run's own seed.
        is_shuffled: Whether the run's own seed decides on the order of the batches.
    """

    uses_features = False

    def __init__(self, rows_seed: int | None = 0, is_shuffled: bool = False) -> None:
        self.rows_seed = rows_seed
        self.is_shuffled = is_shuffled
        self._world: RaiseSelectEnv | None = None
        self._batches: list[np.ndarray] = []

    def begin(self, env: gym.Env[Any, Any], seed: int) -> None:
        """Draw the rows of the whole run, each once as long as there are others, and in no batch twice."""
        self._world = world_of(env)
        config = self._world.config
        offered = self._world.candidates[self._world.action_masks()]
        batch_size = min(config.batch_size, len(offered))
        size = min(config.total_budget, config.horizon * batch_size)
        rng = np.random.default_rng(seed if self.rows_seed is None else self.rows_seed)
        rows = rng.permutation(offered)[:size]
        while len(rows) < size:
            begun = rows[len(rows) - len(rows) % batch_size :]  # of the batch that the next rows fill
            again = rng.permutation(offered)
            rows = np.concatenate([rows, again[~np.isin(again, begun)], begun])[:size]
        self._batches = [rows[start : start + batch_size] for start in range(0, size, batch_size)]
        if self.is_shuffled:
            order = np.random.default_rng([seed, 1]).permutation(len(self._batches))
            self._batches = [self._batches[place] for place in order]

    def predict(
        self,
        observation: np.ndarray,  # noqa: ARG002 (Stable-Baselines3's signature)
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,  # noqa: ARG002
        deterministic: bool = True,  # noqa: ARG002
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return the choice of this step's rows, which have to be on offer.

        Raises:
            RuntimeError: `begin` was not called.
        """
        if self._world is None:
            raise RuntimeError("FixedRows reads the pool: call begin(env, seed) before predict.")
        return _choice(self._world, self._batches[self._world.num_steps]), state


@dataclass(frozen=True, slots=True)
class AuditPlan:
    """What an audit shall do.

    Attributes:
        settings: The environment's keywords, for all.
        agents: Who is audited, by name; random rows are added where they are missing.
        lengths: Further numbers of episodes that agents learn for; None: twice each agent's own.
        tasks: Embedded tasks; only `benchmark.OWN_TASK` where the settings name a pool.
        num_seeds: Runs of each agent, its other lengths and its placebo, and states that steps are made again in.
        num_noise: Runs of each source of noise.
    """

    settings: dict[str, Any]
    agents: dict[str, Entry] = field(default_factory=dict)
    lengths: tuple[int, ...] | None = None
    tasks: tuple[str, ...] = ("default",)
    num_seeds: int = 5
    num_noise: int = NUM_NOISE

    @property
    def audited(self) -> dict[str, Entry]:
        """The agents, random rows first."""
        return {RANDOM: Entry(RANDOM), **self.agents}

    @property
    def learners(self) -> dict[str, dict[str, int]]:
        """For each agent that learns, the rows of the benchmark that are its own, with their numbers of episodes."""
        return {
            name: {name: entry.episodes, **{length_of(name, n): n for n in self._other_lengths(entry)}}
            for name, entry in self.agents.items()
            if entry.episodes
        }

    def runs(self) -> BenchPlan:
        """Return the benchmark of the agents, other lengths and placebos."""
        entries = dict(self.audited)
        for name, lengths in self.learners.items():
            entries[placebo_of(name)] = replace(entries[name], agent=f"placebo:{entries[name].agent}")
            entries |= {label: replace(entries[name], episodes=episodes) for label, episodes in lengths.items()}
        return BenchPlan(self.settings, entries, self.tasks, self.num_seeds)

    def noise(self) -> NoisePlan:
        """Return the benchmark of runs that differ in one thing."""
        here, config = f"{__name__}:{FixedRows.__name__}", EnvConfig.from_kwargs(self.settings)
        own = {"num_candidates": "all", "score_every": config.horizon}
        entries = {
            ADAPTER: Entry(here, {}, settings=own),
            ORDER: Entry(here, {"is_shuffled": True}, settings=own),
            ROWS: Entry(here, {"rows_seed": None}, settings=own),
        }
        entries |= {draws_of(name): replace(entry, episodes=0) for name, entry in self.audited.items()}
        return NoisePlan(self.settings, entries, self.tasks, self.num_noise, learners=tuple(self.learners))

    def check(self) -> None:
        """Find what cannot be done before anything is begun.

        Raises:
            SettingError: Agents learn that cannot save what they learned; or as for `BenchPlan.check`.
            RaiseEnvError: A model or data file cannot be used.
        """
        self.runs().check()
        self.noise().check()
        made = {name: make_agent(self.agents[name].agent, self.agents[name].arguments) for name in self.learners}
        unable = [name for name, agent in made.items() if not hasattr(agent, "save")]
        if unable:
            raise SettingError(
                f"an audit lets agents act again with what they learned, which {', '.join(unable)} has no save(folder) "
                "to write: add one whose folder selector:DIR reads, such as that of RaiseFork, or leave the agent out."
            )

    def to_json(self) -> dict[str, Any]:
        """Return the plan as run.json keeps it; the benchmarks within tell of agents' own code, and hold it."""
        agents = {name: entry.to_json() for name, entry in self.agents.items()}
        for plain in agents.values():
            plain.pop("source", None)
        return dict(json.loads(json.dumps({**asdict(self), "agents": agents})))

    def with_additions(self, before: dict[str, Any]) -> dict[str, Any]:
        """Return an earlier plan, as `to_json` gave it, with what this one has beyond it.

        Raises:
            SettingError: That one had numbers of episodes that this one has not.
        """
        now = self.to_json()
        self._check_lengths(before)
        grown = {name: max(now[name], before.get(name, 0)) for name in ("num_seeds", "num_noise")}
        return {**before, **grown, "agents": {**now["agents"], **before.get("agents", {})}, "lengths": now["lengths"]}

    def _check_lengths(self, before: Mapping[str, Any]) -> None:
        lengths = before.get("lengths")
        earlier = replace(self, lengths=tuple(lengths) if isinstance(lengths, list) else None)
        had, have = (
            dict.fromkeys(
                episodes
                for name, entry in self.agents.items()
                if entry.episodes and name in before.get("agents", {})
                for episodes in plan._other_lengths(entry)
            )
            for plan in (earlier, self)
        )
        if had.keys() - have.keys():
            wanted = ",".join(map(str, {**had, **have}))
            raise SettingError(
                f"the audit was begun with further numbers of episodes, {', '.join(map(str, had))}, and what is there "
                f"is kept: name them too, --episodes {wanted}."
            )

    def _other_lengths(self, entry: Entry) -> list[int]:
        lengths = (2 * entry.episodes,) if self.lengths is None else self.lengths
        return [episodes for episodes in dict.fromkeys(lengths) if episodes != entry.episodes]


@dataclass(frozen=True, slots=True)
class NoisePlan(BenchPlan):
    """A benchmark whose runs differ in one thing: all but those of the adapter begin from the adapter of seed 0.

    Attributes:
        learners: Agents that act with what they learned with seed 0 in the benchmark of agents beside it.
    """

    learners: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the plan as run.json keeps it; who learns is said in that of the audit."""
        return {name: value for name, value in BenchPlan.to_json(self).items() if name != "learners"}

    def _check_entry(self, task: str, label: str, entry: Entry) -> None:
        if label not in map(draws_of, self.learners):  # those act with what others learn, who are asked elsewhere
            BenchPlan._check_entry(self, task, label, entry)

    def jobs(self, folder: Path) -> list[Job]:
        """Return all runs; only their candidates, rows or order differ, or only their adapter."""
        named = {name: self.entries[draws_of(name)] for name in self.learners}
        learned = {
            (job.task, draws_of(job.label)): selector_folder(folder.parent / RUNS, job)
            for job in BenchPlan(self.settings, named, self.tasks, 1).jobs(folder)
        }
        return [_from_one_adapter(job, learned.get((job.task, job.label))) for job in BenchPlan.jobs(self, folder)]


def _from_one_adapter(job: Job, selector: Path | None) -> Job:
    if not shares_adapter(job.label):
        return job
    entry = job.entry
    if selector is not None:  # where it is missing, as learning failed, this run fails too
        entry = replace(entry, agent=f"selector:{selector}", arguments={})
    return replace(job, entry=entry, settings={**job.settings, "seed_model": 0})


def audit(
    out: str | Path,
    plan: AuditPlan,
    *,
    resume: bool = False,
    workers: int | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Make every run of the audit, as far as it is not on disk yet, and write the folder.

    Args:
        out: The folder; docs/files.md says what is in it.
        plan: What to do.
        resume: Go on with a folder that was begun with the same plan, or with fewer seeds, agents or lengths.
        workers: Processes that make runs side by side; their number changes no result.
        reporter: Where progress is shown.

    Returns:
        What audit.json holds.

    Raises:
        RaiseEnvError: The plan cannot be carried out, or the folder cannot be written.
    """
    folder, reporter = Path(out), reporter or Silent()
    plan.check()
    with held(folder), ExitStack() as stack:
        run = RunFolder.open(folder, "audit", plan.to_json(), resume, grown=plan.with_additions)
        # The folder above says whether they may be gone on with, each of them with what; nothing is written before.
        parts = [
            stack.enter_context(ready(folder / part, its_plan, "audit", True, workers, None, reporter))
            for part, its_plan in ((RUNS, plan.runs()), (NOISE, plan.noise()))
        ]
        with run:
            for part in parts:
                carry_out(part, workers, None, reporter)
            runs, noise = _results(folder / RUNS), _results(folder / NOISE)
            probes = _probe_all(folder, plan, runs, reporter)
            found = findings_of(runs, noise, probes, plan.tasks, list(plan.audited), plan.learners, plan.num_seeds)
            write_json(folder / "audit.json", found)
    return found


def _results(folder: Path) -> list[tuple[dict[str, Any], EpisodeRecord | None]]:
    """Return the lines of a benchmark, each with the record of its final run, None where it failed."""
    lines = whole_lines(folder / "results.jsonl")
    records = iter(whole_records(folder / "episodes.jsonl"))
    return [(line, next(records) if line["error"] is None else None) for line in lines]


def _probe_all(
    folder: Path, plan: AuditPlan, runs: Sequence[tuple[dict[str, Any], EpisodeRecord | None]], reporter: Reporter
) -> list[dict[str, Any]]:
    """Return what steps gave that were made again, a line for each task and seed; those on disk are not repeated."""
    path = folder / REWARDS
    records = {task: _records_of(task, plan, runs) for task in plan.tasks}
    tried = {task: _digest(own) for task, own in records.items()}
    # Without what a crash has torn, and what was tried of fewer runs than there are by now.
    done = [line for line in whole_lines(path) if line.get("tried") == tried.get(line["task"])]
    write_text(path, "".join(json.dumps(line) + "\n" for line in done))
    found = {(line["task"], line["seed"]): line for line in done}
    wanted = [(task, seed) for task in plan.tasks for seed in range(plan.num_seeds)]
    with reporter.task(f"recorded steps made again in {len(wanted)} other runs", len(wanted)) as show:
        for number, (task, seed) in enumerate(wanted, start=1):
            course = [record for record in records[task][RANDOM] if record.seed == FINAL_SEED + seed]
            if (task, seed) not in found and course:  # a random run that failed is named among the missing
                settings = {**plan.runs().task_settings(task), "seed_model": seed, "num_candidates": "all"}
                with one_thread():
                    probed = probe_rewards(RaiseSelectEnv(**settings), course[0], records[task])
                line = {"task": task, "seed": seed, "tried": tried[task], **probed}
                append_line(path, json.dumps(line))
                found[task, seed] = line
            show(number)
    return [found[key] for key in wanted if key in found]


def _records_of(
    task: str, plan: AuditPlan, runs: Sequence[tuple[dict[str, Any], EpisodeRecord | None]]
) -> dict[str, list[EpisodeRecord]]:
    """Return the records of a task's runs by agent, in the order of their seeds, whenever they were made."""
    own = sorted((run for run in runs if run[0]["task"] == task), key=lambda run: run[0]["seed"])
    return {name: [r for line, r in own if r is not None and line["agent"] == name] for name in plan.audited}


def _digest(records: Mapping[str, Sequence[EpisodeRecord]]) -> str:
    """Return what tells the steps of some runs from those of others."""
    actions = {name: [record.actions for record in own] for name, own in records.items()}
    return hashlib.sha256(json.dumps(actions).encode()).hexdigest()[:16]


def probe_rewards(
    env: RaiseSelectEnv, course: EpisodeRecord, records: Mapping[str, Sequence[EpisodeRecord]]
) -> dict[str, Any]:
    """Make steps of recorded runs again, at the same time of another run, and return their rewards.

    Args:
        env: An environment that offers the whole pool; the run that is followed is made in it.
        course: The record of that run.
        records: By agent, the runs whose steps are tried: at each time those taken then, of all its runs, then those
            taken a step later, up to `NUM_BATCHES`.

    Returns:
        "base", dev and test loss before any step; "states", for each time the "step", by agent the "rewards" of its
        batches, and likewise, and over "all" batches, the rank correlation between "halves" of the dev set: of the
        gains in loss that both show, the mean over ways to cut it.

    Raises:
        SettingError: The run took rows that this environment does not offer.
    """
    env.reset(seed=course.seed)
    splits = ("dev", "test") if env.assets.has_test else ("dev",)
    base = {f"{split}_loss": env.evaluate(split).loss for split in splits}
    num_steps = len(course.actions)
    due = {place * num_steps // min(NUM_STATES, num_steps) for place in range(min(NUM_STATES, num_steps))}
    states = []
    for step in range(max(due) + 1):
        if step in due:
            states.append({"step": step, **_tried(env, {a: _batches(r, step) for a, r in records.items()})})
        env.step(_choice(env, np.array(course.actions[step], dtype=np.int64)))
    return {"base": base, "states": states}


def _batches(records: Sequence[EpisodeRecord], step: int) -> list[np.ndarray]:
    """Return batches taken at a step, and at those after it where there are too few runs."""
    batches: list[np.ndarray] = []
    for later in range(max((len(record.actions) for record in records), default=0)):
        for record in records:
            rows = record.actions[(step + later) % len(record.actions)]
            if rows and len(batches) < NUM_BATCHES:
                batches.append(np.array(rows, dtype=np.int64))
    return batches


def _tried(env: RaiseSelectEnv, batches: Mapping[str, Sequence[np.ndarray]]) -> dict[str, Any]:
    """Return the reward that each batch gets from this state, and how far halves of the dev set agree on them."""
    moment, before = env.snapshot(), env.evaluate("dev")
    rewards: dict[str, list[float]] = {agent: [] for agent in batches}
    after: dict[str, list[Evaluation]] = {agent: [] for agent in batches}
    for agent, tried in batches.items():
        for rows in tried:
            _, reward, _, _, _ = env.step(_choice(env, rows))
            after[agent].append(env.evaluate("dev"))
            rewards[agent].append(float(reward))
            env.restore(moment)
    groups = {**after, "all": [evaluation for own in after.values() for evaluation in own]}
    return {"rewards": rewards, "halves": {name: _agreement(before, own) for name, own in groups.items()}}


def _agreement(before: Evaluation, after: Sequence[Evaluation]) -> float | None:
    """Return the rank correlation between the gains that two halves of the dev set show, None without any."""
    if not after:
        return None
    rng, found = np.random.default_rng(0), []
    losses, tokens = np.stack([evaluation.row_losses for evaluation in after]), before.row_tokens
    for _ in range(NUM_SPLITS):
        halves = np.array_split(rng.permutation(len(tokens)), 2)
        gains = [(before.row_losses - losses)[:, half].sum(axis=1) / max(tokens[half].sum(), 1) for half in halves]
        found.append(correlation(*gains, ranks=True).value)
    known = [value for value in found if np.isfinite(value)]
    return float(np.mean(known)) if known else None


def _choice(env: RaiseSelectEnv, rows: np.ndarray) -> np.ndarray:
    """Return the 0/1 choice of pool rows.

    Raises:
        SettingError: One of them is not on offer.
    """
    offered = env.candidates
    missing = np.setdiff1d(rows, offered)
    if len(missing):
        raise SettingError(f"pool rows {missing.tolist()} are not on offer: take num_candidates='all'.")
    return np.isin(offered, rows).astype(np.int8)
