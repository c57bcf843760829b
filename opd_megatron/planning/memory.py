"""Bytes on one rank, by what they are for: the one memory formula of the package.

Activations follow arXiv 2205.05198 (section 4): what a layer keeps for its backward pass, term by term, with what is
sharded over tensor-parallel ranks (its equation 2), with sequence parallelism (equation 4), with recomputation (only a
layer's input), times the micro batches that 1F1B has in flight on a stage. We do not store attention scores (flash or
SDPA) nor dropout masks.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from opd_megatron.losses.core.chunks import default_chunk
from opd_megatron.losses.core.matmul import HEAD_ROWS
from opd_megatron.mcore.cpu.attention import SCORES_AT_ONCE
from opd_megatron.models.sizes import LayerSizes, RunSizes, StageShard, parameters
from opd_megatron.rollout.turns import sleeps
from opd_megatron.teacher import teacher_costs

GIB = 2**30
# What a process holds on a GPU before the first tensor: CUDA context, kernels, NCCL's buffers.
_GPU_RUNTIME = 2 * GIB
# glibc does not use all freed blocks again, so that a CPU process holds more than its tensors: by this share of the
# activations (measured by benchmarks/memory_plan.py, whose runs with MALLOC_MMAP_THRESHOLD_ set hold just the tensors).
_GLIBC_HOLES = 0.8


_OF_A_STEP = {"teacher states", "activations", "loss chunks", "head gradient", "workspace", "weight sync"}
"""Parts that are free while the engines sample."""


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of one rank of a pipeline stage. All tensor- and data-parallel ranks of a stage have the same."""

    stage: int
    parts: dict[str, float]
    engine: float = 0.0
    """What a rollout engine takes of the device that it shares with this rank; 0 where it shares none."""
    takes_turns: bool = False
    """Whether the engine sleeps while this rank trains."""
    away: float = 0.0
    """What leaves the device while the engine is awake (`student.offload`, `teachers.N.offload`)."""
    checkpoint: float = 0.0
    """Bytes of host memory that a checkpoint takes while it is written."""

    @property
    def total(self) -> float:
        """Bytes of the training process."""
        return sum(self.parts.values())

    @property
    def resident(self) -> float:
        """Bytes of the training process that stay while the engine is awake."""
        return sum(size for name, size in self.parts.items() if name not in _OF_A_STEP) - self.away

    @property
    def peak(self) -> float:
        """Bytes of the training process and the rollout engine beside it."""
        if self.takes_turns:
            return max(self.total, self.resident + self.engine)
        return self.total + self.engine


def rank_memory(sizes: RunSizes, stage: int, *, gpu: bool, device_bytes: float = 0.0) -> RankMemory:
    """Memory of a rank of `stage` at the peak of a step whose sequences are as long as they may be.

    `device_bytes` is the memory of the GPU, of which a rollout engine takes its share where it has the student's GPUs.
    """
    student = sizes.stage(sizes.models.student_config, stage)
    last = stage == sizes.pp_size - 1
    kept = _activations(sizes, stage, recompute=sizes.config.student.recompute)
    chunk, head_gradient = _loss(sizes, student, gpu) if last else (0.0, 0.0)
    parts = {
        "weights": student.parameters * sizes.bytes_per_element + fp8_bytes(sizes, student),
        "gradients": student.parameters * 4,  # fp32 buffer of the distributed optimizer's DDP
        "optimizer": _optimizer_bytes(sizes, student),
        **_teachers(sizes, stage),
        "activations": kept,
        "loss chunks": chunk,
        "head gradient": head_gradient,
        "workspace": _workspace(sizes, student, gpu),
        # Two buckets' worth of thirds beside the three that engines map, where they do.
        "weight sync": 2.0 * sizes.config.rollout.bucket_mib * 2**20 if gpu else 0.0,
        "allocator": 0.0 if gpu else _GLIBC_HOLES * kept,
        "runtime": _GPU_RUNTIME if gpu else 0.0,
    }
    rollout = sizes.config.rollout
    share = rollout.gpu_memory_utilization if gpu and rollout.placement == "student" else 0.0
    turns = sleeps(sizes.config, on_gpu=gpu)
    away = offloaded_bytes(sizes, stage, gradients=True) if turns else 0.0
    return RankMemory(stage, parts, share * device_bytes, turns, away, _checkpoint(sizes, student))


