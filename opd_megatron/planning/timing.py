"""Estimates the seconds of a step from a GPU's published specifications; the assumptions are printed too."""

from __future__ import annotations

from opd_megatron.config import decided
from opd_megatron.models.sizes import BYTES_PER_ELEMENT, LayerSizes, RunSizes
from opd_megatron.places import Places, cut_places
from opd_megatron.planning.gpus import GPUS_PER_NODE, Gpu
from opd_megatron.planning.memory import optimizer_share, weights_bytes
from opd_megatron.planning.traffic import Traffic
from opd_megatron.teacher import teacher_costs

_FLOPS_USED, _BANDWIDTH_USED = 0.4, 0.6
_DECODE_FLOOR = 0.005
"""Seconds of a decode step however small the model: launches, scheduling, sampling. A guess, not measured here."""
_FILE_RATE = 1.5e9
"""Bytes a second from the GPU through a file in memory into the engine: pageable copies, one writer."""
_SEQUENCES_AT_ONCE = 256  # of vLLM, by default

ASSUMPTIONS = (
    f"matrix products at {_FLOPS_USED:.0%} of the dense bf16 peak; 2 FLOP a weight and token forward, 4 backward, "
    "2 more with recomputation; causal attention",
    "pipeline bubble (stages - 1) / micro batches; transfers at the links' published rate, none behind arithmetic",
    f"{GPUS_PER_NODE} GPUs a machine: a group that fits into one uses NVLink, any other one network card a GPU",
    f"decoding at {_BANDWIDTH_USED:.0%} of the memory bandwidth, which reads weights and keys and values once a token, "
    f"at least {1000 * _DECODE_FLOOR:g} ms a token, {_SEQUENCES_AT_ONCE} sequences at once in each engine of "
    "rollout.tensor GPUs; answers dealt evenly, every one as long as it may be",
    f"weights to the engines through files in memory at {_FILE_RATE / 1e9:g} GB/s a writing rank, as today",
)


def plan_places(sizes: RunSizes) -> Places:
    """Where a run's engines are on machines of `GPUS_PER_NODE` GPUs."""
    return cut_places(sizes.config, sizes.job_ranks, min(sizes.job_ranks, GPUS_PER_NODE), on_gpu=True)


def step_seconds(sizes: RunSizes, moved: Traffic, gpu: Gpu) -> dict[str, float]:
    """Estimates the seconds of the phases of one step, one after the other."""
    student = sizes.models.student_config
    flops = gpu.bf16_flops * _FLOPS_USED
    bubble = 1 + (sizes.pp_size - 1) / sizes.micro_batches
    passes = 4 if sizes.config.student.recompute else 3
    of_student = passes * sizes.body_flops(student) + 3 * sizes.head_flops(student)
    of_teachers = sum(cost.flops for cost in teacher_costs(sizes, stage=0))
    updated = max(optimizer_share(sizes, sizes.stage(student, index)) for index in range(sizes.pp_size))
    return {
        "rollout": _rollout(sizes, gpu),
        "teacher": of_teachers / sizes.ranks / flops * bubble,
        "student": of_student / sizes.ranks / flops * bubble,
        "tensor collectives": moved.tensor / _link(sizes.tp_size, gpu),
        "pipeline transfers": moved.pipeline / _link(sizes.ranks, gpu),
        "expert transfers": moved.expert / _link(sizes.tp_size * sizes.ep_size, gpu),
        "data collectives": moved.data / _link(sizes.tp_size * sizes.dp_size, gpu),
        # Gradient, main weight and both moments read, three of them and the weight written.
        "optimizer": updated * 30 / (gpu.memory_bandwidth * _BANDWIDTH_USED),
        "weight sync": _weight_sync(sizes, moved, gpu),
    }


def _rollout(sizes: RunSizes, gpu: Gpu) -> float:
    """Estimates prefill, then one pass over weights, keys and values for each new token of all sequences."""
    hf_config, rollout = sizes.models.student_config, sizes.config.rollout
    bytes_per_element = BYTES_PER_ELEMENT[decided(rollout.dtype)]
    engines = len(plan_places(sizes).engines)
    share = -(-sizes.config.sequences_per_step // engines)
    waves = -(-share // _SEQUENCES_AT_ONCE)
    batch = share / waves
    cached = batch * sizes.length * 2 * LayerSizes.of(hf_config).key * hf_config.num_hidden_layers * bytes_per_element
    rate = gpu.memory_bandwidth * _BANDWIDTH_USED * rollout.tensor
    token = max(_DECODE_FLOOR, (weights_bytes(hf_config, bytes_per_element) + cached) / rate)
    prompts = sizes.config.data.max_prompt_tokens / sizes.length
    prefill = sizes.body_flops(hf_config) * prompts / (gpu.bf16_flops * _FLOPS_USED * rollout.tensor * engines)
    return waves * rollout.max_new_tokens * token + prefill


def _weight_sync(sizes: RunSizes, moved: Traffic, gpu: Gpu) -> float:
    """Estimates a sync: written by the ranks that hold the shards or by the first one, sent to other nodes once."""
    rollout = sizes.config.rollout
    by_shard = rollout.shard_to_shard and rollout.tensor == sizes.tp_size and sizes.ep_size == 1
    writers = sizes.tp_size if by_shard else 1
    nodes = {seat.node for seat in plan_places(sizes).engines}
    return moved.weight_sync / (_FILE_RATE * writers) + (moved.weight_sync / gpu.network if len(nodes) > 1 else 0.0)


def _link(ranks: int, gpu: Gpu) -> float:
    """Bandwidth (bytes a second) in a group that spans `ranks` neighbouring ranks."""
    return gpu.nvlink if ranks <= GPUS_PER_NODE else gpu.network
