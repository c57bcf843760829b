"""Rollouts to padded batches: which sequence goes to which rank, how long a batch is, which positions count."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opd_megatron.errors import DataError
from opd_megatron.types import Batch, Prompt, Rollout

TokenPair = tuple[Sequence[int], Sequence[int]]
"""Prompt ids and response ids."""


def make_batch(
    sequences: Sequence[TokenPair],
    *,
    logprobs: Sequence[Sequence[float]] | None = None,
    multiple_of: int = 1,
    length: int | None = None,
    pad_id: int = 0,
) -> Batch:
    """(prompt ids, response ids) pairs as one right-padded batch.

    Position i predicts token i + 1, so a response of r tokens after a prompt of p tokens has weight 1 at the
    positions p - 1 .. p + r - 2 and 0 elsewhere: the last prompt position predicts the first response token.

    Args:
        logprobs: of every response token under the policy that sampled it, where one did; they lie where weights do.
        multiple_of: S is rounded up to a multiple of this (sequence parallelism needs tensor-parallel size).
        length: S before rounding; the longest sequence by default.
    """
    assert sequences, "a batch needs at least one sequence"
    longest = max(len(prompt) + len(response) for prompt, response in sequences)
    assert length is None or length >= longest, f"length {length} does not hold a sequence of {longest} tokens"
    size = round_up(longest if length is None else length, multiple_of)
    tokens = torch.full((len(sequences), size), pad_id, dtype=torch.int64)
    targets = torch.zeros_like(tokens)
    weights = torch.zeros(tokens.shape, dtype=torch.float32)
    for row, (prompt, response) in enumerate(sequences):
        assert len(prompt) > 0, "a response needs a prompt position that predicts its first token"
        end = len(prompt) + len(response)
        tokens[row, :end] = torch.tensor([*prompt, *response], dtype=torch.int64)
        targets[row, : end - 1] = tokens[row, 1:end]
        weights[row, len(prompt) - 1 : end - 1] = 1.0
    return Batch(tokens, targets, weights, None if logprobs is None else _at_weights(weights, sequences, logprobs))


def _at_weights(
    weights: torch.Tensor, sequences: Sequence[TokenPair], logprobs: Sequence[Sequence[float]]
) -> torch.Tensor:
    for (_, response), own in zip(sequences, logprobs, strict=True):
        assert len(own) == len(response), f"{len(own)} log-probabilities for a response of {len(response)} tokens"
    placed = torch.zeros_like(weights)
    placed[weights > 0] = torch.tensor([value for own in logprobs for value in own], dtype=weights.dtype)
    return placed


def make_micro_batches(
    pairs: Sequence[TokenPair],
    size: int,
    *,
    logprobs: Sequence[Sequence[float]] | None = None,
    length: int | None,
    multiple_of: int,
    device: torch.device,
) -> list[Batch]:
    """`make_batch` of `size` pairs at a time, in order. Without `length` each is as long as its longest sequence, so
    pairs sorted by length leave little padding."""
    assert len(pairs) % size == 0, f"{len(pairs)} sequences do not split into micro batches of {size}"
    batches = []
    for start in range(0, len(pairs), size):
        rows = slice(start, start + size)
        own = None if logprobs is None else logprobs[rows]
        batches.append(make_batch(pairs[rows], logprobs=own, length=length, multiple_of=multiple_of).to(device))
    return batches


def rollouts_to_batch(
    rollouts: Sequence[Rollout], *, multiple_of: int = 1, length: int | None = None, pad_id: int = 0
) -> Batch:
    """`make_batch` of the rollouts and their log-probabilities, in their order."""
    pairs = [(rollout.prompt.token_ids, rollout.response_ids) for rollout in rollouts]
    logprobs = [rollout.logprobs for rollout in rollouts]
    return make_batch(pairs, logprobs=logprobs, multiple_of=multiple_of, length=length, pad_id=pad_id)


def shard_rollouts(rollouts: Sequence[Rollout], dp_rank: int, dp_size: int) -> list[Rollout]:
    """This data-parallel rank's share: equally many sequences on each rank, and nearly equally many tokens.

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


def global_length(rollouts: Sequence[Rollout], multiple_of: int = 1) -> int:
    """Padded length that holds every rollout of the step, the same on all ranks (all know all rollouts)."""
    return round_up(max(_length(rollout) for rollout in rollouts), multiple_of)


def check_context(prompts: Sequence[Prompt], max_new_tokens: int, max_positions: int) -> None:
    """Raises DataError when a prompt and its longest answer do not fit into the model's positions."""
    for prompt in prompts:
        total = len(prompt.token_ids) + max_new_tokens
        if total > max_positions:
            raise DataError(
                f"prompt {prompt.id!r} has {len(prompt.token_ids)} tokens, with rollout.max_new_tokens="
                f"{max_new_tokens} that is {total}, over the model's {max_positions} positions: lower "
                "rollout.max_new_tokens or data.max_prompt_tokens"
            )


def round_up(value: int, multiple_of: int) -> int:
    """The smallest multiple that is at least `value`."""
    return -(-value // multiple_of) * multiple_of


def _length(rollout: Rollout) -> int:
    return len(rollout.prompt.token_ids) + len(rollout.response_ids)
