"""Whether this process is one rank of several: the one reading of the variables that launchers set."""

from __future__ import annotations

import os
from dataclasses import dataclass

from opd_megatron.errors import ConfigError

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def forget() -> None:
    """Removes what is left of a launcher's variables from the environment of a process that is no rank: libraries read
    them too."""
    for name in (*_NEEDED, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


@dataclass(frozen=True, slots=True)
class Ranks:
    """What torchrun told this process."""

    rank: int
    world_size: int
    meeting_point: str
    """Host and port of rank 0."""


def launched() -> Ranks | None:
    """Reads what torchrun set; None in a process that was plainly started, also where a scheduler or an earlier command
    left some of the variables of a single rank behind.

    Raises:
        ConfigError: the variables speak of several ranks and are not whole, or make no sense.
    """
    found = {name: os.environ.get(name, "").strip() for name in _NEEDED}
    if not found["WORLD_SIZE"] and not (found["RANK"] and found["MASTER_ADDR"]):
        return None
    missing = [name for name in _NEEDED if not found[name]]
    if missing and found["WORLD_SIZE"] in ("", "1") and found["RANK"] in ("", "0"):
        return None
    remedy = "start with torchrun, or unset them"
    if missing:
        named = ", ".join(f"{name}={value}" for name, value in found.items() if value)
        raise ConfigError(f"{named} without {', '.join(missing)}: {remedy}")
    numbers = {name: found[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    wrong = [name for name, value in numbers.items() if not value.isdecimal()]
    if wrong:
        raise ConfigError(f"{wrong[0]}={found[wrong[0]]!r} must be a whole number: {remedy}")
    rank, world_size = int(found["RANK"]), int(found["WORLD_SIZE"])
    if not rank < world_size:
        raise ConfigError(f"RANK={rank} must be below WORLD_SIZE={world_size}: {remedy}")
    return Ranks(rank, world_size, f"{found['MASTER_ADDR']}:{found['MASTER_PORT']}")
