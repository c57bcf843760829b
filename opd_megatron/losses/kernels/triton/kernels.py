"""The Triton kernels, one program a row of logits, and the passes over a row that they are put together from.

A pass goes over the columns tile by tile. A tile is [lanes, 8]: a thread owns whole lines of it, 8 columns that one or
two 16-byte loads fetch, so that sums along a line never leave the thread and accumulators are [lanes]. Only the last
tile is masked: a mask that the compiler cannot prove aligned splits every load.

`inverse` is 1 / temperature; one fused operation multiplies by it and subtracts the maximum.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from opd_megatron.losses.core.elementwise import NAMES, rebind
from opd_megatron.losses.divergences import FORWARD_KL, REVERSE_KL
from opd_megatron.losses.kernels import base
from opd_megatron.losses.kernels.triton import math as triton_math
from opd_megatron.losses.kernels.triton.math import exp

LINE = 8
"""Columns of one line of a tile."""

_LINE = tl.constexpr(LINE)
_LOG_ZERO = tl.constexpr(base.LOG_ZERO)


def in_triton(function):
    """One of the two functions of a divergence, as a Triton function of tiles."""
    names = {name: getattr(triton_math, name) for name in NAMES}
    return rebind(function, {**names, "tl": tl}, triton.jit)  # the interpreter looks for tl in every module


_reverse_kl = in_triton(REVERSE_KL.value)
_forward_kl = in_triton(FORWARD_KL.value)


@triton.jit
def _row(pointer, stride):
    return pointer + tl.program_id(0).to(tl.int64) * stride


@triton.jit
def _columns(start, lanes: tl.constexpr):
    return start + tl.arange(0, lanes)[:, None] * _LINE + tl.arange(0, _LINE)[None, :]


@triton.jit
def _load(row, columns, n, masked: tl.constexpr):
    x = tl.load(row + columns, mask=columns < n, other=-float("inf")) if masked else tl.load(row + columns)
    return x.to(tl.float32)


@triton.jit
def _add_exp(x, inverse, top, total):
    """Maximum, and sum of exp(x - maximum), of each lane so far."""
    new = tl.maximum(top, tl.max(x, axis=1) * inverse)
    return new, total * exp(top - new) + tl.sum(exp(tl.fma(x, inverse, -new[:, None])), axis=1)


@triton.jit
def _add_statistics(state, s_row, t_row, start, n, inverse, lanes: tl.constexpr, masked: tl.constexpr):
    columns = _columns(start, lanes)
    s_top, s_sum = _add_exp(_load(s_row, columns, n, masked), inverse, state[0], state[1])
    t_top, t_sum = _add_exp(_load(t_row, columns, n, masked), inverse, state[2], state[3])
    return s_top, s_sum, t_top, t_sum, tl.where(s_top > state[0], start, state[4])


@triton.jit
def _over_lanes(top, total, n):
    largest = tl.max(top, axis=0)
    total = tl.sum(total * exp(top - largest), axis=0)
    # Where every logit is -inf they are all equal, as in the other backends.
    return largest, tl.where(total == 0, n * 1.0, total)


@triton.jit
def _statistics(s_row, t_row, n, inverse, lanes: tl.constexpr):
    """`Statistics` of one row."""
    tile: tl.constexpr = lanes * _LINE
    whole = n // tile * tile
    zeros = tl.zeros([lanes], tl.float32)
    state = (zeros + _LOG_ZERO, zeros, zeros + _LOG_ZERO, zeros, tl.zeros([lanes], tl.int32))
    for start in range(0, whole, tile):
        state = _add_statistics(state, s_row, t_row, start, n, inverse, lanes, False)
    for start in range(whole, n, tile):
        state = _add_statistics(state, s_row, t_row, start, n, inverse, lanes, True)
    s_max, s_sum = _over_lanes(state[0], state[1], n)
    t_max, t_sum = _over_lanes(state[2], state[3], n)
    # The first tile that holds the largest logit, and the first of its columns that does.
    columns = _columns(tl.min(tl.where(state[0] == s_max, state[4], n), axis=0), lanes)
    scaled = tl.maximum(_load(s_row, columns, n, True) * inverse, _LOG_ZERO)
    first = tl.min(tl.min(tl.where(scaled == s_max, columns, n), axis=1), axis=0)
    there = tl.load(t_row + tl.minimum(first, n - 1)).to(tl.float32)  # among NaNs none is the largest
    return s_max, s_sum, t_max, t_sum, tl.maximum(there * inverse, _LOG_ZERO)


@triton.jit
def _log_probability(x, inverse, top, log_sum):
    return tl.maximum(tl.fma(x, inverse, -top), -top + _LOG_ZERO) - log_sum


@triton.jit
def _probabilities(s_row, t_row, columns, n, inverse, norm, masked: tl.constexpr):
    """log p, log q, p and q of a tile."""
    log_p = _log_probability(_load(s_row, columns, n, masked), inverse, norm[0], norm[1])
    log_q = _log_probability(_load(t_row, columns, n, masked), inverse, norm[2], norm[3])
    p = exp(log_p)
    q = exp(log_q)
    if masked:
        # In a row of nothing but -inf even the columns past the end would have a probability.
        p = tl.where(columns < n, p, 0.0)
        q = tl.where(columns < n, q, 0.0)
    return log_p, log_q, p, q


@triton.jit
def _add_sums(
    sums, s_row, t_row, start, n, inverse, norm, value: tl.constexpr, weighted_grad: tl.constexpr,
    parameter: tl.constexpr, lanes: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    log_p, log_q, p, q = _probabilities(s_row, t_row, _columns(start, lanes), n, inverse, norm, masked)
    r = log_p - log_q
    return (
        sums[0] + tl.sum(_reverse_kl(p, q, r, 0.0), axis=1),
        sums[1] + tl.sum(_forward_kl(p, q, r, 0.0), axis=1),
        sums[2] - tl.sum(p * log_p, axis=1),
        sums[3] - tl.sum(q * log_q, axis=1),
        sums[4] + tl.sum(value(p, q, r, parameter), axis=1),
        sums[5] + tl.sum(weighted_grad(p, q, r, parameter), axis=1),
    )


@triton.jit
def _sums(
    s_row, t_row, n, inverse, norm, value: tl.constexpr, weighted_grad: tl.constexpr, parameter: tl.constexpr,
    lanes: tl.constexpr,
):  # fmt: skip
    """Each of `SUMS` of one row, from its end to its start: what the pass before read last is still in the caches."""
    tile: tl.constexpr = lanes * _LINE
    whole = n // tile * tile
    zeros = tl.zeros([lanes], tl.float32)
    sums = (zeros, zeros, zeros, zeros, zeros, zeros)
    for start in range(whole, n, tile):
        sums = _add_sums(sums, s_row, t_row, start, n, inverse, norm, value, weighted_grad, parameter, lanes, True)
    for done in range(0, whole, tile):
        start = whole - tile - done
        sums = _add_sums(sums, s_row, t_row, start, n, inverse, norm, value, weighted_grad, parameter, lanes, False)
    return (
        tl.sum(sums[0], axis=0), tl.sum(sums[1], axis=0), tl.sum(sums[2], axis=0),
        tl.sum(sums[3], axis=0), tl.sum(sums[4], axis=0), tl.sum(sums[5], axis=0),
    )  # fmt: skip


@triton.jit
def _store_gradient(
    out_row, s_row, t_row, start, n, inverse, norm, divergence_coef, softmax_coef, weighted_grad: tl.constexpr,
    parameter: tl.constexpr, lanes: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    columns = _columns(start, lanes)
    log_p, log_q, p, q = _probabilities(s_row, t_row, columns, n, inverse, norm, masked)
    gradient = divergence_coef * weighted_grad(p, q, log_p - log_q, parameter) - softmax_coef * p
    if masked:
        tl.store(out_row + columns, gradient, mask=columns < n)
    else:
        tl.store(out_row + columns, gradient)


@triton.jit
def _gradient(
    out_row, s_row, t_row, n, inverse, norm, divergence_coef, softmax_coef, weighted_grad: tl.constexpr,
    parameter: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    tile: tl.constexpr = lanes * _LINE
    whole = n // tile * tile
    if (divergence_coef != 0) | (softmax_coef != 0):
        for start in range(0, whole, tile):
            _store_gradient(
                out_row, s_row, t_row, start, n, inverse, norm, divergence_coef, softmax_coef, weighted_grad, parameter,
                lanes, False,
            )  # fmt: skip
        for start in range(whole, n, tile):
            _store_gradient(
                out_row, s_row, t_row, start, n, inverse, norm, divergence_coef, softmax_coef, weighted_grad, parameter,
                lanes, True,
            )  # fmt: skip
    else:  # whatever the logits are: an infinity of a masked token must not become a NaN
        for start in range(0, n, tile):
            columns = _columns(start, lanes)
            tl.store(out_row + columns, tl.zeros([lanes, _LINE], tl.float32), mask=columns < n)


@triton.jit
def _store_results(result, rows, values, count: tl.constexpr):
    for i in tl.static_range(count):
        tl.store(result + i * rows + tl.program_id(0), values[i])


@triton.jit
def _load_row_values(values, rows):
    place = values + tl.program_id(0)
    return tl.load(place), tl.load(place + rows), tl.load(place + 2 * rows), tl.load(place + 3 * rows)


@triton.jit(do_not_specialize=["rows"])
def statistics_kernel(student, s_stride, teacher, t_stride, result, rows, n, inverse, lanes: tl.constexpr):
    """result [5, rows]."""
    values = _statistics(_row(student, s_stride), _row(teacher, t_stride), n, inverse, lanes)
    _store_results(result, rows, values, 5)


@triton.jit(do_not_specialize=["rows"])
def sums_kernel(
    student, s_stride, teacher, t_stride, norms, result, rows, n, inverse,
    value: tl.constexpr, weighted_grad: tl.constexpr, parameter: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    """result [6, rows] from norms [4, rows]."""
    s_row, t_row, norm = _row(student, s_stride), _row(teacher, t_stride), _load_row_values(norms, rows)
    values = _sums(s_row, t_row, n, inverse, norm, value, weighted_grad, parameter, lanes)
    _store_results(result, rows, values, 6)


@triton.jit(do_not_specialize=["rows"])
def gradient_kernel(
    student, s_stride, teacher, t_stride, norms, coefs, out, out_stride, rows, n, inverse,
    weighted_grad: tl.constexpr, parameter: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    """out from norms [4, rows] and coefs (divergence_coef, softmax_coef) [2, rows]."""
    s_row, t_row, norm = _row(student, s_stride), _row(teacher, t_stride), _load_row_values(norms, rows)
    divergence_coef, softmax_coef = tl.load(coefs + tl.program_id(0)), tl.load(coefs + rows + tl.program_id(0))
    out_row = _row(out, out_stride)
    _gradient(
        out_row, s_row, t_row, n, inverse, norm, divergence_coef, softmax_coef, weighted_grad, parameter, lanes
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def fused_kernel(
    student, s_stride, teacher, t_stride, scales, out, out_stride, result, rows, n, inverse,
    value: tl.constexpr, weighted_grad: tl.constexpr, parameter: tl.constexpr, write: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    """result [11, rows], the statistics and then the sums, and out if `write`, from scales [rows]."""
    s_row, t_row = _row(student, s_stride), _row(teacher, t_stride)
    statistics = _statistics(s_row, t_row, n, inverse, lanes)
    norm = (statistics[0], tl.log(statistics[1]), statistics[2], tl.log(statistics[3]))
    sums = _sums(s_row, t_row, n, inverse, norm, value, weighted_grad, parameter, lanes)
    _store_results(result, rows, statistics, 5)
    _store_results(result + 5 * rows, rows, sums, 6)
    if write:
        divergence_coef = tl.load(scales + tl.program_id(0))
        softmax_coef = tl.where(divergence_coef == 0, 0.0, divergence_coef * sums[5])
        out_row = _row(out, out_stride)
        _gradient(
            out_row, s_row, t_row, n, inverse, norm, divergence_coef, softmax_coef, weighted_grad, parameter, lanes
        )  # fmt: skip
