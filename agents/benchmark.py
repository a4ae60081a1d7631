"""What `bench` and `ablate` do: every task x agent x seed, each a run of its own, and what they say together.

Everything in a run follows from its task, agent and seed, and it computes in one thread: any order, any number of
workers and any interruption give the same numbers. All agents of one seed start from the same adapter and are offered
the same candidates, so that they can be compared in pairs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from raise_env import EnvConfig, RaiseSelectEnv
from raise_env.config import OBSERVATION_BLOCKS
from raise_env.errors import RaiseEnvError, RecordError, SettingError, suggestion
from raise_env.files import append_line, write_json, write_text
from raise_env.record import EpisodeRecord
from raise_env.rewards import DIVERGENCE_PENALTY
from raise_env.tiny.task import TASKS

from .catalogue import make_agent
from .rollout import run_episode
from .run_folder import RunFolder, whole_records
from .runs import FINAL_SEED, Clock, Reporter, Silent, check_inputs, final_environment, final_scores, phi_tokens
from .summary import RANDOM, SHARES, summarise

__all__ = ["ALL_FEATURES", "OWN_TASK", "BenchPlan", "Entry", "Job", "ablation", "bench", "run_job"]

#: The name in the results of a pool of one's own, which is no embedded task.
OWN_TASK = "own"

#: The row of an ablation that the others are compared with.
ALL_FEATURES = "all features"

#: Agents that look at neither the observation nor the pool's features; others may say so by `uses_features = False`.
_WITHOUT_FEATURES = frozenset(
    {"random", "full", "quality", "oracle", "self_paced", "loss_high", "loss_low", "greedy", "less", "greats"}
)

_Item = TypeVar("_Item")
_Outcome = TypeVar("_Outcome")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """Who takes part, and how: a row of the results.

    Attributes:
        agent: The agent's name.
        arguments: Its own settings.
        episodes: Episodes to learn for, if it learns.
        settings: Environment keywords of this row alone.
    """

    agent: str
    arguments: dict[str, Any] = field(default_factory=dict)
    episodes: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """What a benchmark shall do.

    Attributes:
        settings: The environment's keywords, for all.
        entries: The rows of the results, by the name that they have there.
        tasks: Embedded tasks; only OWN_TASK where the settings name a pool.
        num_seeds: Runs of each entry on each task.
        reference: The entry that the others' paired differences are taken from.
    """

    settings: dict[str, Any]
    entries: dict[str, Entry]
    tasks: tuple[str, ...] = ("default",)
    num_seeds: int = 10
    reference: str = RANDOM

    def to_json(self) -> dict[str, Any]:
        """Return the plan as run.json keeps it."""
        entries = {label: asdict(entry) for label, entry in self.entries.items()}
        plain = {**asdict(self), "entries": entries, "tasks": list(self.tasks)}
        return dict(json.loads(json.dumps(plain)))  # tuples become lists, as they will be when it is read again

    def with_additions(self, before: dict[str, Any]) -> dict[str, Any]:
        """Return an earlier plan, as `to_json` gave it, with the seeds and entries that this one has beyond it."""
        now = self.to_json()
        entries = {**now["entries"], **before.get("entries", {})}
        num_seeds = max(self.num_seeds, before.get("num_seeds", 0))
        return {**before, "entries": entries, "num_seeds": num_seeds}

    def jobs(self, folder: Path) -> list[Job]:
        """Return all runs, those of one task and seed after each other: they share what is loaded."""
        return [
            Job(
                task, label, seed, entry, self._settings(task, entry, seed), _selector_folder(folder, task, label, seed)
            )
            for task in self.tasks
            for seed in range(self.num_seeds)
            for label, entry in self.entries.items()
        ]

    def task_settings(self, task: str) -> dict[str, Any]:
        """Return the environment's keywords for a task."""
        return self.settings if task == OWN_TASK else {**self.settings, "task": task}

    def check(self) -> None:
        """Find what cannot be done before anything is begun.

        Raises:
            SettingError: Tasks or agents are unknown, which names all of them; or settings contradict the plan.
            RaiseEnvError: A model or data file cannot be used.
        """
        if "seed_model" in self.settings:
            raise SettingError("seed_model follows from the seed of each run: leave it out.")
        if ("pool" in self.settings) != (self.tasks == (OWN_TASK,)):
            raise SettingError("tasks are those of the embedded pool: name tasks, or give pool=FILE, not both.")
        faults = [f"unknown task {task!r}: {suggestion(task, TASKS)}" for task in self.tasks if not _is_task(task)]
        faults += filter(None, (_fault(entry) for entry in self.entries.values()))
        if len({_file_name(label) for label in self.entries}) < len(self.entries):
            faults.append(f"two of the agents {', '.join(self.entries)} would share a folder: rename one.")
        if faults:
            raise SettingError("\n".join(dict.fromkeys(faults)))
        for task in self.tasks:
            check_inputs(EnvConfig.from_kwargs(self.task_settings(task)))

    def _settings(self, task: str, entry: Entry, seed: int) -> dict[str, Any]:
        return {**self.task_settings(task), **entry.settings, "seed_model": seed}


