"""A process that judges answers, one line of JSON after another.

    python -m opd_megatron.tasks.worker READ WRITE     numbers of the descriptors that questions and scores go over

What a verifier prints goes nowhere; what it starts is of the process's own session, which is killed with it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

MEMORY_BYTES = 4 * 2**30
"""Of address space, of a verifier."""


def judge(question: dict[str, Any]) -> dict[str, Any]:
    """Scores one answer; a verifier that raises says why and scores 0. A question without an answer only has what its
    task needs imported."""
    from opd_megatron.tasks import task_named

    try:
        task = task_named(question["task"])
        if "answer" not in question:
            return {"score": 0.0}
        answer = question["answer"]
        found = task.extract is None or task.extract(answer) is not None
        score = float(task.verify(answer, question["row"]))
        if not 0 <= score <= 1:
            raise ValueError(f"score {score} is not in [0, 1]")
        return {"score": score, "found": found}
    except BaseException as error:  # SystemExit of a verifier ends no run either
        return {"score": 0.0, "error": f"{type(error).__name__}: {error}"[:300]}


def main(read: int, write: int) -> None:
    """Answers until the other end closes."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    soft = min(MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1] % 2**63)
    resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with os.fdopen(read, encoding="utf-8") as questions, os.fdopen(write, "w", encoding="utf-8") as scores:
        for line in questions:
            scores.write(json.dumps(judge(json.loads(line))) + "\n")
            scores.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
