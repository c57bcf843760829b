"""Who scores and sends what: every micro batch once, to every rank that wants it, in an order that cannot lock."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict

import pytest
import torch

from opd_megatron.mcore.model import _by_sequence_shard, sequence_shards
from opd_megatron.teacher.route import Grid, Route

SIZES = [1, 2, 3]
COUNTS = [1, 2, 5]


def _routes() -> list[Route]:
    found = []
    for tensor, pipeline, data, theirs, data_of_teacher in itertools.product([1, 2, 4], [1, 2], SIZES, [1, 2], SIZES):
        student = Grid(0, tensor, pipeline, data)
        found.append(Route(Grid(student.size, theirs, 2, data_of_teacher), student))
    return found


@pytest.mark.parametrize("count", COUNTS)
def test_every_micro_batch_is_scored_once_and_reaches_every_rank_that_wants_it(count: int) -> None:
    for route in _routes():
        delivered: Counter[tuple[int, int, int]] = Counter()
        for replica, tensor in itertools.product(range(route.teacher.data), range(route.teacher.tensor)):
            for job in route.jobs(replica, count):
                for to in route.receivers(tensor) if job.wanted else ():
                    delivered[job.data, job.index, to] += 1
                    sender = route.sender(job.data, job.index, to)
                    assert sender == route.teacher.last_stage(replica, tensor), "both sides say the same"
                    assert {sender, route.student.last_stage(job.data, to)} <= set(route.members)
        wanted = itertools.product(range(route.student.data), range(count), range(route.student.tensor))
        assert delivered == Counter(wanted)
        assert len({len(route.jobs(replica, count)) for replica in range(route.teacher.data)}) == 1


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("in_step", [False, True])
def test_nobody_waits_for_ever(count: int, ahead: int, in_step: bool) -> None:
    """Plays senders and receivers with messages that wait for their receiver and a bound on both sides. Replicas that
    are `in_step` take their next micro batch only together, as experts over data-parallel ranks make them."""
    for route in _routes():
        student = route.student
        queues = {
            (replica, tensor): [
                (job, to) for job in route.jobs(replica, count) if job.wanted for to in route.receivers(tensor)
            ]
            for replica, tensor in itertools.product(range(route.teacher.data), range(route.teacher.tensor))
        }
        limit = ahead * len(student.last_stages)
        sent: dict[tuple[int, int], list[tuple[int, int, int]]] = defaultdict(list)
        taken = dict.fromkeys(itertools.product(range(student.data), range(student.tensor)), 0)
        for _ in range(10 * count * student.data * student.tensor * route.teacher.data + 10):
            for source, queue in queues.items():
                while queue and len(sent[source]) < limit:
                    job, to = queue.pop(0)
                    sent[source].append((job.data, job.index, to))
            slowest = min(taken.values())
            for (data, tensor), index in taken.items():
                if index == count or (in_step and index > slowest):
                    continue
                source = next(s for s in queues if route.teacher.last_stage(*s) == route.sender(data, index, tensor))
                if (data, index, tensor) in sent[source]:
                    sent[source].remove((data, index, tensor))
                    taken[data, tensor] += 1
        assert set(taken.values()) == {count}, route


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_teachers_rows_are_cut_as_the_students_are(ranks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 3):
        mask = torch.rand(rows, 16, generator=generator) < 0.4
        mask[0, 0] = True
        states = torch.randn(rows, 16, 5, generator=generator)
        shards = sequence_shards(states[mask], mask, ranks)
        masks = _by_sequence_shard(mask, ranks)
        parts = states.view(rows, ranks, 16 // ranks, 5).transpose(0, 1).reshape(ranks, -1, 5)
        assert len({len(shard) for shard in shards}) == 1
        for shard, part, kept in zip(shards, parts, masks, strict=True):
            wanted = part[kept]
            assert torch.equal(shard[: len(wanted)], wanted)
            assert not shard[len(wanted) :].any()
