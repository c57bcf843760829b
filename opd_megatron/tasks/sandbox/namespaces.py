"""User namespaces (`man 7 user_namespaces`): a process without network, without others, with a file system of its own.

The new root is a small tmpfs with what an interpreter reads, mounted read-only, and a folder to write in.
"""

from __future__ import annotations

import os
import select
from collections.abc import Sequence

from opd_megatron.tasks.sandbox import linux

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE, _DETACH = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18, 2,
)  # fmt: skip
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_NOBODY = 65534
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_ROOT = "/tmp"
"""Where the new root is put together: any folder that is always there."""


def available() -> bool:
    """Whether this kernel lets this user make what is needed: tried in a process of its own."""
    child = os.fork()
    if child == 0:
        try:
            _enter()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return status == 0


def confine(readable: Sequence[str], writable: str, size: int) -> None:
    """Moves this process there and returns in a child, which is alone in it; this process ends with the child's code.

    Args:
        readable: files and folders that are seen, read-only.
        writable: path of the empty folder that may be written to.
        size: bytes that may be written there.

    Raises OSError.
    """
    parent = os.getppid()
    _enter()
    linux.prctl(linux.PR_SET_PDEATHSIG, 9)  # which other credentials have cleared
    if os.getppid() != parent:
        os._exit(1)
    _continue_in_child()
    _build_root(readable, writable, size)
    linux.drop_capabilities()
    _continue_in_child()  # the first process of a namespace is deaf to signals, also to those of its limits


def _continue_in_child() -> None:
    """Returns in a child that ends with this process; this process waits for it and ends with its code."""
    alive, end = os.pipe()
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    os.close(end)
    linux.prctl(linux.PR_SET_PDEATHSIG, 9)
    if select.select([alive], [], [], 0)[0]:  # closed: the parent was gone before that was said
        os._exit(1)
    os.close(alive)


def _enter() -> None:
    uid, gid = os.getuid(), os.getgid()
    linux.unshare(_NEWUSER | _NEWNS | _NEWNET | _NEWPID | _NEWIPC | _NEWUTS)
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{_NOBODY} {uid} 1")
    _write("/proc/self/gid_map", f"{_NOBODY} {gid} 1")
    linux.mount("none", "/", None, _REC | _PRIVATE)


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _build_root(readable: Sequence[str], writable: str, size: int) -> None:
    # Whatever lies below the folder that the new root hides is taken by descriptor first.
    sources = [(path, os.open(path, os.O_PATH)) for path in [*readable, *DEVICES] if os.path.exists(path)]
    linux.mount("tmpfs", _ROOT, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755,nr_inodes=4096")
    for path, descriptor in sources:
        target = _ROOT + os.path.realpath(path)
        _make(target, is_folder=os.path.isdir(f"/proc/self/fd/{descriptor}"))
        flags = _BIND if path in DEVICES else _BIND | _REC
        linux.mount(f"/proc/self/fd/{descriptor}", target, None, flags)
        if path not in DEVICES:
            linux.mount("none", target, None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
        os.close(descriptor)
        if os.path.realpath(path) != path:
            _link(_ROOT + path, os.path.realpath(path))
    os.makedirs(_ROOT + writable, exist_ok=True)
    options = f"size={size},mode=700,nr_inodes=2048"
    linux.mount("tmpfs", _ROOT + writable, "tmpfs", _NOSUID | _NODEV | _NOEXEC, options)
    os.makedirs(_ROOT + "/.old", exist_ok=True)
    os.chdir(_ROOT)
    linux.syscall("pivot_root", _PIVOT_ROOT[linux.MACHINE], b".", b".old")
    os.chdir("/")
    linux.umount("/.old", _DETACH)
    os.rmdir("/.old")
    linux.mount("none", "/", None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)


def _make(path: str, *, is_folder: bool) -> None:
    if is_folder:
        os.makedirs(path, exist_ok=True)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if not os.path.exists(path):
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))


def _link(path: str, target: str) -> None:
    if not os.path.lexists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.symlink(target, path)
