"""The embedded task: a pool of instructions over ten skills, most of them corrupted, made from a seed.

Dev and test are clean instructions of a few of the skills, over facts that the pool never asks: a selector
that does well has found rows that are both clean and of use. What is hidden from it, the skill and the
corruption of every row, stands in the rows' `fields` for the oracle and for analysis alone.

Public is the pool's field `rating`, from 1 to 5 in steps of a half: what a strong language model might say of the
answer. The judge is simulated. It mostly sees whether an answer is right, and errs: it means 4.5 for a clean row and 3
for a corrupted one, misses that by normal noise of standard deviation 1, and rounds to the next half within 1 to 5.
So 60% of the clean rows and 11% of the corrupted ones are rated at least 4.5; of those rated so, 79% are clean, against
40% of the pool. It does not know which skills dev and test ask for.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import SettingError, suggestion
from ..pool import Instruction, Pool
from .skills import SKILLS, Fact, Skill

__all__ = ["CLEAN", "TASKS", "EmbeddedTask", "TaskData", "generate_task"]

#: The value of the hidden field `corruption` in rows whose answer is right.
CLEAN = "none"

#: What the simulated judge means to rate clean and corrupted rows, and the standard deviation of its error.
CLEAN_RATING, CORRUPTED_RATING, RATING_ERROR = 4.5, 3.0, 1.0

SHRUGS = ("I do not know.", "Ask someone else.", "That is hard to say.")


@dataclass(frozen=True, slots=True)
class EmbeddedTask:
    """What a task asks.

    Attributes:
        target_skills: Skills that dev and test are made of.
        corruption: Share of the pool's rows with a spoilt answer, from 0 to 1.
        num_dev: Dev rows, the target skills alike often.
        num_test: Test rows, likewise.
    """

    target_skills: tuple[str, ...] = ("plural", "past", "add", "larger")
    corruption: float = 0.6
    num_dev: int = 64
    num_test: int = 256


TASKS: dict[str, EmbeddedTask] = {"default": EmbeddedTask()}


@dataclass(frozen=True, slots=True)
class TaskData:
    """The three sets of one task, disjoint by content and by fact."""

    pool: Pool
    dev: Pool
    test: Pool


@dataclass(frozen=True, slots=True)
class _Facts:
    """One skill's facts, shared out: what the pool asks, and what dev and test ask."""

    skill: Skill
    pool: tuple[Fact, ...]
    dev: tuple[Fact, ...]
    test: tuple[Fact, ...]


def generate_task(name: str, *, seed: int = 0, pool_size: int = 2000, task: EmbeddedTask | None = None) -> TaskData:
    """Return the pool, dev and test set of an embedded task; the same arguments give the same rows.

    Args:
        name: A name of `TASKS`; or any, which then names what `task` asks.
        seed: What the facts' split, the questions and the corruption are drawn from.
        pool_size: Rows of the pool; rows repeat where it asks for more than there are.
        task: A task of one's own.

    Raises:
        SettingError: There is no task of that name.
    """
    if task is None:
        if name not in TASKS:
            raise SettingError(f"unknown task {name!r}: {suggestion(name, TASKS)}")
        task = TASKS[name]
    rng = random.Random(f"{name}/{seed}")
    facts = {skill.name: _share_out(skill, rng) for skill in SKILLS}
    targets = [facts[skill] for skill in task.target_skills]
    dev = [_instruction(s.skill, fact, w) for s in targets for fact, w in _asked(s.dev, task.num_dev, targets, rng)]
    test = [_instruction(s.skill, fact, w) for s in targets for fact, w in _asked(s.test, task.num_test, targets, rng)]
    # The pool comes last: then dev and test are the same for every size of it.
    judge = random.Random(f"{name}/{seed}/rating")  # a stream of its own: ratings leave the rows as they are
    pool = (_rated(_pool_row(facts, task.corruption, rng), judge) for _ in range(pool_size))
    source = f"embedded:{name}"
    return TaskData(Pool(pool, source), Pool(dev, f"{source}/dev"), Pool(test, f"{source}/test"))


def _share_out(skill: Skill, rng: random.Random) -> _Facts:
    facts = rng.sample(skill.facts, len(skill.facts))
    dev, test = len(facts) // 10, len(facts) * 3 // 10
    return _Facts(skill, tuple(facts[test:]), tuple(facts[:dev]), tuple(facts[dev:test]))


def _asked(facts: tuple[Fact, ...], count: int, targets: list[_Facts], rng: random.Random) -> list[tuple[Fact, int]]:
    # Distinct (fact, wording) pairs, so that no dev or test row counts twice.
    pairs = [(fact, wording) for fact in facts for wording in range(4)]
    return rng.sample(pairs, count // len(targets))


def _instruction(skill: Skill, fact: Fact, wording: int) -> Instruction:
    return _row(skill, skill.ask(fact, wording), fact.answer, CLEAN)


def _row(skill: Skill, question: str, answer: str, corruption: str) -> Instruction:
    fields = {"instruction": question, "output": answer, "skill": skill.name, "corruption": corruption}
    return Instruction(prompt=question, response=answer, fields=fields)


def _pool_row(facts: dict[str, _Facts], corruption: float, rng: random.Random) -> Instruction:
    asked = facts[rng.choice(SKILLS).name]
    fact = rng.choice(asked.pool)
    question = asked.skill.ask(fact, rng.randrange(len(asked.skill.questions)))
    if rng.random() >= corruption:
        return _row(asked.skill, question, fact.answer, CLEAN)
    kind = rng.choice(sorted(_CORRUPTIONS))
    answer = _CORRUPTIONS[kind](asked, fact, question, rng)
    if answer == fact.answer or not answer:
        # Too short to be cut or scrambled.
        kind, answer = "wrong", _wrong(asked, fact, question, rng)
    return _row(asked.skill, question, answer, kind)


def _rated(row: Instruction, judge: random.Random) -> Instruction:
    meant = CLEAN_RATING if row.fields["corruption"] == CLEAN else CORRUPTED_RATING
    rating = round(2 * judge.gauss(meant, RATING_ERROR)) / 2
    return dataclasses.replace(row, fields={**row.fields, "rating": min(max(rating, 1.0), 5.0)})


def _wrong(asked: _Facts, fact: Fact, _question: str, rng: random.Random) -> str:
    return rng.choice([other.answer for other in asked.pool if other.answer != fact.answer])


def _other_skill(asked: _Facts, fact: Fact, _question: str, rng: random.Random) -> str:
    skill = rng.choice([other for other in SKILLS if other.name != asked.skill.name])
    return rng.choice([other.answer for other in skill.facts if other.answer != fact.answer])


def _cut(_asked: _Facts, fact: Fact, _question: str, _rng: random.Random) -> str:
    return fact.answer[: len(fact.answer) // 2]


def _scrambled(_asked: _Facts, fact: Fact, _question: str, rng: random.Random) -> str:
    return "".join(rng.sample(fact.answer, len(fact.answer)))


def _echo(_asked: _Facts, _fact: Fact, question: str, _rng: random.Random) -> str:
    return question


def _shrug(_asked: _Facts, _fact: Fact, _question: str, rng: random.Random) -> str:
    return rng.choice(SHRUGS)


_CORRUPTIONS: dict[str, Callable[[_Facts, Fact, str, random.Random], str]] = {
    "wrong": _wrong,
    "other_skill": _other_skill,
    "cut": _cut,
    "scrambled": _scrambled,
    "echo": _echo,
    "shrug": _shrug,
}
