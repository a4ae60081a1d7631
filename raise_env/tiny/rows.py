"""Single rows of the embedded tasks: right ones, and the six ways in which answers are corrupted.

What is hidden of a row, the skill and the corruption at least, stands in its `fields`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from ..pool import Instruction
from .skills import SKILLS, Fact, Skill

__all__ = ["CLEAN", "CORRUPTIONS", "SHRUGS", "Facts", "corrupted_row", "mixed_row", "row", "share_out"]

#: The value of the hidden field `corruption` in rows whose answer is right.
CLEAN = "none"

SHRUGS = ("I do not know.", "Ask someone else.", "That is hard to say.")


@dataclass(frozen=True, slots=True)
class Facts:
    """One skill's facts, shared out: what the pool asks, and what dev and test ask."""

    skill: Skill
    pool: tuple[Fact, ...]
    dev: tuple[Fact, ...]
    test: tuple[Fact, ...]


def share_out(skill: Skill, rng: random.Random) -> Facts:
    """Return a skill's facts in random order: a tenth for dev, a fifth for test, the rest for the pool."""
    facts = rng.sample(skill.facts, len(skill.facts))
    dev, test = len(facts) // 10, len(facts) * 3 // 10
    return Facts(skill, tuple(facts[test:]), tuple(facts[:dev]), tuple(facts[dev:test]))


def row(skill: Skill, question: str, answer: str, corruption: str = CLEAN, **hidden: str) -> Instruction:
    """Return a row with its hidden labels."""
    fields = {"instruction": question, "output": answer, "skill": skill.name, "corruption": corruption, **hidden}
    return Instruction(prompt=question, response=answer, fields=fields)


def mixed_row(
    asked: Facts, corruption: float, rng: random.Random, about: Fact | None = None, **hidden: str
) -> Instruction:
    """Return a row about one of the pool's facts, any or the one given, in any wording, corrupted by so much chance."""
    fact = about or rng.choice(asked.pool)
    question = asked.skill.ask(fact, rng.randrange(len(asked.skill.questions)))
    if rng.random() >= corruption:
        return row(asked.skill, question, fact.answer, **hidden)
    return corrupted_row(asked, fact, question, rng.choice(sorted(CORRUPTIONS)), rng, **hidden)


def corrupted_row(
    asked: Facts, about: Fact, question: str, kind: str, rng: random.Random, **hidden: str
) -> Instruction:
    """Return a row whose answer is corrupted in the way that is named, or wrong where that leaves it right or empty."""
    answer = CORRUPTIONS[kind](asked, about, question, rng)
    if answer == about.answer or not answer:
        # Too short to be cut or scrambled.
        kind, answer = "wrong", _wrong(asked, about, question, rng)
    return row(asked.skill, question, answer, kind, **hidden)


def _wrong(asked: Facts, fact: Fact, _question: str, rng: random.Random) -> str:
    return rng.choice([other.answer for other in asked.pool if other.answer != fact.answer])


def _other_skill(asked: Facts, fact: Fact, _question: str, rng: random.Random) -> str:
    skill = rng.choice([other for other in SKILLS if other.name != asked.skill.name])
    return rng.choice([other.answer for other in skill.facts if other.answer != fact.answer])


def _cut(_asked: Facts, fact: Fact, _question: str, _rng: random.Random) -> str:
    return fact.answer[: len(fact.answer) // 2]


def _scrambled(_asked: Facts, fact: Fact, _question: str, rng: random.Random) -> str:
    return "".join(rng.sample(fact.answer, len(fact.answer)))


def _echo(_asked: Facts, _fact: Fact, question: str, _rng: random.Random) -> str:
    return question


def _shrug(_asked: Facts, _fact: Fact, _question: str, rng: random.Random) -> str:
    return rng.choice(SHRUGS)


#: The ways to spoil an answer, by the names that the hidden field `corruption` has for them.
CORRUPTIONS: dict[str, Callable[[Facts, Fact, str, random.Random], str]] = {
    "wrong": _wrong,
    "other_skill": _other_skill,
    "cut": _cut,
    "scrambled": _scrambled,
    "echo": _echo,
    "shrug": _shrug,
}
