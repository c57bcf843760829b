"""Megatron parameters back to Hugging Face tensors, as a stream of bounded buckets.

Per bucket: the owning stage's tensor-parallel ranks send their shards to their rank 0 (one gather), which puts the
full tensors together and sends them on where they are not yet at home: from another expert-parallel rank to the first
of its stage, from another stage to the first (one message each). So a rank holds its own shards plus a few buckets,
never a whole model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from opd_megatron.types import Bucket, NamedTensor
from opd_megatron.weights.families import Shard
from opd_megatron.weights.layout import ShardLayout
from opd_megatron.weights.plan import Entry, Plan, build_plan, stage_parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BUCKET_BYTES = 256 * 2**20


def export_weights(
    model: nn.Module,
    hf_config: PretrainedConfig,
    layout: ShardLayout,
    *,
    bucket_bytes: int = BUCKET_BYTES,
    dtype: torch.dtype | None = None,
) -> Iterator[Bucket]:
    """Full Hugging Face tensors in buckets of at most `bucket_bytes` (a larger tensor is a bucket by itself).

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
    for entries in _buckets(plan, bucket_bytes // dtype.itemsize):
        bucket: Bucket | None = None
        if _owner(entries[0]) == (layout.pp_rank, layout.ep_rank):
            shards = [parameters[entry.megatron] for entry in entries]
            if layout.tp_size == 1 and writes:
                bucket = _views_of_shards(entries, shards, plan, layout, dtype)
            else:
                bucket = _collect(entries, shards, plan, layout, dtype)
        elif layout.tp_rank == 0 and layout.ep_rank == 0:
            bucket = _receive(entries, layout, dtype, device)
        if writes:
            assert bucket is not None
            yield bucket


def _buckets(plan: Plan, limit: int) -> Iterator[list[Entry]]:
    """Entries of one owner at a time, at most `limit` elements together unless one entry alone has more."""
    bucket: list[Entry] = []
    size = 0
    for entry in plan.exported():
        if bucket and (_owner(entry) != _owner(bucket[0]) or size + entry.numel > limit):
            yield bucket
            bucket, size = [], 0
        bucket.append(entry)
        size += entry.numel
    yield bucket


def _owner(entry: Entry) -> tuple[int, int]:
    """(pipeline stage, expert-parallel rank) that exports it: of what all expert-parallel ranks hold, the first."""
    return entry.stage, entry.expert_rank or 0


def _views_of_shards(
    entries: Sequence[Entry], shards: Sequence[torch.Tensor], plan: Plan, layout: ShardLayout, dtype: torch.dtype
) -> list[NamedTensor]:
    """An unsharded stage's tensors; only what Megatron interleaves (QKV), or another dtype, is copied."""
    bucket: list[NamedTensor] = []
    for entry, shard in zip(entries, shards, strict=True):
        for piece in plan.pieces(entry, layout, 0):
            bucket.append((piece.name, piece.of_shard(shard).reshape(entry.hf[piece.name]).to(dtype)))
    return bucket


def _collect(
    entries: Sequence[Entry], shards: Sequence[torch.Tensor], plan: Plan, layout: ShardLayout, dtype: torch.dtype
) -> list[NamedTensor] | None:
    """Gathers one bucket within its stage and sends it on. Returns it where it ends up."""
    by_rank = _gather(entries, shards, layout, dtype)
    if by_rank is None:
        return None
    flat, tensors = _empty_bucket(entries, dtype, shards[0].device)
    for tp_rank, parts in enumerate(by_rank):
        for entry, part in zip(entries, parts, strict=True):
            if entry.shard is Shard.REPLICATED and tp_rank > 0:
                continue
            for piece in plan.pieces(entry, layout, tp_rank):
                piece.of_full(tensors[piece.name]).copy_(piece.of_shard(part))
    return _send_on(flat, tensors, layout)


def _send_on(flat: torch.Tensor, tensors: dict[str, torch.Tensor], layout: ShardLayout) -> list[NamedTensor] | None:
    """To the first expert-parallel rank of the stage, from there to the first stage; there it is returned."""
    if layout.ep_rank == 0 and layout.is_first_stage:
        return list(tensors.items())
    group = layout.ep_group if layout.ep_rank > 0 else layout.pp_group
    assert group is not None
    dist.send(flat.view(torch.uint8), dist.get_global_rank(group, 0), group=group)
    return None


def _gather(
    entries: Sequence[Entry], shards: Sequence[torch.Tensor], layout: ShardLayout, dtype: torch.dtype
) -> list[list[torch.Tensor]] | None:
    """Every tensor-parallel rank's shards, on tensor-parallel rank 0; None on the others.

    Bytes are sent rather than numbers: not every backend knows every dtype. Replicated parameters stay at home.
    """
    if layout.tp_size == 1:
        return [list(shards)]
    assert layout.tp_group is not None
    sharded = [s for e, s in zip(entries, shards, strict=True) if e.shard is not Shard.REPLICATED]
    collects = layout.tp_rank == 0
    flats: list[torch.Tensor] = []
    if sharded:
        mine = torch.cat([shard.reshape(-1).to(dtype) for shard in sharded])
        flats = [torch.empty_like(mine) for _ in range(layout.tp_size)] if collects else []
        dist.gather(
            mine.view(torch.uint8),
            [flat.view(torch.uint8) for flat in flats] if collects else None,
            dst=dist.get_global_rank(layout.tp_group, 0),
            group=layout.tp_group,
        )
    if not collects:
        return None
    sizes = [shard.numel() for shard in sharded]
    by_rank = []
    for rank in range(layout.tp_size):
        parts = iter(flats[rank].split(sizes) if sharded else ())
        by_rank.append([
            shard if entry.shard is Shard.REPLICATED else next(parts).view(shard.shape)
            for entry, shard in zip(entries, shards, strict=True)
        ])  # fmt: skip
    return by_rank


def _receive(
    entries: Sequence[Entry], layout: ShardLayout, dtype: torch.dtype, device: torch.device
) -> list[NamedTensor] | None:
    """On the first expert-parallel rank of every stage: takes what comes by on its way and sends it on."""
    stage, expert_rank = _owner(entries[0])
    if stage != layout.pp_rank and not layout.is_first_stage:
        return None
    group, source = (layout.ep_group, expert_rank) if stage == layout.pp_rank else (layout.pp_group, stage)
    assert group is not None
    flat, tensors = _empty_bucket(entries, dtype, device)
    dist.recv(flat.view(torch.uint8), dist.get_global_rank(group, source), group=group)
    return _send_on(flat, tensors, layout)


def _empty_bucket(
    entries: Sequence[Entry], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One flat buffer and the full tensors as views of it."""
    shapes = {name: shape for entry in entries for name, shape in entry.hf.items()}
    flat = torch.empty(sum(map(math.prod, shapes.values())), dtype=dtype, device=device)
    parts = flat.split([math.prod(shape) for shape in shapes.values()])
    return flat, {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
