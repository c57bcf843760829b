"""Gives an engine the student's weights in the format that it takes: shard to shard where both are sharded alike, else
gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from opd_megatron.system.groups import cpu_group
from opd_megatron.types import Bucket
from opd_megatron.weight_sync.bucket_store import bucket_store
from opd_megatron.weight_sync.fan_out import FanOut
from opd_megatron.weight_sync.format import WeightFormat, WeightPayload
from opd_megatron.weight_sync.gathered import gather_student
from opd_megatron.weight_sync.shard_files import ShardFileTransport
from opd_megatron.weight_sync.sharded import reshard_student, same_tp_layout
from opd_megatron.weights.parts import TrainedModel


class WeightPublisher:
    """One rank's end of the weight sync. Every method is a collective over all ranks."""

    def __init__(
        self,
        student: TrainedModel,
        weight_format: WeightFormat,
        world: ProcessGroup | None,
        *,
        bucket_bytes: int,
        on_event: Callable[[str], None],
        fan_out: FanOut | None = None,
        device: torch.device | None = None,
    ) -> None:
        """
        Args:
            weight_format: of the engine, the same on every rank.
            world: gloo group of all ranks; None for a single process.
            bucket_bytes: what a rank may hold beyond its own shards.
            on_event: gets a line when the ranks share no files with the engine, so that tensors must be gathered.
            fan_out: brings the payloads to the engines of all ranks; None where the only engine is on rank 0.
            device: of the student.
        """
        self._student, self._format, self._world = student, weight_format, world
        self._bucket_bytes = bucket_bytes
        self._device = device or torch.device("cpu")
        self._transport: ShardFileTransport | None = None
        self._payloads = self._choose_transport(on_event)
        self._fan_out = fan_out

    def stream(self) -> Iterator[WeightPayload]:
        """Yields the current weights on the ranks that have engines (what others get is ignored); every rank must
        exhaust it."""
        return self._fan_out.stream(self._payloads()) if self._fan_out else self._payloads()

    def close(self) -> None:
        """Frees what was put down for the engines, which all of them must have read. Not a collective."""
        for part in (self._transport, self._fan_out):
            if part is not None:
                part.close()

    def _choose_transport(self, on_event: Callable[[str], None]) -> Callable[[], Iterator[WeightPayload]]:
        takes_shards = self._format.vocab_rows is not None
        if not (takes_shards and same_tp_layout(self._student.layout, self._format.tp_size)):
            return self._gathered
        if not self._reaches_engine():
            on_event("the ranks of the first stage share no folder with the engine: weights are gathered for it")
            return self._gathered
        return self._shard_files

    def _reaches_engine(self) -> bool:
        """Makes the transport of shard files, and tells whether the engine's host can read every rank's."""
        # Tensor parallelism is the fastest axis of the grid: these are the ranks of rank 0's stage and replica.
        tp_size = self._student.layout.tp_size
        senders = cpu_group(range(tp_size))
        reached = [True]
        if dist.get_rank() < tp_size:
            self._transport = ShardFileTransport(senders, bucket_store(self._format, self._device, writers=tp_size))
            reached = [self._transport.reaches_all()]
        dist.broadcast_object_list(reached, group_src=0, group=self._world, device=torch.device("cpu"))
        return reached[0]

    def _gathered(self) -> Iterator[Bucket]:
        return gather_student(self._student, bucket_bytes=self._bucket_bytes)

    def _shard_files(self) -> Iterator[WeightPayload]:
        assert self._format.vocab_rows is not None
        buckets = reshard_student(self._student, self._format.vocab_rows, bucket_bytes=self._bucket_bytes)
        yield from self._transport.stream(buckets) if self._transport is not None else buckets
