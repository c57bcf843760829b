"""A child process that answers requests over a socket pair: started, watched, ended, its last error quoted.

Knows nothing of vLLM. The pair is private to the two processes, so no address and no key are needed, and either
side notices the other's end at once.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from opd_megatron.errors import EngineDiedError, RolloutError
from opd_megatron.rollout.shared_memory import SharedMemoryOf
from opd_megatron.system.signals import STOP_SIGNALS, raise_if_stop_requested, stop_requested

_POLL_SECONDS = 0.5
_alive: weakref.WeakSet[ChildProcess] = weakref.WeakSet()


class ChildProcess:
    """`python -m module FD` in a session of its own, with its output in a log file.

    It and what it starts are deaf to stop signals, which clusters send to all processes of a job: the current step
    still needs it, and `close` ends it.
    """

    def __init__(
        self,
        module: str,
        environment: Mapping[str, str],
        log_path: Path | None,
        timeout: float,
        *,
        start_timeout: float | None = None,
    ) -> None:
        """Starts the process.

        Args:
            timeout: seconds that a request may take, counted anew when the child says how far it is.
            start_timeout: the same for the request `start`; `timeout` by default.
        """
        self._timeout, self._start_timeout = timeout, start_timeout or timeout
        self.progress: Any = None
        """What the child last said of the request that it is at; None when it has said nothing."""
        self.log_hint = f"; see {log_path}" if log_path else ""
        if log_path is None:
            scratch = Path(tempfile.mkdtemp(prefix="opd-rollout-"))
            log_path = scratch / "rollout.log"
            weakref.finalize(self, shutil.rmtree, scratch, ignore_errors=True)
        self.log_path = log_path
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        self._shared_memory = SharedMemoryOf(self.log_path.with_name(f".{self.log_path.stem}.shared"))
        self._connection, theirs = Pipe()
        with self.log_path.open("ab") as log, _blocked(STOP_SIGNALS):
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno())],
                env=dict(environment), pass_fds=(theirs.fileno(),), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        theirs.close()
        _alive.add(self)

    def call(self, name: str, arguments: Any) -> Any:
        """Sends one request and returns its reply. Raises EngineDiedError, or RolloutError when the child refuses."""
        self.send(name, arguments)
        return self.receive(name)

    def send(self, name: str, arguments: Any) -> None:
        self.progress = None
        with self._death_is_an_error(name):
            self._connection.send((name, arguments))

    def receive(self, name: str) -> Any:
        with self._death_is_an_error(name):
            status, value = self._next(name)
            while status == "progress":
                self.progress = value
                status, value = self._next(name)
        if name == "start":
            self._shared_memory.look(self.process.pid)
        if status == "refused":
            raise RolloutError(value)
        return value

    def _next(self, name: str) -> tuple[str, Any]:
        """Waits for the next message of the child, which is at the request `name`."""
        setting, seconds = (
            ("startup_timeout", self._start_timeout) if name == "start" else ("request_timeout", self._timeout)
        )
        deadline = time.monotonic() + seconds
        while not self._connection.poll(_POLL_SECONDS):
            # Processes that the child forked may keep its end of the pair open.
            if self.process.poll() is not None and not self._connection.poll(0):
                raise EOFError
            if name == "start":
                self._shared_memory.look(self.process.pid)
                if stop_requested():
                    self._kill()  # it may take minutes to come up, and would have nothing to do then
                    raise_if_stop_requested()
            if time.monotonic() > deadline:
                self._kill()
                raise EngineDiedError(
                    f"rollout engine did not finish {name!r} within rollout.{setting}={seconds:g} s and was ended: "
                    f"raise it{self.log_hint}"
                    if self.progress is None
                    else f"rollout engine went no further in {name!r} for rollout.{setting}={seconds:g} s and was "
                    f"ended: raise it{self.log_hint}"
                )
        status, value = self._connection.recv()
        return status, value

    @contextlib.contextmanager
    def _death_is_an_error(self, name: str) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)  # the socket closes a moment before the process is gone
            self._kill()
            raise EngineDiedError(
                f"rollout engine (pid {self.process.pid}) ended during {name!r} with exit code "
                f"{self.process.returncode}; last log line: {self.last_error_line()!r}{self.log_hint}"
            ) from None

    def last_error_line(self) -> str:
        """Finds the last line of this process's log that names an error, else its last line."""
        with contextlib.suppress(OSError), self.log_path.open("rb") as log:
            log.seek(max(self._log_start, self.log_path.stat().st_size - 20_000))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
            telling = [line for line in lines if "Error" in line or "Exception" in line]
            return (telling or lines or [""])[-1][-300:]
        return ""

    def close(self, grace: float = 10.0) -> None:
        """Hangs up, which ends the child; ends it by force after `grace` seconds. Safe to call twice."""
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace)
        self._kill()

    def _kill(self) -> None:
        # The whole session: vLLM's own workers must not outlive it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._shared_memory.remove()
        _alive.discard(self)


@contextlib.contextmanager
def _blocked(signals: Sequence[signal.Signals]) -> Iterator[None]:
    """Blocks signals for a process that is started inside; this thread receives them afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@atexit.register
def _end_all() -> None:
    for child in list(_alive):
        child.close(grace=0)
