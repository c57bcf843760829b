"""The loops of the CPU backend, compiled by numba for this very processor.

A loop over a tile of a row (thousands of columns) reads and writes each element once and keeps everything in between in
registers; sums go on in float64 from tile to tile. Elements are `scalar` functions, which the compiler may not
rearrange; the loops may only reorder their sums into vector lanes.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
from numba import njit

from opd_megatron.losses.core.elementwise import NAMES, Elementwise, rebind
from opd_megatron.losses.divergences import FORWARD_KL, REVERSE_KL
from opd_megatron.losses.kernels.base import LOG_ZERO
from opd_megatron.losses.kernels.cpu import scalar
from opd_megatron.losses.kernels.cpu.scalar import exp, larger, load, own_function, rounded

# Columns summed in fp32 before the sum goes on in float64.
_TILE = 4096

_f = np.float32
_LOWEST = _f(LOG_ZERO)
_ZERO = _f(0)

_loop = njit(fastmath={"reassoc", "contract", "nsz"}, error_model="numpy", nogil=True)


def _in_single(function: FunctionType) -> Any:
    """Compiled with its literals in fp32: a Python float would carry the whole expression into float64."""
    code = function.__code__
    literals = tuple(_f(x) if isinstance(x, float) else x for x in code.co_consts)
    function.__code__ = code.replace(co_consts=literals)
    return scalar.scalar(function)


_NAMES = {name: getattr(scalar, name) for name in NAMES}
_reverse_kl, _forward_kl = (rebind(kl.value, _NAMES, _in_single) for kl in (REVERSE_KL, FORWARD_KL))


@scalar.scalar
def _below_top(logit, scale, top):
    return larger(logit, _LOWEST) * scale - top


@scalar.scalar
def _difference(a, b):
    return a - b


@scalar.scalar
def _log_ratio(of_student, of_teacher, shift):
    """log p - log q of two logits below their tops; `shift` is the difference of the log sums, rounded only once."""
    return (of_student - of_teacher) + shift


@scalar.scalar
def _describing_terms(p, q, r, log_p, log_q):
    """An entry's part of both KLs and of both entropies."""
    return _reverse_kl(p, q, r, _ZERO), _forward_kl(p, q, r, _ZERO), p * log_p, q * log_q


@_loop
def _largest(x, scale):
    own_function()
    result = _LOWEST
    for j in range(x.shape[0]):
        result = larger(result, load(x[j]))
    return result * scale


@_loop
def _sum_of_exp(x, scale, top, ahead):
    """Sum of exp(x scale - top), and the largest of `ahead`, which is as long.

    The tile ahead comes from memory while this one is computed; a loop of its own would only wait for it.
    """
    own_function()
    result, largest = _ZERO, _LOWEST
    for j in range(x.shape[0]):
        result += exp(load(x[j]) * scale - top)
        largest = larger(largest, load(ahead[j]))
    return result, largest * scale


@_loop
def _keep_exp(x, scale, top, ahead, kept):
    """The same, which leaves the exponentials in `kept`."""
    own_function()
    result, largest = _ZERO, _LOWEST
    for j in range(x.shape[0]):
        value = exp(load(x[j]) * scale - top)
        kept[j] = value
        result += value
        largest = larger(largest, load(ahead[j]))
    return result, largest * scale


