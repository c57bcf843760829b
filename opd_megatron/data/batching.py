"""Rollouts to micro batches, padded or packed: which sequence goes to which rank, how long a batch is, which positions
count."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from opd_megatron.data.context import context_columns
from opd_megatron.data.packing import packs_of, shares_by_work
from opd_megatron.types import Batch, Rollout

Balance = Literal["tokens", "samples", "tasks"]


@dataclass(frozen=True, slots=True)
class Portion:
    """One micro batch of a data-parallel rank."""

    number: int
    """Of the student's micro batch on that rank; -1 for one that only keeps a teacher's ranks in step."""
    rollouts: tuple[int, ...]
    """By their index in the step, in the order of the rows."""


Deal = Sequence[Sequence[Portion]]
"""Every data-parallel rank's micro batches."""


@dataclass(frozen=True, slots=True)
class MicroBatchBuilder:
    """Makes one data-parallel rank's micro batches. Every rank must pass the same rollouts in the same order."""

    dp_rank: int
    dp_size: int
    size: int
    """Sequences in a micro batch, at most."""
    one_length: bool
    """Pad all sequences of all ranks to one length, and all micro batches to equally many rows, because pipeline stages
    exchange tensors of one shape. Otherwise each micro batch is as long as its longest sequence."""
    multiple_of: int
    """Lengths are rounded up to a multiple of this (sequence parallelism needs the tensor-parallel size)."""
    device: torch.device
    route_of: Callable[[Rollout], int] | None = None
    """Which teachers a rollout is for, as a number (`teacher.routing`); None where it is all of them for every one."""
    balance: Balance = "tokens"
    """What has equal weight in the loss (`token_scales`)."""
    in_step: bool = False
    """Let every data-parallel rank run equally many micro batches of a teacher: their experts wait for each other."""
    tokens: int | None = None
    """Tokens of a micro batch, in which sequences follow each other without padding; `size` and `one_length` count for
    nothing then. None pads them."""
    attention_length: float = math.inf
    """Of the student (`packing.shares_by_work`)."""
    context_rank: int = 0
    context_size: int = 1
    """Ranks that share every sequence of a pack (`data.context`)."""
    sequence_multiple_of: int = 1
    """Every sequence of a pack is padded to a multiple of this: of 2 `context_size` where ranks share them."""
    count_multiple_of: int = 1
    """The number of micro batches is rounded up to a multiple of this, by empty ones (an interleaved pipeline schedule
    needs the pipeline-parallel size)."""

    def build(self, rollouts: Sequence[Rollout]) -> StepBatches:
        """Builds micro batches of `size`, or of `tokens`, from this rank's balanced share of a step."""
        if self.tokens is not None:
            return StepBatches(self, rollouts, self._packed(rollouts, list(range(len(rollouts)))), self.balance)
        shares = _shares(rollouts, self.dp_size, self._routes(rollouts))
        return StepBatches(self, rollouts, [_cut(share, self.size) for share in shares], self.balance)

    def build_any_number(self, rollouts: Sequence[Rollout]) -> StepBatches:
        """Does the same for any number of rollouts, for evaluation: unless they are packed, some are repeated until
        every rank has equally many, and a micro batch has the largest size up to `size` that divides them. Every token
        has equal weight."""
        if self.tokens is not None:
            fewer = [0] * (self.dp_size - len(rollouts))  # than ranks
            return StepBatches(self, rollouts, self._packed(rollouts, [*range(len(rollouts)), *fewer]))
        routes = self._routes(rollouts)
        indices = list(range(len(rollouts)))
        indices += indices[: -len(indices) % self.dp_size]
        indices += indices[:1] * (-len(indices) % self.dp_size)  # fewer rollouts than ranks
        shares = [
            sorted(indices[rank :: self.dp_size], key=lambda i: (routes[i], _length(rollouts[i])))
            for rank in range(self.dp_size)
        ]
        most = len(shares[0])
        size = max(n for n in range(1, self.size + 1) if most % n == 0)
        return StepBatches(self, rollouts, [_cut(share, size) for share in shares])

    def _packed(self, rollouts: Sequence[Rollout], indices: Sequence[int]) -> list[list[Portion]]:
        assert self.tokens is not None
        routes = self._routes([rollouts[i] for i in indices])
        lengths = [round_up(_length(rollouts[i]), self.sequence_multiple_of) for i in indices]
        shares = shares_by_work(lengths, routes, self.dp_size, self.attention_length)
        return [
            [Portion(number, tuple(sorted(indices[i] for i in pack))) for number, pack in enumerate(packs)]
            for packs in packs_of(shares, lengths, routes, self.tokens, self.count_multiple_of)
        ]

    def _routes(self, rollouts: Sequence[Rollout]) -> list[int]:
        return [0 if self.route_of is None else self.route_of(rollout) for rollout in rollouts]


