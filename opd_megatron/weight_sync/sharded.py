"""Megatron shards to the shards of an engine with the same tensor-parallel size: no full tensor on the way.

Each tensor-parallel rank turns its own parameters into its own part of every Hugging Face tensor (queries, keys and
values apart, gate and up apart). Other pipeline stages send theirs to the first stage's rank of the same tensor index.
Only the vocabulary may be cut elsewhere by the engine, which pads it otherwise: there, rows are exchanged between
neighbours.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
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
    as_bytes,
    pipelined,
    receive,
    when_room,
)
from opd_megatron.weights.families import TPSharding
from opd_megatron.weights.layout import ShardLayout
from opd_megatron.weights.parts import HFTensor, LocalShards, TrainedModel, buckets_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def same_tp_layout(layout: ShardLayout, tensor: int) -> bool:
    """Whether an engine of tensor-parallel size `tensor` cuts a model's tensors as the trainer does."""
    # The engine cuts every expert: no rank of a trainer that shares experts out has all of what one worker holds.
    return layout.tp_size == tensor > 1 and layout.ep_size == 1


def export_shards(
    model: nn.Module,
    hf_config: PretrainedConfig,
    layout: ShardLayout,
    *,
    vocab_rows: int,
    bucket_bytes: int = BUCKET_BYTES,
    dtype: torch.dtype | None = None,
) -> Iterator[Bucket]:
    """Each tensor-parallel rank's part of every Hugging Face tensor, under its name, in the order of `export_weights`.

    Every rank of one model replica (all TP x PP) must exhaust the iterator: it communicates. Each rank of the first
    stage is given its buckets, as many as the others of that stage get. A rank holds at most `bucket_bytes` beyond its
    shards; a part with more than a third of that travels alone, when the bucket before it is no longer needed. Where
    nothing is rearranged or sent the tensors are views of the parameters: use them before the next optimizer step.

    Args:
        vocab_rows: rows of embedding and head that each of the engine's ranks but the last holds.
    """
    kind = dtype or next(model.parameters()).dtype
    cut = _ReshardExport(LocalShards(model, hf_config, layout), kind, next(model.parameters()).device, vocab_rows)
    yield from pipelined(cut.begin(bucket_bytes // BUCKETS_IN_FLIGHT // kind.itemsize))
    cut.sender.wait()


def reshard_student(student: TrainedModel, vocab_rows: int, *, bucket_bytes: int = BUCKET_BYTES) -> Iterator[Bucket]:
    """A student's `export_shards` on the ranks of the first stage; every rank must exhaust the iterator. The first
    data-parallel replica does the work."""
    if student.dp_rank > 0:
        return iter(())
    return export_shards(
        student.model, student.hf_config, student.layout, vocab_rows=vocab_rows, bucket_bytes=bucket_bytes
    )


class _ReshardExport:
    """How the engine cuts each tensor, and how one rank's parts turn into that."""

    def __init__(self, parts: LocalShards, dtype: torch.dtype, device: torch.device, vocab_rows: int) -> None:
        self.sender = AsyncSender()
        self._parts, self._layout, self._dtype, self._device = parts, parts.layout, dtype, device
        vocab, ranks = parts.table.dims.vocab, self._layout.tp_size
        self._theirs = _bounds(vocab, vocab_rows, ranks)
        self._ours = _bounds(vocab, self._layout.padded_vocab // ranks, ranks)
        assert self._theirs[-1][1] == vocab, f"{vocab_rows} rows a rank do not hold {vocab} tokens"

    def begin(self, room: int) -> Iterator[PendingTransfer]:
        """Begins with the next bucket, of at most `room` elements on any rank, each time it is advanced."""
        for bucket in buckets_of(self._parts.tensors, room, self._most):
            fits = self._most(bucket[0]) <= room
            if self._parts.exports(bucket[0]):
                yield when_room(functools.partial(self._begin_own, bucket), fits)
            elif self._layout.is_first_stage:
                yield when_room(functools.partial(self._begin_receive, bucket), fits)

    def _most(self, tensor: HFTensor) -> int:
        """Elements on the rank that has most of them, the same number on every rank."""
        return math.prod(self._shape(tensor, tp_rank=0))

    def _shape(self, tensor: HFTensor, tp_rank: int) -> tuple[int, ...]:
        """Of the part that the engine's `tp_rank` holds."""
        if tensor.param.shard is not TPSharding.VOCAB:
            return self._parts.shape(tensor, tp_rank)
        start, stop = self._theirs[tp_rank]
        return (stop - start, *tensor.shape[1:])

    def _begin_own(self, bucket: Sequence[HFTensor]) -> PendingTransfer:
        """Begins with a bucket of this stage; finishing sends it to the first stage, or returns it there."""
        self.sender.wait()
        begun = [(tensor.name, *self._begin_part(tensor)) for tensor in bucket]

        def finish() -> list[NamedTensor] | None:
            for _, _, work in begun:
                if work is not None:
                    work.wait()
            if self._layout.is_first_stage:
                return [(name, values) for name, values, _ in begun]
            assert self._layout.pp_group is not None
            flats = [values.reshape(-1) for _, values, _ in begun]
            self.sender.send(torch.cat(flats) if len(flats) > 1 else flats[0], self._layout.pp_group, to=0)
            return None

        return finish

    def _begin_part(self, tensor: HFTensor) -> tuple[torch.Tensor, dist.Work | None]:
        """The engine's part of a tensor, and what to wait for before it holds its values."""
        own = self._parts.own(tensor).to(self._dtype)
        if tensor.param.shard is not TPSharding.VOCAB or self._ours == self._theirs:
            return own, None
        return self._exchange(own)

    def _begin_receive(self, bucket: Sequence[HFTensor]) -> PendingTransfer:
        """On the first stage: begins to take the same rank's bucket of another stage."""
        assert self._layout.pp_group is not None
        shapes = {tensor.name: self._shape(tensor, self._layout.tp_rank) for tensor in bucket}
        sizes = [math.prod(shape) for shape in shapes.values()]
        flat = torch.empty(sum(sizes), dtype=self._dtype, device=self._device)
        work = receive(flat, self._layout.pp_group, bucket[0].owner[0])

        def finish() -> list[NamedTensor]:
            work.wait()
            parts = zip(shapes.items(), flat.split(sizes), strict=True)
            return [(name, part.view(shape)) for (name, shape), part in parts]

        return finish

    def _exchange(self, rows: torch.Tensor) -> tuple[torch.Tensor, dist.Work]:
        """From this rank's rows under our bounds to its rows under theirs. Both lie in the order of the vocabulary, so
        what goes to (or comes from) each rank is one block, and the blocks are in the order of the ranks."""
        rank = self._layout.tp_rank
        sends = [_overlap(self._ours[rank], theirs) for theirs in self._theirs]
        takes = [_overlap(ours, self._theirs[rank]) for ours in self._ours]
        tensor = rows.new_empty(sum(takes), *rows.shape[1:])
        work = dist.all_to_all_single(
            as_bytes(tensor), as_bytes(rows.contiguous()), takes, sends, group=self._layout.tp_group, async_op=True
        )
        assert work is not None
        return tensor, work


def _bounds(vocab: int, rows: int, ranks: int) -> list[tuple[int, int]]:
    """First and past-the-last token of each rank; padding belongs to none."""
    return [(min(rank * rows, vocab), min((rank + 1) * rows, vocab)) for rank in range(ranks)]


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> int:
    return max(0, min(a[1], b[1]) - max(a[0], b[0]))
