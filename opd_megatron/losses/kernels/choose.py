"""Which backend computes a block of logits."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from opd_megatron.losses.divergences import Divergence
from opd_megatron.losses.kernels.base import Kernels
from opd_megatron.losses.kernels.torch.ops import TorchKernels

BACKENDS = ("auto", "torch", "compiled", "triton")
_chosen = "auto"

# Compiling takes a second or more, once a process and divergence: not for the byte vocabularies of tests.
_WORTH_COMPILING = 2**21


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every loss in the block on `backend` where it can take it: for tests and measurements."""
    global _chosen
    assert name in BACKENDS
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def choose_kernels(
    divergence: Divergence,
    temperature: float,
    dtype: torch.dtype,
    device: torch.device,
    logits: Sequence[torch.dtype],
    elements: int,
) -> Kernels:
    """Chooses the fastest backend that can take logits of these types and compute in `dtype`; `elements` is how many
    there are.

    Without numba (CPU) or Triton (GPU), for float64, and for small calls on a CPU it is plain torch.
    """
    narrow = dtype == torch.float32 and all(x.itemsize <= 4 for x in logits)
    worth_it = elements >= _WORTH_COMPILING or _chosen == "compiled"
    if narrow and worth_it and _compiled_fits(device, logits):
        from opd_megatron.losses.kernels.cpu.compiled import CompiledKernels

        return CompiledKernels(divergence, temperature)
    if narrow and _triton_fits(device):
        from opd_megatron.losses.kernels.triton.ops import TritonKernels

        return TritonKernels(divergence, temperature)
    return TorchKernels(divergence, temperature, dtype, device)


def _compiled_fits(device: torch.device, logits: Sequence[torch.dtype]) -> bool:
    known = all(x in (torch.bfloat16, torch.float32) for x in logits)
    return device.type == "cpu" and known and _chosen in ("auto", "compiled") and _installed("numba")


def _triton_fits(device: torch.device) -> bool:
    if _chosen == "triton":  # on a CPU under Triton's interpreter
        return True
    return device.type == "cuda" and torch.version.hip is None and _chosen == "auto" and _installed("triton")


@functools.cache
def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
