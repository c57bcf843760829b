"""The results of a run: the table, and the curves as a picture."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType

from opd_megatron.metrics import plot_curves, read_metrics, result_table


def write_report(run_dir: Path) -> RenderableType:
    """Draws `report/curves.png` and returns the result table with its path, for a rich console.

    Raises MissingPathError when the folder holds no metrics.
    """
    rows = read_metrics(run_dir)
    return Group(result_table(rows), f"curves    {plot_curves(run_dir)}")
