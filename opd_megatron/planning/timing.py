"""Estimates the seconds of a step from a GPU's published specifications; the assumptions are printed too.

benchmarks/plan_vs_published.py holds the same formulas against step times that others have published.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PretrainedConfig

from opd_megatron.config import decided
from opd_megatron.models.sizes import BYTES_PER_ELEMENT, LayerSizes, RunSizes
from opd_megatron.places import Places, cut_places
from opd_megatron.planning.gpus import GPUS_PER_NODE, Gpu
from opd_megatron.planning.memory import offloaded_bytes, optimizer_share, weights_bytes
from opd_megatron.planning.traffic import Traffic
from opd_megatron.rollout.turns import sleeps
from opd_megatron.teacher import teacher_costs
from opd_megatron.weights.families import Dims, family_of

_DENSE_FLOPS_USED, _EXPERT_FLOPS_USED, _BANDWIDTH_USED = 0.4, 0.2, 0.6
_DECODE_OVERHEAD = 0.003
"""Seconds of a decode step beside its arithmetic: scheduling, sampling, launches."""
_ALL_REDUCE = 15e-6
"""Seconds of a tensor-parallel all-reduce of a decode step's few rows."""
_MAPPED_RATE, _FILE_RATE = 14e9, 1.5e9
"""Bytes a second into an engine: from memory that it maps, and through files (pageable copies, one writer)."""
_A_TENSOR, _WAKING = 0.0003, 3.0
"""Seconds that each tensor of a sync takes, and that engines take to fall asleep and wake."""
_HOST_LINK = 25e9  # bytes a second of PCIe 4 or 5 with pinned memory

ASSUMPTIONS = (
    f"matrix products at {_DENSE_FLOPS_USED:.0%} of the dense bf16 peak, {_EXPERT_FLOPS_USED:.0%} with experts; 2 FLOP "
    "a weight and token forward, 4 backward, 2 more with recomputation; causal attention",
    "pipeline bubble (stages - 1) / micro batches / virtual stages; transfers at the links' published rate, none "
    "behind arithmetic",
    f"{GPUS_PER_NODE} GPUs a machine: a group that fits into one uses NVLink, any other one network card a GPU",
    f"decoding at {_BANDWIDTH_USED:.0%} of the memory bandwidth, which reads weights, keys and values once a token, "
    f"and {1e3 * _DECODE_OVERHEAD:g} ms a token beside that, {1e6 * _ALL_REDUCE:g} us an all-reduce; answers dealt "
    "evenly, as many at once as vLLM takes and its cache holds",
    f"weights to the engines at {_MAPPED_RATE / 1e9:g} GB/s from memory that they map ({_FILE_RATE / 1e9:g} a writing "
    f"rank through files), {1e3 * _A_TENSOR:g} ms a tensor (an expert has three), {_WAKING:g} s more for engines that "
    "sleep",
)


def plan_places(sizes: RunSizes) -> Places:
    """Where a run's engines are on machines of `GPUS_PER_NODE` GPUs."""
    return cut_places(sizes.config, sizes.job_ranks, min(sizes.job_ranks, GPUS_PER_NODE), on_gpu=True)


