"""Hidden states from rank to rank, a bounded number of micro batches at a time.

Over gloo, through pinned host memory where models are on GPUs: NCCL's receives occupy the GPU until their sender comes,
which two communicators in different orders turn into a deadlock. Gloo's messages wait for their receiver without
holding anybody up, and are matched by sender and tag, so that the order of different senders does not matter.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from opd_megatron.errors import TeacherError, one_line


class Outbox:
    """A teacher's side: messages to the student's ranks, at most `limit` of them not yet taken."""

    def __init__(self, group: ProcessGroup | None, limit: int | None) -> None:
        self._group, self._limit = group, limit
        self._under_way: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def send(self, rows: torch.Tensor, to: int, tag: int) -> None:
        """Sends [R, h] to a rank of the group. Waits for the oldest message where there are too many.

        Raises TeacherError when a receiver is gone."""
        payload = rows.detach().to("cpu").contiguous()
        work = dist.isend(payload.view(torch.uint8), group=self._group, group_dst=to, tag=tag)
        assert work is not None
        self._under_way.append((work, payload))
        while self._limit is not None and len(self._under_way) > self._limit:
            self._wait_for_oldest()

    def flush(self) -> None:
        """Waits until everything has been taken."""
        while self._under_way:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        work, _ = self._under_way.popleft()
        _wait(work, "a rank of the student's took no hidden states")


@dataclass(frozen=True, slots=True)
class Expected:
    """A message that will come."""

    tag: int
    """The index of its micro batch."""
    rows: int
    sender: int
    """By its rank in the group."""


class Inbox(Sequence[torch.Tensor]):
    """The student's side: hidden states in the order in which they are expected, asked for once each; the next `ahead`
    of them are received meanwhile."""

    def __init__(
        self,
        group: ProcessGroup | None,
        expected: Sequence[Expected],
        width: int,
        dtype: torch.dtype,
        *,
        ahead: int,
        device: torch.device,
        name: str,
    ) -> None:
        """
        Args:
            width: hidden size.
            name: of the teacher, for errors.
        """
        self._group, self._expected, self._width, self._dtype = group, expected, width, dtype
        self._ahead, self._device, self._name = ahead, device, name
        self._arriving: deque[tuple[dist.Work, torch.Tensor]] = deque()
        self._posted = self._taken = 0
        self.nbytes, self.waited = 0, 0.0
        """Of what has been taken, and seconds spent on waiting for it."""
        self._post()

    def __len__(self) -> int:
        return len(self._expected)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | Sequence[torch.Tensor]:
        assert isinstance(index, int)
        if index >= len(self._expected):
            raise IndexError(index)
        assert index == self._taken, f"micro batch {index} is asked for where {self._taken} is next"
        work, states = self._arriving.popleft()
        begin = time.perf_counter()
        _wait(work, f"teacher {self._name} sent no hidden states")
        self.waited += time.perf_counter() - begin
        self.nbytes += states.nbytes
        self._taken += 1
        self._post()
        return states.to(self._device, non_blocking=True)

    def _post(self) -> None:
        while self._posted < min(len(self._expected), self._taken + self._ahead):
            each = self._expected[self._posted]
            pinned = self._device.type == "cuda"
            states = torch.empty((each.rows, self._width), dtype=self._dtype, pin_memory=pinned)
            work = dist.irecv(states.view(torch.uint8), group=self._group, group_src=each.sender, tag=each.tag)
            assert work is not None
            self._arriving.append((work, states))
            self._posted += 1


def _wait(work: dist.Work, what: str) -> None:
    try:
        work.wait()
    except RuntimeError as error:  # gloo's words for a process that is gone, or a time that is over
        raise TeacherError(f"{what}: {one_line(error)}: see what the rank at the other end has printed") from None
