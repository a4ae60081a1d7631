r"""The number that a worked answer ends in, as in `#### 42`: read and compared as lm-eval's task gsm8k does.

Expressions, their order and what is left out before a comparison are those of lm-eval 0.4.13
(`lm_eval/tasks/gsm8k/gsm8k.yaml`, `filters/extraction.py`, `exact_match_hf_evaluate` in `api/metrics.py`), so that a
share of right answers here and there is the same number.
"""

from __future__ import annotations

import re

__all__ = ["MAX_NEW_TOKENS", "STOPS", "flexible_match", "has_final_number", "strict_match"]

#: A generated answer ends before the first of these.
STOPS = ("Question:", "</s>", "<|im_end|>")

#: Tokens that an answer may have: lm-eval's own number.
MAX_NEW_TOKENS = 256

#: What an answer without a number counts as.
_NOTHING = "[invalid]"

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
#: What a response ends in: the last number, for a right answer ends in it, and a heading `#### 1. Overview` is none.
_FINAL = re.compile(r"#### (-?[.,]*[0-9][0-9.,]*)\s*\Z")

_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = tuple(re.compile(text) for text in (",", r"\$", "(?s).*#### ", r"\.$"))


def has_final_number(response: str) -> bool:
    """Return whether a response ends in `#### number`, white space aside."""
    return _FINAL.search(response) is not None


def strict_match(answer: str, response: str) -> bool:
    """Return whether the first `#### number` of a generated answer is the one that the response ends in."""
    found = _STRICT.search(answer)
    return _is_same(found[1].strip() if found else _NOTHING, response)


def flexible_match(answer: str, response: str) -> bool:
    """Return whether the last number of a generated answer is the one that the response ends in."""
    found = _FLEXIBLE.findall(answer)
    last = next((part for part in found[-1] if part), _NOTHING) if found else _NOTHING
    return _is_same(last.strip(), response)


def _is_same(answer: str, response: str) -> bool:
    final = _FINAL.search(response)
    assert final is not None  # others are not asked for a number
    return _normalised(answer) == _normalised(final[1])


def _normalised(text: str) -> str:
    for ignored in _IGNORED:
        text = ignored.sub("", text)
    return text.lower()
