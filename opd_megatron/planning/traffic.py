"""Bytes that a rank sends in a step, by what for. Rings: an all-reduce of X bytes over n ranks sends 2 (n-1)/n X."""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config import decided
from opd_megatron.models.sizes import BYTES_PER_ELEMENT, LayerSizes, RunSizes
from opd_megatron.planning.memory import weights_bytes
from opd_megatron.teacher import teacher_costs


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes a step of the rank that sends most."""

    tensor: float
    """All-reduces of hidden states (or their halves under sequence parallelism), student and teachers."""
    context: float
    """Keys and values gathered over context-parallel ranks in each layer, and their gradients scattered."""
    pipeline: float
    """Hidden states to the next stage and their gradients back."""
    expert: float
    """Tokens to the experts that other ranks hold, and back."""
    data: float
    """Gradients reduce-scattered in fp32, updated weights gathered."""
    teacher_states: float
    """From ranks of a teacher's own, or between the student's where a teacher has another layout there."""
    weight_sync: float
    """The student's full tensors into the rollout engine, through the first rank."""


def traffic(sizes: RunSizes) -> Traffic:
    """Estimates the bytes of a step of answers as long as they are expected to be."""
    student = sizes.models.student_config
    recompute = sizes.config.student.recompute
    # Two all-reduces a layer in each direction; under sequence parallelism the backward pass gathers inputs again.
    passes = 4 + 2 * recompute + (1 if sizes.sequence_shards > 1 else 0)
    row = student.hidden_size * sizes.bytes_per_element
    inside = passes * student.num_hidden_layers * row
    between = 2 * row
    costs = teacher_costs(sizes, stage=0)
    inside += sum(cost.tensor_bytes for cost in costs)
    between += sum(cost.pipeline_bytes for cost in costs)
    # Of a rank: packs are full but for the last.
    tokens = sizes.config.sequences_per_step * sizes.expected_length / sizes.replicas
    layer = LayerSizes.of(student)
    # Forward, once more to recompute, and the gradient back.
    keys = (2 + recompute) * 2 * layer.key / sizes.tp_size * student.num_hidden_layers * sizes.bytes_per_element
    rollout = BYTES_PER_ELEMENT[decided(sizes.config.rollout.dtype)]
    shards = [sizes.stage(student, stage) for stage in range(sizes.pp_size)]
    copies = max(1, round(sizes.expert_copies))
    synchronised = max(
        _ring(sizes.replicas) * (shard.parameters - shard.experts) + _ring(copies) * shard.experts for shard in shards
    )
    return Traffic(
        tensor=2 * _ring(sizes.tp_size) * inside / sizes.pp_size * tokens,
        context=(sizes.cp_size - 1) * keys / sizes.pp_size * tokens,
        pipeline=_virtual(sizes) * between * tokens / sizes.sequence_shards if sizes.pp_size > 1 else 0.0,
        expert=_ring(sizes.ep_size) * _to_experts(sizes) * tokens,
        data=synchronised * (4 + sizes.bytes_per_element),
        teacher_states=sum(cost.states_bytes for cost in costs),
        weight_sync=weights_bytes(student, rollout),
    )


def _virtual(sizes: RunSizes) -> int:
    """How often a token goes round the stages."""
    return sizes.config.parallel.virtual_stages


def _to_experts(sizes: RunSizes) -> float:
    """Estimates the bytes of expert dispatch for a token: forward, backward, and once more to recompute."""
    hf_config, passes = sizes.models.student_config, 3 if sizes.config.student.recompute else 2
    bytes_ = (
        passes
        * 2
        * LayerSizes.of(hf_config).experts_per_token
        * hf_config.hidden_size
        * hf_config.num_hidden_layers
        * sizes.bytes_per_element
    )
    bytes_ += sum(cost.expert_bytes for cost in teacher_costs(sizes, stage=0))
    return bytes_ / sizes.pp_size / sizes.tp_size


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks
