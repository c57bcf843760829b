"""Whether student and engines take turns with the memory of their GPUs."""

from __future__ import annotations

from opd_megatron.config import RunConfig


def sleeps(config: RunConfig, *, on_gpu: bool) -> bool:
    """Whether engines give their memory back while the student trains: on GPUs that they share with it, unless they
    sample then too (`rollout.steps_ahead`)."""
    rollout = config.rollout
    return on_gpu and rollout.sleep and rollout.placement == "student" and rollout.steps_ahead == 0
