"""One on-policy step on the demo pair, ours against TRL's DistillationTrainer: seconds and peak memory.

Both sample 48 tokens for each of the same 8 prompts from the same 24-layer student, take the reverse KL to the same
30-layer teacher over the full vocabulary and make an AdamW step, on the same number of threads. The runs alternate
(ours, TRL, ours, TRL); each side's time is the median over all its steps but the first of each run, which warms up.
TRL's clock starts when its batch is at hand; ours is the whole of `time/step`, the sync of the new weights into vLLM
included. Memory is the peak of the whole process tree (vLLM's process and its KV cache included) up to the last step,
sampled in the same way for both. Ours runs in the precision that `dtype: auto` takes here, with fp32 main weights;
--trl-precision lists TRL's (see _trl_distillation.py), and the checks are against the fastest of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import _processes as processes
from harness import REPOSITORY, Check, Report, main

from opd_megatron.data.sources import gsm_symbolic_rows
from opd_megatron.system.processor import processor

TIME_LIMIT, MEMORY_LIMIT = 0.5, 0.8
PROMPTS, NEW_TOKENS, LEARNING_RATE = 8, 48, 1e-4


@dataclass(slots=True)
class Side:
    """All runs of one trainer, warm-up steps left out."""

    name: str
    seconds: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    def add(self, seconds: Sequence[float], tokens: Sequence[float], peak: int) -> None:
        self.seconds += seconds[1:]
        self.tokens += tokens[1:]
        self.peaks.append(peak)

    @property
    def step_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def peak_bytes(self) -> float:
        return statistics.median(self.peaks)

    def row(self) -> dict[str, object]:
        return {
            "trainer": self.name,
            "step, s": self.step_seconds,
            "fastest, s": min(self.seconds),
            "slowest, s": max(self.seconds),
            "tokens a step": statistics.fmean(self.tokens),
            "peak memory, GiB": self.peak_bytes / 2**30,
            "steps measured": len(self.seconds),
        }


def write_prompts(path: Path, seed: int) -> None:
    """Exactly one step's prompts: every step of both trainers then sees these, whatever their order of rows."""
    rows = gsm_symbolic_rows(seed, PROMPTS)
    path.write_text("".join(json.dumps({"question": row.question, "answer": row.answer}) + "\n" for row in rows))


def run_ours(side: Side, work: Path, arguments: argparse.Namespace, steps: int) -> None:
    """One run of `python -m opd_megatron.train` with the demo's configuration."""
    teacher, student = processes.assets(arguments.assets)
    overrides = processes.ONLY_STEPS | {
        "steps": steps,
        "student.path": str(student), "teachers.0.path": str(teacher),
        "data.source": str(work / "prompts.jsonl"), "data.eval_source": str(work / "held_out.jsonl"),
        "data.limit": None, "data.system_prompt": None,
        "rollout.prompts_per_step": PROMPTS, "rollout.samples_per_prompt": 1,
        "rollout.max_new_tokens": NEW_TOKENS, "rollout.temperature": 1.0, "rollout.top_p": 1.0,
        "objective.type": "reverse_kl", "objective.temperature": 1.0,
        "optimizer.lr": LEARNING_RATE, "optimizer.decay": "constant", "optimizer.warmup_steps": 0,
        "optimizer.weight_decay": 0.0, "optimizer.clip_grad": 1.0,
    }  # fmt: skip
    run_dir = work / f"ours{len(side.peaks)}"
    run = processes.train(arguments.config, run_dir, overrides, OMP_NUM_THREADS=str(arguments.threads))
    side.add([row["time/step"] for row in run.rows], [row["tokens"] for row in run.rows], run.peak_bytes)


def run_trl(side: Side, precision: str, work: Path, arguments: argparse.Namespace, steps: int) -> None:
    """One run of TRL's DistillationTrainer."""
    teacher, student = processes.assets(arguments.assets)
    out = work / "trl.json"
    command = [sys.executable, "benchmarks/_trl_distillation.py", "--student", str(student), "--teacher", str(teacher)]
    command += ["--prompts", str(work / "prompts.jsonl"), "--out", str(out), "--steps", str(steps)]
    command += ["--batch", str(PROMPTS), "--max-new-tokens", str(NEW_TOKENS), "--lr", str(LEARNING_RATE)]
    command += ["--precision", precision, *(["--vllm"] if arguments.trl_vllm else [])]
    environment = {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    memory = processes.run_measured(command, environment=environment)
    result = json.loads(out.read_text())
    side.add(result["seconds"], result["tokens"], memory.peak_bytes())


def measure(arguments: argparse.Namespace) -> Report:
    steps, repeats = (2, 1) if arguments.quick else (arguments.steps, arguments.repeats)
    ours = Side("opd_megatron")
    trls = {precision: Side(f"TRL DistillationTrainer, {precision}") for precision in arguments.trl_precision}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_prompts(work / "prompts.jsonl", seed=1)
        write_prompts(work / "held_out.jsonl", seed=2)
        for _ in range(repeats):
            if arguments.only != "trl":
                run_ours(ours, work, arguments, steps)
            for precision, side in trls.items() if arguments.only != "ours" else ():
                run_trl(side, precision, work, arguments, steps)
    sides = [side for side in (ours, *trls.values()) if side.peaks]
    checks = []
    if arguments.only is None:
        trl = min(trls.values(), key=lambda side: side.step_seconds)
        checks = [
            Check.at_most("step time, ours / TRL", ours.step_seconds / trl.step_seconds, TIME_LIMIT),
            Check.at_most("peak memory, ours / TRL", ours.peak_bytes / trl.peak_bytes, MEMORY_LIMIT),
        ]
    note = (
        f"SmolLM2-135M teacher (30 layers), 24-layer student, {PROMPTS} prompts x {NEW_TOKENS} new tokens, reverse KL, "
        f"AdamW, {arguments.threads} threads, {processor().reason}; median over steps, alternating runs."
    )
    return Report([side.row() for side in sides], checks, note)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--assets", default=str(REPOSITORY / "runs/assets"), help="folder with teacher/ and student/")
    parser.add_argument("--config", default=str(REPOSITORY / "configs/demo.yaml"), help="our side's configuration")
    parser.add_argument("--steps", type=int, default=6, help="steps of a run, the first of which is not counted")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each trainer")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="OMP_NUM_THREADS of both")
    fast = ["bf16", "mixed"] if processor().bf16 else ["fp32"]
    parser.add_argument("--trl-precision", nargs="+", choices=("fp32", "bf16", "mixed"), default=fast)
    parser.add_argument("--trl-vllm", action="store_true", help="let TRL sample with vLLM")
    parser.add_argument("--only", choices=("ours", "trl"), help="run one side, without checks")


if __name__ == "__main__":
    main("step_vs_trl", __doc__, measure, add_arguments)