class StepBatches(list[Batch]):
    """One rank's micro batches, from which those of any data-parallel rank can be made, and those of a teacher that
    sees other prompts or some of the rollouts alone."""

    def __init__(
        self, builder: MicroBatchBuilder, rollouts: Sequence[Rollout], deal: Deal, balance: Balance = "tokens"
    ) -> None:
        self.builder, self.rollouts, self.deal = builder, rollouts, deal
        self._scales = token_scales(rollouts, balance)
        self._sampled = all(rollout.logprobs is not None for rollout in rollouts)
        super().__init__(self._made(builder))

    def of(self, dp_rank: int, **changes: Any) -> list[Batch]:
        """The same for another data-parallel rank: same sequences in the same order, with fields of the builder
        changed (how they are padded, or where they are)."""
        return self._made(replace(self.builder, dp_rank=dp_rank, **changes))

    def view(self, seen: Callable[[Rollout], Rollout | None]) -> StepBatches:
        """What a teacher sees of the step: each rollout as `seen` shows it, without those that it does not show.

        A micro batch keeps its place and order, and is left out where nothing of it is left. Where ranks must stay
        `in_step`, empty ones follow until every rank has equally many, or as many as a schedule wants.
        """
        shown = [seen(rollout) for rollout in self.rollouts]
        deal = [
            [
                Portion(portion.number, kept)
                for portion in portions
                if (kept := tuple(i for i in portion.rollouts if shown[i] is not None))
            ]
            for portions in self.deal
        ]
        multiple_of = self.builder.count_multiple_of
        if self.builder.in_step or multiple_of > 1:
            most = max(len(portions) for portions in deal)
            counts = [round_up(most if self.builder.in_step else len(portions), multiple_of) for portions in deal]
            deal = [
                portions + [Portion(-1, ())] * (count - len(portions))
                for portions, count in zip(deal, counts, strict=True)
            ]
        rollouts = [mine if new is None else new for mine, new in zip(self.rollouts, shown, strict=True)]
        return StepBatches(self.builder, rollouts, deal)

    def score(self, advantages: Sequence[float]) -> None:
        """Gives every token the advantage of its answer, in the order of the rollouts."""
        for place, portion in enumerate(self.deal[self.builder.dp_rank]):
            batch = self[place]
            worth = torch.zeros(max(len(batch.tokens), len(batch.lengths or ())), device=batch.tokens.device)
            worth[: len(portion.rollouts)] = torch.tensor([advantages[i] for i in portion.rollouts])
            self[place] = replace(batch, advantages=(batch.weights > 0) * worth[batch.sequence_ids])

    def numbers(self, dp_rank: int) -> list[int]:
        """The student's numbers of a rank's micro batches, without the empty ones at their end."""
        return [portion.number for portion in self.deal[dp_rank] if portion.number >= 0]

    @property
    def dealt(self) -> list[int]:
        """Every rollout that is in it, once."""
        return sorted({i for portions in self.deal for portion in portions for i in portion.rollouts})

    @property
    def num_tokens(self) -> int:
        """Response tokens of all ranks."""
        return sum(len(self.rollouts[i].response_ids) for i in self.dealt)

    def _made(self, builder: MicroBatchBuilder) -> list[Batch]:
        everyones = [portion.rollouts for portions in self.deal for portion in portions]
        if not any(everyones):
            return []
        length = rows = None
        if builder.one_length and builder.tokens is None:
            length = max(_length(self.rollouts[i]) for portion in everyones for i in portion)
            rows = max(len(portion) for portion in everyones)
        some = min((self.rollouts[i] for portion in everyones for i in portion), key=_length)
        made = []
        for portion in self.deal[builder.dp_rank]:
            rollouts = [self.rollouts[i] for i in portion.rollouts]
            batch = make_batch(
                rollouts or [some],
                multiple_of=builder.multiple_of,
                sequence_multiple_of=builder.sequence_multiple_of,
                length=length,
                packed=builder.tokens is not None,
                scales=[self._scales[i] for i in portion.rollouts] or [0.0],
                sampled=self._sampled,
                routes=None if builder.route_of is None else [builder.route_of(each) for each in rollouts or [some]],
            )
            batch = batch.with_rows(rows or len(batch.tokens))
            if builder.context_size > 1:
                assert batch.lengths is not None, "context parallelism needs packed sequences"
                batch = batch.columns(context_columns(batch.lengths, builder.context_rank, builder.context_size))
            made.append(batch.to(builder.device))
        return made


