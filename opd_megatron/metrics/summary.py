"""The numbers a run is judged by, and the table that ends it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table

from opd_megatron.metrics.jsonl import PHASES, MetricsRow

LAST_ROWS = 3
LABELS = {
    "reward": "reward of own samples",
    "reverse_kl": "reverse KL on own samples, nats/token",
    "eval/reverse_kl": "held-out reverse KL, nats/token",
    "eval/forward_kl": "held-out forward KL, nats/token",
    "eval/nll": "held-out NLL, nats/token",
    "eval/accuracy": "held-out accuracy",
}


@dataclass(frozen=True, slots=True)
class Summary:
    """A run in numbers; NaN where a run has no such number."""

    change: dict[str, tuple[float, float]]
    """Metric -> (untrained, trained). Own samples differ from step to step, so `reverse_kl` goes from row 1 to the
    mean of the last three rows; `eval/*`, always on the same held-out rows, from the first evaluation to the last."""
    tokens_per_second: dict[str, float]
    """Phase -> median over steps of response tokens per second of that phase."""
    sync_seconds: float
    """Median seconds to sync the weights into the rollout engine."""
    step_seconds: float
    """Median seconds of a whole step."""
    peak_bytes: float
    """Largest `memory/peak` of any step."""
    steps: int
    """The last step."""

    def ratio(self, key: str) -> float:
        """Computes trained / untrained."""
        before, after = self.change.get(key, (math.nan, math.nan))
        return after / before if before else math.nan


def summarize(rows: Sequence[MetricsRow]) -> Summary:
    """Reduces the rows of metrics.jsonl."""
    return Summary(
        change={key: change for key in LABELS if (change := _change(rows, key)) is not None},
        tokens_per_second={phase: _median(_rates(rows, f"time/{phase}")) for phase in PHASES},
        sync_seconds=_median(_values(rows, "time/sync")),
        step_seconds=_median(_values(rows, "time/step")),
        peak_bytes=max(_values(rows, "memory/peak"), default=math.nan),
        steps=max((row["step"] for row in rows), default=0),
    )


def result_table(rows: Sequence[MetricsRow]) -> RenderableType:
    """Builds the table of what training changed (step 0 against last) and how fast, for a rich console."""
    summary = summarize(rows)
    change = Table(title=f"Result after {summary.steps} steps", title_justify="left")
    for heading, justify in (("", "left"), ("step 0", "right"), ("last", "right"), ("last / step 0", "right")):
        change.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for key, (before, after) in summary.change.items():
        cells = (_number(before, "{:.3f}"), _number(after, "{:.3f}"), _number(summary.ratio(key), "{:.2f}"))
        change.add_row(LABELS[key], *cells)

    speed = Table(title="Median over steps", title_justify="left", show_header=False)
    speed.add_column()
    speed.add_column(justify="right")
    for phase, rate in summary.tokens_per_second.items():
        speed.add_row(phase, _number(rate, "{:,.0f} tokens/s"))
    speed.add_row("one weight sync", _number(summary.sync_seconds, "{:.2f} s"))
    speed.add_row("whole step", _number(summary.step_seconds, "{:.2f} s"))
    speed.add_row("peak memory, rank 0", _number(summary.peak_bytes / 2**30, "{:.2f} GiB"))
    return Group(change, speed)


def _change(rows: Sequence[MetricsRow], key: str) -> tuple[float, float] | None:
    values = _values(rows, key)
    if not values:
        return None
    if key.startswith("eval/"):
        return values[0], values[-1] if len(values) > 1 else math.nan
    # A run of fewer than four steps has no tail apart from its first row.
    return values[0], statistics.fmean(values[-min(LAST_ROWS, max(1, len(values) - 1)) :])


def _values(rows: Sequence[MetricsRow], key: str) -> list[float]:
    return [float(row[key]) for row in rows if row.get(key) is not None]


def _rates(rows: Sequence[MetricsRow], key: str) -> list[float]:
    return [row["tokens"] / row[key] for row in rows if row.get("tokens") and row.get(key)]


def _median(values: Iterable[float]) -> float:
    values = list(values)
    return statistics.median(values) if values else math.nan


def _number(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "-"
