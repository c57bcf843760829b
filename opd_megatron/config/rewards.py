"""The section `rewards:`: who judges the student's answers, and what becomes of the scores."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from opd_megatron.config.sections import NonNegativeFloat, Section


class RewardsConfig(Section):
    task: str | None = None
    """Who judges answers: `gsm8k`, `math`, `code`, `ifeval`, `reasoning_gym:NAME`, or `module:function` of yours, which
    is given an answer and its row and returns a score in [0, 1]. null: nobody. An answer that was cut at
    rollout.max_new_tokens scores 0."""
    tasks: dict[str, str] = Field(default_factory=dict)
    """The same by the row's task, as in `routes`: `{math: math, code: mine:verify}`. Rows of others have `task`."""
    instruction: bool = True
    """Put what the task asks for, such as where the final answer stands, after the user's (last) message."""
    advantage: Literal["grpo", "group_mean", "leave_one_out"] = "grpo"
    """Of an answer among those to its prompt, with objective.lambda_rl above 0: `grpo` is (r - mean) / (std + 1e-4),
    `group_mean` the same undivided, `leave_one_out` r less the mean of the others."""
    equal_groups: Literal["keep", "drop"] = "keep"
    """Answers to a prompt that all have one reward teach nothing by it: `keep` counts their tokens in the policy
    gradient's mean, `drop` does not."""
    length_penalty: NonNegativeFloat = 0.0
    """Taken off the reward of an answer of rollout.max_new_tokens, in proportion off a shorter one."""
    format_penalty: NonNegativeFloat = 0.0
    """Taken off the reward of an answer in which the task finds no final answer."""
    time_limit: PositiveFloat = 10.0
    """Seconds that judging one answer may take; it scores 0 after that."""
    workers: PositiveInt | None = None
    """Processes that judge, beside the first rank; by default half of its cores, 8 at most."""

    @property
    def judges(self) -> bool:
        """Whether anybody does."""
        return self.task is not None or bool(self.tasks)

    def of_evaluation(self, task: str | None) -> RewardsConfig:
        """Who judges held-out answers: the same limits, one task for all rows, no penalties."""
        kept = {name: getattr(self, name) for name in ("instruction", "time_limit", "workers")}
        return RewardsConfig(task=task, **kept)

    def task_of(self, row_task: str | None) -> str | None:
        """Who judges answers to a row of a task; None for nobody."""
        return self.task if row_task is None else self.tasks.get(row_task, self.task)
