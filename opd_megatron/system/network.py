"""Addresses of this machine, and which of them its ranks would meet at."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

from opd_megatron.errors import ConfigError
from opd_megatron.system.ranks import Ranks

_SIOCGIFADDR = 0x8915


def interfaces() -> dict[str, str]:
    """IPv4 address of each network interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                found[name] = socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
            except OSError:
                continue
    return found


def meeting_address() -> tuple[str, str, str]:
    """(interface, address, why): where gloo listens, and NCCL's first exchange with it."""
    known = interfaces()
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        chosen = os.environ.get(variable, "").split(",")[0].lstrip("=^")
        if chosen:
            return chosen, known.get(chosen, "none"), f"{variable}={chosen}"
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        return "none", "none", f"the host name {host} resolves to nothing"
    name = next((name for name, own in known.items() if own == address), "lo" if is_loopback(address) else "none")
    return name, address, f"the host name {host} resolves to it"


def check_reachable(ranks: Ranks) -> None:
    """Makes sure, on one of several machines, that the others reach the address that its ranks meet at.

    Raises:
        ConfigError: it is this machine's own alone. Where MASTER_ADDR is too, all machines are one.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size))
    if here >= ranks.world_size or _is_here_alone(ranks.meeting_point.rpartition(":")[0]):
        return
    found = _gloo_address()
    if found is not None and not is_loopback(found):
        return
    name = os.environ.get("GLOO_SOCKET_IFNAME")
    why = f"GLOO_SOCKET_IFNAME={name}" if name else f"the address of the host name {socket.gethostname()}"
    others = ", ".join(f"{name} ({own})" for name, own in interfaces().items() if not is_loopback(own)) or "none"
    raise ConfigError(
        f"rank {ranks.rank} would meet the others at {found or 'no address'} ({why}), which no other machine reaches: "
        f"start with INTERFACE (GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME) set to one of {others}"
    )


def _gloo_address() -> str | None:
    """Where gloo listens: at the interface that it is given, else at the host name's address; None for nowhere. An
    interface may have an IPv6 address alone, which stands for any here."""
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if chosen:
        exists = chosen in (name for _, name in socket.if_nameindex())
        return interfaces().get(chosen, "::") if exists else None
    try:
        return str(socket.getaddrinfo(socket.gethostname(), None)[0][4][0])
    except OSError:
        return None


def _is_here_alone(host: str) -> bool:
    try:
        return is_loopback(socket.gethostbyname(host))
    except OSError:
        return False


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"
