"""Loading: finds the newest checkpoint whose files are whole, and fills the student from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from opd_megatron.errors import CheckpointError, MissingPathError, is_out_of_memory, one_line
from opd_megatron.mcore.checkpoint.folder import BEST, list_checkpoints, read_state
from opd_megatron.mcore.checkpoint.io_errors import IO_ERRORS
from opd_megatron.mcore.checkpoint.manifest import find_damage
from opd_megatron.mcore.checkpoint.state import load_state
from opd_megatron.mcore.cpu.platform import release_memory
from opd_megatron.mcore.student import Student
from opd_megatron.system.collectives import on_rank_0


@dataclass(frozen=True, slots=True)
class FoundCheckpoint:
    """A checkpoint whose files are whole."""

    step: int
    path: Path
    skipped: tuple[str, ...] = ()
    """One line for each damaged checkpoint that was passed over."""


def choose_checkpoint(folder: Path) -> FoundCheckpoint | None:
    """Finds the newest checkpoint that is whole, the same on every rank; None when there is none. Collective.

    The ranks share the work of reading every byte.

    Raises:
        CheckpointError: there are checkpoints and all of them are damaged.
    """
    found: list[Any] = [list_checkpoints(folder)]
    dist.broadcast_object_list(found, src=0)  # one rank's view of a shared file system
    skipped: list[str] = []
    for step, path in reversed(found[0]):
        damage = _damage(path)
        if damage is None:
            return FoundCheckpoint(step, path, tuple(skipped))
        skipped.append(f"warning: checkpoint {str(path)!r} is damaged and was skipped: {damage}")
    if skipped:
        raise CheckpointError(
            f"no checkpoint in {str(folder)!r} is whole, {len(skipped)} of {len(skipped)} are damaged, the newest: "
            f"{damage}: restore one from a copy, or remove the folder to start from the beginning"
        )
    return None


def checkpoint_state(path: Path) -> dict[str, Any]:
    """Reads the `state` that a checkpoint was saved with, the same on every rank. Collective over all ranks.

    Raises CheckpointError when it is damaged.
    """
    return on_rank_0(
        lambda: read_state(path),
        f"checkpoint {str(path)!r} is damaged",
        CheckpointError,
        remedy="remove it to resume from the one before",
    )


def load_checkpoint(path: Path, student: Student) -> bool:
    """Fills the student from a checkpoint. Collective over all ranks.

    Returns whether it was saved on the same layout, so that random number states could be taken over too.

    Raises:
        CheckpointError: the checkpoint is damaged, or another model's, or there was too little memory.
    """
    try:
        same_layout = load_state(path, student)
    except IO_ERRORS as problem:
        if is_out_of_memory(problem):
            raise CheckpointError(
                f"checkpoint {str(path)!r} could not be loaded, memory ran out ({one_line(problem)}); its files are "
                "whole: free the memory that other processes hold, or take more ranks or student.offload"
            ) from problem
        raise CheckpointError(
            f"checkpoint {str(path)!r} cannot be loaded ({one_line(problem)}): it is damaged or belongs to another "
            "model; remove it to resume from the one before"
        ) from problem
    release_memory()
    return same_layout


def named_checkpoint(folder: Path, name: str) -> Path:
    """Finds the checkpoint that a user names: `best`, or a step. Collective over all ranks.

    Raises:
        MissingPathError: there is no such checkpoint.
        CheckpointError: it is damaged.
    """
    found = {str(step): path for step, path in list_checkpoints(folder)}
    if name == BEST and (folder / BEST).is_file():
        path = folder / (folder / BEST).read_text(encoding="utf-8").strip()
    elif name in found:
        path = found[name]
    else:
        hint = "" if name != BEST else " (checkpoint.best_metric decides which one is the best)"
        raise MissingPathError(
            f"{str(folder)!r} has no checkpoint {name!r}{hint}: it holds the steps {', '.join(found) or 'none'}"
        )
    damage = _damage(path)
    if damage is not None:
        raise CheckpointError(
            f"checkpoint {str(path)!r} is damaged: {damage}: choose another one of {', '.join(found)}"
        )
    return path


def _damage(path: Path) -> str | None:
    """Says what is wrong with a checkpoint, the same on every rank; None if it is whole."""
    world, rank = dist.get_world_size(), dist.get_rank()
    answers: list[str | None] = [None] * world
    dist.all_gather_object(answers, find_damage(path, slice(rank, None, world)))
    return next((answer for answer in answers if answer is not None), None)
