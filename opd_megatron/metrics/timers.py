"""Seconds per phase of a step, and the peak memory of this process."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class PhaseTimers:
    """Wall-clock seconds of each phase of a step.

    with timers.phase("rollout"): ...
    metrics = timers.collect()          # {"time/rollout": 1.2, "time/step": 3.4}, and the next step begins

    A phase entered twice adds up. Time in a nested phase counts for the inner one only, so phases never sum to more
    than `time/step`, which runs from `start` (or the first phase after `collect`) to `collect`.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._begin: float | None = None
        self._mark = 0.0

    def start(self) -> None:
        """Begins the step's clock before its first phase."""
        self._begin = self._now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charges the time inside the block to `time/<name>`, waiting for the GPU at both ends."""
        self._charge()
        self._open.append(name)
        try:
            with torch.profiler.record_function(name):  # of a trace (`logging.profile_step`)
                yield
        finally:
            self._charge()
            self._open.pop()

    def so_far(self, name: str) -> float:
        """Seconds of a phase of this step that is over."""
        return self._seconds.get(name, 0.0)

    def collect(self) -> dict[str, float]:
        """Returns the seconds since the last call, as `time/<phase>` and `time/step`, and clears them."""
        assert not self._open, f"collect() inside phase {self._open[-1]!r}"
        begin = self._begin
        seconds = {f"time/{name}": value for name, value in self._seconds.items()}
        seconds["time/step"] = 0.0 if begin is None else self._now() - begin
        self._seconds, self._begin = {}, None
        return seconds

    def _charge(self) -> None:
        now = self._now()
        if self._open:
            self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._mark
        if self._begin is None:
            self._begin = now
        self._mark = now

    def _now(self) -> float:
        # Kernels run behind the Python that launched them: without this a phase would be charged for its predecessor.
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._clock()


def peak_memory_bytes() -> int:
    """Measures `memory/peak`: most GPU memory PyTorch has held in this process; without a GPU, its largest resident
    set."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():  # unlike ru_maxrss, this does not start at the size of the process that started us
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
