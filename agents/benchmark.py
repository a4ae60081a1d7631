"""What `bench` and `ablate` do: every task x agent x seed, each a run of its own, and what they say together.

Everything in a run follows from its task, agent and seed, and it computes in one thread: any order, any number of
workers and any interruption give the same numbers. All agents of one seed start from the same adapter and are offered
the same candidates, so that they can be compared in pairs.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raise_env import EnvConfig, RaiseSelectEnv
from raise_env.config import OBSERVATION_BLOCKS, TASK_SETTINGS
from raise_env.errors import RaiseEnvError, RecordError, SettingError, suggestion
from raise_env.files import append_line, held, replaced_folder, write_json, write_text
from raise_env.record import EpisodeRecord, versions
from raise_env.side_by_side import one_thread
from raise_env.tiny.task import TASKS

from .bench_report import write_bench_report
from .catalogue import make_agent, reward_digest
from .job import OWN_TASK, Entry, Job, Outcome, check_line, failed, run_job
from .run_folder import RunFolder, whole_lines, whole_records
from .runs import Reporter, Silent, as_learned, check_agent, check_inputs, check_selectors
from .spread import check_cluster, spread
from .summary import RANDOM, summarise
from .validation import Recorded

__all__ = ["ALL_FEATURES", "SUITE", "BenchPlan", "Ready", "ablation", "bench", "carry_out", "ready", "selector_folder"]

#: The row of an ablation that the others are compared with.
ALL_FEATURES = "all features"

#: What `--tasks suite` stands for: every embedded task of its own question that takes seconds a run.
SUITE = tuple(task for task in TASK_SETTINGS if task != "large")

#: Why a run failed that ended the process which made it.
_LOST = (
    "the process that made it was ended, again and again and with no other beside it: by a crash, or from outside for "
    "lack of memory."
)

logger = logging.getLogger(__name__)


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
        """Return the plan as run.json keeps it; of a reward of one's own, also which code it is.

        Raises:
            RaiseEnvError: A selector cannot be read, or there is no such agent or reward.
        """
        entries = {label: entry.to_json() for label, entry in self.entries.items()}
        plain = {**asdict(self), "entries": entries, "tasks": list(self.tasks)}
        reward = str(self.settings.get("reward", "loss"))
        if (digest := reward_digest(reward)) is not None:
            plain["sources"] = {reward: digest}
        return dict(json.loads(json.dumps(plain)))  # tuples become lists, as they will be when it is read again

    def with_additions(self, before: dict[str, Any], done: Collection[str]) -> dict[str, Any]:
        """Return an earlier plan, as `to_json` gave it, with the seeds and entries that this one has beyond it.

        Args:
            before: The earlier plan.
            done: Entries with runs that are done: only their code has to be what it was. Others may have been mended.
        """
        now = self.to_json()
        entries = {**now["entries"], **before.get("entries", {})}
        for label in now["entries"].keys() - set(done):
            if isinstance(entries[label], dict) and "source" in entries[label]:
                entries[label] = {**entries[label], "source": now["entries"][label].get("source")}
        num_seeds = max(self.num_seeds, before.get("num_seeds", 0))
        return {**before, "entries": entries, "num_seeds": num_seeds}

    def jobs(self, folder: Path) -> list[Job]:
        """Return all runs, those of one task and seed after each other: they share what is loaded.

        Args:
            folder: Where they are written; a plan may build on what lies beside it.
        """
        del folder
        settings = {
            (task, label): self._entry_settings(task, entry)
            for task in self.tasks
            for label, entry in self.entries.items()
        }
        return [
            Job(task, label, seed, entry, {**settings[task, label], "seed_model": seed})
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
        nameless = [label for label in self.entries if not _file_name(label).strip(".-")]
        faults += [
            f"the agent {label!r} would have no folder of its own: give it a name of letters" for label in nameless
        ]
        if len({_file_name(label) for label in self.entries}) < len(self.entries):
            faults.append(f"two of the agents {', '.join(self.entries)} would share a folder: rename one.")
        if faults:
            raise SettingError("\n".join(dict.fromkeys(faults)))
        for task in self.tasks:
            check_inputs(EnvConfig.from_kwargs(self.task_settings(task)))
            for label, entry in self.entries.items():
                self._check_entry(task, label, entry)

    def _check_entry(self, task: str, label: str, entry: Entry) -> None:
        from raise_env.assets import load_data

        config = EnvConfig.from_kwargs(self._entry_settings(task, entry))
        agent = make_agent(entry.agent, entry.arguments)
        try:
            check_selectors(config, [agent])
            episodes = entry.episodes if hasattr(agent, "learn") else 0
            check_agent(label, agent, config, load_data(config).pool, episodes)
        except SettingError as error:
            raise SettingError(f"agent {label!r} on task {task!r}: {error}") from error

    def _entry_settings(self, task: str, entry: Entry) -> dict[str, Any]:
        """Return the environment's keywords for an entry; for a selector, with what it carries to compute features."""
        return as_learned({**self.task_settings(task), **entry.settings}, entry.agent)


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
    workers: int | None = None,
    cluster: str | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Make every run of the plan, as far as it is not on disk yet, and write the folder.

    A run that fails is noted with its reason, and the others go on; so is one that ends the worker that makes it.

    Args:
        out: The folder; docs/files.md says what is in it.
        plan: What to do.
        command: The name of what is done, for run.json.
        resume: Go on with a folder that was begun with the same plan, or with fewer seeds or agents; what failed is
            tried again.
        workers: Processes that work side by side; their number changes no result. None is one, or on a cluster one for
            each of its processors.
        cluster: The address of a Ray cluster that the runs are made on, "auto" for the one that this machine is of.
        reporter: Where progress is shown.

    Returns:
        What summary.json holds.

    Raises:
        RaiseEnvError: The plan cannot be carried out, the folder cannot be written, or workers died again and again.
    """
    reporter = reporter or Silent()
    plan.check()
    with ready(Path(out), plan, command, resume, workers, cluster, reporter) as begun:
        return carry_out(begun, workers, cluster, reporter)


@dataclass(frozen=True, slots=True)
class Ready:
    """A benchmark that nothing speaks against.

    Attributes:
        run: Its folder, which is held, and in which nothing was written yet.
        plan: What to do.
        pairs: Line and record of each run that is done.
        content: Each task's content hashes; None where no run is missing.
    """

    run: RunFolder
    plan: BenchPlan
    pairs: list[tuple[dict[str, Any], EpisodeRecord]]
    content: dict[str, dict[str, str]] | None


@contextmanager
def ready(
    folder: Path,
    plan: BenchPlan,
    command: str,
    resume: bool,
    workers: int | None,
    cluster: str | None,
    reporter: Reporter,
) -> Iterator[Ready]:
    """Hold a benchmark's folder, and refuse what may not be begun or gone on with before anything is written in it.

    Args: As for `bench`.

    Raises:
        RaiseEnvError: The folder holds another run, or one that was begun with other versions, data or code; or no
            cluster answers.
    """
    with held(folder):
        run = RunFolder.open(
            folder, command, plan.to_json(), resume, lambda before: plan.with_additions(before, _agents_done(folder))
        )
        pairs = _finished(folder) if resume else []
        content = None
        if _missing(plan, folder, [line for line, _ in pairs]):
            run.check_versions()
            if cluster is not None:
                check_cluster(cluster)
            with reporter.task("loading models, data and features", len(plan.tasks)) as show:
                content = _contents(plan, workers, show)
            run.check_content(content)
        yield Ready(run, plan, pairs, content)


def carry_out(begun: Ready, workers: int | None, cluster: str | None, reporter: Reporter) -> dict[str, Any]:
    """Make the runs that are missing, write the folder, and return what summary.json holds.

    Args: As for `bench`.

    Raises:
        RaiseEnvError: The folder cannot be written, or workers died again and again.
    """
    run, plan, folder = begun.run, begun.plan, begun.run.folder
    done = [line for line, _ in begun.pairs]
    with run:
        if begun.content is not None:
            run.note(content=begun.content)
            _write_whole(folder, begun.pairs)
            _make_runs(run, plan, done, workers, cluster, reporter)
        run.note(seconds={**run.state.get("seconds", {}), "runs": _seconds(done)})
        summary = summarise(done, plan.tasks, list(plan.entries), range(plan.num_seeds), plan.reference)
        write_json(folder / "summary.json", summary)
        write_bench_report(folder, summary, done, _by_task(folder / "episodes.jsonl"), run.state)
    return summary


def _missing(plan: BenchPlan, folder: Path, done: Iterable[Mapping[str, Any]]) -> list[Job]:
    """Return the runs that are not done."""
    keys = {_key(line) for line in done}
    return [job for job in plan.jobs(folder) if job.key not in keys]


def _make_runs(
    run: RunFolder,
    plan: BenchPlan,
    done: list[dict[str, Any]],
    workers: int | None,
    cluster: str | None,
    reporter: Reporter,
) -> None:
    """Make the runs that are missing, and add each to the folder and its line to those that are done."""
    jobs = _missing(plan, run.folder, done)
    begun, before = time.perf_counter(), run.state.get("seconds", {}).get("elapsed", 0.0)
    with reporter.task(f"{len(plan.entries)} agents, {len(jobs)} runs", len(jobs)) as show:
        for number, (job, outcome) in enumerate(spread(_named_run, jobs, workers, cluster, _lost_run), start=1):
            outcome = _same_world(job, outcome, run.state["content"])
            _write(run.folder, job, outcome)
            done.append(outcome.line)
            # Each time: a process that is killed notes nothing at its end.
            run.note(seconds={"runs": _seconds(done), "elapsed": before + time.perf_counter() - begun})
            show(number)


def _seconds(lines: Iterable[Mapping[str, Any]]) -> float:
    """Return what runs took together, as their lines say; those that failed say nothing."""
    return sum(sum((line["seconds"] or {}).values()) for line in lines)


def _contents(plan: BenchPlan, workers: int | None, show: Callable[[int], None]) -> dict[str, dict[str, str]]:
    """Return each task's content hashes; features are computed here and kept, before workers would do so each."""
    contents = {}
    tasks = [(task, plan.task_settings(task)) for task in plan.tasks]
    for number, (task, content) in enumerate(spread(_content, tasks, workers), start=1):
        contents[task] = content
        show(number)
    return {task: contents[task] for task in plan.tasks}