def fp8_bytes(sizes: RunSizes, student: StageShard) -> float:
    """What FP8 adds to a rank's bf16 weights: with products alone copies for the forward and the backward pass, which
    Transformer Engine makes once a step; with weights in FP8 these two are all that there is."""
    precision = sizes.config.precision
    if precision.fp8 is None:
        return 0.0
    numbers = sizes.fp8_parameters(sizes.models.student_config, student, precision.first_last_bf16)
    return numbers * (2.0 - (sizes.bytes_per_element if precision.param else 0))


def offloaded_bytes(sizes: RunSizes, stage: int, *, gradients: bool = False) -> float:
    """Bytes of a rank that go to the host while engines are awake. `gradients` are freed rather than copied."""
    student, offload = sizes.stage(sizes.models.student_config, stage), sizes.config.student.offload
    of_teachers = sum(cost.away for cost in teacher_costs(sizes, stage))
    of_student = _optimizer_bytes(sizes, student) if "optimizer" in offload else 0.0
    freed = student.parameters * 4 if gradients and "gradients" in offload else 0
    return of_teachers + of_student + freed


def _optimizer_bytes(sizes: RunSizes, student: StageShard) -> float:
    """fp32 main weights (where the weights are not fp32 themselves), both moments."""
    return (12 if sizes.bytes_per_element == 2 else 8) * optimizer_share(sizes, student)


def _checkpoint(sizes: RunSizes, student: StageShard) -> float:
    """Bytes of host memory: a copy of this rank's share of the weights and of its optimizer state, or of the largest
    parameter's where it is written while training waits."""
    a_parameter = sizes.bytes_per_element + (12 if sizes.bytes_per_element == 2 else 8)
    if not sizes.config.checkpoint.async_save:
        return student.largest * 4.0
    return a_parameter * optimizer_share(sizes, student)


def teacher_memory(sizes: RunSizes, *, gpu: bool) -> dict[int, dict[str, float]]:
    """Bytes on each rank of the teachers that have ranks of their own, by the teacher's number."""
    runtime = {"runtime": float(_GPU_RUNTIME)} if gpu else {}
    costs = enumerate(teacher_costs(sizes, stage=0))
    return {number: cost.own_memory | runtime for number, cost in costs if cost.own_ranks}


def optimizer_share(sizes: RunSizes, student: StageShard) -> float:
    """Elements whose optimizer state a rank keeps: the distributed optimizer divides it among the ranks with copies."""
    return (student.parameters - student.experts) / sizes.replicas + student.experts / sizes.expert_copies


def activation_bytes(sizes: RunSizes, stage: int) -> tuple[float, float]:
    """Bytes of activations on a rank of `stage` without and with recomputation."""
    return _activations(sizes, stage, recompute=False), _activations(sizes, stage, recompute=True)


def layer_elements(layer: LayerSizes, tp_size: int, shards: int) -> float:
    """Elements a token keeps in one layer. `shards`: ranks among which the sequence is split (sequence parallelism).

    Inputs of both norms and of the linears behind them (4 h); rotated query and key, the projection they and the value
    are parts of, the attention's output and its copy for the next linear; gate and up projection (2), the gate's
    activation, the up half's copy and their product.
    """
    attention = 4 * layer.query + 3 * layer.key
    copies = 2 * layer.experts_per_token * layer.hidden  # tokens sent to experts, and what comes back
    return 4 * layer.hidden / shards + (attention + 5 * layer.ffn) / tp_size + copies / shards


def _activations(sizes: RunSizes, stage: int, *, recompute: bool) -> float:
    hf_config, bytes_per_element, shards = sizes.models.student_config, sizes.bytes_per_element, sizes.sequence_shards
    layer, layers = LayerSizes.of(hf_config), sizes.stage_layers[stage]
    whole = (layer_elements(layer, sizes.tp_size, shards) * bytes_per_element + _per_token(layer, sizes)) * sizes.tokens
    whole -= _fp8_saving(sizes, layer) * sizes.tokens
    row = layer.hidden * bytes_per_element * sizes.tokens / shards
    in_flight = _in_flight(sizes, stage)
    if stage < sizes.pp_size - 1:
        return in_flight * (layers * (row if recompute else whole) + row) + whole * recompute
    rows = (
        layer.hidden * sizes.response_tokens * (bytes_per_element + 4 + bytes_per_element)
    )  # the objective's rows, d of them in fp32 and back
    gathered = layer.hidden * bytes_per_element * sizes.tokens if shards > 1 else 0.0
    of_layers = in_flight * layers * (row if recompute else whole)
    return of_layers + whole * recompute + 2 * row + rows + gathered + (in_flight - 1) * row


