"""Megatron shards to the shards of an engine with the same tensor-parallel size: no full tensor on the way.

Each tensor-parallel rank turns its own parameters into its own part of every Hugging Face tensor (queries, keys and
values apart, gate and up apart). Other pipeline stages send theirs to the first stage's rank of the same tensor index.
Only the vocabulary may be cut elsewhere by the engine, which pads it otherwise: there, rows are exchanged between
neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from opd_megatron.types import Bucket, NamedTensor
from opd_megatron.weights.export import buckets_of
from opd_megatron.weights.families import Shard
from opd_megatron.weights.layout import ShardLayout
from opd_megatron.weights.plan import Entry, Plan, build_plan, stage_parameters
from opd_megatron.weights.streaming import BUCKET_BYTES, UNITS, Finish, Outbox, as_bytes, overlapped, receive

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def shards_alike(hf_config: PretrainedConfig, layout: ShardLayout, tensor: int) -> bool:
    """Whether an engine of tensor-parallel size `tensor` cuts this model's tensors as the trainer does."""
    # Experts: the engine cuts each one, the trainer may hold whole ones.
    return layout.tp_size == tensor > 1 and not getattr(hf_config, "num_experts", None)


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
    shards, unless a single parameter's shard has more than a third of that. Where nothing is rearranged or sent the
    tensors are views of the parameters: use them before the next optimizer step.

    Args:
        vocab_rows: rows of embedding and head that each of the engine's ranks but the last holds.
    """
    dtype = dtype or next(model.parameters()).dtype
    device = next(model.parameters()).device
    plan = build_plan(hf_config, layout)
    parameters = {entry.megatron: parameter for entry, parameter in stage_parameters(model, plan, layout)}
    cut = _Cut(plan, layout, vocab_rows)
    outbox = Outbox()

    def begin() -> Iterator[Finish]:
        for entries in buckets_of(plan, bucket_bytes // UNITS // dtype.itemsize, cut.numel):
            if entries[0].stage == layout.pp_rank:
                shards = [parameters[entry.megatron] for entry in entries]
                yield _begin_cut(entries, shards, cut, dtype, outbox)
            elif layout.is_first_stage:
                yield _begin_receive(entries, cut, dtype, device)

    yield from overlapped(begin())
    outbox.wait()


class _Cut:
    """How the engine cuts each tensor, and how one rank's parameters turn into that."""

    def __init__(self, plan: Plan, layout: ShardLayout, vocab_rows: int) -> None:
        self.plan, self.layout = plan, layout
        self._theirs = _bounds(plan.dims.vocab, vocab_rows, layout.tp_size)
        self._ours = _bounds(plan.dims.vocab, layout.padded_vocab // layout.tp_size, layout.tp_size)
        assert self._theirs[-1][1] == plan.dims.vocab, f"{vocab_rows} rows a rank do not hold {plan.dims.vocab} tokens"

    def numel(self, entry: Entry) -> int:
        """Elements of a parameter on the rank that has most of them, the same number on every rank."""
        return sum(math.prod(shape) for shape in self._shapes(entry, tp_rank=0).values())

    def shapes(self, entries: Sequence[Entry]) -> dict[str, tuple[int, ...]]:
        """This rank's part of each Hugging Face tensor."""
        rank = self.layout.tp_rank
        return {name: shape for entry in entries for name, shape in self._shapes(entry, rank).items()}

    def _shapes(self, entry: Entry, tp_rank: int) -> dict[str, tuple[int, ...]]:
        if entry.shard is Shard.VOCAB:
            start, stop = self._theirs[tp_rank]
            return {name: (stop - start, *shape[1:]) for name, shape in entry.hf.items()}
        return {
            piece.name: tuple(
                piece.length if dim == piece.dim else size for dim, size in enumerate(entry.hf[piece.name])
            )
            for piece in self.plan.pieces(entry, self.layout, tp_rank)
        }

    def begin(
        self, entry: Entry, shard: torch.Tensor, dtype: torch.dtype
    ) -> tuple[list[NamedTensor], dist.Work | None]:
        """The tensors, and what to wait for before they hold their values."""
        if entry.shard is not Shard.VOCAB:
            pieces = self.plan.pieces(entry, self.layout, self.layout.tp_rank)
            return [(piece.name, piece.of_shard(shard).flatten(0, 1).to(dtype)) for piece in pieces], None
        ((name, _),) = entry.hf.items()
        start, stop = self._ours[self.layout.tp_rank]
        rows = shard[: stop - start].to(dtype)
        if self._ours == self._theirs:
            return [(name, rows)], None
        tensor, work = self._exchange(rows)
        return [(name, tensor)], work

    def _exchange(self, rows: torch.Tensor) -> tuple[torch.Tensor, dist.Work]:
        """From this rank's rows under our bounds to its rows under theirs. Both lie in the order of the vocabulary, so
        what goes to (or comes from) each rank is one block, and the blocks are in the order of the ranks."""
        rank = self.layout.tp_rank
        sends = [_overlap(self._ours[rank], theirs) for theirs in self._theirs]
        takes = [_overlap(ours, self._theirs[rank]) for ours in self._ours]
        tensor = rows.new_empty(sum(takes), *rows.shape[1:])
        work = dist.all_to_all_single(
            as_bytes(tensor), as_bytes(rows.contiguous()), takes, sends, group=self.layout.tp_group, async_op=True
        )
        assert work is not None
        return tensor, work


def _bounds(vocab: int, rows: int, ranks: int) -> list[tuple[int, int]]:
    """First and past-the-last token of each rank; padding belongs to none."""
    return [(min(rank * rows, vocab), min((rank + 1) * rows, vocab)) for rank in range(ranks)]


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> int:
    return max(0, min(a[1], b[1]) - max(a[0], b[0]))


def _begin_cut(
    entries: Sequence[Entry], shards: Sequence[torch.Tensor], cut: _Cut, dtype: torch.dtype, outbox: Outbox
) -> Finish:
    """Begins with one bucket of this stage; finishing sends it to the first stage, or returns it there."""
    outbox.wait()
    begun = [cut.begin(entry, shard, dtype) for entry, shard in zip(entries, shards, strict=True)]

    def finish() -> list[NamedTensor] | None:
        bucket: list[NamedTensor] = []
        for tensors, work in begun:
            if work is not None:
                work.wait()
            bucket += tensors
        if cut.layout.is_first_stage:
            return bucket
        assert cut.layout.pp_group is not None
        outbox.send(torch.cat([tensor.reshape(-1) for _, tensor in bucket]), cut.layout.pp_group, to=0)
        return None

    return finish


def _begin_receive(entries: Sequence[Entry], cut: _Cut, dtype: torch.dtype, device: torch.device) -> Finish:
    """On the first stage: begins to take the same rank's bucket of another stage."""
    assert cut.layout.pp_group is not None
    shapes = cut.shapes(entries)
    sizes = [math.prod(shape) for shape in shapes.values()]
    flat = torch.empty(sum(sizes), dtype=dtype, device=device)
    work = receive(flat, cut.layout.pp_group, entries[0].stage)

    def finish() -> list[NamedTensor]:
        work.wait()
        parts = zip(shapes.items(), flat.split(sizes), strict=True)
        return [(name, part.view(shape)) for (name, shape), part in parts]

    return finish
