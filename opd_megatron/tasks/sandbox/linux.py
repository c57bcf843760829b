"""System calls that Python's library lacks. Every function raises OSError as the library does."""

from __future__ import annotations

import ctypes
import os
import platform

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
MACHINE = platform.machine()

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_CAPBSET_DROP = 1, 4, 38, 24


def syscall(name: str, number: int, *arguments: object) -> int:
    """Makes a system call by number."""
    found = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if found < 0:
        raise _error(name)
    return found


def prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise _error("prctl")


def unshare(flags: int) -> None:
    if _libc.unshare(flags) != 0:
        raise _error("unshare")


def mount(source: str, target: str, kind: str | None, flags: int = 0, data: str | None = None) -> None:
    if _libc.mount(source.encode(), target.encode(), _text(kind), ctypes.c_ulong(flags), _text(data)) != 0:
        raise _error(f"mount {target}")


def umount(target: str, flags: int) -> None:
    if _libc.umount2(target.encode(), flags) != 0:
        raise _error(f"umount {target}")


def drop_capabilities() -> None:
    """Gives up all capabilities for good."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    nothing = (ctypes.c_uint32 * 6)()
    if _libc.capset(header, nothing) != 0:
        raise _error("capset")


def _text(value: str | None) -> bytes | None:
    return None if value is None else value.encode()


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")
