"""A run's own checkpoint, optimizer state and all, is a Megatron checkpoint too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd_megatron.convert.hf_megatron import ParallelSizes, megatron_to_hf
from tests.mcore.test_checkpoint import _Run
from tests.mcore.test_student import _batches
from tests.ranks import run_ranks
from tests.tiny_models import save_tiny


def _train_and_save(
    rank: int, world_size: int, pair: tuple[Path, Path], dtype: str, run: Path
) -> dict[str, torch.Tensor]:
    from opd_megatron.mcore.checkpoint import CheckpointSaver

    trained = _Run(pair, (2, 1, 1), dtype)
    trained.step(_batches(1)[0])
    CheckpointSaver(run / "checkpoints").save(1, trained.student, {"step": 1})
    return trained.weights()


def _export(rank: int, world_size: int, checkpoint: Path, out: Path) -> None:
    megatron_to_hf(checkpoint, out, ParallelSizes())


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_weights_of_a_run_are_exported_in_another_layout_with_the_config_the_run_names(
    tmp_path: Path, dtype: str
) -> None:
    pair = (save_tiny(tmp_path / "student", seed=1), save_tiny(tmp_path / "teacher", seed=2))
    run = tmp_path / "run"
    weights = run_ranks(2, _train_and_save, pair, dtype, run)[0]
    (run / "config.yaml").write_text(f"student:\n  path: {pair[0]}\n")
    run_ranks(1, _export, run / "checkpoints" / "step_00000001", tmp_path / "hf")
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert exported.keys() == weights.keys()
    for name, tensor in weights.items():
        assert exported[name].dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
        assert torch.equal(exported[name], tensor), name
