"""Layers of Transformer Engine, of a stand-in for it: the same steps, and checkpoints that cross it both ways."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.stubs.with_te import run_with_te
from tests.tiny_models import save_tiny

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="the real one is installed"
)
LAYOUTS = {"DP2": "1,1,2", "TP2": "2,1,1", "SP2": "2,1,1,sp", "EP2": "1,1,2,2"}


def cross(student: str, teacher: str, layout: str, folder: str) -> dict[str, Any]:
    """Trains two steps, saves, takes two more: with each kind of layers first, and each kind after."""
    import torch.distributed as dist
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear

    from opd_megatron.mcore.checkpoint import CheckpointSaver, checkpoint_path, load_checkpoint
    from tests.mcore.test_checkpoint import _Run
    from tests.mcore.test_student import _batches

    *sizes, last = layout.split(",")
    sequence_parallel = last == "sp"
    numbers = tuple(int(size) for size in (sizes if sequence_parallel else [*sizes, last]))
    batches = _batches(4)

    def made(kind: str) -> Any:
        settings = {"student.transformer_engine": kind, "parallel.overlap_grad_reduce": True}
        settings |= {"parallel.bucket_size": 6000, "parallel.sequence_parallel": sequence_parallel}
        run = _Run((Path(student), Path(teacher)), numbers, "fp32", **settings)
        fused = [each for each in run.student.model.modules() if isinstance(each, TELayerNormColumnParallelLinear)]
        assert bool(fused) == (kind == "on")
        return run

    losses: dict[str, Any] = {}
    for first in ("on", "off"):
        run, path = made(first), Path(folder) / first
        losses[first] = [run.step(batch).metrics["loss"] for batch in batches[:2]]
        CheckpointSaver(path).save(2, run.student, {})
        losses[first] += [run.step(batch).metrics["loss"] for batch in batches[2:]]
        for then in ("on", "off"):
            again = made(then)
            load_checkpoint(checkpoint_path(path, 2), again.student)
            losses[f"{first} {then}"] = [again.step(batch).metrics["loss"] for batch in batches[2:]]
    dist.destroy_process_group()
    return losses


CASES = [("llama", "DP2"), ("qwen2", "SP2"), ("qwen3_moe", "EP2")]


def cross_all(folder: str) -> list[dict[str, Any]]:
    """All cases in one pair of ranks: importing Megatron takes longer than a case."""
    root = Path(folder)
    return [
        cross(str(root / family), str(root / "teacher"), LAYOUTS[layout], str(root / f"{family} checkpoints"))
        for family, layout in CASES
    ]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    root = tmp_path_factory.mktemp("models")
    save_tiny(root / "teacher", seed=2)
    for family, _ in CASES:
        save_tiny(root / family, family, seed=1, num_hidden_layers=2)
    return dict(zip(CASES, run_with_te(2, f"{__name__}.cross_all", root), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_checkpoints_cross_transformer_engine_both_ways(found: dict[Any, Any], case: tuple[str, str]) -> None:
    losses = found[case]
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-5)
    for first in ("on", "off"):
        assert losses[f"{first} {first}"] == losses[first][2:], "resumed bit for bit"
        for then in ("on", "off"):
            assert losses[f"{first} {then}"] == pytest.approx(losses["off"][2:], rel=1e-5)
