"""The command line: `raise-env`. It parses, calls, prints, and turns errors into one message and an exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

# Before torch is loaded: threads that spin for long while they wait make a busy machine many times slower, and threads
# that sleep at once a quiet one. docs/results/measured.md has the numbers.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

import typer
from tqdm import tqdm

from raise_env import __version__
from raise_env.config import REWARDS, EnvConfig
from raise_env.env import RaiseSelectEnv
from raise_env.errors import OutputError, RaiseEnvError, RecordError, SettingError, lacks_memory, printable
from raise_env.features import BLOCKS

__all__ = ["app", "main"]

EXIT_NO, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

#: The demo's own choices: enough to show the point, in two or three minutes on two cores.
DEMO_COMPARE = ("random", "ifd", "oracle")

#: What a demo leaves: docs/files.md. What tells that it was one goes last.
DEMO_LEAVES = (
    *("episodes.jsonl", "selected.jsonl", "selector", "adapter", "merged", "report.json", "report.html"),
    *("plots", "learning", "run.json"),
)
BENCH_AGENTS = "random,ifd,raise_fork,oracle"
BENCH_SEEDS = 10
ABLATION_SEEDS = 5
AUDIT_AGENTS = "random,raise_fork"
AUDIT_SEEDS = 5
MISSING_SHOWN = 5

#: The name of all embedded tasks of the leaderboard.
SUITE_NAME = "suite"
TASKS_HELP = "Embedded tasks, with commas between; suite stands for the nine from noise-0 to shift."

#: How a value is written on the command line, where the environment's documentation says how it is in Python.
_OWN_HELP = {
    "columns": "what a file's columns hold, where it is not seen by their names: prompt=q,response=a",
    "hide": f"blocks of the observation shown as zeros, for ablations, with commas between: {', '.join(BLOCKS)}",
    "lora": "the adapter, by PEFT's names, such as r=8,target_modules=q_proj or "
    """'target_modules=["q_proj","v_proj"]'; on all linear layers unless they say otherwise""",
    "reward": f"dev score: {', '.join(REWARDS)}, or a function of your own, module:function",
}

#: A module's name, or a list of such whose quotes the shell took: as patterns of whole names they would match none.
_MODULE_NAMES = re.compile(r"\w+|\[\s*[\w.]+(?:\s*,\s*[\w.]+)*\s*\]")

#: Names code of one's own, module:name, among what is given on the command line.
_OWN_CODE = re.compile(
    r"(?<![\w.:/])(?:placebo:)?(?!(?:sb3|selector|placebo|quality):)[A-Za-z_][\w.]*:[A-Za-z_]\w*(?![\w=])"
)

app = typer.Typer(
    name="raise-env",
    help="Reinforcement learning that chooses training data.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        _echo(__version__)
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
]


@app.callback()
def _common(version: Version = False) -> None:
    del version


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    _quieten()
    if any(_OWN_CODE.search(argument) for argument in arguments):
        # So that module:name finds what lies in the working folder; last, so that it hides nothing. Otherwise the
        # folder may be a stranger's, and what libraries look for in vain must not be found there.
        sys.path.append(os.getcwd())
    try:
        with _ended_as_by_ctrl_c():
            code = app(args=arguments, standalone_mode=False)
        if code == EXIT_INTERRUPTED:  # what Typer makes of Ctrl-C
            raise KeyboardInterrupt
    except RaiseEnvError as error:
        _fail(str(error), EXIT_USAGE)
    except (KeyboardInterrupt, typer.Abort):
        _fail(f"interrupted; what was done is on disk. {_how_to_resume(arguments)}", EXIT_INTERRUPTED)
    except Exception as error:
        if lacks_memory(error):
            _fail(f"there is too little memory ({error}). {_how_to_resume(arguments)}", EXIT_USAGE)
        # click's usage errors know their own message; anything else is ours to mend and keeps its traceback.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        hint = f" See `{context.command_path} --help`." if context is not None else ""
        _fail(f"{error.format_message()}{hint}", EXIT_USAGE)
    sys.exit(code or 0)


@contextlib.contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """Let what schedulers and `timeout` send end this block as Ctrl-C does: it is noted, and told how to go on."""
    # Whoever hosts this process may have said otherwise, and only its main thread is told of signals.
    is_free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not is_free or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _echo(text: object, *, err: bool = False) -> None:
    """Print; what comes from files is shown and not obeyed by the terminal."""
    typer.echo(printable(str(text)), err=err)


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Return the record's text as it may be printed."""
        return printable(super().format(record))