@dataclass(frozen=True, slots=True)
class Job:
    """One run: an entry learns and makes a final run, on one task with one seed.

    Attributes:
        task: The task's name.
        label: The entry's name.
        seed: What the adapter, the agent's learning and the candidates are drawn from.
        entry: Who learns and acts.
        settings: The environment's keywords, all of them.
        selector: The folder for what is learned.
    """

    task: str
    label: str
    seed: int
    entry: Entry
    settings: dict[str, Any]
    selector: Path

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells runs apart."""
        return self.task, self.label, self.seed


def ablation(
    settings: Mapping[str, Any],
    agent: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    episodes: int,
    num_seeds: int,
    task: str = "default",
) -> BenchPlan:
    """Return the plan of RAISE's ablation (Lv et al. 2025): without each block of the observation.

    The agent learns and acts without it: the block's columns are zeros, so that the networks are as large as ever.
    The paper does not say how it left a block out. Random rows are there for the scale.

    Args:
        settings: The environment's keywords.
        agent: The agent that learns.
        arguments: Its own settings.
        episodes: Episodes to learn for.
        num_seeds: Runs of each row.
        task: The embedded task, where the settings name no pool.

    Raises:
        SettingError: The settings hide something themselves.
    """
    if "hide" in settings:
        raise SettingError("an ablation hides one block after the other: leave hide out.")
    whole = Entry(agent, dict(arguments or {}), episodes)
    entries = {ALL_FEATURES: whole}
    for block in OBSERVATION_BLOCKS:
        entries[f"without {block}"] = Entry(agent, whole.arguments, episodes, {"hide": [block]})
    tasks = (OWN_TASK,) if "pool" in settings else (task,)
    return BenchPlan(dict(settings), {**entries, RANDOM: Entry(RANDOM)}, tasks, num_seeds, ALL_FEATURES)


def bench(
    out: str | Path,
    plan: BenchPlan,
    *,
    command: str = "bench",
    resume: bool = False,
    workers: int = 1,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Make every run of the plan, as far as it is not on disk yet, and write the folder.

    A run that fails is noted with its reason, and the others go on.

    Args:
        out: The folder; docs/files.md says what is in it.
        plan: What to do.
        command: The name of what is done, for run.json.
        resume: Go on with a folder that was begun with the same plan, or with fewer seeds or agents; what failed is
            tried again.
        workers: Processes that work side by side; their number changes no result.
        reporter: Where progress is shown.

    Returns:
        What summary.json holds.

    Raises:
        RaiseEnvError: The plan cannot be carried out, the folder cannot be written, or a worker died.
    """
    folder = Path(out)
    reporter = reporter or Silent()
    plan.check()
    run = RunFolder.open(folder, command, plan.to_json(), resume, grown=plan.with_additions)
    done = _finished(folder) if resume else []
    jobs = [job for job in plan.jobs(folder) if job.key not in {_key(line) for line in done}]
    with run:
        if jobs:
            with reporter.task("loading models, data and features", len(plan.tasks)) as show:
                content = _contents(plan, workers, show)
            run.check_content(content)
            run.note(content=content)
        with reporter.task(f"{len(plan.entries)} agents, {len(jobs)} runs", len(jobs)) as show:
            for number, (line, record) in enumerate(_spread(run_job, jobs, workers), start=1):
                _write(folder, line, record)
                done.append(line)
                show(number)
        summary = summarise(done, plan.tasks, list(plan.entries), range(plan.num_seeds), plan.reference)
        write_json(folder / "summary.json", summary)
    return summary


