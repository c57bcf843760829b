"""A checkpoint continues training exactly, is never half there, and is refused with one line when it is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.errors import CheckpointError
from opd_megatron.mcore.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint, save_checkpoint
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.layout import check
from opd_megatron.mcore.platform import init_distributed
from opd_megatron.mcore.student import Student, TeacherView
from opd_megatron.teacher import build_teachers
from opd_megatron.types import Batch
from tests.mcore.test_student import _batches, _config
from tests.ranks import run_ranks
from tests.tiny_models import save_tiny


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    return save_tiny(root / "student", seed=1, num_hidden_layers=2), save_tiny(root / "teacher", seed=2)


class _Run:
    """A student and its teacher, ready to take the step of a given batch."""

    def __init__(self, pair: tuple[Path, Path], layout: tuple[int, ...], dtype: str) -> None:
        init_distributed()
        tensor, pipeline, data, expert = (*layout, 1)[:4]
        self.config = _config(pair, "unused", **{
            "parallel.tensor": tensor, "parallel.pipeline": pipeline, "parallel.data": data, "student.dtype": dtype,
            "parallel.expert": expert,
            "optimizer.decay": "cosine", "optimizer.warmup_steps": 1,
        })  # fmt: skip
        self.models = check(self.config)
        self.grid = ParallelGrid.build(tensor, pipeline, data, expert=expert)
        padded = self.models.padded_vocab(tensor)
        self.student = Student(self.config, self.models.student, self.models.student_config, self.grid, padded)
        (self.teacher,) = build_teachers(self.config, self.models.teachers, self.grid, padded)

    def step(self, batch: Batch) -> float:
        rows = slice(self.grid.dp_rank, None, self.grid.data)
        mine = Batch(batch.tokens[rows], batch.targets[rows], batch.weights[rows]).micro_batches(2)
        views = [TeacherView(self.teacher.hidden_states(mine), self.teacher.head, 1.0)]
        return self.student.update(mine, views, self.config.objective, self.models.vocab_size).lr

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for bucket in self.student.export() for name, tensor in bucket}


def _resumed_equals_uninterrupted(
    rank: int, world: int, pair: tuple[Path, Path], layout: tuple[int, ...], dtype: str, folder: Path
) -> Any:
    first, second, third = _batches(3)
    run = _Run(pair, layout, dtype)
    run.step(first)
    run.step(second)
    torch.manual_seed(100 + rank)
    save_checkpoint(folder, 2, run.student, {"step": 2, "note": "kept"}, keep=2)
    expected_random = torch.rand(3)
    lr = run.step(third)
    uninterrupted = run.weights()

    again = _Run(pair, layout, dtype)
    torch.manual_seed(0)
    state = load_checkpoint(checkpoint_path(folder, 2), again.student)
    assert state == {"step": 2, "note": "kept"}
    assert torch.equal(torch.rand(3), expected_random), "the random state of this rank is part of the checkpoint"
    assert again.step(third) == lr
    resumed = again.weights()
    return all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted.items())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 2, 1), (2, 1, 2)], ids=["one-rank", "tp2-pp2", "tp2-dp2"])
def test_resumed_training_is_bit_identical(
    pair: tuple[Path, Path], layout: tuple[int, int, int], dtype: str, tmp_path: Path
) -> None:
    world = layout[0] * layout[1] * layout[2]
    assert all(run_ranks(world, _resumed_equals_uninterrupted, pair, layout, dtype, tmp_path))
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2]


@pytest.mark.parametrize("layout", [(1, 1, 2, 2), (1, 2, 2, 2), (1, 1, 4, 2)], ids=["ep2", "pp2-ep2", "dp4-ep2"])
def test_resumed_training_of_experts_is_bit_identical(
    pair: tuple[Path, Path], layout: tuple[int, ...], tmp_path: Path
) -> None:
    student = save_tiny(tmp_path / "student", "qwen2_moe", num_hidden_layers=2)
    world = layout[0] * layout[1] * layout[2]
    assert all(
        run_ranks(world, _resumed_equals_uninterrupted, (student, pair[1]), layout, "bf16", tmp_path / "checkpoints")
    )


def _damage(rank: int, world: int, pair: tuple[Path, Path], folder: Path) -> Any:
    run = _Run(pair, (1, 1, 1), "fp32")
    run.step(_batches(1)[0])
    for step in (1, 2, 3):
        save_checkpoint(folder, step, run.student, {"step": step}, keep=2)
    kept = [step for step, _ in list_checkpoints(folder)]

    (folder / ".step_00000004.partial").mkdir()  # what a killed save leaves behind
    (folder / ".step_00000004.partial" / "metadata.json").write_text("{}")
    after_kill = [step for step, _ in list_checkpoints(folder)]
    save_checkpoint(folder, 4, run.student, {"step": 4}, keep=2)
    after_retry = [step for step, _ in list_checkpoints(folder)]

    shard = next(checkpoint_path(folder, 4).glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CheckpointError) as damaged:
        load_checkpoint(checkpoint_path(folder, 4), run.student)

    (folder / ".step_00000005.partial").write_text("a file where the folder must go")
    blocked = folder / "blocked"
    blocked.write_text("not a folder")
    with pytest.raises(CheckpointError) as unwritable:
        save_checkpoint(blocked, 5, run.student, {"step": 5}, keep=2)
    return kept, after_kill, after_retry, str(damaged.value), str(unwritable.value)


def test_old_ones_are_pruned_half_written_ones_ignored_and_damaged_ones_refused(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    ((kept, after_kill, after_retry, damaged, unwritable),) = run_ranks(1, _damage, pair, tmp_path)
    assert kept == [2, 3]
    assert after_kill == [2, 3]
    assert after_retry == [3, 4]
    for message in (damaged, unwritable):
        assert "\n" not in message
    assert "step_00000004" in damaged
    assert "earlier ones are intact" in unwritable
