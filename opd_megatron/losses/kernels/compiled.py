"""The CPU backend: every pass over a row of logits is one loop, compiled by numba for this very processor.

A chain of torch operations reads and writes a buffer per operation and costs more than the matrix products around it.
Here a row is read twice and its gradient written once, in registers in between; a row of 150k bf16 logits stays in
a core's second-level cache meanwhile. Rows are shared out over as many threads as torch uses.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import FunctionType, SimpleNamespace
from typing import Any

import llvmlite.binding as llvm
import numba.core.config
import numpy as np
import torch
from numba import njit

from opd_megatron.losses.divergences import Divergence
from opd_megatron.losses.elementwise import NAMES, rebind
from opd_megatron.losses.kernels import scalar
from opd_megatron.losses.kernels.base import LOG_ZERO, SUMS, Normalisers, Statistics
from opd_megatron.losses.kernels.scalar import exp, larger, load, prefetch, rounded

DTYPES = (torch.bfloat16, torch.float32)

# By the processor's name LLVM prefers vectors of 256 bits on every Xeon; the loops here gain a third from 512. Numba
# reads these once, when it first compiles.
if llvm.get_host_cpu_features().get("avx512f") and numba.core.config.CPU_NAME is None:
    numba.core.config.CPU_NAME = "generic"
    numba.core.config.CPU_FEATURES = llvm.get_host_cpu_features().flatten()

# Columns summed in fp32 before the sum goes on in float64.
_TILE = 4096
# Fewer elements than this a thread are not worth waking it.
_ELEMENTS_A_THREAD = 2**15

_f = np.float32
_LOWEST = _f(LOG_ZERO)
_ZERO = _f(0)

# Sums may be reordered into vector lanes, elements (`scalar`) may not be rearranged.
_loop = njit(fastmath={"reassoc", "contract", "nsz"}, error_model="numpy", nogil=True)


class CompiledKernels:
    """See `Kernels`. bf16 or fp32 logits, fp32 arithmetic."""

    block_elements: int | None = None

    def __init__(self, divergence: Divergence, temperature: float) -> None:
        self._loops = _loops(divergence)
        self._scale = _f(1 / temperature)

    def statistics(self, student: torch.Tensor, teacher: torch.Tensor) -> Statistics:
        result = torch.empty(len(student), 5)
        self._share_out(self._loops.statistics, student, teacher, result.numpy())
        return Statistics(*result.unbind(1))

    def sums(self, student: torch.Tensor, teacher: torch.Tensor, normalisers: Normalisers) -> torch.Tensor:
        result = torch.empty(len(student), len(SUMS))
        self._share_out(self._loops.sums, student, teacher, _rows(normalisers), result.numpy())
        return result.t()

    def gradient(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        normalisers: Normalisers,
        scale: torch.Tensor,
        shared: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        factors = torch.stack([scale, shared], dim=1).float().numpy()
        self._share_out(self._loops.gradient, student, teacher, _rows(normalisers), factors, *_flat(out))

    def everything(
        self, student: torch.Tensor, teacher: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None
    ) -> tuple[Statistics, torch.Tensor]:
        statistics, sums = torch.empty(len(student), 5), torch.empty(len(student), len(SUMS))
        target = student[:0] if out is None else out
        self._share_out(
            self._loops.everything, student, teacher, statistics.numpy(), sums.numpy(),
            scale.float().contiguous().numpy(), out is not None, *_flat(target),
        )  # fmt: skip
        return Statistics(*statistics.unbind(1)), sums.t()

    def _share_out(self, loop: Callable[..., None], student: torch.Tensor, teacher: torch.Tensor, *rest: Any) -> None:
        rows, columns = student.shape
        arguments = (*_flat(student), *_flat(teacher), columns, self._scale, *rest)
        threads = max(1, min(torch.get_num_threads(), rows, student.numel() // _ELEMENTS_A_THREAD))
        bounds = [rows * i // threads for i in range(threads + 1)]
        others: list[Future[None]] = []
        if threads > 1:
            submit = _pool(torch.get_num_threads(), os.getpid()).submit
            others = [submit(loop, bounds[i], bounds[i + 1], *arguments) for i in range(1, threads)]
        loop(0, bounds[1], *arguments)
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
    return torch.stack(list(normalisers), dim=1).float().numpy()


@_loop
def _largest(x, scale):  # type: ignore[no-untyped-def]
    result = _LOWEST
    for j in range(x.shape[0]):
        result = larger(result, load(x[j]))
    return result * scale


@_loop
def _sum_of_exp(x, scale, top):  # type: ignore[no-untyped-def]
    result = _ZERO
    for j in range(x.shape[0]):
        result += exp(larger(load(x[j]), _LOWEST) * scale - top)
    return result


@_loop
def _keep_exp(x, scale, top, kept):  # type: ignore[no-untyped-def]
    """The same, which leaves the exponentials in `kept`."""
    result = _ZERO
    for j in range(x.shape[0]):
        value = exp(larger(load(x[j]), _LOWEST) * scale - top)
        kept[j] = value
        result += value
    return result


@_loop
def _max_and_sum(x, scale, kept, tops):  # type: ignore[no-untyped-def]
    """Largest logit, sum of exp(logit - largest), and where the tile with the first largest one starts.

    With a `kept` as long as the row, that row's exponentials are left there, each less the `tops` of its tile.
    """
    top, total, place = _LOWEST * scale, 0.0, 0
    for k in range((x.shape[0] + _TILE - 1) // _TILE):
        start = k * _TILE
        tile = x[start : start + _TILE]
        here = _largest(tile, scale)
        if here > top:
            total *= exp(top - here)
            top, place = here, start
        if kept.shape[0]:
            total += _keep_exp(tile, scale, top, kept[start : start + _TILE])
            tops[k] = top
        else:
            total += _sum_of_exp(tile, scale, top)
    return top, total, place


@_loop
def _statistics_of_row(s, t, scale, kept_s, kept_t, tops, result):  # type: ignore[no-untyped-def]
    """The fields of `Statistics`."""
    top, total, place = _max_and_sum(s, scale, kept_s, tops[0])
    for j in range(place, s.shape[0]):
        if load(s[j]) * scale == top:
            place = j
            break
    result[0], result[1] = top, total
    result[4] = larger(load(t[place]), _LOWEST) * scale
    top, total, place = _max_and_sum(t, scale, kept_t, tops[1])
    result[2], result[3] = top, total


@_loop
def _store(out, p, pull, scale, shared):  # type: ignore[no-untyped-def]
    for j in range(out.shape[0]):
        out[j] = rounded(scale * pull[j] - shared * p[j], out[j])


@_loop
def _fetch(x, start, count):  # type: ignore[no-untyped-def]
    """Brings a tile of the next row nearer while this one is worked on."""
    for j in range(start, start + count, 64 // x.itemsize):
        prefetch(x, j)


@_loop
def _store_zeros(out):  # type: ignore[no-untyped-def]
    for j in range(out.shape[0]):
        out[j] = rounded(_ZERO, out[j])


@_loop
def _add(total, reverse, forward, of_student, of_teacher, value, pulls):  # type: ignore[no-untyped-def]
    total[0] += reverse
    total[1] -= forward
    total[2] -= of_student
    total[3] -= of_teacher
    total[4] += value
    total[5] += pulls


@_loop
def _log_sum(statistics, norm):  # type: ignore[no-untyped-def]
    norm[0], norm[1] = statistics[0], np.log(statistics[1])
    norm[2], norm[3] = statistics[2], np.log(statistics[3])


def _in_single(function: FunctionType) -> Any:
    """Compiled with its literals in fp32: a Python float would carry the whole expression into float64."""
    code = function.__code__
    literals = tuple(_f(x) if isinstance(x, float) else x for x in code.co_consts)
    function.__code__ = code.replace(co_consts=literals)
    return scalar.scalar(function)


@functools.lru_cache(maxsize=64)
def _loops(divergence: Divergence) -> SimpleNamespace:
    """The loops over rows of one divergence. Each is compiled when it is first called (about a second)."""
    names = {name: getattr(scalar, name) for name in NAMES}
    value_of, pull_of = (rebind(f, names, _in_single) for f in (divergence.value, divergence.pull))
    parameter = _f(divergence.parameter)

    @_loop
    def add_sums(s, t, scale, norm, total):  # type: ignore[no-untyped-def]
        """Adds the sums over one tile."""
        reverse = forward = of_student = of_teacher = value = pulls = _ZERO
        s_max, s_log, t_max, t_log = norm[0], norm[1], norm[2], norm[3]
        for j in range(s.shape[0]):
            log_p = larger(load(s[j]), _LOWEST) * scale - s_max - s_log
            log_q = larger(load(t[j]), _LOWEST) * scale - t_max - t_log
            p, q = exp(log_p), exp(log_q)
            r, difference = log_p - log_q, q - p
            reverse += p * r + difference
            forward += q * r + difference
            of_student += p * log_p
            of_teacher += q * log_q
            value += value_of(p, q, r, parameter)
            pulls += pull_of(p, q, r, parameter)
        _add(total, reverse, forward, of_student, of_teacher, value, pulls)

    @_loop
    def add_sums_kept(s, t, scale, norm, p_of, q_of, p_factor, q_factor, total):  # type: ignore[no-untyped-def]
        """The same where p_of and q_of times their factors are p and q; overwrites q_of by the pull."""
        reverse = forward = of_student = of_teacher = value = pulls = _ZERO
        s_max, s_log, t_max, t_log = norm[0], norm[1], norm[2], norm[3]
        for j in range(s.shape[0]):
            log_p = larger(load(s[j]), _LOWEST) * scale - s_max - s_log
            log_q = larger(load(t[j]), _LOWEST) * scale - t_max - t_log
            p, q = p_of[j] * p_factor, q_of[j] * q_factor
            r, difference = log_p - log_q, q - p
            reverse += p * r + difference
            forward += q * r + difference
            of_student += p * log_p
            of_teacher += q * log_q
            value += value_of(p, q, r, parameter)
            pull = pull_of(p, q, r, parameter)
            pulls += pull
            q_of[j] = pull
        _add(total, reverse, forward, of_student, of_teacher, value, pulls)

    @_loop
    def store_gradient(s, t, scale, norm, factors, out):  # type: ignore[no-untyped-def]
        s_max, s_log, t_max, t_log = norm[0], norm[1], norm[2], norm[3]
        of_pull, of_p = factors[0], factors[1]
        for j in range(s.shape[0]):
            log_p = larger(load(s[j]), _LOWEST) * scale - s_max - s_log
            log_q = larger(load(t[j]), _LOWEST) * scale - t_max - t_log
            p = exp(log_p)
            pull = pull_of(p, exp(log_q), log_p - log_q, parameter)
            out[j] = rounded(of_pull * pull - of_p * p, out[j])

    @_loop
    def statistics(lo, hi, s, s_step, t, t_step, columns, scale, result):  # type: ignore[no-untyped-def]
        none, tops = np.empty(0, np.float32), np.empty((2, 0), np.float32)
        for i in range(lo, hi):
            a, b = s[i * s_step : i * s_step + columns], t[i * t_step : i * t_step + columns]
            _statistics_of_row(a, b, scale, none, none, tops, result[i])

    @_loop
    def sums(lo, hi, s, s_step, t, t_step, columns, scale, norms, result):  # type: ignore[no-untyped-def]
        for i in range(lo, hi):
            a, b = s[i * s_step : i * s_step + columns], t[i * t_step : i * t_step + columns]
            total = np.zeros(6)
            for k in range(0, columns, _TILE):
                add_sums(a[k : k + _TILE], b[k : k + _TILE], scale, norms[i], total)
            result[i] = total

    @_loop
    def gradient(lo, hi, s, s_step, t, t_step, columns, scale, norms, factors, out, out_step):  # type: ignore[no-untyped-def]
        for i in range(lo, hi):
            a, b = s[i * s_step : i * s_step + columns], t[i * t_step : i * t_step + columns]
            target = out[i * out_step : i * out_step + columns]
            if factors[i, 0] == _ZERO and factors[i, 1] == _ZERO:
                _store_zeros(target)
            else:
                store_gradient(a, b, scale, norms[i], factors[i], target)

    @_loop
    def everything(lo, hi, s, s_step, t, t_step, columns, scale, stats, result, weights, wanted, out, out_step):  # type: ignore[no-untyped-def]
        of_s, of_t = np.empty(columns, np.float32), np.empty(columns, np.float32)
        tops = np.empty((2, (columns + _TILE - 1) // _TILE), np.float32)
        norm = np.empty(4, np.float32)
        for i in range(lo, hi):
            a, b = s[i * s_step : i * s_step + columns], t[i * t_step : i * t_step + columns]
            _statistics_of_row(a, b, scale, of_s, of_t, tops, stats[i])
            _log_sum(stats[i], norm)
            total = np.zeros(6)
            for k in range(tops.shape[1]):
                x, y = k * _TILE, min(k * _TILE + _TILE, columns)
                if i + 1 < hi:
                    _fetch(s, (i + 1) * s_step + x, y - x)
                    _fetch(t, (i + 1) * t_step + x, y - x)
                p_factor = exp(tops[0, k] - norm[0]) / stats[i, 1]
                q_factor = exp(tops[1, k] - norm[2]) / stats[i, 3]
                add_sums_kept(a[x:y], b[x:y], scale, norm, of_s[x:y], of_t[x:y], p_factor, q_factor, total)
            result[i] = total
            if not wanted:
                continue
            target = out[i * out_step : i * out_step + columns]
            if weights[i] == _ZERO:
                _store_zeros(target)
                continue
            for k in range(tops.shape[1]):
                x, y = k * _TILE, min(k * _TILE + _TILE, columns)
                p_factor = exp(tops[0, k] - norm[0]) / stats[i, 1]
                shared = _f(weights[i] * total[5]) * p_factor
                _store(target[x:y], of_s[x:y], of_t[x:y], weights[i], shared)

    return SimpleNamespace(statistics=statistics, sums=sums, gradient=gradient, everything=everything)
