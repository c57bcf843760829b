"""Bytes that a rank sends in a step, by what for. Rings: an all-reduce of X bytes over n ranks sends 2 (n-1)/n X."""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.planning.memory import weights_bytes
from opd_megatron.planning.sizes import WIDTH, RunSizes


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes a step of the rank that sends most."""

    tensor: float
    """All-reduces of hidden states (or their halves under sequence parallelism), student and teachers."""
    pipeline: float
    """Hidden states to the next stage and their gradients back."""
    data: float
    """Gradients reduce-scattered in fp32, updated weights gathered."""
    teacher_states: float
    """Between ranks: 0, because a colocated teacher's last stage is the student's."""
    weight_push: float
    """The student's full tensors into the rollout engine, through the first rank."""


def traffic(sizes: RunSizes) -> Traffic:
    """Of a step whose sequences are as long as they may be."""
    student = sizes.models.student_config
    recompute = sizes.config.student.recompute
    # Two all-reduces a layer in each direction; under sequence parallelism the backward pass gathers inputs again.
    passes = 4 + 2 * recompute + (1 if sizes.sequence_shards > 1 else 0)
    row = student.hidden_size * sizes.width
    inside = passes * student.num_hidden_layers * row
    between = 2 * row
    for hf, width in sizes.teachers:
        inside += 2 * hf.num_hidden_layers * hf.hidden_size * width
        between += hf.hidden_size * width
    tokens = sizes.tokens * sizes.micro_batches
    rollout = WIDTH[sizes.config.rollout.dtype or sizes.config.student.dtype]
    parameters = max(sizes.stage(student, stage).parameters for stage in range(sizes.pipeline))
    return Traffic(
        tensor=2 * _ring(sizes.tensor) * inside / sizes.pipeline * tokens,
        pipeline=between * tokens / sizes.sequence_shards if sizes.pipeline > 1 else 0.0,
        data=_ring(sizes.data) * parameters * (4 + sizes.width),
        teacher_states=0.0,
        weight_push=weights_bytes(student, rollout),
    )


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks
