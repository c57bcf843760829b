"""Layouts of the same ranks that fit a GPU, best first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from opd_megatron.config import RunConfig, build_config
from opd_megatron.errors import ConfigError
from opd_megatron.models import check_divisible
from opd_megatron.models.sizes import RunSizes
from opd_megatron.planning.gpus import GPUS_PER_NODE, Gpu
from opd_megatron.planning.memory import RankMemory, rank_memory
from opd_megatron.planning.timing import step_seconds
from opd_megatron.planning.traffic import traffic
from opd_megatron.weights.families import family_of

_MICRO_SIZES = (8, 4, 2, 1)
# Kept free: blocks that do not fit together, and what is not counted.
_MARGIN = 0.05


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Overrides that make the run fit, with the largest rank's bytes and the estimated seconds of a step."""

    overrides: dict[str, object]
    peak: float
    seconds: float

    def __str__(self) -> str:
        words = " ".join(f"{key}={str(value).lower()}" for key, value in self.overrides.items())
        return f"{words}  ({self.peak / 2**30:.1f} GiB, {self.seconds:.1f} s a step)"


def stage_memories(sizes: RunSizes, gpu: Gpu | None) -> list[RankMemory]:
    """Memory of one rank of each pipeline stage."""
    device = gpu.memory_bytes if gpu else 0.0
    return [rank_memory(sizes, stage, gpu=gpu is not None, device_bytes=device) for stage in range(sizes.pp_size)]


def usable(gpu: Gpu) -> float:
    """Bytes that a plan may fill."""
    return gpu.memory_bytes * (1 - _MARGIN)


def suggestions(sizes: RunSizes, gpu: Gpu, limit: int = 3) -> list[Suggestion]:
    """Finds layouts of as many ranks that fit, fastest first; with recomputation only where needed."""
    found = []
    for recompute in dict.fromkeys([sizes.config.student.recompute, True]):
        for ways in _layouts(sizes, recompute):
            for other in ways:
                peak = max(memory.peak for memory in stage_memories(other, gpu))
                if peak <= usable(gpu):
                    seconds = sum(step_seconds(other, traffic(other), gpu).values())
                    found.append(Suggestion(_differences(sizes.config, other.config), peak, seconds))
                    break
        if found:
            break
    return sorted(found, key=lambda suggestion: suggestion.seconds)[:limit]


def _layouts(sizes: RunSizes, recompute: bool) -> Iterator[list[RunSizes]]:
    """Lists every way to divide the ranks, each with several micro batch sizes, largest first.

    Tensor parallelism stays inside a machine.
    """
    has_experts = any(family_of(hf_config).experts for hf_config in sizes.models.configs)
    for tp_size in _divisors(min(sizes.ranks, GPUS_PER_NODE)):
        for pp_size in _divisors(sizes.ranks // tp_size) if sizes.ranks % tp_size == 0 else ():
            dp_size = sizes.ranks // tp_size // pp_size
            for ep_size in _divisors(dp_size) if has_experts else (1,):
                layout = {
                    "tensor": tp_size, "pipeline": pp_size, "data": dp_size, "expert": ep_size,
                    "sequence_parallel": tp_size > 1,
                }  # fmt: skip
                ways = [_with(sizes, layout | {"micro_batch_size": micro}, recompute) for micro in _MICRO_SIZES]
                yield [way for way in ways if way is not None]


def _with(sizes: RunSizes, layout: dict[str, int | bool], recompute: bool) -> RunSizes | None:
    """Puts the run in another layout; None where a rule forbids it."""
    tree = sizes.config.model_dump()
    tree["parallel"] |= layout
    tree["student"]["recompute"] = recompute
    try:
        config = build_config(tree)
        for hf_config in sizes.models.configs:
            check_divisible("model", hf_config, config)
    except ConfigError:
        return None
    return RunSizes(config, replace(sizes.models, data_parallel=int(layout["data"])), sizes.shards)


def _differences(before: RunConfig, after: RunConfig) -> dict[str, object]:
    """Lists the overrides: the layout, and what else has changed."""
    always = ("parallel.tensor", "parallel.pipeline", "parallel.data")
    others = ("parallel.expert", "parallel.micro_batch_size", "parallel.sequence_parallel", "student.recompute")
    old, new = before.model_dump(), after.model_dump()

    def value(tree: dict, key: str) -> object:
        section, name = key.split(".")
        return tree[section][name]

    changed = [key for key in others if value(old, key) != value(new, key)]
    return {key: value(new, key) for key in (*always, *changed)}


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
