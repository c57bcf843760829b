"""Verifiers as users write them, good and bad. Imported by the processes that judge."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

from opd_megatron.tasks import Task


def length(answer: str, row: Any) -> float:
    return min(1.0, len(answer) / 10)


def equal(answer: str, row: Any) -> float:
    return float(answer.strip() == row["answer"])


def hangs(answer: str, row: Any) -> float:
    time.sleep(600)
    return 1.0


def loops(answer: str, row: Any) -> float:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        pass


def prints(answer: str, row: Any) -> float:
    print('{"score": 0.25}\n' * 1000)
    os.write(1, b"x" * 100_000)
    sys.stderr.write("noise\n")
    return 1.0


def raises(answer: str, row: Any) -> float:
    raise KeyError("no such thing")


def leaves(answer: str, row: Any) -> float:
    sys.exit(3)


def dies(answer: str, row: Any) -> float:
    os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


def takes_memory(answer: str, row: Any) -> float:
    return float(len(bytearray(64 * 2**30)) > 0)


def forks(answer: str, row: Any) -> float:
    """Leaves a process behind and hangs."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(row["answer"], "w") as file:
        file.write(str(child.pid))
    time.sleep(600)
    return 1.0


def too_much(answer: str, row: Any) -> float:
    return 2.0


def no_number(answer: str, row: Any) -> Any:
    return "good"


NO_TASK = 3
TASK = Task(equal, instruction="Answer with the number alone.", columns=("extra",))
