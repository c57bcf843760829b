"""Every data-parallel rank writes and reads its own share of a checkpoint, wherever the optimizer cuts parameters."""

from __future__ import annotations

import errno
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from opd_megatron.errors import CheckpointError
from opd_megatron.mcore.checkpoint import (
    CheckpointSaver,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    state,
    streaming_reader,
)
from opd_megatron.mcore.checkpoint.rows import Spans
from opd_megatron.mcore.checkpoint.writer import ShardWriter
from tests.mcore.test_checkpoint import _resumed_equals_uninterrupted, _Run
from tests.mcore.test_student import _batches
from tests.ranks import run_ranks
from tests.tiny_models import save_tiny

OVERLAPPED = {"parallel.overlap_grad_reduce": True, "parallel.bucket_size": 6000}
"""As on a GPU: small buckets, each cut over all data-parallel ranks, so that most parameters straddle ranks."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    return save_tiny(root / "student", seed=1, num_hidden_layers=2), save_tiny(root / "teacher", seed=2)


def test_rows_of_all_ranks_are_all_rows_and_seams_hold_what_is_missing() -> None:
    chosen = random.Random(0)
    for _ in range(500):
        shape = torch.Size([chosen.randint(1, 9), *[chosen.randint(1, 5) for _ in range(chosen.randint(0, 2))]])
        cuts = sorted(chosen.choices(range(shape.numel() + 1), k=chosen.randint(0, 5)))
        edges = [0, *cuts, shape.numel()]
        spans = Spans([range(low, high) for low, high in pairwise(edges)], shape)
        ranks = range(len(spans.spans))
        assert [row for rank in ranks for row in spans.owned(rank)] == list(range(shape[0]))
        seams = dict(spans.seams())
        for rank in ranks:
            owned, whole = spans.owned(rank), spans.whole(rank)
            assert list(whole) == [row for row in owned if row not in seams]
            assert all(row * spans.row in spans.spans[rank] for row in owned)
        for row, parts in seams.items():
            assert row in spans.owned(min(parts))
            assert [i for part in parts.values() for i in part] == list(range(row * spans.row, (row + 1) * spans.row))


def _blocks_of_a_rank(
    rank: int, world: int, pair: tuple[Path, Path], layout: tuple[int, ...], dtype: str, folder: Path
) -> Any:
    """Returns bytes written, bytes of blocks in new memory, and the same of what is read; and the fair share."""
    run = _Run(pair, layout, dtype, **OVERLAPPED)
    run.step(_batches(1)[0])
    kept = {tensor.untyped_storage().data_ptr() for tensor in run.student.model.parameters()}
    for part in run.student.optimizer.chained_optimizers:
        for shared in state._shared_parameters(part, state._entries(run.student.model, run.student)):
            kept |= {tensor.untyped_storage().data_ptr() for tensor in shared.state.values()}
    saved = list(state.state_to_save(run.student)["trained"].values())
    CheckpointSaver(folder).save(1, run.student, {})
    asked: list[ShardedTensor] = []
    read = state._read

    def noting(path: Path, blocks: Any) -> None:
        found = list(blocks)
        asked.extend(found)
        read(path, found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "_read", noting)
        load_checkpoint(checkpoint_path(folder, 1), run.student)
    moments = [block for block in asked if block.key.startswith("optimizer.")]
    return [(_bytes(blocks), _bytes(blocks, beside=kept), _widest_row(blocks)) for blocks in (saved, moments)]


def _bytes(blocks: list[ShardedTensor], beside: set[int] | None = None) -> int:
    new = (block.data for block in blocks if beside is None or block.data.untyped_storage().data_ptr() not in beside)
    return sum(data.nbytes for data in new)


def _widest_row(blocks: list[ShardedTensor]) -> int:
    return max(block.data.nbytes // max(block.data.shape[:-1].numel(), 1) for block in blocks)


@pytest.mark.parametrize(("layout", "dtype"), [((1, 1, 2), "bf16"), ((1, 1, 4), "bf16"), ((2, 1, 2), "fp32")], ids=str)
def test_no_rank_writes_or_reads_more_than_its_share_and_makes_more_than_rows_for_it(
    pair: tuple[Path, Path], layout: tuple[int, ...], dtype: str, tmp_path: Path
) -> None:
    ranks = layout[0] * layout[2]
    found = run_ranks(ranks, _blocks_of_a_rank, pair, layout, dtype, tmp_path)
    for written_or_read in (0, 1):
        sizes = [each[written_or_read][0] for each in found]
        fair = sum(sizes) / ranks
        assert max(sizes) <= 1.2 * fair, (sizes, fair)
        for rank, each in enumerate(found):
            _, new, widest = each[written_or_read]
            # A row at either end of a parameter, of three states; of 40 parameters here.
            assert new <= 2 * 3 * 40 * widest, rank
            assert new <= 0.1 * fair, (rank, new, fair)


@pytest.mark.parametrize(
    ("layout", "dtype"), [((1, 1, 2), "bf16"), ((2, 1, 2), "fp32"), ((1, 2, 2), "bf16"), ((1, 1, 4), "fp32")], ids=str
)
def test_training_with_overlapped_buckets_is_resumed_bit_for_bit(
    pair: tuple[Path, Path], layout: tuple[int, ...], dtype: str, tmp_path: Path
) -> None:
    ranks = layout[0] * layout[1] * layout[2]
    assert all(run_ranks(ranks, _resumed_equals_uninterrupted, pair, layout, dtype, tmp_path, OVERLAPPED))


def _saves(rank: int, world: int, pair: tuple[Path, Path], layout: tuple[int, ...], folder: Path) -> Any:
    run = _Run(pair, layout, "bf16", **OVERLAPPED)
    run.step(_batches(1)[0])
    CheckpointSaver(folder).save(1, run.student, {})
    return _state_of(run) if rank == 0 else None


def _loads(rank: int, world: int, pair: tuple[Path, Path], folder: Path) -> Any:
    run = _Run(pair, (1, 1, 1), "bf16")
    load_checkpoint(checkpoint_path(folder, 1), run.student)
    return _state_of(run)


def _state_of(run: _Run) -> dict[str, torch.Tensor]:
    """Moments and main weights of what this rank holds, by parameter."""
    names = {parameter: name for name, parameter in run.student.model.named_parameters()}
    entries = state._entries(run.student.model, run.student)
    return {
        f"{name} of {names[shared.parameter]} from {shared.spans.spans[rank].start}": held.clone()
        for part in run.student.optimizer.chained_optimizers
        for rank in [part.data_parallel_group.rank()]
        for shared in state._shared_parameters(part, entries)
        for name, held in shared.state.items()
    }


def test_one_rank_reads_the_spans_of_four(pair: tuple[Path, Path], tmp_path: Path) -> None:
    saved, *_ = run_ranks(4, _saves, pair, (1, 1, 4), tmp_path)
    (loaded,) = run_ranks(1, _loads, pair, tmp_path)
    compared = 0
    for name, held in saved.items():
        key, start = name.rsplit(" from ", 1)
        whole = loaded[f"{key} from 0"]
        assert torch.equal(whole[int(start) : int(start) + len(held)], held), name
        compared += len(held)
    assert compared > 0.2 * sum(len(whole) for whole in loaded.values())


def _runs_out(rank: int, world: int, pair: tuple[Path, Path], folder: Path) -> str:
    run = _Run(pair, (1, 1, 1), "fp32")
    run.step(_batches(1)[0])
    CheckpointSaver(folder).save(1, run.student, {})

    def no_memory(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 28.00 GiB")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming_reader.StreamingReader, "_read_into", no_memory)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(checkpoint_path(folder, 1), run.student)
    return str(caught.value)


def test_too_little_memory_is_not_called_damage(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (said,) = run_ranks(1, _runs_out, pair, tmp_path)
    assert "memory ran out" in said
    assert "its files are whole" in said
    assert "damaged" not in said
    assert "remove" not in said


def _fails_on_rank_1(
    rank: int, world: int, pair: tuple[Path, Path], folder: Path, asynchronous: bool, method: str, problem: Exception
) -> str:
    run = _Run(pair, (1, 1, 2), "fp32", **OVERLAPPED)
    saver = CheckpointSaver(folder, asynchronous=asynchronous)
    run.step(_batches(1)[0])

    def save(step: int) -> None:
        saver.save(step, run.student, {})
        saver.finish()

    def fail(*arguments: Any) -> None:
        raise problem

    save(1)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(ShardWriter, method, fail)
        with pytest.raises(CheckpointError) as caught:
            save(2)
    save(3)  # when there is room again
    return str(caught.value)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(
    ("method", "problem", "advice"),
    [
        ("_write_file", OSError(errno.ENOSPC, "No space left on device"), "free disk space"),
        ("_write_file", OSError(errno.EIO, "Input/output error"), "choose another output_dir"),
        ("prepare_write_data", MemoryError("Cannot allocate memory"), "checkpoint.async_save=false needs no copy"),
    ],
    ids=["full disk", "broken disk", "no memory"],
)
def test_what_stops_one_rank_from_saving_is_one_line_on_all_and_the_checkpoint_before_stays(
    pair: tuple[Path, Path], tmp_path: Path, asynchronous: bool, method: str, problem: Exception, advice: str
) -> None:
    said = run_ranks(2, _fails_on_rank_1, pair, tmp_path, asynchronous, method, problem, timeout=60)
    assert len(set(said)) == 1
    assert "step_00000002' was not written, earlier ones are intact (rank 1: " in said[0]
    assert advice in said[0]
    assert "\n" not in said[0]
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3]
