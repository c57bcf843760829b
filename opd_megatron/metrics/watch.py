"""What a run's numbers say in words: warnings while it trains, and how it went at its end.

Every finding names the symptom of docs/troubleshooting.md that helps with it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opd_megatron.metrics.jsonl import MetricsRow

MISMATCH_LIMIT = 1.1
"""Mean of exp |log p of the trainer - log p of the engine|; 1 where the two agree."""
TRUNCATED_LIMIT = 0.5
CLIPPED_LIMIT, CLIPPED_FAR = 0.5, 4.0
"""Share of the steps that were clipped, and by how much their median is beyond the limit."""
WINDOW = 20
"""Steps over which answers are compared, and between two warnings of one kind."""
_SMOOTH = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a person should know."""

    text: str
    symptom: str = ""
    """Heading of docs/troubleshooting.md; empty where nothing is wrong."""

    def __str__(self) -> str:
        return self.text if not self.symptom else f"{self.text} (docs/troubleshooting.md: {self.symptom})"


class Watch:
    """Looks at every row of a run that trains; says each thing at most once in `WINDOW` steps."""

    def __init__(self) -> None:
        self._lengths: list[float] = []
        self._said: dict[str, int] = {}

    def look(self, row: MetricsRow) -> list[Finding]:
        """Returns what is worth a warning after this step."""
        if row.get("rollout/mean_length") is not None:
            self._lengths.append(float(row["rollout/mean_length"]))
        found = [self._mismatch(row), self._growth()]
        return [finding for finding in found if finding is not None and self._is_new(finding, int(row["step"]))]

    def _mismatch(self, row: MetricsRow) -> Finding | None:
        value = row.get("mismatch")
        if value is None or value <= MISMATCH_LIMIT or row.get("policy_lag"):
            return None  # of older weights' answers it is no sign of anything wrong
        return _mismatched(value)

    def _growth(self) -> Finding | None:
        lengths = self._lengths
        if len(lengths) <= WINDOW:
            return None
        before, now = _mean(lengths[-WINDOW - _SMOOTH : -WINDOW]), _mean(lengths[-_SMOOTH:])
        if now < 2 * before:
            return None
        return Finding(
            f"answers have grown from {before:.0f} to {now:.0f} tokens within {WINDOW} steps",
            "Answers grow without end",
        )

    def _is_new(self, finding: Finding, step: int) -> bool:
        last = self._said.get(finding.symptom)
        if last is not None and step - last < WINDOW:
            return False
        self._said[finding.symptom] = step
        return True


def how_it_went(rows: Sequence[MetricsRow], clip_grad: float | None = None) -> list[Finding]:
    """Judges a run by its rows.

    Args:
        clip_grad: `optimizer.clip_grad`, to tell which gradients were clipped.
    """
    steps = [row for row in rows if row.get("loss") is not None]
    if not steps:
        return []
    checks: list[Callable[[], Finding | None]] = [
        lambda: _divergence(steps), lambda: _clipping(steps, clip_grad), lambda: _truncation(steps),
        lambda: _agreement(steps),
    ]  # fmt: skip
    return [finding for check in checks if (finding := check()) is not None]


def _divergence(rows: Sequence[MetricsRow]) -> Finding | None:
    values = _values(rows, "reverse_kl")
    if len(values) < 2:
        return None
    size = min(_SMOOTH, max(1, len(values) // 2))
    smooth = [_mean(values[end - size : end]) for end in range(size, len(values) + 1)]
    first, last, least = values[0], smooth[-1], min(smooth)
    if last > 1.2 * first:
        return Finding(f"diverging: reverse KL rose from {first:.3f} to {last:.3f}", "Divergence rises")
    if last > 1.5 * least and last - least > 0.05:
        step = rows[smooth.index(least) + size - 1]["step"]
        return Finding(f"reverse KL was {least:.3f} at step {step} and rose to {last:.3f} since", "Divergence rises")
    if last > 0.9 * first:
        return Finding(f"reverse KL hardly fell, from {first:.3f} to {last:.3f}", "Slow convergence")
    return Finding(f"reverse KL fell from {first:.3f} to {last:.3f}")


def _clipping(rows: Sequence[MetricsRow], clip_grad: float | None) -> Finding | None:
    norms = _values(rows, "grad_norm")
    if not clip_grad or not norms:
        return None
    late = norms[len(norms) // 2 :]
    share = sum(norm > clip_grad for norm in late) / len(late)
    if share <= CLIPPED_LIMIT or _median(late) <= CLIPPED_FAR * clip_grad:
        return None  # Adam divides by the size of gradients anyway; cut to a small part they are all alike
    return Finding(
        f"gradients were clipped in {share:.0%} of the steps of the second half (median norm {_median(late):.2f}, "
        f"optimizer.clip_grad={clip_grad:g})",
        "Slow convergence",
    )


def _truncation(rows: Sequence[MetricsRow]) -> Finding | None:
    shares = _values(rows, "rollout/truncated")[-_SMOOTH:]
    if not shares or _mean(shares) <= TRUNCATED_LIMIT:
        return None
    return Finding(
        f"{_mean(shares):.0%} of the last answers were cut at rollout.max_new_tokens: the student learns beginnings",
        "Answers grow without end",
    )


def _agreement(rows: Sequence[MetricsRow]) -> Finding | None:
    values = _values([row for row in rows if not row.get("policy_lag")], "mismatch")
    return None if not values or _median(values) <= MISMATCH_LIMIT else _mismatched(_median(values))


def _mismatched(value: float) -> Finding:
    return Finding(
        f"engine and trainer disagree about the sampled tokens (mismatch {value:.3f}, 1 where they agree)",
        "Engine and trainer disagree",
    )


def _values(rows: Sequence[MetricsRow], key: str) -> list[float]:
    return [float(row[key]) for row in rows if row.get(key) is not None]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)