def run_job(job: Job) -> tuple[dict[str, Any], str | None]:
    """Make one run and return its line of results.jsonl, and its record's line; None for a run that failed."""
    try:
        with _one_thread():
            line, record = _run(job)
    except Exception as error:
        # An agent may be anyone's code, and one that fails is a result like any other: the rest goes on.
        return _line(job, error=_reason(error)), None
    return line, record.to_json()


def _run(job: Job) -> tuple[dict[str, Any], EpisodeRecord]:
    env = RaiseSelectEnv(**job.settings)
    agent: Any = make_agent(job.entry.agent, job.entry.arguments)
    costs = {}
    env.reset(seed=job.seed)
    clock = Clock(env)
    if job.entry.episodes and hasattr(agent, "learn"):
        agent.learn(env, job.entry.episodes, seed=job.seed)
        if hasattr(agent, "save"):
            agent.save(job.selector)
    costs["learning"] = clock.lap()
    env = final_environment(env, agent)
    env.reset(seed=job.seed)
    clock = Clock(env)
    if hasattr(agent, "prepare"):
        agent.prepare(env, job.seed)
    costs["preparation"] = clock.lap()
    record = run_episode(env, agent, seed=FINAL_SEED + job.seed, name=job.label)
    costs["final"] = clock.lap()
    tokens = {"features": env.assets.features.num_tokens if _uses_features(agent, job.entry.agent) else 0}
    tokens |= {part: costs[part][1] for part in ("preparation", "learning", "final")}
    phi = {part: count / phi_tokens(env) for part, count in tokens.items()}
    seconds = {part: costs[part][0] for part in ("preparation", "learning", "final")}
    rows = [row for step in record.actions for row in step]
    return _line(
        job,
        **_scores(record, env),
        phi=sum(phi.values()),
        phi_parts=phi,
        seconds=seconds,
        rows=len(set(rows)),
        updates=sum(bool(step) for step in record.actions),
    ), record


def _scores(record: EpisodeRecord, env: RaiseSelectEnv) -> dict[str, Any]:
    diverged = record.rewards[-1] == DIVERGENCE_PENALTY
    scores = final_scores(record, env)
    return {
        "dev_loss": None if diverged else env.evaluate("dev").loss,  # also where the reward is something else
        "test_loss": scores.get("test_loss"),
        **{name: scores.get(name) for name in SHARES},
        "diverged": diverged,
    }


def _line(job: Job, **values: Any) -> dict[str, Any]:
    """Return a line of results.jsonl; what is not given is null."""
    fields = ("dev_loss", "test_loss", *SHARES, "diverged", "phi", "phi_parts", "seconds", "rows", "updates")
    empty = dict.fromkeys((*fields, "error"))
    return {"task": job.task, "agent": job.label, "seed": job.seed, **empty, **values}


def _reason(error: Exception) -> str:
    """Return what went wrong: a message made for users as it is, anything else with the place that raised it."""
    if isinstance(error, RaiseEnvError) and str(error):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"


