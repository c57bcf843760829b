"""Folders and files that appear whole or not at all.

    .NAME.partial    being written, or left by a process that was killed; never read
    NAME             complete by construction: it was renamed to this name after its last byte was on disk
    .NAME.deleted    on its way out

The parts are for what spans several ranks or a background thread; `new_folder` is all of them for one process.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opd_megatron.errors import OPDError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_RIGHTS = {errno.EACCES, errno.EPERM, errno.EROFS}
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR}


def disk_remedy(error: BaseException) -> str | None:
    """Says what a user can do about a disk error, by its cause; None for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    if number in _NO_SPACE:
        return "free disk space or choose another folder"
    if number in _NO_RIGHTS:
        return "check the rights of the folder or choose another one"
    if number in _NOT_THERE:
        return "its folder does not exist: make it or choose another one"
    return None


@contextmanager
def new_folder(out: Path, kind: type[OPDError], *, replaces: bool = False) -> Iterator[Path]:
    """Makes a sibling folder to write into. It becomes `out` when the block ends well and vanishes when it does not.

    Args:
        kind: class of the error when the folder cannot be written.
        replaces: `out` may exist with something in it, and stays as it is until the new one is whole.
    """
    out = Path(os.path.abspath(out))
    partial = partial_path(out)
    try:
        if not replaces and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
            raise kind(f"output {str(out)!r} exists and is not an empty folder: give a new path or remove it")
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            publish(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if isinstance(error, OPDError):
            raise
        remedy = disk_remedy(error) or "choose another folder"
        raise kind(f"cannot write {str(out)!r} ({error}): {remedy}") from error


def partial_path(out: Path) -> Path:
    """Names the sibling in which `out` is written."""
    return out.with_name(f".{out.name}.partial")


def publish(partial: Path, out: Path) -> None:
    """Gives a complete folder its name, in place of what has it now; its files are on disk already."""
    flush(partial)
    going = _going(out)
    shutil.rmtree(going, ignore_errors=True)
    if out.exists():
        os.rename(out, going)
    os.rename(partial, out)
    flush(out.parent)
    shutil.rmtree(going, ignore_errors=True)


def remove(path: Path) -> None:
    """Takes the name away before the content: a killed removal leaves no half folder with a real name."""
    going = _going(path)
    shutil.rmtree(going, ignore_errors=True)
    os.rename(path, going)
    shutil.rmtree(going, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Replaces a text file in one move, and flushes it."""
    partial = partial_path(path)
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    partial.replace(path)


def flush(path: Path) -> None:
    """Flushes a file or a folder's list of names: a power cut must not leave a name without content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _going(path: Path) -> Path:
    return path.with_name(f".{path.name}.deleted")
