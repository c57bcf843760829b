"""Which positions of a packed row each context-parallel rank holds.

Every sequence is cut into 2 C chunks for C ranks, and rank r holds chunks r and 2 C - 1 - r of every one: a late chunk
attends to much and an early one to little, so that all ranks have equal work. Megatron-Core and Transformer Engine cut
sequences the same way. Lengths are whole ones, multiples of 2 C.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def context_columns(lengths: Sequence[int], rank: int, ranks: int) -> torch.Tensor:
    """Columns of the whole row that a rank holds, in its own order: [sum(lengths) / ranks] int64."""
    parts, start = [], 0
    for length in lengths:
        chunk, rest = divmod(length, 2 * ranks)
        assert rest == 0, f"a sequence of {length} tokens is not cut into 2 * {ranks} chunks"
        parts += [
            torch.arange(start + number * chunk, start + (number + 1) * chunk)
            for number in (rank, 2 * ranks - 1 - rank)
        ]
        start += length
    return torch.cat(parts)


def natural_order(lengths: Sequence[int], ranks: int) -> torch.Tensor:
    """Where each column of the whole row is when the ranks' columns follow each other: [sum(lengths)] int64."""
    return torch.cat([context_columns(lengths, rank, ranks) for rank in range(ranks)]).argsort()


def local_rows(mask: torch.Tensor, lengths: Sequence[int], rank: int, ranks: int) -> torch.Tensor:
    """Which of the rows [T, ..] in the order of `mask.nonzero()`, of the whole row [1, S], a rank holds: [T / C] int64
    or so, in the order of its own columns."""
    columns = context_columns(lengths, rank, ranks).to(mask.device)
    places = mask[0].cumsum(0) - 1
    return places[columns][mask[0, columns]]
