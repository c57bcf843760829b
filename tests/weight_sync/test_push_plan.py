"""Every shipped configuration on 1 to 64 ranks, pretended: each worker of each engine is given every element once.

Any rank's end of a sync is run on meta tensors under a fake process group that notes each message. What all ranks note
must fit together, and what comes out must be the model.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opd_megatron.config import RunConfig, load_config
from opd_megatron.mcore.cpu.platform import init_platform
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.meta_shards import _MetaParameters, fake_process_group
from opd_megatron.mcore.model import build_gpt_model
from opd_megatron.places import cut_places
from opd_megatron.planning.published import find_model
from opd_megatron.rollout import weight_format
from opd_megatron.weight_sync import gathered, sharded
from opd_megatron.weight_sync.gathered import export_weights
from opd_megatron.weight_sync.sharded import export_shards, same_tp_layout
from opd_megatron.weights.families import TPSharding
from opd_megatron.weights.hf_reader import load_hf_config
from opd_megatron.weights.layout import ShardLayout, pad_vocab
from opd_megatron.weights.parts import LocalShards
from tests.tiny_models import save_tiny

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
WORLDS = (1, 8, 16, 64)
Message = tuple[int, int]
"""(elements, order among the sender's to this receiver)."""
Traffic = dict[tuple[int, int], list[int]]
"""(sender, receiver) -> elements of each message, in order."""


class _Done:
    def wait(self) -> None: ...


class _Recorder:
    """Stands where messages are sent and received."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rank = 0
        self.sent: Traffic = defaultdict(list)
        self.received: Traffic = defaultdict(list)
        recorder = self

        class Sender:
            def wait(self) -> None: ...

            def send(self, flat: torch.Tensor, group: Any, to: int) -> None:
                recorder.sent[recorder.rank, dist.get_global_rank(group, to)].append(flat.numel())

        for module in (gathered, sharded):
            monkeypatch.setattr(module, "AsyncSender", Sender)
            monkeypatch.setattr(module, "receive", self._receive)
        monkeypatch.setattr(gathered, "exchange", self._exchange)

    def _receive(self, flat: torch.Tensor, group: Any, source: int) -> _Done:
        self.received[dist.get_global_rank(group, source), self.rank].append(flat.numel())
        return _Done()

    def _exchange(self, flats: Any, peers: Any, group: Any, *, sends: bool) -> list[_Done]:
        for flat, peer in zip(flats, peers, strict=True):
            other = dist.get_global_rank(group, peer)
            if flat.numel() and sends:
                self.sent[self.rank, other].append(flat.numel())
            elif flat.numel():
                self.received[other, self.rank].append(flat.numel())
        return []


def _fitting(config: RunConfig, world: int) -> RunConfig:
    """The configuration on `world` ranks: its own layout where that divides them, else less of it."""
    hosts = config.rollout.hosts if (config.rollout.hosts or 0) < world else None
    ranks = world - (hosts or 0)
    tensor = math.gcd(config.parallel.tensor, ranks)
    pipeline = math.gcd(config.parallel.pipeline, ranks // tensor)
    expert = math.gcd(config.parallel.expert, ranks // tensor // pipeline)
    changes = {"tensor": tensor, "pipeline": pipeline, "expert": expert, "sequence_parallel": tensor > 1,
               "data": ranks // tensor // pipeline}  # fmt: skip
    rollout = {"hosts": hosts, "placement": "own" if hosts else "student",
               "tensor": math.gcd(config.rollout.tensor, world)}  # fmt: skip
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=changes),
            "rollout": config.rollout.model_copy(update=rollout | {"dtype": "bf16"}),
        }
    )


def _ranks(config: RunConfig) -> Iterator[int]:
    """Those of one replica, which do the work."""
    p, data = config.parallel, config.parallel.data
    for stage, expert, tensor in itertools.product(range(p.pipeline), range(p.expert), range(p.tensor)):
        yield (stage * data + expert) * p.tensor + tensor


@functools.cache
def _hf_config(path: str, scratch: str) -> Any:
    return load_hf_config(save_tiny(Path(scratch) / "demo") if path.startswith("runs/") else find_model(path))


def _sync(config: RunConfig, hf_config: Any, recorder: _Recorder) -> dict[int, list[dict[str, tuple[int, ...]]]]:
    """What comes out on each rank: the shapes of each bucket's tensors, by name. One replica takes part."""
    init_platform()
    parallel = config.parallel
    padded = pad_vocab(hf_config.vocab_size, parallel.tensor)
    takes = weight_format(config, hf_config)
    found = {}
    for rank in _ranks(config):
        with fake_process_group(rank, parallel.model * parallel.data):
            grid = ParallelGrid.build(parallel.tensor, parallel.pipeline, parallel.data, ep_size=parallel.expert)
            with _MetaParameters():
                model = build_gpt_model(hf_config, grid, padded_vocab=padded, dtype="bf16")
            layout = grid.layout(hf_config.num_hidden_layers, padded)
            recorder.rank = rank
            if takes.vocab_rows is not None and same_tp_layout(layout, takes.tp_size):
                stream = export_shards(model, hf_config, layout, vocab_rows=takes.vocab_rows)
            else:
                stream = export_weights(model, hf_config, layout)
            found[rank] = [{name: tuple(tensor.shape) for name, tensor in bucket} for bucket in stream]
    return found


def _layout(config: RunConfig, hf_config: Any) -> ShardLayout:
    parallel = config.parallel
    return ShardLayout(
        pad_vocab(hf_config.vocab_size, parallel.tensor), 0, hf_config.num_hidden_layers // parallel.pipeline,
        tp_size=parallel.tensor, pp_size=parallel.pipeline, ep_size=parallel.expert,
    )  # fmt: skip


def _full_shapes(hf_config: Any) -> dict[str, tuple[int, ...]]:
    from opd_megatron.weights.sharding import sharding_table

    return sharding_table(hf_config, ShardLayout(hf_config.vocab_size, 0, hf_config.num_hidden_layers)).tensors()


def _check(config: RunConfig, hf_config: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Returns whether shards went to shards."""
    recorder = _Recorder(monkeypatch)
    found = _sync(config, hf_config, recorder)
    assert recorder.sent == recorder.received, "every message is awaited, in its order and size"
    full, layout = _full_shapes(hf_config), _layout(config, hf_config)
    takes = weight_format(config, hf_config)
    by_shard = takes.vocab_rows is not None and same_tp_layout(layout, takes.tp_size)
    workers = range(takes.tp_size) if by_shard else range(1)
    for rank, buckets in found.items():
        names = [name for bucket in buckets for name in bucket]
        assert sorted(names) == (sorted(full) if rank in workers else []), "each tensor once, where an engine reads"
    whole = {worker: {n: shape for bucket in found[worker] for n, shape in bucket.items()} for worker in workers}
    if not by_shard:
        assert whole[0] == full
        return False
    for name, shape in full.items():
        parts = [whole[worker][name] for worker in workers]
        rows = {sum(part[0] for part in parts), parts[0][0]}
        columns = {sum(part[-1] for part in parts), parts[0][-1]}
        assert all(len(part) == len(shape) for part in parts)
        assert shape[0] in rows, (name, parts)
        assert shape[-1] in columns, (name, parts)
        held = sum(math.prod(part) for part in parts)
        assert held in (math.prod(shape), len(parts) * math.prod(shape)), "once, or on every worker what all need"
    return True


_checked: dict[tuple[Any, ...], bool] = {}
"""By what matters: several configurations share a model and a layout."""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_worker_is_given_every_element_once(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    shipped, by_shard = load_config(path), False
    scratch = str(tmp_path_factory.getbasetemp())
    for world in WORLDS:
        config = _fitting(shipped, world)
        hf_config = _hf_config(config.student.path, scratch)
        places = cut_places(config, world, min(world, 8), on_gpu=True)
        assert {seat.leader for seat in places.engines} <= set(places.rollout.ranks)
        p = config.parallel
        # More data-parallel replicas change nothing of one replica's work.
        key = (config.student.path, p.tensor, p.pipeline, p.expert, config.rollout.tensor)
        if key not in _checked:
            _checked[key] = _check(config, hf_config, monkeypatch)
        by_shard |= _checked[key]
    assert by_shard is (path.stem == "qwen2.5_7b_from_72b"), "the configuration whose engines are cut like its student"


@pytest.mark.parametrize("pipeline", [1, 2])
def test_experts_on_several_ranks_reach_the_engines_too(pipeline: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_config = load_hf_config(find_model("Qwen/Qwen3-30B-A3B"))
    hf_config.num_hidden_layers, hf_config.num_experts = 4, 8
    settings = ["parallel.tensor=2", f"parallel.pipeline={pipeline}", "parallel.expert=4", "parallel.data=4",
                "rollout.tensor=2", "rollout.dtype=bf16", "parallel.sequence_parallel=true"]  # fmt: skip
    assert _check(load_config(None, settings), hf_config, monkeypatch) is False


def test_a_message_that_is_not_sent_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    hf_config = load_hf_config(find_model("Qwen/Qwen2.5-7B"))
    hf_config.num_hidden_layers = 4
    config = load_config(None, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.data=1", "rollout.dtype=bf16"])
    contributed = LocalShards.own

    def lossy(self: LocalShards, tensor: Any) -> torch.Tensor:
        whole = contributed(self, tensor)
        loses = tensor.param.shard is not TPSharding.REPLICATED and self.layout.tp_rank == 1
        return whole[1:] if loses and "layers.3.mlp.up" in tensor.name else whole

    monkeypatch.setattr(LocalShards, "own", lossy)
    with pytest.raises(AssertionError, match="every message"):
        _check(config, hf_config, monkeypatch)
