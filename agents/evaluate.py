"""What `evaluate` does: score a model, with an adapter or without, on a file of rows.

The numbers are those of an episode's dev and test scores, and where lm-eval has the same measure, lm-eval's. Each
comes with a 95% interval: the value and 1.96 standard errors of a mean over rows, as lm-eval's `stderr` is one; for the
loss, which is a ratio of two sums over rows, that of the ratio.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raise_env import EnvConfig, Evaluation
from raise_env.config import REWARDS, LoraSettings
from raise_env.errors import ModelError, SettingError, suggestion
from raise_env.pool import Instruction, Pool, sample_rows
from raise_env.reading import check_columns, read_pool
from raise_env.record import versions
from raise_env.rewards import missing_need, needs_generation

if TYPE_CHECKING:
    from raise_env.base_model import BaseModel
    from raise_env.evaluation import EvaluationSet

__all__ = ["REPORT_VERSION", "ScorePlan", "score_lines", "score_model"]

REPORT_VERSION = 1

#: Standard errors on either side of a value that make a 95% interval of a normal law.
_NORMAL_95 = 1.96


@dataclass(frozen=True, slots=True)
class ScorePlan:
    """What is to be scored.

    Attributes:
        model: "tiny", a local folder, or a hub id.
        data: A file of rows, as a pool is one.
        adapter: A folder with a PEFT LoRA adapter; None: the bare model.
        metrics: By the names of rewards; empty: the loss, and what the rows allow.
        template: As the environment's keyword.
        max_length: Tokens of a row; None: as many as the model has positions.
        columns: As the environment's keyword.
        choice_form: As the environment's keyword.
        skip_empty: As the environment's keyword.
        num_rows: A fixed random part of so many rows, the same as with the environment's `num_test`; None: all.
        device: As the environment's keyword.
        dtype: As the environment's keyword.
    """

    model: str
    data: str
    adapter: str | None = None
    metrics: tuple[str, ...] = ()
    template: str | None = None
    max_length: int | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    choice_form: str = "text"
    skip_empty: bool = False
    num_rows: int | None = None
    device: str = "auto"
    dtype: str = "float32"


def score_model(plan: ScorePlan) -> dict[str, Any]:
    """Score a model and return the report, as docs/files.md describes it.

    Raises:
        DataError: The file cannot be read, a row is at fault, or no response fits into the length.
        ModelError: The model cannot be loaded, the adapter does not fit it, or a loss is not finite.
        SettingError: A metric or a setting is unknown, or the rows lack what it needs, or the columns that are named;
            or no row's choices can be scored, and a metric that was asked for needs them.
    """
    own = ("template", "columns", "choice_form", "skip_empty", "device", "dtype")
    config = EnvConfig.from_kwargs({"pool": plan.data, "dev": plan.data, **{name: getattr(plan, name) for name in own}})
    rows = read_pool(plan.data, skip_empty=config.skip_empty, columns=config.columns, choice_form=config.choice_form)
    check_columns(config.columns, rows)
    rows = rows if plan.num_rows is None else sample_rows(rows, plan.num_rows, seed=0)
    asked = _checked(plan.metrics, rows, plan.data)
    base, data = _loaded(plan, rows)
    wanted = asked or _allowed(rows)
    names = [name for name in wanted if missing_need(name, data.instructions) is None]
    left_out = [name for name in wanted if name not in names]
    if asked and left_out:
        raise SettingError(
            f"metric {left_out[0]!r} needs rows whose choices can be scored; {plan.data} has none: in each row with "
            "choices one is no token, or does not fit into the length. Raise max_length, or leave the metric out."
        )
    evaluation = _evaluated(plan, base, data, any(map(needs_generation, names)))
    return {
        "schema_version": REPORT_VERSION,
        **dataclasses.asdict(plan),
        "metrics": {name: _interval(evaluation, name) for name in names},
        "metrics_left_out": left_out,
        "num_skipped": rows.num_skipped,
        "num_left_out": len(rows) - len(evaluation.rows),
        "content": {"model": base.content_hash, "data": rows.content_hash},
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def score_lines(report: dict[str, Any]) -> list[str]:
    """Return a report as lines for people: one a metric, then how the intervals were made and what is not in them."""
    lines = [_line(name, found) for name, found in report["metrics"].items()]
    lines.append("In brackets 95% intervals, normal over rows: 1.96 standard errors on either side.")
    if report["metrics_left_out"]:
        lines.append(
            f"Left out: {', '.join(report['metrics_left_out'])}. No row's choices can be scored: in each row one is no "
            "token, or does not fit into the length."
        )
    if report["num_skipped"]:
        lines.append(f"Rows skipped for want of text: {report['num_skipped']}.")
    if report["num_left_out"]:
        lines.append(f"Rows left out, as nothing of their response fits into the length: {report['num_left_out']}.")
    return lines


def _loaded(plan: ScorePlan, rows: Pool) -> tuple[BaseModel, EvaluationSet]:
    """Return the model, with layers for the adapter, and the rows in its tokens."""
    from raise_env.adapter_files import adapter_settings
    from raise_env.base_model import BaseModel
    from raise_env.encoding import Encoder
    from raise_env.evaluation import EvaluationSet
    from raise_env.generation import POSITIONS

    lora = LoraSettings() if plan.adapter is None else adapter_settings(Path(plan.adapter))
    base = BaseModel(plan.model, lora, dtype=plan.dtype, device=plan.device)
    positions = base.max_positions or POSITIONS
    encoder = Encoder(base.tokenizer, min(plan.max_length or positions, positions), plan.template)
    return base, EvaluationSet.build(rows, encoder, "data")


def _evaluated(plan: ScorePlan, base: BaseModel, data: EvaluationSet, generates: bool) -> Evaluation:
    """Return how the model does, with its adapter if there is one."""
    from raise_env.adapter_files import read_adapter
    from raise_env.generation import warn_of_cut
    from raise_env.learner import LoraLearner, TrainingState, UpdateSettings

    if generates:
        warn_of_cut(base, list(data.questions.values()), "data")
    # A new adapter changes nothing: its second matrices are zeros.
    adapter = base.initial_parameters(seed=0) if plan.adapter is None else read_adapter(Path(plan.adapter), base)
    settings = UpdateSettings(learning_rate=0.0, weight_decay=0.0, max_grad_norm=0.0, micro_batch_tokens=1)
    learner = LoraLearner(base, data.rows, {"test": data}, settings, TrainingState.start(adapter), generates=generates)
    evaluation = learner.evaluate("test")
    if not evaluation.is_finite:
        scores = evaluation.choice_scores or [np.zeros(0)] * len(evaluation.rows)
        finite = [bool(np.isfinite([loss, *of]).all()) for loss, of in zip(evaluation.row_losses, scores, strict=True)]
        raise ModelError(
            f"the model {plan.model!r} gives no finite loss, first for "
            f"{evaluation.rows[finite.index(False)].prompt[:60]!r}; check its weights, the adapter, and the dtype."
        )
    return evaluation


def _checked(names: Sequence[str], rows: Sequence[Instruction], source: str) -> tuple[str, ...]:
    """Return the metrics that were asked for, if there are such and the rows have what they need."""
    for name in names:
        if name not in REWARDS:
            raise SettingError(f"unknown metric {name!r}: {suggestion(name, REWARDS)}")
        missing = missing_need(name, rows)
        if missing is not None:
            raise SettingError(f"metric {name!r} needs rows with {missing}; {source} has none. Leave it out.")
    return tuple(dict.fromkeys(names))


def _allowed(rows: Sequence[Instruction]) -> tuple[str, ...]:
    """Return every metric that the rows allow; whole answers are not compared where each row is a choice."""
    allowed = [name for name in REWARDS if missing_need(name, rows) is None]
    return tuple(name for name in allowed if name != "exact_match" or not all(row.choices for row in rows))


def _interval(evaluation: Evaluation, name: str) -> dict[str, float | int | None]:
    """Return a metric's value with its interval, None for what a single row does not tell."""
    values = _row_values(evaluation, name)
    values = values[~np.isnan(values)]
    value, count = float(values.mean()), len(values)
    error = float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else None
    ends = (None, None) if error is None else (value - _NORMAL_95 * error, value + _NORMAL_95 * error)
    return {"value": value, "stderr": error, "low": ends[0], "high": ends[1], "num_rows": count}


def _row_values(evaluation: Evaluation, name: str) -> np.ndarray:
    """Return numbers, one a row, whose mean is the metric and whose spread its error; NaN where a row has none."""
    if name == "loss":
        counts = np.where(evaluation.row_tokens > 0, evaluation.row_tokens, np.nan)
        # A ratio's error is that of its linear part (the delta method): the mean of these is the ratio itself.
        return evaluation.loss + (evaluation.row_losses - evaluation.loss * counts) / np.nanmean(counts)
    values = {
        "accuracy": evaluation.row_accuracies,
        "accuracy_norm": evaluation.row_accuracies_norm,
        "choice_probability": evaluation.row_choice_probabilities,
        "exact_match": evaluation.row_exact_matches,
        "flexible_match": evaluation.flexible_matches,
    }[name]
    assert values is not None  # generated, as it was asked for
    return values


def _line(name: str, found: dict[str, Any]) -> str:
    interval = "" if found["stderr"] is None else f"  ({found['low']:.4f} to {found['high']:.4f})"
    rows = "1 row" if found["num_rows"] == 1 else f"{found['num_rows']} rows"
    return f"{name:<20}{found['value']:.4f}{interval}  {rows}"
