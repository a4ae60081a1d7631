"""Greedy answers of a model: prompts cut, batched and answered as lm-eval does it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .base_model import BaseModel
from .encoding import token_batches
from .final_number import MAX_NEW_TOKENS, STOPS

__all__ = ["GENERATION_BATCH_TOKENS", "answer", "warn_of_cut"]

logger = logging.getLogger(__name__)

#: Tokens that the keys and values of one batch are kept of: prompts with room for their answers.
GENERATION_BATCH_TOKENS = 8192

#: Positions of a model that does not say how many it has; lm-eval's own number.
POSITIONS = 2048


def answer(base: BaseModel, prompts: Sequence[np.ndarray], adapters: Tensor | None) -> tuple[list[str], int]:
    """Return what greedy decoding answers to each prompt, up to the first of `STOPS` or the end token.

    An answer has at most 256 tokens, and at most half of the model's positions; a prompt loses its beginning where
    they are not enough for both (lm-eval 0.4.13, `generate_until` in `lm_eval/models/huggingface.py`).

    Args:
        base: The model.
        prompts: Token ids of each, shape (length,).
        adapters: As for `BaseModel.token_losses`, at most one.

    Returns:
        The answers, and how many tokens went through the model.
    """
    max_prompt_tokens, max_new_tokens = _limits(base)
    kept = [prompt[-max_prompt_tokens:] for prompt in prompts]
    lengths = np.array([len(prompt) for prompt in kept], dtype=np.int64)
    answers, num_tokens = [""] * len(kept), int(lengths.sum())
    for places in token_batches(lengths + max_new_tokens, GENERATION_BATCH_TOKENS):
        generated = base.generate([kept[place] for place in places], adapters, max_new_tokens, STOPS)
        for place, tokens in zip(places, generated, strict=True):
            answers[place] = _cut(str(base.tokenizer.decode(tokens, skip_special_tokens=True)))
            num_tokens += len(tokens)
    return answers, num_tokens


def warn_of_cut(base: BaseModel, prompts: Sequence[np.ndarray], what: str) -> None:
    """Say how many prompts lose their beginning when they are answered: it may be what they ask.

    Args:
        base: The model.
        prompts: As for `answer`.
        what: Whose they are.
    """
    max_prompt_tokens, max_new_tokens = _limits(base)
    num_cut = sum(len(prompt) > max_prompt_tokens for prompt in prompts)
    if num_cut:
        message = "%d of %d %s prompts lose their beginning: %d tokens fit beside an answer of up to %d"
        logger.warning(message, num_cut, len(prompts), what, max_prompt_tokens, max_new_tokens)


def _limits(base: BaseModel) -> tuple[int, int]:
    """Return how many tokens a prompt may have, and an answer."""
    positions = base.max_positions or POSITIONS
    max_new_tokens = min(MAX_NEW_TOKENS, positions // 2)
    return positions - max_new_tokens, max_new_tokens


def _cut(text: str) -> str:
    for stop in STOPS:
        text = text.split(stop)[0]
    return text
