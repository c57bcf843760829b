"""What leaves the GPU while engines sample: memory that is really freed, and a training that does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.config import load_config
from opd_megatron.mcore.cpu.platform import init_distributed
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.optimizer import optimizer_tensors
from opd_megatron.mcore.student import Student
from opd_megatron.run.checks import check_run
from opd_megatron.system.host_memory import HostMemory
from opd_megatron.teacher import ask_teachers, build_teachers
from opd_megatron.types import Batch
from tests.ranks import run_ranks
from tests.tiny_models import save_tiny

STEPS = 3


def _batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(STEPS):
        tokens = torch.randint(0, 250, (4, 16), generator=generator)
        weights = torch.zeros(4, 16)
        weights[:, 4:14] = 1
        batches.append(Batch(tokens, torch.roll(tokens, -1, dims=1), weights))
    return batches


def _bytes(tensors: Any) -> int:
    return sum({storage._cdata: storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}.values())


def _train(rank: int, world: int, folder: Path, dtype: str, tensor: int, offload: bool, early: bool) -> Any:
    """Weights, gradient norms, and bytes (optimizer, gradients, teacher) before, while and after they are away."""
    init_distributed()
    settings = {
        "student.path": folder, "teachers.0.path": folder, "output_dir": "unused", "student.dtype": dtype,
        "teachers.0.dtype": dtype, "parallel.tensor": tensor, "parallel.data": world // tensor, "steps": STEPS,
        "data.max_prompt_tokens": 8, "rollout.max_new_tokens": 8, "optimizer.lr": 3e-3,
    }  # fmt: skip
    if offload:
        settings |= {"student.offload": "[optimizer,gradients]", "teachers.0.offload": "true"}
    config = load_config(None, [f"{key}={value}" for key, value in settings.items()])
    models = check_run(config)
    grid = ParallelGrid.build(tensor, 1, world // tensor)
    student = Student(config, models.student, models.student_config, grid, models.padded_vocab(tensor))
    [teacher] = build_teachers(config, models, grid)
    if early:
        student.make_optimizer_state()
    held, norms = [], []

    def measure() -> None:
        held.append(
            (
                _bytes(optimizer_tensors(student.optimizer, student.model)),
                _bytes(buffer.grad_data for buffer in student._gradient_buffers()),
                _bytes(teacher._model.parameters()),
            )
        )

    for batch in _batches():
        mine = batch.rows(slice(grid.dp_rank, None, grid.dp_size)).micro_batches(1)
        views = ask_teachers([teacher], mine)
        norms.append(student.update(mine, views, config.objective, models.vocab_size).grad_norm)
        measure()
        for _ in range(2):  # a second call has nothing more to do
            student.move_out()
            teacher.move_out()
        measure()
        weights = _bytes(student.model.parameters())
        assert weights > 0, "the engines are given them meanwhile"
        for _ in range(2):
            student.move_back()
            teacher.move_back()
        measure()
    return [parameter.detach().clone() for parameter in student.model.parameters()], norms, held


@pytest.mark.parametrize(("ranks", "tensor"), [(1, 1), (2, 1), (2, 2)], ids=["one", "DP2", "TP2"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_training_does_not_notice_what_was_away(tmp_path: Path, dtype: str, ranks: int, tensor: int) -> None:
    folder = save_tiny(tmp_path, vocab_size=250)
    stayed = run_ranks(ranks, _train, folder, dtype, tensor, False, False)
    left = run_ranks(ranks, _train, folder, dtype, tensor, True, True)
    for (weights, norms, held), (others, their_norms, theirs) in zip(stayed, left, strict=True):
        assert norms == their_norms
        assert all(torch.equal(one, other) for one, other in zip(weights, others, strict=True))
        assert len(set(held)) == 1, "nothing leaves unless it is said"
        before, away, after = theirs[:3]
        assert before == after == held[0]
        assert min(before) > 0
        assert away == (0, 0, 0)
        assert theirs[3:] == theirs[:3] * (STEPS - 1)


def test_moments_made_ahead_are_those_of_the_first_step(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, vocab_size=250)
    [(late, norms, _)] = run_ranks(1, _train, folder, "bf16", 1, False, False)
    [(early, others, _)] = run_ranks(1, _train, folder, "bf16", 1, False, True)
    assert norms == others
    assert all(torch.equal(one, other) for one, other in zip(late, early, strict=True))


def test_views_and_shared_memory_come_back_as_they_were() -> None:
    whole = torch.arange(12.0)
    views = [whole[2:5], whole.view(3, 4)[1]]
    expected = [view.clone() for view in views]
    memory = HostMemory()
    memory.move_out([whole, *views])
    assert whole.untyped_storage().nbytes() == 0
    memory.move_back()
    assert all(torch.equal(view, value) for view, value in zip(views, expected, strict=True))
    views[0].add_(1)
    memory.move_out(views)
    memory.move_back()
    assert whole[2] == 3, "what has changed meanwhile is what goes the next time"
