"""What a killed engine leaves in shared memory: found while it lives, removed when it is gone.

vLLM's processes talk to each other through files in /dev/shm (`psm_*` of Python's multiprocessing, `vllm_dist_*` of its
CPU communicator), which they remove when they end in good order. A process that is killed cannot; whoever started it
does it then. Their names tell nothing of their owner, so they are read from the memory maps of the engine's processes,
and kept in a file beside its log for the next start, should the trainer be killed too.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

_FOLDER = Path("/dev/shm")


def shared_files(session: int) -> set[Path]:
    """The files in shared memory that the processes of a session hold."""
    found: set[Path] = set()
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and _session_of(process) == session:
            with contextlib.suppress(OSError):
                for line in (process / "maps").read_text().splitlines():
                    path = line.partition("/")[2]
                    if path.startswith("dev/shm/") and not path.endswith(" (deleted)"):
                        found.add(Path("/") / path)
    return found


class SharedMemoryOf:
    """The shared memory of one engine's processes, noted in a file."""

    def __init__(self, note: Path) -> None:
        """`note`: where the names are kept; those of an earlier engine that are left there are removed."""
        self._note = note
        self.remove()

    def look(self, session: int) -> None:
        """Notes what the processes hold now. Costs milliseconds."""
        files = shared_files(session) | self._noted()
        with contextlib.suppress(OSError):  # nothing that depends on it is wrong without
            self._note.write_text("".join(f"{path}\n" for path in sorted(files)))

    def remove(self) -> None:
        """Removes what is left. Only when the processes are gone."""
        for path in self._noted():
            with contextlib.suppress(OSError, ValueError):
                path.unlink()
        with contextlib.suppress(OSError):
            self._note.unlink()

    def _noted(self) -> set[Path]:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            paths = {Path(line) for line in self._note.read_text().splitlines()}
            return {path for path in paths if path.parent == _FOLDER}  # a damaged note removes nothing else
        return set()


def _session_of(process: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        # pid (name) state parent group session ..; the name may hold spaces and brackets
        return int((process / "stat").read_text().rpartition(")")[2].split()[3])
    return None