def _fail(message: str, code: int) -> None:
    _echo(f"raise-env: {message}", err=True)
    sys.exit(code)


def _how_to_resume(arguments: list[str]) -> str:
    if not arguments or arguments[0] not in ("train", "finetune", "bench", "ablate", "audit"):
        return "Run the same command again to start over."
    import shlex

    resume = arguments if "--resume" in arguments else [*arguments, "--resume"]
    return f"Go on with: raise-env {shlex.join(resume)}"


def _quieten() -> None:
    """Keep libraries' notes for their own developers out of the user's face; errors still come through."""
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if logging.lastResort is not None:  # prints warnings where nobody has said how
        logging.lastResort.setFormatter(_PrintableFormatter())
    # transformers 5.23 asks peft 0.21 to rename an attribute: nothing that a user could act on.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


# Environment options: one for each setting, with the words of the environment's own documentation.


def _setting_help() -> dict[str, str]:
    """Return what the environment's docstring says of each keyword, and its default where it has one."""
    table = (RaiseSelectEnv.__doc__ or "").partition("## Arguments")[2].partition("## Information")[0]
    texts = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if len(cells) == 3 and cells[0] not in ("keyword", "---|---|---"):
            value = re.sub(r'["{} ]', "", cells[1]).replace(":", "=")
            default = "" if value in ("None", "False", "()", "") else f" [{value}]"
            for name in cells[0].split(","):
                texts[name.strip()] = _OWN_HELP.get(name.strip(), cells[2]) + default
    return texts


def _env_options() -> list[inspect.Parameter]:
    texts = _setting_help()
    options = []
    for entry in dataclasses.fields(EnvConfig):
        if entry.name == "render_mode":
            continue
        is_switch = entry.type == "bool"
        option = typer.Option(
            False if is_switch else None,
            f"--{entry.name.replace('_', '-')}",
            help=texts[entry.name],
            show_default=False,
            metavar=None if is_switch else "VALUE",
        )
        kind = bool if is_switch else str | None
        options.append(inspect.Parameter(entry.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind))
    return options


def _with_env_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command an option for each setting of the environment; it gets those that were used as `settings`."""
    names = {entry.name for entry in dataclasses.fields(EnvConfig)}

    @functools.wraps(command)
    def wrapped(**options: Any) -> Any:
        settings = {name: options.pop(name) for name in list(options) if name in names}
        used = {name: _parse(name, value) for name, value in settings.items() if value not in (None, False)}
        EnvConfig.from_kwargs(used)
        return command(settings=used, **options)

    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "settings"]
    keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    wrapped.__signature__ = inspect.Signature([*keyword_only, *_env_options()])  # type: ignore[attr-defined]
    return wrapped


def _parse(name: str, text: Any) -> Any:
    """Return an option's text as the setting's kind of value."""
    if isinstance(text, bool):
        return text
    if name == "lora":
        return _lora(text)
    if name == "columns":
        return _columns(text)
    if name == "hide":
        return _names(text)
    kind = str(EnvConfig.__dataclass_fields__[name].type)
    if "int" in kind and text != "all":
        return _number(name, text, int, "a whole number")
    if kind == "float":
        return _number(name, text, float, "a number")
    return text


def _number(name: str, text: str, kind: type[int] | type[float], expected: str) -> int | float:
    try:
        return kind(text)
    except ValueError:
        raise SettingError(f"--{name.replace('_', '-')} is {text!r}; expected {expected}.") from None


def _names(text: str) -> tuple[str, ...]:
    """Return NAME,NAME as the names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _lora(text: str) -> dict[str, Any]:
    """Return LoRA's settings; what only names modules is a list of names, where PEFT would see a pattern."""
    values = _pairs(text, "--lora")
    modules = values.get("target_modules")
    if not isinstance(modules, str):
        return values
    try:
        re.compile(modules)
    except re.error as error:
        expected = """NAME, 'target_modules=["NAME","NAME"]', or a regular expression of whole names"""
        raise SettingError(f"--lora target_modules is {modules!r} ({error}); expected {expected}.") from error
    names = re.findall(r"[\w.]+", modules) if _MODULE_NAMES.fullmatch(modules) else modules
    return {**values, "target_modules": names}


