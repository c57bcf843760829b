"""The GPU that a plan is for, by name."""

from __future__ import annotations

from opd_megatron.errors import ConfigError
from opd_megatron.models.gpus import GPUS, GPUS_PER_NODE, Gpu

__all__ = ["GPUS", "GPUS_PER_NODE", "Gpu", "gpu_named"]


def gpu_named(name: str) -> Gpu:
    """Looks a GPU up by name. Raises ConfigError for one that is not in the table."""
    found = {known.lower(): gpu for known, gpu in GPUS.items()}.get(name.lower())
    if found is None:
        raise ConfigError(f"--gpu {name!r} is not in the table: use one of {', '.join(GPUS)}")
    return found
