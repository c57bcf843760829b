"""A model is read from storage once, however many ranks hold copies of it or parts of its matrices."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.errors import WeightsError
from opd_megatron.weights import hf_reader
from opd_megatron.weights.hf_reader import SafetensorsSource, load_hf_config
from opd_megatron.weights.layout import ShardLayout
from opd_megatron.weights.load import load_weights
from tests.ranks import RankError, run_ranks
from tests.weights.checkpoints import PADDED_VOCAB

Layout = tuple[int, int, int, int]  # tensor, pipeline, data, expert


class CountingOs:
    """`os` for the reader, counting what it reads."""

    def __init__(self) -> None:
        self.nbytes = 0

    def preadv(self, descriptor: int, buffers: Any, position: int) -> int:
        count = os.preadv(descriptor, buffers, position)
        self.nbytes += count
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def _built(folder: Path, layout: Layout, dtype: str) -> Any:
    from opd_megatron.mcore.cpu.platform import init_platform
    from opd_megatron.mcore.grid import ParallelGrid
    from opd_megatron.mcore.model import build_gpt_model

    init_platform()
    tp, pp, dp, ep = layout
    grid = ParallelGrid.build(tp, pp, dp, ep_size=ep)
    config = load_hf_config(folder)
    model = build_gpt_model(config, grid, padded_vocab=PADDED_VOCAB, dtype=dtype)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    return model, config, grid.layout(config.num_hidden_layers, PADDED_VOCAB)


def _read(rank: int, world_size: int, folder: Path, layout: Layout, dtype: str, read_bytes: int) -> tuple[int, int]:
    """(bytes read, bytes of the parameters); checks that they are those of a rank that reads all that it holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_reader, "READ_BYTES", read_bytes)
        patch.setattr("opd_megatron.weights.shared_reading.READ_BYTES", read_bytes)
        model, config, place = _built(folder, layout, dtype)
        counting = CountingOs()
        patch.setattr(hf_reader, "os", counting)
        load_weights(model, folder, config, place)
        found = [parameter.detach().clone() for parameter in model.parameters()]
        read = counting.nbytes
        alone = ShardLayout(
            place.padded_vocab, place.first_layer, place.num_layers, place.tp_rank, place.tp_size, place.pp_rank,
            place.pp_size, ep_rank=place.ep_rank, ep_size=place.ep_size,
        )  # fmt: skip
        load_weights(model, folder, config, alone)
    for ours, theirs in zip(found, model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    return read, sum(parameter.nbytes for parameter in found)


def _stored(folder: Path) -> tuple[int, int]:
    """Bytes of the tensors, and of those among them that tensor-parallel ranks may hold whole."""
    with SafetensorsSource(folder) as source:
        sizes = {name: source.get_slice(name).nbytes for name in source.names}
        whole = [name for name in sizes if len(source.shape(name)) == 1 or name.endswith("mlp.gate.weight")]
    return sum(sizes.values()), sum(sizes[name] for name in whole)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama_untied", (1, 1, 2, 1)), ("llama_untied", (2, 1, 1, 1)), ("llama_untied", (2, 1, 2, 1)),
        ("llama_untied", (1, 2, 2, 1)), ("qwen3_moe", (1, 1, 4, 2)), ("qwen3_moe", (2, 1, 2, 2)),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("dtype", "read_bytes"), [("fp32", 32 * 2**20), ("bf16", 5000)])
def test_all_ranks_together_read_the_files_once(
    checkpoints: dict[str, Path], name: str, layout: Layout, dtype: str, read_bytes: int
) -> None:
    ranks = layout[0] * layout[1] * layout[2]
    read = [each for each, _ in run_ranks(ranks, _read, checkpoints[name], layout, dtype, read_bytes)]
    stored, whole = _stored(checkpoints[name])
    assert stored <= sum(read) <= stored + (layout[0] - 1) * whole
    if layout[0] == 2 and layout[3] == 1:  # and each of them its share
        assert max(read[:2]) <= 1.2 * min(read[:2])


def _read_damaged(rank: int, world_size: int, folder: Path, broken: int) -> None:
    model, config, place = _built(folder, (2, 1, 2, 1), "fp32")
    original = SafetensorsSource.get_slice

    def get_slice(self: SafetensorsSource, name: str, slices: tuple[slice, ...] = ()) -> torch.Tensor:
        if rank == broken and "layers.1" in name:
            raise WeightsError(f"tensor {name!r} cannot be read: the file was cut short, download it again")
        return original(self, name, slices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsSource, "get_slice", get_slice)
        with pytest.raises(WeightsError, match=r"layers\.1.*cut short"):
            load_weights(model, folder, config, place)


@pytest.mark.parametrize("broken", [0, 1])
def test_what_one_rank_cannot_read_is_every_ranks_error(checkpoints: dict[str, Path], broken: int) -> None:
    run_ranks(4, _read_damaged, checkpoints["llama_untied"], broken, timeout=60)


def _read_another(rank: int, world_size: int, folders: list[Path]) -> None:
    model, config, place = _built(folders[0], (1, 1, 2, 1), "fp32")
    load_weights(model, folders[rank], config, place)


def test_another_model_on_one_node_is_found_before_anything_large_is_read(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(2, _read_another, [checkpoints["llama_untied"], checkpoints["qwen3_moe"]], timeout=60)
    assert isinstance(caught.value.cause, WeightsError)


def test_wide_columns_are_read_without_what_is_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    values = torch.arange(6 * 4096, dtype=torch.float32).view(6, 4096)
    save_file({"w": values}, tmp_path / "model.safetensors")
    counting = CountingOs()
    monkeypatch.setattr(hf_reader, "os", counting)
    with SafetensorsSource(tmp_path) as source:
        counting.nbytes = 0
        found = source.get_slice("w", (slice(1, 5), slice(1024, 3072)))
    assert torch.equal(found, values[1:5, 1024:3072])
    assert counting.nbytes == found.nbytes
