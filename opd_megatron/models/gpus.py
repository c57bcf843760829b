"""Published specifications of a few GPUs: NVIDIA's data sheets of the SXM and DGX forms."""

from __future__ import annotations

from dataclasses import dataclass

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU in a machine of eight."""

    name: str
    bf16_flops: float
    """A second, dense."""
    memory_bytes: float
    """That its driver reports."""
    memory_bandwidth: float
    """Bytes a second."""
    nvlink: float
    """Bytes a second to the other GPUs of the machine, one direction."""
    network: float
    """Bytes a second to other machines, one network card a GPU."""
    fp8_flops: float = 0.0
    """A second, dense; 0 for a GPU without FP8."""
    capability: tuple[int, int] = (9, 0)
    """CUDA compute capability."""
    sequences_at_once: int = 1024
    """That vLLM 0.32 samples together unless told otherwise."""


GPUS_PER_NODE = 8
FP8_CAPABILITY = {"tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0), "delayed": (8, 9)}
"""Compute capability that Transformer Engine's FP8 recipes need."""
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-80G", 312e12, 80 * _GIB, 2.039e12, 300e9, 25e9, capability=(8, 0), sequences_at_once=256),
        Gpu("H100", 989e12, 79.6 * _GIB, 3.35e12, 450e9, 50e9, 1979e12),
        Gpu("H200", 989e12, 140.4 * _GIB, 4.8e12, 450e9, 50e9, 1979e12),
        Gpu("B200", 2250e12, 179 * _GIB, 8e12, 900e9, 50e9, 4500e12, (10, 0)),
    )
}
