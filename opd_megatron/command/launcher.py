"""How a command starts, fails and ends: one process or torchrun's ranks, one line for an error that a user can correct.

Exit codes: 0 done, or stopped by a signal with everything saved (`stopping`), 2 an OPDError (one line on stderr, no
traceback), 130 Ctrl-C, anything else as Python has it.

Several ranks may meet the same error, or only one of them, which then is not always rank 0. So every rank leaves its
message in torchrun's error file. Ranks that this module started stay silent and the parent prints the first message;
under a torchrun of the user's, rank 0 prints its own and torchrun reports the file of whichever rank failed first.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from opd_megatron.config import RunConfig
from opd_megatron.errors import ConfigError, OPDError
from opd_megatron.system.ranks import launched
from opd_megatron.system.signals import STOP_SIGNALS, is_repeated, leave_word_of_stop

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

USER_ERROR, INTERRUPTED, TERMINATED = 2, 130, 143
_STOPPED = (TERMINATED, *(-number for number in STOP_SIGNALS))
"""Exit codes of a rank that a stop signal ended before it could take note of it."""
PARENT_REPORTS = "OPD_MEGATRON_PARENT_REPORTS"
_DEAF_SECONDS = 1.0
"""After which a main thread that has not taken note of a signal is taken to wait in foreign code."""
AGENT_SIGNALS = "SIGINT,SIGHUP,SIGQUIT"
"""What torchrun ends its ranks on. Not SIGTERM: half a minute later it kills them, however much they have to save."""


def run_command(body: Callable[[], int | None]) -> int:
    """Runs a command and turns what it raises into an exit code; unexpected exceptions keep their traceback."""
    try:
        return body() or 0
    except OPDError as error:
        _report(f"opd-megatron: error: {error}")
        return USER_ERROR
    except KeyboardInterrupt:
        _report("opd-megatron: interrupted")
        return INTERRUPTED
    except Exception:
        if is_rank():
            # When another rank has failed, our collectives break too. Its error is the cause, and the launcher is
            # about to end us because of it: that must come before a traceback that would hide the cause.
            time.sleep(2)
        raise


def is_rank() -> bool:
    """Returns True in a process that torchrun (ours or the user's) started."""
    return launched() is not None


def is_first_rank() -> bool:
    """Returns True on the one process that prints results."""
    try:
        ranks = launched()
    except ConfigError:  # each process says so
        return True
    return ranks is None or ranks.rank == 0


def tell(lines: Sequence[str]) -> None:
    """Prints what was decided for a run, once for all ranks; warnings go to stderr."""
    if is_first_rank():
        for line in lines:
            print(line, file=sys.stderr if line.startswith("warning") else sys.stdout, flush=True)


def needs_launch(config: RunConfig) -> bool:
    """True when the run needs more ranks than this plainly started process."""
    return config.world_size > 1 and not is_rank()


def launch(module: str, argv: Sequence[str], ranks: int) -> int:
    """Runs `python -m module argv...` on `ranks` ranks of this machine under torchrun; returns the exit code."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // ranks)))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id=uuid.uuid4().hex, max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", logs_specs=DefaultLogsSpecs(),
        signals_to_handle=AGENT_SIGNALS,
    )  # fmt: skip
    return run_agent(lambda: elastic_launch(config, sys.executable)("-m", module, *argv))


def run_agent(agent: Callable[[], object]) -> int:
    """Runs one of torchrun's agents until its ranks have ended; returns the exit code and prints why it is not 0."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _silence_torchrun()
    stop = _PassStopSignalsOn()
    os.environ[PARENT_REPORTS] = "1"
    try:
        stop.install()
        agent()
    except ChildFailedError as error:
        if stop.first is not None and all(failure.exitcode in _STOPPED for failure in error.failures.values()):
            leave_word_of_stop()
            return 0  # ranks that were still importing: there was nothing to save
        return _exit_code_of(error.failures)
    except _NothingRunsError:
        return _stopped_at_the_start()
    except SignalException as error:
        interrupted = error.sigval == signal.SIGINT
        print(f"opd-megatron: {'interrupted' if interrupted else f'ended by {error.sigval.name}'}", file=sys.stderr)
        return INTERRUPTED if interrupted else TERMINATED
    finally:
        stop.uninstall()
        del os.environ[PARENT_REPORTS]
    return 0


class _PassStopSignalsOn:
    """The launcher's side of `system.signals`: the ranks, which are sessions of their own, get the signal that it
    gets."""

    def __init__(self) -> None:
        self.first: float | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._reads, self._writes = os.pipe()
        self._other_fd = -1

    def install(self) -> None:
        self._before = {number: signal.signal(number, self._pass_on) for number in STOP_SIGNALS}
        os.set_blocking(self._writes, False)
        self._other_fd = signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="stop signals", daemon=True).start()

    def uninstall(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._other_fd)
        os.close(self._writes)

    def _watch(self) -> None:
        """Ends the process where its main thread cannot: torchrun waits for other machines in C++ for minutes."""
        with open(self._reads, "rb", buffering=0) as told:
            while numbers := told.read(64):
                time.sleep(_DEAF_SECONDS)
                if self.first is None and not set(numbers).isdisjoint(STOP_SIGNALS) and not child_pids():
                    os._exit(_stopped_at_the_start())

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        from torch.distributed.elastic.multiprocessing import SignalException

        if is_repeated(self.first):
            raise SignalException(f"signal {number} again", sigval=signal.Signals(number))
        if self.first is None:
            self.first = time.monotonic()
            ranks = child_pids()
            if not ranks:
                raise _NothingRunsError
            for pid in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)


class _NothingRunsError(BaseException):
    """A stop signal came before there were ranks."""


def _stopped_at_the_start() -> int:
    leave_word_of_stop()
    print("opd-megatron: stopped before its ranks had started: the same command starts it", file=sys.stderr, flush=True)
    return 0


def child_pids() -> list[int]:
    """Processes that this one has started and that run."""
    lists = [path.read_text().split() for path in Path("/proc/self/task").glob("*/children")]
    return [int(pid) for pids in lists for pid in pids]


def available_cores() -> int:
    """Counts the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def leave_cleanly_on_sigterm() -> None:
    """Makes SIGTERM unwind the stack, so that `with` blocks end the engine and close files."""

    def _exit(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, _exit)


def _silence_torchrun() -> None:
    """Its own reports of a failed rank are tables and tracebacks; ours is one line."""
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _report(line: str) -> None:
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        reply = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": reply}))
    if PARENT_REPORTS not in os.environ and is_first_rank():
        print(line, file=sys.stderr, flush=True)


def _exit_code_of(failures: dict[int, ProcessFailure]) -> int:
    ordered = sorted(failures.items(), key=lambda item: (item[1].timestamp, item[0]))
    for _, failure in ordered:
        reply = failure.error_file_data["message"]
        if failure.exitcode in (USER_ERROR, INTERRUPTED) and isinstance(reply, dict):
            print(reply["message"], file=sys.stderr)
            return failure.exitcode
    # Ranks that ended after SIGTERM did so because another one failed first.
    causes = [item for item in ordered if item[1].exitcode not in (TERMINATED, -signal.SIGTERM)] or ordered
    rank, failure = causes[0]
    how = f"signal {failure.signal_name()}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    print(f"opd-megatron: rank {rank} failed with {how}; the other ranks were stopped", file=sys.stderr)
    return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
