"""Verifiers in processes of their own: a verifier that raises, hangs, prints, forks or takes memory scores 0, is
counted, and ends no run.

`submit` returns at once, so that verification runs beside other work.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from opd_megatron.tasks.base import Row

_START_SECONDS = 60.0
"""That a process may take to start and import what a task needs."""
_END_SECONDS = 5.0
"""That a process may take from closing its pipe to its end."""


@dataclass(frozen=True, slots=True)
class Question:
    """One answer to be judged."""

    task: str
    answer: str
    row: Row


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of it."""

    score: float
    problem: str | None = None
    """Why it is 0 where the verifier gave no score: `timeout`, or what it raised."""
    found: bool = False
    """Whether the answer has a final answer in it, where the task can tell."""


class VerifierPool:
    """Processes that judge answers, started when they are first wanted."""

    def __init__(self, workers: int, time_limit: float) -> None:
        """`time_limit`: seconds for one answer."""
        self._time_limit = time_limit
        self._waiting: queue.SimpleQueue[tuple[Question, Future[Verdict]] | None] = queue.SimpleQueue()
        self._workers = [_Worker() for _ in range(workers)]
        self._threads = [
            threading.Thread(target=self._serve, args=(worker,), daemon=True, name="verifier")
            for worker in self._workers
        ]  # fmt: skip
        for thread in self._threads:
            thread.start()

    def submit(self, questions: Sequence[Question]) -> list[Future[Verdict]]:
        """Has answers judged; every future comes to a verdict."""
        futures: list[Future[Verdict]] = [Future() for _ in questions]
        for pair in zip(questions, futures, strict=True):
            self._waiting.put(pair)
        return futures

    @property
    def processes(self) -> list[int]:
        """Ids of those that run."""
        return [pid for worker in self._workers if (pid := worker.pid) is not None]

    def close(self) -> None:
        """Ends the processes. Safe to call twice."""
        for _ in self._threads:
            self._waiting.put(None)
        for worker in self._workers:
            worker.kill()

    def _serve(self, worker: _Worker) -> None:
        while (item := self._waiting.get()) is not None:
            question, future = item
            try:
                future.set_result(worker.judge(question, self._time_limit))
            except Exception as error:  # a thread that ends would leave answers unjudged for ever
                future.set_result(Verdict(0.0, f"{type(error).__name__}: {error}"))


class _Worker:
    """One process, made again when it was killed. For one thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._write = self._read = -1
        self._prepared: set[str] = set()
        self._rest = b""

    def judge(self, question: Question, time_limit: float) -> Verdict:
        if self._process is None:
            self._start()
        if question.task not in self._prepared:
            found = self._asked({"task": question.task}, _START_SECONDS)
            if found.problem is not None:
                return found
            self._prepared.add(question.task)
        return self._asked({"task": question.task, "answer": question.answer, "row": dict(question.row)}, time_limit)

    def _asked(self, question: dict[str, Any], seconds: float) -> Verdict:
        try:
            answer = self._exchange((json.dumps(question) + "\n").encode(), time.monotonic() + seconds)
        except OSError:
            return Verdict(0.0, f"the verifier's process ended with {self._ended()}")
        if answer is None:
            self.kill()
            return Verdict(0.0, "timeout")
        found: dict[str, Any] = json.loads(answer)
        return Verdict(float(found["score"]), found.get("error"), bool(found.get("found")))

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def kill(self) -> None:
        """Ends the process and all that it has started."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for descriptor in (self._write, self._read):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _ended(self) -> int | str:
        """Ends a process whose pipe is closed; returns its exit code."""
        process = self._process
        code: int | str = "its pipe closed"
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(_END_SECONDS)
        self.kill()
        return code

    def _start(self) -> None:
        theirs_in, self._write = os.pipe()
        self._read, theirs_out = os.pipe()
        os.set_blocking(self._write, False)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "opd_megatron.tasks.worker", str(theirs_in), str(theirs_out)],
            pass_fds=(theirs_in, theirs_out), stdin=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._prepared, self._rest = set(), b""

    def _exchange(self, line: bytes, deadline: float) -> bytes | None:
        """Sends a line and waits for one; None where the process is too slow. Raises OSError when it is gone."""
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            readable, writable, _ = select.select([self._read], [self._write] if line else [], [], left)
            if writable:
                line = line[os.write(self._write, line[:65536]) :]
            if readable:
                found = os.read(self._read, 65536)
                if not found:
                    raise BrokenPipeError("the process has closed its end")
                self._rest += found
        answer, _, self._rest = self._rest.partition(b"\n")
        return answer
