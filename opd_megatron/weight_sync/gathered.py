"""Megatron parameters back to Hugging Face tensors, as a stream of bounded buckets.

Per bucket: the owning stage's tensor-parallel ranks send their parts to their rank 0 (one message each), which puts
the full tensors together and sends them on where they are not yet at home: from another expert-parallel rank to the
first of its stage, from another stage to the first (one message each). All of that is under way for the next bucket
while the last one is used (`streaming`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from opd_megatron.types import Bucket, NamedTensor
from opd_megatron.weight_sync.streaming import (
    BUCKET_BYTES,
    BUCKETS_IN_FLIGHT,
    AsyncSender,
    PendingTransfer,
    exchange,
    pipelined,
    receive,
    when_room,
)
from opd_megatron.weights.layout import ShardLayout
from opd_megatron.weights.parts import HFTensor, LocalShards, TrainedModel, buckets_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def export_weights(
    model: nn.Module,
    hf_config: PretrainedConfig,
    layout: ShardLayout,
    *,
    bucket_bytes: int = BUCKET_BYTES,
    dtype: torch.dtype | None = None,
) -> Iterator[Bucket]:
    """Gathers full Hugging Face tensors in buckets; a rank holds at most `bucket_bytes` beyond its shards.

    Memory = current bucket + next bucket + receive buffers, so a bucket is a third of the limit. Larger tensors (an
    embedding, often) are sent alone, when the bucket before is no longer needed.

    Every rank of one model replica (all TP x PP x EP) must exhaust the iterator: it communicates. Only rank
    (pp 0, tp 0, ep 0) is given buckets. Order: embedding, layers, final norm, output layer unless tied. The tensors
    stay on the model's device in `dtype` (the first parameter's by default), without the vocabulary's padding rows.
    Where nothing has to be gathered they are views of the parameters: use them before the next optimizer step.
    """
    kind = dtype or next(model.parameters()).dtype
    gathering = _GatherExport(LocalShards(model, hf_config, layout), kind, next(model.parameters()).device)
    yield from pipelined(gathering.begin(bucket_bytes // BUCKETS_IN_FLIGHT // kind.itemsize))
    gathering.sender.wait()


def gather_student(student: TrainedModel, *, bucket_bytes: int = BUCKET_BYTES) -> Iterator[Bucket]:
    """Gathers a student's full Hugging Face tensors in bounded buckets on global rank 0; every rank must exhaust the
    iterator.

    The first replica (the data-parallel ranks that hold all experts together) does the work of `export_weights`; the
    other replicas hold the same weights.
    """
    layout = student.layout
    place, those = student.dp_rank, layout.ep_size
    if layout.whole_experts:  # dealt to neighbours of all kinds
        place, those = place * layout.tp_size + layout.tp_rank, max(layout.tp_size, layout.ep_size)
    if place >= those:
        return iter(())
    return export_weights(student.model, student.hf_config, student.layout, bucket_bytes=bucket_bytes)


class _GatherExport:
    """One rank's share of the work."""

    def __init__(self, parts: LocalShards, dtype: torch.dtype, device: torch.device) -> None:
        self.sender = AsyncSender()
        self._parts, self._layout = parts, parts.layout
        self._dtype, self._device = dtype, device

    def begin(self, room: int) -> Iterator[PendingTransfer]:
        """Begins with the next bucket, of at most `room` elements, each time it is advanced."""
        for bucket in buckets_of(self._parts.tensors, room, lambda tensor: tensor.numel):
            fits = bucket[0].numel <= room
            start = self._start(bucket, fits)
            if start is not None:
                yield when_room(start, fits)

    def _start(self, bucket: list[HFTensor], fits: bool) -> Callable[[], PendingTransfer] | None:
        """Starts this rank's part of a bucket; None when it has none."""
        layout = self._layout
        if self._parts.exports(bucket[0]):
            if layout.tp_size == 1 and layout.is_first_stage and layout.ep_rank == 0:
                return lambda: functools.partial(self._own_tensors, bucket)
            return functools.partial(self._gather if fits else self._gather_alone, bucket)
        # Another rank's tensors come by here on their way to the first stage's first rank.
        if layout.tp_rank == layout.ep_rank == 0 and (layout.is_first_stage or bucket[0].owner[0] == layout.pp_rank):
            return functools.partial(self._receive, bucket)
        return None

    def _own_tensors(self, bucket: Sequence[HFTensor]) -> list[NamedTensor]:
        """Reads the tensors of an unsharded stage; copies only what Megatron interleaves or another dtype needs."""
        return [(tensor.name, self._parts.own(tensor).to(self._dtype)) for tensor in bucket]

    def _gather(self, bucket: Sequence[HFTensor]) -> PendingTransfer:
        """Begins to gather a bucket within its stage, one message a rank; what all ranks hold stays at home."""
        sharded = [tensor for tensor in bucket if not tensor.replicated]
        first = self._parts.assembles(bucket[0])
        ranks = range(1, self._layout.tp_size) if sharded else ()
        sizes = {rank: [math.prod(self._parts.shape(tensor, rank)) for tensor in sharded] for rank in ranks}
        if first:  # its own parts need no message
            flats = [self._empty(sum(sizes[rank])) for rank in ranks]
            works = exchange(flats, ranks, self._layout.tp_group, sends=False)
        else:
            flats = [torch.cat([self._own_flat(tensor) for tensor in sharded])] if sharded else []
            works = exchange(flats, [0], self._layout.tp_group, sends=True) if sharded else []

        def finish() -> list[NamedTensor] | None:
            for work in works:
                work.wait()
            if not first:
                return None
            self.sender.wait()
            flat, tensors = self._empty_bucket(bucket)
            for tensor in bucket:
                self._parts.place(tensor, 0, tensors[tensor.name]).copy_(self._parts.own(tensor))
            for rank, arrived in enumerate(flats, 1):
                for tensor, values in zip(sharded, arrived.split(sizes[rank]), strict=True):
                    place = self._parts.place(tensor, rank, tensors[tensor.name])
                    place.copy_(values.view(place.shape))
            return self._send_on(flat, tensors)

        return finish

    def _gather_alone(self, bucket: Sequence[HFTensor]) -> PendingTransfer:
        """Gathers one tensor that is larger than a bucket, in place where its layout allows."""
        (tensor,) = bucket
        if not self._parts.assembles(tensor):
            if tensor.replicated:
                return lambda: None
            own = self._own_flat(tensor)
            works = exchange([own], [0], self._layout.tp_group, sends=True)
            return functools.partial(_wait_for, works, own)
        self.sender.wait()
        flat, tensors = self._empty_bucket(bucket)
        full = tensors[tensor.name]
        ranks = [] if tensor.replicated else range(1, self._layout.tp_size)
        places = [self._parts.place(tensor, rank, full) for rank in ranks]
        arriving = [
            place if place.is_contiguous() else self._empty(place.numel()).view(place.shape) for place in places
        ]
        works = exchange([values.view(-1) for values in arriving], ranks, self._layout.tp_group, sends=False)
        self._parts.place(tensor, 0, full).copy_(self._parts.own(tensor))

        def finish() -> list[NamedTensor] | None:
            for work in works:
                work.wait()
            for place, values in zip(places, arriving, strict=True):
                if values is not place:
                    place.copy_(values)
            return self._send_on(flat, tensors)

        return finish

    def _receive(self, bucket: Sequence[HFTensor]) -> PendingTransfer:
        """Begins to receive on the first expert-parallel rank of a stage; finishing sends it on."""
        stage, expert_rank = bucket[0].owner
        at_home = stage == self._layout.pp_rank
        group, source = (self._layout.ep_group, expert_rank) if at_home else (self._layout.pp_group, stage)
        assert group is not None
        flat, tensors = self._empty_bucket(bucket)
        work = receive(flat, group, source)

        def finish() -> list[NamedTensor] | None:
            work.wait()
            self.sender.wait()
            return self._send_on(flat, tensors)

        return finish

    def _send_on(self, flat: torch.Tensor, tensors: dict[str, torch.Tensor]) -> list[NamedTensor] | None:
        """Sends to the stage's first expert-parallel rank, from there to the first stage, which returns it."""
        layout = self._layout
        if layout.ep_rank == 0 and layout.is_first_stage:
            return list(tensors.items())
        group = layout.ep_group if layout.ep_rank > 0 else layout.pp_group
        assert group is not None
        self.sender.send(flat, group, to=0)
        return None

    def _own_flat(self, tensor: HFTensor) -> torch.Tensor:
        return self._parts.own(tensor).reshape(-1).to(self._dtype)

    def _empty(self, numel: int) -> torch.Tensor:
        return torch.empty(numel, dtype=self._dtype, device=self._device)

    def _empty_bucket(self, bucket: Sequence[HFTensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Allocates one flat buffer, and the full tensors, by name, as views of it."""
        sizes = [tensor.numel for tensor in bucket]
        flat = self._empty(sum(sizes))
        parts = zip(bucket, flat.split(sizes), strict=True)
        return flat, {tensor.name: part.view(tensor.shape) for tensor, part in parts}


def _wait_for(works: Sequence[dist.Work], sent: torch.Tensor) -> None:
    """`sent` is kept until it has left."""
    for work in works:
        work.wait()
