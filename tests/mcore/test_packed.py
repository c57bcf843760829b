"""Packed micro batches mean what padded ones mean, in every family and layout, also where a rank has no tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.data.batching import MicroBatchBuilder
from opd_megatron.mcore.cpu.platform import device, init_distributed
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.student import Student
from opd_megatron.run.checks import check_run
from opd_megatron.teacher import ask_teachers, build_teachers
from opd_megatron.weight_sync.gathered import gather_student
from tests.data.test_packing import rollouts_of
from tests.mcore.test_student import _config
from tests.ranks import run_ranks
from tests.tiny_models import save_tiny

LENGTHS = [3, 30, 7, 1, 12, 5, 22, 2, 9, 4, 16, 6]
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {}, "TP2": {"tensor": 2}, "SP2": {"tensor": 2, "sequence_parallel": True}, "PP2": {"pipeline": 2},
    "DP2": {"data": 2}, "EP2": {"data": 2, "expert": 2}, "TP2 PP2": {"tensor": 2, "pipeline": 2},
    "SP2 DP2": {"tensor": 2, "sequence_parallel": True, "data": 2}, "PP2 DP2": {"pipeline": 2, "data": 2},
    "PP2 EP2": {"pipeline": 2, "data": 2, "expert": 2}, "SP2 EP2": {
        "tensor": 2, "sequence_parallel": True, "data": 2, "expert": 2,
    },
}  # fmt: skip
CLOSE = {"rel": 1e-5, "abs": 1e-7}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    families = ("llama", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe")
    made = {family: save_tiny(root / family, family, seed=1, num_hidden_layers=2) for family in families}
    return made | {"teacher": save_tiny(root / "teacher", seed=2, num_hidden_layers=2)}


def _step(
    rank: int, world: int, pair: tuple[Path, Path], layout: dict[str, Any], tokens: int | None, lengths: list[int],
    objective: dict[str, Any],
) -> Any:  # fmt: skip
    """Metrics, tokens and gradient norm of a step, and weights after it."""
    init_distributed()
    settings = {"data": 1} | layout
    config = _config(
        pair, "unused", **{f"parallel.{key}": value for key, value in settings.items()},
        # AdamW makes much of the rounding of a gradient that is nearly 0.
        **{"optimizer.eps": 1e-2, **objective},
    )  # fmt: skip
    models, parallel = check_run(config), config.parallel
    grid = ParallelGrid.build(
        parallel.tensor, parallel.pipeline, settings["data"], ep_size=parallel.expert,
        sequence_parallel=parallel.sequence_parallel,
    )  # fmt: skip
    padded = models.padded_vocab(grid.tp_size)
    student = Student(config, models.student, models.student_config, grid, padded)
    teachers = build_teachers(config, models, grid)
    builder = MicroBatchBuilder(
        grid.dp_rank, grid.dp_size, 3, grid.pp_size > 1, grid.tp_size if grid.sequence_parallel else 1, device(),
        tokens=tokens, in_step=parallel.expert > 1,
    )  # fmt: skip
    step = builder.build(rollouts_of(lengths))
    step.score([0.3 * (i % 5) - 0.5 for i in range(len(lengths))])
    result = student.update(step, ask_teachers(teachers, step), config.objective, models.vocab_size)
    weights = {name: tensor.clone() for bucket in gather_student(student) for name, tensor in bucket}
    shown = builder.build_any_number(rollouts_of(lengths[:5], seed=3))
    evaluated = student.evaluate(shown, ask_teachers(teachers, shown), config.objective, models.vocab_size)
    return len(step), (result.metrics | {"grad_norm": result.grad_norm}, result.tokens), evaluated, weights


def _ranks(layout: dict[str, Any]) -> int:
    return layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("data", 1)


def _agree(found: Any, expected: Any) -> None:
    (_, (metrics, tokens), evaluated, weights), (_, (theirs, their_tokens), their_evaluated, their_weights) = (
        found, expected,
    )  # fmt: skip
    assert tokens == their_tokens
    assert metrics == pytest.approx(theirs, **CLOSE)
    for name, value in their_evaluated.items():
        assert evaluated[name] == pytest.approx(value, **CLOSE), name
    for name, tensor in their_weights.items():
        assert torch.allclose(weights[name], tensor, rtol=1e-4, atol=1e-6), name


def _compare(
    models: dict[str, Path], family: str, layout: str, tokens: int = 64, lengths: list[int] = LENGTHS, **objective: Any
) -> list[Any]:
    pair = models[family], models["teacher"]
    expected = run_ranks(1, _step, pair, {}, None, lengths, objective)[0]
    found = run_ranks(_ranks(LAYOUTS[layout]), _step, pair, LAYOUTS[layout], tokens, lengths, objective)
    assert len({count for count, *_ in found}) == 1, "every rank has equally many micro batches"
    _agree(found[0], expected)
    return found


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen2_moe", "qwen3_moe"])
def test_packed_equals_padded_for_every_family(models: dict[str, Path], family: str) -> None:
    _compare(models, family, "one")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "EP" not in name])
def test_packed_equals_padded_in_every_layout(models: dict[str, Path], layout: str) -> None:
    _compare(models, "llama", layout)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "EP" in name])
def test_packed_experts_equal_padded_ones(models: dict[str, Path], layout: str) -> None:
    _compare(models, "qwen3_moe", layout)


@pytest.mark.parametrize("layout", ["DP2", "SP2 DP2", "PP2 DP2"])
def test_a_rank_with_fewer_sequences_than_micro_batches_runs_empty_ones(models: dict[str, Path], layout: str) -> None:
    found = _compare(models, "llama", layout, tokens=40, lengths=[36, 10, 11, 12, 13, 14, 15, 16, 9])
    assert found[0][0] > 1


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_ratios_of_sequences_are_those_of_their_own_tokens(models: dict[str, Path], ratio_level: str) -> None:
    objective = {"objective.type": "on_policy_distill", "objective.ratio_level": ratio_level}
    _compare(models, "llama", "one", **objective)


def test_recompute_sees_the_same_packs(models: dict[str, Path]) -> None:
    _compare(models, "llama", "PP2", **{"student.recompute": "true"})
