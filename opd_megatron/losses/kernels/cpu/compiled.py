"""The CPU backend: every pass over a row of logits is one loop, compiled by numba for this very processor.

A chain of torch operations reads and writes a buffer per operation and costs more than the matrix products around it.
Here a row is read twice and its gradient written once, in registers in between; a row of 150k bf16 logits stays in
a core's second-level cache meanwhile. Rows are divided among as many threads as torch uses.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from opd_megatron.losses.divergences import Divergence
from opd_megatron.losses.kernels.base import SUMS, Normalisers, Statistics
from opd_megatron.losses.kernels.cpu.loops import loops_of
from opd_megatron.losses.kernels.cpu.loops import statistics as statistics_loop

# Rows are taken in turns of about this many elements: torch's own threads spin for milliseconds after a matrix product,
# and whoever shares a core with one gets less done.
_ELEMENTS_A_TURN = 2**20
# Fewer elements than this a thread are not worth waking it.
_ELEMENTS_A_THREAD = 2**15


class CompiledKernels:
    """See `Kernels`. bf16 or fp32 logits, fp32 arithmetic."""

    block_elements: int | None = None

    def __init__(self, divergence: Divergence, temperature: float) -> None:
        self._loops = loops_of(divergence.value, divergence.weighted_grad)
        self._inverse_temperature, self._parameter = np.float32(1 / temperature), np.float32(divergence.parameter)

    def statistics(self, student: torch.Tensor, teacher: torch.Tensor) -> Statistics:
        result = torch.empty(len(student), 5)
        self._share_out(statistics_loop, student, teacher, result.numpy())
        return Statistics(*result.unbind(1))

    def sums(self, student: torch.Tensor, teacher: torch.Tensor, normalisers: Normalisers) -> torch.Tensor:
        result = torch.empty(len(student), len(SUMS))
        self._share_out(self._loops.sums, student, teacher, self._parameter, _rows(normalisers), result.numpy())
        return result.t()

    def gradient(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        normalisers: Normalisers,
        divergence_coef: torch.Tensor,
        softmax_coef: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        coefs = torch.stack([divergence_coef, softmax_coef], dim=1).float().numpy()
        self._share_out(self._loops.gradient, student, teacher, self._parameter, _rows(normalisers), coefs, *_flat(out))

    def fused(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        divergence_coef: torch.Tensor,
        out: torch.Tensor | None,
        with_metrics: bool = True,
    ) -> tuple[Statistics, torch.Tensor]:
        statistics, sums = torch.empty(len(student), 5), torch.empty(len(student), len(SUMS))
        target = student[:0] if out is None else out
        loop = self._loops.fused if with_metrics else self._loops.without_metrics
        self._share_out(
            loop, student, teacher, self._parameter, statistics.numpy(), sums.numpy(),
            divergence_coef.float().contiguous().numpy(), out is not None, *_flat(target),
        )  # fmt: skip
        return Statistics(*statistics.unbind(1)), sums.t()

    def _share_out(self, loop: Callable[..., None], student: torch.Tensor, teacher: torch.Tensor, *rest: Any) -> None:
        rows, columns = student.shape
        arguments = (*_flat(student), *_flat(teacher), columns, self._inverse_temperature, *rest)
        threads = max(1, min(torch.get_num_threads(), rows, student.numel() // _ELEMENTS_A_THREAD))
        step = max(1, min(rows // threads, _ELEMENTS_A_TURN // columns))
        starts = iter(range(0, rows, step))

        def work() -> None:
            scratch = np.empty((2, columns), np.float32)
            for start in starts:  # shared: whoever is free takes the next rows
                loop(start, min(start + step, rows), *arguments, scratch)

        others: list[Future[None]] = []
        if threads > 1:
            pool = _pool(torch.get_num_threads(), os.getpid())
            others = [pool.submit(work) for _ in range(threads - 1)]
        work()
        for other in others:
            other.result()


@functools.lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads do not survive a fork, so a process has its own."""
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="opd-losses")


def _flat(x: torch.Tensor) -> tuple[np.ndarray, int]:
    """All elements from the first to the last as one contiguous array, and where each row starts.

    Only of an array that is known to be contiguous does the compiler make vector loads.
    """
    stride = x.stride(0) if len(x) > 1 else x.shape[1]
    length = (len(x) - 1) * stride + x.shape[1] if x.numel() else 0
    flat = x.detach().as_strided((length,), (1,))
    return (flat.view(torch.uint16) if x.dtype == torch.bfloat16 else flat).numpy(), stride


def _rows(normalisers: Normalisers) -> np.ndarray:
    """[R, 5]: the four, and the difference of the log sums."""
    shift = normalisers.teacher_log_sum - normalisers.student_log_sum
    return torch.stack([*normalisers, shift], dim=1).float().numpy()