def _pairs(text: str, option: str) -> dict[str, Any]:
    """Return NAME=VALUE,NAME=VALUE as a dictionary; what is JSON as such, the rest as text."""
    values = {}
    for pair in filter(None, (part.strip() for part in _split(text))):
        name, equals, value = pair.partition("=")
        if not equals:
            expected = """NAME=VALUE, several with commas between, a list as 'NAME=["a","b"]'"""
            raise SettingError(f"{option} has {pair!r}; expected {expected}.")
        try:
            values[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            values[name.strip()] = value
    return values


def _split(text: str) -> list[str]:
    """Return what stands between commas; those within brackets or double quotes divide nothing."""
    parts, depth, is_quoted = [""], 0, False
    for before, sign in itertools.pairwise(f" {text}"):
        if sign == '"' and before != "\\":
            is_quoted = not is_quoted
        elif not is_quoted:
            depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth <= 0 and not is_quoted:
            parts.append("")
        else:
            parts[-1] += sign
    # A bracket or quote without its other half is a sign like any other.
    return parts if depth == 0 and not is_quoted else text.split(",")


def _columns(text: str) -> dict[str, str]:
    """Return KEY=COLUMN,KEY=COLUMN as a dictionary; a column's name is text, whatever it looks like."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    for key, equals, column in pairs:
        if not (equals and key.strip() and column.strip()):
            raise SettingError(f"--columns has {key!r}; expected KEY=COLUMN, such as prompt=question,response=answer.")
    return {key.strip(): column.strip() for key, _, column in pairs}


class TerminalReporter:
    """Bars with the time left on a terminal, a plain line now and then elsewhere."""

    SECONDS_BETWEEN_LINES = 15.0

    @contextlib.contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a task until it ends."""
        if sys.stderr.isatty():
            with tqdm(total=total, desc=printable(name), leave=True, dynamic_ncols=True, file=sys.stderr) as bar:
                yield lambda done: bar.update(done - bar.n)
            return
        start = last = time.monotonic()
        _echo(name, err=True)

        def show(done: int) -> None:
            nonlocal last
            now = time.monotonic()
            if done and now - last > self.SECONDS_BETWEEN_LINES:
                last = now
                left = (now - start) / done * (total - done)
                _echo(f"  {done} of {total}, about {left:.0f} s left", err=True)

        yield show
        _echo(f"  done in {time.monotonic() - start:.0f} s", err=True)


def _remove_last_demo(out: Path) -> None:
    """A demo may be run again and again, and its last result is not worth keeping; what is no demo's stands.

    Raises:
        OutputError: A demo is still at work in the folder, or something in it cannot be removed.
    """
    import shutil

    from raise_env.files import held

    from .run_folder import read_json

    if not (out / "run.json").exists():
        return
    with held(out):
        try:
            is_demo = read_json(out / "run.json").get("command") == "demo"
        except RecordError:
            return
        try:
            for name in DEMO_LEAVES if is_demo else ():
                for path in [*out.glob(f".{name}.*.unfinished*"), out / name]:
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    else:
                        path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"the last demo in {str(out)!r} cannot be removed ({error.strerror}); name another folder."
            ) from error


Out = Annotated[Path, typer.Option("--out", help="Folder to write.", metavar="DIR")]
Seed = Annotated[int, typer.Option("--seed", help="What everything is drawn from.", min=0)]
Seeds = Annotated[int, typer.Option("--seeds", help="Runs of each agent, seeds 0, 1, 2, ...", min=1)]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        help="Processes side by side, of one thread each: 1, or as many as a cluster has processors.",
        min=1,
        show_default=False,
    ),
]
Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        help='Make the runs on a Ray cluster: its address, or "auto" for the one that this machine is of.',
        metavar="ADDRESS",
        show_default=False,
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")]
Merge = Annotated[
    bool, typer.Option("--merge", help="Write the model with the adapter merged in too: merged/ loads without PEFT.")
]
EPISODES_HELP = "Episodes to learn for, instead of the agent's own number."
Episodes = Annotated[int | None, typer.Option(help=EPISODES_HELP, show_default=False, min=0)]
AgentArguments = Annotated[
    str, typer.Option("--agent-args", help="The agent's own settings.", metavar="NAME=VALUE,...")
]


