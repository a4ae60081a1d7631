from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from raise_env.base_model import BaseModel, load_tokenizer
from raise_env.config import LoraSettings
from raise_env.encoding import Encoder
from raise_env.errors import DataError
from raise_env.evaluation import EvaluationSet, evaluate, score_rows
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
    # A choice comes with the space before it, and without an end token.
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


def test_evaluate__rows_that_share_no_prompt_in_a_pass__go_through_in_few_large_ones(scored, by_letter):
    passes = []

    def counted(batch):
        passes.append(len(batch.input_ids))
        return by_letter(batch)

    apart = evaluate(counted, scored)
    num_apart, passes[:] = len(passes), []
    together = evaluate(counted, scored, max_tokens=10_000, shares_prompts=False)
    assert num_apart == 3
    assert passes == [4, 5], "the rows, and all their choices"
    assert [scores.tolist() for scores in together.choice_scores] == [scores.tolist() for scores in apart.choice_scores]
    assert together.row_losses.tolist() == apart.row_losses.tolist()


def test_evaluate__choices_that_read_alike__are_right_where_the_row_says(encoder, by_letter):
    rows = [Instruction("c?", "dd", ("dd", "!", "dd"), right=right) for right in (None, 2)]
    data = EvaluationSet.build(rows, encoder, "dev")
    assert data.answers.tolist() == [0, 2]
    assert evaluate(by_letter, data).row_accuracies.tolist() == [1.0, 0.0], "of two alike the first is the likeliest"


def test_evaluation_set__choices_that_read_alike_and_do_not_fit__are_no_longer_asked_for(base):
    rows = [Instruction("c?", "dd", ("dd", "b" * 300, "dd"), right=2), Instruction("e?", "!", ("!", "b"))]
    data = EvaluationSet.build(rows, Encoder(base.tokenizer, 64), "dev")
    assert data.answers.tolist() == [-1, 0]
    assert data.instructions[0] == Instruction("c?", "dd")


def test_evaluate__no_choices__has_no_accuracy(encoder, by_letter):
    assert evaluate(by_letter, EvaluationSet.build(ROWS[:2], encoder, "dev")).accuracy is None


@pytest.mark.parametrize("batching", [{"max_tokens": 1}, {"max_tokens": 4096, "shares_prompts": False}])
def test_evaluate__real_model__is_the_same_however_rows_are_batched(base, scored, batching):
    whole = evaluate(lambda batch: base.token_losses(batch, None), scored)
    alone = evaluate(lambda batch: base.token_losses(batch, None), scored, **batching)
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


NUMBERS = [
    Instruction("1 + 1?", "Two.\n#### 2"),
    Instruction("a?", "bb"),
    Instruction("what is 30 + 7?", "Add.\n#### 37"),
    Instruction("c?", "dd", choices=("bbb", "dd", "!")),
]


def answers_of(*texts):
    """A model made up: what it answers to the questions, in their order."""
    asked = []

    def answer(prompts):
        asked.extend(prompts)
        return list(texts), 100

    return answer, asked


def test_evaluate__rows_that_end_in_a_number__count_by_what_is_generated(encoder, by_letter):
    data = EvaluationSet.build(NUMBERS, encoder, "dev")
    answer, asked = answers_of("#### 2", "It is 37")
    evaluation = evaluate(by_letter, data, answer=answer)
    decoded = [encoder.tokenizer.decode(tokens) for tokens in asked]
    assert decoded == [encoder.prompt_text(row) for row in (NUMBERS[0], NUMBERS[2])]
    np.testing.assert_array_equal(evaluation.strict_matches, [1, np.nan, 0, np.nan])
    np.testing.assert_array_equal(evaluation.flexible_matches, [1, np.nan, 1, np.nan])
    assert evaluation.row_exact_matches.tolist() == [1, 1, 0, 1], "the others by the whole response, as ever"
    assert evaluation.exact_match == 0.75
    assert evaluation.flexible_match == 1.0
    assert evaluation.num_generating_tokens == 100


def test_evaluate__nothing_generated__counts_whole_responses(encoder, by_letter):
    evaluation = evaluate(by_letter, EvaluationSet.build(NUMBERS, encoder, "dev"))
    assert evaluation.flexible_match is evaluation.strict_matches is None
    assert evaluation.exact_match == evaluation.row_correct.mean()


def test_evaluate__part_of_the_rows__asks_for_that_part_alone(encoder, by_letter):
    data = EvaluationSet.build(NUMBERS, encoder, "dev")
    answer, asked = answers_of("#### 37")
    part = evaluate(by_letter, data, np.array([1, 2]), answer)
    assert len(asked) == 1
    assert part.rows == (NUMBERS[1], NUMBERS[2])
    assert part.row_exact_matches.tolist() == [1, 1]
    answer, asked = answers_of()
    assert evaluate(by_letter, data, np.array([1]), answer).strict_matches is None
    assert not asked