def step_seconds(sizes: RunSizes, moved: Traffic, gpu: Gpu) -> dict[str, float]:
    """Estimates the seconds of the phases of one step."""
    student = sizes.models.student_config
    bubble = 1 + (sizes.pp_size - 1) / sizes.micro_batches / sizes.config.parallel.virtual_stages
    passes = 4 if sizes.config.student.recompute else 3
    of_student = passes * sizes.body_flops(student) * _fp8_time(sizes, gpu) + 3 * sizes.head_flops(student)
    costs = list(zip(teacher_costs(sizes, stage=0), sizes.models.teachers, strict=True))
    of_teachers = sum(cost.flops / _flops(hf_config, gpu) for cost, (_, hf_config) in costs)
    elsewhere = [
        cost.own_flops / cost.own_ranks / _flops(hf_config, gpu) for cost, (_, hf_config) in costs if cost.own_ranks
    ]
    # All stages wait for the one with most layers.
    uneven = max(sizes.stage_layers) * sizes.pp_size / student.num_hidden_layers
    training = of_student / sizes.ranks / _flops(student, gpu) * bubble * uneven
    updated = max(optimizer_share(sizes, sizes.stage(student, index)) for index in range(sizes.pp_size))
    return {
        "rollout": rollout_seconds(sizes, gpu),
        "teacher": of_teachers / sizes.ranks * bubble,
        "student": training,
        # Teachers on ranks of their own score beside the student's work; what is left of it is waited for.
        "waiting for teachers": max(0.0, max(elsewhere, default=0.0) - training),
        "tensor collectives": moved.tensor / _link(sizes.tp_size, gpu),
        **(
            {"context collectives": moved.context / _link(sizes.tp_size * sizes.cp_size, gpu)}
            if sizes.cp_size > 1
            else {}
        ),
        "pipeline transfers": moved.pipeline / _link(sizes.ranks, gpu),
        "expert transfers": moved.expert / _link(sizes.tp_size * sizes.ep_size, gpu),
        "data collectives": moved.data / _link(sizes.tp_size * sizes.replicas, gpu),
        # Gradient, main weight and both moments read, three of them and the weight written.
        "optimizer": updated * 30 / (gpu.memory_bandwidth * _BANDWIDTH_USED),
        "offload": 2 * max(offloaded_bytes(sizes, stage) for stage in range(sizes.pp_size)) / _HOST_LINK,
        "weight sync": _weight_sync(sizes, moved, gpu),
    }


def _fp8_time(sizes: RunSizes, gpu: Gpu) -> float:
    """Time of the student's layers beside that of bf16: their products go at the FP8 rate, attention as before."""
    precision, student = sizes.config.precision, sizes.models.student_config
    if precision.fp8 is None or not gpu.fp8_flops:
        return 1.0
    layer, layers = LayerSizes.of(student), student.num_hidden_layers
    products = 2 * layer.matmul_params / (2 * layer.matmul_params + 2 * sizes.expected_length * layer.query)
    share = products * max(0, layers - 2 * precision.first_last_bf16) / layers
    return 1 - share * (1 - gpu.bf16_flops / gpu.fp8_flops)


def total_seconds(sizes: RunSizes, seconds: Mapping[str, float]) -> float:
    """Of a whole step: engines on ranks of their own may sample the next one's answers beside the rest."""
    total = sum(seconds.values())
    if not samples_beside(sizes):
        return total
    rest = total - seconds["rollout"] - seconds["weight sync"]
    return max(seconds["rollout"], rest) + seconds["weight sync"]


def samples_beside(sizes: RunSizes) -> bool:
    """Whether sampling costs the student's GPUs nothing. On shared ones it takes as long as one after the other."""
    rollout = sizes.config.rollout
    return rollout.steps_ahead > 0 and rollout.placement == "own"


