"""Clock and scales of `divergence.py`: interleaved timing, and memory as the allocator sees it."""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch loads; the profiler announces itself otherwise

import torch
from _divergence_contestants import Contestant
from torch.profiler import ProfilerActivity, profile, record_function

from opd_megatron.losses.core.buffers import release_memory


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of every contestant in every round."""

    rounds: Mapping[str, list[float]]

    def milliseconds(self, name: str) -> float:
        return 1e3 * statistics.median(self.rounds[name])

    def ratio(self, name: str, *others: str) -> float:
        """Median over rounds of the time over that of the fastest of `others` in the same round."""
        fastest = [min(seconds) for seconds in zip(*(self.rounds[other] for other in others), strict=True)]
        return statistics.median(a / b for a, b in zip(self.rounds[name], fastest, strict=True))


def race(contestants: Mapping[str, Callable[[], object]], rounds: int, device: str) -> Times:
    """Runs all contestants in turn, `rounds` times: what slows the machine down for a while slows all of them.

    Each round starts with another contestant, so that none always follows the same one. A round before the first is
    not counted: it compiles.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for name in _turns(contestants, rounds):
        times[name].append(seconds(contestants[name], device))
    return Times(times)


@dataclass(frozen=True, slots=True)
class Ratios:
    """Medians over rounds."""

    of: Mapping[str, float]
    """Time of every contestant over that of the yardstick just before it."""
    milliseconds: float
    """Of the yardstick."""


def beside(
    yardstick: Callable[[], object], contestants: Mapping[str, Callable[[], object]], rounds: int, device: str
) -> Ratios:
    """A race in which the yardstick runs before every contestant.

    For ratios that are claimed to a few per cent: the seconds from the first to the last of a round are too long.
    """
    ratios: dict[str, list[float]] = {name: [] for name in contestants}
    times = []
    for name in _turns(contestants, rounds):
        times.append(seconds(yardstick, device))
        ratios[name].append(seconds(contestants[name], device) / times[-1])
    return Ratios({name: statistics.median(x) for name, x in ratios.items()}, 1e3 * statistics.median(times))


def _turns(contestants: Mapping[str, Callable[[], object]], rounds: int) -> Iterator[str]:
    """Whose turn it is; what the one before left behind is collected."""
    names = list(contestants)
    for name in names:
        contestants[name]()
    gc.collect()
    gc.freeze()  # what compilers hold would make every collection take longer than what is timed
    try:
        for index in range(rounds):
            turn = index * len(names) // rounds
            for name in names[turn:] + names[:turn]:
                gc.collect()
                yield name
    finally:
        gc.unfreeze()


def seconds(run: Callable[[], object], device: str) -> float:
    """Of one call; on a GPU the mean over several that are queued at once, so that the launch is not what is timed."""
    if device == "cuda":
        return _seconds_on_gpu(run)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _seconds_on_gpu(run: Callable[[], object], calls: int = 5) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / calls


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes above what was allocated before."""

    held: int
    """Between forward and backward, apart from the loss: what is saved, and buffers kept for the next call."""
    peak: int
    """Most at any time of forward and backward, the gradients returned included."""


def memory(contestant: Contestant) -> Memory:
    """Of torch's allocator, over one forward and backward of a contestant that has run before.

    The allocator's own record is exact and the same every time, and it has the temporaries inside operations (oneDNN's
    scratch among them), which hooks on operations miss. The resident size of the process would also count pages that
    malloc keeps, and compilers. What is not counted is memory that torch did not hand out: the arrays of numpy and
    numba, which are a few rows of the vocabulary for each thread.
    """
    gc.collect()
    release_memory()  # buffers kept from another call are this one's memory too
    return _on_gpu(contestant) if contestant.leaves[0].is_cuda else _on_cpu(contestant)


def _on_cpu(contestant: Contestant) -> Memory:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = contestant.forward()
        size = loss.nbytes
        with record_function(_BACKWARD):
            contestant.backward(loss)
    events = _events(profiler)
    (begin,) = (event["ts"] for event in events if event.get("name") == _BACKWARD and event["ph"] == "X")
    changes = [(event["ts"], event["args"]) for event in events if event.get("name") == "[memory]"]
    changes.sort(key=lambda change: (change[0], change[1]["Ev Idx"]))
    total = peak = held = 0
    for moment, change in changes:
        total += change["Bytes"]
        peak = max(peak, total)
        held = total if moment < begin else held
    return Memory(held - size, peak)


_BACKWARD = "backward of the contestant"


def _events(profiler: profile) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def _on_gpu(contestant: Contestant) -> Memory:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = contestant.forward()
    held = torch.cuda.memory_allocated() - before - loss.nbytes
    contestant.backward(loss)
    return Memory(held, torch.cuda.max_memory_allocated() - before)
