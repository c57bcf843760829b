"""Packs hold every sequence once, keep to their budget, are equally many on every rank, and mean the same work."""

from __future__ import annotations

import random

import pytest
import torch

from opd_megatron.data.batching import MicroBatchBuilder, make_batch
from opd_megatron.data.packing import packs_of, shares_by_work
from opd_megatron.types import Prompt, Rollout


def rollouts_of(lengths: list[int], seed: int = 0, **fields: object) -> list[Rollout]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index, length in enumerate(lengths):
        prompt = Prompt(str(index), tuple(range(3, 3 + 1 + index % 4)), "")
        ids = torch.randint(0, 250, (length,), generator=generator)
        made.append(Rollout(prompt, ids, -torch.rand(length, generator=generator), 0, "stop", **fields))
    return made


@pytest.mark.parametrize("seed", range(40))
def test_every_sequence_is_in_one_pack_and_ranks_have_equally_many(seed: int) -> None:
    chance = random.Random(seed)
    ranks, budget = chance.choice([1, 2, 4]), chance.choice([64, 200, 1000])
    lengths = [min(budget, 1 + int(chance.lognormvariate(3.5, 1))) for _ in range(chance.randint(ranks, 60))]
    routes = [chance.randrange(chance.choice([1, 3])) for _ in lengths]
    packs = packs_of(shares_by_work(lengths, routes, ranks, 500.0), lengths, routes, budget)
    assert sorted(index for each in packs for pack in each for index in pack) == list(range(len(lengths)))
    assert len({len(each) for each in packs}) == 1
    assert all(sum(lengths[index] for index in pack) <= budget for each in packs for pack in each)


def test_packs_are_few_and_even() -> None:
    chance = random.Random(0)
    lengths = [min(1000, 1 + int(chance.lognormvariate(4, 1))) for _ in range(200)]
    [packs] = packs_of(shares_by_work(lengths, [0] * 200, 1), lengths, [0] * 200, 1000)
    assert len(packs) <= 11 / 9 * -(-sum(lengths) // 1000) + 1
    sizes = [sum(lengths[index] for index in pack) for pack in packs]
    assert max(sizes) - min(sizes) <= 0.1 * max(sizes)


def test_a_rank_of_long_sequences_gets_fewer_tokens_where_attention_counts() -> None:
    lengths = [1000] + [50] * 40
    plain, squared = (shares_by_work(lengths, [0] * 41, 2, each) for each in (float("inf"), 200.0))
    tokens = [[sum(lengths[i] for i in share) for share in shares] for shares in (plain, squared)]
    assert abs(tokens[0][0] - tokens[0][1]) <= 50
    assert tokens[1][0] == 1000
    work = [sum(lengths[i] + lengths[i] ** 2 / 200 for i in share) for share in squared]
    assert work[0] == max(work), "the one long sequence is more than half of all work"


def test_every_route_is_shared_out_and_packs_are_of_one_route() -> None:
    lengths, routes = [10] * 40, [0, 1] * 20
    shares = shares_by_work(lengths, routes, 2)
    assert [sum(routes[i] for i in share) for share in shares] == [10, 10]
    packs = packs_of(shares, lengths, routes, 50)
    assert all(len({routes[index] for index in pack}) == 1 for each in packs for pack in each)


def test_a_rank_with_fewer_sequences_than_packs_has_empty_ones() -> None:
    packs = packs_of([[0], [1, 2, 3]], [90, 60, 60, 60], [0] * 4, 100)
    assert packs == [[[0], [], []], [[1], [2], [3]]]


def test_a_sequence_above_the_budget_has_a_pack_of_its_own() -> None:
    assert packs_of([[0, 1]], [150, 20], [0, 0], 100) == [[[0], [1]]]


@pytest.mark.parametrize("multiple_of", [1, 8])
def test_a_pack_holds_what_the_padded_rows_hold(multiple_of: int) -> None:
    rollouts = rollouts_of([5, 1, 9], advantage=0.5)
    scales, routes = [1.0, 2.0, 0.5], [0, 1, 1]
    padded = make_batch(rollouts, scales=scales, routes=routes)
    packed = make_batch(rollouts, scales=scales, routes=routes, packed=True, multiple_of=multiple_of)
    lengths = [len(each.prompt.token_ids) + len(each.response_ids) for each in rollouts]
    assert packed.lengths is not None
    assert list(packed.lengths[:3]) == lengths
    assert sum(packed.lengths) == packed.tokens.shape[1]
    assert packed.tokens.shape[1] % multiple_of == 0
    rows = torch.tensor([row for row, length in enumerate(lengths) for _ in range(length)])
    places = torch.cat([torch.arange(length) for length in lengths])
    for name in ("tokens", "targets", "weights", "rollout_logprobs", "advantages", "given", "routes", "sequence_ids"):
        flat = getattr(packed, name)[0, : len(rows)]
        assert torch.equal(flat, getattr(padded, name)[rows, places]), name
    assert torch.equal(packed.position_ids[0, : len(rows)], places)
    assert not packed.weights[0, len(rows) :].any()


def test_scores_go_to_the_tokens_of_their_answers() -> None:
    rollouts = rollouts_of([5, 1, 9, 3, 7, 2])
    builder = MicroBatchBuilder(0, 1, 1, False, 4, torch.device("cpu"), tokens=16)
    step = builder.build(rollouts)
    step.score([float(i + 1) for i in range(6)])
    found: dict[int, set[float]] = {}
    for portion, batch in zip(step.deal[0], step, strict=True):
        assert batch.advantages is not None
        for place, index in enumerate(portion.rollouts):
            here = (batch.sequence_ids == place) & (batch.weights > 0)
            assert int(here.sum()) == len(rollouts[index].response_ids)
            found[index] = set(batch.advantages[here].tolist())
        assert not batch.advantages[batch.weights == 0].any()
    assert found == {i: {float(i + 1)} for i in range(6)}
