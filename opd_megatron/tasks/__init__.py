"""Tasks with answers that can be judged: what a reward is, and what accuracy counts.

base.py      Task: how an answer to a row is judged
answers.py   final answers in texts, compared by math-verify
gsm8k.py     grade-school problems: the last number, or what stands behind ####
boxed.py     `math`: what is in the last \\boxed{}
code.py      programs that are judged by tests, run in sandbox/
ifeval.py    instructions whose keeping can be checked
reasoning.py `reasoning_gym:NAME`
pool.py      verifiers in processes of their own, with a time limit for each answer; worker.py is such a process

A new task is a file with a `TASK`, and a line in `TASKS`.
"""

from __future__ import annotations

import importlib
import os
import sys
from difflib import get_close_matches
from typing import Any

from opd_megatron.errors import ConfigError
from opd_megatron.tasks import reasoning
from opd_megatron.tasks.base import Task

__all__ = ["TASKS", "Task", "task_named"]

TASKS = {
    "gsm8k": "opd_megatron.tasks.gsm8k", "math": "opd_megatron.tasks.boxed", "code": "opd_megatron.tasks.code",
    "ifeval": "opd_megatron.tasks.ifeval",
}  # fmt: skip
"""Name -> its module, imported when it is asked for."""


def task_named(name: str) -> Task:
    """Finds a task by its name, or the user's `module:function` (a `Task`, or a function of an answer and its row).

    Raises:
        ConfigError: there is none of that name, or the user's cannot be imported.
    """
    if name.startswith(reasoning.PREFIX):
        try:
            return reasoning.named(name)
        except ValueError as error:
            raise ConfigError(f"unknown task {name!r}: {error}") from None
    if ":" in name:
        return _of_user(name)
    if name not in TASKS:
        near = get_close_matches(name, TASKS, n=1)
        others = f"tasks are {', '.join(TASKS)}, {reasoning.PREFIX}NAME, or module:function"
        hint = f"did you mean {near[0]!r}?" if near else others
        raise ConfigError(f"unknown task {name!r}: {hint}")
    found: Task = importlib.import_module(TASKS[name]).TASK
    return found


def _of_user(name: str) -> Task:
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:  # a console script has its own folder there, and not where it was started
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except Exception as error:  # importing runs the user's code
        raise ConfigError(
            f"task {name!r} cannot be imported ({type(error).__name__}: {error}): give module:function, of a module "
            "on PYTHONPATH"
        ) from None
    if isinstance(found, Task):
        return found
    if not callable(found):
        raise ConfigError(f"task {name!r} is a {type(found).__name__}: give a function of an answer and its row")
    return Task(found, needs_answer=False)
