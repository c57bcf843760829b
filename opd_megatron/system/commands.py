"""What the trainer's ranks are about to do with a part of the job, told to the ranks that hold it alone.

Such a rank has no steps of its own: it waits for the name and the arguments of the next call (of `RolloutClient`, of a
teacher), makes the same call, and so is in the same collectives. Told through the store behind the process group, as a
collective would have to be entered by everybody, also by a rank that has failed.
"""

from __future__ import annotations

import pickle
import time
from typing import Any

from torch.distributed import Store

_KEPT = 8
"""Calls that are not deleted yet: a rank that nobody waits for may be some behind."""
_PATIENCE = (0.002, 0.05)
"""Seconds between two looks: at first, and at the most."""


class Commands:
    """A numbered list of calls in a store: one rank writes, others read."""

    def __init__(self, store: Store, part: str) -> None:
        """`part`: whose list it is."""
        self._store, self._part = store, part
        self._count = 0
        self._closed = False

    def tell(self, name: str, *arguments: Any) -> None:
        """Writes the next call."""
        if self._count >= _KEPT:
            # Of so many some were collectives that are over, which nobody enters without having read what is before.
            self._store.delete_key(self._key(self._count - _KEPT))
        self._write(name, arguments)

    def close(self) -> None:
        """Writes that there is no next call. Safe to call twice, and after any failure."""
        if not self._closed:
            self._write("close", ())
        self._closed = True

    def _write(self, name: str, arguments: tuple[Any, ...]) -> None:
        self._store.set(self._key(self._count), pickle.dumps((name, arguments)))  # type: ignore[arg-type]
        self._count += 1

    def _key(self, number: int) -> str:
        return f"opd_command/{self._part}/{number}"

    def next(self) -> tuple[str, tuple[Any, ...]]:
        """Waits for the next call, for ever: a step between two of them takes as long as it takes, and the launcher
        ends this process when the trainer is gone."""
        key, pause = self._key(self._count), _PATIENCE[0]
        while not self._store.check([key]):
            time.sleep(pause)
            pause = min(2 * pause, _PATIENCE[1])
        self._count += 1
        name, arguments = pickle.loads(self._store.get(key))
        return name, arguments