def _uses_features(agent: object, name: str) -> bool:
    return bool(getattr(agent, "uses_features", name.partition(":")[0] not in _WITHOUT_FEATURES))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread: sums that several share differ in their last digits with the number of threads."""
    import torch
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        torch.set_num_threads(before)


def _contents(plan: BenchPlan, workers: int, show: Callable[[int], None]) -> dict[str, dict[str, str]]:
    """Return each task's content hashes; features are computed here and kept, before workers would do so each."""
    contents = {}
    for number, (task, content) in enumerate(
        _spread(_content, [(t, plan.task_settings(t)) for t in plan.tasks], workers)
    ):
        contents[task] = content
        show(number + 1)
    return {task: contents[task] for task in plan.tasks}


def _content(task: tuple[str, dict[str, Any]]) -> tuple[str, dict[str, str]]:
    name, settings = task
    with _one_thread():
        return name, dict(RaiseSelectEnv(**settings).assets.content)


def _spread(work: Callable[[_Item], _Outcome], items: Iterable[_Item], workers: int) -> Iterator[_Outcome]:
    """Yield what the work gives, in the order in which it is done.

    Raises:
        RaiseEnvError: A worker died.
    """
    if workers == 1:
        yield from map(work, items)
        return
    from joblib import Parallel, delayed, parallel_config
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    with parallel_config("loky", n_jobs=workers, inner_max_num_threads=1), warnings.catch_warnings():
        # A worker whose memory has grown is replaced by a new one between two runs: nothing that a user has to mend.
        warnings.filterwarnings("ignore", "A worker stopped while some jobs were given", UserWarning)
        try:
            # No more runs are handed out than there are workers: if this process is killed, they end after theirs.
            parallel = Parallel(batch_size=1, pre_dispatch="n_jobs", return_as="generator_unordered")
            yield from parallel(delayed(work)(item) for item in items)
        except TerminatedWorkerError as error:
            raise RaiseEnvError(
                f"one of {workers} workers was ended from outside, most likely for lack of memory. What was done is "
                "on disk: go on with --resume and fewer workers."
            ) from error


def _write(folder: Path, line: Mapping[str, Any], record: str | None) -> None:
    """Add a run to the folder: its record first, so that a line of results never lacks one."""
    if record is None:
        logger.warning("%s, %s, seed %d failed: %s", *_key(line), line["error"].splitlines()[0])  # the file has it all
    else:
        append_line(folder / "episodes.jsonl", record)
    append_line(folder / "results.jsonl", json.dumps(line, allow_nan=False))


def _finished(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of the runs that are done; failed ones and what a crash has torn are dropped from the files.

    Raises:
        RecordError: Lines and records do not belong together.
    """
    results, episodes = folder / "results.jsonl", folder / "episodes.jsonl"
    lines = [line for line in _whole_lines(results) if line["error"] is None]
    # As many records as lines, unless a crash came between a record and its line.
    pairs = list(zip(lines, whole_records(episodes), strict=False))
    for number, (line, record) in enumerate(pairs, start=1):
        if (record.agent, record.seed) != (line["agent"], FINAL_SEED + line["seed"]):
            raise RecordError(
                f"{episodes}, record {number}: it is of {record.agent}, seed {record.seed}; expected the run of "
                f"{line['agent']}, seed {line['seed']}, as in {results.name}. Start anew in another folder."
            )
    if results.exists():
        write_text(results, "".join(json.dumps(line) + "\n" for line, _ in pairs))
        write_text(episodes, "".join(record.to_json() + "\n" for _, record in pairs))
    return [line for line, _ in pairs]


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines up to the first one that is torn."""
    lines: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _key(line: Mapping[str, Any]) -> tuple[str, str, int]:
    return line["task"], line["agent"], line["seed"]


def _is_task(name: str) -> bool:
    return name in TASKS or name == OWN_TASK


def _fault(entry: Entry) -> str | None:
    """Return why an agent cannot be made, or None."""
    try:
        make_agent(entry.agent, entry.arguments)
    except RaiseEnvError as error:
        return str(error)
    return None


def _selector_folder(folder: Path, task: str, label: str, seed: int) -> Path:
    return folder / "selectors" / task / _file_name(label) / str(seed)


def _file_name(label: str) -> str:
    return re.sub(r"[^\w.-]+", "-", label)
