"""Graceful stop on SIGTERM or SIGUSR1: the current step ends and its state is saved.

SIGTERM is what SLURM, Kubernetes and `kill` send; SIGUSR1 is what `sbatch --signal=USR1@120` sends before a time
limit. The first one only leaves a note, which the trainer reads between steps; a second one ends the process at once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from opd_megatron.errors import StopRequestedError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME_REQUEST_SECONDS = 3.0
"""One request often arrives more than once: SLURM signals every process of a step, launchers pass it on."""

STOPPED_FILE = "OPD_MEGATRON_STOPPED_FILE"
"""Variable that names a file to make when a run stops before its last step: a job script cannot tell that from its
end otherwise, as both are exit code 0."""

_first: float | None = None


def note_stop_signals() -> None:
    """Turns stop signals into requests from here on. A later one is SystemExit, so that `with` blocks end the
    engine."""
    global _first
    _first = None
    for number in STOP_SIGNALS:
        signal.signal(number, _note)


def stop_requested() -> bool:
    """Tells whether this process was asked to stop. Other ranks may not have been."""
    return _first is not None


def leave_word_of_stop() -> None:
    """Makes the file that `STOPPED_FILE` names, where a job script asks for it."""
    path = os.environ.get(STOPPED_FILE)
    if path:
        Path(path).touch()


def raise_if_stop_requested() -> None:
    """Raises StopRequestedError if a stop was requested: for waits that no step depends on."""
    if stop_requested():
        raise StopRequestedError("asked to stop by a signal")


def is_repeated(first: float | None) -> bool:
    """Tells whether a signal that arrives now is another request than the one that arrived at `first`."""
    return first is not None and time.monotonic() - first > SAME_REQUEST_SECONDS


def _note(number: int, frame: FrameType | None) -> None:
    global _first
    if is_repeated(_first):
        sys.exit(128 + number)
    if _first is None:
        _first = time.monotonic()
