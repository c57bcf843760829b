"""Where buckets lie on a node: other processes find every value there, nothing is written over too soon or left."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opd_megatron.weight_sync import bucket_buffers
from opd_megatron.weight_sync.bucket_buffers import Mappings, tensors_in
from opd_megatron.weight_sync.bucket_store import BucketStore, bucket_store
from opd_megatron.weight_sync.format import WeightFormat

ROOT = Path(__file__).parents[2]

CPU = torch.device("cpu")
DEVICES = [
    pytest.param((False, CPU), id="files"),
    pytest.param((True, CPU), id="memory"),
    pytest.param((True, torch.device("cuda", 0)), id="cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=DEVICES)
def place(request: pytest.FixtureRequest) -> tuple[bool, torch.device]:
    if request.param[1].type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return request.param


@pytest.fixture
def store(place: tuple[bool, torch.device]) -> Iterator[BucketStore]:
    with bucket_store(WeightFormat(torch.bfloat16, maps_memory=place[0]), place[1]) as made:
        yield made


def _bucket(seed: int, device: torch.device = CPU, rows: int = 70) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"b": (rows, 5), "a": (), "c.weight": (3,), "d": (2, 3, 4), "empty": (0, 4)}
    return {name: torch.randn(shape, generator=generator).to(device) for name, shape in shapes.items()}


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors are there, rounded to the engine's type."""
    rounded = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in expected.items()}
    return found.keys() == rounded.keys() and all(torch.equal(found[name].cpu(), rounded[name]) for name in rounded)


_READER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from opd_megatron.weight_sync.bucket_buffers import Mappings
found = Mappings().load(Path(sys.argv[1]), torch.device(sys.argv[2]))
save_file({name: tensor.cpu().contiguous() for name, tensor in found.items()}, sys.argv[3])
"""


def test_another_process_finds_the_tensors_rounded_to_the_engines_type(
    store: BucketStore, place: tuple[bool, torch.device], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    bucket = _bucket(0, place[1])
    path = store.write([(name, tensor.requires_grad_()) for name, tensor in bucket.items()])
    out = tmp_path / "found.safetensors"
    subprocess.run([sys.executable, "-c", _READER, str(path), str(place[1]), str(out)], cwd=ROOT, check=True)
    assert _same(load_file(out), bucket)


def test_what_is_read_on_one_node_can_be_put_down_on_another(
    store: BucketStore, place: tuple[bool, torch.device]
) -> None:
    bucket = _bucket(1, place[1])
    path = store.write(list(bucket.items()))
    values = store.read(path)
    assert values.dtype == torch.uint8
    assert len(values) == store.size(path)
    with bucket_store(WeightFormat(torch.bfloat16, maps_memory=place[0]), place[1]) as elsewhere:
        there = elsewhere.store(values)
        assert _same(tensors_in(elsewhere.read(there)), bucket)


def test_a_bucket_outlives_the_next_two_whatever_their_size(
    store: BucketStore, place: tuple[bool, torch.device]
) -> None:
    mappings, written = Mappings(), []
    for turn, rows in enumerate([70, 7, 700, 70, 1, 70, 9000, 3, 70] * 2):
        if turn == 9:
            store.close()
            written.clear()
        bucket = _bucket(turn, place[1], rows)
        written.append((store.write(list(bucket.items())), bucket))
        for path, expected in written[-3:]:
            assert _same(tensors_in(store.read(path)), expected)
            if place[1].type == "cpu":
                assert _same(mappings.load(path, CPU), expected)


def test_what_a_reader_took_stays_when_the_memory_is_used_again() -> None:
    with bucket_store(WeightFormat(torch.float32, maps_memory=True), CPU) as store:
        mappings = Mappings()
        kept = mappings.load(store.write([("a", torch.ones(4))]), CPU)
        for value in range(2, 6):
            mappings.load(store.write([("a", torch.full((4,), float(value)))]), CPU)
    assert kept["a"].tolist() == [1, 1, 1, 1], "vLLM keeps what it is given until a layer is complete"


def test_nothing_is_left_when_it_is_closed(store: BucketStore) -> None:
    paths = [store.write(list(_bucket(i).items())) for i in range(5)]
    assert all(path.is_file() for path in paths)
    store.close()
    assert not any(path.parent.exists() for path in paths)
    store.close()
    assert store.write(list(_bucket(0).items())).is_file(), "the next sync starts afresh"


@pytest.mark.parametrize("maps_memory", [False, True], ids=["files", "memory"])
def test_a_shm_without_room_for_a_bucket_is_passed_by(maps_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def usage(path: Any) -> Any:
        return SimpleNamespace(free=1000) if str(path) == "/dev/shm" else real(path)

    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", usage)
    with bucket_store(WeightFormat(torch.bfloat16, maps_memory=maps_memory), CPU) as store:
        bucket = _bucket(0)
        path = store.write(list(bucket.items()))
        assert str(path).startswith(tempfile.gettempdir())
        assert _same(tensors_in(store.read(path)), bucket)


def test_memory_that_runs_full_is_an_error_and_not_the_end_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bucket_buffers.os, "posix_fallocate", full)
    with (
        bucket_store(WeightFormat(torch.bfloat16, maps_memory=True), CPU) as store,
        pytest.raises(OSError, match="No space left on device"),
    ):
        store.write(list(_bucket(0).items()))
