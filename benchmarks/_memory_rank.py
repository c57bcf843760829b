"""One rank of a measured run: its process group, a warm-up on a tiny model, two models, three steps, and its peak."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STEPS = 3


def resident(name: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM the most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def forget_peak() -> None:
    """VmHWM starts again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def run_rank(rank: int, world: int, folder: str, store: str, overrides: Mapping[str, Any]) -> None:
    """Writes how far the peak rose above the baseline, in bytes, to STORE.RANK."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    import torch
    import torch.distributed as dist

    from opd_megatron.mcore.cpu.platform import init_distributed, release_memory

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    init_distributed()
    # What a process has before it has a model: libraries, threads, gloo's connections and the compiled loops.
    _train(f"{folder}/tiny", overrides, steps=1)
    _compile_losses(str(overrides["student.dtype"]), world > 1)
    gc.collect()
    release_memory()
    baseline = resident("VmRSS")
    forget_peak()
    _train(f"{folder}/real", overrides, STEPS)
    Path(f"{store}.{rank}").write_text(json.dumps(resident("VmHWM") - baseline))
    dist.destroy_process_group()


def _train(folder: str, overrides: Mapping[str, Any], steps: int) -> None:
    """Student and teacher as a run builds them, and `steps` updates on sequences as long as they may be."""
    from opd_megatron.config import load_config
    from opd_megatron.mcore.grid import ParallelGrid
    from opd_megatron.mcore.student import Student
    from opd_megatron.run.checks import check_run
    from opd_megatron.teacher import ask_teachers, build_teachers

    paths = {"student.path": f"{folder}/student", "teachers.0.path": f"{folder}/teacher"}
    config = load_config(None, [f"{key}={value}" for key, value in {**paths, **overrides}.items()])
    models, parallel = check_run(config), config.parallel
    grid = ParallelGrid.build(
        parallel.tensor, parallel.pipeline, models.data_parallel, sequence_parallel=parallel.sequence_parallel
    )
    padded = models.padded_vocab(parallel.tensor)
    student = Student(config, models.student, models.student_config, grid, padded)
    teachers = build_teachers(config, models, grid)
    for seed in range(steps):
        mine = _micro_batches(config, models.data_parallel, models.vocab_size, seed)
        views = ask_teachers(teachers, mine)
        student.update(mine, views, config.objective, models.vocab_size)


def _micro_batches(config: Any, data: int, vocabulary: int, seed: int) -> Any:
    import torch

    from opd_megatron.types import Batch

    prompt, answer = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    rows = config.sequences_per_step // data
    tokens = torch.randint(vocabulary, (rows, prompt + answer), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(rows, prompt + answer)
    weights[:, prompt - 1 : -1] = 1
    batch = Batch(tokens, torch.roll(tokens, -1, dims=1), weights)
    return batch.micro_batches(config.micro_batch_size(data))


def _compile_losses(dtype: str, sharded: bool) -> None:
    """The tiny model's vocabulary is too small for the loops to be compiled."""
    import torch
    import torch.distributed as dist

    from opd_megatron.losses import linear_divergence_terms
    from opd_megatron.losses.core.buffers import release_memory

    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    for group in [None, dist.group.WORLD] if sharded else [None]:
        hidden, head = (torch.zeros(rows, 16, dtype=kind, requires_grad=True) for rows in (512, 8192))
        vocab_per_rank = 8192 * (1 if group is None else dist.get_world_size())
        terms = linear_divergence_terms(hidden, head, [(hidden, head)], vocab_size=vocab_per_rank, group=group)
        terms.loss_sum.backward()
    release_memory()
