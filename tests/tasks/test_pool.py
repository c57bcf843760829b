"""Verifiers in processes of their own: whatever they do, every answer gets a score within its limit."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from opd_megatron.errors import ConfigError
from opd_megatron.tasks import task_named
from opd_megatron.tasks.pool import Question, VerifierPool

OF = "tests.tasks.verifiers:"


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    found = VerifierPool(2, time_limit=3.0)
    yield found
    found.close()


def _ask(pool: VerifierPool, *questions: tuple[str, str], row: str = "1") -> list[tuple[float, str | None]]:
    asked = [Question(OF + name, answer, {"answer": row}) for name, answer in questions]
    verdicts = [future.result(timeout=120) for future in pool.submit(asked)]
    return [(verdict.score, verdict.problem) for verdict in verdicts]


def test_scores_come_in_the_order_of_the_questions(pool: VerifierPool) -> None:
    found = _ask(pool, *[("length", "x" * n) for n in range(10)] * 5)
    assert found == [(n / 10, None) for n in range(10)] * 5


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("hangs", "timeout"), ("loops", "timeout"), ("raises", "KeyError: 'no such thing'"),
        ("leaves", "SystemExit: 3"), ("dies", "the verifier's process ended with -9"),
        ("takes_memory", "MemoryError: "),
        ("too_much", "ValueError: score 2.0 is not in [0, 1]"), ("no_number", "ValueError: could not convert"),
        ("missing", "ConfigError: task 'tests.tasks.verifiers:missing' cannot be imported"),
    ],
)  # fmt: skip
def test_a_verifier_that_fails_scores_0_and_says_why(pool: VerifierPool, name: str, problem: str) -> None:
    begin = time.monotonic()
    [(score, found), (other, none)] = _ask(pool, (name, "1"), ("equal", "1"))
    assert score == 0.0
    assert found is not None
    assert found.startswith(problem)
    assert (other, none) == (1.0, None), "the next answer is judged as ever"
    assert time.monotonic() - begin < 60


def test_what_a_verifier_prints_is_not_taken_for_a_score(pool: VerifierPool) -> None:
    assert _ask(pool, ("prints", "1"), ("equal", "2"), ("prints", "1")) == [(1.0, None), (0.0, None), (1.0, None)]


def test_what_a_verifier_starts_is_ended_with_it(pool: VerifierPool, tmp_path: Path) -> None:
    [(score, problem)] = _ask(pool, ("forks", "1"), row=str(tmp_path / "pid"))
    assert (score, problem) == (0.0, "timeout")
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def test_a_pool_that_is_closed_leaves_no_process() -> None:
    pool = VerifierPool(2, time_limit=60)
    pool.submit([Question(OF + "hangs", "1", {"answer": "1"})] * 2)
    deadline = time.monotonic() + 30
    while len(pool.processes) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    running = pool.processes
    pool.close()
    pool.close()
    assert len(running) == 2
    assert not any(_runs(pid) for pid in running)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gsm8", "unknown task 'gsm8': did you mean 'gsm8k'"),
        (
            "poetry",
            "unknown task 'poetry': tasks are gsm8k, math, code, ifeval, reasoning_gym:NAME, or module:function",
        ),
        ("tests.tasks.verifiers:NO_TASK", "is a int: give a function"),
        ("no.such.module:verify", "cannot be imported .*ModuleNotFoundError.*PYTHONPATH"),
    ],
)
def test_a_task_that_is_none_is_named(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as failure:
        task_named(name)
    assert "\n" not in str(failure.value)


def test_a_task_of_the_users_may_be_a_function_or_a_task() -> None:
    assert task_named(OF + "equal").verify("1", {"answer": "1"}) == 1.0
    assert task_named(OF + "TASK").columns == ("extra",)
