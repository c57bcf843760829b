"""What a person sees while a run trains: a progress bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from opd_megatron.types import StepMetrics

_PLAIN_ANSWERS_SECONDS = 60.0
"""Between two lines about answers under way, where there is no bar."""


class NullDisplay:
    """Shows nothing: what every rank but the first holds."""

    def step(self, metrics: StepMetrics | Mapping[str, Any]) -> None:
        """Reports a row of metrics.jsonl: an optimizer step, an evaluation, or both."""

    def note(self, text: str) -> None:
        """Prints one line that the user should read."""

    def sample(self, text: str) -> None:
        """Shows a prompt and an answer of the student, as text."""

    def answers(self, done: int, of: int) -> None:
        """Shows how far the answers are that are waited for; called every few seconds."""

    def print(self, renderable: Any) -> None:
        """Prints anything that rich can draw, such as `result_table(rows)`."""

    def close(self) -> None:
        """Removes the progress bar. Safe to call twice."""

    def __enter__(self) -> NullDisplay:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class TrainingDisplay(NullDisplay):
    """The first rank's display.

    Where the console is a terminal and `enabled`, a bar with KL, tokens/s and time left; elsewhere one plain line a
    step, thinned to one every `plain_seconds` (the first, the last and evaluations are always printed).

    It only watches: what the terminal cannot show is replaced, and a terminal that is gone is said so once, on stderr.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        enabled: bool = True,
        *,
        console: Console | None = None,
        plain_seconds: float = 2.0,
    ) -> None:
        self._broken = False
        self.console = console or Console(file=tolerant(sys.stdout))
        self._total, self._start, self._plain_seconds = total_steps, start_step, plain_seconds
        self._began = time.monotonic()
        self._last_line = -plain_seconds
        self._last_answers = time.monotonic()
        self._bar: Progress | None = None
        if enabled and self.console.is_terminal:
            self._bar = _progress(self.console)
            self._task = self._bar.add_task("", total=total_steps, completed=start_step, status="starting")
            self._show(self._bar.start)

    def step(self, metrics: StepMetrics | Mapping[str, Any]) -> None:
        row = metrics.as_dict() if isinstance(metrics, StepMetrics) else dict(metrics)
        if "loss" in row:
            self._training_step(row)
        evaluated = [
            f"{name} {row[key]:.3f}"
            for key, name in (("eval/forward_kl", "forward KL"), ("eval/nll", "NLL"), ("eval/accuracy", "accuracy"))
            if row.get(key) is not None
        ]
        if evaluated:
            self.note(f"step {row['step']}: held-out {', '.join(evaluated)}")

    def note(self, text: str) -> None:
        self._show(self.console.print, Text(text), soft_wrap=True)

    def sample(self, text: str) -> None:
        if self.console.is_terminal:
            self._show(self.console.print, Panel(Text(text), title="sample", title_align="left", border_style="dim"))
        else:
            self.note("sample:\n" + "\n".join(f"  | {line}" for line in text.splitlines()))

    def answers(self, done: int, of: int) -> None:
        text = f"sampling: {done} of {of} answers"
        if self._bar is not None:
            self._show(self._bar.update, self._task, status=text)
        elif time.monotonic() - self._last_answers >= _PLAIN_ANSWERS_SECONDS:
            self._last_answers = time.monotonic()
            self.note(text)

    def print(self, renderable: Any) -> None:
        self._show(self.console.print, renderable)

    def close(self) -> None:
        if self._bar is not None:
            self._show(self._bar.stop)
            self._bar = None

    def _show(self, action: Callable[..., object], *args: Any, **options: Any) -> None:
        if self._broken:
            return
        try:
            action(*args, **options)
        except (OSError, ValueError) as error:  # a closed pipe, a full disk, an encoding
            self._broken = True
            with contextlib.suppress(OSError, ValueError):
                print(f"opd-megatron: the terminal shows nothing from here on ({error})", file=sys.stderr)

    def _training_step(self, row: Mapping[str, Any]) -> None:
        step, seconds = int(row["step"]), row.get("time/step")
        shown = (("KL", "reverse_kl"), ("reward", "reward"), ("loss", "loss"))
        status = "  ".join(f"{name} {row[key]:.3f}" for name, key in shown if row.get(key) is not None)
        if seconds:
            status += f"  {row['tokens'] / seconds:,.0f} tok/s"
        if self._bar is not None:
            self._show(self._bar.update, self._task, completed=step, status=status)
            return
        now = time.monotonic()
        if step in (self._start + 1, self._total) or now - self._last_line >= self._plain_seconds:
            self._last_line = now
            pace = f"  {seconds:.2f} s/step" if seconds else ""
            self.note(f"step {step}/{self._total}  {status}{pace}  {self._time_left(step, now)} left")

    def _time_left(self, step: int, now: float) -> str:
        per_step = (now - self._began) / max(1, step - self._start)
        return str(timedelta(seconds=round(per_step * (self._total - step))))


def tolerant(stream: Any) -> Any:
    """Makes a stream replace what its encoding does not have."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        stream.reconfigure(errors="replace")
    return stream


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        speed_estimate_period=600,  # steps take seconds: the default half minute holds too few of them
        redirect_stdout=False,
        redirect_stderr=False,
    )
