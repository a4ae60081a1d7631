"""Episode records: what was done and what came of it, in plain JSON, replayed and compared.

A record holds the pool ids of every step, not the policy: whoever has the data can check a result without the
agent that got it, and without running anything that came with the record.

A record may be a stranger's. What it asks for is given where the one who replays it has allowed it: files, models and
names of the hub one by one, a function by the same name, sizes up to `FOREIGN_LIMITS`.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .config import TINY, EnvConfig, check_foreign_lora
from .env import RaiseSelectEnv
from .errors import RaiseEnvError, RecordError, SettingError
from .foreign_files import numbered_lines, parse_json
from .rewards import DIVERGENCE_PENALTY, Evaluation, needs_generation, usable_rows
from .row_files import is_readable

__all__ = [
    "ENV_ID",
    "FOREIGN_LIMITS",
    "SCHEMA_VERSION",
    "TOLERANCE",
    "Difference",
    "EpisodeRecord",
    "Replay",
    "made_again",
    "read_records",
    "replay",
    "versions",
]

SCHEMA_VERSION = 1
ENV_ID = "RaiseSelect-v0"

#: How far a replayed number may be from the recorded one, as a share of the score. On the same machine it is equal to
#: the bit. Another processor adds the same numbers in another order, and each update carries the difference on: between
#: an Intel and an AMD processor at most 4e-4 of the score in 81 episodes of 30 to 60 steps (docs/results/suite.md).
TOLERANCE = 2e-3

#: Early there is little to carry on: the score before the first step may differ by this part of the tolerance, each
#: later one by ten times as much as the one before, until it is the whole.
_FIRST_PART, _GROWTH = 5e-3, 10.0

#: A score below this counts as one of this size: a loss near zero differs by more than its share.
_LEAST_SCORE = 0.05

#: Scores that count rows: one row that tips over is more than any rounding, and so they may differ by `_COUNTED_FACTOR`
#: times the tolerance, whatever their size; or by `_COUNTED_ROWS` rows at `TOLERANCE`, where they count so few.
_COUNTED = ("accuracy", "accuracy_norm", "exact_match", "flexible_match")
_COUNTED_FACTOR, _COUNTED_ROWS = 10, 1.5

#: The name of the classes' digest among a record's content hashes; a run's own folder has none.
_CLASSES = "classes"

_RECORDED_PACKAGES = ("raise-env", "torch", "transformers", "peft", "numpy")


def versions() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    return {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in _RECORDED_PACKAGES}}


@dataclass(frozen=True, slots=True)
class EpisodeRecord:
    """One episode.

    Attributes:
        env: `{"id": ..., "kwargs": ...}`, what `gym.make` takes.
        agent: Who acted, by name.
        seed: What the environment was reset with.
        actions: Pool ids trained on, step by step.
        rewards: Reward of each step.
        dev_scores: P before any update and after each step.
        test_score: P on the test set after the last step; None without one.
        versions: Of the packages that the numbers depend on.
        content: Content hashes of model, pool, dev and test; and where candidates were drawn by class, and the classes
            of all rows were known, a digest of these, "classes".
        final: Further scores after the last step, such as "test_loss", by name.
    """

    env: dict[str, Any]
    agent: str
    seed: int
    actions: list[list[int]]
    rewards: list[float]
    dev_scores: list[float]
    test_score: float | None
    versions: dict[str, str]
    content: dict[str, str]
    final: dict[str, float] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def diverged(self) -> bool:
        """Whether the loss stopped being finite, so that the last dev score is that of an earlier step."""
        # A reward of one's own may truly fall by as much; then the score has moved.
        return self.rewards[-1:] == [DIVERGENCE_PENALTY] and self.dev_scores[-2:-1] == self.dev_scores[-1:]

    @classmethod
    def of(cls, env: RaiseSelectEnv, *, agent: str, seed: int, info: Mapping[str, Any]) -> EpisodeRecord:
        """Return the record of the episode that has just ended.

        Args:
            env: The environment after the last step.
            agent: Who acted.
            seed: What it was reset with.
            info: What the last step returned.
        """
        kwargs = {name: value for name, value in env.config.to_kwargs().items() if name not in _PRIVATE}
        return cls(
            env={"id": ENV_ID, "kwargs": kwargs},
            agent=agent,
            seed=seed,
            actions=[[int(row) for row in step.selected] for step in env.history],
            rewards=[step.reward for step in env.history],
            dev_scores=env.dev_scores,
            test_score=info.get("test_score"),
            versions=versions(),
            content=_content(env),
            final=_final_scores(_last_evaluation(env, info)),
        )

    @classmethod
    def from_json(cls, text: str, where: str) -> EpisodeRecord:
        """Read a record, checking every field's form.

        Raises:
            RecordError: It is not JSON, or a field is missing, unknown, or of the wrong form.
        """
        try:
            value = parse_json(text)
        except ValueError as error:
            raise RecordError(f"{where}: not JSON ({error}). Expected one episode record a line.") from error
        _check(isinstance(value, dict), where, "record", "a JSON object")
        if value.get("schema_version") != SCHEMA_VERSION:
            raise RecordError(
                f"{where}: schema_version is {value.get('schema_version')!r}; this version of raise-env reads "
                f"{SCHEMA_VERSION}. Validate the file with the version that wrote it."
            )
        _check_fields(value, where)
        return cls(**value)

    def to_json(self) -> str:
        """Return the record as one line."""
        return json.dumps(asdict(self), allow_nan=False)


@dataclass(frozen=True, slots=True)
class Difference:
    """The first thing in a replay that was not as recorded.

    Attributes:
        what: Its name.
        recorded: What the record says.
        replayed: What came out here.
        why: How that comes about and what to do, where it can be told.
    """

    what: str
    recorded: object
    replayed: object
    why: str = ""

    def __str__(self) -> str:
        told = f"{self.what}: recorded {self.recorded}, replayed {self.replayed}"
        return f"{told}. {self.why}" if self.why else told


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of making a recorded episode again.

    Attributes:
        difference: The first thing that was not as recorded, or None.
        distance: The largest of any number from the recorded one.
        tokens: Token forwards of its steps, as a ledger counts them: the least that the episode took whoever acted.
        pool_tokens: Those of the whole pool.
    """

    difference: Difference | None
    distance: float
    tokens: int = 0
    pool_tokens: int = 0


