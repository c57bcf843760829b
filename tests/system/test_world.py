"""Nodes that are not alike are told apart before a run begins, and the address they meet at is known."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from opd_megatron.errors import ConfigError
from opd_megatron.mcore.cpu.platform import init_distributed
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.group_speed import measure_groups
from opd_megatron.system import network, world
from tests.ranks import run_ranks

SAME = {"torch": "2.13", "vllm": "0.32"}


def test_a_difference_names_the_package_the_versions_and_the_hosts() -> None:
    found = [("a", SAME), ("a", SAME), ("b", SAME | {"vllm": "0.31"}), ("c", {"torch": "2.13"})]
    assert world.compare([("a", SAME), ("b", SAME)]) == []
    assert world.compare(found) == ["vllm is 0.32 on a, 0.31 on b, not there on c"]
    many = [(f"n{i}", SAME) for i in range(9)] + [("odd", SAME | {"torch": "2.12"})]
    assert world.compare(many) == ["torch is 2.13 on n0, n1, n2, n3 and 5 more, 2.12 on odd"]
    assert world.compare([("a", SAME), ("a", {"torch": "2.13", "vllm": "1"})]) == [
        "vllm is 0.32 on rank 0, 1 on rank 1"
    ]


def _checked(rank: int, ranks: int, odd: bool) -> str:
    init_distributed()
    with pytest.MonkeyPatch.context() as patch:
        if odd and rank == 1:
            patch.setattr(world, "versions", lambda: SAME)
        try:
            world.check_versions()
        except ConfigError as error:
            return str(error)
    return ""


def test_every_rank_is_told_of_another_checkout_and_none_of_the_same() -> None:
    assert run_ranks(2, _checked, False) == ["", ""]
    first, second = run_ranks(2, _checked, True)
    assert first == second
    assert "opd_megatron's code is" in first
    assert first.endswith("install the same checkout and environment on all")


def test_the_code_is_part_of_it() -> None:
    assert world.versions() == world.versions()
    assert len(world.versions()["opd_megatron's code"]) == 12


def test_the_address_follows_the_interface_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    assert network.interfaces()["lo"] == "127.0.0.1"
    monkeypatch.setattr(socket, "gethostbyname", lambda host: "127.0.1.1")
    interface, address, why = network.meeting_address()
    assert (interface, address) == ("lo", "127.0.1.1")
    assert network.is_loopback(address)
    assert socket.gethostname() in why
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=lo")
    assert network.meeting_address()[:2] == ("lo", "127.0.0.1")


def _speeds(rank: int, ranks: int, layout: tuple[int, int, int]) -> Any:
    init_distributed()
    return [(each.name, each.ranks, each.backend) for each in measure_groups(ParallelGrid.build(*layout), megabytes=1)]


def test_every_kind_of_group_with_more_than_one_rank_is_measured() -> None:
    found = run_ranks(4, _speeds, (2, 2, 1))
    assert found[0] == found[3]
    assert {name: ranks for name, ranks, _ in found[0]} == {
        "tensor": 2, "pipeline": 2, "tied embeddings": 2, "student": 4, "objects, on the CPU": 4,
    }  # fmt: skip
    assert {backend for *_, backend in found[0]} == {"gloo"}
    assert {name for name, *_ in run_ranks(2, _speeds, (1, 1, 2))[0]} == {"data", "student", "objects, on the CPU"}


def test_the_doctor_looks_at_a_world_under_torchrun(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "opd_megatron.cli", "doctor", "--world",
    ]  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, env=kept | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["world", "ok", "2", "ranks", "on", "1", "node"]
    assert any(line.startswith("versions") and "the same code and packages" in line for line in lines)
    assert any(line.startswith("clocks") and " ok " in line for line in lines)
    rows = {line[:22].strip(): line[22:].split() for line in lines if "gloo" in line}
    assert set(rows) == {"data", "student", "objects, on the CPU"}
    assert all(float(number) > 0 for row in rows.values() for number in row[2:])


@pytest.fixture(autouse=True, scope="module")
def _no_group_is_left() -> Any:
    yield
    assert not dist.is_initialized()