@app.command()
def demo(
    out: Out = Path("raise-env-demo"),
    seed: Seed = 0,
    episodes: Annotated[int | None, typer.Option(help=EPISODES_HELP, show_default=False, min=1)] = None,
) -> None:
    """Embedded task, end to end: learn a selector, compare it on the test set, draw the report."""
    from .runs import Plan, train

    _remove_last_demo(out)
    plan = Plan({}, episodes=episodes, seed=seed, compare=DEMO_COMPARE)
    report = train(out, plan, command="demo", reporter=TerminalReporter())
    _show(report, out)


@app.command()
@_with_env_options
def train(
    settings: dict[str, Any],
    out: Out,
    agent: Annotated[str, typer.Option(help="Who learns to select; see `raise-env info`.")] = "raise_fork",
    agent_args: AgentArguments = "",
    episodes: Episodes = None,
    compare: Annotated[str, typer.Option(help="Agents to compare with, with commas between.")] = "random",
    runs: Annotated[int, typer.Option(help="Final runs of each agent.", min=1)] = 3,
    seed: Seed = 0,
    merge: Merge = False,
    resume: Resume = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would cost, and stop.")] = False,
) -> None:
    """Learn a selector, make the final fine-tune with it, and report whether it beat random rows."""
    from . import runs as runs_module

    arguments = _pairs(agent_args, "--agent-args")
    plan = runs_module.Plan(settings, agent, arguments, episodes, seed, _names(compare), runs, merge)
    if dry_run:
        from .estimate import estimate
        from .report import duration

        cost = estimate(plan, reporter=TerminalReporter())
        _echo(
            f"{cost.updates:,} updates, {cost.tokens:,} token forwards ({cost.phi:.2f} Phi), "
            f"about {duration(cost.seconds)} on this machine, {cost.memory_gb:.1f} GB of memory."
        )
        if cost.test_tokens:
            spent = f"{duration(cost.test_seconds)} go to scores of the test set, {cost.test_tokens:,} token forwards"
            _echo(f"  of that time {spent} more.")
        for note in cost.notes:
            _echo(f"  {note}.")
        return
    report = runs_module.train(out, plan, resume=resume, reporter=TerminalReporter())
    _show(report, out)


@app.command()
@_with_env_options
def finetune(
    settings: dict[str, Any],
    selector: Annotated[Path, typer.Option("--selector", help="A learned selector's folder.", metavar="DIR")],
    out: Out,
    seed: Seed = 0,
    merge: Merge = False,
    resume: Resume = False,
) -> None:
    """Fine-tune once with a learned selector choosing every batch, on any model and pool."""
    from .runs import finetune as run_finetune

    report = run_finetune(out, selector, settings, seed=seed, merge=merge, resume=resume, reporter=TerminalReporter())
    _show(report, out)


@app.command()
@_with_env_options
def bench(
    settings: dict[str, Any],
    out: Out,
    agents: Annotated[
        str, typer.Option(help="Agents, with commas between; see `raise-env info`. NAME=AGENT gives one another name.")
    ] = BENCH_AGENTS,
    tasks: Annotated[str, typer.Option(help=TASKS_HELP, show_default=False)] = "",
    seeds: Seeds = BENCH_SEEDS,
    episodes: Annotated[
        list[str] | None,
        typer.Option(
            help="Episodes to learn for, instead of each agent's own number: N for all, AGENT=N for one. Repeatable.",
            metavar="N or AGENT=N",
        ),
    ] = None,
    agent_args: Annotated[
        list[str] | None,
        typer.Option(help="An agent's own settings. Repeatable.", metavar="AGENT:NAME=VALUE,..."),
    ] = None,
    workers: Workers = None,
    cluster: Cluster = None,
    resume: Resume = False,
    table: Annotated[
        bool, typer.Option("--table", help="Print a finished folder's table as Markdown, and stop.")
    ] = False,
) -> None:
    """Compare agents: every task, agent and seed is a run, then statistics over all."""
    from .benchmark import BenchPlan
    from .job import OWN_TASK, Entry

    if table:
        _show_table(out)
        return
    named = _named_agents(agents)
    arguments, numbers = _agent_arguments(agent_args or [], list(named)), _episodes(episodes or [], named)
    entries = {}
    for name, agent in named.items():
        own = arguments.get(name, {})
        entries[name] = Entry(agent, own, numbers[name] if name in numbers else _own_episodes(agent, own))
    if tasks and "task" in settings:
        raise SettingError("--task and --tasks both name tasks: give one of them.")
    asked = _tasks(tasks) if tasks else (OWN_TASK if "pool" in settings else settings.pop("task", EnvConfig().task),)
    _bench(out, BenchPlan(settings, entries, asked, seeds), "bench", resume, workers, cluster)


