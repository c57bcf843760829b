"""Seconds to send the 24-layer student (113M parameters) from the trainer into vLLM, in a short run of the demo.

`time/sync` covers the whole way: export from Megatron's shards as Hugging Face tensors, transport to the engine's
process, loading there, and the reset of the prefix cache. The first sync of a run, which warms up, is shown apart.

Then trainer and engine at tensor-parallel size `--tensor` (2; 1 leaves that out, as the quick form does), shard to
shard beside tensors that are gathered first. The demo's student has 9 heads and 3 key-value heads, so for any size
but 3 a random model as large stands in.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import _processes as processes
from harness import REPOSITORY, Check, Report, Row, main

LIMIT_SECONDS = 1.5
STAND_IN: dict[str, Any] = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 49152, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip


def parameter_bytes(model_dir: Path) -> int:
    """Bytes of the model's safetensors files: what one sync carries."""
    return sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))


def write_stand_in(folder: Path, tokenizer_dir: Path) -> Path:
    """A random Llama of the student's size whose heads divide by 2 and 4, with the tokenizer of `tokenizer_dir`."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    AutoModelForCausalLM.from_config(LlamaConfig(**STAND_IN)).save_pretrained(folder)
    for path in tokenizer_dir.iterdir():
        if path.is_file() and "safetensors" not in path.name and not (folder / path.name).exists():
            shutil.copy(path, folder)
    return folder


def sync_seconds(
    arguments: argparse.Namespace, teacher: Path, student: Path, run_dir: Path, **overrides: Any
) -> list[float]:
    """`time/sync` of each step, in seconds."""
    settings = processes.ONLY_STEPS | {
        "steps": 3 if arguments.quick else arguments.steps,
        "student.path": str(student),
        "teachers.0.path": str(teacher),
        # What is sampled does not matter here: two short answers keep the rest of the step small.
        "rollout.prompts_per_step": 2,
        "parallel.micro_batch_size": 2,
        "rollout.max_new_tokens": 8,
        "optimizer.warmup_steps": 0,
    }
    return [row["time/sync"] for row in processes.train(arguments.config, run_dir, settings | overrides).rows]


def table_row(way: str, size: int, seconds: list[float]) -> Row:
    median = statistics.median(seconds[1:])
    return {
        "way": way,
        "sent, MB": size / 1e6,
        "median, s": median,
        "slowest, s": max(seconds[1:]),
        "first, s": seconds[0],
        "MB/s": size / 1e6 / median,
        "syncs": len(seconds),
    }


def measure(arguments: argparse.Namespace) -> Report:
    teacher, student = processes.assets(arguments.assets)
    with tempfile.TemporaryDirectory() as folder:
        seconds = sync_seconds(arguments, teacher, student, Path(folder) / "run")
    row = table_row("one rank to one worker", parameter_bytes(student), seconds)
    report = Report([row], [Check.below("weight sync, s", row["median, s"], LIMIT_SECONDS)])
    report.note = "24-layer student from Megatron-Core into vLLM in its own process, bf16."
    if arguments.tensor > 1 and not arguments.quick:
        add_sharded(report, arguments, student)
    return report


def add_sharded(report: Report, arguments: argparse.Namespace, student: Path) -> None:
    """Both ways at `--tensor`, in one run; the model is its own teacher."""
    tensor, rows = arguments.tensor, []
    with tempfile.TemporaryDirectory() as folder:
        model = student if tensor == 3 else write_stand_in(Path(folder) / "model", student)
        for way, sharded in (("gathered", False), ("shard to shard", True)):
            sizes = {"parallel.tensor": tensor, "rollout.tensor": tensor, "rollout.shard_to_shard": sharded}
            seconds = sync_seconds(arguments, model, model, Path(folder) / way.replace(" ", "_"), **sizes)
            rows.append(table_row(f"{way}, {tensor} ranks to {tensor} workers", parameter_bytes(model), seconds))
    report.rows += rows
    ratio = rows[1]["median, s"] / rows[0]["median, s"]
    report.checks.append(Check.below("shard to shard / gathered", ratio, 1.0))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--assets", default=str(REPOSITORY / "runs/assets"), help="folder with teacher/ and student/")
    parser.add_argument("--config", default=str(REPOSITORY / "configs/demo.yaml"))
    parser.add_argument("--steps", type=int, default=8, help="syncs measured, and one to warm up")
    parser.add_argument("--tensor", type=int, default=2, help="tensor-parallel size of trainer and engine (2)")


if __name__ == "__main__":
    main("weight_sync", __doc__, measure, add_arguments)
