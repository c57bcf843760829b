"""Temporary folders that are recognised as left behind when the process that made them was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

_LOCK = ".lock"


class HeldFolder:
    """A private folder that goes when `remove` is called, or with the process; what a killed process has left goes when
    the next one makes a folder of the same kind.

    While it is in use a lock is held on a file in it. The kernel frees the lock however the process ends, and knows it
    across containers that share the folder's file system, which process ids do not.
    """

    def __init__(self, prefix: str, root: str) -> None:
        """Raises OSError."""
        remove_those_left(prefix, root)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
        self.remove = weakref.finalize(self, _remove, self.path, _hold(self.path))


class RoomyFolders:
    """Held folders for files that are best in memory: in /dev/shm while that has room, else on disk."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._folders: dict[str, HeldFolder] = {}

    def with_room(self, size: int) -> Path:
        """One with `size` bytes free, where there is any."""
        root = tempfile.gettempdir()
        with contextlib.suppress(OSError):
            if shutil.disk_usage("/dev/shm").free > size:
                root = "/dev/shm"
        if root not in self._folders:
            self._folders[root] = HeldFolder(self._prefix, root)
        return self._folders[root].path

    def remove(self) -> None:
        """Removes all of them. Safe to call twice; `with_room` starts afresh."""
        for folder in self._folders.values():
            folder.remove()
        self._folders.clear()


def remove_those_left(prefix: str, root: str) -> None:
    """Removes the folders whose process is gone."""
    for folder in Path(root).glob(f"{prefix}*"):
        with contextlib.suppress(OSError), (folder / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def _hold(folder: Path) -> int:
    # Locked before it has the name that others look for.
    descriptor = os.open(folder / f"{_LOCK}.new", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.rename(folder / f"{_LOCK}.new", folder / _LOCK)
    return descriptor


def _remove(folder: Path, descriptor: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.close(descriptor)
