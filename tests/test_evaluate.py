from __future__ import annotations

import json
import math

import numpy as np
import pytest

from raise_env.agents.evaluate import ScorePlan, score_lines, score_model
from raise_env.config import EnvConfig
from raise_env.errors import DataError, ModelError, SettingError
from raise_env.learner import LoraLearner
from raise_env.rewards import Evaluation
from raise_env.tiny.task import generate_task

CHOICES = [
    {"instruction": f"Which is {n}?", "output": str(n), "choices": [str(n), "a rather long one", str(n + 1)]}
    for n in range(6)
]
NUMBERS = [{"instruction": f"Say {n}.", "output": f"So.\n#### {n}"} for n in range(3)]
PLAIN = [{"instruction": f"Name {n}.", "output": f"It is {n}"} for n in range(4)]


@pytest.fixture
def data(tmp_path):
    """Return a function that writes rows and returns the file's name."""

    def write(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize(
    ("rows", "metrics"),
    [
        (PLAIN, ["loss", "exact_match"]),
        (CHOICES, ["loss", "accuracy", "accuracy_norm", "choice_probability"]),
        (NUMBERS, ["loss", "exact_match", "flexible_match"]),
        (
            PLAIN + CHOICES + NUMBERS,
            ["loss", "accuracy", "accuracy_norm", "choice_probability", "exact_match", "flexible_match"],
        ),
    ],
    ids=["plain", "choices", "numbers", "all"],
)
def test_score_model__no_metrics_named__gives_what_the_rows_allow(data, rows, metrics):
    report = score_model(ScorePlan("tiny", data(rows)))
    assert list(report["metrics"]) == metrics
    counts = {"accuracy": 6, "accuracy_norm": 6, "choice_probability": 6, "flexible_match": 3}
    for name, found in report["metrics"].items():
        assert found["num_rows"] == counts.get(name, len(rows))
        assert found["low"] <= found["value"] <= found["high"]
    assert json.loads(json.dumps(report, allow_nan=False)) == json.loads(json.dumps(report))


def test_score_model__a_runs_adapter_and_length__gives_the_runs_numbers(embedded_env, small_settings, tmp_path, data):
    env = embedded_env(horizon=2)
    env.reset(seed=0)
    for _ in range(2):
        env.step(np.array([1, 0] * 8))
    env.save_adapter(tmp_path / "adapter")
    test = generate_task("default", pool_size=small_settings["pool_size"]).test
    path = data([dict(row.fields) for row in test])
    plan = ScorePlan("tiny", path, str(tmp_path / "adapter"), max_length=EnvConfig().max_length, num_rows=8)
    report, evaluation = score_model(plan), env.evaluate("test")
    assert report["metrics"]["loss"]["value"] == pytest.approx(evaluation.loss, rel=1e-6)
    assert report["metrics"]["exact_match"]["value"] == evaluation.exact_match
    bare = score_model(ScorePlan("tiny", path, num_rows=8))
    assert abs(bare["metrics"]["loss"]["value"] - evaluation.loss) > 0.1


def test_score_model__prompts_that_do_not_fit_beside_their_answers__are_told_of(data, caplog):
    path = data([{"prompt": "x" * 200, "response": "#### 1"}, {"prompt": "x", "response": "#### 2"}])
    score_model(ScorePlan("tiny", path, metrics=("loss",)))
    assert not caplog.messages, "nothing is answered"
    score_model(ScorePlan("tiny", path))
    assert [message.partition(" prompts")[0] for message in caplog.messages] == ["1 of 2 data"]


def test_score_model__interval__is_that_of_a_mean_over_rows(data):
    report = score_model(ScorePlan("tiny", data(CHOICES), metrics=("accuracy",)))
    assert list(report["metrics"]) == ["accuracy"]
    found = report["metrics"]["accuracy"]
    share = found["value"]
    # As lm-eval's stderr: the spread of zeros and ones, one degree of freedom less, by the root of their number.
    assert found["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 5))
    assert found["high"] - found["value"] == pytest.approx(1.96 * found["stderr"])


def test_score_model__loss_interval__holds_over_rows_drawn_anew(data):
    lengths = [{"instruction": f"Name {n}.", "output": "la " * (1 + n % 9)} for n in range(60)]
    report = score_model(ScorePlan("tiny", data(lengths), metrics=("loss",)))
    found = report["metrics"]["loss"]
    from raise_env.base_model import BaseModel
    from raise_env.config import LoraSettings
    from raise_env.encoding import Encoder
    from raise_env.evaluation import EvaluationSet, evaluate
    from raise_env.reading import read_pool

    base = BaseModel("tiny", LoraSettings(), device="cpu")
    rows = EvaluationSet.build(read_pool(data(lengths)), Encoder(base.tokenizer, 256), "dev")
    evaluation = evaluate(lambda batch: base.token_losses(batch, None), rows)
    assert found["value"] == pytest.approx(evaluation.loss, rel=1e-6)
    rng = np.random.default_rng(0)
    draws = rng.integers(60, size=(4000, 60))
    losses = evaluation.row_losses[draws].sum(1) / evaluation.row_tokens[draws].sum(1)
    assert found["stderr"] == pytest.approx(losses.std(), rel=0.1)


TOO_LONG = [{**row, "choices": [row["output"], "much too long " * 99]} for row in CHOICES]


def test_score_model__choices_that_all_do_not_fit__leave_their_metrics_out_and_say_so(data):
    report = score_model(ScorePlan("tiny", data(TOO_LONG), max_length=64))
    assert list(report["metrics"]) == ["loss"]
    assert report["metrics_left_out"] == ["accuracy", "accuracy_norm", "choice_probability"]
    said = "Left out: accuracy, accuracy_norm, choice_probability. No row's choices can be scored"
    assert any(line.startswith(said) for line in score_lines(report))
    json.dumps(report, allow_nan=False)
    report = score_model(ScorePlan("tiny", data(TOO_LONG + CHOICES[:2]), max_length=64))
    assert list(report["metrics"]) == ["loss", "accuracy", "accuracy_norm", "choice_probability"]
    assert report["metrics"]["accuracy"]["num_rows"] == 2
    assert report["metrics_left_out"] == []
    assert not any(line.startswith("Left out") for line in score_lines(report))


def test_score_model__metric_by_name_that_no_row_allows_in_its_tokens__is_refused(data):
    plan = ScorePlan("tiny", data(TOO_LONG), metrics=("loss", "accuracy_norm"), max_length=64)
    with pytest.raises(
        SettingError, match=r"metric 'accuracy_norm' needs rows whose choices can be scored; .*has none"
    ):
        score_model(plan)


def test_score_model__choice_whose_score_is_not_finite__names_its_row(data, monkeypatch):
    def evaluate(learner, split):
        rows = learner.splits[split].instructions
        scores = tuple(np.array([-1.0, np.nan if row == 2 else -2.0, -3.0]) for row in range(len(rows)))
        ones = np.ones(len(rows))
        return Evaluation(ones, ones.astype(np.int64), ones > 0, choice_scores=scores, rows=rows)

    monkeypatch.setattr(LoraLearner, "evaluate", evaluate)
    with pytest.raises(ModelError, match=r"the model 'tiny' gives no finite loss, first for 'Which is 2\?'"):
        score_model(ScorePlan("tiny", data(CHOICES)))


def test_score_model__rows_without_text__are_counted(data):
    report = score_model(ScorePlan("tiny", data([*PLAIN, {"instruction": "x", "output": ""}]), skip_empty=True))
    assert report["num_skipped"] == 1
    assert "Rows skipped for want of text: 1." in score_lines(report)
    assert not any("skipped" in line for line in score_lines({**report, "num_skipped": 0}))


def test_score_model__one_row__has_no_interval(data):
    report = score_model(ScorePlan("tiny", data(PLAIN[:1])))
    assert report["metrics"]["loss"]["stderr"] is report["metrics"]["loss"]["low"] is None
    assert score_lines(report)[0].endswith("1 row")


def test_score_lines__a_report__say_value_interval_and_rows(data):
    lines = score_lines(score_model(ScorePlan("tiny", data(CHOICES), metrics=("accuracy", "loss"))))
    assert lines[0].split()[0] == "accuracy"
    assert lines[0].endswith(")  6 rows")
    assert "95%" in lines[-1]
    assert "normal" in lines[-1]


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"metrics": ("acuracy",)}, SettingError, "unknown metric 'acuracy': did you mean 'accuracy'"),
        (
            {"metrics": ("accuracy",)},
            SettingError,
            r"metric 'accuracy' needs rows with a column `choices`.*rows\.jsonl has none",
        ),
        ({"metrics": ("flexible_match",)}, SettingError, "#### number"),
        ({"num_rows": 5}, SettingError, "5 rows were asked for"),
        ({"adapter": "no_such_folder"}, ModelError, "no_such_folder.*cannot be loaded"),
        ({"max_length": 3}, DataError, "max_length=3"),
    ],
)
def test_score_model__what_cannot_be_done__is_said(data, settings, error, said):
    with pytest.raises(error, match=said):
        score_model(ScorePlan("tiny", data(PLAIN), **settings))


