"""What a checkpoint holds of a student, which rank writes it, and how another layout reads it.

Keys and shapes are those of Megatron's `fully_reshardable` format: every parameter has its full (tensor-parallel
sharded) shape in `optimizer.state.{param,exp_avg,exp_avg_sq}.NAME`. Upstream gathers the whole optimizer state on
every data-parallel rank to get there. Here each data-parallel rank writes the rows of each parameter that its share of
the optimizer begins with (`rows`), of weights and moments alike, and reads the same way: only rows that straddle two
shares travel, and nothing is put together that a rank holds a part of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner, mcore_to_pyt_state_dict
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from opd_megatron.mcore.checkpoint.rng import rng_state, set_rng_state
from opd_megatron.mcore.checkpoint.rows import Entry, Spans, pieces
from opd_megatron.mcore.checkpoint.streaming_reader import StreamingReader
from opd_megatron.mcore.optimizer import MOMENTS, make_optimizer_state, set_update_count
from opd_megatron.mcore.student import Student
from opd_megatron.weights.quantized import dequantized, is_quantized, staging


@dataclass(frozen=True, slots=True)
class _Shared:
    """One parameter of a distributed optimizer, and who holds which part of it."""

    parameter: torch.nn.Parameter
    entry: Entry
    spans: Spans
    state: dict[str, torch.Tensor]
    """Name -> [span] fp32: this rank's part of main weight and moments."""

    @property
    def is_copy(self) -> bool:
        """Whether another tensor-parallel rank or stage writes the same values."""
        return any(self.entry.replica_id[:-1])

    @property
    def main(self) -> tuple[int, ...]:
        return (*self.entry.replica_id[:-1], 0)


def state_to_save(student: Student) -> ShardedStateDict:
    """Collects what this rank writes: sharded tensors, and `common`, which is the same on every rank. Collective."""
    entries = _entries(student.model, student)
    blocks: list[ShardedTensor] = []
    trained: set[torch.Tensor] = set()
    for part in student.optimizer.chained_optimizers:
        group = part.data_parallel_group
        shared = list(_shared_parameters(part, entries))
        trained.update(each.parameter for each in shared)
        ours = [each for each in shared if not each.is_copy]
        seams = _gather_seams(ours, group)
        for each in ours:
            rows = each.spans.owned(group.rank())
            weights = dequantized(each.parameter.detach())[rows.start : rows.stop]
            blocks += pieces(each.entry, "", rows, weights, each.main)
            blocks += _state_blocks(each, group.rank(), seams)
    # Buffers are written as upstream says.
    rest = {f"{n}": entry for n, entry in enumerate(entries.values()) if entry.data not in trained}
    common = {"updates": int(student.scheduler.num_steps), "rng": rng_state(student.grid)}
    blocks += _average_blocks(student, each_its_share=True)
    return {"trained": {f"{n}": block for n, block in enumerate(blocks)}, "rest": rest, "common": common}


def load_state(path: Path, student: Student) -> bool:
    """Fills weights, optimizer, schedule and random states; False when the layout is another one than saved, so that
    random numbers go on from new seeds. Collective.

    Everything is read into its place, a few MiB at a time.
    """
    common = dist_checkpointing.load_common_state_dict(str(path))["common"]
    entries = _entries(student.model, student)
    places = {tensor: staging(tensor.detach()) for tensor in entries}
    _read(path, (block for tensor, entry in entries.items() for block in _in_place(entry, "", places[tensor])))
    make_optimizer_state(student.optimizer)
    _read_optimizer_state(path, student, entries)
    if any(is_quantized(tensor) for tensor in entries):
        # From the main weights, as an update would: what was read is FP8 numbers, rounded once more.
        for part in student.optimizer.chained_optimizers:
            part._copy_main_params_to_model_params()
        for chunk in student.chunks:
            chunk.start_param_sync(force_sync=True)
    if student.averages:
        _read(path, _average_blocks(student))
        for average in student.averages.values():
            average.apply()
    updates = int(common["updates"])
    set_update_count(student.optimizer, updates)
    student.scheduler.num_steps = 0
    student.scheduler.step(increment=updates)
    return set_rng_state(common["rng"], student.grid)