#: What a record's digest of the classes tells that is not the one here.
_OTHER_CLASSES = (
    "The classes of the pool's rows come out otherwise on this machine, though pool and model are those of the record: "
    "which start of K-means ends best may hang on the last digits of the features, which are the processor's. So other "
    "candidates are offered, and the record cannot be replayed here; that need not mean that it was tampered with. "
    "Replay it where it was made, or on the same kind of processor or GPU with the same versions."
)

#: Settings that say where and how a run is made, not what it computes.
_PRIVATE = ("cache_dir", "render_mode", "device")

#: Settings that name what is opened: rows; and models and adapters, whose folders the hub's cache makes of links.
_DATA = ("pool", "dev", "test")
_MODELS, _ADAPTERS = ("model", "auxiliary_model"), ("adapter", "auxiliary_adapter")

#: The largest sizes that a record may ask for unless whoever replays it gives the same: beyond them a line of text
#: could take all of a machine's memory, or days.
FOREIGN_LIMITS = {
    "pool_size": 1_000_000,
    "num_candidates": 1_000_000,
    "num_classes": 10_000,
    "auxiliary_updates": 10_000,
    "max_length": 1_000_000,
    "micro_batch_tokens": 1_000_000,
}


def read_records(path: str | Path) -> Iterator[EpisodeRecord]:
    """Yield the records of a file, one a line.

    Raises:
        RecordError: The file cannot be read, holds none, or a line is not a record.
    """
    count = 0
    try:
        for number, line in numbered_lines(Path(path)):
            count += 1
            yield EpisodeRecord.from_json(line, f"{path}, line {number}")
    except (OSError, ValueError) as error:
        if isinstance(error, RaiseEnvError):
            raise
        raise RecordError(f"{path}: cannot be read ({error}). Expected a file of episode records.") from error
    if count == 0:
        raise RecordError(f"{path}: it holds no episode record.")


def replay(
    record: EpisodeRecord, tolerance: float = TOLERANCE, *, allowed: Collection[str] = (), **overrides: Any
) -> tuple[Difference | None, float]:
    """Make a recorded episode again and compare it.

    Args:
        record: What to replay.
        tolerance: How far a number may be from the recorded one, as a share of the score (of 0.05 where the score is
            smaller; a reward's is the dev score's), from the third step on; before that by less. Shares of right
            answers may differ by ten times as much, whatever their size, and by one row where that is more.
        allowed: What the record may open: names of the hub, files, folders of models and adapters, and folders with
            all that is in them and does not lead out by a link.
        overrides: Settings in place of the record's: where it runs, such as `device` or `cache_dir`; a file that lies
            elsewhere here; and `reward`, where the record names a function: code gets in by whoever replays, never by a
            file.

    Returns:
        The first difference, or None; and the largest distance of any number from the recorded one.

    Raises:
        RecordError: The record asks for more than it may: a function that `overrides` does not give, a file that
            `allowed` does not have, or a size beyond `FOREIGN_LIMITS`.
        RaiseEnvError: The environment that the record names cannot be made here.
    """
    again = made_again(record, tolerance, allowed=allowed, **overrides)
    return again.difference, again.distance


