"""The matrix products around a chunk of logits, and the memory that a chunk's logits live in."""

from __future__ import annotations

import ctypes
import functools
import sys
import threading

import torch

# oneDNN 3.12 runs a tall bf16 product of these widths at half its speed, and pieces of up to 320 columns at all of it
# (1024 x 49152 by 576: 59 ms whole, 35 ms in halves, on two cores with AMX). Others are best whole.
_SLOW_WIDTHS, _PIECE, _TALL = range(321, 960), 320, 320

# Vocabulary rows of d head that are added to the fp32 sum at a time.
_HEAD_ROWS = 4096


def times_head(gradient: torch.Tensor, head: torch.Tensor, out: torch.Tensor) -> None:
    """out [T, h] = gradient [T, n] head [n, h]."""
    width = head.shape[1]
    if head.device.type == "cpu" and head.dtype == torch.bfloat16 and width in _SLOW_WIDTHS and len(gradient) > _TALL:
        step = -(-width // (-(-width // _PIECE)))  # equal pieces
        for start in range(0, width, step):
            piece = slice(start, start + step)
            torch.mm(gradient, head[:, piece], out=out[:, piece])
    else:
        torch.mm(gradient, head, out=out)


def add_outer(total: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor, first: bool) -> None:
    """total [n, h] (+)= gradient^T [n, T] hidden [T, h]; added in fp32 or wider."""
    if first and total.dtype == hidden.dtype:
        torch.mm(gradient.t(), hidden, out=total)
        return
    if hidden.element_size() >= 4:
        total.addmm_(gradient.t(), hidden)
        return
    # In pieces: no copy of the whole, and conversions stay in the cache.
    for start in range(0, len(total), _HEAD_ROWS):
        rows = slice(start, start + _HEAD_ROWS)
        part = torch.mm(gradient[:, rows].t(), hidden)
        total[rows].copy_(part if first else part.float().add_(total[rows].float()))


_MADV_HUGEPAGE = 14
_PAGE, _WORTH_HUGE = 4096, 2**23


def large_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory; on a Linux CPU in huge pages, a third as slow to write first (56 MiB: 4 against 12 ms)."""
    result = torch.empty(shape, dtype=dtype, device=device)
    size = result.numel() * result.element_size()
    if device.type == "cpu" and size >= _WORTH_HUGE and sys.platform == "linux":
        start = -(-result.data_ptr() // _PAGE) * _PAGE
        length = (result.data_ptr() + size - start) // _PAGE * _PAGE
        # Advice only: a kernel without huge pages refuses, and nothing is lost.
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return result


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


class ChunkMemory:
    """Lends the buffers of a chunk's logits. On a CPU they are kept for the next call.

    Fresh memory is zeroed page by page by the kernel, which takes as long as reading the logits twice; a GPU's caching
    allocator already keeps its own.
    """

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []
        self._lock = threading.Lock()

    def borrow(self, shape: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
        """An uninitialised [rows, columns] buffer of the dtype and device of `like`."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        size = shape[0] * shape[1] * like.element_size()
        with self._lock:
            fits = [i for i, buffer in enumerate(self._free) if len(buffer) >= size]
            buffer = self._free.pop(min(fits, key=lambda i: len(self._free[i]))) if fits else None
        if buffer is None:
            with self._lock:
                self._free.clear()  # too small for what is wanted now
            buffer = large_empty((size,), torch.uint8, like.device)
        return buffer[:size].view(like.dtype).view(shape)

    def give_back(self, matrix: torch.Tensor) -> None:
        if matrix.device.type == "cpu":
            whole = torch.empty(0, dtype=torch.uint8).set_(matrix.untyped_storage())
            with self._lock:
                self._free.append(whole)

    def release(self) -> None:
        """Gives the memory back to the system."""
        with self._lock:
            self._free.clear()


chunk_memory = ChunkMemory()
