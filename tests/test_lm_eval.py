"""The same rows, the same model: lm-eval's numbers and ours.

`pytest -s -m real tests/test_lm_eval.py` prints the lines of the tables in docs/results/lm_eval.md.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import re
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from raise_env.base_model import BaseModel
from raise_env.config import LoraSettings
from raise_env.encoding import Encoder
from raise_env.evaluation import EvaluationSet, evaluate
from raise_env.final_number import MAX_NEW_TOKENS
from raise_env.generation import answer
from raise_env.learner import LoraLearner, TrainingState, UpdateSettings
from raise_env.pool import Instruction
from raise_env.reading import read_pool

pytestmark = [
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'raise-env[eval]'"),
    # lm-eval, and what it loads, warn of much that is theirs to mend.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.slow,
]

NUM_ROWS = 100
NUM_GENERATED = 100
TINY = Path(__file__).resolve().parents[1] / "raise_env" / "tiny" / "base"

CHOICE_TASK = """\
task: ours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def instruction(question, choices, place):
    return Instruction(question, choices[place], choices=tuple(choices))


def arc(folder):
    for row in json.loads((folder / "arc_challenge" / "test.json").read_text(encoding="utf-8")):
        question, listed = re.fullmatch(
            r"Please choose the correct answer to the question: (.*?)\s+(Answer1: .*)\s+Answer format: .*",
            row["instruction"],
            re.DOTALL,
        ).groups()
        choices = [part.strip() for part in re.split(r"Answer\d+: ", listed)[1:]]
        yield instruction(question, choices, int(row["answer"].removeprefix("answer")) - 1)


def commonsenseqa(folder):
    return read_pool(folder / "commonsenseqa" / "dev.jsonl")


def mmlu(folder):
    with zipfile.ZipFile(folder / "mmlu" / "mmlu.zip") as archive:
        files = sorted(name for name in archive.namelist() if re.fullmatch(r"data/test/.*_test\.csv", name))
        for name in files:  # two of each, so that all subjects are in it
            rows = csv.reader(io.StringIO(archive.read(name).decode("utf-8")))
            for question, *choices, letter in [next(rows), next(rows)]:
                listed = "\n".join(f"{name}. {choice}" for name, choice in zip("ABCD", choices, strict=True))
                yield instruction(f"{question.strip()}\n{listed}", list("ABCD"), "ABCD".index(letter))


def gsm8k(folder):
    return read_pool(folder / "gsm8k" / "test.jsonl")


MODELS = {"stories260K": lambda shared: shared / "models" / "stories260K-hf", "embedded": lambda shared: TINY}
DATA = {"ARC-Challenge": arc, "CommonsenseQA": commonsenseqa, "MMLU": mmlu}


@pytest.fixture(scope="module")
def model(request, shared):
    """The model's folder, and the model as we load it."""
    folder = str(MODELS[request.param](shared))
    return request.param, folder, BaseModel(folder, LoraSettings(), device="cpu")


