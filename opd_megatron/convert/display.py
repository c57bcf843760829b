"""The progress bar of a conversion: bytes of this rank's shard, on the terminal of the first rank."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


class Display:
    """Bars inside a `with` block; shows nothing unless `enabled`."""

    def __init__(self, enabled: bool) -> None:
        columns = (
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
            TimeRemainingColumn(),
        )  # fmt: skip
        self._progress = Progress(*columns, console=Console(stderr=True), disable=not enabled)

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()

    def bar(self, what: str, total: int) -> Callable[[int], None]:
        """A new bar; call the result with the bytes done since its last call."""
        task = self._progress.add_task(what, total=total)
        return lambda done: self._progress.advance(task, done)