def make_batch(
    rollouts: Sequence[Rollout],
    *,
    multiple_of: int = 1,
    sequence_multiple_of: int = 1,
    length: int | None = None,
    pad_id: int = 0,
    scales: Sequence[float] | None = None,
    routes: Sequence[int] | None = None,
    sampled: bool | None = None,
    packed: bool = False,
) -> Batch:
    """Pads the rollouts on the right to one batch, in their order, or lays them one after another in one row.

    Position i predicts token i + 1, so a response of r tokens after a prompt of p tokens has weight 1 at the
    positions p - 1 .. p + r - 2 and 0 elsewhere: the last prompt position predicts the first response token.

    Args:
        multiple_of: S is rounded up to a multiple of this; of a packed batch by a last sequence of padding.
        sequence_multiple_of: every sequence of a packed batch is padded to a multiple of this, as part of it.
        length: S before rounding; the longest sequence by default.
        scales: the weight of each rollout's tokens instead of 1.
        routes: which teachers each rollout is for; `Batch.routes`.
        sampled: whether the batch has their log-probabilities, which are left out where some of a step have none; by
            default whether they do.
        packed: one after another.
    """
    assert rollouts, "a batch needs at least one sequence"
    ends = [_length(rollout) for rollout in rollouts]
    lengths = [round_up(each, sequence_multiple_of) for each in ends]
    longest = max(lengths)
    assert length is None or length >= longest, f"length {length} does not hold a sequence of {longest} tokens"
    multiple_of = math.lcm(multiple_of, sequence_multiple_of)
    size = round_up(sum(lengths) if packed else longest if length is None else length, multiple_of)
    if packed and size > sum(lengths):
        lengths.append(size - sum(lengths))
    tokens = torch.full((1 if packed else len(rollouts), size), pad_id, dtype=torch.int64)
    targets = torch.zeros_like(tokens)
    weights, logprobs, advantages, given = (torch.zeros(tokens.shape, dtype=torch.float32) for _ in range(4))
    for index, rollout in enumerate(rollouts):
        row, begin = (0, sum(lengths[:index])) if packed else (index, 0)
        start, end = begin + len(rollout.prompt.token_ids), begin + ends[index]
        assert start > begin, "a response needs a prompt position that predicts its first token"
        tokens[row, begin:start] = torch.tensor(rollout.prompt.token_ids, dtype=torch.int64)
        tokens[row, start:end] = rollout.response_ids
        targets[row, begin : end - 1] = tokens[row, begin + 1 : end]
        weights[row, start - 1 : end - 1] = 1.0 if scales is None else scales[index]
        if rollout.policy_version < 0:
            given[row, start - 1 : end - 1] = 1
        if rollout.logprobs is not None:
            assert len(rollout.logprobs) == end - start, (
                f"{len(rollout.logprobs)} log-probabilities for a response of {end - start} tokens"
            )
            logprobs[row, start - 1 : end - 1] = rollout.logprobs
        if rollout.advantage is not None:
            advantages[row, start - 1 : end - 1] = rollout.advantage
    if sampled is None:
        sampled = rollouts[0].logprobs is not None
        assert all((rollout.logprobs is not None) == sampled for rollout in rollouts), "some were sampled, some not"
    scored = rollouts[0].advantage is not None
    assert all((rollout.advantage is not None) == scored for rollout in rollouts), "some have an advantage, some none"
    columns = (tokens, targets, weights, logprobs if sampled else None, advantages if scored else None, given)
    present = tuple(sorted(set(routes or ())))
    if not packed:
        own = None if routes is None else torch.tensor(routes).unsqueeze(1).expand_as(tokens).contiguous()
        return Batch(*columns, routes=own, present=present)
    counts = torch.tensor(lengths)
    last = [] if routes is None else [routes[-1]] * (len(lengths) - len(rollouts))
    return Batch(
        *columns,
        position_ids=torch.cat([torch.arange(each) for each in lengths]).unsqueeze(0),
        sequence_ids=torch.arange(len(lengths)).repeat_interleave(counts).unsqueeze(0),
        routes=None if routes is None else torch.tensor([*routes, *last]).repeat_interleave(counts).unsqueeze(0),
        lengths=tuple(lengths),
        present=present,
    )