def lm_evals(task, docs, folder, model, **settings):
    """What lm-eval says of a task over our own rendered prompts: scores, and one sample a row."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    data = folder / "rows.json"
    data.write_text("\n".join(json.dumps(doc) for doc in docs), encoding="utf-8")
    task = task.format(file=data, cache=folder / "cache", **settings.pop("names", {}))
    (folder / "ours.yaml").write_text(task, encoding="utf-8")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    # In float32, lm-eval's sums over a hundred tokens are off by more than what is compared here.
    settings = {"device": "cpu", "dtype": "float32", "softmax_dtype": "float64", "batch_size": 1, **settings}
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(model), **settings), tasks=["ours"], task_manager=manager, bootstrap_iters=0
    )
    samples = {sample["doc_id"]: sample for sample in results["samples"]["ours"]}  # of several filters, one
    return results["results"]["ours"], [samples[place] for place in range(len(docs))]


def their_scores(sample):
    """lm-eval's log-likelihoods of a row's choices."""
    return np.array([float(score) for score, _ in sample["filtered_resps"]])


@pytest.mark.real
@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_choices__real_rows__score_as_in_lm_eval(name, model, shared, tmp_path):
    model_name, folder, base = model
    rows = list(DATA[name](shared / "data"))[:NUM_ROWS]
    encoder = Encoder(base.tokenizer, base.max_positions)
    start = time.perf_counter()
    ours = evaluate(lambda batch: base.token_losses(batch, None), EvaluationSet.build(rows, encoder, "test"))
    between = time.perf_counter()
    docs = [{"text": encoder.prompt_text(row), "choices": row.choices, "answer": row.right_choice} for row in rows]
    theirs, samples = lm_evals(CHOICE_TASK, docs, tmp_path, folder)
    end = time.perf_counter()
    assert len(ours.rows) == len(samples) == NUM_ROWS
    distances = [
        np.abs(scores - their_scores(sample)).max() for scores, sample in zip(ours.choice_scores, samples, strict=True)
    ]
    cells = [name, model_name, NUM_ROWS, ours.accuracy, theirs["acc,none"], ours.accuracy_norm]
    cells += [theirs["acc_norm,none"], f"{max(distances):.1e}", f"{between - start:.1f} s", f"{end - between:.1f} s"]
    print("\n|", " | ".join(map(str, cells)), "|")
    assert max(distances) < 1e-4
    assert ours.accuracy == pytest.approx(theirs["acc,none"], abs=1e-4)
    assert ours.accuracy_norm == pytest.approx(theirs["acc_norm,none"], abs=1e-4)


def number_task():
    """lm-eval's own task gsm8k, without examples in the prompt, over rows of ours."""
    import lm_eval

    own = (Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml").read_text(encoding="utf-8")
    scoring = own[own.index("metric_list:") : own.index("metadata:")].replace("num_fewshot: 5", "num_fewshot: 0")
    scoring = scoring.replace("{", "{{").replace("}", "}}")
    scoring = scoring.replace("generation_kwargs:", "generation_kwargs:\n  max_gen_toks: {most}")
    return (
        "task: ours\ndataset_path: json\ntest_split: test\noutput_type: generate_until\n"
        "dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}\n"
        "doc_to_text: text\ndoc_to_target: answer\n" + scoring
    )


def compare_numbers(rows, base, folder, tmp_path, adapter=None, **settings):
    """Both programs' shares and both programs' answers, row by row."""
    encoder = Encoder(base.tokenizer, base.max_positions)
    answers = []

    def noted(prompts):
        texts, num_tokens = answer(base, prompts, adapter)
        answers.extend(texts)
        return texts, num_tokens

    data = EvaluationSet.build(rows, encoder, "test")
    start = time.perf_counter()
    ours = evaluate(lambda batch: base.token_losses(batch, adapter), data, answer=noted)
    between = time.perf_counter()
    docs = [{"text": encoder.prompt_text(row), "answer": row.response} for row in rows]
    names = {"most": min(MAX_NEW_TOKENS, base.max_positions // 2)}
    theirs, samples = lm_evals(number_task(), docs, tmp_path, folder, names=names, **settings)
    seconds = between - start, time.perf_counter() - between
    places = sorted(data.questions)  # in the order in which answers are asked for
    assert answers == [samples[place]["resps"][0][0] for place in places]
    strict, flexible = theirs["exact_match,strict-match"], theirs["exact_match,flexible-extract"]
    assert ours.exact_match == pytest.approx(strict, abs=1e-4)
    assert ours.flexible_match == pytest.approx(flexible, abs=1e-4)
    return ours, (strict, flexible), seconds


@pytest.mark.real
@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_final_numbers__gsm8k__are_read_as_in_lm_eval(model, shared, tmp_path):
    model_name, folder, base = model
    rows = list(gsm8k(shared / "data"))[:NUM_GENERATED]
    ours, (strict, flexible), seconds = compare_numbers(rows, base, folder, tmp_path)
    cells = ["GSM8K", model_name, len(rows), ours.exact_match, strict, ours.flexible_match, flexible]
    print("\n|", " | ".join(map(str, cells)), "|", " | ".join(f"{value:.1f} s" for value in seconds), "|")


@pytest.fixture(scope="module")
def by_heart(base, tmp_path_factory):
    """Sums, an adapter that knows most of them by heart in two forms, and its folder in PEFT's form."""
    sums = [(a, b) for a in (3, 14, 125) for b in (4, 31, 1024)]
    rows = [Instruction(f"What is {a} + {b}?", f"Add them.\n#### {a + b:,}") for a, b in sums]
    plain = [Instruction(row.prompt, f"It is ${a + b}.") for row, (a, b) in zip(rows, sums, strict=True)]
    encoder = Encoder(base.tokenizer, base.max_positions)
    pool = encoder.encode([*rows[:4], *plain[4:8]])
    start = TrainingState.start(base.initial_parameters(0))
    learner = LoraLearner(base, pool, {}, UpdateSettings(5e-3, 0.0, 1.0, 16_384), start)
    for _ in range(120):
        learner.update(np.arange(len(pool)), 0.0, 0)
    folder = tmp_path_factory.mktemp("adapter")
    learner.save_adapter(folder)
    return rows, learner.state.adapter, folder


def test_final_numbers__adapter_that_learned_some__are_read_as_in_lm_eval(by_heart, base, tmp_path):
    rows, adapter, folder = by_heart
    ours, _, _ = compare_numbers(rows, base, str(TINY), tmp_path, adapter[None], peft=str(folder))
    assert 0 < ours.exact_match < ours.flexible_match < 1


def test_choices__adapter__score_as_in_lm_eval(by_heart, base, tmp_path):
    rows, adapter, folder = by_heart
    rows = [instruction(row.prompt, [str(n) for n in range(5, 30, 8)] + [row.response], 4) for row in rows]
    encoder = Encoder(base.tokenizer, 32)  # so that prompts lose their beginning
    with base.merged(adapter):
        ours = evaluate(lambda batch: base.token_losses(batch, None), EvaluationSet.build(rows, encoder, "test"))
    docs = [{"text": encoder.prompt_text(row), "choices": row.choices, "answer": 4} for row in rows]
    theirs, samples = lm_evals(CHOICE_TASK, docs, tmp_path, TINY, peft=str(folder), max_length=32)
    for scores, sample in zip(ours.choice_scores, samples, strict=True):
        np.testing.assert_allclose(scores, their_scores(sample), rtol=0, atol=1e-4)
    assert ours.accuracy == pytest.approx(theirs["acc,none"], abs=1e-4)
    assert ours.accuracy_norm == pytest.approx(theirs["acc_norm,none"], abs=1e-4)
    assert ours.accuracy != ours.accuracy_norm


def test_tokens__chat_template_without_a_start_token__are_lm_evals_if_it_adds_none(base):
    from lm_eval.models.huggingface import HFLM

    tokenizer = copy.deepcopy(base.tokenizer)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id, "it puts one in front by itself"
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    encoder, row = Encoder(tokenizer, 256), instruction("Where?", ["a bank", "a park"], 0)
    text, choices = encoder.prompt_text(row), encoder.encode_choices([row])
    for add_bos_token, is_equal in ((None, False), (False, True)):
        theirs = HFLM(pretrained=str(TINY), device="cpu", batch_size=1, add_bos_token=add_bos_token)
        (prompt,) = encoder.encode_prompts([row])
        assert (theirs.tok_batch_encode([text])[0][0].tolist() == prompt.tolist()) == is_equal
        for place, choice in enumerate(row.choices):
            before, after = theirs._encode_pair(text, choice)
            assert ([*before, *after] == choices.row(place)[0].tolist()) == is_equal
