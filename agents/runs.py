"""What `train`, `demo` and `finetune` do: learn a selector, make the final runs, write the folder.

A run's folder is its memory. Learning is kept after every episode (by agents with `save_progress`) or after every step
(by all others), and every final run after its end, so that what was done is on disk whatever happens, and `resume` goes
on from there with the same numbers.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from raise_env import EnvConfig, RaiseSelectEnv
from raise_env.errors import SettingError
from raise_env.features import LoadingProgress
from raise_env.files import append_line, held, replaced_folder, write_json, write_text
from raise_env.lazy import FeatureUse
from raise_env.pool import Instruction, Pool
from raise_env.record import EpisodeRecord
from raise_env.rewards import needs_generation

from . import contrast
from .base import Agent
from .baselines import require_all_features
from .catalogue import (
    agent_name,
    learning_episodes,
    load_selector,
    make_agent,
    reward_digest,
    selector_digest,
    selector_folder,
    source_digest,
)
from .checkpoints import Checkpoints
from .feature_view import AUXILIARY, FeatureView
from .journal import Journal, JournaledEnv
from .learned import Selector
from .model_card import write_model_card
from .page import divergences_told
from .report import MAX_ROWS, Selection, WantedText, write_report
from .rollout import agents_code, run_episode
from .run_folder import RunFolder, whole_records

__all__ = [
    "FINAL_SEED",
    "REPORT_VERSION",
    "Clock",
    "Plan",
    "Reporter",
    "Silent",
    "agents_of",
    "as_learned",
    "check_agent",
    "check_agents",
    "check_inputs",
    "check_selectors",
    "final_environment",
    "final_scores",
    "finetune",
    "hardware_name",
    "parts_shown",
    "phi_tokens",
    "processor_name",
    "train",
    "without_test",
]

REPORT_VERSION = 1

#: Epochs over the whole pool, forward and backward, that make one Phi (Lv et al. 2025, section 5).
PHI_EPOCHS = 3

#: What sets the final runs' seeds apart from those of learning.
FINAL_SEED = 1000


class Reporter(Protocol):
    """Where progress is shown; the command line has one with bars, the library's default is silent."""

    def task(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Begin a task of so many steps; what is given takes the number done."""


class Silent:
    """Shows nothing."""

    def task(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Begin a task that nobody sees."""
        del name, total
        return nullcontext(lambda _done: None)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run shall do.

    Attributes:
        settings: The environment's keywords.
        agent: The selector's name.
        agent_settings: Its own settings.
        episodes: Episodes to learn for; None: the agent's own number, 0 where it does not learn.
        seed: What everything is drawn from.
        compare: Agents that make the same final runs.
        num_runs: Final runs of each agent, over the same seeds; the first makes the adapter that is kept.
        merge: Whether the base model with that adapter merged in is written too.

    Raises:
        RaiseEnvError: The agent cannot be made, where it has to say for how many episodes it learns.
        SettingError: Results of two of the agents would have one name.
    """

    settings: dict[str, Any]
    agent: str = "raise_fork"
    agent_settings: dict[str, Any] = field(default_factory=dict)
    episodes: int | None = None
    seed: int = 0
    compare: tuple[str, ...] = ("random",)
    num_runs: int = 3
    merge: bool = False

    def __post_init__(self) -> None:
        by_name: dict[str, str] = {}
        for name in self.names:
            other = by_name.setdefault(agent_name(name), name)
            if other != name:
                raise SettingError(
                    f"{other} and {name} would both be listed as {agent_name(name)!r}, and only the first would run: "
                    f"leave one of them out. bench compares them by names of their own: --agents a={other},b={name}."
                )
        if self.episodes is None:
            object.__setattr__(self, "episodes", learning_episodes(self.agent, self.agent_settings))

    def to_json(self) -> dict[str, Any]:
        """Return the plan as run.json keeps it; of what has learned, and of one's own code, also which it is.

        Raises:
            RaiseEnvError: A selector cannot be read, or there is no such agent or reward.
        """
        reward = str(self.settings.get("reward", "loss"))
        digests: dict[str, dict[str, str | None]] = {
            "selectors": {name: selector_digest(name, self.settings_of(name)) for name in self.names},
            "sources": {**{name: source_digest(name) for name in self.names}, reward: reward_digest(reward)},
        }
        known = {kind: {name: own for name, own in named.items() if own is not None} for kind, named in digests.items()}
        return {
            **{kind: named for kind, named in known.items() if named},
            "settings": self.settings,
            "agent": self.agent,
            "agent_settings": self.agent_settings,
            "episodes": self.episodes,
            "seed": self.seed,
            "compare": list(self.compare),
            "num_runs": self.num_runs,
            "merge": self.merge,
        }

    def settings_of(self, name: str) -> dict[str, Any]:
        """Return an agent's own settings; those that are compared have none."""
        return self.agent_settings if name == self.agent else {}

    @property
    def names(self) -> list[str]:
        """The agents, the one that learns first."""
        return list(dict.fromkeys([self.agent, *self.compare]))

    @property
    def final_seeds(self) -> list[int]:
        """The seeds of the final runs."""
        return [FINAL_SEED * (self.seed + 1) + run for run in range(self.num_runs)]


def train(
    out: str | Path, plan: Plan, *, command: str = "train", resume: bool = False, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Learn a selector, make the final runs with it and with what it is compared with, and write the folder.

    Args:
        out: The folder; spec and content are in docs/files.md.
        plan: What to do.
        command: The name of what is done, for run.json.
        resume: Go on with a folder that was begun with the same plan.
        reporter: Where progress is shown.

    Returns:
        What report.json holds.

    Raises:
        RaiseEnvError: A setting, a file or a model cannot be used, or the folder cannot be written.
    """
    folder = Path(out)
    reporter = reporter or Silent()
    agents = agents_of(plan)
    env = RaiseSelectEnv(**plan.settings)
    check_inputs(env.config)
    check_agents(env.config, plan, agents)
    check_selectors(env.config, agents.values())
    with held(folder):
        run = RunFolder.open(folder, command, plan.to_json(), resume)
        run.check_versions()
        with reporter.task("loading model, data and features", 1) as show, parts_shown(reporter) as progress:
            env.load(progress)
            use = FeatureUse(env.assets.features)
            env.reset(seed=plan.seed)
            show(1)
        run.check_content(env.assets.content)
        with run:
            device = env.assets.learner.base.device.type  # type: ignore[attr-defined]
            run.note(content=env.assets.content, data=env.assets.counts, device=device)
            learned = _learn(run, plan, env, agents[plan.agent], use, reporter)
            for name in plan.names:
                agent = learned if name == plan.agent else agents[name]
                _final_runs(run, plan, env, agent, name, use, reporter)
            return _write_results(run, plan, env, learned, use)


def agents_of(plan: Plan) -> dict[str, Agent]:
    """Return the plan's agents by name, made anew.

    Raises:
        RaiseEnvError: As `make_agent`.
    """
    return {name: make_agent(name, plan.settings_of(name)) for name in plan.names}


@contextmanager
def parts_shown(reporter: Reporter) -> Iterator[LoadingProgress]:
    """Give what is to be told of the parts of a load; each is a task of its own, from its first number on."""
    with ExitStack() as tasks:
        shown: dict[str, Callable[[int], None]] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in shown:
                tasks.close()  # one after the other
                shown[what] = tasks.enter_context(reporter.task(what, total))
            shown[what](done)

        yield show


def finetune(
    out: str | Path,
    selector: str | Path,
    settings: dict[str, Any],
    *,
    seed: int = 0,
    merge: bool = False,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Fine-tune once with a learned selector choosing every batch, and write the folder.

    Raises:
        RaiseEnvError: As `train`; or the selector cannot be read.
    """
    agent = f"selector:{selector}"
    settings = as_learned(settings, agent)
    plan = Plan(settings, agent=agent, episodes=0, seed=seed, compare=(), num_runs=1, merge=merge)
    return train(out, plan, command="finetune", resume=resume, reporter=reporter)


def phi_tokens(env: RaiseSelectEnv) -> int:
    """Return one Phi in token forwards: the whole pool, forward and backward, three epochs."""
    return PHI_EPOCHS * 3 * env.assets.pool_tokens


def without_test(env: RaiseSelectEnv) -> RaiseSelectEnv:
    """Return an environment that shares all with the one given but for the test set: it is what agents learn in.

    Nothing is to be learned from that set, and to score it after each episode may cost more than learning does.
    """
    return RaiseSelectEnv(env.render_mode, env.assets.without_test(), **env.config.to_kwargs())


def final_environment(env: RaiseSelectEnv, agent: Agent, share: float = 1.0) -> RaiseSelectEnv:
    """Return the environment of an agent's final runs: the one given, unless the agent's `run_settings` ask for others.

    Model, data and features are shared as far as those settings let them.

    Args:
        env: The environment of learning.
        agent: Who acts.
        share: How many times the environment's rows the pool has, where it holds a sample of them.
    """
    run_settings = getattr(agent, "run_settings", None)
    if run_settings is None:
        return env
    num_rows = round(share * sum(len(ids) for ids in env.assets.members))
    return env.variant(**run_settings(env.config, num_rows))


def _learning_steps(agent: Agent, env: RaiseSelectEnv) -> int:
    """Return the steps of one of the agent's learning episodes."""
    own = getattr(agent, "learning_steps", None)
    return env.config.horizon if own is None else int(own(env.config))


def check_inputs(config: EnvConfig) -> None:
    """Find bad input in a second or two: before anything is shown or written, and before features are computed.

    Raises:
        RaiseEnvError: A model's folder or a data file cannot be used.
    """
    from raise_env.adapter_files import starting_form
    from raise_env.assets import load_data
    from raise_env.base_model import load_config

    for model in {config.model, config.auxiliary_model or config.model}:
        load_config(model)
    starting_form(config)
    load_data(config)


def check_agents(config: EnvConfig, plan: Plan, agents: Mapping[str, Agent]) -> None:
    """Refuse agents that cannot be used so, and not when their turn comes: that may be after days of learning.

    Each says by its `check` what it cannot do, and by its `run_settings` what its final runs are made with.

    Args:
        config: The environment's settings.
        plan: What the agents are to do.
        agents: Them by name.

    Raises:
        SettingError: One of them cannot.
        RaiseEnvError: The pool cannot be read, or lacks what one needs.
    """
    from raise_env.assets import load_data

    if plan.episodes and not hasattr(agents[plan.agent], "learn"):
        raise SettingError(
            f"agent {plan.agent!r} does not learn, and episodes is {plan.episodes}: leave that out, or name an agent "
            "that does."
        )
    pool = load_data(config).pool
    for name, agent in agents.items():
        episodes = (plan.episodes or 0) if name == plan.agent else 0
        try:
            check_agent(name, agent, config, pool, episodes)
        except SettingError as error:
            raise SettingError(f"agent {name!r}: {error}") from error


def check_agent(name: str, agent: Any, config: EnvConfig, pool: Pool, episodes: int) -> None:
    """Refuse an agent that cannot be used so, as it says itself.

    Args:
        name: What it is called, should its own code fail.
        agent: The agent.
        config: The environment's settings.
        pool: The pool that it is to choose from.
        episodes: How many it is to learn for; 0 for one that does not learn.

    Raises:
        SettingError: It cannot.
        RaiseEnvError: The pool lacks what it needs, or its own code failed.
    """
    with agents_code(f"agent {name!r}, check"):
        if hasattr(agent, "check"):
            agent.check(config, pool, episodes)
        if hasattr(agent, "run_settings"):
            require_all_features(config)  # else it cannot be told how many rows can be offered
            EnvConfig.from_kwargs({**config.to_kwargs(), **agent.run_settings(config, len(pool))})


def check_selectors(config: EnvConfig, agents: Iterable[Agent]) -> None:
    """Refuse selectors that learned on other features now, and not after these were computed.

    Raises:
        SettingError: One of them did.
        RaiseEnvError: The auxiliary model or the pool cannot be read.
    """
    views = [view for agent in agents if isinstance(view := getattr(agent, "view", None), FeatureView)]
    if views:
        from raise_env.assets import auxiliary_of, load_data

        here, pool = auxiliary_of(config), load_data(config).pool.content_hash
        for view in views:
            view.check(here, config, pool)


def as_learned(settings: dict[str, Any], agent: str) -> dict[str, Any]:
    """Return settings under which features are computed as those were that a selector, "selector:DIR", learned on.

    Where something else is asked for, or another model than the selector's is there, `check_selectors` will tell.
    Settings of other agents are returned as they are.

    Raises:
        RecordError: The folder holds no selector.
    """
    from raise_env.assets import auxiliary_of

    kind, _, folder = agent.partition(":")
    view = getattr(load_selector(folder), "view", None) if kind == "selector" else None
    if not isinstance(view, FeatureView) or view.adapter is None:
        return settings
    if settings.get("auxiliary_adapter") or settings.get("auxiliary_updates") not in (None, view.auxiliary["updates"]):
        return settings
    config = EnvConfig.from_kwargs(settings)
    check_inputs(config)
    if auxiliary_of(config)["model"] != view.auxiliary.get("model"):
        return settings
    own = {name: value for name, value in settings.items() if name != "auxiliary_updates"}
    return {**own, "auxiliary_adapter": str(selector_folder(folder) / AUXILIARY)}


def _learn(run: RunFolder, plan: Plan, env: RaiseSelectEnv, agent: Agent, use: FeatureUse, reporter: Reporter) -> Agent:
    """Return the agent once it has learned; the selector is in the folder afterwards."""
    learn, episodes = getattr(agent, "learn", None), plan.episodes or 0
    if learn is None or episodes == 0:
        return agent
    env = without_test(env)
    checkpoints, done = Checkpoints(run.folder / "learning"), 0
    # A selector that learned before counts on from there.
    before = len(agent.episode_returns) if isinstance(agent, Selector) else 0
    keeps_progress: Any = agent if hasattr(agent, "load_progress") else None
    if keeps_progress:
        number, found = checkpoints.newest()
        if found is not None:
            keeps_progress.load_progress(found)
            done = number - before
    else:
        env = JournaledEnv(env, Journal(run.folder / "learning" / "steps.jsonl"))
    env.reset(seed=plan.seed)
    with reporter.task(f"learning to select ({plan.agent})", episodes) as show:
        show(done)
        clock, last = Clock(env), (1, (0.0, 0, 0))

        def episode_done(number: int, total: float) -> None:
            nonlocal last
            last = number - before, clock.lap()
            run.state.setdefault("episode_returns", [])[last[0] - 1 :] = [total]
            run.book("learning", last[0], *last[1], use.groups())
            # Last: what is booked and then lost is booked once more, with the same numbers.
            if keeps_progress:
                checkpoints.save(number, keeps_progress.save_progress)
            show(min(last[0], episodes))  # an algorithm that counts steps may see more, shorter episodes

        if episodes > done:
            with agents_code(f"agent {plan.agent!r}, learning"):
                learn(env, episodes - done, seed=plan.seed, progress=episode_done)
            # An algorithm that counts steps may go on after the last episode that came to its end.
            number, cost = last
            seconds, tokens, divergences = (own + rest for own, rest in zip(cost, clock.lap(), strict=True))
            run.book("learning", number, seconds, int(tokens), int(divergences), use.groups())
    if hasattr(agent, "save"):
        agent.save(run.folder / "selector")
    return agent


class Clock:
    """Seconds, token forwards and episodes that diverged since the last lap."""

    def __init__(self, env: RaiseSelectEnv) -> None:
        self._ledger = env.assets.learner.ledger
        self._before = self._now()

    def lap(self) -> tuple[float, int, int]:
        """Return the three, and begin the next lap."""
        before, self._before = self._before, self._now()
        seconds, tokens, divergences = (now - then for now, then in zip(self._before, before, strict=True))
        return seconds, int(tokens), int(divergences)

    def _now(self) -> tuple[float, int, int]:
        return time.perf_counter(), self._ledger.token_forwards, self._ledger.divergences


def _final_runs(
    run: RunFolder, plan: Plan, env: RaiseSelectEnv, agent: Agent, name: str, use: FeatureUse, reporter: Reporter
) -> None:
    short = agent_name(name)
    env = final_environment(env, agent)
    have = {record.seed for record in _finished_records(run.folder) if record.agent == short}
    is_selector = name == plan.agent
    lacks_adapter = is_selector and not (run.folder / "adapter").is_dir()
    horizon = env.config.horizon
    with reporter.task(f"fine-tuning with {short}", horizon * plan.num_runs) as show:
        prepare = getattr(agent, "prepare", None)
        if prepare is not None and (lacks_adapter or not have.issuperset(plan.final_seeds)):
            env.reset(seed=plan.seed)
            clock = Clock(env)
            with agents_code(f"agent {short!r}, preparing"):
                prepare(env, plan.seed)
            run.book(f"preparation/{short}", 1, *clock.lap(), use.groups())
        for index, seed in enumerate(plan.final_seeds):
            keeps_adapter = is_selector and index == 0
            if seed in have and not (keeps_adapter and lacks_adapter):
                continue
            clock = Clock(env)

            def show_step(step: int, before: int = index * horizon) -> None:
                show(before + step)

            record = run_episode(env, agent, seed=seed, name=short, on_step=show_step)
            run.book(f"final/{short}", index + 1, *clock.lap(), use.groups())
            if keeps_adapter:
                _write_outcome(run.folder, env)
            if seed not in have:
                append_line(run.folder / "episodes.jsonl", record.to_json())
        show(horizon * plan.num_runs)


def _finished_records(folder: Path) -> list[EpisodeRecord]:
    """Return the records of the final runs so far; a line torn by a crash is dropped."""
    path = folder / "episodes.jsonl"
    whole = whole_records(path)
    if path.exists():
        write_text(path, "".join(record.to_json() + "\n" for record in whole))
    return whole


def _write_outcome(folder: Path, env: RaiseSelectEnv) -> None:
    """Write what the final run leaves: the rows that it trained on and the adapter."""
    write_text(folder / "selected.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _selected(env)))
    with replaced_folder(folder / "adapter") as beside:
        env.save_adapter(beside)


def _selected(env: RaiseSelectEnv) -> Iterator[dict[str, Any]]:
    """Yield the rows that the episode trained on, with all columns that they came with."""
    chosen = [(step, int(row)) for step, record in enumerate(env.history, start=1) for row in record.selected]
    rows = [env.assets.pool[row].fields for _, row in chosen]
    taken = {column for row in rows for column in row}
    step_name, id_name = _free_name("step", taken), _free_name("pool_id", taken)
    for row, (step, pool_id) in zip(rows, chosen, strict=True):
        yield {**row, step_name: step, id_name: pool_id}


def _free_name(name: str, taken: Container[str]) -> str:
    """Return the name, with `raise_` before it as often as the rows have such a column: theirs is never lost."""
    while name in taken:
        name = f"raise_{name}"
    return name


def _write_results(run: RunFolder, plan: Plan, env: RaiseSelectEnv, agent: Agent, use: FeatureUse) -> dict[str, Any]:
    records = _finished_records(run.folder)
    report = {
        "schema_version": REPORT_VERSION,
        "base": _base_scores(env),
        "agents": {agent_name(name): _agent_scores(records, agent_name(name), env) for name in plan.names},
        "cost": _cost(run, plan, env, use),
        "curves": {agent_name(name): _curves(records, agent_name(name)) for name in plan.names},
        "diverged": _divergences(run, plan, records),
        "learning": {
            "episode_returns": run.state.get("episode_returns", []),
            "num_steps": _learning_steps(agent, env),
        },
        "settings": {**plan.to_json(), **env.config.to_kwargs()},
        "versions": run.state["versions"],
        "machine": _machine(env),
        "date": run.state["start"][:10],
    }
    report["headline"] = headline(report, plan, env, records)
    report["verdict"] = _verdict(report["agents"], agent_name(plan.agent), _metric(report, plan)).strip()
    write_json(run.folder / "report.json", report)
    first = next(r for r in records if r.agent == agent_name(plan.agent))
    write_report(run.folder, report, [json.loads(r.to_json()) for r in records], _selection(first, env, agent))
    _write_weights(run.folder, plan, report, first, env, getattr(agent, "batch_size", None))
    return report


def _write_weights(
    folder: Path,
    plan: Plan,
    report: Mapping[str, Any],
    record: EpisodeRecord,
    env: RaiseSelectEnv,
    batch_size: int | None,
) -> None:
    """Write the card of the adapter, and where it is asked for the whole model with the adapter merged in."""
    write_model_card(folder / "adapter" / "README.md", report, record, env, batch_size)
    if plan.merge:
        from raise_env.export import save_merged

        with replaced_folder(folder / "merged") as beside:
            save_merged(env.config, folder / "adapter", beside)
            write_model_card(beside / "README.md", report, record, env, batch_size, is_merged=True)


def _divergences(run: RunFolder, plan: Plan, records: Sequence[EpisodeRecord]) -> dict[str, Any]:
    """Return how often the loss stopped being finite: in learning, and in each agent's final runs."""
    final = Counter(record.agent for record in records if record.diverged)
    in_learning = run.state.get("divergences", {}).get("learning", 0)
    return {"learning": in_learning, "final": {agent_name(name): final[agent_name(name)] for name in plan.names}}


def _base_scores(env: RaiseSelectEnv) -> dict[str, float]:
    env.reset(seed=0)
    scores = {"dev_loss": env.assets.base_evaluation.loss}
    if env.assets.has_test and (test := env.evaluate("test")).is_finite:
        final = {f"test_{name}": value for name, value in test.scores().items()}
        scores |= {name: value for name, value in _test_scores(final, env).items() if value is not None}
    return scores


def _curves(records: Sequence[EpisodeRecord], name: str) -> list[list[float]]:
    """Return the dev scores of an agent's final runs; one that diverged ends with the score of an earlier step."""
    return [record.dev_scores for record in records if record.agent == name and not record.diverged]


def _agent_scores(records: Sequence[EpisodeRecord], name: str, env: RaiseSelectEnv) -> dict[str, list[float | None]]:
    own = [final_scores(record, env) for record in records if record.agent == name]
    return {metric: [scores[metric] for scores in own] for metric in own[0]}


def final_scores(record: EpisodeRecord, env: RaiseSelectEnv) -> dict[str, float | None]:
    """Return what a final run came to, by the names of report.json; None for a run that diverged."""
    scores: dict[str, float | None] = {}
    if env.config.reward == "loss":
        scores["dev_loss"] = None if record.diverged else -record.dev_scores[-1]
    else:
        scores["dev_score"] = None if record.diverged else record.dev_scores[-1]
    return {**scores, **_test_scores(record.final, env)} if env.assets.has_test else scores


def _test_scores(final: Mapping[str, float], env: RaiseSelectEnv) -> dict[str, float | None]:
    """Return what is reported of the test set; the same names for every run, whatever became of it."""
    rows = env.assets.learner.splits["test"]  # type: ignore[attr-defined]
    has_choices, reward = rows.choices is not None, env.config.reward
    names = {"test_loss": "test_loss"}
    # Of a long free answer no word-for-word match can be expected: a column of zeros would only puzzle.
    if env.config.is_embedded or has_choices or needs_generation(reward):
        names["test_accuracy"] = "test_accuracy" if has_choices else "test_exact_match"
    if has_choices:
        names |= {name: name for name in ("test_accuracy_norm", "test_choice_probability")}
    if needs_generation(reward) and rows.questions:
        names["test_flexible_match"] = "test_flexible_match"
    return {name: final.get(source) for name, source in names.items()}


def _cost(run: RunFolder, plan: Plan, env: RaiseSelectEnv, use: FeatureUse) -> dict[str, dict[str, float]]:
    name = agent_name(plan.agent)
    booked, times = run.state["phi_tokens"], run.state["seconds"]
    tokens = {
        "features": use.num_tokens(run.state.get("feature_groups", {})),
        "preparation": booked.get(f"preparation/{name}", 0),
        "learning": booked.get("learning", 0),
        "final": booked.get(f"final/{name}", 0) // plan.num_runs,
    }
    tokens["total"] = sum(tokens.values())
    seconds = {
        "preparation": times.get(f"preparation/{name}", 0.0),
        "learning": times.get("learning", 0.0),
        "final": times.get(f"final/{name}", 0.0) / plan.num_runs,
    }
    seconds["total"] = sum(seconds.values())
    return {
        "phi": {n: count / phi_tokens(env) for n, count in tokens.items()},
        "tokens": dict(tokens),
        "seconds": seconds,
    }


def _selection(record: EpisodeRecord, env: RaiseSelectEnv, agent: Agent) -> Selection:
    classes, pool = env.assets.classes, env.assets.pool
    pairs = [(step, row) for step, rows in enumerate(record.actions, start=1) for row in rows]
    rows = [row for _, row in pairs]
    places = contrast.looked_at(pool, rows)
    columns = contrast.columns_of_few_values(pool, places)
    scores = contrast.pool_scores(env, agent, places, record.seed)
    return Selection(
        steps=np.array([step for step, _ in pairs], dtype=np.int64),
        classes=classes[rows],
        pool_ids=np.array(rows, dtype=np.int64),
        num_classes=env.config.num_classes,
        pool_class_counts=np.bincount(classes[classes >= 0], minlength=env.config.num_classes),
        texts=[(step, int(classes[row]), _asked(pool[row]), pool[row].response) for step, row in pairs[:MAX_ROWS]],
        scores=() if scores is None else scores[rows[:MAX_ROWS]].tolist(),
        labels={name: [values[row] for row in rows] for name, values in columns.items()},
        pool_label_counts={name: Counter(values.values()) for name, values in columns.items()},
        are_labels_hidden=env.config.is_embedded,
        traits=contrast.traits(env, np.array(rows, dtype=np.int64), places),
        words=contrast.words_apart(pool, rows, places),
        wanted=((), ()) if scores is None else _wanted(scores, env),
    )


def _asked(row: Instruction) -> str:
    """Return what stands before a row's last response, as people read it."""
    before = [row.system, *(text for exchange in row.earlier for text in exchange), row.prompt]
    return "\n\n".join(text for text in before if text)


def _wanted(scores: np.ndarray, env: RaiseSelectEnv) -> tuple[list[WantedText], list[WantedText]]:
    """Return the rows that the selector wants most and least, as the report shows them."""
    classes, pool = env.assets.classes, env.assets.pool
    most, least = (
        [(row.score, int(classes[row.pool_id]), _asked(pool[row.pool_id]), pool[row.pool_id].response) for row in rows]
        for rows in contrast.wanted(scores, pool)
    )
    return most, least


def headline(report: Mapping[str, Any], plan: Plan, env: RaiseSelectEnv, records: Iterable[EpisodeRecord]) -> str:
    """Return the result in words that need no explanation.

    Args:
        report: What report.json holds.
        plan: What was done.
        env: The environment of learning.
        records: The final runs, some of which may have been made with settings of their own.
    """
    name = agent_name(plan.agent)
    agents, base = report["agents"], report["base"]
    metric = _metric(report, plan)
    kind = "share of right answers" if metric == "test_accuracy" else metric.replace("_", " ")
    show = ("{:.0%}" if metric == "test_accuracy" else "{:.2f}").format
    parts = [f"{show(base[metric])} before"] if metric in base else []
    words = {"random": "with random rows", "oracle": "with the hidden labels known"}
    if name not in words and _acts_by_what_it_learned(plan):
        words[name] = "with the learned selector"
    others = [agent for agent in agents if agent not in ("random", "oracle", name)]
    for agent in dict.fromkeys(["random", *others, name, "oracle"]):
        values = [v for v in agents.get(agent, {}).get(metric, []) if v is not None]
        if values:
            parts.append(f"{show(float(np.mean(values)))} {words.get(agent, f'with {agent}')}")
    sentence = f"{kind.capitalize()}: {', '.join(parts)}."
    budgets = {record.agent: EnvConfig.from_kwargs(record.env["kwargs"]).total_budget for record in records}
    budget = _budget_told(env.config.total_budget, budgets, len(env.assets.pool))
    diverged, seconds = report["diverged"], report["cost"]["seconds"]["learning"]
    told = divergences_told(diverged["learning"], sum(diverged["final"].values()))
    learned = f"; the selector learned in {seconds:.0f} seconds" if seconds else ""
    return sentence + budget + learned + "." + _verdict(agents, name, metric) + told


def _acts_by_what_it_learned(plan: Plan) -> bool:
    """Return whether the plan's agent has learned, here or elsewhere."""
    return bool(plan.episodes) or plan.agent.startswith(("selector:", "sb3:"))


def _budget_told(usual: int, budgets: Mapping[str, int], num_rows: int) -> str:
    """Return what runs trained on, as the beginning of a sentence.

    Args:
        usual: Rows that a run of the environment may train on.
        budgets: Those that runs of each agent may, by its name.
        num_rows: Rows of the pool.
    """
    own = {agent: budget for agent, budget in budgets.items() if budget != usual}
    if own and len(own) == len(budgets):  # nobody made runs of the usual kind
        usual = own.pop(next(iter(own)))
    told = [f" Each run trained on up to {usual:,} of {num_rows:,} instructions"]
    told += [f"with {agent} on up to {budget:,}" for agent, budget in own.items()]
    return ", ".join(told) + ", repeats counted" * (max([usual, *own.values()]) > num_rows)


def _metric(report: Mapping[str, Any], plan: Plan) -> str:
    """Return the score that says most to a reader."""
    agents = report["agents"]
    metrics = [
        m for m in ("test_accuracy", "test_loss", "dev_loss", "dev_score") if m in agents[agent_name(plan.agent)]
    ]
    # Where nobody gets an answer right, shares of right answers say nothing: the loss does.
    if metrics[0] == "test_accuracy" and not any(v for scores in agents.values() for v in scores["test_accuracy"]):
        metrics = metrics[1:]
    return metrics[0]


def _verdict(agents: Mapping[str, Any], name: str, metric: str) -> str:
    if "random" not in agents or name == "random":
        return ""
    sign = -1 if metric.endswith("loss") else 1
    pairs = [(a, b) for a, b in zip(agents[name][metric], agents["random"][metric], strict=False) if None not in (a, b)]
    wins = sum(sign * (a - b) > 0 for a, b in pairs)
    return f" It did better than random rows in {wins} of {len(pairs)} paired runs."


def hardware_name(env: RaiseSelectEnv) -> str:
    """Return the name of what an environment computes on: a GPU's, or the processor's."""
    import torch

    device = env.assets.learner.base.device  # type: ignore[attr-defined]
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def _machine(env: RaiseSelectEnv) -> dict[str, Any]:
    import os

    import torch

    device = env.assets.learner.base.device  # type: ignore[attr-defined]
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }


def processor_name() -> str:
    """Return the processor's name as the system gives it."""
    import platform

    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