def made_again(
    record: EpisodeRecord,
    tolerance: float = TOLERANCE,
    *,
    dev_loss: float | None = None,
    allowed: Collection[str] = (),
    **overrides: Any,
) -> Replay:
    """Make a recorded episode again, as `replay` does, and return also what it took.

    Args:
        record: What to replay.
        tolerance: As for `replay`.
        dev_loss: What is said elsewhere of the dev loss after the last step, to be compared too: a record tells it
            where it is the reward. None where nothing is said.
        allowed: As for `replay`.
        overrides: As for `replay`.

    Raises:
        RaiseEnvError: As `replay`.
    """
    kwargs = {name: value for name, value in record.env["kwargs"].items() if name not in _PRIVATE}
    _check_allowed(kwargs, allowed, overrides)
    env = RaiseSelectEnv(**{**kwargs, **overrides})
    content = _content(env)
    # The classes last: they follow from the others.
    for what, digest in sorted(record.content.items(), key=lambda entry: entry[0] == _CLASSES):
        found = content.get(what)
        if found != digest:
            why = _OTHER_CLASSES if what == _CLASSES and found is not None else ""
            return Replay(Difference(f"content of {what}", digest, found, why), math.inf)
    env.reset(seed=record.seed)
    before = env.ledger.token_forwards
    check = _Comparison(tolerance)
    measure = env.config.reward
    base = env.assets.base_answers if needs_generation(measure) else env.assets.base_evaluation
    counted = _num_counted(measure, base)
    check.number("dev score 0", record.dev_scores[0], env.dev_scores[0], step=0, counted=counted)
    info: dict[str, Any] = {}
    for step, rows in enumerate(record.actions):
        if check.first is not None:
            break
        action, missing = _action(env, rows)
        if missing:
            check.fail(f"action of step {step + 1}", f"pool ids {missing}", "not among the candidates offered")
            break
        _, reward, over, _, info = env.step(action)
        check.rows(f"action of step {step + 1}", rows, env.history[-1].selected.tolist())
        score = env.dev_scores[-1]
        done = step + 1
        check.number(f"reward of step {done}", record.rewards[step], reward, step=done, size=score, counted=counted)
        check.number(f"dev score {done}", record.dev_scores[done], score, step=done, counted=counted)
        if over != (done == len(record.actions)):
            check.fail("length of the episode", len(record.actions), "ends" if over else "goes on")
    tokens = env.ledger.token_forwards - before
    if check.first is None:
        _compare_end(check, record, env, info)
    if check.first is None and dev_loss is not None:
        check.number("dev loss", dev_loss, env.evaluate("dev").loss)
    return Replay(check.first, check.largest, tokens, env.assets.pool_tokens)


def _content(env: RaiseSelectEnv) -> dict[str, str]:
    """Return a record's content hashes; where the whole pool is on offer, nothing depends on classes."""
    digest = None if env.config.num_candidates == "all" else env.assets.classes_hash
    return {**env.assets.content, **({} if digest is None else {_CLASSES: digest})}


