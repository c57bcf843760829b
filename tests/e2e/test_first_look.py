"""What users look at first: tokens a second, utilization, agreement with the engine, and a trace of a step."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
import torch

from opd_megatron.cli import main
from opd_megatron.config import dump_config
from opd_megatron.metrics import read_metrics
from opd_megatron.models.gpus import GPUS
from opd_megatron.models.utilization import peak_flops, training_flops
from opd_megatron.weights.hf_reader import load_hf_config
from tests.e2e.runs import make_inputs, small_config
from tests.tiny_models import save_tiny


def test_a_step_tells_its_pace_its_utilization_and_its_agreement_and_one_is_traced(tmp_path: Path) -> None:
    config = small_config(
        make_inputs(tmp_path), tmp_path / "run", **{"steps": 3, "logging.profile_step": 2, "evaluation.every": 0}
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert main(["train", str(tmp_path / "config.yaml")]) == 0
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert len(rows) == 3
    for row in rows:
        assert row["tokens_per_second_per_gpu"] > 0
        assert 0 < row["mfu"] < 1
        assert 1 <= row["mismatch"] < 1.1
        # The geometric mean of what the arithmetic mean is of.
        assert 1 <= math.exp(row["logprob_gap"]) <= row["mismatch"]
    traces = list((tmp_path / "run/profile").iterdir())
    assert [trace.name for trace in traces] == ["step-2-rank-0.json.gz"]
    events = json.loads(gzip.decompress(traces[0].read_bytes()))["traceEvents"]
    assert {"rollout", "teacher", "train"} <= {event.get("name") for event in events}


def test_operations_are_those_of_the_matrices_attention_and_the_head(tmp_path: Path) -> None:
    hf_config = load_hf_config(save_tiny(tmp_path / "model", tie_word_embeddings=True))
    q, kv, h, ffn, layers, vocab = 64, 32, 64, 96, 4, 272
    weights = layers * (h * q + 2 * h * kv + q * h + 3 * h * ffn)
    tokens, squares = 10 + 20, 10**2 + 20**2
    attention = layers * 2 * squares * q  # scores and values, of half of the pairs, a product and a sum each
    expected = 3 * (2 * weights * tokens + attention + 2 * 25 * vocab * h)
    assert training_flops(hf_config, [10, 20], 25) == pytest.approx(expected)


def test_a_known_gpu_has_its_published_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    peak_flops.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.bfloat16) == GPUS["H100"].bf16_flops
    assert peak_flops(torch.bfloat16, fp8=True) == 2 * GPUS["H100"].bf16_flops + 1e12
    peak_flops.cache_clear()
