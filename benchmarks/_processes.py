"""Runs a command as a user would, and measures the memory of the whole process tree it becomes."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from harness import REPOSITORY, BenchmarkError


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of a benchmark that runs the demo's models."""
    parser.add_argument("--assets", default=str(REPOSITORY / "runs/assets"), help="folder with teacher/ and student/")
    parser.add_argument("--config", default=str(REPOSITORY / "configs/demo.yaml"), help="of the real runs")


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """A finished `opd_megatron.train`."""

    rows: list[dict[str, Any]]
    """Training rows of its metrics.jsonl (the evaluation before training is left out)."""
    peak_bytes: int
    """Largest memory of all its processes together, up to the end of its last step: the checkpoint that is written
    then is no part of a step."""


class TreeMemory:
    """Memory of a process and all its descendants, sampled while they run.

    Each sample is the sum of proportional set sizes (PSS): a page that several processes share, such as a library's
    code, counts once in the sum, so one process is not favoured over several. Where the system has no PSS, the sum of
    resident sizes is taken. GPU memory is not included.
    """

    def __init__(self, pid: int, interval: float = 0.25) -> None:
        self._samples: list[tuple[float, int]] = []
        self._root = psutil.Process(pid)
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def peak_bytes(self, until: float = math.inf) -> int:
        """Largest sample taken before the Unix time `until`."""
        return max((size for moment, size in self._samples if moment < until), default=0)

    def __enter__(self) -> TreeMemory:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            now = time.time()
            self._samples.append((now, self._sample()))
            self._stop.wait(self._interval)

    def _sample(self) -> int:
        try:
            tree = [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return 0
        return sum(_memory(process) for process in tree)


def _memory(process: psutil.Process) -> int:
    try:
        full = process.memory_full_info()
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return 0
    return int(getattr(full, "pss", 0) or full.rss)


def run_measured(command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> TreeMemory:
    """Runs `command` in the repository; returns the memory of its process tree over time.

    Raises BenchmarkError with the end of its output when it fails.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            list(command), stdout=output, stderr=subprocess.STDOUT, cwd=REPOSITORY,
            env=os.environ | dict(environment or {}),
        )  # fmt: skip
        with TreeMemory(process.pid) as memory:
            try:
                process.wait()
            finally:
                process.terminate()
        if process.returncode != 0:
            output.seek(0)
            tail = output.read().decode(errors="replace").strip().splitlines()[-100:]
            raise BenchmarkError(f"{' '.join(command)} exited with {process.returncode}\n" + "\n".join(tail))
    return memory


def train(config: str | Path, run_dir: str | Path, overrides: Mapping[str, Any], **environment: str) -> TrainingRun:
    """Runs `python -m opd_megatron.train CONFIG output_dir=RUN_DIR key=value ...` and reads its metrics."""
    from opd_megatron.metrics import read_metrics

    settings = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    command = [sys.executable, "-m", "opd_megatron.train", str(config), f"output_dir={run_dir}", *settings]
    memory = run_measured(command, environment=environment)
    last_step = (Path(run_dir) / "metrics.jsonl").stat().st_mtime
    return TrainingRun([row for row in read_metrics(run_dir) if row["step"] > 0], memory.peak_bytes(last_step))


# Nothing but steps: no evaluation, no checkpoint on the way, no export, nothing on the terminal.
ONLY_STEPS: dict[str, Any] = {
    "evaluation.every": 0,
    "checkpoint.every": 0,
    "checkpoint.export_hf": False,
    "logging.tensorboard": False,
    "logging.sample_every": 0,
    "logging.progress": False,
}


def assets(folder: str | Path) -> tuple[Path, Path]:
    """(teacher, student) folders of the demo pair. Raises BenchmarkError when they have not been made."""
    pair = (Path(folder).resolve() / "teacher", Path(folder).resolve() / "student")
    for path in pair:
        if not (path / "config.json").is_file():
            raise BenchmarkError(
                f"{str(path)!r} is not a model: run `make demo` once, or name its folder with --assets"
            )
    return pair
