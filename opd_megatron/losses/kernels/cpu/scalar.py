"""Scalar fp32 functions that LLVM vectorises, for the compiled CPU backend: exp, log1p and bf16 without a library call.

Calls into libm keep a loop scalar, so the functions are polynomials, off by one or two units in the last place, over
a few LLVM instructions. None of them may be compiled with reassociation: it
would cancel exactly the terms that keep the digits.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numba.core.config
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

# By the processor's name LLVM prefers vectors of 256 bits on every Xeon; the loops here gain a third from 512. Numba
# reads these once, before the first function is declared.
if llvm.get_host_cpu_features().get("avx512f") and numba.core.config.CPU_NAME is None:
    numba.core.config.CPU_NAME = "generic"
    numba.core.config.CPU_FEATURES = llvm.get_host_cpu_features().flatten()

_I16, _I32, _F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()
_f = np.float32

scalar = njit(fastmath={"contract", "nsz"}, forceinline=True, error_model="numpy", nogil=True)


@intrinsic
def from_bf16(typing: Any, bits: Any) -> Any:
    """float32 of the bf16 whose bits are a uint16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.shl(builder.zext(args[0], _I32), _I32(16)), _F32)

    return types.float32(types.uint16), generate


@intrinsic
def to_bf16(typing: Any, value: Any) -> Any:
    """Bits of the nearest bf16, ties to even. A NaN stays one unless its payload is all ones."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], _I32)
        odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        rounded = builder.add(builder.add(bits, _I32(0x7FFF)), odd)
        return builder.trunc(builder.lshr(rounded, _I32(16)), _I16)

    return types.uint16(types.float32), generate


@intrinsic
def larger(typing: Any, a: Any, b: Any) -> Any:
    """max(a, b) of two numbers, neither a NaN: without that promise no maximum over an array is vectorised."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = builder.module.declare_intrinsic("llvm.maxnum", [_F32], ir.FunctionType(_F32, [_F32, _F32]))
        return builder.call(function, args, fastmath=("nnan", "nsz"))

    return types.float32(types.float32, types.float32), generate


