"""Teachers: frozen models that give hidden states, never logits."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from opd_megatron.config import RunConfig
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.spec import use_transformer_engine
from opd_megatron.teacher.base import Teacher
from opd_megatron.teacher.colocated import ColocatedTeacher


def build_teachers(
    config: RunConfig, sources: list[tuple[Path, PretrainedConfig]], grid: ParallelGrid, padded_vocab: int
) -> list[Teacher]:
    """One teacher for each entry of `teachers:`, with shares that sum to one."""
    total = sum(teacher.weight for teacher in config.teachers)
    return [
        ColocatedTeacher(
            source,
            hf_config,
            grid,
            padded_vocab=padded_vocab,
            dtype=teacher.dtype,
            weight=teacher.weight / total,
            transformer_engine=use_transformer_engine(config.student.transformer_engine),
        )
        for teacher, (source, hf_config) in zip(config.teachers, sources, strict=True)
    ]
