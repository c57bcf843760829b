"""What all ranks have to know before any of them may act."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException as TorchCheckpointException

from opd_megatron.errors import CheckpointError

IO_ERRORS = (
    OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, MemoryError, CheckpointingException,
    TorchCheckpointException,
)  # fmt: skip
"""What reading or writing a checkpoint can raise; torch's is not even an Exception."""


def raise_together(error: BaseException | None, what: str) -> None:
    """Raises CheckpointError on every rank when any rank failed, so that none waits for another. Collective."""
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, one_line(error) if error else None)
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise CheckpointError(f"{what} (rank {rank}: {failure}): free disk space or change output_dir") from error


def all_ranks_max(*flags: bool) -> list[bool]:
    """Each flag, true on every rank when it is true on any. Collective, on the CPU."""
    values = torch.tensor([int(flag) for flag in flags], dtype=torch.int32)
    if dist.get_world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def one_line(error: BaseException) -> str:
    if isinstance(error, TorchCheckpointException):  # holds the failures of all ranks with their tracebacks
        error = next(iter(error.failures.values()))[0]
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
