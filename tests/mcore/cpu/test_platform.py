"""The CPU platform redirects what Megatron asks of CUDA, and nothing that other libraries do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.errors import ConfigError
from opd_megatron.mcore.cpu import platform
from opd_megatron.mcore.cpu.platform import has_gpu, init_distributed
from tests.ranks import run_ranks
from tests.tiny_models import save_tiny

pytestmark = pytest.mark.skipif(has_gpu(), reason="the platform patches nothing where there is a GPU")


def _behaviour(rank: int, world: int, folder: Path) -> Any:
    init_distributed()
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        meta = torch.zeros(2), torch.arange(3)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    built = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    built.load_state_dict(loaded.state_dict())
    tokens = torch.arange(20)[None]
    return {
        "meta": [tensor.device.type for tensor in meta],
        "redirected": [torch.zeros(1, device="cuda").device.type, torch.zeros(1).cuda().device.type],
        "type": torch.zeros(1).type(),
        "cast": torch.zeros(1).type(torch.float64).dtype,
        "annotates": isinstance(torch.cuda.Stream, type) and isinstance(torch.cuda.Event, type),
        "same": torch.equal(loaded(tokens).logits, built.eval()(tokens).logits),
    }


def test_device_contexts_casts_and_transformers_work_as_before(tmp_path: Path) -> None:
    (seen,) = run_ranks(1, _behaviour, save_tiny(tmp_path / "model"))
    assert seen["meta"] == ["meta", "meta"]
    assert seen["redirected"] == ["cpu", "cpu"]
    assert seen["type"] == "torch.cuda.FloatTensor", "what the distributed optimizer asks for"
    assert seen["cast"] == torch.float64
    assert seen["annotates"], "libraries imported afterwards write `torch.cuda.Stream | None`"
    assert seen["same"], "transformers loads under a meta device and fills buffers later"


def test_more_ranks_than_gpus_on_a_node_is_one_error_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(ConfigError, match=r"8 ranks .* 4 GPUs \(CUDA_VISIBLE_DEVICES=0,1,2,3\).*NPROC_PER_NODE=4"):
        platform._gpu_of_this_rank()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert platform._gpu_of_this_rank() == 3


def test_transfers_go_first_under_tensor_parallelism_unless_a_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.delenv(name, raising=False)
    platform.let_transfers_overtake(1)
    assert name not in os.environ
    platform.let_transfers_overtake(2)
    assert os.environ[name] == "1"
    monkeypatch.setenv(name, "8")
    platform.let_transfers_overtake(2)
    assert os.environ[name] == "8"
