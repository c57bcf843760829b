"""Process groups: on which backend, and how long a rank waits in them.

torch gives a group that is made without a time-out its own idea of one (10 minutes on NCCL, 30 on gloo), whatever the
group of all ranks has.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

DEFAULT_TIMEOUT = 1800.0
"""Seconds: for ranks to find each other, and in a collective."""


def collective_timeout() -> timedelta:
    """How long a rank waits for the others in a collective: what the group of all ranks was made with."""
    backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    options = getattr(backend, "options", None)  # a pretended group has none
    return getattr(options, "_timeout", timedelta(seconds=DEFAULT_TIMEOUT))


def cpu_group(ranks: Sequence[int] | None = None) -> ProcessGroup:
    """Makes a group for objects and tensors on the CPU. Collective over all ranks."""
    return _new_group(ranks, "gloo")


def model_group(ranks: Sequence[int]) -> ProcessGroup:
    """Makes a group for tensors on the device of the models: on a GPU without the mesh of sockets that gloo would add
    to each. Collective over all ranks."""
    on_gpu = "nccl" in str(dist.get_backend_config())
    return _new_group(ranks, "nccl" if on_gpu else None)


def _new_group(ranks: Sequence[int] | None, backend: str | None) -> ProcessGroup:
    members = None if ranks is None else list(ranks)
    return dist.new_group(members, backend=backend, timeout=collective_timeout())
