"""What every benchmark script shares: `[--quick] [--json PATH] [--write-docs]`, one table, checks, an exit code.

def measure(arguments) -> Report: ...
if __name__ == "__main__":
    main("demo", __doc__, measure)

The JSON holds name, device, quick, rows and checks: [{name, value, limit, ok}]. Exit code 1 when a check fails, 2 when
something the user can mend is missing. `--write-docs` replaces what stands between `<!-- measured:NAME:begin -->` and
`<!-- measured:NAME:end -->` in docs/measurements.md by the rows as a markdown table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # scripts find the package and tests' tiny models from a plain checkout
Row = dict[str, Any]


class BenchmarkError(Exception):
    """Something that the measurement needs is missing or failed; the message says what to do about it."""


@dataclass(frozen=True, slots=True)
class Check:
    """A claim: `value` does not exceed `limit`."""

    name: str
    value: float
    limit: float
    ok: bool

    @classmethod
    def at_most(cls, name: str, value: float, limit: float) -> Check:
        """NaN never passes."""
        return cls(name, value, limit, bool(value <= limit))

    @classmethod
    def below(cls, name: str, value: float, limit: float) -> Check:
        """Strictly below `limit`."""
        return cls(name, value, limit, bool(value < limit))


@dataclass(slots=True)
class Report:
    """What a benchmark measured. All rows have the same keys: the table's columns."""

    rows: list[Row] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    note: str = ""
    """A sentence under the table: what was compared, how."""


def main(
    name: str,
    description: str | None,
    measure: Callable[[argparse.Namespace], Report],
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Parses the command line, measures, reports and exits."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller measurement that ends within a minute")
    parser.add_argument("--json", metavar="PATH", help="write the result as JSON")
    parser.add_argument("--write-docs", action="store_true", help="put the rows into docs/measurements.md")
    if add_arguments is not None:
        add_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        report = measure(arguments)
        show(name, report)
        if arguments.json:
            Path(arguments.json).write_text(as_json(name, report, quick=arguments.quick))
        if arguments.write_docs:
            write_between_markers(REPOSITORY / "docs/measurements.md", name, markdown(report))
    except BenchmarkError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if all(check.ok for check in report.checks) else 1)


def device() -> dict[str, Any]:
    """The machine, in words and numbers."""
    import torch

    info: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        info["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return info


def show(name: str, report: Report) -> None:
    """Prints the table, the note and the checks."""
    console = Console()
    table = Table(title=name, title_justify="left")
    for column in report.rows[0] if report.rows else ():
        words = isinstance(report.rows[0][column], str)
        table.add_column(column, justify="left" if words else "right", no_wrap=words)
    for row in report.rows:
        table.add_row(*(text(value) for value in row.values()))
    console.print(table)
    if report.note:
        console.print(report.note)
    for check in report.checks:
        verdict = "[green]ok[/]" if check.ok else "[red]FAILED[/]"
        console.print(f"{verdict}  {check.name}: {text(check.value)} (limit {text(check.limit)})", soft_wrap=True)


def as_json(name: str, report: Report, *, quick: bool) -> str:
    """The machine-readable result; NaN and infinities are null."""
    tree = {"name": name, "device": device(), "quick": quick, **asdict(report)}
    return json.dumps(_finite(tree), indent=2, allow_nan=False) + "\n"


def markdown(report: Report) -> str:
    """Rows as a markdown table, the note under it."""
    columns = list(report.rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(text(value) for value in row.values()) + " |" for row in report.rows]
    if report.note:
        lines += ["", report.note]
    return "\n".join(lines)


def write_between_markers(page: Path, name: str, body: str) -> None:
    """Replaces the text between the markers `measured:NAME:begin` and `:end`."""
    begin, end = f"<!-- measured:{name}:begin -->", f"<!-- measured:{name}:end -->"
    old = page.read_text() if page.exists() else ""
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(end) < old.index(begin):
        raise BenchmarkError(f"{page.name} must hold {begin} and {end} once each, in this order: add them")
    before, rest = old.split(begin)
    page.write_text(f"{before}{begin}\n{body}\n{end}{rest.split(end)[1]}")


def text(value: Any) -> str:
    """A cell: numbers with three significant digits, or none after the point from a hundred up."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
