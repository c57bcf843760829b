"""Parts of a parameter along its rows, as a checkpoint stores them whoever holds which span of its elements.

A distributed optimizer cuts its buffers into equal spans of elements, wherever that falls. A row belongs to the rank
that holds its first element, so that a rank writes what it holds but for one row at each end, and the files need no
notion of spans: every piece is a block of whole rows of the full tensor, which any layout can read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

Entry: TypeAlias = ShardedTensor | ShardedTensorFactory


@dataclass(frozen=True, slots=True)
class Spans:
    """Which elements of a flattened parameter each data-parallel rank holds, in the order of ranks; some hold none."""

    spans: list[range]
    shape: torch.Size

    @property
    def row(self) -> int:
        """Elements of a row."""
        return self.shape.numel() // self.shape[0]

    def owned(self, rank: int) -> range:
        """Rows whose first element `rank` holds."""
        span = self.spans[rank]
        return range(-(-span.start // self.row), -(-span.stop // self.row)) if span else range(0)

    def whole(self, rank: int) -> range:
        """Rows that `rank` holds all elements of."""
        owned = self.owned(rank)
        return range(owned.start, max(owned.start, self.spans[rank].stop // self.row)) if owned else owned

    def view_whole(self, rank: int, held: torch.Tensor) -> torch.Tensor:
        """The rows of `whole`, [rows, ...], of what a rank holds, [span]."""
        rows = self.whole(rank)
        first = rows.start * self.row - self.spans[rank].start
        return held[first : first + len(rows) * self.row].view(len(rows), *self.shape[1:])

    def seams(self) -> Iterator[tuple[int, dict[int, range]]]:
        """Yields rows that lie on several ranks, and the elements of the parameter that each of them holds of it; the
        first of these ranks owns it."""
        rows = sorted({span.start // self.row for span in self.spans if span and span.start % self.row})
        for row in rows:
            first, last = row * self.row, (row + 1) * self.row
            parts = {
                rank: range(max(first, span.start), min(last, span.stop))
                for rank, span in enumerate(self.spans)
                if span and max(first, span.start) < min(last, span.stop)
            }
            yield row, parts


def pieces(
    entry: Entry, prefix: str, rows: range, data: torch.Tensor, replica_id: tuple[int, ...] | int
) -> Iterator[ShardedTensor]:
    """Yields blocks of whole rows of the full tensors that an entry stands for; gate and up of a layer are two.

    Args:
        entry: what Megatron says of the whole local parameter.
        prefix: of the key.
        rows: of the local parameter.
        data: these rows, [len(rows), ...]; blocks are views of it.
    """
    first = 0
    for part in _parts(entry):
        low, high = max(rows.start, first), min(rows.stop, first + part.local_shape[0])
        if low < high:
            block = data[low - rows.start : high - rows.start]
            ahead = part.prepend_axis_num
            offset = list(part.global_offset)
            offset[ahead] += low - first
            shape = (*[1] * ahead, *block.shape)
            # Without a grid: blocks of one tensor are of different sizes.
            yield ShardedTensor(
                prefix + part.key, block.view(shape), data.dtype, shape, part.global_shape, tuple(offset), None,
                replica_id, 0, part.allow_shape_mismatch,
            )  # fmt: skip
        first += part.local_shape[0]


def _parts(entry: Entry) -> list[ShardedTensor]:
    """The full tensors along an entry's rows, without data."""
    if isinstance(entry, ShardedTensor):
        return [entry]
    outline = torch.empty(entry.data.shape, dtype=entry.data.dtype, device="meta")
    return list(nested_values(entry.build_fn(entry.key, outline, entry.replica_id, None)))
