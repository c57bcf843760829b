"""On one NVIDIA GPU: the step equals the float64 reference, and a whole run with vLLM on the same GPU learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("transformer_engine", ["auto", "off"])
def test_training_on_a_gpu_equals_the_dense_float64_reference(tmp_path: Path, transformer_engine: str) -> None:
    from opd_megatron.mcore.cpu.platform import device, init_distributed
    from opd_megatron.mcore.grid import ParallelGrid
    from opd_megatron.mcore.student import Student
    from opd_megatron.run.checks import check_run
    from opd_megatron.teacher import ask_teachers, build_teachers
    from tests.mcore.test_student import STEPS, _batches, _config, _reference
    from tests.tiny_models import save_tiny

    pair = save_tiny(tmp_path / "student", seed=1, vocab_size=250), save_tiny(tmp_path / "teacher", seed=2)
    curve, _ = _reference(pair, "reverse_kl")
    init_distributed()
    try:
        config = _config(pair, "unused", **{"student.transformer_engine": transformer_engine})
        models, grid = check_run(config), ParallelGrid.build(1, 1, 1)
        student = Student(config, models.student, models.student_config, grid, models.padded_vocab(1))
        (teacher,) = build_teachers(config, models, grid)
        for batch, (loss, _) in zip(_batches(STEPS), curve, strict=True):
            batches = batch.to(device()).micro_batches(2)
            views = ask_teachers([teacher], batches)
            result = student.update(batches, views, config.objective, models.vocab_size)
            # TF32 or Transformer Engine kernels: looser than on a CPU, tight enough for any mistake to show.
            assert result.metrics["loss"] == pytest.approx(loss, rel=5e-3)
    finally:
        torch.distributed.destroy_process_group()


def test_a_run_with_vllm_on_the_same_gpu_learns_and_exports(tmp_path: Path) -> None:
    from opd_megatron.metrics import read_metrics
    from opd_megatron.trainer import OPDTrainer
    from tests.e2e.runs import make_inputs, small_config

    config = small_config(
        make_inputs(tmp_path),
        tmp_path / "run",
        **{"steps": 12, "rollout.engine": "vllm", "rollout.gpu_memory_utilization": 0.2, "student.dtype": "bf16"},
    )
    with OPDTrainer.from_config(config) as trainer:
        trainer.train()
    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["eval/forward_kl"] < rows[0]["eval/forward_kl"]
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()
