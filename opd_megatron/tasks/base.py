"""What a task is: how an answer to one of its rows is judged.

A task module has a `TASK`. It imports neither torch nor transformers: verifiers run in small processes of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
"""Of the data: `answer`, the gold one, and the task's `columns`."""
Verifier = Callable[[str, Row], float]
"""(answer as text, row) -> score in [0, 1]."""


@dataclass(frozen=True, slots=True)
class TaskData:
    """A data set whose rows `evaluate` takes where none is named."""

    source: str
    split: str = "test"
    subset: str | None = None
    prompt_column: str = "question"
    answer_column: str | None = "answer"

    def as_keys(self) -> dict[str, Any]:
        """The same as keys of a configuration."""
        return {
            "data.eval_source": self.source, "data.eval_split": self.split, "data.eval_subset": self.subset,
            "data.eval_prompt_column": self.prompt_column, "data.eval_answer_column": self.answer_column,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Task:
    """One kind of question."""

    verify: Verifier
    instruction: str | Callable[[Row], str] = ""
    """What a user's message needs after it, so that answers can be judged; it may depend on the row's `columns`."""
    columns: tuple[str, ...] = ()
    """Of the data that the verifier wants besides the gold answer, as they are; `name?` is one that may be missing."""
    extract: Callable[[str], str | None] | None = None
    """Finds the final answer in a text; None where there is no such thing."""
    needs_answer: bool = True
    """Whether rows must have a gold answer."""
    check: Callable[[Row], None] | None = None
    """Raises ValueError for a row that cannot be judged, whatever the answer: before anything is asked."""
    data: TaskData | None = None
    """Where its questions are usually taken from; None for a task of any data."""
