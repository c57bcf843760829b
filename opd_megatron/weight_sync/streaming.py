"""Buckets one after another, the next one on its way while the last one is used.

    begin(0)  finish(0) begin(1)  [bucket 0 is used]  finish(1) begin(2)  [bucket 1 is used]  ...

Every rank begins and finishes the same transfers in the same order, so that they cannot wait for each other crosswise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from opd_megatron.types import Bucket
from opd_megatron.weights.shared_reading import as_bytes

PendingTransfer = Callable[[], Bucket | None]
"""Waits for a transfer that has begun; the bucket on the rank where it ends up, None on the others."""

BUCKET_BYTES = 256 * 2**20
BUCKETS_IN_FLIGHT = 3
"""Parts of `bucket_bytes` that a rank holds at the worst moment: the bucket in use, the next one's shards as they
arrived, and the tensors these are made into. So a bucket has at most a third of `bucket_bytes`."""


def pipelined(begun: Iterator[PendingTransfer]) -> Iterator[Bucket]:
    """The buckets of this rank. `begun` begins one transfer each time it is advanced."""
    finish = next(begun, None)
    while finish is not None:
        bucket = finish()
        finish = None  # frees what arrived before anything is made room for
        finish = next(begun, None)
        if bucket is not None:
            yield bucket
        bucket = None


def when_room(start: Callable[[], PendingTransfer], fits: bool) -> PendingTransfer:
    """A transfer that begins now or, when it is larger than a bucket, once the bucket before it has been used."""
    return start() if fits else lambda: start()()


class AsyncSender:
    """Messages to another rank, one at a time on its way."""

    def __init__(self) -> None:
        self._work: dist.Work | None = None
        self._buffer: torch.Tensor | None = None

    def wait(self) -> None:
        """Until the last message has left, and frees it: call it before the next one is built."""
        if self._work is not None:
            self._work.wait()
        self._work = self._buffer = None

    def send(self, flat: torch.Tensor, group: ProcessGroup, to: int) -> None:
        """`to`: rank within the group. Bytes are sent rather than numbers: not every backend knows every dtype."""
        assert self._buffer is None, "the last message must have left"
        self._work = dist.isend(as_bytes(flat), group_dst=to, group=group)
        self._buffer = flat


def receive(flat: torch.Tensor, group: ProcessGroup, source: int) -> dist.Work:
    """Begins to fill `flat` from a rank of the group, which sends by `AsyncSender`."""
    work = dist.irecv(as_bytes(flat), group_src=source, group=group)
    assert work is not None
    return work


def exchange(
    flats: Sequence[torch.Tensor], peers: Sequence[int], group: ProcessGroup | None, *, sends: bool
) -> list[dist.Work]:
    """Begins to send each of `flats` to, or to fill it from, the peer (rank within the group) beside it.

    Every rank of the group must call it; empty ones stay at home. Plain messages, as some backends' gather makes a
    copy of everything.
    """
    operation = dist.isend if sends else dist.irecv
    messages = [
        dist.P2POp(operation, as_bytes(flat), group=group, group_peer=peer)
        for flat, peer in zip(flats, peers, strict=True)
        if flat.numel() > 0
    ]
    return dist.batch_isend_irecv(messages) if messages else []
