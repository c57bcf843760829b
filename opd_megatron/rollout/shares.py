"""Which engine of a fleet samples which requests."""

from __future__ import annotations

from collections.abc import Sequence

from opd_megatron.types import SampleRequest


def share_out(requests: Sequence[SampleRequest], count: int) -> list[list[int]]:
    """Deals a step's requests to `count` engines; returns the indices of each engine's share, in order.

    Every engine gets the same number of answers (within one), since how long they become is not known; the longest
    prompts are dealt first, so that their tokens are spread too. Answers to one prompt stay together where that costs
    no balance: an engine reads a prompt once for all of them. Depends on nothing but the requests.
    """
    room = [len(requests) // count + (index < len(requests) % count) for index in range(count)]
    tokens = [0] * count
    shares: list[list[int]] = [[] for _ in range(count)]
    for members in _longest_first(requests):
        while members:
            index = max(range(count), key=lambda i: (min(room[i], len(members)), -tokens[i], room[i], -i))
            taken, members = members[: room[index]], members[room[index] :]
            shares[index] += taken
            room[index] -= len(taken)
            tokens[index] += sum(len(requests[i].prompt.token_ids) for i in taken)
    return [sorted(share) for share in shares]


def _longest_first(requests: Sequence[SampleRequest]) -> list[list[int]]:
    """The indices of each group of answers to one prompt, those with the longest prompt first."""
    groups: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(request.group, []).append(index)
    return sorted(groups.values(), key=lambda members: -len(requests[members[0]].prompt.token_ids))
