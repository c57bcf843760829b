"""Sharing one rank's error, result or flag with all ranks before any of them acts on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from opd_megatron.errors import OPDError, cause_of, one_line
from opd_megatron.system.atomic import disk_remedy

Result = TypeVar("Result")


def raise_on_all_ranks(
    error: BaseException | None,
    what: str,
    kind: type[OPDError],
    *,
    remedy: str = "",
    group: dist.ProcessGroup | None = None,
) -> None:
    """Raises the first failing rank's error on every rank, so that none waits for another. Collective.

    An OPDError keeps its class and message. Anything else becomes `kind`: what failed, on which rank, why, and what can
    be done about that cause, or `remedy` where the cause itself says nothing.
    """
    mine = None if error is None else _described(error, what, kind, remedy, dist.get_rank(group))
    found: list[tuple[type[OPDError], str] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    _raise_first(found, error)


@contextmanager
def on_all_ranks(
    what: str, kind: type[OPDError], *, remedy: str = "", group: dist.ProcessGroup | None = None
) -> Iterator[None]:
    """Raises an error in the block of any rank on all ranks, at the block's end. Collective."""
    error: Exception | None = None
    try:
        yield
    except Exception as problem:
        error = problem
    raise_on_all_ranks(error, what, kind, remedy=remedy, group=group)


def on_rank_0(
    action: Callable[[], Result],
    what: str,
    kind: type[OPDError],
    *,
    remedy: str = "",
    group: dist.ProcessGroup | None = None,
) -> Result:
    """Runs `action` on the first rank of the group; every rank returns its result or raises its error. Collective.

    An error that is no OPDError, OSError or ValueError is a bug: the first rank raises it as it is, with its traceback.
    """
    answer: list[Any] = [None, None]
    error: Exception | None = None
    if dist.get_rank(group) == 0:
        try:
            answer[1] = action()
        except Exception as problem:
            error = problem
            answer[0] = _described(problem, what, kind, remedy, 0)
    dist.broadcast_object_list(answer, group_src=0, group=group, device=torch.device("cpu"))
    if error is not None and not isinstance(error, (OPDError, OSError, ValueError)):
        raise error
    _raise_first([answer[0]], error)
    return answer[1]  # type: ignore[no-any-return]


def all_ranks_max(*flags: bool) -> list[bool]:
    """Combines flags: each is true on every rank when it is true on any. Collective, on the CPU."""
    values = torch.tensor([int(flag) for flag in flags], dtype=torch.int32)
    if dist.get_world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def _described(
    error: BaseException, what: str, kind: type[OPDError], remedy: str, rank: int
) -> tuple[type[OPDError], str]:
    if isinstance(error, OPDError):
        return type(error), str(error)
    advice = disk_remedy(cause_of(error)) or remedy
    return kind, f"{what} (rank {rank}: {one_line(error)})" + (f": {advice}" if advice else "")


def _raise_first(found: list[tuple[type[OPDError], str] | None], own: BaseException | None) -> None:
    for failure in found:
        if failure is not None:
            if isinstance(own, failure[0]) and str(own) == failure[1]:
                raise own
            raise failure[0](failure[1]) from own