def _content(task: tuple[str, dict[str, Any]]) -> tuple[str, dict[str, str]]:
    name, settings = task
    with one_thread():
        return name, dict(RaiseSelectEnv(**settings).assets.content)


def _named_run(job: Job) -> tuple[Job, Outcome]:
    return job, run_job(job)


def _lost_run(job: Job) -> tuple[Job, Outcome]:
    return job, failed(job, _LOST)


def _same_world(job: Job, outcome: Outcome, content: Mapping[str, Mapping[str, str]]) -> Outcome:
    """Return what a run left, or its failure where libraries, data or model were others than here."""
    if outcome.record is None:
        return outcome
    here = {**versions(), **{f"content of {what}": digest for what, digest in content[job.task].items()}}
    contents = {f"content of {what}": digest for what, digest in outcome.record.content.items()}
    there = {**outcome.record.versions, **contents}
    different = [f"{name}: {there.get(name)}, here {here[name]}" for name in here if there.get(name) != here[name]]
    if not different:
        return outcome
    return failed(job, f"it was made in another world than the others ({'; '.join(different)}).")


def _write(folder: Path, job: Job, outcome: Outcome) -> None:
    """Add a run to the folder: its line of results comes last, so that it never lacks anything."""
    if outcome.record is None:
        reason = outcome.line["error"].splitlines()[0]  # the file has it all
        logger.warning("%s, %s, seed %d failed: %s", *job.key, reason)
    else:
        if outcome.selector:
            _write_selector(selector_folder(folder, job), outcome.selector)
        append_line(folder / "episodes.jsonl", outcome.record.to_json())
    append_line(folder / "results.jsonl", json.dumps(outcome.line, allow_nan=False))


