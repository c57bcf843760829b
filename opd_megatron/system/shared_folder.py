"""Whether a folder is the same one on all machines of a run."""

from __future__ import annotations

import os
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from opd_megatron.errors import ConfigError

_PATIENCE_SECONDS = 10.0
"""Network storage shows other machines a new file after some seconds."""


def check_shared(folder: Path, what: str) -> None:
    """Makes sure that every rank sees what rank 0 writes to a folder, which it has made. Collective over all ranks.

    Args:
        what: how the user calls it: `output_dir='runs/x'`.

    Raises:
        ConfigError: on every rank; says which machines do not.
        OSError: on rank 0, which cannot write there.
    """
    if dist.get_world_size() == 1:
        return
    name = [f".seen-{uuid.uuid4().hex}"]
    dist.broadcast_object_list(name, src=0, device=torch.device("cpu"))
    mark = folder / name[0]
    problem: OSError | None = None
    if dist.get_rank() == 0:
        try:
            mark.touch()
        except OSError as error:
            problem = error
    dist.barrier()
    found: list[tuple[str, str, bool]] = [("", "", True)] * dist.get_world_size()
    dist.all_gather_object(found, (socket.gethostname(), str(folder.resolve()), _appears(mark)))
    if dist.get_rank() == 0:
        mark.unlink(missing_ok=True)
    if problem is not None:
        raise problem
    first, blind = found[0], [(rank, *each) for rank, each in enumerate(found) if not each[2]]
    if blind and any(each[2] for each in found):
        raise ConfigError(
            f"{what} is not one folder for all machines: what rank 0 writes on {first[0]} to {first[1]!r}, "
            f"{_told(blind)}: give a path on storage that all of them share"
        )


def _appears(mark: Path) -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        with suppress(OSError):
            os.listdir(mark.parent)  # makes a network client ask the server again
        if mark.exists():
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _told(blind: list[tuple[int, str, str, bool]]) -> str:
    rank, host, path, _ = blind[0]
    others = len({host for _, host, _, _ in blind} - {host})
    more = f" (and {others} other machines)" if others else ""
    return f"rank {rank} on {host} does not see in {path!r}{more}"
