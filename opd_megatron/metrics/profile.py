"""A trace of one step, for Perfetto or chrome://tracing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from opd_megatron.errors import one_line

FOLDER = "profile"


@contextmanager
def profiled(folder: Path, step: int, rank: int, on_note: Callable[[str], None]) -> Iterator[None]:
    """Watches what is done inside with torch's profiler and writes `step-N-rank-R.json.gz`. That it cannot be written
    ends no run."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as watched:
        yield
    path = folder / f"step-{step}-rank-{rank}.json.gz"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        watched.export_chrome_trace(str(path))
    except Exception as error:
        on_note(f"warning: no trace of step {step} ({one_line(error)})")
        return
    if rank == 0:
        on_note(f"trace of step {step}: {path}")
