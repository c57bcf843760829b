"""The first minutes on GPUs: every part of the product tried in turn, with figures, pass or fail.

    python benchmarks/bring_up.py [--steps 1,2,3] [--json PATH]      each step ends within ten minutes on one GPU
    python benchmarks/bring_up.py --rehearse                         the same script on a CPU, at the size of its tests

1 kernels   Triton's on hardware, and the divergence beside its contestants
2 training  an update against float64; memory beside the plan; a checkpoint resumed
3 engine    vLLM: weights pushed, its log-probabilities beside the trainer's, twenty times asleep, killed and back
4 layers    Transformer Engine beside plain layers: the same loss, time of a step
5 fp8       products in FP8, then weights in it: loss and time beside bf16's, resumed
6 run       a whole run, student and teacher and engine on one GPU
7 layouts   two GPUs or more: tensor, pipeline, context, data and expert parallelism beside one GPU

A step that a machine cannot do is `skipped` with the reason. Nothing here is measured on fewer GPUs than it says.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _bring_up_rank
from harness import REPOSITORY, BenchmarkError, Check, Report, main

SECONDS = 600
"""Of a step."""


@dataclass(slots=True)
class Machine:
    """What there is, and where models for it lie."""

    gpus: int
    name: str
    has_te: bool
    fp8: bool
    rehearses: bool
    folder: Path
    report: Report = field(default_factory=Report)
    deadline: float = 0.0

    def says(self, step: str, figure: str, value: float | str, limit: float | None = None) -> None:
        """Puts a figure into the table; with a limit it must not exceed, passes or fails by it."""
        verdict = ""
        if limit is not None and not isinstance(value, str):
            check = Check.at_most(f"{step}: {figure}", float(value), limit)
            self.report.checks.append(check)
            verdict = "pass" if check.ok else "FAIL"
        self.report.rows.append({"step": step, "figure": figure, "value": value, "limit": limit, "verdict": verdict})
        print(f"{step:<10} {figure}: {value}  {verdict}", flush=True)

    def runs(self, step: str, figure: str, words: list[str]) -> None:
        """Runs a command, which passes if it exits with 0."""
        began = time.monotonic()
        done = self._done(words)
        if done.returncode:
            print(done.stdout[-3000:], done.stderr[-3000:], sep="\n", file=sys.stderr)
        self.says(step, f"{figure} (exit code)", done.returncode, 0)
        self.says(step, f"{figure}, seconds", round(time.monotonic() - began, 1))

    def measured(self, task: str, ranks: int = 1, **settings: Any) -> dict[str, Any]:
        """What `_bring_up_rank.py` finds in a process, or several, of its own."""
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
                 str(Path(_bring_up_rank.__file__)), task, json.dumps(settings | {"rehearse": self.rehearses}),
                 str(self.folder)]  # fmt: skip
        done = self._done(words)
        lines = [line for line in done.stdout.splitlines() if line.startswith(_bring_up_rank.MARK)]
        if done.returncode or not lines:
            errors = [line for line in done.stderr.splitlines() if "Error" in line]
            raise BenchmarkError(f"{task} {settings} failed: {' | '.join(errors[-3:]) or done.stderr[-500:]}")
        found: dict[str, Any] = json.loads(lines[-1].removeprefix(_bring_up_rank.MARK))
        return found

    def _done(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        path = f"{REPOSITORY}:{Path(__file__).parent}"
        left = max(1.0, self.deadline - time.monotonic())
        try:
            return subprocess.run(
                words, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
                timeout=left, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise BenchmarkError(f"{' '.join(words[:6])} .. took longer than the step's {SECONDS} s") from error

    def tests(self, step: str, *selected: str) -> None:
        marker = ["-m", "gpu"] if self.gpus else []
        self.runs(step, " ".join(selected), [sys.executable, "-m", "pytest", "-q", *marker, *selected])


def kernels(machine: Machine) -> None:
    machine.tests("kernels", "tests/gpu/test_triton_gpu.py")
    if machine.gpus:
        words = [sys.executable, "benchmarks/divergence.py", "--quick"]
        machine.runs("kernels", "divergence.py --quick", words)


def training(machine: Machine) -> None:
    if machine.gpus:
        machine.tests("training", "tests/gpu/test_gpu_run.py", "-k", "reference and off")
    found = machine.measured("update", transformer_engine="off")
    machine.says("training", "seconds of an update", found["seconds"])
    machine.says("training", "response tokens a second", found["tokens_per_second"])
    machine.says("training", "model FLOPs utilization", found["mfu"])
    if machine.gpus:
        machine.says("training", "peak memory / plan", found["peak"] / found["planned"], 1.15)
    resumed = machine.measured("resume", transformer_engine="off")
    machine.says("training", "loss after a resume, difference", resumed["difference"], 0.0)
    machine.says("training", "GiB above the peak of an update, of a save", resumed["save"])


def engine(machine: Machine) -> None:
    if not machine.gpus:
        machine.says("engine", "skipped", "no GPU")
        return
    machine.tests("engine", "tests/gpu/test_engine_gpu.py")


def layers(machine: Machine) -> None:
    if not machine.has_te:
        machine.says("layers", "skipped", "Transformer Engine cannot be used here")
        return
    plain, te = (machine.measured("update", transformer_engine=kind) for kind in ("off", "on"))
    machine.says("layers", "loss, relative difference", abs(te["loss"] / plain["loss"] - 1), 2e-2)
    machine.says("layers", "a step of Transformer Engine / plain", te["seconds"] / plain["seconds"], 1.0)


def fp8(machine: Machine) -> None:
    if not machine.has_te or not machine.fp8:
        machine.says("fp8", "skipped", "no GPU with FP8 and Transformer Engine")
        return
    plain = machine.measured("update", transformer_engine="on")
    for stage, param in (("products", False), ("weights", True)):
        settings = {"transformer_engine": "on", "fp8": "hybrid", "param": param}
        found = machine.measured("update", **settings)
        machine.says("fp8", f"{stage}: loss, relative difference", abs(found["loss"] / plain["loss"] - 1), 0.1)
        machine.says("fp8", f"{stage}: step / bf16", found["seconds"] / plain["seconds"])
        machine.says("fp8", f"{stage}: peak memory / bf16", found["peak"] / plain["peak"])
        resumed = machine.measured("resume", **settings)
        machine.says("fp8", f"{stage}: loss after a resume, difference", resumed["difference"], 0.0)


def whole_run(machine: Machine) -> None:
    found = machine.measured("run")
    machine.says("run", "mismatch, median of steps", found["mismatch"], 1.1)
    machine.says("run", "held-out forward KL, last / first", found["learnt"], 1.0)
    for phase, seconds in found["seconds"].items():
        machine.says("run", f"{phase}, median", seconds)


def layouts(machine: Machine) -> None:
    ranks = 2 if machine.rehearses else machine.gpus
    if ranks < 2:
        machine.says("layouts", "skipped", f"{machine.gpus} GPU")
        return
    alone = machine.measured("update", transformer_engine="off")
    for name, layout in _bring_up_rank.layouts_of(ranks).items():
        found = machine.measured("update", ranks, transformer_engine="off", layout=layout)
        machine.says("layouts", f"{name}: loss, relative difference", abs(found["loss"] / alone["loss"] - 1), 2e-2)
        machine.says("layouts", f"{name}: a step / one rank's", found["seconds"] / alone["seconds"])


STEPS: dict[str, Callable[[Machine], None]] = {
    "1": kernels, "2": training, "3": engine, "4": layers, "5": fp8, "6": whole_run, "7": layouts,
}  # fmt: skip


def measure(arguments: argparse.Namespace) -> Report:
    import torch

    from opd_megatron.mcore import te

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus and not arguments.rehearse:
        raise BenchmarkError("torch sees no GPU: run it where there is one, or try the script itself with --rehearse")
    chosen = arguments.steps.split(",") if arguments.steps else [*STEPS]
    unknown = [step for step in chosen if step not in STEPS]
    if unknown:
        raise BenchmarkError(f"--steps {unknown[0]} is none of {', '.join(STEPS)}")
    capability = te.capability() or (0, 0)
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(
            gpus, torch.cuda.get_device_name() if gpus else "no GPU", te.why_missing() is None,
            capability >= (8, 9), arguments.rehearse, Path(folder),
        )  # fmt: skip
        for step in chosen:
            machine.deadline = time.monotonic() + SECONDS
            try:
                STEPS[step](machine)
            except BenchmarkError as error:
                print(f"step {step}: {error}", file=sys.stderr)
                machine.says(STEPS[step].__name__, "came to its end (0 is yes)", 1, 0)
    machine.report.note = f"{machine.gpus} x {machine.name}." if gpus else "A rehearsal on a CPU: no figure of a GPU."
    return machine.report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", help="numbers of the steps to do, such as 1,2,3; all by default")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at the size of the tests' models")


if __name__ == "__main__":
    main("bring_up", __doc__, measure, add_arguments)
