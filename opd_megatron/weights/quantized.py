"""Weights that are kept in FP8 (Transformer Engine's quantized tensors): filled whole, read dequantized.

A view of such a tensor is a copy, or has a scale of its own, so that nothing can be written through it; and its
optimizer takes the fp32 main weights not from it but from what it was made of.
"""

from __future__ import annotations

from typing import Any

import torch


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether its numbers are not what it stores."""
    return hasattr(tensor, "quantize_")


def dequantized(tensor: torch.Tensor) -> torch.Tensor:
    """Its numbers, in the dtype that it stands for; the tensor itself where it is not quantized."""
    if not is_quantized(tensor):
        return tensor
    values: torch.Tensor = tensor.detach().dequantize()
    return values.to(tensor.dtype)


def staging(tensor: torch.Tensor) -> torch.Tensor:
    """Where a parameter's numbers are put before `take`: itself, or for a quantized one memory for all of them."""
    if not is_quantized(tensor):
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def take(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Gives a parameter the numbers of its `staging`, and lets an optimizer that is made later begin with them."""
    if not is_quantized(parameter):
        return
    quantized: Any = parameter
    quantized.quantize_(values)
    quantized.get_high_precision_init_val = lambda: values
    quantized.clear_high_precision_init_val = lambda: _forget(quantized)


def forget_origin(parameter: torch.Tensor) -> None:
    """Frees what `take` keeps for an optimizer, where there will be none."""
    if is_quantized(parameter):
        _forget(parameter)


def _forget(parameter: Any) -> None:
    for name in ("get_high_precision_init_val", "clear_high_precision_init_val"):
        if name in vars(parameter):
            delattr(parameter, name)
