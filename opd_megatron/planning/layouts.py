"""Layouts of the same ranks that fit a GPU, fastest first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from opd_megatron.config import RunConfig, build_config
from opd_megatron.errors import ConfigError
from opd_megatron.models import check_divisible
from opd_megatron.models.sizes import RunSizes
from opd_megatron.planning.gpus import GPUS_PER_NODE, Gpu
from opd_megatron.planning.memory import RankMemory, rank_memory
from opd_megatron.planning.timing import cache_bytes_a_token, engine_room, plan_places, step_seconds, total_seconds
from opd_megatron.planning.traffic import traffic
from opd_megatron.teacher import check_teachers
from opd_megatron.weights.families import family_of

_MICRO_SIZES = (8, 4, 2, 1)
_BUDGETS = (16384, 8192, 4096, 2048)
"""Tokens of a micro batch on a rank; the longest sequence where that has more."""
_LONG = 8192
"""Tokens of a sequence from which on context parallelism is looked at."""
# Kept free: blocks that do not fit together, and what is not counted.
_MARGIN = 0.05
_ALWAYS_SHOWN = ("parallel.tensor", "parallel.pipeline", "parallel.data")
_SHOWN_IF_CHANGED = (
    "parallel.context", "parallel.expert", "parallel.stages", "parallel.virtual_stages",
    "parallel.tokens_per_micro_batch", "parallel.micro_batch_size", "parallel.sequence_parallel", "student.recompute",
    "student.offload", "rollout.tensor", "rollout.hosts",
)  # fmt: skip
_SMALLEST_CACHE = 2.0
"""Longest sequences whose keys and values an engine must have room for."""


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Overrides of a layout that fits, with the largest rank's bytes and the estimated seconds of a step."""

    overrides: dict[str, object]
    peak: float
    seconds: float

    def __str__(self) -> str:
        words = " ".join(f"{key}={_spelled(value)}" for key, value in self.overrides.items())
        return f"{words}  ({self.peak / 2**30:.1f} GiB, {self.seconds:.1f} s a step)"


def _spelled(value: object) -> str:
    return "[" + ",".join(value) + "]" if isinstance(value, list) else str(value).lower()


def stage_memories(sizes: RunSizes, gpu: Gpu | None) -> list[RankMemory]:
    """Memory of one rank of each pipeline stage."""
    device = gpu.memory_bytes if gpu else 0.0
    return [rank_memory(sizes, stage, gpu=gpu is not None, device_bytes=device) for stage in range(sizes.pp_size)]


def usable(gpu: Gpu) -> float:
    """Bytes that a plan may fill."""
    return gpu.memory_bytes * (1 - _MARGIN)


def engine_fits(sizes: RunSizes, gpu: Gpu) -> bool:
    """Whether an engine's share of its GPUs holds its weights, and keys and values of a few sequences."""
    return engine_room(sizes, gpu) >= _SMALLEST_CACHE * sizes.length * cache_bytes_a_token(sizes)


def suggestions(sizes: RunSizes, gpu: Gpu, limit: int = 3) -> list[Suggestion]:
    """Finds layouts of as many ranks that fit, fastest first; what costs time for memory is used only where nothing
    fits without."""
    found: list[Suggestion] = []
    for memory in _ways_to_save(sizes.config):
        for ways in _layouts(sizes, memory):
            for other in ways:
                peak = max(memory.peak for memory in stage_memories(other, gpu))
                if peak <= usable(gpu) and engine_fits(other, gpu):
                    seconds = total_seconds(other, step_seconds(other, traffic(other), gpu))
                    found.append(Suggestion(_differences(sizes.config, other.config), peak, seconds))
        if found:
            break
    found.sort(key=lambda suggestion: suggestion.seconds)
    return _unlike(found)[:limit]


def _unlike(found: Iterable[Suggestion]) -> list[Suggestion]:
    """The first of those that differ in no more than the micro batch."""
    kept: dict[str, Suggestion] = {}
    for suggestion in found:
        micro = ("parallel.micro_batch_size", "parallel.tokens_per_micro_batch")
        layout = {k: v for k, v in suggestion.overrides.items() if k not in micro}
        kept.setdefault(str(layout), suggestion)
    return list(kept.values())


def _ways_to_save(config: RunConfig) -> Iterator[dict[str, Any]]:
    """As it is, then with the optimizer in the host's memory, then with recomputation too."""
    mine = {"student.recompute": config.student.recompute, "student.offload": config.student.offload}
    everything = mine | {"student.offload": ["optimizer", "gradients"]} if config.takes_turns else mine
    ways = [mine, everything, mine | {"student.recompute": True}, everything | {"student.recompute": True}]
    return (way for i, way in enumerate(ways) if way not in ways[:i])


