"""One rank of `bring_up.py`: `TASK SETTINGS FOLDER`, under torchrun; rank 0 prints what it found, in JSON."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

MARK = "found: "
PROMPT = 128
REAL: dict[str, Any] = {
    # Qwen2.5-0.5B's shape, and a teacher of the same vocabulary with twice its layers.
    "vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "intermediate_size": 4864, "max_position_embeddings": 32768, "initializer_range": 0.02,
}  # fmt: skip
TINY: dict[str, Any] = {
    "vocab_size": 272, "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 256, "num_hidden_layers": 4, "max_position_embeddings": 2048,
}  # fmt: skip
LENGTHS = {True: [20, 90, 33, 7, 60, 41, 12, 55], False: [200, 900, 330, 70, 600, 410, 1200, 550] * 4}


def layouts_of(ranks: int) -> dict[str, dict[str, Any]]:
    """Ways to lay a model with two key-value heads over so many ranks."""
    rest = ranks // 2
    return {
        "TP2 with SP": {"tensor": 2, "sequence_parallel": True, "data": rest},
        "PP2": {"pipeline": 2, "data": rest},
        "PP2, two parts a stage": {"pipeline": 2, "virtual_stages": 2, "data": rest},
        "CP2": {"context": 2, "data": rest},
        f"DP{ranks}": {"data": ranks},
    }


def models(folder: Path, *, rehearse: bool) -> tuple[Path, Path]:
    """Student and teacher with random weights, made once."""
    import torch.distributed as dist

    from tests.tiny_models import save_tiny

    sizes = TINY if rehearse else REAL
    pair = folder / "student", folder / "teacher"
    if dist.get_rank() == 0 and not (pair[1] / "config.json").exists():
        save_tiny(pair[0], "qwen2", seed=1, **sizes)
        save_tiny(pair[1], "qwen2", seed=2, **sizes | {"num_hidden_layers": 2 * sizes["num_hidden_layers"]})
    dist.barrier()
    return pair


class Trial:
    """Student and teacher of this rank, ready to take a step."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        import torch
        import torch.distributed as dist

        from opd_megatron.config import load_config
        from opd_megatron.mcore.cpu.platform import init_distributed
        from opd_megatron.mcore.student import Student
        from opd_megatron.run.build import _batches, _grid
        from opd_megatron.run.checks import check_run
        from opd_megatron.teacher import Views, build_teachers

        init_distributed()
        self.rehearse = settings["rehearse"]
        self.lengths = LENGTHS[self.rehearse]
        student, teacher = models(folder, rehearse=self.rehearse)
        layout = {"data": dist.get_world_size()} | settings.get("layout", {})
        dtype = "bf16" if torch.cuda.is_available() else "fp32"
        values = {
            "student.path": student, "teachers.0.path": teacher, "data.source": "unused",
            "data.max_prompt_tokens": PROMPT, "rollout.max_new_tokens": max(self.lengths),
            "rollout.prompts_per_step": len(self.lengths), "optimizer.lr": 1e-5, "rollout.dtype": dtype,
            "student.dtype": dtype, "teachers.0.dtype": dtype,
            "student.transformer_engine": settings.get("transformer_engine", "auto"),
            "precision.fp8": settings.get("fp8") or "null",
            "precision.param": str(settings.get("param", False)).lower(),
            **{f"parallel.{key}": str(value).lower() for key, value in layout.items()},
        }  # fmt: skip
        self.config = load_config(None, [f"{key}={value}" for key, value in values.items()])
        self.models = check_run(self.config)
        self.grid = _grid(self.config, self.models)
        padded = self.models.padded_vocab(self.grid.tp_size)
        self.student = Student(self.config, self.models.student, self.models.student_config, self.grid, padded)
        self.teachers = build_teachers(self.config, self.models, self.grid)
        self.builder = _batches(self.config, self.models, self.grid, Views.of_run(self.config, self.models, {}))

    def step(self, seed: int = 0) -> tuple[float, dict[str, float]]:
        """(seconds of the update, its metrics)."""
        import torch

        from opd_megatron.teacher import ask_teachers
        from opd_megatron.types import Prompt, Rollout

        generator, vocabulary = torch.Generator().manual_seed(seed), self.models.vocab_size
        rollouts = [
            Rollout(
                Prompt(str(i), tuple(torch.randint(vocabulary, (PROMPT // 2,), generator=generator).tolist()), ""),
                torch.randint(vocabulary, (length,), generator=generator), None, 0, "stop",
            )
            for i, length in enumerate(self.lengths)
        ]  # fmt: skip
        step = self.builder.build(rollouts)
        inputs = ask_teachers(self.teachers, step)
        _wait()
        began = time.perf_counter()
        result = self.student.update(step, inputs, self.config.objective, self.models.vocab_size)
        _wait()
        return time.perf_counter() - began, result.metrics


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak() -> float:
    from opd_megatron.metrics import peak_memory_bytes

    return float(peak_memory_bytes())


def update(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Three steps: loss of the first, seconds and memory of the others."""
    from opd_megatron.models.sizes import RunSizes
    from opd_megatron.models.utilization import peak_flops, training_flops
    from opd_megatron.planning.memory import rank_memory
    from opd_megatron.types import DTYPES

    trial = Trial(folder, settings)
    _, first = trial.step()
    seconds = statistics.median(trial.step(seed)[0] for seed in (1, 2, 3))
    whole = [length + PROMPT // 2 for length in trial.lengths]
    flops = training_flops(trial.models.student_config, whole, sum(trial.lengths))
    dtype = DTYPES[trial.config.student.dtype]
    ranks = trial.grid.tp_size * trial.grid.pp_size * trial.grid.dp_size * trial.grid.cp_size
    planned = rank_memory(RunSizes(trial.config, trial.models), trial.grid.pp_rank, gpu=True, device_bytes=0.0)
    without = {"weight sync", "runtime"}
    return {
        "loss": first["loss"], "seconds": seconds, "tokens_per_second": sum(trial.lengths) / seconds,
        "mfu": flops / seconds / ranks / peak_flops(dtype, fp8=bool(settings.get("fp8"))), "peak": _peak(),
        "planned": sum(size for part, size in planned.parts.items() if part not in without),
    }  # fmt: skip


def resume(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """How far the loss after a checkpoint is from that without one, and what a save takes above a step's peak."""
    import shutil

    from opd_megatron.mcore.checkpoint import CheckpointSaver, checkpoint_path, load_checkpoint

    trial, saved = Trial(folder, settings), folder / "saved"
    trial.step()
    before = _peak()
    saver = CheckpointSaver(saved, asynchronous=False)
    saver.save(1, trial.student, {"policy_version": 1})
    saver.finish()
    above = (_peak() - before) / 2**30
    _, expected = trial.step(5)
    again = Trial(folder, settings)
    load_checkpoint(checkpoint_path(saved, 1), again.student)
    _, found = again.step(5)
    shutil.rmtree(saved)
    return {"difference": abs(found["loss"] - expected["loss"]), "save": above}


def run(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """A whole run with an engine."""
    import torch

    from opd_megatron.metrics import read_metrics
    from opd_megatron.trainer import OPDTrainer
    from tests.e2e.runs import make_inputs, small_config

    root = folder / "inputs"
    root.mkdir()
    gpu = torch.cuda.is_available()
    values = {"steps": 10, "rollout.engine": "vllm" if gpu else "torch", "student.dtype": "bf16" if gpu else "fp32"}
    values |= {"rollout.gpu_memory_utilization": 0.2, "evaluation.every": 10}
    with OPDTrainer.from_config(small_config(make_inputs(root), folder / "run", **values)) as trainer:
        trainer.train()
    rows = read_metrics(folder / "run")
    steps = [row for row in rows if "loss" in row]
    phases = ("time/rollout", "time/teacher", "time/train", "time/sync", "time/step")
    return {
        "mismatch": statistics.median(row["mismatch"] for row in steps),
        "learnt": rows[-1]["eval/forward_kl"] / rows[0]["eval/forward_kl"],
        "seconds": {phase: statistics.median(row[phase] for row in steps) for phase in phases},
    }


def main() -> None:
    import os

    task, settings, folder = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    tasks = {"update": update, "resume": resume, "run": run}
    if task != "run":
        from opd_megatron.mcore.cpu.platform import init_distributed

        init_distributed()
    found = tasks[task](folder, settings)
    if os.environ["RANK"] == "0":
        print(MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
