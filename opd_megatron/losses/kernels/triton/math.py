"""What `elementwise` names, on blocks of fp32 in Triton, in as few instructions as the digits allow.

While an H100 moves one logit of each model in and a gradient out, it has time for some fifty instructions; the device
library's expm1 and log1p take thirty or forty each. So the special-function unit does the large arguments, and a short
polynomial the small ones, where 1 + x would round away what a small divergence consists of. Errors, relative: 2e-7 near
zero, about 1e-6 at worst elsewhere; of `exp`, |x| * 6e-8.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def log2(x):
    # The bare instruction, off by at most 2^-22 around 1; `tl.log2` is 20 instructions long. The interpreter has no
    # device library.
    return tl.log2(x) if _INTERPRETED else libdevice.fast_log2f(x)


@triton.jit
def exp(x):
    # `tl.exp` is the same with denormal results, which cost three instructions more.
    return tl.exp2(x * _LOG2_E)


@triton.jit
def expm1(x):
    # Minimax on [-1/4, 1/4] of (expm1(x) - x) / x^2, relative to expm1.
    tail = tl.fma(x, 0.008335939608514309, 0.041774190962314606)
    tail = tl.fma(tail, x, 0.16666710376739502)
    tail = tl.fma(tail, x, 0.4999983608722687)
    return tl.where(tl.abs(x) < 0.25, tl.fma(tail, x * x, x), exp(x) - 1.0)


@triton.jit
def log1p(x):
    # Minimax on [-1/4, 1/4] of (log1p(x) - x) / x^2, relative to log1p.
    tail = tl.fma(x, -0.1395709365606308, 0.1571960300207138)
    tail = tl.fma(tail, x, -0.16601179540157318)
    tail = tl.fma(tail, x, 0.1994680017232895)
    tail = tl.fma(tail, x, -0.2500101923942566)
    tail = tl.fma(tail, x, 0.3333388864994049)
    tail = tl.fma(tail, x, -0.4999999701976776)
    return tl.where(tl.abs(x) < 0.25, tl.fma(tail, x * x, x), log2(1.0 + x) * _LN_2)


@triton.jit
def at_least(x, low):
    return tl.maximum(x, low)


@triton.jit
def at_most(x, high):
    return tl.minimum(x, high)


@triton.jit
def where(condition, a, b):
    return tl.where(condition, a, b)