@app.command()
@_with_env_options
def ablate(
    settings: dict[str, Any],
    out: Out,
    agent: Annotated[str, typer.Option(help="Who learns to select; see `raise-env info`.")] = "raise_fork",
    agent_args: AgentArguments = "",
    episodes: Episodes = None,
    seeds: Seeds = ABLATION_SEEDS,
    workers: Workers = None,
    cluster: Cluster = None,
    resume: Resume = False,
) -> None:
    """Let an agent learn and act with all features, then without each block of them: what each is worth."""
    from .benchmark import ablation
    from .catalogue import learning_episodes

    task = settings.pop("task", EnvConfig().task)
    arguments = _pairs(agent_args, "--agent-args")
    number = learning_episodes(agent, arguments) if episodes is None else episodes
    plan = ablation(settings, agent, arguments, episodes=number, num_seeds=seeds, task=task)
    _bench(out, plan, "ablate", resume, workers, cluster)


@app.command()
@_with_env_options
def audit(
    settings: dict[str, Any],
    out: Out,
    agents: Annotated[str, typer.Option(help="Agents, with commas between; random is always there.")] = AUDIT_AGENTS,
    tasks: Annotated[str, typer.Option(help=TASKS_HELP, show_default=False)] = "",
    seeds: Seeds = AUDIT_SEEDS,
    episodes: Annotated[
        str,
        typer.Option(help="Further numbers of episodes, with commas between, instead of twice each agent's own."),
    ] = "",
    noise_runs: Annotated[
        int | None, typer.Option(help="Runs of each source of noise, instead of ten.", min=2, show_default=False)
    ] = None,
    workers: Workers = None,
    resume: Resume = False,
) -> None:
    """Measure how far results can be trusted: noise, dev against test, rewards, and placebos that must not learn."""
    from .audit import AuditPlan
    from .audit import audit as run_audit
    from .findings import audit_tables
    from .job import OWN_TASK, Entry

    if tasks and "task" in settings:
        raise SettingError("--task and --tasks both name tasks: give one of them.")
    asked = _tasks(tasks) if tasks else (OWN_TASK if "pool" in settings else settings.pop("task", EnvConfig().task),)
    named = _named_agents(agents)
    entries = {name: Entry(agent, {}, _own_episodes(agent, {})) for name, agent in named.items()}
    lengths = [int(_number("episodes", text, int, "whole numbers with commas between")) for text in _names(episodes)]
    if any(number < 1 for number in lengths):
        raise SettingError(f"--episodes is {episodes!r}; expected numbers of at least 1.")
    plan = AuditPlan(settings, entries, tuple(lengths) if lengths else None, asked, seeds)
    if noise_runs is not None:
        plan = dataclasses.replace(plan, num_noise=noise_runs)
    found = run_audit(out, plan, resume=resume, workers=workers, reporter=TerminalReporter())
    _echo(f"\n{audit_tables(found)}\n\nAll numbers: {out / 'audit.json'}")
    if found["missing"] and not any(spread["num_runs"] for task in found["noise"].values() for spread in task.values()):
        raise typer.Exit(EXIT_NO)


def _bench(out: Path, plan: Any, command: str, resume: bool, workers: int | None, cluster: str | None) -> None:
    """Carry a benchmark's plan out and print its tables.

    Raises:
        Exit: No run came to a result.
    """
    from .benchmark import bench as run_bench
    from .summary import text_tables

    summary = run_bench(
        out, plan, command=command, resume=resume, workers=workers, cluster=cluster, reporter=TerminalReporter()
    )
    _echo(f"\n{text_tables(summary)}\n")
    num_runs = len(summary["tasks"]) * len(summary["agents"]) * len(summary["seeds"])
    missing = summary["missing"]
    for run in missing[:MISSING_SHOWN]:
        _echo(f"missing: {run['task']}, {run['agent']}, seed {run['seed']}: {run['reason'].splitlines()[0]}")
    if len(missing) > MISSING_SHOWN:
        _echo(f"missing: {len(missing) - MISSING_SHOWN} more")
    _echo(f"{num_runs - len(missing)} of {num_runs} runs. All numbers: {out / 'summary.json'}")
    if len(missing) == num_runs:
        raise typer.Exit(EXIT_NO)


