"""Large buffers on a CPU that are used again and again.

Fresh memory is zeroed page by page by the kernel when it is first written, which for a chunk of logits takes as long as
reading it twice and for d head a tenth of the time of its product. A GPU's caching allocator already keeps its own.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
import weakref

import torch

_MADV_HUGEPAGE = 14
_PAGE, _WORTH_HUGE = 4096, 2**23


class BufferPool:
    """Tensors whose memory comes back by itself when the last of them that uses it is freed.

    Args:
        keep: buffers that are kept while nobody uses them.
        slack: a buffer serves a tensor of at least its size over `slack`; a smaller one gets memory of its own.
    """

    def __init__(self, keep: int, slack: float) -> None:
        self._keep, self._slack = keep, slack
        self._free: list[torch.Tensor] = []
        # Reentrant: a buffer may come back from a garbage collection that the locked lines set off.
        self._lock = threading.RLock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Like `torch.empty`."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if device.type != "cpu" or not size:
            return torch.empty(shape, dtype=dtype, device=device)
        whole = self._take(size)
        if whole is None:
            whole = empty_huge_pages((size,), torch.uint8, device)
        # A tensor made from an array holds it, so the array's end is that of the tensor's memory.
        array = whole.numpy()[:size]
        weakref.finalize(array, self._give_back, whole).atexit = False
        return torch.from_numpy(array).view(dtype).view(shape)

    def release(self) -> None:
        """Returns unused memory to the system."""
        with self._lock:
            self._free.clear()

    def _take(self, size: int) -> torch.Tensor | None:
        with self._lock:
            fits = [i for i, whole in enumerate(self._free) if size <= len(whole) <= size * self._slack]
            return self._free.pop(min(fits, key=lambda i: len(self._free[i]))) if fits else None

    def _give_back(self, whole: torch.Tensor) -> None:
        with self._lock:
            self._free.append(whole)
            del self._free[: -self._keep]  # the oldest; nobody has asked for its size lately


def empty_huge_pages(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
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


chunk_memory = BufferPool(keep=4, slack=4.0)
"""Logits of a chunk of tokens; their number differs from one micro batch to the next."""

gradient_memory = BufferPool(keep=1, slack=1.0)
"""d head, which autograd hands out and which is freed once it has been added to the gradient of the step."""


def release_memory() -> None:
    """Returns the memory that is kept for the next call to the system."""
    chunk_memory.release()
    gradient_memory.release()
