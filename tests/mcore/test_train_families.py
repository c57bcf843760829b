"""Training steps of families whose parameters the Llama pair does not have: head norms, routers, experts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.mcore.test_student import LR, _reference, _reverse_kl, _train
from tests.ranks import run_ranks
from tests.tiny_models import save_tiny

Layout = tuple[int, int, int, bool, int]
CASES: list[tuple[str, Layout]] = [
    # tensor, pipeline, data, sequence parallel, expert
    ("qwen3", (2, 1, 1, False, 1)),
    ("qwen3", (2, 1, 1, True, 1)),
    ("qwen2_moe", (1, 1, 1, False, 1)),
    ("qwen2_moe", (2, 1, 1, True, 1)),
    ("qwen2_moe", (1, 1, 2, False, 2)),
    ("qwen2_moe", (2, 1, 2, True, 2)),
    ("qwen3_moe", (1, 2, 2, False, 2)),
    ("qwen3_moe", (1, 1, 4, False, 2)),
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """(student of the family, a Qwen3-MoE teacher): at expert parallel 2 the dense student's teacher is split too."""
    root = tmp_path_factory.mktemp("families")
    teacher = save_tiny(root / "teacher", "qwen3_moe", seed=2, vocab_size=256, num_hidden_layers=2)

    @functools.cache
    def pair(family: str) -> tuple[Path, Path]:
        student = save_tiny(root / family, family, seed=1, vocab_size=250, num_hidden_layers=2)
        return student, teacher

    return pair


@pytest.fixture(scope="module")
def references(pairs: Callable[[str], tuple[Path, Path]]) -> Callable[[str], Any]:
    return functools.cache(lambda family: _reference(pairs(family), _reverse_kl))


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_training_equals_dense_float64_reference(
    pairs: Callable[[str], tuple[Path, Path]], references: Callable[[str], Any], family: str, layout: Layout
) -> None:
    curve, expected = references(family)
    *sizes, expert = layout
    overrides = {"objective.type": "reverse_kl", "parallel.expert": expert}
    ranks = run_ranks(layout[0] * layout[1] * layout[2], _train, pairs(family), tuple(sizes), overrides)
    for steps, _ in ranks:
        for (metrics, _, grad_norm, _), (known, norm) in zip(steps, curve, strict=True):
            assert metrics["loss"] == pytest.approx(known["loss"], rel=1e-5)
            assert grad_norm == pytest.approx(norm, rel=1e-4)
    weights = ranks[0][1]
    assert sum(tensor.numel() for tensor in weights.values()) == sum(tensor.numel() for tensor in expected.values())
    for name, tensor in weights.items():
        difference = (tensor.double() - _of(expected, name)).abs()
        assert difference.mean() < 1e-3 * LR, name


def _of(parameters: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """transformers holds the experts of a layer in one tensor and writes them apart."""
    if ".experts." not in name:
        return parameters[name]
    layer, _, rest = name.partition(".experts.")
    expert, kind, _ = rest.split(".")
    if kind == "down_proj":
        return parameters[f"{layer}.experts.down_proj"][int(expert)]
    gate, up = parameters[f"{layer}.experts.gate_up_proj"][int(expert)].chunk(2)
    return gate if kind == "gate_proj" else up