def test_evaluate__choices__keep_their_rows_and_lengths(scored, by_letter):
    evaluation = evaluate(by_letter, scored)
    assert evaluation.rows == tuple(ROWS)
    assert [lengths.tolist() for lengths in evaluation.choice_lengths] == [[], [], [3, 2, 1], [1, 2]]
    # -4/3, -3/2, -6 and -6, -3/2: by the character another one is the best of the first row.
    assert evaluation.accuracy_norm == 0.0
    first = np.exp(-3) / np.exp([-4, -3, -6]).sum()
    second = np.exp(-6) / np.exp([-6, -3]).sum()
    assert evaluation.choice_probability == pytest.approx((first + second) / 2, abs=1e-12)


def test_score_rows__choices_of_a_row__go_through_together(scored):
    seen = []

    def losses_of(batch):
        seen.append(len(batch.input_ids))
        return torch.ones(len(batch.targets)), torch.zeros(len(batch.targets), 3)

    evaluate(losses_of, scored)
    assert seen[-2:] == [3, 2]


def test_build__response_does_not_fit__is_scored_by_choices_or_number_alone(encoder, by_letter, caplog):
    long = "x" * 60
    rows = [
        Instruction(long, "bb"),
        Instruction("a?", "bb"),
        Instruction(long, "b", choices=("b", "!")),
        Instruction(long, "b\n#### 3"),
        Instruction("e?", "b", choices=("b", "b" * 40)),
    ]
    with caplog.at_level(logging.WARNING, logger="raise_env"):
        data = EvaluationSet.build(rows, Encoder(encoder.tokenizer, 30), "dev")
    assert "1 of 5 dev rows are left out" in caplog.text
    assert "the choices of 1 of 5 dev rows are not scored" in caplog.text
    assert [row.prompt for row in data.instructions] == ["a?", long, long, "e?"]
    assert data.answers.tolist() == [-1, 0, -1, -1]
    answer, asked = answers_of("#### 4")
    evaluation = evaluate(by_letter, data, answer=answer)
    assert encoder.tokenizer.decode(asked[0]) == encoder.prompt_text(Instruction(long, "")), (
        "which is not cut for training's length"
    )
    assert evaluation.row_tokens.tolist() == [3, 0, 0, 2]
    assert evaluation.loss == 1.0
    assert evaluation.accuracy == 1.0
    np.testing.assert_array_equal(evaluation.row_exact_matches, [1, np.nan, 0, 1])
    assert data.num_tokens() == data.rows.lengths[[0, 3]].sum() + data.choices.lengths.sum()
    assert data.num_tokens(np.array([1])) == data.choices.lengths.sum()
    nothing = evaluate(by_letter, data, np.array([1]))
    assert np.isnan(nothing.loss)


def test_evaluate__embedded_task__is_one_pass_over_its_rows_to_the_bit(base, embedded_env):
    data = embedded_env().assets.learner.splits["dev"]
    assert data.choices is None
    assert data.questions == {}

    def losses_of(batch):
        return base.token_losses(batch, None)

    evaluation = evaluate(losses_of, data)
    sums, correct = score_rows(losses_of, data.rows, np.arange(len(data)))
    np.testing.assert_array_equal(evaluation.row_losses, sums)
    np.testing.assert_array_equal(evaluation.row_correct, correct)
    assert evaluation.loss == float(sums.sum() / data.rows.label_counts.sum())
    assert evaluation.exact_match == float(correct.mean())


def test_choices__one_token_more_than_positions__are_scored_all_the_same(tmp_path):
    """A model that has learned its positions has none for a token that is only to be predicted."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = load_tokenizer("tiny")
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=24, vocab_size=len(tokenizer))
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base = BaseModel(str(tmp_path), LoraSettings(target_modules=("c_attn",)), device="cpu")
    row = Instruction("a longer question?", "yes", choices=("no", "yes"))
    short = Instruction("a?", "b")
    data = EvaluationSet.build([row, short], Encoder(base.tokenizer, base.max_positions), "dev")
    assert data.choices.lengths.tolist() == [25, 25]
    found = evaluate(lambda batch: base.token_losses(batch, None), data).choice_scores[0]
    for index, score in enumerate(found):
        tokens = torch.from_numpy(data.choices.row(index)[0].astype(np.int64))
        with torch.no_grad(), base.peft_model.disable_adapter():
            laws = base._causal(tokens[None, :-1]).logits[0].log_softmax(-1)
        count = int(data.choices.label_counts[index])
        expected = laws.gather(1, tokens[1:, None])[-count:].sum().item()
        assert score == pytest.approx(expected, abs=1e-4)
