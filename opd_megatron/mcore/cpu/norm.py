"""RMSNorm in few passes over memory, for machines without Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, in fp32, returned in x's dtype (arXiv 1910.07467).

    May run under sequence parallelism, which the stock wrapper refuses: the weight is marked, so that
    `finalize_model_grads` sums its gradient over the tensor-parallel ranks, each of which saw a slice of the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        weight: Any = torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = torch.nn.Parameter(weight)
        marked: Any = self.weight
        marked.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., h] -> [..., h]."""
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps x in its own dtype and one number a row. torch's composite operator keeps fp32 copies of x and, on a CPU,
    takes more than twice as long."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        normed = x.to(torch.float32, copy=True)
        norm = torch.linalg.vector_norm(normed, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return normed.mul_(inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """With n = x * inverse and g = dL/dn: dL/dx = inverse * (g - n * mean(g * n))."""
        x, weight, inverse = ctx.saved_tensors
        size = x.shape[-1]
        normed = x.to(torch.float32, copy=True).mul_(inverse)
        gradient = grad_outputs[0].to(torch.float32, copy=True)
        product = (gradient * normed).reshape(-1, size)
        scale = weight.float()
        mean = (product @ scale).div_(size).view(inverse.shape)
        d_weight = product.sum(0).to(weight.dtype)
        d_x = gradient.mul_(scale).sub_(normed.mul_(mean)).mul_(inverse)
        return d_x.to(x.dtype), d_weight, None
