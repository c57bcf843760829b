"""Is every element of every Hugging Face tensor held exactly once? Checked on the pieces and modules of all ranks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from opd_megatron.config import ParallelConfig
from opd_megatron.errors import WeightsError
from opd_megatron.planning.published import Shapes
from opd_megatron.weights.families import TPSharding
from opd_megatron.weights.layout import ShardLayout
from opd_megatron.weights.sharding import ShardingTable, ShardSlice, StageParameter, sharding_table, stage_parameters

Box = tuple[tuple[int, int], ...]
"""Start and stop in every dimension."""
Held = dict[tuple[str, bool], dict[tuple[int, int], list[Box]]]
"""(tensor, whether it is the copy of a tied embedding) -> (expert-, tensor-parallel rank) -> what it holds."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """The outcome of checking one model."""

    tensors: int
    elements: int
    shards: int
    """Distinct ranks whose modules were built."""
    index: str | None
    """Where the names it was compared with come from; None where only the config is known."""


def check_coverage(
    hf_config: PretrainedConfig,
    shards: Iterable[tuple[nn.Module, ShardLayout]],
    known: tuple[Shapes, str] | None = None,
) -> Coverage:
    """Checks table, pieces and modules of all ranks against each other and against the real checkpoint.

    Raises:
        WeightsError: a module's parameter has no place in the table or another shape; a tensor of the checkpoint has no
            place, has another shape or is missing; an element lies in no rank's shard, or in two.
    """
    table: ShardingTable | None = None
    held: Held = defaultdict(lambda: defaultdict(list))
    count = 0
    for module, layout in shards:
        table = sharding_table(hf_config, layout)
        if count == 0:
            _compare_names(table, known)
        for param, tensor in stage_parameters(module, table, layout):
            pieces = table.pieces(param, layout, layout.tp_rank)
            _check_shard(param, pieces, tuple(tensor.shape), layout)
            for piece in pieces:
                place, box = _place(param, layout), _box(piece, param)
                boxes = held[piece.name, param.tied_copy][place]
                if not (layout.whole_experts and box in boxes):  # another rank has the same
                    boxes.append(box)
        count += 1
    assert table is not None, "a grid has ranks"
    tensors = table.tensors()
    experts = layout.ep_size if any(param.expert_rank is not None for param in table.params) else 1
    _check_all_held(table, held, 1 if layout.whole_experts else experts, layout.tp_size, whole=layout.whole_experts)
    return Coverage(len(tensors), sum(map(math.prod, tensors.values())), count, known and known[1])


def _compare_names(table: ShardingTable, known: tuple[Shapes, str] | None) -> None:
    """Requires the same names on both sides, and the same shapes where they are known."""
    if known is None:
        return
    (theirs, where), ours = known, table.tensors()
    extra = [name for name in theirs if name not in ours and not _derived(name, table)]
    if extra:
        raise WeightsError(f"{len(extra)} tensors of {where} (first {extra[0]!r}) have no place in the model")
    absent = [name for name in ours if name not in theirs]
    if absent:
        raise WeightsError(f"{where} lacks {len(absent)} tensors that the model needs (first {absent[0]!r})")
    for name, shape in ours.items():
        if theirs[name] not in (None, shape):
            raise WeightsError(f"tensor {name!r} has shape {list(theirs[name] or ())} in {where}, {list(shape)} here")


def _derived(name: str, table: ShardingTable) -> bool:
    """Tells whether a tensor is stored by some checkpoints although it follows from others."""
    return name.endswith("rotary_emb.inv_freq") or (table.tied and name == "lm_head.weight")


def _check_shard(param: StageParameter, pieces: list[ShardSlice], shape: tuple[int, ...], layout: ShardLayout) -> None:
    """Requires that the pieces fill the shard's rows once; only rows past the vocabulary stay empty."""
    filled = torch.zeros(shape[0], dtype=torch.int32)
    for piece in pieces:
        piece.of_shard(filled).add_(1)
    rows = int((filled == 1).sum())
    padding = 0
    if param.shard is TPSharding.VOCAB:
        ((vocab, *_),) = param.hf_tensors.values()
        padding = max(0, (layout.tp_rank + 1) * shape[0] - max(vocab, layout.tp_rank * shape[0]))
    if bool((filled > 1).any()) or rows != shape[0] - padding:
        raise WeightsError(
            f"parameter {param.megatron[0]!r} of stage {layout.pp_rank}, tensor-parallel rank {layout.tp_rank}: "
            f"{rows} of {shape[0] - padding} rows are filled exactly once from {list(param.hf_tensors)}"
        )


