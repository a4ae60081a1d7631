"""The embedded tasks: pools of instructions made from a seed, each with a question of its own.

Dev and test are clean instructions of a few skills, over facts that the pool never asks: a selector that does well has
found rows that help with these. By default they are the clean rows of those skills; docs/tasks has the others.
What is hidden from it, the skill and the corruption of every row and what else `recipes` says, stands in the rows'
`fields` for the oracle and for analysis alone.

Public is the pool's field `rating`, from 1 to 5 in steps of a half: what a strong language model might say of the
answer. The judge is simulated. It mostly sees whether an answer is right, and errs: it means 4.5 for a clean row and 3
for a corrupted one, misses that by normal noise of standard deviation 1, and rounds to the next half within 1 to 5.
So 60% of the clean rows and 11% of the corrupted ones are rated at least 4.5; of those rated so, 79% are clean on the
default task, against 40% of its pool. It does not know which skills dev and test ask for.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from dataclasses import dataclass

from ..errors import SettingError, suggestion
from ..pool import Instruction, Pool
from . import recipes
from .rows import CLEAN, row, share_out
from .skills import CODED_SKILLS, SKILLS, Fact, Skill

__all__ = ["TASKS", "EmbeddedTask", "TaskData", "generate_task"]

#: What the simulated judge means to rate clean and corrupted rows, and the standard deviation of its error.
CLEAN_RATING, CORRUPTED_RATING, RATING_ERROR = 4.5, 3.0, 1.0


@dataclass(frozen=True, slots=True)
class EmbeddedTask:
    """What a task asks.

    Attributes:
        target_skills: Skills that dev and test are made of.
        corruption: Share of the pool's rows with a corrupted answer, from 0 to 1, of those left to it by the recipe.
        num_dev: Dev rows.
        num_test: Test rows, the target skills alike often.
        dev_weights: How often dev asks each target skill beside the others, in their order; none: alike often.
        family: What dev and test are drawn from besides the seed; tasks of one family share them. None: the name.
        skills: All that the pool asks, by skill.
        recipe: How the pool is put together.
        worth: What a row is worth to who sees its hidden labels: the oracle's rule.
        is_live: Whether that changes with the stage, or with what was trained on before.
        is_sparing: Whether rows that are worth nothing do more harm than taking none.
    """

    target_skills: tuple[str, ...] = ("plural", "past", "add", "larger")
    corruption: float = 0.6
    num_dev: int = 64
    num_test: int = 256
    dev_weights: tuple[int, ...] = ()
    family: str | None = None
    skills: tuple[Skill, ...] = SKILLS
    recipe: recipes.Recipe = recipes.mixed
    worth: recipes.Worth = recipes.clean_and_asked
    is_live: bool = False
    is_sparing: bool = False


#: By name, what the embedded tasks ask; `config.TASK_SETTINGS` has their horizons and sizes.
TASKS: dict[str, EmbeddedTask] = {
    "default": EmbeddedTask(),
    **{f"noise-{percent}": EmbeddedTask(corruption=percent / 100, family="noise") for percent in (0, 30, 60, 90)},
    "target": EmbeddedTask(("plural",), corruption=0.1, num_dev=40, num_test=100, skills=CODED_SKILLS),
    "redundancy": EmbeddedTask(corruption=0.0, recipe=recipes.copies, is_live=True),
    "curriculum": EmbeddedTask(
        corruption=0.0,
        skills=CODED_SKILLS,
        recipe=recipes.curriculum,
        worth=recipes.by_stage,
        is_live=True,
    ),
    "thrift": EmbeddedTask(recipe=recipes.thrift, is_sparing=True),
    "shift": EmbeddedTask(corruption=0.1, num_dev=112, num_test=200, dev_weights=(27, 27, 1, 1), skills=CODED_SKILLS),
    "large": EmbeddedTask(),
}


@dataclass(frozen=True, slots=True)
class TaskData:
    """The three sets of one task, disjoint by content and by fact."""

    pool: Pool
    dev: Pool
    test: Pool


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
    stream = f"{task.family or name}/{seed}"
    rng = random.Random(stream)
    facts = {skill.name: share_out(skill, rng) for skill in task.skills}
    targets = [facts[skill] for skill in task.target_skills]
    weights = task.dev_weights or (1,) * len(targets)
    counts = [task.num_dev * weight // sum(weights) for weight in weights]
    dev = [_asked(s.skill, s.dev, count, rng) for s, count in zip(targets, counts, strict=True)]
    test = [_asked(s.skill, s.test, task.num_test // len(targets), rng) for s in targets]
    # The pool comes last: then dev and test are the same for every size of it.
    judge = random.Random(f"{stream}/rating")  # a stream of its own: ratings leave the rows as they are
    rows = itertools.islice(task.recipe(facts, task.target_skills, task.corruption, rng), pool_size)
    source = f"embedded:{name}"
    return TaskData(
        Pool((_rated(row, judge) for row in rows), source),
        Pool(itertools.chain(*dev), f"{source}/dev"),
        Pool(itertools.chain(*test), f"{source}/test"),
    )


def _asked(skill: Skill, facts: tuple[Fact, ...], count: int, rng: random.Random) -> list[Instruction]:
    # Distinct (fact, wording) pairs, so that no dev or test row counts twice.
    pairs = [(fact, wording) for fact in facts for wording in range(4)]
    return [row(skill, skill.ask(fact, wording), fact.answer) for fact, wording in rng.sample(pairs, count)]


def _rated(row: Instruction, judge: random.Random) -> Instruction:
    meant = CLEAN_RATING if row.fields["corruption"] == CLEAN else CORRUPTED_RATING
    rating = round(2 * judge.gauss(meant, RATING_ERROR)) / 2
    return dataclasses.replace(row, fields={**row.fields, "rating": min(max(rating, 1.0), 5.0)})
