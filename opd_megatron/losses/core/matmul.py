"""The matrix products around a chunk of logits."""

from __future__ import annotations

import torch

# oneDNN 3.12 runs a tall bf16 product of these widths at half its speed, and pieces of up to 320 columns at all of it
# (1024 x 49152 by 576: 59 ms whole, 35 ms in halves, on two cores with AMX). Others are best whole.
_SLOW_WIDTHS, _PIECE, _TALL = range(321, 960), 320, 320

# Vocabulary rows of d head that are added to the fp32 sum at a time.
HEAD_ROWS = 4096


def times_head(gradient: torch.Tensor, head: torch.Tensor, out: torch.Tensor) -> None:
    """Computes out [T, h] = gradient [T, n] head [n, h]."""
    width = head.shape[1]
    if head.device.type == "cpu" and head.dtype == torch.bfloat16 and width in _SLOW_WIDTHS and len(gradient) > _TALL:
        step = -(-width // (-(-width // _PIECE)))  # equal pieces
        for start in range(0, width, step):
            piece = slice(start, start + step)
            torch.mm(gradient, head[:, piece], out=out[:, piece])
    else:
        torch.mm(gradient, head, out=out)


def add_outer(total: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor, first: bool) -> None:
    """Computes total [n, h] (+)= gradient^T [n, T] hidden [T, h], added in fp32 or wider."""
    if first and total.dtype == hidden.dtype:
        torch.mm(gradient.t(), hidden, out=total)
        return
    if hidden.element_size() >= 4:
        total.addmm_(gradient.t(), hidden)
        return
    # In pieces: no copy of the whole, and conversions stay in the cache.
    for start in range(0, len(total), HEAD_ROWS):
        rows = slice(start, start + HEAD_ROWS)
        columns = gradient[:, rows].t()
        # A GPU need not round the product before it is added.
        part = torch.mm(columns, hidden, torch.float32) if hidden.is_cuda else torch.mm(columns, hidden)
        if first:
            total[rows].copy_(part)
        elif total.dtype == torch.float32:
            total[rows].add_(part)
        else:
            total[rows].copy_(part.float().add_(total[rows].float()))
