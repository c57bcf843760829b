"""What a run's tasks want of the rows of its data: columns, and an instruction after the question.

Those of `rewards:` of all rows; that of `evaluation:` of held-out rows, in their place.
"""

from __future__ import annotations

from dataclasses import replace

from opd_megatron.config import RewardsConfig, RunConfig
from opd_megatron.data.rows import Example
from opd_megatron.tasks import task_named


def trained_by(config: RunConfig) -> RewardsConfig:
    """Who judges answers to rows that are trained on."""
    return config.rewards


def evaluated_by(config: RunConfig) -> RewardsConfig:
    """Who judges answers to held-out rows."""
    task = config.evaluation.task
    return config.rewards if task is None else config.rewards.of_evaluation(task)


def columns_of(judges: RewardsConfig) -> tuple[str, ...]:
    """Columns that the tasks want, as they are. Raises ConfigError for a task that is none."""
    names = [name for name in (judges.task, *judges.tasks.values()) if name is not None]
    return tuple(dict.fromkeys(column for name in names for column in task_named(name).columns))


def need_answers(config: RunConfig) -> bool:
    """Whether held-out rows must have a gold answer: their likelihood is measured, unless a task judges answers and
    needs none."""
    task = config.evaluation.task
    return task is None or task_named(task).needs_answer


def instructed(judges: RewardsConfig, row: Example) -> Example:
    """Puts what the row's task asks for after the user's (last) message."""
    name = judges.task_of(row.task) if judges.instruction else None
    found = "" if name is None else task_named(name).instruction
    instruction = found if isinstance(found, str) else found(row.fields)
    if not instruction:
        return row
    messages = list(row.messages)
    for place in reversed(range(len(messages))):
        if messages[place][0] == "user":
            messages[place] = ("user", f"{messages[place][1]}\n\n{instruction}")
            break
    return replace(row, question=f"{row.question}\n\n{instruction}", messages=tuple(messages))
