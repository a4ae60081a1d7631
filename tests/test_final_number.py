from __future__ import annotations

import json
import re
import time

import pytest

from raise_env.final_number import flexible_match, has_final_number, strict_match

RESPONSE = "She has 1,000 + 200 = 1,200 dollars.\n#### 1,200"

# What a model says, and whether lm-eval's two ways of reading find the number of RESPONSE in it.
SAID = [
    ("So it is 1200.\n#### 1200", True, True),
    ("#### $1200", False, True),  # the strict expression knows no dollar sign
    ("#### 1,200.", True, True),
    ("#### 1200\n#### 7", True, False),  # the first is strict, the last flexible
    ("It is $1,200.", False, True),
    ("It is 1200 and no more than 3", False, False),
    ("1200 #### 3", False, False),
    ("####1200", False, True),
    ("#### -1200", False, False),
    ("nothing at all", False, False),
    ("", False, False),
]


@pytest.mark.parametrize(("answer", "strict", "flexible"), SAID)
def test_matches__what_a_model_says__as_lm_eval_reads_it(answer, strict, flexible):
    assert strict_match(answer, RESPONSE) is strict
    assert flexible_match(answer, RESPONSE) is flexible


@pytest.mark.parametrize(("answer", "strict", "flexible"), SAID)
def test_matches__lm_evals_own_code__says_the_same(answer, strict, flexible):
    extraction = pytest.importorskip("lm_eval.filters.extraction", reason="lm-eval is not installed")
    from lm_eval.api.metrics import exact_match_hf_evaluate

    for expected, pattern, group in [
        (strict, r"#### (\-?[0-9\.\,]+)", 0),
        (flexible, r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
    ]:
        ((found,),) = extraction.RegexFilter(pattern, group).apply([[answer]], [{}])
        score = exact_match_hf_evaluate(
            [found], [RESPONSE], regexes_to_ignore=[",", r"\$", "(?s).*#### ", r"\.$"], ignore_case=True
        )
        assert bool(score["exact_match"]) is expected


def test_has_final_number__a_response__is_told_by_its_form():
    assert has_final_number(RESPONSE)
    assert has_final_number("#### -3")
    assert not has_final_number("It is 3.")
    assert not has_final_number("#### three")


@pytest.mark.parametrize(
    "response",
    [
        "Two and two.\n#### 4\nThe answer is: 4",
        "#### 1. Overview\nIt is a long text.",
        "So it is\n#### 42%",
        "#### 42 apples",
        "#### ...",
    ],
)
def test_has_final_number__number_that_a_response_does_not_end_in__is_none(response):
    assert not has_final_number(response)


@pytest.mark.parametrize(
    ("response", "number"),
    [("x #### 42\n", "42"), ("#### 42 \n\n", "42"), ("#### 7 apples\n#### 1,200.5", "1200.5"), ("#### -.5", "-.5")],
)
def test_matches__response_with_white_space_or_another_number__is_known_by_its_last(response, number):
    assert has_final_number(response)
    assert strict_match(f"#### {number}", response)
    assert flexible_match(f"It is {number}", response)
    assert not strict_match("#### 7", response)


def test_has_final_number__a_million_digits_that_end_in_a_letter__takes_no_time():
    begun = time.process_time()
    assert not has_final_number("#### " + "1" * 10**6 + "x")
    assert time.process_time() - begun < 5


@pytest.mark.real
@pytest.mark.parametrize("name", ["train", "test"])
def test_matches__gsm8ks_own_answers__have_the_number_that_lm_eval_leaves_of_them(name, shared):
    for line in (shared / "data" / "gsm8k" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        response = json.loads(line)["answer"]
        number = re.sub(r"\.$", "", re.sub(r"(?s).*#### ", "", response.replace(",", "").replace("$", "")))
        assert has_final_number(response)
        assert strict_match(f"#### {number}", response)
        assert not strict_match(f"#### {number}1", response)
