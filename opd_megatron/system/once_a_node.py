"""Work that every rank wants the result of and one rank of each machine does: downloads, locks, tokenizing.

It comes before the ranks meet, so they find each other through their launcher: the ranks of a machine are its children.
The first one leaves a file for each of the others, which takes it and removes it.
"""

from __future__ import annotations

import atexit
import os
import pickle
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from opd_megatron.errors import OPDError
from opd_megatron.system.ranks import launched

Result = TypeVar("Result")
_PAUSE_SECONDS = 0.02
_calls: Counter[str] = Counter()


def once_a_node(work: str, action: Callable[[], Result]) -> Result:
    """Runs `action` on the first rank of this machine; the others wait, and get its result or its error.

    Every rank of the machine makes the same calls of the same `work`. What cannot be handed over (it does not pickle,
    or the disk is full), and what raises anything but an OPDError, each rank does for itself. A process that torchrun
    has not started is alone.
    """
    local_rank, ranks = _local_ranks()
    if ranks == 1:
        return action()
    work = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')} {work}"
    name = f"{sha256(work.encode()).hexdigest()[:16]}-{_calls[work]}"
    _calls[work] += 1
    folder = _folder()
    if local_rank > 0:
        reply = _taken(folder / f"{name}-{local_rank}")
        if reply[0] == "yourself":
            return action()
        if reply[0] == "error":
            raise reply[1](reply[2])
        return reply[1]  # type: ignore[no-any-return]
    atexit.register(_remove, folder)
    with _leaving(folder / name, ranks) as leave:
        result = action()
        leave(("result", result))
    return result


def _local_ranks() -> tuple[int, int]:
    """(this rank's number on its machine, how many there are)."""
    if launched() is None:  # what a scheduler has left behind
        return 0, 1
    rank, ranks = os.environ.get("LOCAL_RANK", ""), os.environ.get("LOCAL_WORLD_SIZE", "")
    whole = rank.isdecimal() and ranks.isdecimal() and int(rank) < int(ranks)
    return (int(rank), int(ranks)) if whole else (0, 1)


def _folder() -> Path:
    """Of this machine's ranks of this run alone: process numbers come again, with another start."""
    parent = os.getppid()
    started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    folder = Path(tempfile.gettempdir()) / f"opd-megatron-{os.getuid()}-{parent}-{started}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
        raise PermissionError(f"{str(folder)!r} is not this user's alone")
    return folder


@contextmanager
def _leaving(place: Path, ranks: int) -> Iterator[Callable[[Any], None]]:
    """The first rank's side: whatever comes of the block, the others get something."""
    reply: Any = ("yourself",)

    def leave(found: Any) -> None:
        nonlocal reply
        reply = found

    try:
        yield leave
    except OPDError as error:
        reply = ("error", type(error), str(error))
        raise
    finally:
        try:
            place.write_bytes(pickle.dumps(reply))
        except Exception:  # of many kinds, where something does not pickle
            os.truncate(place, 0) if place.exists() else place.touch()
        for other in range(1, ranks):  # each is there at once and whole
            os.link(place, f"{place}-{other}")
        place.unlink()


def _taken(path: Path) -> Any:
    launcher = os.getppid()
    while not path.exists():
        if os.getppid() != launcher:
            raise RuntimeError("the launcher of this rank is gone")
        time.sleep(_PAUSE_SECONDS)
    content = path.read_bytes()
    path.unlink()
    return pickle.loads(content) if content else ("yourself",)


def _remove(folder: Path) -> None:
    with suppress(OSError):  # others have not taken theirs yet
        folder.rmdir()
