"""Shards for an engine's ranks, from real GPTModel shards on real gloo ranks, against slices of the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from opd_megatron.weight_sync.sharded import export_shards, same_tp_layout
from opd_megatron.weights.hf_reader import load_hf_config
from opd_megatron.weights.layout import ShardLayout
from opd_megatron.weights.load import load_weights
from tests.ranks import run_ranks
from tests.weights.checkpoints import PADDED_VOCAB, SIZES, write_checkpoint
from tests.weights.live_bytes import LiveBytes

BUCKET_BYTES = 40_000
ROWS = (PADDED_VOCAB // 2, 96, 66)
"""Vocabulary rows of an engine rank: cut like the trainer's, cut later (as vLLM cuts 131 tokens), cut earlier."""


def _load(folder: Path, tp: int, pp: int):
    from opd_megatron.mcore.cpu.platform import init_platform
    from opd_megatron.mcore.grid import ParallelGrid
    from opd_megatron.mcore.model import build_gpt_model

    init_platform()
    grid = ParallelGrid.build(tp, pp, 1)
    config = load_hf_config(folder)
    layout = grid.layout(config.num_hidden_layers, PADDED_VOCAB)
    model = build_gpt_model(config, grid, padded_vocab=PADDED_VOCAB, dtype="fp32")
    load_weights(model, folder, config, layout)
    return model, config, layout


def _expected(name: str, tensor: torch.Tensor, rank: int, tp: int, rows: int) -> torch.Tensor:
    """What rank `rank` of `tp` of an engine holds of a full tensor, by the rules of tensor-parallel linears."""
    if "embed_tokens" in name or "lm_head" in name:
        return tensor[rank * rows : (rank + 1) * rows]
    if "norm" in name or "gate.weight" in name:  # a router, or the gate of a shared expert
        return tensor
    return tensor.chunk(tp, dim=1 if "o_proj" in name or "down_proj" in name else 0)[rank]


def _check_all(rank: int, world_size: int, tp: int, pp: int, folders: dict[str, Path]) -> None:
    for folder in folders.values():
        model, config, layout = _load(folder, tp, pp)
        original = load_file(folder / "model.safetensors")
        for rows, bucket_bytes in [*((rows, BUCKET_BYTES) for rows in ROWS), (96, 1)]:  # 1: each larger than a bucket
            buckets = list(export_shards(model, config, layout, vocab_rows=rows, bucket_bytes=bucket_bytes))
            if layout.pp_rank > 0:
                assert buckets == [], "other stages send theirs to the first"
                continue
            shards = dict(item for bucket in buckets for item in bucket)
            assert shards.keys() == original.keys()
            assert sum(map(len, buckets)) == len(original), "a tensor came twice"
            for name, tensor in original.items():
                assert torch.equal(shards[name], _expected(name, tensor, layout.tp_rank, tp, rows)), name


@pytest.mark.parametrize("pp", [1, 2])
def test_every_rank_hands_over_its_part_of_every_tensor_bit_for_bit(checkpoints: dict[str, Path], pp: int) -> None:
    names = ("llama_tied", "llama_untied", "llama_wide_heads", "qwen2_untied", "qwen2_moe", "qwen3_moe")
    run_ranks(2 * pp, _check_all, 2, pp, {name: checkpoints[name] for name in names})


def _memory(rank: int, world_size: int, pp: int, folder: Path, rows: int, limit: int) -> tuple[int, int]:
    model, config, layout = _load(folder, 2, pp)
    with LiveBytes() as live:
        live.known(model.parameters())
        for _ in export_shards(model, config, layout, vocab_rows=rows, bucket_bytes=limit):
            pass
    return live.largest, live.peak


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("pp", [1, 2])
def test_no_rank_makes_a_full_tensor_or_holds_more_than_one_bucket(tmp_path: Path, pp: int, rows: int) -> None:
    config = LlamaConfig(**(SIZES | {"num_hidden_layers": 10, "vocab_size": 131}))
    folder = write_checkpoint(tmp_path / "deep", config)
    embedding = config.vocab_size * config.hidden_size * 4
    limit = 3 * rows * config.hidden_size * 4  # a bucket, a third of it, has room for no full embedding
    assert limit / 3 < embedding
    for largest, peak in run_ranks(2 * pp, _memory, pp, folder, rows, limit):
        assert largest < embedding
        assert peak <= limit


def test_only_equal_tensor_parallel_sizes_are_cut_alike() -> None:
    def layout(tp: int, ep: int = 1) -> ShardLayout:
        return ShardLayout(PADDED_VOCAB, first_layer=0, num_layers=2, tp_size=tp, ep_size=ep)

    assert same_tp_layout(layout(2), 2)
    assert not same_tp_layout(layout(2), 1)
    assert not same_tp_layout(layout(1), 1), "there is nothing to gather"
    assert not same_tp_layout(layout(2, ep=2), 2), "an engine cuts every expert, an expert-parallel trainer does not"
