r"""Mathematics (MATH, arXiv 2103.03874): the final answer is an expression in a \boxed{}."""

from __future__ import annotations

from opd_megatron.tasks.answers import in_box, same
from opd_megatron.tasks.base import Row, Task, TaskData


def verify(answer: str, row: Row) -> float:
    """1 where the last box holds what the gold answer's last box holds, or the gold answer as it is."""
    gold = str(row["answer"])
    found, wanted = in_box(answer), in_box(gold)
    return float(found is not None and same(gold if wanted is None else wanted, found))


TASK = Task(
    verify, instruction=r"Think step by step, and put the final answer within \boxed{}.", extract=in_box,
    data=TaskData("HuggingFaceH4/MATH-500", prompt_column="problem"),
)  # fmt: skip