def test_score_model__columns_that_the_file_has_not__are_refused(data):
    path = data([{"question": f"{n}?", "answer": str(n), "long_answer": f"It is {n}."} for n in range(3)])
    with pytest.raises(
        SettingError,
        match=r"columns names question, long_anser, but no first row of .*rows\.jsonl has all of these; "
        r"found question, answer, long_answer in .*rows\.jsonl\. Mend the names",
    ):
        score_model(ScorePlan("tiny", path, columns={"prompt": "question", "response": "long_anser"}))
    long, short = (
        score_model(ScorePlan("tiny", path, columns={"prompt": "question", "response": name}))
        for name in ("long_answer", "answer")
    )
    assert long["metrics"]["loss"]["value"] != short["metrics"]["loss"]["value"]


@pytest.mark.parametrize("modules", [None, 5, [], ["q_proj", None]])
def test_score_model__adapter_whose_modules_are_no_names__is_named(data, tmp_path, modules):
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": modules}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"adapter_config\.json: lora target_modules is .*expected \"all-linear\""):
        score_model(ScorePlan("tiny", data(PLAIN), str(tmp_path)))


def test_score_model__rows_that_do_not_fit__are_counted(data):
    report = score_model(ScorePlan("tiny", data([*PLAIN, {"instruction": "x" * 300, "output": "y"}])))
    assert report["num_left_out"] == 1
    assert score_lines(report)[-1].endswith("fits into the length: 1.")
