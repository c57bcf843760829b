"""Which way the student's weights go to the engine: shard to shard where the two are cut alike, else gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from opd_megatron.config import RunConfig
from opd_megatron.mcore.model import DTYPES
from opd_megatron.mcore.student import Student
from opd_megatron.rollout.base import WeightPayload
from opd_megatron.rollout.vllm_engine import vocab_rows
from opd_megatron.weight_sync.shard_files import ShardFileTransport
from opd_megatron.weight_sync.sharded import same_tp_layout


def weight_stream(
    config: RunConfig, student: Student, world: ProcessGroup | None, on_event: Callable[[str], None]
) -> Callable[[], Iterator[WeightPayload]]:
    """What `RolloutClient` calls for a push. Collective over all ranks, and so is what it returns.

    Args:
        world: gloo group of all ranks; None for a single process.
        on_event: gets a line when the ranks share no files with the engine, so that tensors must be gathered.
    """
    rollout = config.rollout
    if not (rollout.engine == "vllm" and rollout.shard_to_shard and same_tp_layout(student.layout, rollout.tensor)):
        return student.export
    # Tensor parallelism is the fastest axis of the grid: these are the ranks of rank 0's stage and replica.
    senders = dist.new_group(list(range(student.grid.tp_size)), backend="gloo")
    transport: ShardFileTransport | None = None
    reached = [True]
    if dist.get_rank() < student.grid.tp_size:
        transport = ShardFileTransport(senders, DTYPES[rollout.dtype or config.student.dtype])
        reached = [transport.reaches_all()]
    dist.broadcast_object_list(reached, group_src=0, group=world, device=torch.device("cpu"))
    if not reached[0]:
        on_event("the ranks of the first stage share no folder with the engine: weights are gathered for it")
        return student.export
    rows = vocab_rows(student.hf_config.vocab_size, rollout.tensor)

    def shards() -> Iterator[WeightPayload]:
        buckets = student.export_shards(rows)
        yield from transport.ship(buckets) if transport is not None else buckets

    return shards
