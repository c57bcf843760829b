"""One optimizer step of a tiny pair in any layout, packed or padded, and what must agree between two of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.data.batching import MicroBatchBuilder
from opd_megatron.mcore.checkpoint import CheckpointSaver, load_checkpoint
from opd_megatron.mcore.cpu.platform import device, init_distributed
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.student import Student
from opd_megatron.run.checks import check_run
from opd_megatron.teacher import ask_teachers, build_teachers
from opd_megatron.weight_sync.gathered import gather_student
from tests.data.test_packing import rollouts_of
from tests.mcore.test_student import _config

LENGTHS = [3, 30, 7, 1, 12, 5, 22, 2, 9, 4, 16, 6]
CLOSE = {"rel": 1e-5, "abs": 1e-7}


class Run:
    """A student and its teacher on this rank."""

    def __init__(self, pair: tuple[Path, Path], layout: dict[str, Any], tokens: int | None, **objective: Any) -> None:
        """`layout`: keys of `parallel:`. `tokens`: of a pack; None pads."""
        init_distributed()
        settings = {"data": 1} | layout
        self.config = _config(
            pair, "unused", **{f"parallel.{key}": value for key, value in settings.items()},
            # AdamW makes much of the rounding of a gradient that is nearly 0.
            **{"optimizer.eps": 1e-2, **objective},
        )  # fmt: skip
        self.models, parallel = check_run(self.config), self.config.parallel
        self.grid = grid = ParallelGrid.build(
            parallel.tensor, parallel.pipeline, settings["data"], ep_size=parallel.expert, cp_size=parallel.context,
            whole_experts=parallel.whole_experts, sequence_parallel=parallel.sequence_parallel,
        )  # fmt: skip
        padded = self.models.padded_vocab(grid.tp_size)
        self.student = Student(self.config, self.models.student, self.models.student_config, grid, padded)
        self.teachers = build_teachers(self.config, self.models, grid)
        self.builder = MicroBatchBuilder(
            grid.dp_rank, grid.dp_size, 3, grid.pp_size > 1,
            grid.tp_size * grid.cp_size if grid.sequence_parallel else 1, device(), tokens=tokens,
            in_step=parallel.expert > 1, context_rank=grid.cp_rank, context_size=grid.cp_size,
            sequence_multiple_of=2 * grid.cp_size if grid.cp_size > 1 else 1,
            count_multiple_of=grid.pp_size if parallel.virtual_stages > 1 else 1,
        )  # fmt: skip

    def step(self, lengths: list[int], seed: int = 0) -> Any:
        """(micro batches, (metrics and gradient norm, tokens))."""
        step = self.builder.build(rollouts_of(lengths, seed=seed))
        step.score([0.3 * (i % 5) - 0.5 for i in range(len(lengths))])
        asked = ask_teachers(self.teachers, step)
        result = self.student.update(step, asked, self.config.objective, self.models.vocab_size)
        return len(step), (result.metrics | {"grad_norm": result.grad_norm}, result.tokens)

    def evaluated(self, lengths: list[int]) -> dict[str, float]:
        shown = self.builder.build_any_number(rollouts_of(lengths, seed=3))
        asked = ask_teachers(self.teachers, shown)
        return self.student.evaluate(shown, asked, self.config.objective, self.models.vocab_size)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for bucket in gather_student(self.student) for name, tensor in bucket}


def one_step(
    rank: int, world: int, pair: tuple[Path, Path], layout: dict[str, Any], tokens: int | None, lengths: list[int],
    objective: dict[str, Any],
) -> Any:  # fmt: skip
    """Micro batches, metrics, tokens and gradient norm of a step, metrics after it, and weights."""
    run = Run(pair, layout, tokens, **objective)
    count, found = run.step(lengths)
    weights = run.weights()
    return count, found, run.evaluated(lengths[:5]), weights


def save_after_a_step(rank: int, world: int, pair: tuple[Path, Path], layout: dict[str, Any], folder: Path) -> Any:
    """Saves after a step; returns what the next one gives."""
    run = Run(pair, layout, 64)
    run.step(LENGTHS)
    saver = CheckpointSaver(folder, keep=2, asynchronous=False)
    saver.save(1, run.student, {"policy_version": 1})
    saver.finish()
    return run.step(LENGTHS, seed=5)[1]


def go_on(rank: int, world: int, pair: tuple[Path, Path], layout: dict[str, Any], path: Path) -> Any:
    """The step after a checkpoint."""
    run = Run(pair, layout, 64)
    load_checkpoint(path, run.student)
    return run.step(LENGTHS, seed=5)[1]


def ranks_of(layout: dict[str, Any]) -> int:
    return math.prod(layout.get(key, 1) for key in ("tensor", "pipeline", "data", "context"))


def agree(found: Any, expected: Any) -> None:
    """Requires that two results of `one_step` are the same but for rounding."""
    (_, (metrics, tokens), evaluated, weights), (_, (theirs, their_tokens), their_evaluated, their_weights) = (
        found, expected,
    )  # fmt: skip
    assert tokens == their_tokens
    assert metrics == pytest.approx(theirs, **CLOSE)
    for name, value in their_evaluated.items():
        assert evaluated[name] == pytest.approx(value, **CLOSE), name
    for name, tensor in their_weights.items():
        assert torch.allclose(weights[name], tensor, rtol=1e-4, atol=1e-6), name
