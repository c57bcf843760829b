"""The passes over a block of logits, in three backends; see `base.Kernels`."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from opd_megatron.losses.divergences import Divergence
from opd_megatron.losses.kernels.base import Kernels
from opd_megatron.losses.kernels.torch_ops import TorchKernels

BACKENDS = ("auto", "torch", "compiled", "triton")
_chosen = "auto"

# Compiling takes a second or more, once a process and divergence: not for the byte vocabularies of tests.
_WORTH_COMPILING = 2**21


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every loss runs on this backend: for tests and measurements."""
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
    """The fastest backend that can take logits of these types and compute in `dtype`; `elements` is how many there are.

    Without numba (CPU) or Triton (GPU), for float64, and for small calls on a CPU it is plain torch.
    """
    if _chosen == "compiled" or (_chosen == "auto" and _compiled_fits(dtype, device, logits, elements)):
        from opd_megatron.losses.kernels.compiled import CompiledKernels

        return CompiledKernels(divergence, temperature)
    if _chosen == "triton" or (_chosen == "auto" and _triton_fits(dtype, device, logits)):
        from opd_megatron.losses.kernels.triton_ops import TritonKernels

        return TritonKernels(divergence, temperature)
    return TorchKernels(divergence, temperature, dtype, device)


def _compiled_fits(dtype: torch.dtype, device: torch.device, logits: Sequence[torch.dtype], elements: int) -> bool:
    if device.type != "cpu" or dtype != torch.float32 or elements < _WORTH_COMPILING:
        return False
    return all(x in (torch.bfloat16, torch.float32) for x in logits) and _installed("numba")


def _triton_fits(dtype: torch.dtype, device: torch.device, logits: Sequence[torch.dtype]) -> bool:
    if device.type != "cuda" or dtype != torch.float32 or torch.version.hip is not None:
        return False
    return all(x.itemsize <= 4 for x in logits) and _installed("triton")


@functools.cache
def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
