"""The card of a trained model: what it was trained on, how, and what it scored, for whoever is given the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from raise_env import EnvConfig, RaiseSelectEnv
from raise_env.config import TINY
from raise_env.files import write_text
from raise_env.record import EpisodeRecord
from raise_env.version import __version__

from . import markdown
from .page import load_template
from .report import results_table

__all__ = ["write_model_card"]


def write_model_card(
    path: Path,
    report: Mapping[str, Any],
    record: EpisodeRecord,
    env: RaiseSelectEnv,
    batch_size: int | None = None,
    *,
    is_merged: bool = False,
) -> None:
    """Write the card of the weights that a final run left.

    Args:
        path: The file, README.md in the folder of the weights.
        report: What report.json holds.
        record: The run that they come from.
        env: The environment of learning; the run may have had settings of its own.
        batch_size: Rows that the agent took for an update; None: what the run was made for.
        is_merged: Whether they are a whole model's, and not an adapter's.
    """
    template = load_template("model_card.md.jinja", escapes=False)  # Markdown
    facts = _facts(report, record, env, batch_size)
    texts = {name: markdown.escaped(value) for name, value in facts.items() if isinstance(value, str)}
    write_text(path, template.render(is_merged=is_merged, **{**facts, **texts, "table": facts["table"]}))


def _facts(
    report: Mapping[str, Any], record: EpisodeRecord, env: RaiseSelectEnv, batch_size: int | None
) -> dict[str, Any]:
    config, settings = env.config, report["settings"]
    own = EnvConfig.from_kwargs(record.env["kwargs"])
    rows = np.concatenate([np.asarray(step, dtype=np.int64) for step in record.actions])
    return {
        "base_model": config.model if _is_hub_id(config.model) else "",
        "model": _shown(config.model),
        "agent": record.agent,
        "verdict": report["verdict"],
        "pool": _shown(env.assets.pool.source),
        "pool_rows": len(env.assets.pool),
        "num_trained": len(rows),
        "num_distinct": len(np.unique(rows)),
        "num_updates": sum(bool(step) for step in record.actions),
        "episodes": settings["episodes"],
        "reward": config.reward,
        "dev": _shown(config.dev) if config.dev else "of the embedded task",
        "test": _shown(config.test) if config.test else "the embedded task's test set" * config.is_embedded,
        "phi": report["cost"]["phi"]["total"],
        "num_runs": settings["num_runs"],
        "table": _table(*results_table(report)),
        "lora": ", ".join(f"{name}={value}" for name, value in asdict(_base(env).lora).items()),
        "learning_rate": own.learning_rate,
        "batch_size": batch_size or own.batch_size,
        "max_length": own.max_length,
        "frame": _frame(config, env),
        "content": env.assets.content,
        "version": __version__,
        "date": report["date"],
    }


def _is_hub_id(model: str) -> bool:
    return model != TINY and not Path(model).exists()


def _shown(source: str) -> str:
    """Return what a source is called: a file or folder without the way to it, anything else by its whole name."""
    path = Path(source)
    return path.absolute().name if path.exists() else source


def _frame(config: EnvConfig, env: RaiseSelectEnv) -> str:
    if config.template is not None:
        return repr(config.template)
    has_own = bool(getattr(_base(env).tokenizer, "chat_template", None))
    return "the tokenizer's chat template" if has_own else "raise-env's plain template"


def _base(env: RaiseSelectEnv) -> Any:
    return env.assets.learner.base  # type: ignore[attr-defined]


def _table(rows: list[list[str]], header: list[str]) -> str:
    return markdown.table(header, rows)
