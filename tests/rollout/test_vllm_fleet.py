"""Two real vLLM engines side by side: the answers of one, also when one of them is killed in the middle."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from opd_megatron.rollout import MachineShare, RolloutClient
from opd_megatron.rollout.vllm_engine import VLLMEngine, VLLMOptions
from opd_megatron.types import Rollout, Sampling
from opd_megatron.weight_sync.bucket_files import BucketFiles
from opd_megatron.weight_sync.fan_out import FanOut
from tests.rollout.tiny import buckets_of, ids_of, prompts_of, requests_of, save_config, tiny_model

pytest.importorskip("vllm")

REQUESTS = requests_of(prompts_of(8, 12), seed=50)
SAMPLING = Sampling(max_new_tokens=160)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[VLLMEngine]]:
    folder = tmp_path_factory.mktemp("fleet")
    options: dict[str, Any] = {"dtype": "fp32", "kv_cache_gib": 0.1, "share": MachineShare(neighbours=2)}
    model = save_config(folder / "model")
    engines = [
        VLLMEngine(VLLMOptions(model_dir=model, max_model_len=256, log_path=folder / f"rollout-{i}.log", **options))
        for i in range(2)
    ]
    for engine in engines:
        engine.spawn()
    yield engines
    for engine in engines:
        engine.close()


def _client(engines: list[VLLMEngine], events: list[str]) -> RolloutClient:
    model = tiny_model(seed=4)
    fan_out = FanOut([0] * len(engines), [0], BucketFiles(torch.float32))
    return RolloutClient(
        dict(enumerate(engines)), len(engines), lambda: fan_out.stream(buckets_of(model)), None, max_restarts=1,
        on_event=events.append,
    )  # fmt: skip


def _kill_mid_answer(engine: VLLMEngine, asked: list[tuple[int | None, int]]) -> threading.Thread:
    """Stops the engine, so that it is not done before it dies, and kills it once it has been asked."""
    pid = engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)

    def kill() -> None:
        while all(whom != pid for whom, _ in asked):
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def _agree(some: list[Rollout], others: list[Rollout]) -> bool:
    pairs = zip(some, others, strict=True)
    close = all(torch.allclose(one.logprobs, other.logprobs, atol=1e-4) for one, other in pairs)
    return ids_of(some) == ids_of(others) and close


@pytest.mark.timeout(900)
def test_two_engines_give_the_answers_of_one_also_when_one_is_killed(
    engines: list[VLLMEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int | None, int]] = []
    generate = VLLMEngine.generate

    def noting(self: VLLMEngine, requests: Any, sampling: Sampling) -> list[Rollout]:
        asked.append((self.pid, len(requests)))
        return generate(self, requests, sampling)

    monkeypatch.setattr(VLLMEngine, "generate", noting)
    events: list[str] = []
    fleet = _client(engines, events)
    fleet.start(0)
    answers = fleet.sample(REQUESTS, SAMPLING)
    assert sorted(asked) == sorted((engine.pid, 4) for engine in engines)
    assert _agree(_sample_alone(engines[0]), answers)

    asked.clear()
    victim, survivor = engines[1].pid, engines[0].pid
    killer = _kill_mid_answer(engines[1], asked)
    again = fleet.sample(REQUESTS, SAMPLING)
    killer.join()
    assert _agree(again, answers)
    assert len(events) == 1
    assert "restarting engine 1 1/1" in events[0]
    assert engines[0].pid == survivor
    assert asked.count((survivor, 4)) == 1
    assert asked.count((victim, 4)) == 1
    assert len(asked) == 3, "only the dead one's share is sampled again"


def _sample_alone(engine: VLLMEngine) -> list[Rollout]:
    return engine.generate(REQUESTS, SAMPLING)