def token_scales(rollouts: Sequence[Rollout], balance: Balance) -> list[float]:
    """The weight of each rollout's tokens in the loss, which is divided by the number of all tokens.

    `tokens`: every token alike, so that a task counts as much as its answers are long. `samples`: every answer alike,
    the mean over answers of each one's mean over its tokens. `tasks`: every task by its number of answers, and all
    tokens of a task alike. The weights of all tokens sum to their number.
    """
    if balance == "tokens":
        return [1.0] * len(rollouts)
    keys = [i if balance == "samples" else rollout.prompt.task for i, rollout in enumerate(rollouts)]
    answers = Counter(keys)
    tokens: Counter[int | str | None] = Counter()
    for key, rollout in zip(keys, rollouts, strict=True):
        tokens[key] += len(rollout.response_ids)
    mean_length = tokens.total() / len(rollouts)
    return [mean_length * answers[key] / max(tokens[key], 1) for key in keys]


def shard_rollouts(rollouts: Sequence[Rollout], dp_rank: int, dp_size: int) -> list[Rollout]:
    """Selects this data-parallel rank's share: equally many sequences on each rank, and nearly equally many tokens.

    Longest first, each to the rank with the fewest tokens that still has room. A share is sorted by length, so
    that the sequences of a micro batch are alike. Every rank must pass the same rollouts in the same order.
    """
    return [rollouts[index] for index in _shares(rollouts, dp_size, [0] * len(rollouts))[dp_rank]]


def _shares(rollouts: Sequence[Rollout], dp_size: int, routes: Sequence[int]) -> list[list[int]]:
    """Every rank's share of the rollouts, by index, sorted by route and then by length: all but a few micro batches
    are for the same teachers. Each route is shared out as evenly as the whole, so that no rank's teacher does
    another's work."""
    assert len(rollouts) % dp_size == 0, f"{len(rollouts)} rollouts do not split over {dp_size} data-parallel ranks"
    room = len(rollouts) // dp_size
    room_of = {route: -(-count // dp_size) for route, count in Counter(routes).items()}
    shares: list[list[int]] = [[] for _ in range(dp_size)]
    loads, of_route = [0] * dp_size, [Counter[int]() for _ in range(dp_size)]
    for index in sorted(range(len(rollouts)), key=lambda i: (routes[i], -_length(rollouts[i]), i)):
        route = routes[index]
        free = [rank for rank in range(dp_size) if len(shares[rank]) < room]
        even = [rank for rank in free if of_route[rank][route] < room_of[route]] or free
        rank = min(even, key=lambda r: (loads[r], r))
        shares[rank].append(index)
        of_route[rank][route] += 1
        loads[rank] += _length(rollouts[index])
    return shares


def _cut(share: Sequence[int], size: int) -> list[Portion]:
    assert len(share) % size == 0, f"{len(share)} sequences do not split into micro batches of {size}"
    return [Portion(start // size, tuple(share[start : start + size])) for start in range(0, len(share), size)]


def round_up(value: int, multiple_of: int) -> int:
    """Rounds up to the next multiple."""
    return -(-value // multiple_of) * multiple_of


def _length(rollout: Rollout) -> int:
    return len(rollout.prompt.token_ids) + len(rollout.response_ids)