def _show_table(folder: Path) -> None:
    """Print the table of a benchmark's folder as Markdown.

    Raises:
        RecordError: It is not finished, or its summary.json cannot be read.
    """
    from .run_folder import read_json
    from .summary import markdown_tables

    path = folder / "summary.json"
    if not path.exists():
        found = "the benchmark is not finished" if (folder / "run.json").exists() else "there is no benchmark"
        raise RecordError(f"{path} is not there: {found}. Go on with it with --resume, or name a finished folder.")
    summary = read_json(path)
    try:
        _echo(markdown_tables(summary))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise RecordError(f"{path}: not what `bench` wrote ({error!r}); make it anew with --resume.") from error


def _tasks(text: str) -> tuple[str, ...]:
    """Return the tasks that are named, each once.

    Raises:
        SettingError: None is.
    """
    from .benchmark import SUITE

    if not _names(text):
        raise SettingError(f"--tasks is {text!r}; expected names of embedded tasks, with commas between.")
    named = [SUITE if name == SUITE_NAME else (name,) for name in _names(text)]
    return tuple(dict.fromkeys(task for tasks in named for task in tasks))


def _agent_arguments(texts: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return what AGENT:NAME=VALUE,... says, by agent; an agent's own name may hold colons."""
    arguments: dict[str, dict[str, Any]] = {}
    for text in texts:
        meant = max((name for name in names if text.startswith(f"{name}:")), key=len, default=None)
        if meant is None:
            raise SettingError(
                f"--agent-args is {text!r}; expected AGENT:NAME=VALUE,... with one of the agents {', '.join(names)}."
            )
        arguments.setdefault(meant, {}).update(_pairs(text.removeprefix(f"{meant}:"), "--agent-args"))
    return arguments


def _named_agents(text: str) -> dict[str, str]:
    """Return agents by their names in the results, of NAME=AGENT, or AGENT for both, with commas between.

    Raises:
        SettingError: There are none, or two have one name.
    """
    named: dict[str, str] = {}
    for part in _names(text):
        name, equals, agent = part.partition("=")
        agent = agent if equals else part
        if named.setdefault(name, agent) != agent:
            raise SettingError(
                f"--agents names {named[name]} and {agent} both {name!r}: give one of them another name."
            )
    if not named:
        raise SettingError(f"--agents is {text!r}; expected names of agents, with commas between.")
    return named


def _episodes(texts: Sequence[str], named: Mapping[str, str]) -> dict[str, int]:
    """Return for how many episodes agents learn, for those that it is said of; a learned selector only if named.

    Args:
        texts: What was given, each N or NAME=N.
        named: Agents by their names in the results.

    Raises:
        SettingError: One says something else, or names none of the agents.
    """
    for_all: int | None = None
    own: dict[str, int] = {}
    for text in texts:
        name, equals, number = text.rpartition("=")
        if equals and name not in named:
            raise SettingError(f"--episodes names {name!r}; expected one of the agents {', '.join(named)}.")
        count = int(_number("episodes", number, int, "N or AGENT=N, N a whole number"))
        if count < 0:
            raise SettingError(f"--episodes is {text!r}; expected a number of at least 0.")
        if equals:
            own[name] = count
        else:
            for_all = count
    learners = [name for name, agent in named.items() if not agent.startswith("selector:")]
    return {**({} if for_all is None else dict.fromkeys(learners, for_all)), **own}


def _own_episodes(agent: str, arguments: dict[str, Any]) -> int:
    from .catalogue import learning_episodes

    try:
        return learning_episodes(agent, arguments)
    except RaiseEnvError:
        return 0  # the plan's check names this agent together with all others that are at fault


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Option("--model", help='What is scored: a folder, a hub id, or "tiny".', metavar="MODEL")
    ],
    data: Annotated[str, typer.Option("--data", help="File or folder of rows, or a hub id.", metavar="FILE")],
    adapter: Annotated[
        str | None, typer.Option(help="Folder of a PEFT LoRA adapter on the model.", metavar="DIR", show_default=False)
    ] = None,
    metric: Annotated[
        str, typer.Option(help="Names of dev scores, with commas between, instead of all that the rows allow.")
    ] = "",
    template: Annotated[str | None, typer.Option(help=_setting_help()["template"], show_default=False)] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a row, instead of the model's positions.", min=1, show_default=False)
    ] = None,
    columns: Annotated[str, typer.Option(help=_setting_help()["columns"], show_default=False)] = "",
    choice_form: Annotated[str, typer.Option(help=_setting_help()["choice_form"])] = EnvConfig().choice_form,
    skip_empty: Annotated[bool, typer.Option("--skip-empty", help=_setting_help()["skip_empty"])] = False,
    num_rows: Annotated[
        int | None, typer.Option(help="Score a fixed random part of so many rows.", min=1, show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help=_setting_help()["device"])] = EnvConfig().device,
    dtype: Annotated[str, typer.Option(help=_setting_help()["dtype"])] = EnvConfig().dtype,
    out: Annotated[
        Path | None, typer.Option(help="File to write the numbers to, as JSON.", metavar="FILE", show_default=False)
    ] = None,
) -> None:
    """Score a model, with an adapter or without, on a file of rows; the shares are lm-eval's."""
    from raise_env.files import write_json

    from .evaluate import ScorePlan, score_lines, score_model

    plan = ScorePlan(
        model=model,
        data=data,
        adapter=adapter,
        metrics=_names(metric),
        template=template,
        max_length=max_length,
        columns=_columns(columns),
        choice_form=choice_form,
        skip_empty=skip_empty,
        num_rows=num_rows,
        device=device,
        dtype=dtype,
    )
    report = score_model(plan)
    for line in score_lines(report):
        _echo(line)
    if out is not None:
        try:
            write_json(out, report)
        except OSError as error:
            raise OutputError(f"--out {str(out)!r} cannot be written: {error.strerror}. Name another file.") from error