def _check_allowed(kwargs: Mapping[str, Any], allowed: Collection[str], overrides: Mapping[str, Any]) -> None:
    """Refuse what a record asks for and whoever replays it has not allowed.

    Raises:
        RecordError: There is something of that kind.
    """
    reward = kwargs.get("reward", "loss")
    if ":" in reward and overrides.get("reward") != reward:
        raise RecordError(
            f"the record's reward is the function {reward!r}, which replaying would run: if you know it, allow it with "
            f"--reward {reward} (in Python: reward={reward!r})."
        )
    sources = {name: kwargs.get(name) for name in (*_MODELS, *_ADAPTERS, *_DATA) if name not in overrides}
    refused, known = [], []
    for name, source in sources.items():
        if source is None or (source == TINY and name in _MODELS):
            continue
        outside = _outside(source, allowed, is_data=name in _DATA)
        if outside is not None:
            leading = f", by a link in it {outside!r}" if outside != source else ""
            refused.append(f"{name} {source!r}{leading}")
            known.append(outside)
    if refused:
        known = list(dict.fromkeys(known))
        flags = " ".join(f"--allow {shlex.quote(source)}" for source in known)
        raise RecordError(
            f"replaying would open what the record names: {', '.join(refused)}. If you know them, add {flags}, or "
            f"allow a folder that they are in (in Python: allowed={known!r})."
        )
    config = EnvConfig.from_kwargs({**kwargs, **overrides})
    for name, most in FOREIGN_LIMITS.items():
        found = getattr(config, name)
        if name not in overrides and isinstance(found, int) and found > most:
            raise RecordError(
                f"the record's {name} is {str(found)[:60]}; expected at most {most:,}. If you know it, give the same "
                f"in Python: replay(record, {name}=...)."
            )
    if "lora" not in overrides:
        try:
            check_foreign_lora(config.lora)
        except SettingError as error:
            raise RecordError(f"the record's settings cannot be replayed: {error}") from error


def _outside(source: str, allowed: Collection[str], *, is_data: bool) -> str | None:
    """Return what opening a source would open that is not allowed: itself, or what a link in it leads to; else None.

    A file, or a folder of a model or adapter, that is allowed by its own name is opened wherever links lead: the hub's
    cache is made of them. Of a folder of data, and of what lies in an allowed folder, each file that would be read has
    to lie in an allowed one truly.
    """
    try:
        path = Path(source)
        inside = [Path(known).resolve() for known in allowed if Path(known).exists()]
        is_named = source in allowed or (path.exists() and path.resolve() in inside)
        if is_named and not (is_data and path.is_dir()):
            return None
        # What is not here might be fetched from the hub.
        if not path.exists() or not _is_within(path.resolve(), inside):
            return source
        return _leading_out(path, inside, is_data)
    except (OSError, RuntimeError):  # a RuntimeError is of links that lead in a circle
        return source


def _leading_out(source: Path, inside: Collection[Path], is_data: bool) -> str | None:
    """Return where the first file that opening a source would read lies, if it lies in none of some folders."""
    waiting, seen = [source], set()
    while waiting:
        path = waiting.pop().resolve()
        if not _is_within(path, inside):
            return str(path)
        if path not in seen and path.is_dir():
            waiting += [file for file in path.iterdir() if not is_data or is_readable(file)]
        seen.add(path)
    return None


