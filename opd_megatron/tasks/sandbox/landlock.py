"""Landlock (`man 7 landlock`): a process that takes rights to files away from itself, without privileges."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Sequence

from opd_megatron.tasks.sandbox import linux

_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE
# Rights by version: 13 of the first; refer, truncate and ioctl came later.
_FS_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_TRUNCATE = 1 << 14
_NET_RIGHTS = 0b11
"""Binding and connecting by TCP; from version 4."""
_SCOPES = 0b11
"""Abstract sockets and signals of others; from version 6."""


def version() -> int:
    """The kernel's version of it; 0 where it has none."""
    try:
        return linux.syscall("landlock", _CREATE, None, ctypes.c_size_t(0), _VERSION)
    except OSError:
        return 0


def confine(readable: Sequence[str], devices: Sequence[str], writable: str) -> None:
    """Leaves this process, for good, the right to read `readable`, to read and write `devices`, and to do anything in
    `writable`. Raises OSError."""
    found = version()
    rights = _FS_RIGHTS[min(found, 5)]
    attributes = struct.pack("QQQ", rights, _NET_RIGHTS if found >= 4 else 0, _SCOPES if found >= 6 else 0)
    size = 8 if found < 4 else 16 if found < 6 else 24
    ruleset = linux.syscall("landlock", _CREATE, ctypes.c_char_p(attributes), ctypes.c_size_t(size), 0)
    for path in readable:
        with contextlib.suppress(FileNotFoundError):
            _allow(ruleset, path, _READ & rights)
    for path in devices:
        _allow(ruleset, path, _READ_FILE | _WRITE_FILE)
    _allow(ruleset, writable, (rights & ~_EXECUTE))
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    linux.syscall("landlock", _RESTRICT, ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not os.path.isdir(path):
            rights &= _OF_FILES | _TRUNCATE
        rule = struct.pack("=Qi", rights, descriptor)
        linux.syscall("landlock", _ADD_RULE, ruleset, _PATH_BENEATH, ctypes.c_char_p(rule), 0)
    finally:
        os.close(descriptor)
