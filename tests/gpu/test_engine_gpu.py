"""vLLM on one NVIDIA GPU: weights by CUDA IPC, its log-probabilities against the trainer's, sleep without a leak."""

from __future__ import annotations

import copy
import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from opd_megatron.rollout import RolloutClient
from opd_megatron.rollout.vllm_engine import VLLMEngine, VLLMOptions
from opd_megatron.types import Bucket, Sampling
from tests.rollout.tiny import prompts_of, reference_logprobs, requests_of
from tests.tiny_models import save_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

VOCAB = 512
# Attention kernels want heads of 64.
SIZES = {"vocab_size": VOCAB, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 512}  # fmt: skip
REQUESTS = requests_of(prompts_of(4, 60), seed=3)
SAMPLING = Sampling(max_new_tokens=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("gpu"), "llama", **SIZES)


def _engine(folder: Path, **options: object) -> VLLMEngine:
    made = VLLMOptions(
        model_dir=folder, max_model_len=256, gpu_memory_utilization=0.1, log_path=folder / "rollout.log", **options
    )
    return VLLMEngine(made)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("maps_memory", [True, False], ids=["CUDA IPC", "files"])
def test_what_it_samples_has_the_trainers_probabilities(folder: Path, maps_memory: bool) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
    engine = _engine(folder, maps_memory=maps_memory, sleeps=True)
    events: list[str] = []

    def weights() -> Iterator[Bucket]:
        tensors = list(dict(model.named_parameters()).items())  # a tied head as the embedding only
        for start in range(0, len(tensors), 5):
            yield tensors[start : start + 5]

    client = RolloutClient({0: engine}, 1, weights, None, max_restarts=1, on_event=events.append, sleeps=True)
    free: list[int] = []
    try:
        client.start(0)
        for version in range(20):
            rollouts = client.sample(REQUESTS, SAMPLING)
            assert all(rollout.policy_version == version for rollout in rollouts)
            torch.cuda.empty_cache()
            free.append(torch.cuda.mem_get_info()[0])
            if version in (0, 19):
                reference = copy.deepcopy(model).float().cpu()
                for rollout in rollouts:
                    ids = [*rollout.prompt.token_ids, *rollout.response_ids.tolist()]
                    expected = reference_logprobs(reference, ids)[-len(rollout.response_ids) :]
                    ours = torch.tensor(expected) - rollout.logprobs
                    assert ours.abs().mean() < 0.02
            if version == 10:
                assert engine.pid is not None
                os.kill(engine.pid, signal.SIGKILL)
            with torch.no_grad():
                model.model.norm.weight.mul_(1.001)
            client.sync_weights(version + 1)
    finally:
        client.close()
    assert len(events) == 1, "killed once, asleep"
    assert abs(free[9] - free[1]) < 64 * 2**20, "it gives back what it takes"
    assert abs(free[-1] - free[1]) < 256 * 2**20
