"""Whether student and engines take turns with the memory of their GPUs."""

from __future__ import annotations

from opd_megatron.config import RunConfig


def sleeps(config: RunConfig, *, on_gpu: bool) -> bool:
    """Whether engines give their memory back while the student trains. On a CPU they have nothing to give."""
    return on_gpu and config.takes_turns
