"""Megatron parameters back to Hugging Face tensors, as a stream of bounded buckets.

Per bucket: the owning stage's tensor-parallel ranks send their shards to their rank 0 (one gather), which puts the
full tensors together and sends them on where they are not yet at home: from another expert-parallel rank to the first
of its stage, from another stage to the first (one message each). All of that is under way for the next bucket while the
last one is used (`streaming`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from opd_megatron.types import Bucket, NamedTensor
from opd_megatron.weights.families import Shard
from opd_megatron.weights.layout import ShardLayout
from opd_megatron.weights.plan import Entry, Plan, build_plan, stage_parameters
from opd_megatron.weights.streaming import BUCKET_BYTES, UNITS, Finish, Outbox, exchange, overlapped, receive

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
    """Full Hugging Face tensors in buckets; a rank holds at most `bucket_bytes` beyond its shards.

    That is the bucket in use, the next one on its way and what it is made of: so a bucket has at most a third of it.
    A Megatron parameter with more (an embedding, often) is a bucket by itself, and three times its size is held.

    Every rank of one model replica (all TP x PP x EP) must exhaust the iterator: it communicates. Only rank
    (pp 0, tp 0, ep 0) is given buckets. Order: embedding, layers, final norm, output layer unless tied. The tensors
    stay on the model's device in `dtype` (the first parameter's by default), without the vocabulary's padding rows.
    Where nothing has to be gathered they are views of the parameters: use them before the next optimizer step.
    """
    dtype = dtype or next(model.parameters()).dtype
    device = next(model.parameters()).device
    plan = build_plan(hf_config, layout)
    parameters = {entry.megatron: parameter for entry, parameter in stage_parameters(model, plan, layout)}
    writes = layout.is_first_stage and layout.tp_rank == 0 and layout.ep_rank == 0
    outbox = Outbox()

    def begin() -> Iterator[Finish]:
        for entries in buckets_of(plan, bucket_bytes // UNITS // dtype.itemsize):
            if _owner(entries[0]) == (layout.pp_rank, layout.ep_rank):
                shards = [parameters[entry.megatron] for entry in entries]
                if layout.tp_size == 1 and writes:
                    yield functools.partial(_views_of_shards, entries, shards, plan, layout, dtype)
                else:
                    yield _begin_collect(entries, shards, plan, layout, dtype, outbox)
            elif _passes(entries[0], layout):
                yield _begin_receive(entries, layout, dtype, device, outbox)

    yield from overlapped(begin())
    outbox.wait()


def buckets_of(
    plan: Plan, limit: int, numel: Callable[[Entry], int] = lambda entry: entry.numel
) -> Iterator[list[Entry]]:
    """Entries of one owner at a time, at most `limit` elements together unless one entry alone has more."""
    bucket: list[Entry] = []
    size = 0
    for entry in plan.exported():
        if bucket and (_owner(entry) != _owner(bucket[0]) or size + numel(entry) > limit):
            yield bucket
            bucket, size = [], 0
        bucket.append(entry)
        size += numel(entry)
    yield bucket


def _owner(entry: Entry) -> tuple[int, int]:
    """(pipeline stage, expert-parallel rank) that exports it: of what all expert-parallel ranks hold, the first."""
    return entry.stage, entry.expert_rank or 0


def _passes(entry: Entry, layout: ShardLayout) -> bool:
    """Whether another rank's tensor comes by here on its way to the first stage's first rank."""
    return layout.tp_rank == layout.ep_rank == 0 and (layout.is_first_stage or entry.stage == layout.pp_rank)


def _views_of_shards(
    entries: Sequence[Entry], shards: Sequence[torch.Tensor], plan: Plan, layout: ShardLayout, dtype: torch.dtype
) -> list[NamedTensor]:
    """An unsharded stage's tensors; only what Megatron interleaves (QKV), or another dtype, is copied."""
    bucket: list[NamedTensor] = []
    for entry, shard in zip(entries, shards, strict=True):
        for piece in plan.pieces(entry, layout, 0):
            bucket.append((piece.name, piece.of_shard(shard).reshape(entry.hf[piece.name]).to(dtype)))
    return bucket