def _box(piece: ShardSlice, param: StageParameter) -> Box:
    """Computes which part of the Hugging Face tensor a piece is."""
    shape = param.hf_tensors[piece.name]
    cuts = [part.indices(size)[:2] for part, size in zip(piece.slices(), shape, strict=False)]
    box = (*cuts, *((0, size) for size in shape[len(cuts) :]))
    rows = box[0][1] - box[0][0]
    if rows != piece.blocks * piece.width:
        raise WeightsError(
            f"tensor {piece.name!r}: a slice of {rows} rows does not fill {piece.blocks} blocks of {piece.width}"
        )
    return box


def _place(param: StageParameter, layout: ShardLayout) -> tuple[int, int]:
    """Expert- and tensor-parallel rank that a piece counts for; whole experts have the former alone, all else the
    latter."""
    if not layout.whole_experts:
        return layout.ep_rank, layout.tp_rank
    return (0, layout.tp_rank) if param.expert_rank is None else (param.expert_rank, 0)


def _check_all_held(table: ShardingTable, held: Held, experts: int, tp_size: int, *, whole: bool) -> None:
    """Requires that every expert-parallel rank's tensor-parallel ranks together hold the whole of its tensors."""
    for param in table.params:
        for name, shape in param.hf_tensors.items():
            parts = held.pop((name, param.tied_copy), {})
            owners = range(experts) if param.expert_rank is None else [param.expert_rank]
            strangers = {expert for expert, _ in parts} - set(owners)
            if strangers:
                raise WeightsError(f"tensor {name!r} is also held by expert-parallel ranks {sorted(strangers)}")
            for expert in owners:
                ranks = range(1 if whole and param.expert_rank is not None else tp_size)
                by_rank = [parts.get((expert, tp_rank), []) for tp_rank in ranks]
                copies = (
                    by_rank if param.shard is TPSharding.REPLICATED else [[box for boxes in by_rank for box in boxes]]
                )
                for boxes in copies:
                    _check_tiles(name, shape, boxes)
    assert not held, f"pieces of tensors that no parameter names: {sorted(held)[:3]}"


def _check_tiles(name: str, shape: tuple[int, ...], boxes: list[Box]) -> None:
    """Requires that the boxes tile the tensor: inside it, disjoint, and of its volume together."""
    inside = all(0 <= start < stop <= size for box in boxes for (start, stop), size in zip(box, shape, strict=True))
    ordered = sorted(boxes)
    apart = all(not _meet(a, b) for i, a in enumerate(ordered) for b in ordered[i + 1 :])
    volume = sum(math.prod(stop - start for start, stop in box) for box in boxes)
    if not inside or not apart or volume != math.prod(shape):
        raise WeightsError(
            f"tensor {name!r} of shape {list(shape)} is not held exactly once: {len(boxes)} pieces hold {volume} of "
            f"{math.prod(shape)} elements{'' if apart else ', some of them twice'}"
        )


def _meet(a: Box, b: Box) -> bool:
    return all(max(p[0], q[0]) < min(p[1], q[1]) for p, q in zip(a, b, strict=True))


def build_and_check(
    hf_config: PretrainedConfig,
    parallel: ParallelConfig,
    data: int,
    padded_vocab: int,
    known: tuple[Shapes, str] | None,
) -> Coverage:
    """Runs `check_coverage` over every distinct rank of a layout."""
    from opd_megatron.mcore.meta_shards import distinct_shards

    return check_coverage(hf_config, distinct_shards(hf_config, parallel, data, padded_vocab), known)
