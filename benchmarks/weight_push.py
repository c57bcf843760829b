"""Seconds to push the 24-layer student (113M parameters) from the trainer into vLLM, in a short run of the demo.

`time/sync` covers the whole way: export from Megatron's shards as Hugging Face tensors, transport to the engine's
process, loading there, and the reset of the prefix cache. The first push of a run, which warms up, is shown apart.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import _processes as processes
from harness import REPOSITORY, Check, Report, main

LIMIT_SECONDS = 1.5


def parameter_bytes(model_dir: Path) -> int:
    """Bytes of the model's safetensors files: what one push carries."""
    return sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))


def measure(arguments: argparse.Namespace) -> Report:
    teacher, student = processes.assets(arguments.assets)
    overrides = processes.ONLY_STEPS | {
        "steps": 3 if arguments.quick else arguments.steps,
        "student.path": str(student),
        "teachers.0.path": str(teacher),
        # What is sampled does not matter here: two short answers keep the rest of the step small.
        "rollout.prompts_per_step": 2,
        "parallel.micro_batch_size": 2,
        "rollout.max_new_tokens": 8,
        "optimizer.warmup_steps": 0,
    }
    with tempfile.TemporaryDirectory() as folder:
        seconds = [row["time/sync"] for row in processes.train(arguments.config, Path(folder) / "run", overrides).rows]
    median = statistics.median(seconds[1:])
    size = parameter_bytes(student)
    row = {
        "pushed, MB": size / 1e6,
        "median, s": median,
        "slowest, s": max(seconds[1:]),
        "first, s": seconds[0],
        "MB/s": size / 1e6 / median,
        "pushes": len(seconds),
    }
    note = "24-layer student from Megatron-Core into vLLM in its own process, bf16."
    return Report([row], [Check.below("weight push, s", median, LIMIT_SECONDS)], note)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--assets", default=str(REPOSITORY / "runs/assets"), help="folder with teacher/ and student/")
    parser.add_argument("--config", default=str(REPOSITORY / "configs/demo.yaml"))
    parser.add_argument("--steps", type=int, default=8, help="pushes measured, and one to warm up")


if __name__ == "__main__":
    main("weight_push", __doc__, measure, add_arguments)
