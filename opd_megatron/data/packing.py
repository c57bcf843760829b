"""Sequences of a step shared out among data-parallel ranks by work, and packed into rows of so many tokens.

A token's work grows with its sequence: the layers' products are the same for all, attention is not. So a rank of one
long answer gets fewer tokens than a rank of many short ones, and the same time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence


def shares_by_work(
    lengths: Sequence[int], routes: Sequence[int], ranks: int, attention_length: float = math.inf
) -> list[list[int]]:
    """Deals sequences to ranks, by index: most work first, each to the rank that has least.

    Args:
        lengths: tokens of each sequence.
        routes: which teachers each is for; every route is shared out as evenly as the whole.
        ranks: data-parallel ranks.
        attention_length: tokens of a sequence of which attention takes as long as the layers' products.
    """
    work = [length + length**2 / attention_length for length in lengths]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads, of_route = [0.0] * ranks, [Counter[int]() for _ in range(ranks)]
    for index in sorted(range(len(lengths)), key=lambda i: (routes[i], -work[i], i)):
        rank = min(range(ranks), key=lambda r: (of_route[r][routes[index]], loads[r], len(shares[r]), r))
        shares[rank].append(index)
        loads[rank] += work[index]
        of_route[rank][routes[index]] += math.ceil(work[index])
    return shares


def packs_of(
    shares: Sequence[Sequence[int]], lengths: Sequence[int], routes: Sequence[int], budget: int, multiple_of: int = 1
) -> list[list[list[int]]]:
    """Cuts every rank's share into packs of at most `budget` tokens, equally many on each rank: those of one that needs
    fewer are smaller, or empty where it has fewer sequences. A sequence above the budget has a pack of its own.

    With several routes a pack is of one as far as may be. Their number is a multiple of `multiple_of`.
    """
    fitted = [_first_fit(share, lengths, routes, budget) for share in shares]
    most = max(len(packs) for packs in fitted)
    most += -most % multiple_of
    return [_spread(packs, lengths, routes, budget, most) for packs in fitted]


def _first_fit(share: Iterable[int], lengths: Sequence[int], routes: Sequence[int], budget: int) -> list[list[int]]:
    """First-fit decreasing: at most 11/9 of the fewest packs, and one more (Johnson 1973)."""
    packs: list[list[int]] = []
    filled: list[int] = []
    for index in sorted(share, key=lambda i: (routes[i], -lengths[i], i)):
        place = next((i for i, tokens in enumerate(filled) if tokens + lengths[index] <= budget), len(packs))
        if place == len(packs):
            packs.append([])
            filled.append(0)
        packs[place].append(index)
        filled[place] += lengths[index]
    return packs


def _spread(
    packs: list[list[int]], lengths: Sequence[int], routes: Sequence[int], budget: int, count: int
) -> list[list[int]]:
    """So many packs of equal size, as far as the budget allows it; those that there are where it does not."""
    indices = [index for pack in packs for index in pack]
    if len({routes[index] for index in indices}) <= 1:
        even: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for index in sorted(indices, key=lambda i: (-lengths[i], i)):
            place = min(range(count), key=lambda n: (filled[n], n))
            even[place].append(index)
            filled[place] += lengths[index]
        if all(tokens <= budget or len(pack) == 1 for pack, tokens in zip(even, filled, strict=True)):
            return even
    packs = [list(pack) for pack in packs]
    while len(packs) < count and any(len(pack) > 1 for pack in packs):
        largest = max(packs, key=lambda pack: (len(pack) > 1, sum(lengths[index] for index in pack)))
        packs.append([largest.pop()])
    return packs + [[] for _ in range(count - len(packs))]
