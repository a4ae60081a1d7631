from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from raise_env.config import REWARDS
from raise_env.errors import RewardError
from raise_env.pool import Instruction
from raise_env.rewards import (
    Evaluation,
    check_reward,
    load_reward,
    missing_need,
    needs_choices,
    needs_generation,
    step_reward,
)
from raise_env.testing import toy_env

# Two rows of 3 and 1 tokens that lose 6 and 4 nats; three rows with choices, two of them chosen right.
PLAIN = Evaluation(np.array([6.0, 4.0]), np.array([3, 1]), np.array([True, False]))
CHOICES = Evaluation(
    np.array([1.0, 1.0, 1.0, 1.0]),
    np.array([1, 1, 1, 1]),
    np.array([True, True, False, False]),
    (np.array([-3.0, -1.0]), np.array([-1.0, -2.0, -0.5]), np.array([]), np.array([-7.0, -8.0])),
    np.array([1, 0, -1, 0]),
    (np.array([6, 1]), np.array([4, 2, 1]), np.array([]), np.array([1, 2])),
)

#: The likelihood of the second row's first choice among its three.
SECOND = math.exp(-1) / (math.exp(-1) + math.exp(-2) + math.exp(-0.5))

# A row that is answered right word for word, and two whose answers were generated.
NUMBERS = Evaluation(
    np.array([1.0, 1.0, 1.0]),
    np.array([1, 1, 1]),
    np.array([True, True, False]),
    strict_matches=np.array([np.nan, 0.0, 1.0]),
    flexible_matches=np.array([np.nan, 1.0, 0.0]),
)


def first_row(evaluation):
    """A reward of one's own: minus the first row's loss."""
    return -evaluation.row_losses[0]


def in_place(evaluation):
    losses = evaluation.row_losses
    losses /= evaluation.row_tokens
    return -losses[0]


def not_a_number(evaluation):
    return math.nan


def not_one_number(evaluation):
    return evaluation.row_losses


def yes(evaluation):
    return True


not_callable = 5


@pytest.mark.parametrize(
    ("reward", "evaluation", "score"),
    [
        ("loss", PLAIN, -2.5),  # (6 + 4) / (3 + 1): by the token, not by the row
        ("exact_match", PLAIN, 0.5),
        ("accuracy", CHOICES, 2 / 3),  # the row without choices does not count
        ("exact_match", CHOICES, 0.5),
        # By the character -0.5, -1; -0.25, -1, -0.5; -7, -4.
        ("accuracy_norm", CHOICES, 1 / 3),
        ("choice_probability", CHOICES, (1 / (1 + math.exp(-2)) + SECOND + 1 / (1 + math.exp(-1))) / 3),
        ("exact_match", NUMBERS, 2 / 3),
        ("flexible_match", NUMBERS, 0.5),
        (f"{__name__}:first_row", PLAIN, -6.0),
    ],
)
def test_load_reward__known_name__scores_as_by_hand(reward, evaluation, score):
    value = load_reward(reward)(evaluation)
    assert type(value) is float
    assert value == pytest.approx(score, abs=1e-12)


def test_accuracy__no_choices__says_what_to_do():
    assert PLAIN.accuracy is None
    with pytest.raises(RewardError, match="choices"):
        load_reward("accuracy")(PLAIN)
    with pytest.raises(RewardError, match="choices"):
        toy_env(reward="accuracy").reset(seed=0)


def test_load_reward__every_name_of_the_configuration__is_there_and_says_what_it_lacks():
    for name in REWARDS:
        if name in ("loss", "exact_match"):
            assert math.isfinite(load_reward(name)(PLAIN))
        else:
            with pytest.raises(RewardError, match=f"reward '{name}' needs dev rows with .*Take reward 'loss'"):
                load_reward(name)(PLAIN)
    assert [name for name in REWARDS if needs_generation(name)] == ["exact_match", "flexible_match"]
    assert not needs_generation(f"{__name__}:first_row")


@pytest.mark.parametrize(
    ("reward", "row", "lacking"),
    [
        ("accuracy", Instruction("a", "b", ("b", "c")), "choices"),
        ("accuracy_norm", Instruction("a", "b", ("b", "c")), "choices"),
        ("choice_probability", Instruction("a", "b", ("b", "c")), "choices"),
        ("flexible_match", Instruction("a", "#### 3"), "#### number"),
    ],
)
def test_check_reward__one_row_that_has_it__is_enough(reward, row, lacking):
    other = Instruction("a", "b")
    check_reward(reward, [other, row], "test")
    with pytest.raises(RewardError, match=f"needs test rows with .*{lacking}.*this test set has none"):
        check_reward(reward, [other], "test")
    assert lacking in missing_need(reward, [other])
    for free in ("loss", "exact_match", f"{__name__}:first_row"):
        check_reward(free, [other], "dev")


