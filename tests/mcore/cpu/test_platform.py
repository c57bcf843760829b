"""The CPU platform redirects what Megatron asks of CUDA, and nothing that other libraries do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

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
