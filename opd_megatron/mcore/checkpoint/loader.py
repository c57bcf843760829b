"""Loading: the newest checkpoint whose files are whole, and only if it belongs to this run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from opd_megatron.errors import CheckpointError, MissingPathError
from opd_megatron.mcore.checkpoint.agreement import IO_ERRORS, one_line
from opd_megatron.mcore.checkpoint.folder import BEST, list_checkpoints, read_state
from opd_megatron.mcore.checkpoint.manifest import find_damage
from opd_megatron.mcore.checkpoint.state import load_state
from opd_megatron.mcore.cpu.platform import release_memory
from opd_megatron.mcore.student import Student
from opd_megatron.run.identity import first_difference


@dataclass(frozen=True, slots=True)
class FoundCheckpoint:
    """A checkpoint whose files are whole."""

    step: int
    path: Path
    skipped: tuple[str, ...] = ()
    """One line for each damaged checkpoint that was passed over."""


def choose_checkpoint(folder: Path) -> FoundCheckpoint | None:
    """The newest checkpoint that is whole, the same on every rank; None when there is none at all. Collective.

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


def load_checkpoint(path: Path, student: Student, identity: dict[str, Any] | None = None) -> dict[str, Any]:
    """Fills the student from a checkpoint and returns the `state` it was saved with. Collective over all ranks.

    Args:
        identity: what makes the run what it is, as flat keys; the checkpoint's own must agree.

    Raises:
        CheckpointError: the checkpoint is damaged, or belongs to another run or another model.
    """
    state = _state_of(path)
    _check_identity(state.get("identity", {}), identity or {}, path)
    try:
        same_layout = load_state(path, student)
    except IO_ERRORS as problem:
        raise CheckpointError(
            f"checkpoint {str(path)!r} cannot be loaded ({one_line(problem)}): it is damaged or belongs to another "
            "model; remove it to resume from the one before"
        ) from problem
    release_memory()
    return {**state, "same_layout": same_layout}


def named_checkpoint(folder: Path, name: str) -> Path:
    """The checkpoint a user names: `best`, or a step. Collective over all ranks.

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
    """What is wrong with a checkpoint, the same answer on every rank."""
    world, rank = dist.get_world_size(), dist.get_rank()
    answers: list[str | None] = [None] * world
    dist.all_gather_object(answers, find_damage(path, slice(rank, None, world)))
    return next((answer for answer in answers if answer is not None), None)


def _state_of(path: Path) -> dict[str, Any]:
    """Rank 0 reads it for all, so that all see the same file or the same error."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = read_state(path)
        except (OSError, ValueError) as problem:
            answer[1] = one_line(problem)
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise CheckpointError(
            f"checkpoint {str(path)!r} is damaged ({answer[1]}): remove it to resume from the one before"
        )
    return answer[0]


def _check_identity(theirs: dict[str, Any], ours: dict[str, Any], path: Path) -> None:
    difference = first_difference(theirs, ours)
    if difference is not None:
        key, their_value, our_value = difference
        raise CheckpointError(
            f"checkpoint {str(path)!r} belongs to a run with {key}={their_value!r}, this one has {our_value!r}: "
            "choose another output_dir, or the same settings to resume"
        )
