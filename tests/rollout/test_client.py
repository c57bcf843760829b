"""The client's contract with fake engines: every rank sees the same answers and the same errors, nobody hangs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opd_megatron.errors import EngineDiedError, RolloutError, StalePolicyError
from opd_megatron.rollout import side_by_side
from opd_megatron.rollout.client import RolloutClient
from opd_megatron.types import Bucket, Prompt, Rollout, SampleRequest, Sampling
from tests.ranks import RankError, run_ranks

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
        self.answered = 0

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
        self.answered += len(requests)
        version = self.policy_version - 1 if self._fault("lag") else self.policy_version
        return [
            Rollout(r.prompt, torch.tensor([7, 8 + r.seed]), torch.tensor([-0.1, -0.25]), version, "stop")
            for r in requests
        ]

    def close(self) -> None:
        self.policy_version = -1


def collective_export(group: Any) -> Callable[[], Iterator[Bucket]]:
    """Each bucket takes an all-reduce of all ranks, as a gather of shards does; buckets come out on all of them."""

    def export() -> Iterator[Bucket]:
        for i in range(BUCKETS):
            value = torch.tensor(float(i))
            if group is not None:
                dist.all_reduce(value, group=group)
                value /= dist.get_world_size(group)
            yield [("w", value)]

    return export


def make(group: Any, rank: int, max_restarts: int = 3, **faults: int) -> tuple[RolloutClient, Any, list[str]]:
    """One engine, on rank 0."""
    engine = FakeEngine(**faults) if rank == 0 else None
    events: list[str] = []
    engines = {} if engine is None else {0: engine}
    client = RolloutClient(
        engines, 1, collective_export(group), group, max_restarts=max_restarts, on_event=events.append
    )
    return client, engine, events


def _plain(rollouts: list[Rollout]) -> list[Any]:
    """Everything a rollout holds, in values that can be compared."""
    return [
        (r.prompt, r.response_ids.tolist(), r.logprobs.tolist(), r.policy_version, r.finish_reason, r.group)
        for r in rollouts
    ]


class SlowEngine(FakeEngine):
    def generate(self, requests: Any, sampling: Sampling) -> list[Rollout]:
        rollouts = super().generate(requests, sampling)
        time.sleep(4)
        return rollouts


def _sample_slowly(rank: int, world_size: int, pulse: float) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side_by_side, "_PULSE_SECONDS", pulse)
        return _sampled_slowly(rank)


def _sampled_slowly(rank: int) -> Any:
    group = dist.new_group(timeout=timedelta(seconds=2))
    seen: list[tuple[int, int]] = []
    client = RolloutClient(
        {0: SlowEngine()} if rank == 0 else {}, 1, collective_export(group), group, max_restarts=0,
        on_event=lambda line: None, on_progress=lambda done, of: seen.append((done, of)),
    )  # fmt: skip
    client.start(0)
    rollouts = client.sample(REQUESTS, SAMPLING)
    client.close()
    return _plain(rollouts), seen


def test_answers_may_take_longer_than_ranks_wait_in_a_collective() -> None:
    (answers, seen), (others, nothing) = run_ranks(2, _sample_slowly, 0.5)
    assert answers == others
    assert seen
    assert set(seen) == {(2, 2)}  # this engine has answered before it sleeps
    assert nothing == []


def test_without_a_sign_of_life_they_do_not_wait_for_ever() -> None:
    with pytest.raises(RankError, match=r"(?i)timed ?out|connection closed"):
        run_ranks(2, _sample_slowly, 60.0)


def _run_two_versions(rank: int, world_size: int, faults: dict[str, int]) -> Any:
    client, engine, events = make(dist.group.WORLD, rank, **faults)
    client.start(0)
    first = client.sample(REQUESTS, SAMPLING)
    client.sync_weights(1)
    second = client.sample(REQUESTS, SAMPLING)
    client.close()
    return _plain(first), _plain(second), events, engine and (engine.starts, engine.synced)


def _fail(rank: int, world_size: int, faults: dict[str, int]) -> tuple[str, str]:
    return _fail_fleet(rank, world_size, {0: [0]}, {0: faults})


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


# A fleet

FLEET = [SampleRequest(PROMPTS[i % 2], seed=i, group=i) for i in range(9)]


def fleet(group: Any, rank: int, seats: dict[int, list[int]], faults: dict[int, dict[str, int]]) -> Any:
    """`seats`: the engines of each rank."""
    engines = {index: FakeEngine(**faults.get(index, {})) for index in seats.get(rank, [])}
    events: list[str] = []
    count = sum(map(len, seats.values()))
    export = collective_export(group)
    client = RolloutClient(engines, count, export, group, max_restarts=2, on_event=events.append)
    return client, engines, events


def _run_fleet(rank: int, world_size: int, seats: dict[int, list[int]], faults: dict[int, dict[str, int]]) -> Any:
    client, engines, events = fleet(dist.group.WORLD, rank, seats, faults)
    client.start(0)
    samples = [_plain(client.sample(FLEET, SAMPLING))]
    client.sync_weights(1)
    samples.append(_plain(client.sample(FLEET, SAMPLING)))
    client.close()
    return samples, events, {index: (engine.starts, engine.answered) for index, engine in engines.items()}


@pytest.mark.parametrize("seats", [{0: [0]}, {0: [0, 1]}, {1: [0]}, {0: [0], 1: [1, 2]}, {1: [0, 1, 2, 3]}], ids=str)
def test_answers_do_not_depend_on_how_many_engines_there_are_or_where(seats):
    ranks = run_ranks(2, _run_fleet, seats, {})
    assert ranks[0][0] == ranks[1][0]
    for version, rollouts in enumerate(ranks[0][0]):
        assert rollouts == [
            (r.prompt, [7, 8 + r.seed], pytest.approx([-0.1, -0.25]), version, "stop", r.group) for r in FLEET
        ]
    engines = ranks[0][2] | ranks[1][2]
    answered = [number for _, number in engines.values()]
    assert sum(answered) == 2 * len(FLEET)
    assert max(answered) - min(answered) <= 2, "an engine has one request more in each step at most"


@pytest.mark.parametrize("fault", ["die_in_start", "die_mid_sync", "die_in_generate"])
@pytest.mark.parametrize("seats", [{0: [0, 1]}, {0: [0], 1: [1]}], ids=str)
def test_an_engine_that_dies_is_restarted_alone_and_only_its_share_is_sampled_again(seats, fault):
    unharmed = run_ranks(2, _run_fleet, seats, {})
    ranks = run_ranks(2, _run_fleet, seats, {1: {fault: 1}})
    assert [rank[0] for rank in ranks] == [rank[0] for rank in unharmed]
    engines = ranks[0][2] | ranks[1][2]
    assert engines[0] == (1, 10), "five requests in each of two steps"
    assert engines[1] == (2, 8)
    assert len(ranks[0][1]) == 1
    assert "restarting engine 1 1/2" in ranks[0][1][0]


def _fail_fleet(rank: int, world_size: int, seats: dict[int, list[int]], faults: dict[int, dict[str, int]]) -> Any:
    client, _, _ = fleet(dist.group.WORLD, rank, seats, faults)
    try:
        client.start(0)
        client.sample(FLEET, SAMPLING)
    except Exception as error:
        dist.barrier()  # the group must still be in step
        return type(error).__name__, str(error)
    return "no error", ""


@pytest.mark.parametrize("seats", [{0: [0, 1]}, {0: [0], 1: [1]}, {1: [0, 1]}], ids=str)
@pytest.mark.parametrize(
    ("fault", "times", "error", "words"),
    [
        ("die_in_generate", 100, "EngineDiedError", "rollout engine 1 of 2 died 3 times in a row"),
        ("die_mid_sync", 100, "EngineDiedError", "rollout engine 1 of 2 died 3 times in a row"),
        ("refuse", 1, "RolloutError", "prompt 'a' is too long"),
        ("lag", 1, "StalePolicyError", "policy version -1, but version 0 is being trained"),
    ],
)
def test_one_engines_failure_is_one_error_on_every_rank(seats, fault, times, error, words):
    ranks = run_ranks(2, _fail_fleet, seats, {1: {fault: times}})
    assert ranks[0] == ranks[1]
    assert ranks[0][0] == error
    assert words in ranks[0][1]


def test_a_bug_of_any_engine_ends_all_ranks():
    ranks = run_ranks(2, _fail_fleet, {0: [0], 1: [1]}, {1: {"bug": 1}})
    assert ranks[1][0] == "KeyError"
    assert ranks[0][0] == "RolloutError"
    assert "rank 1: KeyError" in ranks[0][1]


def test_deaths_are_counted_for_each_engine():
    client, engines, events = fleet(None, 0, {0: [0, 1, 2]}, {})
    client.start(0)
    for _ in range(2):
        for engine in engines.values():
            engine.faults["die_in_generate"] = 1  # three deaths at once are one of each
        assert len(client.sample(FLEET, SAMPLING)) == len(FLEET)
    assert len(events) == 6


def test_an_error_of_the_trainers_side_ends_the_sync_of_all_engines():
    def export() -> Iterator[Bucket]:
        yield [("w", torch.tensor(0.0))]
        raise RolloutError("no room for the weights")

    engines = {index: FakeEngine() for index in range(3)}
    client = RolloutClient(engines, 3, export, None, max_restarts=1, on_event=print)
    with pytest.raises(RolloutError, match="no room for the weights"):
        client.start(0)