def _state_blocks(
    each: _Shared, rank: int, seams: dict[tuple[torch.Tensor, str, int], torch.Tensor]
) -> Iterator[ShardedTensor]:
    """Yields the rows of main weight and moments that this rank writes."""
    whole = each.spans.whole(rank)
    for name, held in each.state.items():
        prefix = _prefix(name)
        if whole:
            yield from pieces(each.entry, prefix, whole, each.spans.view_whole(rank, held), each.main)
        for row in each.spans.owned(rank)[len(whole) :]:
            yield from pieces(each.entry, prefix, range(row, row + 1), seams[each.parameter, name, row], each.main)


@torch.no_grad()
def _gather_seams(shared: list[_Shared], group: dist.ProcessGroup) -> dict[tuple[torch.Tensor, str, int], torch.Tensor]:
    """Returns the rows, [1, ...], that this rank owns and holds a part of. Every rank walks them in the same order."""
    found: dict[tuple[torch.Tensor, str, int], torch.Tensor] = {}
    messages: list[dist.P2POp] = []
    arriving: list[tuple[torch.Tensor, torch.Tensor]] = []
    rank = group.rank()
    for each in shared:
        for row, parts in each.spans.seams():
            owner, first = min(parts), row * each.spans.row
            if rank not in parts:
                continue
            start = each.spans.spans[rank].start
            for name, held in each.state.items():
                mine = held[parts[rank].start - start : parts[rank].stop - start]
                if rank != owner:
                    messages.append(dist.P2POp(dist.isend, mine.contiguous(), group=group, group_peer=owner))
                    continue
                whole = held.new_empty(each.spans.row)
                found[each.parameter, name, row] = whole.view(1, *each.spans.shape[1:])
                whole[: len(mine)] = mine
                for other in sorted(parts.keys() - {rank}):
                    piece = held.new_empty(len(parts[other]))
                    arriving.append((whole[parts[other].start - first : parts[other].stop - first], piece))
                    messages.append(dist.P2POp(dist.irecv, piece, group=group, group_peer=other))
    for work in dist.batch_isend_irecv(messages) if messages else ():
        work.wait()
    for place, piece in arriving:
        place.copy_(piece)
    return found


@torch.no_grad()
def _read_optimizer_state(path: Path, student: Student, entries: dict[torch.Tensor, Entry]) -> None:
    """Reads this rank's spans: whole rows into their place, the rows at the ends into one of their own first."""
    blocks: list[ShardedTensor] = []
    ends: list[tuple[torch.Tensor, torch.Tensor]] = []
    parts = student.optimizer.chained_optimizers
    held_here = (
        (part.data_parallel_group.rank(), each) for part in parts for each in _shared_parameters(part, entries)
    )
    for rank, each in held_here:
        span, row = each.spans.spans[rank], each.spans.row
        if not span:
            continue
        whole, shape = each.spans.whole(rank), each.spans.shape[1:]
        partial = {span.start // row} if span.start % row else set()
        partial |= {span.stop // row} if span.stop % row else set()
        for name, held in each.state.items():
            if whole:
                blocks += pieces(each.entry, _prefix(name), whole, each.spans.view_whole(rank, held), 0)
            for index in sorted(partial):
                # Rows of padding that the checkpoint lacks are not read: they keep the 0 they start with.
                values = held.new_zeros(1, *shape)
                blocks += pieces(each.entry, _prefix(name), range(index, index + 1), values, 0)
                low, high = max(span.start, index * row), min(span.stop, (index + 1) * row)
                ends.append((held[low - span.start : high - span.start], values.view(-1)[low - index * row :]))
    _read(path, blocks)
    for place, values in ends:
        place.copy_(values[: len(place)])


def _read(path: Path, blocks: Iterable[ShardedTensor]) -> None:
    """Reads blocks into their data. Collective."""
    named: dict[str, list[ShardedTensor]] = {}
    for block in blocks:
        named.setdefault(block.key, []).append(block)
    first = [each[0] for each in named.values()]
    planner = MCoreLoadPlanner(
        shapes_validation_sharded_tensors=[block for block in first if not block.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={block.key: block for block in first if block.allow_shape_mismatch},
    )
    dcp.load(mcore_to_pyt_state_dict(named, is_loading=True), storage_reader=StreamingReader(path), planner=planner)


def _in_place(entry: Entry, prefix: str, data: torch.Tensor) -> Iterator[ShardedTensor]:
    return pieces(entry, prefix, range(len(data)), data, 0)


def _entries(model: Any, student: Student) -> dict[torch.Tensor, Entry]:
    """What Megatron says of each parameter and buffer of a model, by the tensor itself.

    Objects are left out: the extra state of Transformer Engine's layers says nothing that a layer does not know, but
    for scales of FP8's delayed recipe, and a checkpoint must be readable with and without that library.
    """
    state = model.sharded_state_dict(metadata={"dp_cp_group": student.grid.groups.dp_cp})
    tensors, _ = extract_sharded_tensors_and_factories(state)
    found = (entry for entry in nested_values(tensors) if isinstance(entry, ShardedTensor | ShardedTensorFactory))
    return {entry.data: entry for entry in found}


def _average_blocks(student: Student, *, each_its_share: bool = False) -> Iterator[ShardedTensor]:
    """Yields the averages that follow the student, in fp32: `averages.NAME.KEY`; or a data-parallel rank's share."""
    for name, average in student.averages.items():
        entries = _entries(average.model, student)
        for parameter_name, parameter in average.model.named_parameters():
            entry = entries[parameter.data] if parameter.data in entries else entries[parameter]
            values = average.values[parameter_name]
            rows = range(len(values))
            if each_its_share:
                rows = _share(student, parameter, rows)
            main = (*entry.replica_id[:-1], 0)
            yield from pieces(entry, f"averages.{name}.", rows, values[rows.start : rows.stop], main)


def _share(student: Student, parameter: torch.Tensor, rows: range) -> range:
    groups = student.grid.groups
    group = groups.dp_cp if getattr(parameter, "allreduce", True) else groups.expt_dp
    rank, ranks = group.rank(), group.size()
    return range(len(rows) * rank // ranks, len(rows) * (rank + 1) // ranks)


def _prefix(name: str) -> str:
    return f"optimizer.state.{name}."


def _state_names(parameter: torch.Tensor) -> tuple[str, ...]:
    """Names the optimizer states to save. fp32 models have no separate master weights to save."""
    return MOMENTS if parameter.dtype == torch.float32 else ("param", *MOMENTS)


def _shared_parameters(part: DistributedOptimizer, entries: dict[torch.Tensor, Entry]) -> Iterator[_Shared]:
    """Lists every parameter of `part`, in the same order on all its data-parallel ranks."""
    ranks = part.data_parallel_group.size()
    for buffer in part.buffers:
        for parameter, (start, stop, bucket_id) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_id]
            share = bucket.grad_data.numel() // ranks
            spans = []
            for rank in range(ranks):
                first = bucket.offset + rank * share
                low, high = max(first, start), min(first + share, stop)
                spans.append(range(low - start, max(low, high) - start))
            yield _Shared(parameter, entries[parameter], Spans(spans, parameter.shape), _held(part, parameter))


def _held(part: DistributedOptimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """This rank's part of main weight and moments; empty where it holds none."""
    if parameter not in part.model_param_group_index_map:
        return {}
    state = part._get_main_param_and_optimizer_states(parameter)
    return {name: state[name].detach().view(-1) for name in _state_names(parameter)}
