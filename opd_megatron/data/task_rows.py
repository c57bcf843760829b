"""What a run's tasks (`rewards:`) want of the rows of its data: columns, and an instruction after the question."""

from __future__ import annotations

from dataclasses import replace

from opd_megatron.config import RewardsConfig
from opd_megatron.data.rows import Example
from opd_megatron.tasks import task_named


def columns_of(rewards: RewardsConfig) -> tuple[str, ...]:
    """Columns that the tasks want, as they are. Raises ConfigError for a task that is none."""
    names = [name for name in (rewards.task, *rewards.tasks.values()) if name is not None]
    return tuple(dict.fromkeys(column for name in names for column in task_named(name).columns))


def instructed(rewards: RewardsConfig, row: Example) -> Example:
    """Puts what the row's task asks for after the user's (last) message."""
    name = rewards.task_of(row.task) if rewards.instruction else None
    instruction = "" if name is None else task_named(name).instruction
    if not instruction:
        return row
    messages = list(row.messages)
    for place in reversed(range(len(messages))):
        if messages[place][0] == "user":
            messages[place] = ("user", f"{messages[place][1]}\n\n{instruction}")
            break
    return replace(row, question=f"{row.question}\n\n{instruction}", messages=tuple(messages))