def selector_folder(folder: Path, job: Job) -> Path:
    """Return where a benchmark keeps what was learned in a run."""
    return folder / "selectors" / job.task / _file_name(job.label) / str(job.seed)


def _write_selector(folder: Path, files: Mapping[str, bytes]) -> None:
    with replaced_folder(folder) as beside:
        for name, content in files.items():
            path = beside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def _by_task(path: Path) -> list[tuple[str, EpisodeRecord]]:
    """Return the records of all final runs, each with its task."""
    return [(Recorded(str(path), record).key[0], record) for record in whole_records(path)]


def _write_whole(folder: Path, pairs: Sequence[tuple[dict[str, Any], EpisodeRecord]]) -> None:
    """Leave in the files of a bench only the runs that are done."""
    if (folder / "results.jsonl").exists() or (folder / "episodes.jsonl").exists():
        write_text(folder / "results.jsonl", "".join(json.dumps(line) + "\n" for line, _ in pairs))
        write_text(folder / "episodes.jsonl", "".join(record.to_json() + "\n" for _, record in pairs))


def _agents_done(folder: Path) -> set[str]:
    """Return who has runs that are done, as far as can be read."""
    return {str(line.get("agent")) for line in whole_lines(folder / "results.jsonl") if line.get("error") is None}


