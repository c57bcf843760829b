"""What a run reports: `metrics.jsonl` always, TensorBoard and W&B on request, a progress display, a table and curves.

Rows of metrics.jsonl: row k (k = 1 .. N) describes the k-th optimizer step, measured on samples drawn before it; its
`eval/*` keys, where it has any, are measured after that update. A row with step 0 holds only the evaluation of the
untrained student. So row 1's `reverse_kl` is the student's before any training, and so is row 0's `eval/forward_kl`.
"""

from opd_megatron.metrics.console import NullDisplay, TrainingDisplay
from opd_megatron.metrics.jsonl import MetricsLog, NullLog, read_metrics
from opd_megatron.metrics.plots import plot_curves
from opd_megatron.metrics.summary import Summary, result_table, summarize
from opd_megatron.metrics.timers import PhaseTimers, peak_memory_bytes
from opd_megatron.metrics.watch import Watch, how_it_went

__all__ = [
    "MetricsLog",
    "NullDisplay",
    "NullLog",
    "PhaseTimers",
    "Summary",
    "TrainingDisplay",
    "Watch",
    "how_it_went",
    "peak_memory_bytes",
    "plot_curves",
    "read_metrics",
    "result_table",
    "summarize",
]
