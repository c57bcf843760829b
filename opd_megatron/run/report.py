"""The results of a run: the table, how it went in words, and the curves as a picture."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from opd_megatron.config.run_folder import is_run, read_settings
from opd_megatron.metrics import how_it_went, plot_curves, read_metrics, result_table


def write_report(run_dir: Path) -> RenderableType:
    """Draws `report/curves.png` and returns the result table with its path, for a rich console.

    Raises MissingPathError when the folder holds no metrics.
    """
    rows = read_metrics(run_dir)
    findings = how_it_went(rows, _clip_grad(run_dir))
    lines = ["", *(f"- {finding}" for finding in findings), ""] if findings else []
    return Group(result_table(rows), *map(Text, lines), f"curves    {plot_curves(run_dir)}")


def _clip_grad(run_dir: Path) -> float | None:
    """Reads `optimizer.clip_grad` of the run; None where only its metrics are left."""
    optimizer = read_settings(run_dir).get("optimizer") if is_run(run_dir) else None
    value = optimizer.get("clip_grad") if isinstance(optimizer, dict) else None
    return float(value) if isinstance(value, int | float) else None