def _finished(folder: Path) -> list[tuple[dict[str, Any], EpisodeRecord]]:
    """Return line and record of the runs that are done, without failed ones and what a crash has torn.

    Raises:
        RecordError: A line has another form, or lines and records do not belong together.
    """
    results, episodes = folder / "results.jsonl", folder / "episodes.jsonl"
    lines = []
    for number, line in enumerate(whole_lines(results), start=1):
        try:
            check_line(line)
        except ValueError as error:
            raise RecordError(f"{results}, line {number}: {error}; expected what a run left.") from error
        if line.get("error") is None:
            lines.append(line)
    records = whole_records(episodes)
    # As many records as lines, unless a crash came between a record and its line.
    if abs(len(lines) - len(records)) > 1:
        raise RecordError(
            f"{results} has {len(lines)} whole lines of runs that did not fail, {episodes.name} {len(records)} whole "
            "records; expected as many, but for one that a crash may have torn. Mend them, or start anew elsewhere."
        )
    pairs = list(zip(lines, records, strict=False))
    for number, (line, record) in enumerate(pairs, start=1):
        found, expected = Recorded(f"{episodes}, record {number}", record), _key(line)
        if found.key != expected:
            raise RecordError(
                f"{found.where}: it is of {_words(found.key)}; expected the run of {_words(expected)}, as in "
                f"{results.name}. Start anew in another folder."
            )
    return pairs


def _key(line: Mapping[str, Any]) -> tuple[str, str, int]:
    return line["task"], line["agent"], line["seed"]


def _words(key: tuple[str, str, int]) -> str:
    return "{}, {}, seed {}".format(*key)


def _is_task(name: str) -> bool:
    return name in TASKS or name == OWN_TASK


def _fault(entry: Entry) -> str | None:
    """Return why an agent cannot be made, or None."""
    try:
        make_agent(entry.agent, entry.arguments)
    except RaiseEnvError as error:
        return str(error)
    return None


def _file_name(label: str) -> str:
    return re.sub(r"[^\w.-]+", "-", label)
