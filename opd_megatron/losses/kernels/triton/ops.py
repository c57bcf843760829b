"""The GPU backend: Triton kernels that read a row of logits from memory once and write its gradient once.

`fused` is one launch in which a program owns a row: its second and third pass over it are served by the caches.
With a tensor-parallel group in between, the three passes are kernels of their own.

One program per row takes about 0.1 ms for 150k columns; splitting a row would cost as much in extra launches. Block
sizes depend only on the width of the logits, so no call stops to tune itself, and equal rows give equal bits in any
batch.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from opd_megatron.losses.divergences import Divergence
from opd_megatron.losses.kernels.base import SUMS, Normalisers, Statistics

_STATISTICS = len(Statistics._fields)


class TritonKernels:
    """See `Kernels`. bf16, fp16 or fp32 logits on a GPU, fp32 arithmetic, fp32 results."""

    block_elements: int | None = None

    def __init__(self, divergence: Divergence, temperature: float) -> None:
        self._code = _code(divergence)
        self._inverse = 1 / temperature

    def statistics(self, student: torch.Tensor, teacher: torch.Tensor) -> Statistics:
        result = _results(_STATISTICS, student)
        self._run(self._code.statistics, student, (*_flat(student), *_flat(teacher), result))
        return Statistics(*result)

    def sums(self, student: torch.Tensor, teacher: torch.Tensor, normalisers: Normalisers) -> torch.Tensor:
        result = _results(len(SUMS), student)
        self._run(self._code.sums, student, (*_flat(student), *_flat(teacher), _stacked(normalisers), result))
        return result

    def gradient(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        normalisers: Normalisers,
        divergence_coef: torch.Tensor,
        softmax_coef: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        coefs = _stacked((divergence_coef, softmax_coef))
        arguments = (*_flat(student), *_flat(teacher), _stacked(normalisers), coefs, *_flat(out))
        self._run(self._code.gradient, student, arguments)

    def fused(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        divergence_coef: torch.Tensor,
        out: torch.Tensor | None,
        with_metrics: bool = True,
    ) -> tuple[Statistics, torch.Tensor]:
        result = _results(_STATISTICS + len(SUMS), student)
        code = self._code.values if out is None else self._code.fused
        target = student if out is None else out
        scales = divergence_coef.float().contiguous()
        self._run(code, student, (*_flat(student), *_flat(teacher), scales, *_flat(target), result))
        return Statistics(*result[:_STATISTICS]), result[_STATISTICS:]

    def _run(self, code: tuple[Any, dict[str, Any]], student: torch.Tensor, arguments: tuple[Any, ...]) -> None:
        kernel, constants = code
        rows, columns = student.shape
        warps = _warps(columns)
        with torch.cuda.device_of(student):  # Triton launches on the current device, whatever it is given
            kernel[(rows,)](
                *arguments, rows, columns, self._inverse, **constants, lanes=warps * _THREADS, num_warps=warps
            )


_THREADS = 32
"""Threads of a warp, each with one line of a tile."""


def _warps(columns: int) -> int:
    """How many warps work on a row: about ten tiles, so that little of the last one is empty.

    At 64 registers a thread, which is what the kernels come to, a multiprocessor holds 32 warps. The fewer rows share
    them, the more of each row the caches still hold when it is read again: 152k columns of two models in bf16 are
    0.6 MB, and 132 multiprocessors share a second-level cache of 50 MB.
    """
    return max(4, min(32, 1 << (columns // 2048).bit_length()))


def _flat(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    assert x.stride(1) == 1 or x.shape[1] == 1
    return x, x.stride(0)


def _results(count: int, student: torch.Tensor) -> torch.Tensor:
    return torch.empty(count, len(student), dtype=torch.float32, device=student.device)


def _stacked(values: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.stack([x.float() for x in values])


class _Code(NamedTuple):
    """Each kernel with its constants: functions and parameter of one divergence."""

    statistics: tuple[Any, dict[str, Any]]
    sums: tuple[Any, dict[str, Any]]
    gradient: tuple[Any, dict[str, Any]]
    fused: tuple[Any, dict[str, Any]]
    values: tuple[Any, dict[str, Any]]
    """`fused` without a gradient."""


@functools.lru_cache(maxsize=64)
def _code(divergence: Divergence) -> _Code:
    from opd_megatron.losses.kernels.triton import kernels as kernels

    weighted_grad = {"weighted_grad": kernels.in_triton(divergence.weighted_grad), "parameter": divergence.parameter}
    both = {"value": kernels.in_triton(divergence.value), **weighted_grad}
    return _Code(
        (kernels.statistics_kernel, {}),
        (kernels.sums_kernel, both),
        (kernels.gradient_kernel, weighted_grad),
        (kernels.fused_kernel, {**both, "write": True}),
        (kernels.fused_kernel, {**both, "write": False}),
    )
