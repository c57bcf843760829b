"""Who scores and sends what: every micro batch once, to every rank that wants it, in an order that cannot lock."""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest
import torch

from opd_megatron.mcore.model import _by_sequence_shard, sequence_shards
from opd_megatron.teacher.route import Grid, Route, Work

SIZES = [1, 2, 3]
COUNTS = [1, 2, 5]


def _routes() -> list[Route]:
    found = []
    for tensor, pipeline, data, theirs, data_of_teacher in itertools.product([1, 2, 4], [1, 2], SIZES, [1, 2], SIZES):
        student = Grid(0, tensor, pipeline, data)
        found.append(Route(Grid(student.size, theirs, 2, data_of_teacher), student))
    return found


def _everything(route: Route, count: int) -> Work:
    return Work(route, [list(range(count))] * route.student.data)


def _some(route: Route, count: int, seed: int) -> Work:
    """Of each of the student's replicas some micro batches, of one perhaps none."""
    draw = random.Random(seed)
    return Work(route, [[n for n in range(count) if draw.random() < 0.5] for _ in range(route.student.data)])


def _works(count: int) -> Iterator[Work]:
    for number, route in enumerate(_routes()):
        yield _everything(route, count)
        some = _some(route, count, number)
        if any(some.numbers):
            yield some


@pytest.mark.parametrize("count", COUNTS)
def test_every_micro_batch_is_scored_once_and_reaches_every_rank_that_wants_it(count: int) -> None:
    for work in _works(count):
        route = work.route
        delivered: Counter[tuple[int, int, int]] = Counter()
        for replica, tensor in itertools.product(range(route.teacher.data), range(route.teacher.tensor)):
            for job in work.jobs(replica):
                for to in route.receivers(tensor) if job.wanted else ():
                    delivered[job.data, job.index, to] += 1
                    sender = work.sender(job.data, job.index, to)
                    assert sender == route.teacher.last_stage(replica, tensor), "both sides say the same"
                    assert {sender, route.student.last_stage(job.data, to)} <= set(route.members)
        wanted = [
            (data, index, to)
            for data, numbers in enumerate(work.numbers)
            for index in range(len(numbers))
            for to in range(route.student.tensor)
        ]
        assert delivered == Counter(wanted)
        assert len({len(work.jobs(replica)) for replica in range(route.teacher.data)}) == 1


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("in_step", [False, True])
def test_nobody_waits_for_ever(count: int, ahead: int, in_step: bool) -> None:
    """One teacher, and two of which each scores some of the micro batches, or both do."""
    for number, route in enumerate(_routes()):
        _play([_everything(route, count)], count, ahead, in_step=in_step)
        _play([_some(route, count, number), _some(route, count, number + 1000)], count, ahead, in_step=in_step)


def test_a_teacher_holds_up_no_early_micro_batch_for_a_late_one() -> None:
    """Each of two teachers scores the first half of one replica and the second half of the other."""
    route = Route(Grid(2, 1, 1, 1), Grid(0, 1, 1, 2))
    first, second = list(range(12)), list(range(12, 24))
    _play([Work(route, [first, second]), Work(route, [second, first])], 24, 1, in_step=False)


def _play(works: list[Work], count: int, ahead: int, *, in_step: bool) -> None:
    """Plays senders and receivers with messages that wait for their receiver and a bound on both sides: a receiver has
    asked for its next `ahead` of each teacher, a sender has at most a number of messages that nobody has taken.
    Replicas that are `in_step` take their next micro batch only together, as experts over data-parallel ranks do."""
    route = works[0].route
    student = route.student
    queues = {
        (n, replica, tensor): [
            (job, to) for job in work.jobs(replica) if job.wanted for to in route.receivers(tensor)
        ]
        for n, work in enumerate(works)
        for replica, tensor in itertools.product(range(route.teacher.data), range(route.teacher.tensor))
    }  # fmt: skip
    limit = ahead * len(student.last_stages)
    sent: dict[tuple[int, int, int], list[tuple[int, int, int]]] = defaultdict(list)
    arrived: set[tuple[int, int, int, int]] = set()
    done = dict.fromkeys(itertools.product(range(student.data), range(student.tensor)), 0)

    def asked(n: int, data: int, index: int, tensor: int) -> bool:
        taken = sum(number < done[data, tensor] for number in works[n].numbers[data])
        return index < taken + ahead

    progress = True
    while progress:
        progress = False
        for (n, replica, tensor), queue in queues.items():
            source = (n, replica, tensor)
            while queue and len(sent[source]) < limit:
                job, to = queue.pop(0)
                sent[source].append((job.data, job.index, to))
                progress = True
            for message in [each for each in sent[source] if asked(n, *each)]:
                sent[source].remove(message)
                arrived.add((n, *message))
                progress = True
        slowest = min(done.values())
        for (data, tensor), number in done.items():
            if number == count or (in_step and number > slowest):
                continue
            needed = [
                (n, data, work.numbers[data].index(number), tensor)
                for n, work in enumerate(works)
                if number in work.numbers[data]
            ]  # fmt: skip
            if arrived.issuperset(needed):
                done[data, tensor] += 1
                progress = True
    assert set(done.values()) == {count}, (route, [work.numbers for work in works])


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
