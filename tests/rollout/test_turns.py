"""Student and engines take turns with a GPU's memory: in which order, and what happens when an engine dies asleep.

vLLM sleeps on a GPU only, so the engines here record what they are asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from opd_megatron.config import load_config
from opd_megatron.errors import ConfigError, EngineDiedError, EngineMemoryError, RolloutError
from opd_megatron.rollout import client as client_module
from opd_megatron.rollout.client import RolloutClient
from opd_megatron.rollout.turns import sleeps
from opd_megatron.rollout.vllm_engine import VLLMOptions
from opd_megatron.types import Bucket, Prompt, Rollout, SampleRequest, Sampling

REQUESTS = [SampleRequest(Prompt(str(i), (1, 2), ""), seed=i, group=i) for i in range(4)]
SAMPLING = Sampling(max_new_tokens=2)
REFUSAL = (
    "vLLM could not start: Free memory on device cuda:0 (20.1/79.6 GiB) on startup is less than desired (0.4, 31.8)"
)


class RecordingEngine:
    """Notes its calls in a list of all engines; refuses what its memory does not allow, and dies in `dies_in`."""

    def __init__(self, index: int, calls: list[str]) -> None:
        self.index, self.calls = index, calls
        self.policy_version = -1
        self.memory: set[str] = set()
        self.dies_in: str | None = None
        self.refusals = 0

    def _called(self, what: str) -> None:
        self.calls.append(f"{what} {self.index}")
        if what == self.dies_in:
            self.dies_in, self.memory = None, set()
            raise EngineDiedError(f"died in {what}")

    def wait_ready(self) -> None:
        self._called("start")
        if self.refusals:
            self.refusals -= 1
            raise EngineMemoryError(REFUSAL)
        self.memory, self.policy_version = {"weights", "cache"}, -1

    def sleep(self) -> None:
        self._called("sleep")
        self.memory, self.policy_version = set(), -1

    def wake(self, what: str) -> None:
        self._called(f"wake {what}")
        assert what not in self.memory
        self.memory.add(what)

    def update_weights(self, payloads: Any, version: int) -> None:
        self._called("push")
        assert "weights" in self.memory
        assert len(list(payloads)) == 2
        self.policy_version = version

    def generate(self, requests: Any, sampling: Sampling) -> list[Rollout]:
        self._called("sample")
        assert self.memory == {"weights", "cache"}
        ids, logprobs = torch.tensor([1]), torch.tensor([-1.0])
        return [Rollout(r.prompt, ids, logprobs, self.policy_version, group=r.group) for r in requests]

    def close(self) -> None: ...


def _weights() -> Iterator[Bucket]:
    for name in "ab":
        yield [(name, torch.zeros(1))]


def _fleet(count: int, **settings: Any) -> tuple[RolloutClient, list[RecordingEngine], list[str]]:
    calls: list[str] = []
    engines = [RecordingEngine(index, calls) for index in range(count)]
    fleet = RolloutClient(
        dict(enumerate(engines)), count, _weights, None, max_restarts=1, on_event=calls.append,
        make_room=lambda: calls.append("room"), take_back=lambda: calls.append("back"), **({"sleeps": True} | settings),
    )  # fmt: skip
    return fleet, engines, calls


def test_memory_is_taken_in_the_order_in_which_it_is_needed() -> None:
    fleet, _, calls = _fleet(1)
    fleet.start(0)
    fleet.sample(REQUESTS, SAMPLING)
    fleet.sync_weights(1)
    fleet.sample(REQUESTS, SAMPLING)
    first = ["room", "start 0", "push 0", "sample 0", "sleep 0", "back"]
    assert calls == [
        *first, "room", "wake weights 0", "push 0", "room", "wake cache 0", "sample 0", "sleep 0", "back",
    ]  # fmt: skip


def test_between_a_sync_and_the_next_samples_memory_is_the_trainers() -> None:
    fleet, engines, calls = _fleet(2)
    fleet.start(0)
    fleet.sample(REQUESTS, SAMPLING)
    fleet.sync_weights(1)
    assert calls[-1] == "back"
    assert not any(engine.memory for engine in engines), "an evaluation or a checkpoint has the GPU to itself"
    fleet.wake()
    assert all(engine.policy_version == 1 for engine in engines)
    awake = list(calls)
    fleet.wake()
    assert calls == awake, "once is enough"


def test_engines_that_do_not_share_a_gpu_with_the_student_stay_awake() -> None:
    fleet, _, calls = _fleet(1, sleeps=False)
    fleet.start(0)
    for version in (1, 2):
        fleet.sample(REQUESTS, SAMPLING)
        fleet.sync_weights(version)
    assert calls == ["room", "start 0", "push 0", "sample 0", "push 0", "sample 0", "push 0"]


@pytest.mark.parametrize("moment", ["sleep", "wake weights", "push", "wake cache", "sample"])
@pytest.mark.parametrize("count", [1, 2])
def test_an_engine_that_dies_asleep_or_on_the_way_is_started_awake(moment: str, count: int) -> None:
    fleet, engines, calls = _fleet(count)
    fleet.start(0)
    fleet.sample(REQUESTS, SAMPLING)
    fleet.sync_weights(1)
    engines[-1].dies_in = moment
    for version in (1, 2):
        assert [rollout.policy_version for rollout in fleet.sample(REQUESTS, SAMPLING)] == [version] * 4
        if moment == "sleep" and version == 1:
            engines[-1].dies_in = "wake weights"  # a dead process cannot wake
        fleet.sync_weights(version + 1)
    assert calls.count(f"start {count - 1}") == 2
    assert calls.count("start 0") == (2 if count == 1 else 1)
    fleet.wake()
    assert all(engine.memory == {"weights", "cache"} for engine in engines)


def test_a_start_that_finds_too_little_memory_is_tried_again_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_MEMORY_PATIENCE", 0.0)
    fleet, engines, calls = _fleet(1)
    engines[0].refusals = 1
    fleet.start(0)
    assert calls == ["room", "start 0", "room", "start 0", "push 0"]
    fleet, engines, _ = _fleet(1)
    engines[0].refusals = 2
    with pytest.raises(RolloutError, match=r"20.1/79.6 GiB.*0.4, 31.8"):
        fleet.start(0)


@pytest.mark.parametrize(
    ("overrides", "on_gpu", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"sleep": "false"}, True, False),
        ({"steps_ahead": 1}, True, False),
        ({"placement": "own", "hosts": 1}, True, False),
    ],
)
def test_engines_sleep_where_they_share_gpus_with_a_student_that_waits_for_them(
    overrides: dict[str, Any], on_gpu: bool, expected: bool
) -> None:
    config = load_config(None, [f"rollout.{key}={value}" for key, value in overrides.items()])
    assert sleeps(config, on_gpu=on_gpu) is expected


@pytest.mark.parametrize("offload", [["student.offload=[optimizer]"], ["teachers.0.path=t", "teachers.0.offload=true"]])
@pytest.mark.parametrize(
    "forbids", [["rollout.sleep=false"], ["rollout.steps_ahead=1"], ["rollout.placement=own", "rollout.hosts=1"]],
    ids=lambda values: values[0],
)  # fmt: skip
def test_what_leaves_for_an_engine_needs_one_that_takes_turns(offload: list[str], forbids: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"offload=.* needs engines that take turns"):
        load_config(None, [*offload, *forbids])
    load_config(None, offload)


def test_vllm_is_made_for_sleep_where_it_will_be_asked_to(tmp_path: Any) -> None:
    options = VLLMOptions(model_dir=tmp_path, max_model_len=32, sleeps=True)
    assert options.for_vllm(on_gpu=True)["enable_sleep_mode"] is True
    assert "enable_sleep_mode" not in options.for_vllm(on_gpu=False), "vLLM refuses it there"
