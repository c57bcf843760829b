"""The plan of a run: coverage, memory of each stage, traffic, time, and layouts that fit; as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from opd_megatron.config import RunConfig, decide_precision, decided
from opd_megatron.errors import ConfigError
from opd_megatron.mcore.cpu.platform import has_gpu
from opd_megatron.models import ResolvedModels
from opd_megatron.models.gpus import FP8_CAPABILITY
from opd_megatron.models.sizes import BYTES_PER_ELEMENT, RunSizes
from opd_megatron.places import cut_places, ranks_per_node
from opd_megatron.planning.coverage import Coverage, build_and_check
from opd_megatron.planning.gpus import Gpu
from opd_megatron.planning.layouts import Suggestion, engine_fits, stage_memories, suggestions, usable
from opd_megatron.planning.memory import (
    GIB,
    RankMemory,
    activation_bytes,
    rank_memory,
    teacher_memory,
    weights_bytes,
)
from opd_megatron.planning.published import find_model, known_tensors
from opd_megatron.planning.timing import (
    ASSUMPTIONS,
    engine_room,
    plan_places,
    samples_beside,
    step_seconds,
    total_seconds,
)
from opd_megatron.planning.traffic import Traffic, traffic
from opd_megatron.run.checks import check_run
from opd_megatron.system.processor import BF16_GPU
from opd_megatron.teacher import teacher_costs


@dataclass(slots=True)
class RunPlan:
    """Everything `opd-megatron plan` says, in bytes and seconds."""

    sizes: RunSizes
    coverage: dict[str, Coverage]
    """Of each model, by its path."""
    stages: list[RankMemory]
    moved: Traffic
    gpu: Gpu | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    suggestions: list[Suggestion] = field(default_factory=list)

    @property
    def peak(self) -> RankMemory:
        return max(self.stages, key=lambda memory: memory.peak)

    @property
    def fits(self) -> bool:
        """Whether every rank stays within the named GPU, and each engine within its share; True where none is
        named."""
        if self.gpu is None:
            return True
        return self.peak.peak <= usable(self.gpu) and engine_fits(self.sizes, self.gpu) and not self.too_large_teachers

    @property
    def too_large_teachers(self) -> dict[int, float]:
        """Bytes of the teachers whose own ranks do not hold them, by their number."""
        if self.gpu is None:
            return {}
        held = {number: sum(parts.values()) for number, parts in teacher_memory(self.sizes, gpu=True).items()}
        return {number: size for number, size in held.items() if size > usable(self.gpu)}

    @property
    def total_seconds(self) -> float:
        """Of a step, of which parts may run side by side."""
        return total_seconds(self.sizes, self.seconds)

    def require_fit(self) -> None:
        """Raises ConfigError when a rank does not fit, naming a layout that does."""
        if self.gpu is None or self.fits:
            return
        remedy = f"try {self.suggestions[0]}" if self.suggestions else "no layout of as many ranks does: use more ranks"
        if self.too_large_teachers:
            number, size = next(iter(self.too_large_teachers.items()))
            raise ConfigError(
                f"a rank of teacher {number} needs {size / GIB:.1f} GiB, more than the {usable(self.gpu) / GIB:.1f} "
                f"GiB that can be used of {self.gpu.name}'s memory: raise teachers.{number}.tensor or .pipeline"
            )
        if self.peak.peak <= usable(self.gpu):
            rollout = self.sizes.config.rollout
            raise ConfigError(
                f"rollout.gpu_memory_utilization={rollout.gpu_memory_utilization} of {self.gpu.name}'s memory with "
                f"rollout.tensor={rollout.tensor} leaves an engine {engine_room(self.sizes, self.gpu) / GIB:.1f} GiB "
                f"beside its weights, too little for a few sequences: raise either, or {remedy}"
            )
        raise ConfigError(
            f"a rank of stage {self.peak.stage} needs {self.peak.peak / GIB:.1f} GiB, more than the "
            f"{usable(self.gpu) / GIB:.1f} GiB that can be used of {self.gpu.name}'s memory: {remedy}"
        )


def make_plan(
    config: RunConfig,
    gpu: Gpu | None = None,
    folders: Sequence[Path] = (),
    *,
    mean_answer: float | None = None,
    suggest: bool = False,
) -> RunPlan:
    """Builds every distinct shard, checks its coverage and estimates the run. Needs no weights, GPU or other process.

    Args:
        folders: hold config.json of models that are not here.
        mean_answer: tokens of a mean answer; by default half of the longest.
        suggest: look for faster layouts also where this one fits.

    Raises:
        OPDError: what `check_run` finds, or a model whose tensors are not covered (`coverage.check_coverage`).
    """
    config, _ = decide_precision(config, machine=BF16_GPU)
    models = check_run(config, lambda path: find_model(path, folders))
    if mean_answer is not None and not 0 < mean_answer <= config.rollout.max_new_tokens:
        raise ConfigError(
            f"--mean-answer {mean_answer:g} must be above 0 and at most rollout.max_new_tokens="
            f"{config.rollout.max_new_tokens}, the longest: change one of them"
        )
    sizes = RunSizes(config, models, mean_answer=mean_answer)
    if gpu is not None:
        _check_fp8_on(config, gpu)
    moved = traffic(sizes)
    plan = RunPlan(sizes, _check_models(config, models), stage_memories(sizes, gpu), moved, gpu)
    if gpu is not None:
        plan.seconds = step_seconds(sizes, moved, gpu)
        if suggest or not plan.fits:
            plan.suggestions = suggestions(sizes, gpu)
    return plan


def _check_fp8_on(config: RunConfig, gpu: Gpu) -> None:
    """Raises ConfigError for FP8 that the planned GPU has no units for."""
    for key, precision, _ in config.precisions():
        least = FP8_CAPABILITY[precision.recipe]
        if precision.fp8 is not None and gpu.capability < least:
            raise ConfigError(
                f"{key}precision.recipe={precision.recipe} needs a GPU of compute capability {least[0]}.{least[1]}, "
                f"{gpu.name} has {gpu.capability[0]}.{gpu.capability[1]}: choose another recipe or GPU"
            )


def _check_models(config: RunConfig, models: ResolvedModels) -> dict[str, Coverage]:
    named = [(config.student.path, models.student, models.student_config)]
    named += [(teacher.path, *found) for teacher, found in zip(config.teachers, models.teachers, strict=True)]
    costs = teacher_costs(RunSizes(config, models), stage=0)
    layouts = [config.parallel, *(cost.layout or config.parallel for cost in costs)]
    found = {}
    for (path, folder, hf_config), layout in zip(named, layouts, strict=True):
        same = layout is config.parallel
        data = models.data_parallel if same else layout.data or 1
        columns = models.padded_vocab(layout.tensor, hf_config)
        if same and path != config.student.path:  # a teacher beside it, whose stages are not the student's
            layout = layout.model_copy(update={"stages": None, "virtual_stages": 1})
        found[path] = build_and_check(hf_config, layout, data, columns, known_tensors(path, folder))
    return found


def describe(config: RunConfig, models: ResolvedModels) -> str:
    """Describes process layout and memory of each rank for `--dry-run`: reads the configs, builds nothing."""
    sizes = RunSizes(config, models)
    gpu = has_gpu()
    stages = [rank_memory(sizes, i, gpu=gpu) for i in range(sizes.pp_size)]
    lines = [*_layout_lines(sizes), *_memory_lines(stages), *_teacher_lines(sizes, gpu=gpu)]
    places = cut_places(config, sizes.job_ranks, ranks_per_node(sizes.job_ranks), on_gpu=gpu)
    lines += [f"places           {line}" for line in places.lines()]
    return "\n".join([*lines, f"rollout engine   {_engine(sizes, gpu)} each, in a process of its own"])


def format_plan(plan: RunPlan) -> str:
    """The plan as the command prints it."""
    lines = _layout_lines(plan.sizes)
    lines += [f"places           {line}" for line in plan_places(plan.sizes).lines()]
    lines += [f"{'weights':<16} {path}: {_coverage(found)}" for path, found in plan.coverage.items()]
    lines += _memory_lines(plan.stages)
    lines += _teacher_lines(plan.sizes, gpu=plan.gpu is not None)
    lines += _recompute_lines(plan.sizes)
    lines.append("sent a step      GiB of the busiest rank: " + _listed(asdict(plan.moved), GIB))
    if plan.gpu is None:
        lines.append(f"rollout engine   {_engine(plan.sizes, False)} each, in a process of its own")
        return "\n".join(lines)
    beside = ", sampled beside the rest" if samples_beside(plan.sizes) else ""
    seconds = _listed(plan.seconds, 1)
    lines.append(f"seconds a step   {plan.total_seconds:.1f} on {plan.gpu.name}{beside}: {seconds}")
    lines.append(f"  assumed        {_answers(plan.sizes)}")
    lines += [f"  assumed        {assumption}" for assumption in ASSUMPTIONS]
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    room = f"{plan.peak.peak / GIB:.1f} of {usable(plan.gpu) / GIB:.1f} GiB ({plan.gpu.name}'s memory less 5%)"
    lines.append(f"{verdict:<16} {room}, on stage {plan.peak.stage}")
    label = "faster layouts" if plan.fits else "  fits instead"
    return "\n".join([*lines, *(f"{label}   {suggestion}" for suggestion in plan.suggestions)])


def _answers(sizes: RunSizes) -> str:
    answers = sizes.answers
    where = "half of the longest" if sizes.mean_answer is None else "as given"
    longest = answers.longest_of(sizes.config.sequences_per_step)
    return (
        f"answers of {answers.mean:.0f} tokens on average ({where}; --mean-answer N), the longest of a step "
        f"{longest:.0f}; sequences padded to {sizes.expected_length:.0f}"
    )


def to_dict(plan: RunPlan) -> dict[str, Any]:
    """The plan as JSON: bytes, seconds, counts."""
    sizes = plan.sizes
    return {
        "ranks": sizes.ranks,
        "parallel": {
            "tensor": sizes.tp_size,
            "pipeline": sizes.pp_size,
            "data": sizes.dp_size,
            "expert": sizes.ep_size,
        },
        "engines": len(plan_places(sizes).engines),
        "models": {path: asdict(found) for path, found in plan.coverage.items()},
        "stages": [
            {
                "stage": memory.stage, "bytes": memory.parts, "resident_bytes": memory.resident,
                "engine_bytes": memory.engine, "peak_bytes": memory.peak,
                "checkpoint_host_bytes": memory.checkpoint,
                "activation_bytes": dict(
                    zip(("kept", "recomputed"), activation_bytes(sizes, memory.stage), strict=True)
                ),
            }
            for memory in plan.stages
        ],
        "teacher_bytes": teacher_memory(sizes, gpu=plan.gpu is not None),
        "sent_bytes": asdict(plan.moved),
        "gpu": asdict(plan.gpu) if plan.gpu else None,
        "seconds": plan.seconds,
        "total_seconds": plan.total_seconds,
        "mean_answer": sizes.answers.mean,
        "fits": plan.fits,
        "suggestions": [asdict(suggestion) for suggestion in plan.suggestions],
    }  # fmt: skip


def _layout_lines(sizes: RunSizes) -> list[str]:
    padded = sizes.models.padded_vocab(sizes.tp_size)
    budget, parallel = sizes.config.pack_tokens, sizes.config.parallel
    if budget is None:
        sequences = f"{sizes.micro_batches * sizes.micro_size} a data-parallel rank"
        each = f"{sizes.micro_size}, {sizes.length} tokens each"
    else:
        sequences, each = f"about {sizes.expected_length:.0f} tokens each", f"up to {budget} tokens, packed"
        if parallel.context > 1:
            each += f", {sizes.tokens} on each context-parallel rank"
    precision, fp8 = sizes.config.precision, []
    if precision.fp8 is not None:
        what = "weights and products" if precision.param else "products"
        ends = precision.first_last_bf16
        fp8 = [f"precision        FP8 {what}, {precision.fp8}, {precision.recipe}, {ends} layers at either end in bf16"]
    return [
        *fp8,
        f"ranks            {sizes.ranks} = tensor {sizes.tp_size} x "
        + (f"context {sizes.cp_size} x " if sizes.cp_size > 1 else "")
        + f"pipeline {sizes.pp_size} x data {sizes.dp_size}"
        + (f", layers {list(sizes.stage_layers)}" if len(set(sizes.stage_layers)) > 1 else "")
        + (f", {parallel.virtual_stages} parts a stage" if parallel.virtual_stages > 1 else "")
        + (f", experts over {sizes.ep_size}" if sizes.ep_size > 1 else ""),
        f"step             {sizes.config.sequences_per_step} sequences, {sequences} in {sizes.micro_batches} micro "
        f"batches of {each}",
        f"vocabulary       {sizes.models.vocab_size} shared, padded to {padded}, {sizes.vocab_per_rank} columns a rank",
    ]


def _coverage(found: Coverage) -> str:
    names = f"names and shapes as in {found.index}" if found.index else "no index to compare names with"
    return (
        f"{found.elements / 1e9:.3g} B parameters in {found.tensors} tensors, each element in one place over "
        f"{found.shards} distinct shards; {names}"
    )


def _memory_lines(stages: Sequence[RankMemory]) -> list[str]:
    lines = ["memory a rank    estimate in GiB; activations at the longest prompt and answer"]
    for memory in stages:
        line = f"  stage {memory.stage:<8} {memory.total / GIB:.2f} = {_listed(memory.parts, GIB)}"
        if memory.engine:
            turns = f"beside {memory.resident / GIB:.2f} of it, in turns" if memory.takes_turns else "beside it"
            line += f"; rollout engine {memory.engine / GIB:.2f} {turns}"
        if memory.away:
            line += f", of which {memory.away / GIB:.2f} away"
        lines.append(line)
    host = max(memory.checkpoint for memory in stages)
    return [*lines, f"checkpoint       {host / GIB:.2f} GiB of host memory a rank while it is written"]


def _teacher_lines(sizes: RunSizes, *, gpu: bool) -> list[str]:
    """Memory of the ranks that hold a teacher alone."""
    return [
        f"  teacher {number:<6} {sum(parts.values()) / GIB:.2f} = {_listed(parts, GIB)}, on each of its own ranks"
        for number, parts in teacher_memory(sizes, gpu=gpu).items()
    ]


def _recompute_lines(sizes: RunSizes) -> list[str]:
    """Compares activations of the first stage, which has the most micro batches in flight."""
    kept, recomputed = (value / GIB for value in activation_bytes(sizes, 0))
    return [f"activations      stage 0: {kept:.2f} GiB kept whole, {recomputed:.2f} with student.recompute=true"]


def _listed(parts: dict[str, float], unit: float) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value / unit:.2f}" for name, value in parts.items() if value)


def _engine(sizes: RunSizes, gpu: bool) -> str:
    """Describes the engine's memory: a share of the GPU where there is one, else weights and cache."""
    rollout = sizes.config.rollout
    if gpu:
        return f"{rollout.gpu_memory_utilization:.0%} of the memory of {rollout.tensor} GPU(s)"
    bytes_per_element = BYTES_PER_ELEMENT[decided(rollout.dtype)]
    weights = weights_bytes(sizes.models.student_config, bytes_per_element) / GIB
    return f"{weights:.2f} GiB of weights, {rollout.kv_cache_gib:.2f} GiB of key-value cache"
