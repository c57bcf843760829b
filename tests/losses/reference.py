"""What the tests of the losses share: all divergences with their arguments, and errors that name their case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from opd_megatron.losses.divergences import DIVERGENCES
from opd_megatron.losses.reference import FORMULAE, dense_divergence, log_teacher

__all__ = ["FORMULAE", "dense_divergence", "log_teacher"]

SHARES = (0.0, 0.1, 0.5, 0.9, 1.0)
"""Values of beta, alpha and lambda_coef."""
FEW_SHARES = {"forward_weight": (0.0, 0.3, 1.0), "entry_clip": (0.05,)}
"""Where the formula is a sum, or cut, of those that others have tested."""
KINDS: tuple[tuple[str, dict[str, float]], ...] = tuple(
    (name, arguments)
    for name, family in DIVERGENCES.items()
    for arguments in (
        [{}]
        if family.argument is None
        else [{family.argument: share} for share in FEW_SHARES.get(family.argument, SHARES)]
    )
    if not (family.parameter is not None and family.parameter.not_one and arguments == {family.argument: 1.0})
)
"""Every divergence of the package with its own argument: a new one is tested as soon as `FORMULAE` has it."""
EVENT_KINDS = tuple(kind for kind in KINDS if not DIVERGENCES[kind[0]].of_entries)
"""Those that can be of events of several vocabulary entries."""
NAMES = [" ".join([name, *map(str, arguments.values())]) for name, arguments in KINDS]
EVENT_NAMES = [" ".join([name, *map(str, arguments.values())]) for name, arguments in EVENT_KINDS]

TEMPERATURES = (0.5, 1.0, 2.0)
ENSEMBLES: tuple[tuple[str, tuple[float, ...] | None], ...] = (
    ("logit_mean", None),
    ("logit_mean", (0.3, 0.7)),
    ("prob_mean", (0.3, 0.7)),
)
"""combine and teacher weights; None is a single teacher."""


def pad_columns(matrix: torch.Tensor, columns: int, generator: torch.Generator, dim: int = 1) -> torch.Tensor:
    """Appends large random columns (or rows of a head, `dim=0`): if any takes part, every result is wrong."""
    shape = list(matrix.shape)
    shape[dim] = columns - shape[dim]
    garbage = 20 + torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.cat([matrix, garbage.to(matrix.dtype)], dim)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


Errors = dict[str, float]
"""Case -> relative error."""


def failures(results: Sequence[Mapping[str, float]], limit: float) -> list[str]:
    """One line for every case whose error is above the limit (or is none at all), worst first.

    `results` holds each rank's cases; every rank must have some.
    """
    assert all(results), "a rank checked nothing"
    lines = [
        (error, f"{case} on rank {rank}: error {error:.2g}, limit {limit:.0e}")
        for rank, errors in enumerate(results)
        for case, error in errors.items()
        if not error <= limit
    ]
    return [line for _, line in sorted(lines, reverse=True)]
