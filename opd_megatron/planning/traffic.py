"""Bytes that a rank sends in a step, by what for. Rings: an all-reduce of X bytes over n ranks sends 2 (n-1)/n X."""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.planning.memory import weights_bytes
from opd_megatron.planning.sizes import WIDTH, LayerSizes, RunSizes


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes a step of the rank that sends most."""

    tensor: float
    """All-reduces of hidden states (or their halves under sequence parallelism), student and teachers."""
    pipeline: float
    """Hidden states to the next stage and their gradients back."""
    expert: float
    """Tokens to the experts that other ranks hold, and back."""
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
    for hf_config, width in sizes.teachers:
        inside += 2 * hf_config.num_hidden_layers * hf_config.hidden_size * width
        between += hf_config.hidden_size * width
    tokens = sizes.tokens * sizes.micro_batches
    rollout = WIDTH[sizes.config.rollout.dtype or sizes.config.student.dtype]
    shards = [sizes.stage(student, stage) for stage in range(sizes.pipeline)]
    copies = sizes.data // sizes.expert  # of an expert
    synchronised = max(
        _ring(sizes.data) * (shard.parameters - shard.experts) + _ring(copies) * shard.experts for shard in shards
    )
    return Traffic(
        tensor=2 * _ring(sizes.tensor) * inside / sizes.pipeline * tokens,
        pipeline=between * tokens / sizes.sequence_shards if sizes.pipeline > 1 else 0.0,
        expert=_ring(sizes.expert) * _to_experts(sizes) * tokens,
        data=synchronised * (4 + sizes.width),
        teacher_states=0.0,
        weight_push=weights_bytes(student, rollout),
    )


def _to_experts(sizes: RunSizes) -> float:
    """Bytes that a token sends and gets back on a rank's layers: forward and backward, and once more to recompute."""
    hf_config, passes = sizes.models.student_config, 3 if sizes.config.student.recompute else 2
    bytes_ = (
        passes * 2 * LayerSizes.of(hf_config).routed * hf_config.hidden_size * hf_config.num_hidden_layers * sizes.width
    )
    for teacher, width in sizes.teachers:
        bytes_ += 2 * LayerSizes.of(teacher).routed * teacher.hidden_size * teacher.num_hidden_layers * width
    return bytes_ / sizes.pipeline / sizes.tensor


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks
