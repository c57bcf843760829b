"""What a checkpoint holds of a student, which rank writes it, and how another layout reads it.

Keys and shapes are those of Megatron's `fully_reshardable` format: every parameter has its full (tensor-parallel
sharded) shape in `optimizer.state.{param,exp_avg,exp_avg_sq}.NAME`. Upstream gathers the whole optimizer state on
every data-parallel rank to get there. Here each parameter is written by the data-parallel rank that holds the
larger part of it, and only the few that straddle two ranks' shares travel, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from opd_megatron.mcore.checkpoint.rng import rng_state, set_rng_state
from opd_megatron.mcore.optimizer import MOMENTS, make_optimizer_state, set_update_count
from opd_megatron.mcore.student import Student

_CheckpointTensor: TypeAlias = ShardedTensor | ShardedTensorFactory


@dataclass(frozen=True, slots=True)
class _OptimizerShard:
    """One parameter of a distributed optimizer and who holds which part of it."""

    parameter: torch.nn.Parameter
    spans: list[range]
    """Elements of the flattened parameter that each data-parallel rank holds; empty for most."""

    @property
    def owner(self) -> int:
        return max(range(len(self.spans)), key=lambda rank: len(self.spans[rank]))


def state_to_save(student: Student) -> ShardedStateDict:
    """Collects what this rank writes: sharded tensors, and `common`, which is the same on every rank. Collective."""
    model = _model_entries(student)
    entries = _by_parameter(model)
    state: ShardedStateDict = {}
    trained: set[torch.Tensor] = set()
    for part in student.optimizer.chained_optimizers:
        group = part.data_parallel_group
        for shared in _shared_parameters(part):
            trained.add(shared.parameter)
            entry = entries[shared.parameter]
            if any(entry.replica_id[:-1]):  # another tensor-parallel rank's or stage's copy of the same values
                continue
            mine = shared.owner == group.rank()
            main = (*entry.replica_id[:-1], 0)
            if mine:
                state[f"{len(state)}"] = replace(entry, replica_id=main)
            for name in _state_names(shared.parameter):
                full = _gather(_local_state(part, shared.parameter, name), shared, group)
                if full is not None:
                    data = full.view(shared.parameter.shape)
                    state[f"{len(state)}"] = _with_data(entry, _state_key(name, entry), data, replica_id=main)
    # Buffers and the extra state of Transformer Engine's layers are written as upstream says.
    rest = {key: entry for key, entry in model.items() if not _is_one_of(entry, trained)}
    common = {"updates": int(student.scheduler.num_steps), "rng": rng_state(student.grid)}
    return {"trained": state, "rest": rest, "averages": _averages(student), "common": common}


def load_state(path: Path, student: Student) -> bool:
    """Fills weights, optimizer, schedule and random states; False when the layout is another one than saved, so that
    random numbers go on from new seeds. Collective.

    The optimizer state comes in three passes, which bounds what is held beside it to a third.
    """
    common = dist_checkpointing.load_common_state_dict(str(path))["common"]
    model = _model_entries(student)
    entries = _by_parameter(model)
    loaded = _load({"model": model}, path)["model"]
    student.model.load_state_dict(loaded, strict=False)  # strictness is the loader's: it names the tensor
    del loaded
    make_optimizer_state(student.optimizer)
    for name in ("param", *MOMENTS):
        if name in _state_names(next(iter(entries))):
            _load_optimizer_state(path, student, entries, name)
    if student.averages:
        _fill_averages(student, _load(_averages(student), path))
    updates = int(common["updates"])
    set_update_count(student.optimizer, updates)
    student.scheduler.num_steps = 0
    student.scheduler.step(increment=updates)
    return set_rng_state(common["rng"], student.grid)


def _load(state: ShardedStateDict, path: Path) -> dict[str, Any]:
    # Ranks ask only for what they need, so that not every shard has a main replica among the requests.
    return dist_checkpointing.load(state, str(path), validate_access_integrity=False)


def _load_optimizer_state(
    path: Path, student: Student, entries: dict[torch.Tensor, _CheckpointTensor], name: str
) -> None:
    wanted: dict[str, ShardedBase] = {}
    places: dict[str, tuple[torch.Tensor, range]] = {}
    for part in student.optimizer.chained_optimizers:
        for shared in _shared_parameters(part):
            span = shared.spans[part.data_parallel_group.rank()]
            if not span:
                continue
            entry, place = entries[shared.parameter], _local_state(part, shared.parameter, name)
            assert place is not None
            whole = len(span) == shared.parameter.numel()
            # Rows of padding that the checkpoint lacks are not read: they keep the 0 they start with.
            data = place if whole else place.new_zeros(shared.parameter.numel())
            index = f"{len(wanted)}"
            wanted[index] = _with_data(entry, _state_key(name, entry), data.view(shared.parameter.shape))
            places[index] = (place, span)
    loaded = _load(wanted, path)
    with torch.no_grad():
        for index, (place, span) in places.items():
            values = loaded.pop(index).reshape(-1)[span.start : span.stop]
            if values.data_ptr() != place.data_ptr():
                place.copy_(values)


def _model_entries(student: Student) -> ShardedStateDict:
    return student.model.sharded_state_dict(metadata={"dp_cp_group": student.grid.groups.dp_cp})


def _averages(student: Student) -> ShardedStateDict:
    """Entries of the averages that follow the student, in fp32: `averages.NAME.KEY`."""
    found: ShardedStateDict = {}
    for name, average in student.averages.items():
        model = average.model.sharded_state_dict(metadata={"dp_cp_group": student.grid.groups.dp_cp})
        entries = _by_parameter(model)
        for parameter_name, parameter in average.model.named_parameters():
            entry = entries[parameter.data] if parameter.data in entries else entries[parameter]
            found[f"{name}/{parameter_name}"] = _with_data(
                entry, f"averages.{name}.{entry.key}", average.values[parameter_name]
            )
    return found


@torch.no_grad()
def _fill_averages(student: Student, loaded: dict[str, Any]) -> None:
    for name, average in student.averages.items():
        for parameter_name, values in average.values.items():
            values.copy_(loaded[f"{name}/{parameter_name}"])
        average.apply()


def _by_parameter(model: ShardedStateDict) -> dict[torch.Tensor, _CheckpointTensor]:
    tensors, _ = extract_sharded_tensors_and_factories(model)
    return {entry.data: entry for entry in nested_values(tensors)}


def _is_one_of(entry: Any, tensors: set[torch.Tensor]) -> bool:
    return isinstance(entry, ShardedTensor | ShardedTensorFactory) and entry.data in tensors


def _with_data(entry: _CheckpointTensor, key: str, data: torch.Tensor, **changes: Any) -> ShardedBase:
    if isinstance(entry, ShardedTensor):
        changes["dtype"] = data.dtype
    return replace(entry, key=key, data=data, **changes)


def _state_key(name: str, entry: _CheckpointTensor) -> str:
    return f"optimizer.state.{name}.{entry.key}"


def _state_names(parameter: torch.Tensor) -> tuple[str, ...]:
    """Names the optimizer states to save. fp32 models have no separate master weights to save."""
    return MOMENTS if parameter.dtype == torch.float32 else ("param", *MOMENTS)


def _shared_parameters(part: DistributedOptimizer) -> Iterator[_OptimizerShard]:
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
            yield _OptimizerShard(parameter, spans)


def _local_state(part: DistributedOptimizer, parameter: torch.nn.Parameter, name: str) -> torch.Tensor | None:
    """Returns [span] fp32: this rank's part of a parameter's main weight or moment; None where it holds none."""
    if parameter not in part.model_param_group_index_map:
        return None
    state = part._get_main_param_and_optimizer_states(parameter)[name]
    return state.detach()


def _gather(mine: torch.Tensor | None, shared: _OptimizerShard, group: dist.ProcessGroup) -> torch.Tensor | None:
    """Gathers the flattened whole on its owner; None elsewhere. Every rank walks the parameters in the same order."""
    span = shared.spans[group.rank()]
    if shared.owner != group.rank():
        if span:
            assert mine is not None
            dist.send(mine.contiguous(), group_dst=shared.owner, group=group)
        return None
    assert mine is not None
    assert len(span) == mine.numel()
    if len(span) == shared.parameter.numel():
        return mine
    # In the host's memory, where it goes anyway: such a parameter is wholly on none of the devices.
    whole = torch.empty(shared.parameter.numel(), dtype=mine.dtype, device="cpu")
    whole[span.start : span.stop] = mine
    for rank, other in enumerate(shared.spans):
        if rank != group.rank() and other:
            piece = mine.new_empty(len(other))
            dist.recv(piece, group_src=rank, group=group)
            whole[other.start : other.stop] = piece
    return whole
