"""Starts a program in the sandbox and watches it. See the room's `__init__`."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_LONGEST_RESULT = 4096
_LOOK_SECONDS = 0.1
"""Between two looks at how much a program has written."""
_ROOT = str(Path(__file__).parents[3])
_READABLE = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", sys.prefix, sys.base_prefix)
"""What an interpreter reads."""

Kind = Literal["namespaces", "landlock"]


class SandboxError(RuntimeError):
    """No program can be run here."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one program."""

    seconds: float = 6.0
    """Wall clock."""
    cpu_seconds: int = 5
    memory_bytes: int = 2**30
    """Address space."""
    file_bytes: int = 16 * 2**20
    """Of one file."""
    disk_bytes: int = 64 * 2**20
    """Of all files."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a program."""

    passed: bool
    """It has run to its end without an error."""
    problem: str = ""
    """Why not."""


@functools.cache
def confinement() -> tuple[Kind | None, str]:
    """How programs are confined on this machine (None: they cannot be), and why so, for a person. Tried once."""
    if sys.platform != "linux":
        return None, f"programs are confined on Linux only, this is {sys.platform}"
    from opd_megatron.tasks.sandbox import landlock, linux, namespaces, seccomp

    if not seccomp.available():
        return None, f"this kernel has no seccomp, or none that is known for {linux.MACHINE}"
    if namespaces.available():
        return "namespaces", "user namespaces, seccomp and resource limits"
    version = landlock.version()
    if version:
        return "landlock", f"Landlock {version}, seccomp and resource limits (user namespaces are not allowed here)"
    return None, "user namespaces are not allowed here, and this kernel has no Landlock (5.13 or newer with it has)"


def run_program(program: str, limits: Limits | None = None, kind: Kind | None = None) -> Outcome:
    """Runs a Python program to its end, or to a limit.

    Args:
        kind: of confinement; the best that the machine has by default.

    Raises:
        SandboxError: programs cannot be confined here.
    """
    limits = limits or Limits()
    best, why = confinement()
    if best is None:
        raise SandboxError(f"no program of a model's is run here: {why}")
    kind = kind or best
    folder = "/sandbox" if kind == "namespaces" else tempfile.mkdtemp(prefix="opd-sandbox-")
    request = {
        "program": program, "asked_by": os.getpid(), "nonce": secrets.token_hex(16), "folder": folder, "kind": kind,
        "readable": list(dict.fromkeys(_READABLE)), "cpu_seconds": limits.cpu_seconds,
        "memory_bytes": limits.memory_bytes, "file_bytes": limits.file_bytes, "disk_bytes": limits.disk_bytes,
    }  # fmt: skip
    try:
        return _watched(request, limits)
    finally:
        if kind == "landlock":
            _remove(folder)


def _watched(request: dict[str, Any], limits: Limits) -> Outcome:
    reads, writes = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-I", "-B", str(Path(__file__).with_name("inside.py")), _ROOT, str(writes)],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(writes,), env={},
        cwd="/", start_new_session=True,
    )  # fmt: skip
    os.close(writes)
    assert process.stdin is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request).encode())
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        watched = request["folder"] if request["kind"] == "landlock" else None
        text, problem = _result(reads, limits, watched)
    finally:
        os.close(reads)
        _end(process)
    if problem:
        return Outcome(False, problem)
    return _outcome(text, request["nonce"], process.returncode)


def _result(reads: int, limits: Limits, folder: str | None) -> tuple[bytes, str]:
    """Waits until the program's end of the pipe is closed; returns what it wrote, and why it is to be ended."""
    deadline, found = time.monotonic() + limits.seconds, b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            return found, f"timeout after {limits.seconds:g} s"
        if select.select([reads], [], [], min(left, _LOOK_SECONDS))[0]:
            part = os.read(reads, _LONGEST_RESULT)
            found += part
            if not part:
                return found, ""
            if len(found) > _LONGEST_RESULT:
                return found, "it wrote to where its outcome goes"
        if folder is not None and _size(folder) > limits.disk_bytes:
            return found, f"it wrote more than {limits.disk_bytes // 2**20} MiB"


def _outcome(text: bytes, nonce: str, code: int | None) -> Outcome:
    try:
        found = json.loads(text)
        if found["nonce"] == nonce:
            problem = found["problem"]
            return Outcome(problem is None, problem or "")
    except (ValueError, TypeError, KeyError):
        pass
    if code in (-signal.SIGXCPU, 256 - signal.SIGXCPU):
        return Outcome(False, "timeout of the processor")
    return Outcome(False, f"it ended before its tests did (exit code {code})")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends it, by force where it has not; what is below it goes with it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def _size(folder: str) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def _remove(folder: str) -> None:
    """Removes it with what the program made of it: folders without rights too."""
    for place, folders, _ in os.walk(folder):
        for name in folders:
            path = os.path.join(place, name)
            if not os.path.islink(path):
                with contextlib.suppress(OSError):
                    os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)