@_loop
def _max_and_sum(x, scale, kept, tops):
    """Largest logit, sum of exp(logit - largest), and where the tile with the first largest one starts.

    With a `kept` as long as the row, that row's exponentials are left there, each less the `tops` of its tile.
    """
    top, total, place = _LOWEST * scale, 0.0, 0
    here = _largest(x[:_TILE], scale)
    for k in range((x.shape[0] + _TILE - 1) // _TILE):
        start = k * _TILE
        tile, ahead = x[start : start + _TILE], x[start + _TILE : start + 2 * _TILE]
        whole = ahead.shape[0] == _TILE
        if here > top:
            total *= exp(top - here)
            top, place = here, start
        beside = ahead if whole else tile
        if kept.shape[0]:
            part, here = _keep_exp(tile, scale, top, beside, kept[start : start + _TILE])
            tops[k] = top
        else:
            part, here = _sum_of_exp(tile, scale, top, beside)
        total += part
        if not whole:
            here = _largest(ahead, scale)
    return top, total, place


@_loop
def statistics_of_row(s, t, scale, kept_s, kept_t, tops, result):
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
def store(out, p, weighted_grad, scale, shared):
    own_function()
    for j in range(out.shape[0]):
        out[j] = rounded(scale * weighted_grad[j] - shared * p[j], out[j])


@_loop
def store_rounded(out, values):
    own_function()
    for j in range(out.shape[0]):
        out[j] = rounded(values[j], out[j])


@_loop
def store_zeros(out):
    for j in range(out.shape[0]):
        out[j] = rounded(_ZERO, out[j])


@_loop
def statistics(lo, hi, s, s_step, t, t_step, columns, scale, result, scratch):
    none, tops = np.empty(0, np.float32), np.empty((2, 0), np.float32)
    for i in range(lo, hi):
        a, b = s[i * s_step : i * s_step + columns], t[i * t_step : i * t_step + columns]
        statistics_of_row(a, b, scale, none, none, tops, result[i])


def _sums_of_tile(value_of: Any, weighted_grad_of: Any, kept: bool, with_metrics: bool) -> Any:
    """The loop that adds one tile's `SUMS` to `total`; which of its parts are compiled is decided here.

    With `kept`, p_of and q_of times their coefs are p and q, and q_of is overwritten by the weighted
    gradient. Without `with_metrics` the sums that only describe the pair (both KLs, both entropies) stay as they are.
    """

    @_loop
    def add_sums(s, t, scale, parameter, norm, p_of, q_of, p_factor, q_factor, total):
        own_function()
        reverse = forward = of_student = of_teacher = value = weighted_grads = _ZERO
        s_max, s_log, t_max, t_log, shift = norm[0], norm[1], norm[2], norm[3], norm[4]
        for j in range(s.shape[0]):
            a, b = _below_top(load(s[j]), scale, s_max), _below_top(load(t[j]), scale, t_max)
            if kept:
                p, q = p_of[j] * p_factor, q_of[j] * q_factor
            else:
                p, q = exp(_difference(a, s_log)), exp(_difference(b, t_log))
            r = _log_ratio(a, b, shift)
            if with_metrics:
                terms = _describing_terms(p, q, r, _difference(a, s_log), _difference(b, t_log))
                reverse += terms[0]
                forward += terms[1]
                of_student -= terms[2]
                of_teacher -= terms[3]
            value += value_of(p, q, r, parameter)
            weighted_grad = weighted_grad_of(p, q, r, parameter)
            weighted_grads += weighted_grad
            if kept:
                q_of[j] = weighted_grad
        total[0] += reverse
        total[1] += forward
        total[2] += of_student
        total[3] += of_teacher
        total[4] += value
        total[5] += weighted_grads

    return add_sums


def _whole_rows(add_sums: Any) -> Any:
    """The loop over rows that makes all passes over one before the next."""

    @_loop
    def fused(
        lo, hi, s, s_step, t, t_step, columns, scale, parameter, stats, result, weights, wanted, out, step, scratch
    ):
        of_s, of_t = scratch[0], scratch[1]
        tops = np.empty((2, (columns + _TILE - 1) // _TILE), np.float32)
        norm = np.empty(5, np.float32)
        for i in range(lo, hi):
            a, b = s[i * s_step : i * s_step + columns], t[i * t_step : i * t_step + columns]
            statistics_of_row(a, b, scale, of_s, of_t, tops, stats[i])
            s_log, t_log = np.log(np.float64(stats[i, 1])), np.log(np.float64(stats[i, 3]))
            norm[0], norm[1], norm[2], norm[3], norm[4] = stats[i, 0], s_log, stats[i, 2], t_log, t_log - s_log
            total = np.zeros(6)
            for k in range(tops.shape[1]):
                x, y = k * _TILE, min(k * _TILE + _TILE, columns)
                p_factor = exp(tops[0, k] - norm[0]) / stats[i, 1]
                q_factor = exp(tops[1, k] - norm[2]) / stats[i, 3]
                add_sums(a[x:y], b[x:y], scale, parameter, norm, of_s[x:y], of_t[x:y], p_factor, q_factor, total)
            result[i] = total
            if not wanted:
                continue
            target = out[i * step : i * step + columns]
            if weights[i] == _ZERO:
                store_zeros(target)
                continue
            for k in range(tops.shape[1]):
                x, y = k * _TILE, min(k * _TILE + _TILE, columns)
                p_factor = exp(tops[0, k] - norm[0]) / stats[i, 1]
                store(target[x:y], of_s[x:y], of_t[x:y], weights[i], _f(weights[i] * total[5]) * p_factor)

    return fused


@functools.lru_cache(maxsize=64)
def loops_of(value: Elementwise, weighted_grad: Elementwise) -> SimpleNamespace:
    """The loops over rows of one divergence. Each is compiled when it is first called (about a second).

    All take (first row, last row, student, its row stride, teacher, its row stride, columns, 1 / temperature,
    parameter), then what is theirs, and last a scratch buffer [2, columns].
    """
    value_of, weighted_grad_of = (rebind(f, _NAMES, _in_single) for f in (value, weighted_grad))
    add_sums = _sums_of_tile(value_of, weighted_grad_of, kept=False, with_metrics=True)

    @_loop
    def sums(lo, hi, s, s_step, t, t_step, columns, scale, parameter, norms, result, scratch):
        none = np.empty(0, np.float32)
        for i in range(lo, hi):
            a, b = s[i * s_step : i * s_step + columns], t[i * t_step : i * t_step + columns]
            total = np.zeros(6)
            for k in range(0, columns, _TILE):
                x, y = a[k : k + _TILE], b[k : k + _TILE]
                add_sums(x, y, scale, parameter, norms[i], none, none, _ZERO, _ZERO, total)
            result[i] = total

    @_loop
    def tile_gradient(s, t, scale, parameter, norm, coefs, result):
        own_function()
        s_max, s_log, t_max, t_log, shift = norm[0], norm[1], norm[2], norm[3], norm[4]
        divergence_coef, softmax_coef = coefs[0], coefs[1]
        for j in range(s.shape[0]):
            a, b = _below_top(load(s[j]), scale, s_max), _below_top(load(t[j]), scale, t_max)
            p, q = exp(_difference(a, s_log)), exp(_difference(b, t_log))
            result[j] = divergence_coef * weighted_grad_of(p, q, _log_ratio(a, b, shift), parameter) - softmax_coef * p

    @_loop
    def gradient(lo, hi, s, s_step, t, t_step, columns, scale, parameter, norms, coefs, out, step, scratch):
        tile = scratch[0]  # the result may overwrite s, and such a loop is not vectorised
        for i in range(lo, hi):
            target = out[i * step : i * step + columns]
            if coefs[i, 0] == _ZERO and coefs[i, 1] == _ZERO:
                store_zeros(target)
                continue
            a, b = s[i * s_step : i * s_step + columns], t[i * t_step : i * t_step + columns]
            for k in range(0, columns, _TILE):
                x, y = a[k : k + _TILE], b[k : k + _TILE]
                tile_gradient(x, y, scale, parameter, norms[i], coefs[i], tile)
                store_rounded(target[k : k + _TILE], tile)

    return SimpleNamespace(
        sums=sums,
        gradient=gradient,
        fused=_whole_rows(_sums_of_tile(value_of, weighted_grad_of, kept=True, with_metrics=True)),
        without_metrics=_whole_rows(_sums_of_tile(value_of, weighted_grad_of, kept=True, with_metrics=False)),
    )
