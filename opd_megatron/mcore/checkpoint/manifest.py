"""`sha256sums`: a checksum of every file of a checkpoint, in the format that `sha256sum -c` reads."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

MANIFEST = "sha256sums"
_LINE = re.compile(r"([0-9a-f]{64})  (\S+)")
_BLOCK = 1 << 20


def write_manifest(folder: Path, known: dict[str, str]) -> None:
    """Writes the manifest. `known`: checksums of the files that were hashed while they were written."""
    sums = dict(known)
    for path in sorted(folder.iterdir()):
        if path.name not in sums:
            sums[path.name] = _sha256(path)
    lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
    # The list has a checksum of its own, or a flipped byte in a name would be reported as a missing file.
    (folder / MANIFEST).write_text("".join(lines) + f"# {_digest_of(lines)}\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, str]:
    """Reads file name -> checksum. Raises OSError or ValueError when the manifest itself is damaged."""
    path = folder / MANIFEST
    try:
        *lines, own = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except ValueError:
        raise ValueError(f"{MANIFEST} is empty or not text") from None
    if own != f"# {_digest_of(lines)}\n":
        raise ValueError(f"{MANIFEST} does not match its own checksum")
    matches = [_LINE.fullmatch(line.rstrip("\n")) for line in lines]
    return {match[2]: match[1] for match in matches if match}


def find_damage(folder: Path, share: slice = slice(None)) -> str | None:
    """Finds the first damaged file among this `share` of the files and says what is wrong; None when all are whole."""
    try:
        sums = read_manifest(folder)
    except (OSError, ValueError) as error:
        return f"{MANIFEST} is missing" if isinstance(error, FileNotFoundError) else str(error)
    for name, expected in sorted(sums.items())[share]:
        try:
            found = _sha256(folder / name)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != expected:
            return f"{name} does not match its checksum ({(folder / name).stat().st_size} bytes)"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _digest_of(lines: list[str]) -> str:
    return hashlib.sha256("".join(lines).encode()).hexdigest()
