"""One picture of a run: divergences, held-out scores, where the time goes, gradient norm, learning rate, throughput."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_megatron.metrics.jsonl import PHASES, MetricsRow, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#3b6fb6", "#d1742b", "#4f9d69", "#8d6bb0", "#9a9a9a")
STYLE: dict[Any, Any] = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 9,
    "axes.titlesize": 10, "axes.titlelocation": "left", "axes.titleweight": "bold", "legend.frameon": False,
}  # fmt: skip


def plot_curves(run_dir: str | Path) -> Path:
    """Draws `<run_dir>/report/curves.png` from metrics.jsonl and returns its path.

    Raises MissingPathError when the run has no metrics.jsonl.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = read_metrics(run_dir)
    path = Path(run_dir) / "report" / "curves.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        # A Figure of its own, not pyplot: no global state, and nothing that looks for a screen.
        figure = Figure(figsize=(12, 6.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 3).flatten()
        _draw(axes, rows)
        figure.suptitle(f"{Path(run_dir).resolve().name}: {rows[-1]['step'] if rows else 0} steps", fontsize=11)
        for ax in axes:
            ax.set_xlim(-0.5, max((row["step"] for row in rows), default=0) + 1)
            ax.set_xlabel("step")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
        figure.savefig(path, dpi=130)
    return path


def _draw(axes: Sequence[Axes], rows: list[MetricsRow]) -> None:
    if _has(rows, "reverse_kl"):
        _lines(axes[0], rows, {"reverse_kl": "reverse KL", "forward_kl": "forward KL"})
        axes[0].set(title="Divergence on own samples", ylabel="nats per token")
    else:
        _lines(axes[0], rows, {"nll": "NLL"})
        axes[0].set(title="NLL of what is trained on", ylabel="nats per token")
    _lines(axes[1], rows, {"eval/forward_kl": "forward KL", "eval/nll": "NLL"}, marker="o")
    axes[1].set(title="Held-out answers", ylabel="nats per token")
    _phase_times(axes[2], rows)
    _lines(axes[3], rows, {"grad_norm": "gradient norm"})
    axes[3].set(title="Gradient norm before clipping")
    if _has(rows, "reward") or _has(rows, "eval/accuracy"):
        _lines(axes[4], rows, {"reward": "reward of samples", "eval/accuracy": "held-out accuracy"})
        axes[4].set(title="Reward and accuracy")
    else:
        _lines(axes[4], rows, {"lr": "learning rate"})
        axes[4].set(title="Learning rate")
        axes[4].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rates = [{"step": r["step"], "rate": r["tokens"] / r["time/step"]} for r in rows if r.get("time/step")]
    _lines(axes[5], rates, {"rate": "tokens/s"})
    axes[5].set(title="Response tokens per second of a step")
    for ax in (*axes[:2], *axes[3:]):
        ax.set_ylim(bottom=0)


def _has(rows: list[MetricsRow], key: str) -> bool:
    return any(row.get(key) is not None for row in rows)


def _lines(ax: Axes, rows: list[MetricsRow], labels: dict[str, str], marker: str | None = None) -> None:
    drawn = 0
    for colour, (key, label) in zip(COLOURS, labels.items(), strict=False):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            lone = "o" if len(points) == 1 else marker
            ax.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.6, marker=lone, markersize=4)
            drawn += 1
    if not drawn:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", va="center", color="#9a9a9a")
    elif len(labels) > 1:
        ax.legend()


def _phase_times(ax: Axes, rows: list[MetricsRow]) -> None:
    """Draws stacked bars; the part of `time/step` outside all phases is drawn as other."""
    timed = [row for row in rows if row.get("time/step")]
    bottom = [0.0] * len(timed)
    steps = [row["step"] for row in timed]
    for phase, colour in zip((*PHASES, "other"), COLOURS, strict=True):
        heights = [
            max(0.0, row["time/step"] - below) if phase == "other" else (row.get(f"time/{phase}") or 0.0)
            for row, below in zip(timed, bottom, strict=True)
        ]
        ax.bar(steps, heights, bottom=bottom, width=1.0, color=colour, label=phase, linewidth=0)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    ax.grid(False, axis="x")
    ax.set(title="Seconds of a step", ylabel="seconds")
    if timed:
        ax.set_ylim(0, 1.22 * max(bottom))  # room for the legend
        ax.legend(ncols=5, loc="upper center", handlelength=0.8, columnspacing=0.9, fontsize=8)
