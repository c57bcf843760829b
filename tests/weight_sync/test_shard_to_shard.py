"""A Megatron trainer and a vLLM engine, both of tensor-parallel size 2: shards are handed over as they are.

The same weights gathered, and transformers, are what the samples are compared with. Prompts are long and the same
each time, so that a prefix cache or a layer that survived an update shows.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from opd_megatron.rollout.client import RolloutClient
from opd_megatron.rollout.vllm_engine import VLLMEngine, VLLMOptions, vocab_rows
from opd_megatron.types import Rollout, Sampling
from opd_megatron.weight_sync.bucket_store import bucket_store
from opd_megatron.weight_sync.format import WeightFormat
from opd_megatron.weight_sync.gathered import export_weights
from opd_megatron.weight_sync.shard_files import ShardFileTransport
from opd_megatron.weight_sync.sharded import export_shards
from opd_megatron.weights.hf_reader import load_hf_config
from opd_megatron.weights.load import load_weights
from tests.ranks import run_ranks
from tests.rollout.tiny import VOCAB, ids_of, prompts_of, reference_logprobs, requests_of
from tests.tiny_models import save_tiny

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

PROMPTS = prompts_of(3, 230)
REQUESTS = requests_of(PROMPTS, seed=11)
SAMPLING = Sampling(max_new_tokens=12)
BUCKET_BYTES = 600_000
"""Several buckets, in one of which there is more than one layer."""
# Two key-value groups on each rank: one alone would lie in vLLM's order whether it is taken apart or not.
SIZES: dict[str, Any] = {
    "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 192, "vocab_size": VOCAB,
}  # fmt: skip


def _engine(folder: Path) -> VLLMEngine:
    options = {"dtype": "fp32", "tensor": 2, "kv_cache_gib": 0.1, "log_path": folder.with_suffix(".log")}
    return VLLMEngine(VLLMOptions(model_dir=folder, max_model_len=256, **options))


def _sample_both_ways(
    rank: int, world_size: int, folders: list[Path], padded_vocab: int, kill: bool
) -> tuple[list[list[Rollout]], list[str]]:
    """Samples from folders[0] gathered and sharded through files, then from folders[1] sharded through memory and
    gathered, in this order."""
    from opd_megatron.mcore.cpu.platform import init_platform
    from opd_megatron.mcore.grid import ParallelGrid
    from opd_megatron.mcore.model import build_gpt_model

    init_platform()
    grid = ParallelGrid.build(2, 1, 1)
    config = load_hf_config(folders[0])
    layout = grid.layout(config.num_hidden_layers, padded_vocab)
    model = build_gpt_model(config, grid, padded_vocab=padded_vocab, dtype="fp32")
    load_weights(model, folders[0], config, layout)

    def through(maps_memory: bool) -> Any:
        store = bucket_store(WeightFormat(torch.float32, maps_memory=maps_memory), torch.device("cpu"))
        transport = ShardFileTransport(dist.group.WORLD, store)
        assert transport.reaches_all()

        def shards() -> Any:
            rows = vocab_rows(VOCAB, 2)
            return transport.stream(export_shards(model, config, layout, vocab_rows=rows, bucket_bytes=BUCKET_BYTES))

        return shards

    engine = _engine(folders[0]) if rank == 0 else None
    events: list[str] = []

    def client(export: Any) -> RolloutClient:
        engines = {} if engine is None else {0: engine}
        return RolloutClient(engines, 1, export, dist.group.WORLD, max_restarts=1, on_event=events.append)

    gathering = client(lambda: export_weights(model, config, layout))
    by_files, by_memory = client(through(maps_memory=False)), client(through(maps_memory=True))
    try:
        gathering.start(0)
        rollouts = [gathering.sample(REQUESTS, SAMPLING)]
        by_files.sync_weights(1)
        rollouts.append(by_files.sample(REQUESTS, SAMPLING))
        load_weights(model, folders[1], config, layout)
        if kill and engine is not None:
            os.kill(engine.pid, signal.SIGKILL)
        by_memory.sync_weights(2)
        rollouts.append(by_memory.sample(REQUESTS, SAMPLING))
        gathering.sync_weights(3)  # nothing of the other way is left in the workers
        rollouts.append(gathering.sample(REQUESTS, SAMPLING))
    finally:
        gathering.close()
    return rollouts, events


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("family", "tied", "padded_vocab", "kill"),
    [
        pytest.param(
            "llama", True, 272, True, id="tied, vocabulary cut elsewhere, the engine dies", marks=pytest.mark.long
        ),
        pytest.param("qwen2_moe", False, 256, False, id="untied, with biases, experts routed and shared"),
    ],
)
def test_shards_give_the_samples_of_gathered_tensors_and_of_transformers(
    tmp_path: Path, family: str, tied: bool, padded_vocab: int, kill: bool
) -> None:
    assert (padded_vocab // 2 == vocab_rows(VOCAB, 2)) is (padded_vocab == 256)
    folders = [save_tiny(tmp_path / str(seed), family, seed=seed, tie_word_embeddings=tied, **SIZES) for seed in (0, 1)]
    (rollouts, events), (others, _) = run_ranks(2, _sample_both_ways, folders, padded_vocab, kill, timeout=800)
    assert [ids_of(each) for each in others] == [ids_of(each) for each in rollouts]
    gathered, sharded, sharded_next, gathered_next = rollouts
    for pair in ((gathered, sharded), (gathered_next, sharded_next)):
        for one, other in zip(*pair, strict=True):
            assert ids_of([one]) == ids_of([other])
            assert one.logprobs.tolist() == pytest.approx(other.logprobs.tolist(), abs=1e-4)
    for folder, rollouts in zip((folders[0], folders[1]), (sharded, sharded_next), strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for rollout in rollouts:
            ids = [*rollout.prompt.token_ids, *rollout.response_ids.tolist()]
            expected = reference_logprobs(model, ids)[-len(rollout.response_ids) :]
            assert rollout.logprobs.tolist() == pytest.approx(expected, abs=1e-4)
    assert len(events) == kill
