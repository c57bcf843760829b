"""Ranks of several machines do not wait for each other at an address that only one of them reaches."""

from __future__ import annotations

import socket

import pytest

from opd_megatron.errors import ConfigError
from opd_megatron.system import network
from opd_megatron.system.network import check_reachable
from opd_megatron.system.ranks import Ranks

ELSEWHERE = Ranks(1, 4, "node0:29500")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """One of two machines with two ranks each; its name, its interfaces and what names mean can be changed."""
    names = {"node0": "10.0.0.1", "node1": "10.0.0.2", "localhost": "127.0.0.1"}

    def resolve(host: str, *_: object) -> list[object]:
        if host not in names:
            raise socket.gaierror("Name or service not known")
        return [(socket.AF_INET, None, None, None, (names[host], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "gethostbyname", lambda host: resolve(host)[0][4][0])  # type: ignore[index]
    monkeypatch.setattr(socket, "gethostname", lambda: "node1")
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0"), (3, "ib0")])
    monkeypatch.setattr(network, "interfaces", lambda: {"lo": "127.0.0.1", "eth0": "10.0.0.2"})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    return names


def test_an_address_of_the_network_will_do() -> None:
    check_reachable(ELSEWHERE)


@pytest.mark.parametrize("address", ["127.0.1.1", "127.0.0.1", "::1", None])
def test_a_host_name_that_means_this_machine_alone_is_refused(machine: dict[str, str], address: str | None) -> None:
    if address is None:
        del machine["node1"]
    else:
        machine["node1"] = address
    with pytest.raises(ConfigError) as caught:
        check_reachable(ELSEWHERE)
    message = str(caught.value)
    assert (address or "no address") in message
    assert "the address of the host name node1" in message
    assert message.endswith("set to one of eth0 (10.0.0.2)")
    assert "\n" not in message


@pytest.mark.parametrize(("interface", "fits"), [("eth0", True), ("ib0", True), ("lo", False), ("eth7", False)])
def test_the_interface_that_was_chosen_counts(
    machine: dict[str, str], monkeypatch: pytest.MonkeyPatch, interface: str, fits: bool
) -> None:
    machine["node1"] = "127.0.1.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    if fits:
        check_reachable(ELSEWHERE)
        return
    with pytest.raises(ConfigError, match=f"GLOO_SOCKET_IFNAME={interface}"):
        check_reachable(ELSEWHERE)


@pytest.mark.parametrize(
    ("ranks", "here"), [(Ranks(1, 4, "localhost:1"), "2"), (Ranks(1, 2, "node0:1"), "2"), (Ranks(0, 1, "node0:1"), "1")]
)
def test_ranks_of_one_machine_may_meet_anywhere(
    machine: dict[str, str], monkeypatch: pytest.MonkeyPatch, ranks: Ranks, here: str
) -> None:
    machine["node1"] = "127.0.1.1"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    check_reachable(ranks)
