"""The memory plan against the resident memory of real training steps, rank by rank, on a CPU.

Each run trains a 56M-parameter student on a 76M-parameter teacher for three steps on random tokens, in processes of its
own. Measured is how far a rank's peak resident memory rises above what it holds after imports, process groups and a
warm-up on a tiny model; planned is `planning.memory`'s sum for its stage. The last rows run with
MALLOC_MMAP_THRESHOLD_=65536, which makes glibc give every freed block back: against them stands the plan without its
term for glibc, so that the tensors are compared with nothing around them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _memory_rank
from harness import BenchmarkError, Check, Report, main

from opd_megatron.config import load_config
from opd_megatron.models.sizes import RunSizes
from opd_megatron.planning.memory import RankMemory, rank_memory
from opd_megatron.run.checks import check_run
from tests.tiny_models import save_tiny

LIMIT = 0.15
MIB = 2**20
SIZES = {
    "hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 8, "num_attention_heads": 10,
    "num_key_value_heads": 2, "vocab_size": 32000, "max_position_embeddings": 2048,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Run:
    """One measured run."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    dtype: str = "bf16"
    recompute: bool = False
    exact: bool = False
    """glibc gives freed blocks back."""

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def overrides(self) -> dict[str, Any]:
        return {
            "parallel.tensor": self.tensor, "parallel.pipeline": self.pipeline, "parallel.data": self.data,
            "parallel.sequence_parallel": str(self.tensor > 1).lower(), "parallel.micro_batch_size": 4,
            "student.dtype": self.dtype, "teachers.0.dtype": self.dtype,
            "student.recompute": str(self.recompute).lower(), "rollout.prompts_per_step": 8 * self.data,
            "data.max_prompt_tokens": 64, "rollout.max_new_tokens": 192,
        }  # fmt: skip


RUNS = [
    Run(),
    Run(recompute=True),
    Run(dtype="fp32"),
    Run(dtype="fp32", recompute=True),
    Run(tensor=2),
    Run(tensor=2, dtype="fp32"),
    Run(pipeline=2),
    Run(pipeline=2, dtype="fp32"),
    Run(data=2),
    Run(data=2, dtype="fp32"),
    Run(exact=True),
    Run(dtype="fp32", exact=True),
    Run(pipeline=2, dtype="fp32", exact=True),
]
QUICK = [Run(tensor=2)]


def measured(run: Run, folder: Path) -> list[int]:
    """Bytes by which each rank's peak rose."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name, _environment(run):
        store = f"{name}/store"
        ranks = [
            context.Process(target=_memory_rank.run_rank, args=(rank, run.world, str(folder), store, run.overrides))
            for rank in range(run.world)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise BenchmarkError(f"a rank of {run} failed: its traceback is above")
        return [json.loads(Path(f"{store}.{rank}").read_text()) for rank in range(run.world)]


@contextmanager
def _environment(run: Run) -> Iterator[None]:
    """Of the ranks; glibc reads its part when a process starts."""
    values = {"OMP_NUM_THREADS": "1"}
    if run.exact:
        values |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def planned(run: Run, folder: Path) -> list[RankMemory]:
    """Of every stage."""
    paths = {"student.path": folder / "real" / "student", "teachers.0.path": folder / "real" / "teacher"}
    config = load_config(None, [f"{key}={value}" for key, value in {**paths, **run.overrides}.items()])
    sizes = RunSizes(config, check_run(config))
    return [rank_memory(sizes, stage, gpu=False) for stage in range(run.pipeline)]


def make_models(folder: Path) -> None:
    """tiny/ and real/, each with student/ and teacher/."""
    for name, sizes in (("tiny", {}), ("real", SIZES)):
        save_tiny(folder / name / "student", **sizes)
        save_tiny(folder / name / "teacher", "qwen2", tie_word_embeddings=False, **sizes)


def measure(arguments: argparse.Namespace) -> Report:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        raise BenchmarkError("needs Linux, whose /proc tells the peak of a process: run it there")
    report = Report(note=f"56M student (tied), 76M teacher, 8 x 256 tokens a rank, {_memory_rank.STEPS} steps.")
    with tempfile.TemporaryDirectory() as name:
        make_models(Path(name))
        for run in QUICK if arguments.quick else RUNS:
            stages = planned(run, Path(name))
            for rank, peak in enumerate(measured(run, Path(name))):
                memory = stages[rank * run.pipeline // run.world]
                plan = memory.total - (memory.parts["allocator"] if run.exact else 0)
                add(report, run, rank, peak, plan)
    return report


def add(report: Report, run: Run, rank: int, peak: float, plan: float) -> None:
    """One rank's row and check."""
    layout = f"({run.tensor}, {run.pipeline}, {run.data})"
    words = f"{run.dtype}{', recompute' if run.recompute else ''}{', blocks given back' if run.exact else ''}"
    report.rows.append(
        {"(TP, PP, DP)": layout, "run": words, "rank": rank, "measured, MiB": peak / MIB, "planned, MiB": plan / MIB,
         "planned / measured": plan / peak}
    )  # fmt: skip
    name = f"{layout} {words}, rank {rank}: |planned / measured - 1|"
    report.checks.append(Check.at_most(name, abs(plan / peak - 1), LIMIT))


if __name__ == "__main__":
    main("memory_plan", __doc__, measure)
