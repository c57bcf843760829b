"""The passes over a block of logits, in three backends; see `base.Kernels`.

torch/    plain torch, on any device and in float64
cpu/      loops compiled for the processor (numba)
triton/   GPU kernels
"""

from opd_megatron.losses.kernels.choose import choose_kernels, use_backend

__all__ = ["choose_kernels", "use_backend"]
