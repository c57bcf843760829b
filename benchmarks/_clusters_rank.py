"""One rank of `clusters.py`: `FOLDER MODEL TENSOR DATA`, under the variables of a launcher; writes FOLDER/rank-N.json.

It also runs with an earlier checkout on the path, so it says itself where Megatron cuts the buckets.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _memory_rank import forget_peak, resident

BUCKET = 2_000_000
"""Parameters, where a GPU has 40 million: many buckets of a small model too, each cut over all ranks."""


class Reads:
    """Counts what is read with `os.preadv`, as weights are."""

    def __init__(self) -> None:
        self.nbytes, self._real = 0, os.preadv
        os.preadv = self._counting

    def _counting(self, *arguments: Any) -> int:
        count = self._real(*arguments)
        self.nbytes += count
        return count


def main() -> None:
    folder, model, tensor, data = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    rank = int(os.environ["RANK"])
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=tensor * data)
    reads = Reads()
    student = _student(model, tensor, data)
    found: dict[str, Any] = {"read at the start": reads.nbytes}
    from opd_megatron.mcore.checkpoint import CheckpointSaver, checkpoint_path, load_checkpoint

    student.make_optimizer_state()
    CheckpointSaver(folder / "warm").save(1, student, {})  # whatever is imported or made once
    found["made to save"], found["written"] = _blocks(student)
    settled()
    before = resident("VmRSS")
    forget_peak()
    CheckpointSaver(folder / "checkpoints").save(1, student, {})
    found["peak of a save"] = resident("VmHWM") - before
    settled()
    before = resident("VmRSS")
    forget_peak()
    load_checkpoint(checkpoint_path(folder / "checkpoints", 1), student)
    found["peak of a load"] = resident("VmHWM") - before
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _student(model: str, tensor: int, data: int) -> Any:
    from megatron.core.distributed import DistributedDataParallelConfig

    from opd_megatron.config import load_config
    from opd_megatron.mcore import optimizer
    from opd_megatron.mcore.cpu.platform import init_distributed
    from opd_megatron.mcore.grid import ParallelGrid
    from opd_megatron.mcore.student import Student
    from opd_megatron.run.checks import check_run

    def overlapped(**settings: Any) -> DistributedDataParallelConfig:
        return DistributedDataParallelConfig(**settings | {"overlap_grad_reduce": True, "bucket_size": BUCKET})

    optimizer.DistributedDataParallelConfig = overlapped  # type: ignore[misc, assignment]
    init_distributed()
    values = {
        "student.path": model, "teachers.0.path": model, "student.dtype": "bf16", "parallel.tensor": tensor,
        "parallel.data": data, "data.source": "unused", "rollout.prompts_per_step": data,
    }  # fmt: skip
    config = load_config(None, [f"{key}={value}" for key, value in values.items()])
    models = check_run(config)
    grid = ParallelGrid.build(tensor, 1, data)
    return Student(config, models.student, models.student_config, grid, models.padded_vocab(tensor))


def _blocks(student: Any) -> tuple[int, int]:
    """Bytes of tensors that saving makes beside those that training holds, and of all that this rank writes."""
    import torch
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from opd_megatron.mcore.checkpoint.state import state_to_save

    held = {
        each.untyped_storage().data_ptr()
        for each in gc.get_objects()
        if isinstance(each, torch.Tensor) and each.device.type == "cpu" and each.layout is torch.strided
    }
    state = state_to_save(student)
    apply_factories(state)
    blocks = [each for each in nested_values(state) if isinstance(each, ShardedTensor)]
    mine = [block for block in blocks if all(number == 0 for number in _replica(block))]
    made = {
        block.data.untyped_storage().data_ptr(): block.data.untyped_storage().nbytes()
        for block in blocks
        if block.data.untyped_storage().data_ptr() not in held
    }
    return sum(made.values()), sum(block.data.nbytes for block in mine)


def _replica(block: Any) -> Iterator[int]:
    """Which copy of the same values it is: the first is written."""
    number = block.replica_id
    yield from number if isinstance(number, tuple) else (number,)


def settled() -> None:
    import torch.distributed as dist

    from opd_megatron.mcore.cpu.platform import release_memory

    gc.collect()
    release_memory()
    dist.barrier()


if __name__ == "__main__":
    main()