@app.command()
def split(
    data: Annotated[str, typer.Option("--data", help="File or folder of rows, or a hub id.", metavar="FILE")],
    out: Out,
    dev: Annotated[int, typer.Option(help="Rows of dev.jsonl, which the reward is measured on.", min=1)] = 200,
    test: Annotated[int, typer.Option(help="Rows of test.jsonl, for the report alone.", min=1)] = 500,
    seed: Seed = 0,
    columns: Annotated[str, typer.Option(help=_setting_help()["columns"], show_default=False)] = "",
    skip_empty: Annotated[bool, typer.Option("--skip-empty", help=_setting_help()["skip_empty"])] = False,
) -> None:
    """Put rows at random into a pool, a dev and a test set; equal rows stay together."""
    from raise_env.reading import check_columns, read_pool

    from .split import write_split

    config = EnvConfig.from_kwargs({"pool": data, "dev": data, "columns": _columns(columns)})
    rows = read_pool(data, skip_empty=skip_empty, columns=config.columns)
    check_columns(config.columns, rows)
    if rows.num_skipped:
        _echo(f"Rows skipped, as they have an empty prompt or response: {rows.num_skipped:,}.")
    for path, count in write_split(rows, {"dev": dev, "test": test}, seed, out).values():
        _echo(f"{path}: {count:,} rows")


