"""The client's contract with a fake engine: every rank sees the same answers and the same errors, nobody hangs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opd_megatron.errors import EngineDiedError, RolloutError, StalePolicyError
from opd_megatron.rollout.client import RolloutClient
from opd_megatron.types import Bucket, Prompt, Rollout, SampleRequest, Sampling
from tests.ranks import run_ranks

PROMPTS = [Prompt("a", (1, 2), "a"), Prompt("b", (3,), "b")]
REQUESTS = [SampleRequest(prompt, seed=i, group=i) for i, prompt in enumerate(PROMPTS)]
SAMPLING = Sampling(max_new_tokens=3)
BUCKETS = 3


class FakeEngine:
    """Answers with its version; dies, refuses or lags where `faults` (call name -> how often) says so."""

    def __init__(self, **faults: int) -> None:
        self.policy_version = -1
        self.faults = faults
        self.starts = 0
        self.synced: list[int] = []

    def _fault(self, name: str) -> bool:
        self.faults[name] = self.faults.get(name, 0) - 1
        return self.faults[name] >= 0

    def wait_ready(self) -> None:
        self.starts += 1
        self.policy_version = -1
        if self._fault("die_in_start"):
            raise EngineDiedError("fake died in start")

    def update_weights(self, buckets: Any, version: int) -> None:
        total = 0
        for bucket in buckets:
            total += int(bucket[0][1])
            if self._fault("die_mid_sync"):
                raise EngineDiedError("fake died in the middle of a sync")
        assert total == sum(range(BUCKETS)), "a sync must hold every bucket once"
        self.policy_version = version
        self.synced.append(version)

    def generate(self, requests: Any, sampling: Sampling) -> list[Rollout]:
        if self._fault("die_in_generate"):
            raise EngineDiedError("fake died in generate")
        if self._fault("refuse"):
            raise RolloutError("prompt 'a' is too long")
        if self._fault("bug"):
            raise KeyError("a bug")
        version = self.policy_version - 1 if self._fault("lag") else self.policy_version
        return [
            Rollout(r.prompt, torch.tensor([7, 8 + r.seed]), torch.tensor([-0.1, -0.25]), version, "stop")
            for r in requests
        ]

    def close(self) -> None:
        self.policy_version = -1


def collective_export(group: Any) -> Callable[[], Iterator[Bucket]]:
    """Each bucket takes an all-reduce of all ranks, as a gather of shards does; buckets come out on rank 0."""

    def export() -> Iterator[Bucket]:
        for i in range(BUCKETS):
            value = torch.tensor(float(i))
            if group is not None:
                dist.all_reduce(value, group=group)
                value /= dist.get_world_size(group)
            yield [("w", value)]

    return export


def make(group: Any, rank: int, max_restarts: int = 3, **faults: int) -> tuple[RolloutClient, Any, list[str]]:
    engine = FakeEngine(**faults) if rank == 0 else None
    events: list[str] = []
    client = RolloutClient(engine, collective_export(group), group, max_restarts=max_restarts, on_event=events.append)
    return client, engine, events


def _plain(rollouts: list[Rollout]) -> list[Any]:
    """Everything a rollout holds, in values that can be compared."""
    return [
        (r.prompt, r.response_ids.tolist(), r.logprobs.tolist(), r.policy_version, r.finish_reason, r.group)
        for r in rollouts
    ]


def _run_two_versions(rank: int, world_size: int, faults: dict[str, int]) -> Any:
    client, engine, events = make(dist.group.WORLD, rank, **faults)
    client.start(0)
    first = client.sample(REQUESTS, SAMPLING)
    client.sync_weights(1)
    second = client.sample(REQUESTS, SAMPLING)
    client.close()
    return _plain(first), _plain(second), events, engine and (engine.starts, engine.synced)


def _fail(rank: int, world_size: int, faults: dict[str, int]) -> tuple[str, str]:
    client, _, _ = make(dist.group.WORLD, rank, max_restarts=2, **faults)
    try:
        client.start(0)
        client.sample(REQUESTS, SAMPLING)
    except Exception as error:
        dist.barrier()  # the group must still be in step
        return type(error).__name__, str(error)
    return "no error", ""


def test_every_rank_gets_the_same_rollouts_of_the_version_last_synced():
    ranks = run_ranks(2, _run_two_versions, {})
    assert ranks[0][:2] == ranks[1][:2]
    for version, rollouts in enumerate(ranks[1][:2]):
        logprobs = pytest.approx([-0.1, -0.25])
        assert rollouts == [
            (PROMPTS[0], [7, 8], logprobs, version, "stop", 0),
            (PROMPTS[1], [7, 9], logprobs, version, "stop", 1),
        ]
    assert ranks[0][2:] == ([], (1, [0, 1]))


@pytest.mark.parametrize("fault", ["die_in_start", "die_mid_sync", "die_in_generate"])
def test_a_dead_engine_is_restarted_with_the_current_weights_and_the_run_goes_on(fault):
    ranks = run_ranks(2, _run_two_versions, {fault: 1})
    assert ranks[0][:2] == ranks[1][:2]
    assert [version for _, _, _, version, *_ in ranks[1][1]] == [1, 1]
    events, (starts, _) = ranks[0][2:]
    assert starts == 2
    assert len(events) == 1
    assert "restarting 1/3" in events[0]
    assert ranks[1][2] == [], "notices come on rank 0 only"


@pytest.mark.parametrize("fault", ["die_in_start", "die_mid_sync", "die_in_generate"])
def test_repeated_death_is_one_clear_error_on_every_rank(fault):
    ranks = run_ranks(2, _fail, {fault: 100})
    assert ranks[0] == ranks[1]
    name, message = ranks[0]
    assert name == "EngineDiedError"
    assert "died 3 times in a row" in message
    assert "fake died" in message


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("lag", "StalePolicyError", "policy version -1, but version 0 is being trained"),
        ("refuse", "RolloutError", "prompt 'a' is too long"),
    ],
)
def test_the_engines_errors_reach_every_rank_unchanged(fault, error, words):
    ranks = run_ranks(2, _fail, {fault: 1})
    assert ranks[0] == ranks[1]
    assert ranks[0][0] == error
    assert words in ranks[0][1]


def test_a_bug_on_rank_0_ends_the_other_ranks_too():
    ranks = run_ranks(2, _fail, {"bug": 1})
    assert ranks[0][0] == "KeyError"
    assert ranks[1][0] == "RolloutError"
    assert "KeyError" in ranks[1][1]


def test_deaths_are_counted_in_a_row_only():
    client, engine, events = make(None, 0, max_restarts=1)
    client.start(0)
    for version in range(1, 4):
        engine.faults["die_in_generate"] = 1
        assert client.sample(REQUESTS, SAMPLING)[0].policy_version == version - 1
        client.sync_weights(version)
    assert len(events) == 3


def test_a_single_process_needs_no_group():
    client, engine, _ = make(None, 0)
    client.start(4)
    assert [r.policy_version for r in client.sample(REQUESTS, SAMPLING)] == [4, 4]
    engine.faults["lag"] = 1
    with pytest.raises(StalePolicyError):
        client.sample(REQUESTS, SAMPLING)
