"""`dtype: auto`, decided: bf16 where the processor has units for it, fp32 elsewhere, and what the run has once kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd_megatron.config.run import RunConfig
from opd_megatron.config.sections import Dtype, Precision
from opd_megatron.config.teachers import MegatronTeacherConfig
from opd_megatron.system.processor import FP32_IS_FASTER, Processor, processor


def decided(precision: Precision) -> Dtype:
    """Returns the dtype of a configuration that went through `decide_precision`."""
    assert precision != "auto", "decide_precision comes first"
    return precision


def decide_precision(
    config: RunConfig, kept: Mapping[str, Any] | None = None, machine: Processor | None = None
) -> tuple[RunConfig, list[str]]:
    """Replaces every `auto` by a dtype; returns the new configuration and the lines that tell why.

    Args:
        kept: the resolved configuration of the run that is continued, as read from its config.yaml. What was decided
            then stays, on whatever machine: another precision would be another run.
        machine: where the run will be; this machine by default.
    """
    machine = machine or processor()
    best: Dtype = "fp32" if machine.bf16 is None else "bf16"
    config = config.model_copy(deep=True)
    lines = []
    if config.student.dtype == "auto":
        before = _kept(kept, "student")
        config.student.dtype = before or best
        why = "as when the run began" if before else machine.reason
        lines.append(f"precision {config.student.dtype}: {why}")
    for index, teacher in enumerate(config.teachers):
        if isinstance(teacher, MegatronTeacherConfig) and teacher.dtype == "auto":
            teacher.dtype = _kept(kept, "teachers", index) or best
    if config.rollout.dtype == "auto":
        config.rollout.dtype = config.student.dtype
    lines.extend(_warnings(config, machine))
    return config, lines


def take_precision(config: RunConfig, others: RunConfig) -> RunConfig:
    """Returns `config` with the dtypes of another configuration of the same run."""
    config = config.model_copy(deep=True)
    config.student.dtype, config.rollout.dtype = others.student.dtype, others.rollout.dtype
    for mine, other in zip(config.teachers, others.teachers, strict=True):
        if isinstance(mine, MegatronTeacherConfig) and isinstance(other, MegatronTeacherConfig):
            mine.dtype = other.dtype
    return config


def _kept(tree: Mapping[str, Any] | None, *path: str | int) -> Dtype | None:
    node: Any = tree
    for part in path:
        inside = isinstance(node, list) and isinstance(part, int) and part < len(node)
        node = node[part] if inside else node.get(part) if isinstance(node, Mapping) else None
    value = node.get("dtype") if isinstance(node, Mapping) else None
    return value if value in ("bf16", "fp32") else None


def _warnings(config: RunConfig, machine: Processor) -> list[str]:
    slow = {
        "student.dtype": config.student.dtype,
        **{f"teachers.{i}.dtype": getattr(teacher, "dtype", None) for i, teacher in enumerate(config.teachers)},
        "rollout.dtype": config.rollout.dtype,
    }
    keys = [key for key, value in slow.items() if value == "bf16"]
    if machine.bf16 is not None or not keys:
        return []
    return [
        f"warning: {' and '.join(keys)} bf16, but {machine.reason}: fp32 is {FP32_IS_FASTER} as fast here and learns "
        "as well"
    ]
