from __future__ import annotations

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