def _in_flight(sizes: RunSizes, stage: int) -> float:
    """Micro batches whose activations a stage holds at once. Interleaved: one more for every part but the first,
    less a part for each stage behind (arXiv 2104.04473, section 2.2; upstream's warm-up)."""
    virtual = sizes.config.parallel.virtual_stages
    if virtual == 1:
        return min(sizes.pp_size - stage, sizes.most_micro_batches)
    warm_up = 2 * (sizes.pp_size - stage - 1) + (virtual - 1) * sizes.pp_size
    return min((warm_up + 1) / virtual, sizes.most_micro_batches)


def _fp8_saving(sizes: RunSizes, layer: LayerSizes) -> float:
    """Bytes of a token and layer that inputs of products need less of in FP8: of the two norms' outputs, attention's
    and what goes into the down projection."""
    precision = sizes.config.precision
    if precision.fp8 is None:
        return 0.0
    layers = sizes.models.student_config.num_hidden_layers
    share = max(0, layers - 2 * precision.first_last_bf16) / layers
    inputs = 2 * layer.hidden / sizes.sequence_shards + (layer.query + layer.ffn) / sizes.tp_size
    return share * inputs * (sizes.bytes_per_element - 1)


def _per_token(layer: LayerSizes, sizes: RunSizes) -> float:
    """Bytes beside the large tensors: cosines and sines of query and key, one fp32 number a norm."""
    return 4 * layer.head_dim * sizes.bytes_per_element / sizes.micro_size + 2 * 4 / sizes.sequence_shards


def _teachers(sizes: RunSizes, stage: int) -> dict[str, float]:
    """Sums what the teachers hold on a rank of the stage."""
    held = {"teachers": 0.0, "teacher heads": 0.0, "teacher states": 0.0}
    for cost in teacher_costs(sizes, stage):
        for name, size in cost.memory.items():
            held[name] = held.get(name, 0.0) + size
    return held


def _loss(sizes: RunSizes, student: StageShard, gpu: bool) -> tuple[float, float]:
    """Logits of a chunk of tokens for student and teachers, which are kept for the next call, and the rows of d head
    that are on their way into the main gradient."""
    device = "cuda" if gpu else "cpu"
    tokens = sizes.response_tokens
    size = sizes.config.objective.chunk_tokens or default_chunk(
        tokens, sizes.vocab_per_rank * sizes.bytes_per_element, device
    )
    of_student = sizes.vocab_per_rank * sizes.bytes_per_element
    of_teachers = sum(cost.logits_bytes for cost in teacher_costs(sizes, sizes.pp_size - 1))
    chunk = min(size, tokens) * (of_student + of_teachers)
    rows = min(HEAD_ROWS, sizes.vocab_per_rank) if sizes.bytes_per_element < 4 else 0
    return chunk, rows * sizes.models.student_config.hidden_size * sizes.bytes_per_element


def _workspace(sizes: RunSizes, student: StageShard, gpu: bool) -> float:
    """Bytes of temporaries: those of one layer's backward pass, and of the largest weight matrices."""
    layer, bytes_per_element = LayerSizes.of(sizes.models.student_config), sizes.bytes_per_element
    of_layer = _layer_temporaries(layer, sizes, gpu)
    # A gradient in the weights' dtype is there until it has been added; a CPU widens it to fp32 to do so.
    cast = 4 if bytes_per_element < 4 and not gpu else 0
    matmul_params = student.largest * (bytes_per_element + cast)
    return of_layer + max(matmul_params, student.largest * 4 / sizes.replicas)  # or the copy that clipping makes


def _layer_temporaries(layer: LayerSizes, sizes: RunSizes, gpu: bool) -> float:
    """Bytes of temporaries in a layer: of the feed-forward part, or of attention, whose scores a CPU recomputes if
    few."""
    scores = (1 if sizes.config.pack_tokens else sizes.micro_size) * layer.heads / sizes.tp_size * sizes.length**2
    scores /= sizes.cp_size
    attention = 6 * layer.query / sizes.tp_size * sizes.tokens
    if sizes.cp_size > 1:  # everybody's keys and values, and them in order, with gradients
        attention += 8 * layer.key / sizes.tp_size * sizes.tokens * sizes.cp_size
    if not gpu and scores <= SCORES_AT_ONCE:
        attention += 3 * scores
    feed_forward = 6 * layer.ffn / sizes.tp_size * sizes.tokens
    return (max(attention, feed_forward) + 4 * layer.hidden * sizes.tokens) * sizes.bytes_per_element


def weights_bytes(hf_config: PretrainedConfig, bytes_per_element: int) -> float:
    """Bytes of a whole model's weights."""
    return parameters(hf_config) * bytes_per_element