@app.command()
def validate(
    files: Annotated[
        list[Path],
        typer.Argument(help="Files of episode records, one a line, or folders of `bench`.", metavar="FILE..."),
    ],
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="How far a number may be from the recorded one, as a share of the score, instead of 0.002.",
            min=0,
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to replay.")] = "auto",
    reward: Annotated[
        str | None, typer.Option(help="The reward function that records may run.", metavar="module:function")
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(help="A file, folder, or hub id that records may open. Repeatable.", metavar="NAME"),
    ] = None,
    workers: Workers = None,
) -> None:
    """Replay episode records and compare every reward and score; name the first that differs.

    In a folder of `bench`, each line of results must also say what its record says.
    """
    from raise_env.record import TOLERANCE

    from .validation import by_record, check_cost, check_results, is_of_audit, read_bench, read_recorded, replay_all

    recorded, num_lines = [], 0
    lines_of: dict[str, Mapping[str, Any]] = {}
    for path in files:
        if not path.is_dir():
            recorded += read_recorded(path)
            continue
        lines, own = read_bench(path)
        for (task, agent, seed), fault in check_results(lines, own, of_audit=is_of_audit(path)).items():
            _echo(f"{path / 'results.jsonl'}, {task}, {agent}, seed {seed}: {fault}")
            raise typer.Exit(EXIT_NO)
        recorded, num_lines = recorded + own, num_lines + len(lines)
        lines_of |= by_record(lines, own)
    limit = TOLERANCE if tolerance is None else tolerance
    distances, of_bench = [], any(path.is_dir() for path in files)
    replays = replay_all(
        recorded,
        lines_of,
        tolerance=limit,
        device=device,
        reward=reward,
        allowed=allow or (),
        workers=workers,
        in_one_thread=of_bench,
    )
    with TerminalReporter().task("replaying", len(recorded)) as show:
        for done, replayed in enumerate(replays, start=1):
            line = lines_of.get(replayed.recorded.where)
            wrong = replayed.difference or (None if line is None else check_cost(line, replayed))
            if wrong is not None:
                _echo(f"{replayed.recorded}: {wrong}")
                raise typer.Exit(EXIT_NO)
            distances.append(replayed.distance)
            show(done)
    _echo(f"{len(recorded)} episodes replayed: {_how_equal(distances, limit)}.")
    if of_bench:
        _echo(f"{num_lines} lines of results say what their records say.")


def _how_equal(distances: Sequence[float], limit: float) -> str:
    """Return how near replays came whose largest differences are given, none of them beyond what is tolerated."""
    exact = distances.count(0.0)
    others = len(distances) - exact
    if not others:
        return "equal to the bit"
    return (
        f"{exact} equal to the bit, {others} within {limit:g} of each score and a few rows of each share of right "
        f"answers (largest difference {max(distances):.1e})"
    )


@app.command()
def leaderboard(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `bench` wrote.", metavar="DIR...")],
    tasks: Annotated[str, typer.Option(help="Tasks that count, with commas between.")] = SUITE_NAME,
    seeds: Seeds = BENCH_SEEDS,
    replays: Annotated[
        int | None,
        typer.Option(
            help="Records of each agent to replay, drawn at random; all by default.", min=0, show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="What these are drawn from.", min=0)] = 0,
    workers: Workers = None,
) -> None:
    """Check what `bench` wrote against its records, and rank the agents whose runs stand, as Markdown."""
    from .leaderboard import leaderboard as ranked
    from .leaderboard import markdown_board

    board = ranked(
        folders, _tasks(tasks), seeds, replays=replays, seed=seed, workers=workers, reporter=TerminalReporter()
    )
    _echo(markdown_board(board))
    if board.unranked:
        raise typer.Exit(EXIT_NO)


@app.command()
def info() -> None:
    """Show versions, devices, environment ids, tasks, agents, cache folder and its size."""
    import torch

    from raise_env.config import ENV_IDS
    from raise_env.record import versions
    from raise_env.store import cache_folder
    from raise_env.tiny.task import TASKS

    from .catalogue import AGENTS
    from .runs import processor_name

    folder = cache_folder(None)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    devices = [f"cpu ({processor_name()}, {torch.get_num_threads()} threads)"]
    devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    lines = {
        "raise-env": __version__,
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items() if name != "raise-env"),
        "devices": ", ".join(devices),
        "environments": ", ".join(ENV_IDS),
        "tasks": ", ".join(TASKS),
        "agents": ", ".join([*AGENTS, "sb3:CLASS", "placebo:AGENT", "selector:DIR", "my_module:name"]),
        "cache": f"{folder} ({size / 1e6:.1f} MB)",
    }
    for name, value in lines.items():
        _echo(f"{name:<13} {value}")


def _show(report: dict[str, Any], out: Path) -> None:
    """Print what came of a run.

    Raises:
        Exit: Every final run diverged.
    """
    from .report import format_table, results_table

    _echo("")
    _echo(format_table(*results_table(report)))
    _echo("")
    _echo(report["headline"])
    _echo(f"Report: {out / 'report.html'}")
    if not any(report["curves"].values()):  # which are of the runs that did not diverge
        raise typer.Exit(EXIT_NO)
