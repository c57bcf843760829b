"""Rollouts to padded micro batches: which sequence goes to which rank, how long a batch is, which positions count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from opd_megatron.types import Batch, Rollout


@dataclass(frozen=True, slots=True)
class MicroBatchBuilder:
    """Makes one data-parallel rank's micro batches. Every rank must pass the same rollouts in the same order."""

    dp_rank: int
    dp_size: int
    size: int
    """Sequences in a micro batch, at most."""
    one_length: bool
    """Pad all sequences of all ranks to one length, because pipeline stages exchange tensors of one shape. Otherwise
    each micro batch is as long as its longest sequence."""
    multiple_of: int
    """Lengths are rounded up to a multiple of this (sequence parallelism needs the tensor-parallel size)."""
    device: torch.device

    def build(self, rollouts: Sequence[Rollout]) -> StepBatches:
        """Builds micro batches of `size` from this rank's balanced share of a step (`shard_rollouts`)."""
        return StepBatches(self, rollouts, any_number=False)

    def build_any_number(self, rollouts: Sequence[Rollout]) -> StepBatches:
        """Does the same for any number of rollouts, for evaluation: some are repeated until every rank has equally
        many, and a micro batch has the largest size up to `size` that divides them."""
        return StepBatches(self, rollouts, any_number=True)

    def made(self, rollouts: Sequence[Rollout], *, any_number: bool) -> list[Batch]:
        """What `build` or `build_any_number` give."""
        if not any_number:
            return self._batches(shard_rollouts(rollouts, self.dp_rank, self.dp_size), self.size, rollouts)
        padded = [*rollouts, *rollouts[: -len(rollouts) % self.dp_size]]
        padded += padded[:1] * (-len(padded) % self.dp_size)  # fewer rollouts than ranks
        mine = sorted(padded[self.dp_rank :: self.dp_size], key=_length)
        return self._batches(mine, max(n for n in range(1, self.size + 1) if len(mine) % n == 0), padded)

    def _batches(self, mine: Sequence[Rollout], size: int, everyones: Sequence[Rollout]) -> list[Batch]:
        assert len(mine) % size == 0, f"{len(mine)} sequences do not split into micro batches of {size}"
        length = max(_length(rollout) for rollout in everyones) if self.one_length else None
        return [
            make_batch(mine[start : start + size], multiple_of=self.multiple_of, length=length).to(self.device)
            for start in range(0, len(mine), size)
        ]


class StepBatches(list[Batch]):
    """One rank's micro batches, from which those of any data-parallel rank can be made: a teacher in another layout
    scores others than this rank's."""

    def __init__(self, builder: MicroBatchBuilder, rollouts: Sequence[Rollout], *, any_number: bool) -> None:
        super().__init__(builder.made(rollouts, any_number=any_number))
        self.builder, self.rollouts, self.any_number = builder, rollouts, any_number

    def of(self, dp_rank: int, **changes: Any) -> list[Batch]:
        """The same for another data-parallel rank: same sequences in the same order, with fields of the builder
        changed (how they are padded, or where they are)."""
        return replace(self.builder, dp_rank=dp_rank, **changes).made(self.rollouts, any_number=self.any_number)


def make_batch(
    rollouts: Sequence[Rollout], *, multiple_of: int = 1, length: int | None = None, pad_id: int = 0
) -> Batch:
    """Pads the rollouts on the right to one batch, in their order.

    Position i predicts token i + 1, so a response of r tokens after a prompt of p tokens has weight 1 at the
    positions p - 1 .. p + r - 2 and 0 elsewhere: the last prompt position predicts the first response token.

    Args:
        multiple_of: S is rounded up to a multiple of this.
        length: S before rounding; the longest sequence by default.
    """
    assert rollouts, "a batch needs at least one sequence"
    longest = max(_length(rollout) for rollout in rollouts)
    assert length is None or length >= longest, f"length {length} does not hold a sequence of {longest} tokens"
    size = round_up(longest if length is None else length, multiple_of)
    tokens = torch.full((len(rollouts), size), pad_id, dtype=torch.int64)
    targets = torch.zeros_like(tokens)
    weights, logprobs, advantages = (torch.zeros(tokens.shape, dtype=torch.float32) for _ in range(3))
    for row, rollout in enumerate(rollouts):
        start, end = len(rollout.prompt.token_ids), _length(rollout)
        assert start > 0, "a response needs a prompt position that predicts its first token"
        tokens[row, :start] = torch.tensor(rollout.prompt.token_ids, dtype=torch.int64)
        tokens[row, start:end] = rollout.response_ids
        targets[row, : end - 1] = tokens[row, 1:end]
        weights[row, start - 1 : end - 1] = 1.0
        if rollout.logprobs is not None:
            assert len(rollout.logprobs) == end - start, (
                f"{len(rollout.logprobs)} log-probabilities for a response of {end - start} tokens"
            )
            logprobs[row, start - 1 : end - 1] = rollout.logprobs
        if rollout.advantage is not None:
            advantages[row, start - 1 : end - 1] = rollout.advantage
    sampled, scored = rollouts[0].logprobs is not None, rollouts[0].advantage is not None
    assert all((rollout.logprobs is not None) == sampled for rollout in rollouts), "some were sampled, some were not"
    assert all((rollout.advantage is not None) == scored for rollout in rollouts), "some have an advantage, some none"
    return Batch(tokens, targets, weights, logprobs if sampled else None, advantages if scored else None)


def shard_rollouts(rollouts: Sequence[Rollout], dp_rank: int, dp_size: int) -> list[Rollout]:
    """Selects this data-parallel rank's share: equally many sequences on each rank, and nearly equally many tokens.

    Longest first, each to the rank with the fewest tokens that still has room. A share is sorted by length, so
    that the sequences of a micro batch are alike. Every rank must pass the same rollouts in the same order.
    """
    assert len(rollouts) % dp_size == 0, f"{len(rollouts)} rollouts do not split over {dp_size} data-parallel ranks"
    room = len(rollouts) // dp_size
    shares: list[list[int]] = [[] for _ in range(dp_size)]
    loads = [0] * dp_size
    for index in sorted(range(len(rollouts)), key=lambda i: (-_length(rollouts[i]), i)):
        rank = min((r for r in range(dp_size) if len(shares[r]) < room), key=lambda r: (loads[r], r))
        shares[rank].append(index)
        loads[rank] += _length(rollouts[index])
    return [rollouts[index] for index in shares[dp_rank]]


def round_up(value: int, multiple_of: int) -> int:
    """Rounds up to the next multiple."""
    return -(-value // multiple_of) * multiple_of


def _length(rollout: Rollout) -> int:
    return len(rollout.prompt.token_ids) + len(rollout.response_ids)