def _is_within(path: Path, folders: Collection[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def _last_evaluation(env: RaiseSelectEnv, info: Mapping[str, Any]) -> Evaluation | None:
    """Return how the model does on the test set after the last step; None where there is nothing to tell.

    Args:
        env: The environment after the last step.
        info: What that returned.
    """
    if not env.assets.has_test or info["diverged"]:
        return None
    test = env.evaluate("test")
    return test if test.is_finite else None  # a test row may have no finite loss though all dev rows have


def _final_scores(test: Evaluation | None) -> dict[str, float]:
    return {} if test is None else {f"test_{name}": value for name, value in test.scores().items()}


def _compare_end(check: _Comparison, record: EpisodeRecord, env: RaiseSelectEnv, info: Mapping[str, Any]) -> None:
    test = _last_evaluation(env, info)
    if record.test_score is not None or "test_score" in info:
        counted = _num_counted(env.config.reward, test)
        check.number("test score", record.test_score, info.get("test_score"), counted=counted)
    again = _final_scores(test)
    for name in dict.fromkeys([*record.final, *again]):  # a score that was taken out is a difference too
        counted = _num_counted(name.removeprefix("test_"), test)
        check.number(name, record.final.get(name), again.get(name), counted=counted)


def _num_counted(score: str, evaluation: Evaluation | None) -> int | None:
    """Return how many rows a score is a share of; None where it is no share, or of nothing."""
    return len(usable_rows(score, evaluation)) if score in _COUNTED and evaluation is not None else None


@dataclass(slots=True)
class _Comparison:
    tolerance: float
    largest: float = 0.0
    first: Difference | None = None

    def number(
        self,
        what: str,
        recorded: float | None,
        replayed: float | None,
        *,
        step: int | None = None,
        size: float | None = None,
        counted: int | None = None,
    ) -> None:
        """Compare two numbers.

        Args:
            what: Its name.
            recorded: What the record says.
            replayed: What came out here.
            step: After how many steps; None is after all.
            size: Of the score that it is a difference of; None is its own.
            counted: How many rows it is a share of; None where it is none.
        """
        if recorded is None or replayed is None:
            if recorded is not replayed:
                self.fail(what, recorded, replayed)
            return
        distance = abs(recorded - replayed)
        self.largest = max(self.largest, distance)
        scale = max(abs(replayed if size is None else size), _LEAST_SCORE)
        part = 1.0 if step is None else min(1.0, _FIRST_PART * _GROWTH ** min(step, 10))
        limit = self.tolerance * scale * part
        if counted is not None:
            limit = self.tolerance * max(_COUNTED_FACTOR, _COUNTED_ROWS / TOLERANCE / max(counted, 1))
        if not (math.isfinite(distance) and distance <= limit):  # an infinite score has an infinite limit
            self.fail(what, recorded, replayed)

    def rows(self, what: str, recorded: list[int], replayed: list[int]) -> None:
        # Whoever wrote a record may have listed the rows in another order; twice is not once, though.
        if sorted(recorded) != sorted(replayed):
            self.fail(what, recorded, replayed)

    def fail(self, what: str, recorded: object, replayed: object) -> None:
        self.first = self.first or Difference(what, recorded, replayed)


def _action(env: RaiseSelectEnv, rows: list[int]) -> tuple[np.ndarray, list[int]]:
    candidates = env.candidates
    missing = [row for row in rows if row not in candidates]
    return np.isin(candidates, rows).astype(np.int8), missing


def _check_fields(value: Mapping[str, Any], where: str) -> None:
    known = set(EpisodeRecord.__dataclass_fields__)
    missing, unknown = sorted(known - {"final"} - set(value)), sorted(set(value) - known)
    _check(not missing, where, "record", f"the fields {', '.join(missing)} too")
    _check(not unknown, where, "record", f"no fields {', '.join(unknown)}")
    _check_env(value["env"], where)
    _check(isinstance(value["agent"], str), where, "agent", "a name")
    _check(_is_list([value["seed"]], int) and value["seed"] >= 0, where, "seed", "a whole number of at least 0")
    hashed = isinstance(value["content"], dict) and {"model", "pool", "dev"} <= set(value["content"])
    _check(hashed and _is_names(value["content"]), where, "content", "hashes of model, pool and dev at least")
    _check(_is_names(value["versions"]), where, "versions", "versions by name")
    _check_course(value, where)


def _check_env(env: Any, where: str) -> None:
    _check(isinstance(env, dict) and env.get("id") == ENV_ID, where, "env", f'{{"id": "{ENV_ID}", "kwargs": ...}}')
    _check(isinstance(env.get("kwargs"), dict), where, "env.kwargs", "a JSON object of settings")
    try:
        EnvConfig.from_kwargs(env["kwargs"])
    except SettingError as error:
        raise RecordError(f"{where}: field 'env.kwargs': {error}") from error


def _check_course(value: Mapping[str, Any], where: str) -> None:
    actions, final = value["actions"], value.get("final", {})
    _check(_is_list(actions, list) and all(_is_list(a, int) for a in actions), where, "actions", "lists of pool ids")
    _check(len(actions) > 0, where, "actions", "at least one step")
    _check(_is_list(value["rewards"], float, int), where, "rewards", "a list of numbers")
    _check(_is_list(value["dev_scores"], float, int), where, "dev_scores", "a list of numbers")
    _check(len(value["rewards"]) == len(actions), where, "rewards", f"{len(actions)} of them, one for each step")
    _check(len(value["dev_scores"]) == len(actions) + 1, where, "dev_scores", f"{len(actions) + 1} of them")
    scored = value["test_score"] is None or _is_list([value["test_score"]], float, int)
    _check(scored, where, "test_score", "a number, or null")
    _check(isinstance(final, dict) and _is_list([*final.values()], float, int), where, "final", "scores by name")


def _is_list(value: object, *kinds: type) -> bool:
    return isinstance(value, list) and all(isinstance(v, kinds) and _is_sized(v) for v in value)


def _is_names(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _is_sized(value: object) -> bool:
    """Return whether a whole number is one that a float can be compared with; a truth value is none."""
    return not isinstance(value, bool) and not (isinstance(value, int) and abs(value) > sys.float_info.max)


def _check(good: bool, where: str, name: str, expected: str) -> None:
    if not good:
        raise RecordError(f"{where}: field {name!r} is not as promised; expected {expected}.")
