"""Grade-school problems (GSM8K, arXiv 2110.14168): the final answer is a number."""

from __future__ import annotations

from opd_megatron.tasks.answers import after_hashes, in_box, last_number, same
from opd_megatron.tasks.base import Row, Task, TaskData


def verify(answer: str, row: Row) -> float:
    """1 where the final answer is the gold one: behind `####`, in a box, or the last number."""
    gold = final_answer(str(row["answer"]))
    found = final_answer(answer)
    return float(gold is not None and found is not None and same(gold, found))


def final_answer(text: str) -> str | None:
    """Finds the number that an answer comes to."""
    for found in (after_hashes(text), in_box(text)):
        number = None if found is None else last_number(found)
        if number is not None:
            return number
    return last_number(text)


TASK = Task(
    verify,
    instruction="Think step by step, and end with the final answer as a number behind ####.",
    extract=final_answer,
    data=TaskData("openai/gsm8k", subset="main"),
)  # fmt: skip
