"""Who works where: the engines of a fleet over the ranks and nodes of a job, before any of them exists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opd_megatron.config import RunConfig, load_config
from opd_megatron.errors import ConfigError
from opd_megatron.places import Places, cut_places, owned_device, ranks_per_node, visible_devices

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def _config(**rollout: Any) -> RunConfig:
    return load_config(None, [f"rollout.{key}={value}" for key, value in rollout.items()])


def _cut(world: int, per_node: int, *, gpu: bool = True, **rollout: Any) -> Places:
    return cut_places(_config(**rollout), world, per_node, on_gpu=gpu)


def _check(places: Places, tensor: int) -> None:
    """Every engine is on one node, and no GPU is two engines'."""
    used = [rank for seat in places.engines for rank in seat.ranks]
    assert len(used) == len(set(used))
    for index, seat in enumerate(places.engines):
        assert seat.index == index
        assert seat.leader == seat.ranks[0]
        assert len(seat.ranks) == tensor
        assert {places.nodes[rank] for rank in seat.ranks} == {seat.node}
        assert seat.neighbours == sum(other.node == seat.node for other in places.engines)
    led = [seat.index for rank in range(places.world_size) for seat in places.led_by(rank)]
    assert led == list(range(len(places.engines)))


@pytest.mark.parametrize("world", [1, 8, 16, 64])
@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_by_default_every_gpu_of_the_students_belongs_to_an_engine(world: int, tensor: int) -> None:
    if world < tensor:
        pytest.skip("fewer GPUs than one engine has")
    places = _cut(world, min(world, 8), tensor=tensor)
    _check(places, tensor)
    assert len(places.engines) == world // tensor


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("world", [1, 8, 16, 64])
def test_every_shipped_configuration_has_its_engines_on_its_gpus(path: Path, world: int) -> None:
    config = load_config(path)
    if (config.rollout.hosts or 0) >= world:
        config = config.without_engine_hosts()
    tensor = config.rollout.tensor
    places = cut_places(config, world, min(world, 8), on_gpu=True)
    if world < tensor:  # one rank, whose engine has its neighbours' GPUs
        assert [visible_devices(seat, tensor, ["0"]) for seat in places.engines] == [None]
        return
    _check(places, tensor)
    owned = [str(rank % 8) for rank in range(world)]
    slices = [(seat.node, visible_devices(seat, tensor, owned)) for seat in places.engines]
    assert len(set(slices)) == len(slices)
    devices = [device for _, text in slices for device in str(text).split(",")]
    assert len(devices) == len(places.engines) * tensor


def test_fewer_engines_are_spread_over_the_nodes() -> None:
    assert [seat.node for seat in _cut(32, 8, tensor=2, engines=4).engines] == [0, 1, 2, 3]
    assert _cut(16, 8, tensor=1, engines=1).leaders == [0]


def test_gpus_that_a_node_has_left_over_stay_idle() -> None:
    places = _cut(6, 3, tensor=2)
    assert [seat.ranks for seat in places.engines] == [(0, 1), (3, 4)]


@pytest.mark.parametrize(
    ("world", "per_node", "rollout", "words"),
    [
        (8, 8, {"engines": 9, "tensor": 1}, "rollout.engines=9 of rollout.tensor=1 GPUs each do not fit the 8 GPUs"),
        (16, 8, {"engines": 5, "tensor": 4}, "at most 4 do"),
        (16, 2, {"tensor": 4}, "lower rollout.tensor"),
    ],
)
def test_more_engines_than_gpus_are_one_error(world: int, per_node: int, rollout: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        _cut(world, per_node, **rollout)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("engines", [None, 1, 2, 3, 5])
def test_on_a_cpu_engines_are_dealt_to_the_ranks(world: int, engines: int | None) -> None:
    settings = {} if engines is None else {"engines": engines}
    places = _cut(world, world, gpu=False, **settings)
    assert len(places.engines) == (engines or 1)
    led = [len(places.led_by(rank)) for rank in range(world)]
    assert max(led) - min(led) <= 1
    assert places.leaders == sorted(places.leaders)
    assert led[0] >= 1


@pytest.mark.parametrize(
    ("listed", "local_rank", "name"),
    [
        (None, 3, "3"),
        ("4,5,6,7", 1, "5"),
        ("GPU-a1, GPU-b2", 1, "GPU-b2"),
        ("MIG-9", 0, "MIG-9"),
        ("6", 2, "6"),  # each rank was given its own
        ("", 2, "2"),
    ],
)
def test_a_rank_knows_what_its_gpu_is_called(
    monkeypatch: pytest.MonkeyPatch, listed: str | None, local_rank: int, name: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert owned_device(local_rank) == name


def test_an_engine_sees_the_gpus_of_its_ranks_by_their_names() -> None:
    places = _cut(4, 4, tensor=2)
    owned = ["GPU-a", "GPU-b", "GPU-c", "GPU-d"]
    assert [visible_devices(seat, 2, owned) for seat in places.engines] == ["GPU-a,GPU-b", "GPU-c,GPU-d"]
    with pytest.raises(ConfigError, match="--gpu-bind=none"):
        visible_devices(places.engines[0], 2, ["0"] * 4)


def test_ranks_of_a_node_are_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert ranks_per_node(16) == 4
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert ranks_per_node(16) == 16


def test_places_are_told_in_lines() -> None:
    lines = _cut(16, 8, tensor=2).lines()
    assert lines == ["student  ranks 0-15 on 2 nodes, 8 engines: 0 (rank 0), 1 (rank 2), .., 7 (rank 14)"]
