"""The few functions of one element that a divergence may be written with, and how another backend takes their place.

A divergence (`divergences.py`) is ordinary Python arithmetic plus the names below. As it stands it runs on torch
tensors. The compiled backends run the same function body with the same names bound to their own scalar or block
functions, so that a formula is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Elementwise = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor", float], "torch.Tensor"]
"""(p, q, r = log p - log q, parameter) -> one element of a sum over the vocabulary."""


def exp(x: torch.Tensor) -> torch.Tensor:
    return x.exp()


def expm1(x: torch.Tensor) -> torch.Tensor:
    """exp(x) - 1 without losing the digits of a small x."""
    return x.expm1()


def log1p(x: torch.Tensor) -> torch.Tensor:
    """log(1 + x) without losing the digits of a small x."""
    return x.log1p()


def at_least(x: torch.Tensor, low: float) -> torch.Tensor:
    return x.clamp(min=low)


def at_most(x: torch.Tensor, high: float) -> torch.Tensor:
    return x.clamp(max=high)


def where(condition: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.where(condition, b)


NAMES = ("exp", "expm1", "log1p", "at_least", "at_most", "where")


def rebind(function: Any, names: Mapping[str, Any], wrap: Callable[[FunctionType], Any]) -> Any:
    """Wraps a copy of `function` in which each of `NAMES` is bound to the backend's own function.

    Functions of the same module that it calls are copied and wrapped likewise.
    """
    assert isinstance(function, FunctionType)
    bound = dict(names)
    for name in function.__code__.co_names:
        called = function.__globals__.get(name)
        if name not in names and isinstance(called, FunctionType) and called.__module__ == function.__module__:
            bound[name] = rebind(called, names, wrap)
    copy = FunctionType(function.__code__, {**function.__globals__, **bound}, function.__name__)
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
    return wrap(copy)