def _layouts(sizes: RunSizes, memory: dict[str, Any]) -> Iterator[list[RunSizes]]:
    """Lists every way to divide the job's ranks, each with several micro batch sizes.

    Tensor parallelism stays inside a machine.
    """
    has_experts = any(family_of(hf_config).experts for hf_config in sizes.models.configs)
    engines = _divisors(min(sizes.job_ranks, GPUS_PER_NODE)) if sizes.config.rollout.engines is None else ()
    for engine_tensor in engines or (sizes.config.rollout.tensor,):
        for hosts in _host_counts(sizes, engine_tensor):
            ranks = sizes.job_ranks - sizes.config.teacher_ranks - (hosts or 0)
            for tp_size, cp_size, pp_size, dp_size in _grids(sizes, ranks):
                for ep_size in _divisors(dp_size * cp_size) if has_experts else (1,):
                    layout = memory | {
                        "parallel.tensor": tp_size, "parallel.pipeline": pp_size, "parallel.data": dp_size,
                        "parallel.context": cp_size, "parallel.stages": None, "parallel.virtual_stages": 1,
                        "parallel.expert_tensor": None,
                        "parallel.expert": ep_size, "parallel.sequence_parallel": tp_size > 1,
                        "rollout.tensor": engine_tensor, "rollout.hosts": hosts,
                    }  # fmt: skip
                    ways = [_with(sizes, layout | micro) for micro in _micros(sizes, cp_size)]
                    yield [way for way in ways if way is not None]


def _micros(sizes: RunSizes, cp_size: int) -> list[dict[str, Any]]:
    """Sizes of a micro batch to try: tokens where sequences are packed (the user's own where there is one, and enough
    for the longest), sequences where they are padded."""
    parallel = sizes.config.parallel
    if parallel.micro_batch_size is not None:
        return [{"parallel.micro_batch_size": micro} for micro in _MICRO_SIZES] if cp_size == 1 else []
    multiple = 2 * cp_size
    least = -(-sizes.config.longest_sequence // multiple) * 2
    if parallel.tokens_per_micro_batch is not None:
        return [{"parallel.tokens_per_micro_batch": max(least, parallel.tokens_per_micro_batch)}]
    budgets = dict.fromkeys(max(least, budget) for budget in _BUDGETS)
    return [{"parallel.tokens_per_micro_batch": budget} for budget in budgets]


def _grids(sizes: RunSizes, ranks: int) -> Iterator[tuple[int, int, int, int]]:
    """(tensor, context, pipeline, data) sizes of so many ranks."""
    contexts = (1, 2, 4, 8) if sizes.config.longest_sequence >= _LONG else (1,)
    for tp_size in _divisors(min(ranks, GPUS_PER_NODE)):
        for cp_size in contexts:
            rest = ranks // (tp_size * cp_size)
            for pp_size in _divisors(rest) if rest * tp_size * cp_size == ranks else ():
                yield tp_size, cp_size, pp_size, rest // pp_size


def _host_counts(sizes: RunSizes, engine_tensor: int) -> Iterable[int | None]:
    """Of engines on ranks of their own: whole machines, or whole engines of the only one."""
    if sizes.config.rollout.placement != "own":
        return (None,)
    step = GPUS_PER_NODE if sizes.job_ranks > GPUS_PER_NODE else engine_tensor
    return range(step, sizes.job_ranks - sizes.config.teacher_ranks, step)


def _with(sizes: RunSizes, layout: dict[str, Any]) -> RunSizes | None:
    """Puts the run in another layout; None where a rule forbids it."""
    tree = sizes.config.model_dump()
    for key, value in layout.items():
        section, name = key.split(".")
        tree[section][name] = value
    try:
        config = build_config(tree)
        parallel, models = config.parallel, replace(sizes.models, data_parallel=int(layout["parallel.data"]))
        check_divisible(
            "the student", models.student_config, parallel.tensor, parallel.pipeline, parallel.expert
        )  # fmt: skip
        check_teachers(config, models)
        other = replace(sizes, config=config, models=models)
        plan_places(other)
    except ConfigError:
        return None
    heads = sizes.models.student_config.num_attention_heads
    return None if heads % config.rollout.tensor else other


def _differences(before: RunConfig, after: RunConfig) -> dict[str, object]:
    """Lists the overrides: the layout, and what else has changed."""
    old, new = before.model_dump(), after.model_dump()

    def value(tree: dict, key: str) -> object:
        section, name = key.split(".")
        return tree[section][name]

    changed = [key for key in _SHOWN_IF_CHANGED if value(old, key) != value(new, key)]
    return {key: value(new, key) for key in (*_ALWAYS_SHOWN, *changed)}


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
