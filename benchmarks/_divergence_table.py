"""The one table of `divergence.py` and the claims about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from harness import Check, Report, Row

COLUMNS = ("case", "loss", "ms", "/bare", "/dense", "/torch", "/Liger", "/TRL", "held", "peak", "/copy")


@dataclass(slots=True)
class Table:
    """Rows and checks as they come."""

    rows: list[Row] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    def add(self, case: str, loss: str, cells: Mapping[str, float]) -> None:
        """`cells` by the names of `COLUMNS`."""
        assert set(cells) <= set(COLUMNS), cells
        self.rows.append({**dict.fromkeys(COLUMNS), "case": case, "loss": loss, **cells})

    def claim(self, name: str, value: float, limit: float) -> None:
        """`value` must not exceed `limit`."""
        self.checks.append(Check.at_most(name, value, limit))

    def report(self, note: str) -> Report:
        """Without the columns that have no value on this machine."""
        used = [column for column in COLUMNS if any(row[column] is not None for row in self.rows)]
        return Report([{column: row[column] for column in used} for row in self.rows], self.checks, note)


@dataclass(frozen=True, slots=True)
class Rival:
    """Contestants, the fastest of which every divergence of ours is compared with."""

    column: str
    names: tuple[str, ...]
    limit: float | None = 1.0
    """Of the ratio. 1 is to be beaten, more may be reached; None = shown, not claimed."""

    def check(self, case: str, ratios: Mapping[str, float]) -> list[Check]:
        """The claim about the slowest of ours."""
        if self.limit is None:
            return []
        slowest = max(ratios, key=lambda name: ratios[name])
        rule = Check.below if self.limit == 1 else Check.at_most
        name = f"{case}: time {self.column}, slowest of {len(ratios)} types ({slowest})"
        return [rule(name, ratios[slowest], self.limit)]
