"""Which way the weights go is decided from the configuration, the same on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from opd_megatron.config import load_config
from opd_megatron.weight_sync.format import ShardFiles
from tests.ranks import run_ranks
from tests.tiny_models import save_tiny

VOCAB = 272


def _stream(rank: int, world_size: int, folder: Path, overrides: dict[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    """For each engine worker (or for all together, when gathered) the tensors that rank 0 is given, with shapes."""
    from opd_megatron.mcore.cpu.platform import init_distributed
    from opd_megatron.mcore.grid import ParallelGrid
    from opd_megatron.mcore.student import Student
    from opd_megatron.rollout import weight_format
    from opd_megatron.run.checks import check_run
    from opd_megatron.weight_sync.publisher import WeightPublisher

    init_distributed()
    values = {
        "student.path": folder, "teachers.0.path": folder, "output_dir": "unused", "student.dtype": "fp32",
        "rollout.dtype": "fp32", "data.source": "unused", "data.max_prompt_tokens": 8, "rollout.max_new_tokens": 8,
        **overrides,
    }  # fmt: skip
    config = load_config(None, [f"{key}={value}" for key, value in values.items()])
    models = check_run(config)
    parallel = config.parallel
    grid = ParallelGrid.build(parallel.tensor, parallel.pipeline, models.data_parallel)
    student = Student(config, models.student, models.student_config, grid, models.padded_vocab(parallel.tensor))
    events: list[str] = []
    publisher = WeightPublisher(
        student, weight_format(config, student.hf_config), dist.group.WORLD, bucket_bytes=2**20, on_event=events.append
    )
    assert events == []
    seen: list[dict[str, tuple[int, ...]]] = []
    for payload in publisher.stream():
        if rank > 0:
            continue  # what these get is ignored
        by_shard = isinstance(payload, ShardFiles)
        tensors = [load_file(path).items() for path in payload.paths] if by_shard else [payload]
        seen = seen or [{} for _ in tensors]
        for worker, pairs in zip(seen, tensors, strict=True):
            worker.update((name, tuple(tensor.shape)) for name, tensor in pairs)
    dist.barrier()  # files are this rank's until all have read them
    return seen


@pytest.mark.parametrize("axis", ["pipeline", "data"])
def test_an_engine_cut_like_the_trainer_gets_shards_and_any_other_full_tensors(tmp_path: Path, axis: str) -> None:
    sizes = {"parallel.tensor": 2, f"parallel.{axis}": 2}
    folder = save_tiny(tmp_path, vocab_size=VOCAB)
    full = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    alike = {"rollout.tensor": 2}
    for overrides in ({"rollout.tensor": 1}, alike | {"rollout.shard_to_shard": "false"}):
        gathered, *others = run_ranks(4, _stream, folder, sizes | overrides)
        assert gathered == [full]
        assert not any(others)
    workers, *others = run_ranks(4, _stream, folder, sizes | alike)
    assert not any(others)
    assert [worker.keys() for worker in workers] == [full.keys()] * 2
    halves = [{name: torch.Size(shape).numel() for name, shape in worker.items()} for worker in workers]
    for name, shape in full.items():
        whole = torch.Size(shape).numel()
        if "norm" in name:
            assert [half[name] for half in halves] == [whole, whole]
        else:
            assert sum(half[name] for half in halves) == whole
    # vLLM pads 272 tokens to 320: the first worker has 160 of them.
    assert [worker["model.embed_tokens.weight"][0] for worker in workers] == [160, 112]