@intrinsic
def smaller(typing: Any, a: Any, b: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = builder.module.declare_intrinsic("llvm.minnum", [_F32], ir.FunctionType(_F32, [_F32, _F32]))
        return builder.call(function, args, fastmath=("nnan", "nsz"))

    return types.float32(types.float32, types.float32), generate


@intrinsic
def select(typing: Any, condition: Any, a: Any, b: Any) -> Any:
    """a where the condition holds, else b; both are computed."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.trunc(args[0], ir.IntType(1)), args[1], args[2])

    return types.float32(types.boolean, types.float32, types.float32), generate


@intrinsic
def times_power_of_two(typing: Any, value: Any, magic: Any) -> Any:
    """value * 2^n for magic = _MAGIC + n, where the result is a normal number."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        shift = builder.shl(builder.bitcast(args[1], _I32), _I32(23))
        return builder.bitcast(builder.add(builder.bitcast(args[0], _I32), shift), _F32)

    return types.float32(types.float32, types.float32), generate


@intrinsic
def own_function(typing: Any) -> Any:
    """Keeps the function it is called in from being inlined: inside a larger one its loop is not always vectorised."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), generate


def _power(builder: Any, bits: Any) -> Any:
    """k of value = 2^k m with m in [sqrt(1/2), sqrt(2)), as an i32."""
    return builder.ashr(builder.sub(bits, _I32(0x3F3504F3)), _I32(23))


@intrinsic
def exponent(typing: Any, value: Any) -> Any:
    """k of value = 2^k m, m in [sqrt(1/2), sqrt(2)), for a positive normal value."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sitofp(_power(builder, builder.bitcast(args[0], _I32)), _F32)

    return types.float32(types.float32), generate


@intrinsic
def mantissa(typing: Any, value: Any) -> Any:
    """m of the same."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], _I32)
        return builder.bitcast(builder.sub(bits, builder.shl(_power(builder, bits), _I32(23))), _F32)

    return types.float32(types.float32), generate


# Added to a small number, 1.5 * 2^23 leaves its nearest integer in the last bits of the mantissa.
_MAGIC = _f(12582912.0)
_LOG2_E = _f(1.44269504088896341)
# Off by 1.9e-9: a fused n * ln(2) is then off by 2e-9 n, less than the rounding of the number it is taken from.
_LN2 = _f(0.6931471805599453)
# (exp(r) - 1 - r) / r^2, fitted for |r| <= ln(2) / 2 so that exp is off by 4e-9 at most, before rounding.
_E0, _E1, _E2 = _f(1.381461275741458e-3), _f(8.368710055947304e-3), _f(4.166838899254799e-2)
_E3, _E4 = _f(1.666652113199234e-1), _f(4.999999403953552e-1)
# (log(1 + f) - f + f^2 / 2) / f^3, fitted for sqrt(1/2) <= 1 + f < sqrt(2): the logarithm is off by 4e-8 of itself.
_L0, _L1, _L2 = _f(8.700434863567352e-2), _f(-1.426748633384705e-1), _f(1.491476893424988e-1)
_L3, _L4 = _f(-1.657758504152298e-1), _f(1.996306329965591e-1)
_L5, _L6 = _f(-2.500133812427521e-1), _f(3.333390951156616e-1)
_ZERO, _HALF, _ONE = _f(0), _f(0.5), _f(1)
_LOWEST = _f(-87.0)


@scalar
def _reduced_expm1(r: np.float32) -> np.float32:
    """exp(r) - 1 for |r| <= ln(2) / 2."""
    square = r * r
    even, odd = (_E0 * square + _E2) * square + _E4, _E1 * square + _E3
    return (odd * r + even) * square + r


@scalar
def exp(x: np.float32) -> np.float32:
    """For x <= 88; below -87 it is 0."""
    bounded = larger(x, _LOWEST)
    magic = bounded * _LOG2_E + _MAGIC
    n = magic - _MAGIC
    value = times_power_of_two(_reduced_expm1(bounded - n * _LN2) + _ONE, magic)
    return select(x < _LOWEST, _ZERO, value)


@scalar
def expm1(x: np.float32) -> np.float32:
    """For |x| <= 87."""
    magic = x * _LOG2_E + _MAGIC
    n = magic - _MAGIC
    power = times_power_of_two(_ONE, magic)
    return power * _reduced_expm1(x - n * _LN2) + (power - _ONE)


@scalar
def log1p(x: np.float32) -> np.float32:
    """For x > -1, finite."""
    u = _ONE + x
    power = exponent(u)
    # Within [sqrt(1/2), sqrt(2)] of u the polynomial takes x itself, which the addition has not rounded.
    f = select(power == _ZERO, x, mantissa(u) - _ONE)
    square = f * f
    # Even and odd powers apart: two short chains of dependent operations instead of a long one.
    even = ((_L0 * square + _L2) * square + _L4) * square + _L6
    odd = (_L1 * square + _L3) * square + _L5
    tail = odd * f + even
    small = tail * f * square - _HALF * square
    return (f + small) + power * _LN2


@scalar
def at_least(x: np.float32, low: np.float32) -> np.float32:
    return larger(x, low)


@scalar
def at_most(x: np.float32, high: np.float32) -> np.float32:
    return smaller(x, high)


@scalar
def where(condition: Any, a: np.float32, b: np.float32) -> np.float32:
    return select(condition, a, b)


def load(element: Any) -> Any:
    """An element of a logits array as float32; bf16 arrays are seen as their uint16 bits."""
    raise NotImplementedError("compiled code only")


def rounded(value: Any, like: Any) -> Any:
    """`value` as an element of the array that `like` came from."""
    raise NotImplementedError("compiled code only")


@overload(load, inline="always")
def _load(element):  # type: ignore[no-untyped-def]
    if element == types.uint16:
        return lambda element: from_bf16(element)
    return lambda element: element


@overload(rounded, inline="always")
def _rounded(value, like):  # type: ignore[no-untyped-def]
    if like == types.uint16:
        return lambda value, like: to_bf16(value)
    return lambda value, like: value