def test_scores__of_rows__are_all_that_they_allow():
    assert set(PLAIN.scores()) == {"loss", "exact_match"}
    assert set(CHOICES.scores()) == {"loss", "exact_match", "accuracy", "accuracy_norm", "choice_probability"}
    assert set(NUMBERS.scores()) == {"loss", "exact_match", "flexible_match"}
    assert PLAIN.scores()["loss"] == 2.5


def test_evaluation__of_the_toy__knows_its_rows():
    env = toy_env()
    env.reset(seed=0)
    evaluation = env.evaluate("dev")
    assert len(evaluation.rows) == len(evaluation.row_losses)
    assert [row.fields["row"] for row in evaluation.rows] == list(range(len(evaluation.rows)))


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("no_such_module:score", "no_such_module"),
        (f"{__name__}:no_such_function", "no_such_function"),
        (f"{__name__}:not_callable", "is a int"),
    ],
)
def test_load_reward__no_such_function__is_named_at_once(reward, said):
    with pytest.raises(RewardError, match=said):
        toy_env(reward=reward)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("not_a_number", "returned nan for a dev loss of 2.5; expected a finite number. Losses that are not finite"),
        ("not_one_number", "expected one number, higher is better"),
        ("yes", "returned True; expected one number, higher is better"),
    ],
)
def test_load_reward__returns_no_finite_number__is_an_error(name, said):
    score = load_reward(f"{__name__}:{name}")
    with pytest.raises(RewardError, match=name) as caught:
        score(PLAIN)
    assert said in str(caught.value)


def looks_for_a_column(evaluation):
    return evaluation.rows[0].fields["no_such_column"]


def test_load_reward__function_that_fails__is_an_error_that_ends_with_its_lines():
    env = toy_env(reward=f"{__name__}:looks_for_a_column")
    with pytest.raises(RewardError, match=r"looks_for_a_column': its own code failed") as caught:
        env.reset(seed=0)
    _, place, *_, last = str(caught.value).splitlines()
    assert place.endswith("in looks_for_a_column")  # nothing of the package before it
    assert last == "KeyError: 'no_such_column'"
    assert isinstance(caught.value.__cause__, KeyError)


def test_load_reward__module_that_does_not_parse__is_an_error_that_shows_where(tmp_path, monkeypatch):
    (tmp_path / "torn_reward.py").write_text("def score(evaluation:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError, match=r"(?s)importing 'torn_reward': its own code failed\.\n  File .*SyntaxError"):
        toy_env(reward="torn_reward:score")


def test_load_reward__name_of_a_file__says_to_leave_out_the_ending():
    with pytest.raises(RewardError, match=r"Leave out the ending: no_such_reward:score\.$"):
        load_reward("no_such_reward.py:score")


def test_step_reward__two_scores__is_their_difference():
    assert step_reward(-2.5, -2.0) == 0.5


def test_choice_probability__long_choices__whose_likelihoods_no_number_holds():
    """Of choices of hundreds of tokens."""
    long = Evaluation(
        *(np.array([1.0]), np.array([1]), np.array([True])),
        choice_scores=(np.array([-2000.0, -2000.0 + math.log(3)]),),
        choice_answers=np.array([1]),
        choice_lengths=(np.array([900, 900]),),
    )
    assert long.choice_probability == pytest.approx(0.75)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_is_finite__one_row_that_is_not__says_so(odd):
    assert PLAIN.is_finite
    assert not Evaluation(np.array([1.0, odd]), np.array([1, 1]), np.array([True, True])).is_finite


def test_env__reward_of_ones_own__is_what_the_steps_earn():
    env = toy_env(reward=f"{__name__}:first_row")
    env.reset(seed=0)
    _, reward, _, _, info = env.step(np.ones(32))
    assert info["dev_score"] == -env.evaluate("dev").row_losses[0]
    assert reward == env.dev_scores[1] - env.dev_scores[0] != 0


def test_env__reward_that_writes_into_the_evaluation__is_stopped_and_the_next_reset_is_the_same():
    env = toy_env(reward=f"{__name__}:in_place")
    plain = toy_env(reward=f"{__name__}:first_row")
    with pytest.raises(ValueError, match="read-only"):
        env.reset(seed=0)
    plain._assets = env.assets
    plain.reset(seed=0)
    assert plain.dev_scores == [-2.0 * 10]


def test_evaluation__any_array__is_read_only_and_what_it_was_made_of_is_not():
    losses = np.array([6.0, 4.0, 2.0])
    evaluation = dataclasses.replace(NUMBERS, row_losses=losses)
    choices = [*CHOICES.choice_scores, *CHOICES.choice_lengths, CHOICES.choice_answers]
    numbers = [evaluation.strict_matches, evaluation.flexible_matches, evaluation.row_tokens, evaluation.row_correct]
    for array in [evaluation.row_losses, *choices, *numbers]:
        assert not array.flags.writeable
    losses[:] = 1.0


@pytest.mark.parametrize(
    ("reward", "expected"),
    [("loss", False), ("exact_match", False), ("accuracy", True), ("choice_probability", True), ("mine:score", True)],
)
def test_needs_choices__by_reward__those_that_look_at_them(reward, expected):
    assert needs_choices(reward) is expected
