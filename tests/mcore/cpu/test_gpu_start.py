"""How a rank starts on a machine with GPUs, recorded on one without: what comes before what, and what is passed on."""

from __future__ import annotations

import os
import types
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opd_megatron.mcore.cpu import platform

Event = tuple[str, Any]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Rank 3 of 8 on two machines of four GPUs each."""
    events: list[Event] = []
    current = [0]

    def set_device(index: int) -> None:
        events.append(("set_device", index))
        current[0] = index

    def init_process_group(backend: str, **settings: Any) -> None:
        events.append(("init_process_group", {"backend": backend} | settings))

    for name, value in {"RANK": 7, "WORLD_SIZE": 8, "LOCAL_RANK": 3, "LOCAL_WORLD_SIZE": 4, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    gpu = types.SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(platform, "_applied", False)
    monkeypatch.setattr(platform, "has_gpu", lambda: True)
    monkeypatch.setattr(platform, "stay_near", lambda address: events.append(("stay_near", address)))
    for name in ("_patch_adam_loading", "_patch_router", "_seed_rng_tracker"):
        monkeypatch.setattr(platform, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", init_process_group)

    def rendezvous(url: str, timeout: timedelta) -> Any:
        events.append(("rendezvous", timeout))
        return iter([(dist.HashStore(), 7, 8)])

    monkeypatch.setattr(dist, "rendezvous", rendezvous)
    return events


def test_the_gpu_is_chosen_first_and_the_process_group_is_bound_to_it(recorded: list[Event]) -> None:
    platform.let_transfers_overtake(tensor=2)
    recorded.append(("environment", os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]))
    platform.init_distributed(start_timeout=50, patience=70)
    assert [name for name, _ in recorded] == [
        "environment", "set_device", "stay_near", "rendezvous", "init_process_group",
    ]  # fmt: skip
    found = dict(recorded)
    assert found["environment"] == "1"
    assert found["set_device"] == 3
    assert found["stay_near"] == "0000:3b:00.0"
    assert found["rendezvous"] == timedelta(seconds=50)
    made = found["init_process_group"]
    assert made["backend"] == "cpu:gloo,cuda:nccl"
    assert made["device_id"] == torch.device("cuda", 3)
    assert made["timeout"] == timedelta(seconds=70)
    assert (made["rank"], made["world_size"]) == (7, 8)
