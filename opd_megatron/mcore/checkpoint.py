"""Training checkpoints through Megatron's `dist_checkpointing`: written whole or not at all.

A checkpoint is a folder `step_00000050`. It is written under a name that is never read and renamed once every rank
has finished, so that a folder with a real name is complete by construction.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException as TorchCheckpointException

from opd_megatron.errors import CheckpointError
from opd_megatron.mcore.platform import release_memory
from opd_megatron.mcore.student import Student

_NAME = re.compile(r"step_(\d{8})")
_STATE_FILE = "run.json"
_Problems = (OSError, EOFError, ValueError, KeyError, RuntimeError, CheckpointingException, TorchCheckpointException)
"""What reading or writing a checkpoint can raise; torch's is not even an Exception."""


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints as (step, path), oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def save_checkpoint(folder: Path, step: int, student: Student, state: dict[str, Any], *, keep: int) -> Path:
    """Writes weights, optimizer, RNG and `state` (JSON: data cursor, policy version, ...), then prunes to `keep`.

    Collective over all ranks.

    Raises:
        CheckpointError: a rank could not write; checkpoints that were there before are untouched.
    """
    final = checkpoint_path(folder, step)
    partial = folder / f".{final.name}.partial"
    first = dist.get_rank() == 0
    error: BaseException | None = None
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
        except OSError as problem:
            error = problem
    not_written = f"checkpoint {str(final)!r} was not written, earlier ones are intact"
    raise_together(error, not_written)
    try:
        dist_checkpointing.save(_sharded_state(student, loading=False), str(partial))
        if first:
            (partial / _STATE_FILE).write_text(json.dumps(state, indent=1))
    except _Problems as problem:
        error = problem
    raise_together(error, not_written)
    if first:
        if final.exists():
            shutil.rmtree(final)
        _sync(partial)
        os.rename(partial, final)
        _sync(folder, files=False)
        for _, old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    release_memory()
    dist.barrier()
    return final


def load_checkpoint(path: Path, student: Student) -> dict[str, Any]:
    """Fills the student from a checkpoint and returns the `state` it was saved with. Collective over all ranks.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another model.
    """
    try:
        state = json.loads((path / _STATE_FILE).read_text())
        _make_optimizer_state(student.optimizer)
        loaded = dist_checkpointing.load(_sharded_state(student, loading=True), str(path))
        student.model.load_state_dict(loaded["model"], strict=False)  # strictness is the loader's: it names the tensor
        student.optimizer.load_state_dict(loaded["optimizer"])
        _own_step_counts(student.optimizer)
        torch.set_rng_state(loaded["rng"])
    except _Problems as problem:
        raise CheckpointError(
            f"checkpoint {str(path)!r} cannot be loaded ({_one_line(problem)}): it is damaged or belongs to another "
            "model; remove it to resume from the one before"
        ) from problem
    student.scheduler.num_steps = 0
    student.scheduler.step(increment=state["step"])
    return state


def _sharded_state(student: Student, *, loading: bool) -> dict[str, Any]:
    grid = student.grid
    metadata = {
        "dp_cp_group": grid.groups.dp_cp,
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
    }
    model = student.model.sharded_state_dict(metadata=metadata)
    rng = ShardedObject(
        "rng",
        torch.get_rng_state(),
        (grid.pipeline, grid.tensor, grid.data),
        (grid.pp_rank, grid.tp_rank, grid.dp_rank),
        replica_id=0,
    )
    optimizer = student.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return {"model": model, "optimizer": optimizer, "rng": rng}


def _make_optimizer_state(optimizer: MegatronOptimizer) -> None:
    """Lets every parameter have its moments and step count, as loading wants: one update at learning rate 0."""
    for part in optimizer.chained_optimizers:
        groups = part.optimizer.param_groups
        kept = [(group["lr"], group["weight_decay"]) for group in groups]
        for group in groups:
            group["lr"], group["weight_decay"] = 0.0, 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        part.optimizer.step()
        part.optimizer.zero_grad(set_to_none=True)
        for group, (lr, weight_decay) in zip(groups, kept, strict=True):
            group["lr"], group["weight_decay"] = lr, weight_decay


def _own_step_counts(optimizer: MegatronOptimizer) -> None:
    """Loading leaves one step count shared by all parameters, which torch's AdamW would raise once for each of them."""
    for part in optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


def raise_together(error: BaseException | None, what: str) -> None:
    """Raises CheckpointError on every rank when any rank failed, so that none waits for another. Collective."""
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, _one_line(error) if error else None)
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise CheckpointError(f"{what} (rank {rank}: {failure}): free disk space or change output_dir") from error


def _sync(folder: Path, *, files: bool = True) -> None:
    """Flushes to disk before the rename publishes the folder: a power cut must not leave a name without content."""
    for path in [*(folder.rglob("*") if files else ()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _one_line(error: BaseException) -> str:
    if isinstance(error, TorchCheckpointException):  # holds the failures of all ranks with their tracebacks
        error = next(iter(error.failures.values()))[0]
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
