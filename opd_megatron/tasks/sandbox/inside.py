"""The process of one program: confines itself, runs it, says what came of it.

    python -I -B inside.py ROOT RESULT

ROOT is the folder that holds this package, RESULT the descriptor that the outcome is written to. The request comes over
stdin as JSON: `program`, `nonce`, `folder`, `readable`, `kind`, and limits.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any


def main(root: str, result: int) -> None:
    sys.path.insert(0, root)
    from opd_megatron.tasks.sandbox import landlock, linux, namespaces, seccomp

    sys.path.remove(root)
    linux.prctl(linux.PR_SET_PDEATHSIG, 9)
    request = json.load(sys.stdin)
    if os.getppid() != request["asked_by"]:
        os._exit(1)  # it was gone before that was said
    folder: str = request["folder"]
    if request["kind"] == "namespaces":
        namespaces.confine(request["readable"], folder, request["disk_bytes"])
    else:
        landlock.confine(request["readable"], namespaces.DEVICES, folder)
    _limit(request)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
    os.chdir(folder)
    os.environ.clear()
    os.environ["TMPDIR"] = os.environ["HOME"] = folder
    seccomp.confine()
    problem = _problem_of(request["program"])
    os.write(result, json.dumps({"nonce": request["nonce"], "problem": problem}).encode())
    os._exit(0)  # without what a program has left to run at the end


def _limit(request: dict[str, Any]) -> None:
    seconds = int(request["cpu_seconds"])
    for what, soft, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_AS, request["memory_bytes"], request["memory_bytes"]),
        (resource.RLIMIT_FSIZE, request["file_bytes"], request["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
    ):
        resource.setrlimit(what, (soft, hard))


def _problem_of(program: str) -> str | None:
    """Runs a program to its end; returns what it raised."""
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    except BaseException as error:  # an exit before the tests is no success either
        try:
            return f"{type(error).__name__}: {error}"[:300]
        except BaseException:
            return "an error that cannot be shown"
    return None


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
