"""How the pools of the embedded tasks are put together, and what a row of each is worth to who sees its labels.

A recipe yields rows without end, so that a smaller pool is the beginning of a larger one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..pool import Instruction
from .rows import CLEAN, SHRUGS, Facts, mixed_row, row
from .skills import Fact, Skill

__all__ = [
    "COPIED_FACTS",
    "COPY_SHARE",
    "STAGES",
    "SWITCH",
    "USEFUL_SHARE",
    "Recipe",
    "Worth",
    "by_stage",
    "clean_and_asked",
    "copies",
    "curriculum",
    "mixed",
    "thrift",
]

#: From all facts, the skills that are asked for, the share of corrupted rows and a generator to rows without end.
Recipe = Callable[[Mapping[str, Facts], tuple[str, ...], float, random.Random], Iterator[Instruction]]

#: From a row's fields, the skills that are asked for, and the share of the episode used up, to what the row is worth.
Worth = Callable[[Mapping[str, Any], tuple[str, ...], float], float]


def mixed(
    facts: Mapping[str, Facts], targets: tuple[str, ...], corruption: float, rng: random.Random
) -> Iterator[Instruction]:
    """Yield rows of all skills alike often, corrupted by so much chance."""
    del targets
    skills = list(facts)
    while True:
        yield mixed_row(facts[rng.choice(skills)], corruption, rng)


def clean_and_asked(fields: Mapping[str, Any], targets: tuple[str, ...], progress: float) -> float:
    """Return 2 for clean rows of the skills that are asked for, 1 for other clean rows, 0 for the rest."""
    del progress
    return float(fields["corruption"] == CLEAN) * (1.0 + (fields["skill"] in targets))


# Redundancy

#: Facts of each target skill that most rows of `copies` are about.
COPIED_FACTS = 1

#: Share of the rows that are about those.
COPY_SHARE = 0.9

_OPENINGS = ("", "", "Please: ", "Quick: ", "Well, ")
_ENDINGS = ("", "?", "??", " ?", "!", "...", ".")
_CASES: tuple[Callable[[str], str], ...] = (str, str.lower, str.upper)


def copies(
    facts: Mapping[str, Facts], targets: tuple[str, ...], corruption: float, rng: random.Random
) -> Iterator[Instruction]:
    """Yield mostly near-copies of clean rows about a handful of facts; the others are `mixed`, about other facts.

    The hidden field `fact` says what a row is about.
    """
    copied = [(facts[name], fact) for name in targets for fact in facts[name].pool[:COPIED_FACTS]]
    others = [(asked, asked.pool[COPIED_FACTS:]) for asked in facts.values()]
    while True:
        if rng.random() < COPY_SHARE:
            asked, fact = rng.choice(copied)
            question = _reworded(asked.skill.ask(fact, rng.randrange(len(asked.skill.questions))), rng)
            yield row(asked.skill, question, fact.answer, fact=_name(asked.skill, fact))
        else:
            asked, pool = rng.choice(others)
            fact = rng.choice(pool)
            yield mixed_row(asked, corruption, rng, fact, fact=_name(asked.skill, fact))


def _name(skill: Skill, fact: Fact) -> str:
    return " ".join((skill.name, *fact.words))


def _reworded(question: str, rng: random.Random) -> str:
    """Return the question in other case and punctuation."""
    words = rng.choice(_CASES)(question.rstrip("?.!"))
    return rng.choice(_OPENINGS) + words + rng.choice(_ENDINGS)


# Curriculum

#: The stages of `curriculum`, in the order in which their rows help.
STAGES = ("content", "form")

#: The share of an episode after which the oracle goes on from one to the other.
SWITCH = 0.4

#: What the right answer of a row of the first stage stands in; dev and test ask for the bare answer.
WRAPPING = '"{y}"'


def curriculum(
    facts: Mapping[str, Facts], targets: tuple[str, ...], corruption: float, rng: random.Random
) -> Iterator[Instruction]:
    """Yield rows of two stages alike often: target skills with wrapped answers, other skills with bare ones.

    The hidden field `stage` says which.
    """
    content, form = STAGES
    others = [name for name in facts if name not in targets]
    while True:
        if rng.random() < 0.5:
            asked = facts[rng.choice(targets)]
            fact, question = _asked(asked, rng)
            yield row(asked.skill, question, WRAPPING.format(y=fact.answer), stage=content)
        else:
            yield mixed_row(facts[rng.choice(others)], corruption, rng, stage=form)


def by_stage(fields: Mapping[str, Any], targets: tuple[str, ...], progress: float) -> float:
    """Return 1 for rows of the stage that is on, 0 for the rest."""
    del targets
    return float(fields["stage"] == STAGES[progress >= SWITCH])


# Thrift

#: Share of the rows of `thrift` that are of use.
USEFUL_SHARE = 0.02


def thrift(
    facts: Mapping[str, Facts], targets: tuple[str, ...], corruption: float, rng: random.Random
) -> Iterator[Instruction]:
    """Yield a few clean rows of the target skills; all others have the same shrug for an answer, which does harm."""
    del corruption
    skills = list(facts)
    while True:
        is_useful = rng.random() < USEFUL_SHARE
        asked = facts[rng.choice(targets if is_useful else skills)]
        fact, question = _asked(asked, rng)
        if is_useful:
            yield row(asked.skill, question, fact.answer)
        else:
            yield row(asked.skill, question, SHRUGS[0], "shrug")


def _asked(asked: Facts, rng: random.Random) -> tuple[Fact, str]:
    """Draw one of the pool's facts and a question about it."""
    fact = rng.choice(asked.pool)
    return fact, asked.skill.ask(fact, rng.randrange(len(asked.skill.questions)))