def rollout_seconds(sizes: RunSizes, gpu: Gpu) -> float:
    """Estimates prefill and decoding of an engine's share, until the step's longest answer has ended."""
    hf_config, rollout, answers = sizes.models.student_config, sizes.config.rollout, sizes.answers
    share = -(-sizes.config.sequences_per_step // len(plan_places(sizes).engines))
    at_once = min(share, _most_at_once(sizes, gpu))
    prompt = sizes.config.data.max_prompt_tokens
    tokens = share * answers.mean
    # While some wait the engine is full; then the last of them run to their end.
    steps = (share - at_once) * answers.mean / at_once + answers.longest_of(sizes.config.sequences_per_step)
    bytes_per_element = BYTES_PER_ELEMENT[decided(rollout.dtype)]
    read = share * (prompt * answers.mean + answers.mean_square / 2) * _cache_bytes(hf_config, bytes_per_element)
    read += steps * _weights_read(hf_config, tokens / steps) * bytes_per_element
    flops = 2 * LayerSizes.of(hf_config).matmul_params * hf_config.num_hidden_layers
    flops += 2 * hf_config.vocab_size * hf_config.hidden_size
    rate = _flops(hf_config, gpu) * rollout.tensor
    decoding = max(read / (gpu.memory_bandwidth * _BANDWIDTH_USED * rollout.tensor), tokens * flops / rate)
    a_step = _DECODE_OVERHEAD + (2 * hf_config.num_hidden_layers * _ALL_REDUCE if rollout.tensor > 1 else 0.0)
    return steps * a_step + decoding + share * prompt * flops / rate


def engine_room(sizes: RunSizes, gpu: Gpu) -> float:
    """Bytes on each of an engine's GPUs for keys and values; below 0 where its weights do not fit."""
    rollout = sizes.config.rollout
    weights = weights_bytes(sizes.models.student_config, BYTES_PER_ELEMENT[decided(rollout.dtype)]) / rollout.tensor
    return rollout.gpu_memory_utilization * gpu.memory_bytes - weights


def _most_at_once(sizes: RunSizes, gpu: Gpu) -> int:
    """Answers that an engine works on at the same time: vLLM's own bound, or what its cache holds."""
    length = sizes.config.data.max_prompt_tokens + sizes.answers.mean
    return max(1, min(gpu.sequences_at_once, int(engine_room(sizes, gpu) / (cache_bytes_a_token(sizes) * length))))


def cache_bytes_a_token(sizes: RunSizes) -> float:
    """Bytes of one token's keys and values on each of an engine's GPUs."""
    rollout = sizes.config.rollout
    whole = _cache_bytes(sizes.models.student_config, BYTES_PER_ELEMENT[decided(rollout.dtype)])
    return whole / rollout.tensor


def _cache_bytes(hf_config: PretrainedConfig, bytes_per_element: int) -> float:
    """Keys and values of one token, in all layers."""
    return 2 * LayerSizes.of(hf_config).key * hf_config.num_hidden_layers * bytes_per_element


def _weights_read(hf_config: PretrainedConfig, batch: float) -> float:
    """Weights that a decode step of `batch` tokens reads: those of experts that no token has chosen are left."""
    dims, layer = Dims.of(hf_config), LayerSizes.of(hf_config)
    whole = weights_bytes(hf_config, 1)
    if not dims.experts:
        return whole
    of_experts = 3 * dims.hidden * dims.expert_ffn * dims.experts * hf_config.num_hidden_layers
    chosen = 1 - (1 - layer.experts_per_token / dims.experts) ** batch
    return whole - of_experts * (1 - chosen)


def _weight_sync(sizes: RunSizes, moved: Traffic, gpu: Gpu) -> float:
    """Estimates a sync: written by the ranks that hold the shards or by the first one, sent to other nodes once."""
    rollout = sizes.config.rollout
    by_shard = rollout.shard_to_shard and rollout.tensor == sizes.tp_size and sizes.ep_size == 1
    rate = _FILE_RATE * (sizes.tp_size if by_shard else 1) if rollout.transport == "files" else _MAPPED_RATE
    nodes = {seat.node for seat in plan_places(sizes).engines}
    dims = Dims.of(sizes.models.student_config)
    tensors = dims.layers * (9 + 3 * dims.experts)
    waking = _WAKING if sleeps(sizes.config, on_gpu=True) else 0.0
    between = moved.weight_sync / gpu.network if len(nodes) > 1 else 0.0
    return moved.weight_sync / rate + between + tensors * _A_TENSOR + waking


def _flops(hf_config: PretrainedConfig, gpu: Gpu) -> float:
    """Operations a second of a model's matrix products."""
    return gpu.bf16_flops * (_EXPERT_FLOPS_USED if family_of(hf_config).experts else _DENSE_FLOPS_USED)


def _link(ranks: int, gpu: Gpu) -> float:
    """Bandwidth (bytes a second) in a group that spans `ranks` neighbouring ranks."""
    return gpu.nvlink if ranks <= GPUS_PER_NODE else gpu.network