def _begin_collect(
    entries: Sequence[Entry],
    shards: Sequence[torch.Tensor],
    plan: Plan,
    layout: ShardLayout,
    dtype: torch.dtype,
    outbox: Outbox,
) -> Finish:
    """Begins to gather one bucket within its stage; finishing sends it on, or returns it where it is at home."""
    gathered = _begin_gather(entries, shards, layout, dtype)

    def finish() -> list[NamedTensor] | None:
        by_rank = gathered()
        if by_rank is None:
            return None
        outbox.wait()
        flat, tensors = _empty_bucket(entries, dtype, shards[0].device)
        for tp_rank, parts in enumerate(by_rank):
            for entry, part in zip(entries, parts, strict=True):
                if entry.shard is Shard.REPLICATED and tp_rank > 0:
                    continue
                for piece in plan.pieces(entry, layout, tp_rank):
                    piece.of_full(tensors[piece.name]).copy_(piece.of_shard(part))
        return _send_on(flat, tensors, layout, outbox)

    return finish


def _send_on(
    flat: torch.Tensor, tensors: dict[str, torch.Tensor], layout: ShardLayout, outbox: Outbox
) -> list[NamedTensor] | None:
    """To the first expert-parallel rank of the stage, from there to the first stage; there it is returned."""
    if layout.ep_rank == 0 and layout.is_first_stage:
        return list(tensors.items())
    group = layout.ep_group if layout.ep_rank > 0 else layout.pp_group
    assert group is not None
    outbox.send(flat, group, to=0)
    return None


def _begin_gather(
    entries: Sequence[Entry], shards: Sequence[torch.Tensor], layout: ShardLayout, dtype: torch.dtype
) -> Callable[[], list[list[torch.Tensor]] | None]:
    """Every tensor-parallel rank's shards, on tensor-parallel rank 0; None on the others. Replicated ones stay home."""
    if layout.tp_size == 1:
        return lambda: [list(shards)]
    assert layout.tp_group is not None
    sharded = [s for e, s in zip(entries, shards, strict=True) if e.shard is not Shard.REPLICATED]
    sizes = [shard.numel() for shard in sharded]
    collects = layout.tp_rank == 0
    peers = range(1, layout.tp_size) if collects else [0]
    if collects:  # its own shards need no copy
        flats = [shards[0].new_empty(sum(sizes), dtype=dtype) for _ in peers]
    else:
        flats = [torch.cat([shard.reshape(-1).to(dtype) for shard in sharded])] if sharded else []
    works = exchange(flats, peers, layout.tp_group, sends=not collects) if sharded else []

    def finish() -> list[list[torch.Tensor]] | None:
        for work in works:
            work.wait()
        if not collects:
            return None
        by_rank = [list(shards)]
        for flat in flats:
            parts = iter(flat.split(sizes))
            by_rank.append([
                shard if entry.shard is Shard.REPLICATED else next(parts).view(shard.shape)
                for entry, shard in zip(entries, shards, strict=True)
            ])  # fmt: skip
        return by_rank

    return finish


def _begin_receive(
    entries: Sequence[Entry], layout: ShardLayout, dtype: torch.dtype, device: torch.device, outbox: Outbox
) -> Finish:
    """On the first expert-parallel rank of a stage: begins to take what comes by; finishing sends it on."""
    stage, expert_rank = _owner(entries[0])
    group, source = (layout.ep_group, expert_rank) if stage == layout.pp_rank else (layout.pp_group, stage)
    assert group is not None
    flat, tensors = _empty_bucket(entries, dtype, device)
    work = receive(flat, group, source)

    def finish() -> list[NamedTensor] | None:
        work.wait()
        outbox.wait()
        return _send_on(flat, tensors, layout, outbox)

    return finish


def _empty_bucket(
    entries: Sequence[Entry], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One flat buffer and the full tensors as views of it."""
    shapes = {name: shape for entry in entries for name, shape in entry.hf.items()}
    flat = torch.empty(sum(map(math.prod, shapes.values())), dtype=dtype, device=device)
    parts = flat.split([math.prod(shape) for shape in shapes.values()])
    return flat, {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
