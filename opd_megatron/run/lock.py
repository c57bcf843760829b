"""One owner of a run directory: a lock file with host, process and start, and a pulse by which other hosts see it live.

    run.lock    {"host": ..., "machine": ..., "pid": ..., "started": ..., "since": ...}

A process of this machine is asked for by its id and start time, so that a lock of a killed run is known at once. The
owner on another host renews the file's time every few seconds; one that stays as it is for a while has none. No clock
of one host is compared with another's.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd_megatron.errors import ConfigError

LOCK_FILE = "run.lock"
PULSE_SECONDS = 5.0
_MISSED = 4
"""Pulses that the owner on another host may miss before its lock counts as left behind."""


_UNKNOWN = {"pid": "?", "host": "?", "since": "?"}


class RunLock:
    """The lock of one run directory. One process of a run takes it.

    Args:
        note: is told when a lock was left behind, or has to be waited for.
        key: of the configuration, that names the folder.
    """

    def __init__(
        self, folder: Path, note: Callable[[str], None] = lambda _: None, pulse: float = PULSE_SECONDS, *,
        key: str = "output_dir",
    ) -> None:  # fmt: skip
        self._key = key
        self._folder, self._path, self._note, self._pulse = folder, folder / LOCK_FILE, note, pulse
        self._mine = json.dumps(_this_process())
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Takes the lock; returns with it held.

        Raises:
            ConfigError: another process that lives has it.
        """
        while not self._create():
            theirs = self._read()
            if theirs is None:
                continue  # it went away in between
            if not self._left_behind(theirs):
                raise ConfigError(
                    f"{self._key}={str(self._folder)!r} is in use by process {theirs.get('pid')} on host "
                    f"{theirs.get('host')} since {theirs.get('since')}: wait for it or end it, or choose another "
                    f"{self._key}"
                )
            self._note(f"took over from process {theirs.get('pid')} on host {theirs.get('host')}, which is gone")
            self._remove(theirs)
        self._thread = threading.Thread(target=self._beat, daemon=True, name="run-lock")
        self._thread.start()

    def release(self) -> None:
        """Gives the lock back. Safe to call twice, and without having it."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
            if self._read() == json.loads(self._mine):
                with contextlib.suppress(OSError):
                    self._path.unlink()

    def _create(self) -> bool:
        """Makes the file with its content in one move; False when there is one."""
        mine = self._path.with_name(f".{LOCK_FILE}.{os.getpid()}.{threading.get_ident()}")
        mine.write_text(self._mine)
        try:
            os.link(mine, self._path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            return self._create_exclusively()
        finally:
            mine.unlink()
        return True

    def _create_exclusively(self) -> bool:
        try:
            with self._path.open("x") as file:
                file.write(self._mine)
        except FileExistsError:
            return False
        return True

    def _read(self) -> dict[str, Any] | None:
        """Reads who has the lock; None when nobody has. A file that cannot be understood has an unknown owner."""
        try:
            return _parsed(self._path.read_text(errors="replace"))
        except FileNotFoundError:
            return None
        except OSError:
            return dict(_UNKNOWN)

    def _left_behind(self, theirs: dict[str, Any]) -> bool:
        mine = _this_process()
        if theirs.get("machine") == mine["machine"]:
            return _start_of(theirs.get("pid")) != theirs.get("started")
        self._note(f"waiting to see whether process {theirs.get('pid')} on host {theirs.get('host')} still runs here")
        before = self._time()
        deadline = time.monotonic() + _MISSED * self._pulse
        while time.monotonic() < deadline:
            time.sleep(self._pulse / 4)
            if self._time() != before:
                return False
        return True

    def _time(self) -> int | None:
        try:
            return self._path.stat().st_mtime_ns
        except OSError:
            return None

    def _remove(self, theirs: dict[str, Any]) -> None:
        """Removes their lock, and not one that a third process has taken meanwhile."""
        aside = self._path.with_name(f".{LOCK_FILE}.stale.{os.getpid()}")
        with contextlib.suppress(OSError):
            os.rename(self._path, aside)
            if _parsed(aside.read_text(errors="replace")) != theirs:
                os.link(aside, self._path)
        with contextlib.suppress(OSError):
            aside.unlink()

    def _beat(self) -> None:
        while not self._stop.wait(self._pulse):
            with contextlib.suppress(OSError):  # a pulse that fails is a pulse missed
                os.utime(self._path)


def _parsed(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else dict(_UNKNOWN)


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _machine() -> str:
    """Names the set of processes whose ids mean something here: a boot of a host, a namespace of a container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _start_of(pid: Any) -> str | None:
    """When a process began, in the kernel's own count; None when there is no such process."""
    if not isinstance(pid, int):
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        return _alive_without_proc(pid)
    return None if fields[0] == "Z" else fields[19]


def _alive_without_proc(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "unknown"
