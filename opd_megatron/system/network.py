"""Addresses of this machine, and which of them its ranks would meet at."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

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


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"
