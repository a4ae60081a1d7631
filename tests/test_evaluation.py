from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from raise_env.encoding import Encoder
from raise_env.errors import DataError
from raise_env.evaluation import EvaluationSet, evaluate
from raise_env.pool import Instruction

ROWS = [
    Instruction("a?", "bb"),
    Instruction("a long prompt to make the rows differ in length?", "b!"),
    Instruction("c?", "dd", choices=("bbb", "dd", "!")),
    Instruction("e?", "!", choices=("!", "bb")),
]


@pytest.fixture(scope="module")
def encoder(base):
    return Encoder(base.tokenizer, 256)


@pytest.fixture(scope="module")
def scored(encoder):
    return EvaluationSet.build(ROWS, encoder, "dev")


@pytest.fixture
def by_letter(encoder):
    """A model made up: every token costs 1 nat, "!" costs 5 and is never its first choice."""
    mark = encoder.tokenizer.convert_tokens_to_ids("!")

    def losses_of(batch):
        is_mark = batch.targets == mark
        logits = torch.nn.functional.one_hot(batch.targets, len(encoder.tokenizer)).float()
        logits[is_mark] *= -1
        return torch.where(is_mark, 5.0, 1.0), logits

    return losses_of


def test_evaluate__made_up_model__adds_up_by_hand(scored, by_letter):
    evaluation = evaluate(by_letter, scored)
    assert evaluation.row_tokens.tolist() == [3, 3, 3, 2]  # with the end token
    assert evaluation.row_losses.tolist() == [3.0, 7.0, 3.0, 6.0]
    assert evaluation.row_losses.dtype == np.float64
    assert evaluation.row_correct.tolist() == [True, False, True, False]
    assert [scores.tolist() for scores in evaluation.choice_scores] == [[], [], [-4.0, -3.0, -6.0], [-6.0, -3.0]]
    assert evaluation.choice_answers.tolist() == [-1, -1, 1, 0]
    assert evaluation.loss == pytest.approx(19 / 11)
    assert evaluation.exact_match == 0.5
    assert evaluation.accuracy == 0.5, "the second row with choices has a likelier wrong one"


def test_evaluate__part_of_the_rows__is_that_part_of_the_whole(scored, by_letter):
    whole, part = evaluate(by_letter, scored), evaluate(by_letter, scored, np.array([1, 3]))
    assert part.row_losses.tolist() == whole.row_losses[[1, 3]].tolist()
    assert part.row_tokens.tolist() == whole.row_tokens[[1, 3]].tolist()
    assert part.choice_scores[1].tolist() == whole.choice_scores[3].tolist()
    assert part.choice_answers.tolist() == [-1, 0]


def test_evaluate__no_choices__has_no_accuracy(encoder, by_letter):
    assert evaluate(by_letter, EvaluationSet.build(ROWS[:2], encoder, "dev")).accuracy is None


def test_evaluate__real_model__is_the_same_however_rows_are_batched(base, scored, monkeypatch):
    whole = evaluate(lambda batch: base.token_losses(batch, None), scored)
    monkeypatch.setattr("raise_env.evaluation.EVALUATION_BATCH_TOKENS", 1)
    alone = evaluate(lambda batch: base.token_losses(batch, None), scored)
    np.testing.assert_allclose(alone.row_losses, whole.row_losses, rtol=1e-5)
    for one, other in zip(alone.choice_scores, whole.choice_scores, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_exact_match__real_model__is_what_greedy_decoding_gives(embedded_env):
    env = embedded_env()
    env.reset(seed=0)
    learner, tokenizer = env._learner, env.assets.learner.base.tokenizer
    for step in range(40):  # by heart, so that some answers are right
        learner.update(np.array([0, 1]), 0.0, step)
    rows = EvaluationSet.build(env.assets.pool[:4], Encoder(tokenizer, 256), "dev")
    base = learner.base
    with base.merged(learner.state.adapter):
        evaluation = evaluate(lambda batch: base.token_losses(batch, None), rows)
        decoded = []
        for row in env.assets.pool[:4]:
            prompt = Encoder(tokenizer, 256).prompt_text(row)
            ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
            out = base._causal.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
            decoded.append(tokenizer.decode(out[0, ids.shape[1] :]) == row.response + tokenizer.eos_token)
    assert evaluation.row_correct.tolist() == decoded
    assert decoded[:2] == [True, True]


def test_build__rows_that_do_not_fit__are_left_out_and_said(encoder, caplog):
    short = Encoder(encoder.tokenizer, 30)
    with caplog.at_level(logging.WARNING, logger="raise_env"):
        rows = EvaluationSet.build(ROWS, short, "dev")
    assert "1 of 4 dev rows are left out" in caplog.text
    assert len(rows) == 3
    assert rows.answers.tolist() == [-1, 1, 0]
    assert rows.choice_rows.tolist() == [1, 1, 1, 2, 2]
    with pytest.raises(DataError, match="max_length=30"):
        EvaluationSet.build(ROWS[1:2], short, "dev")
