"""HF -> Megatron -> HF at several layouts, compared byte by byte."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from opd_megatron.convert.hf_megatron import ParallelSizes
from opd_megatron.weights.hf_reader import SafetensorsSource, load_hf_config
from opd_megatron.weights.sharding import hf_shapes

_ROWS_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """The outcome of one way there and back."""

    saved_at: ParallelSizes
    exported_at: ParallelSizes
    tensors: int
    different: list[str]
    """Tensors that did not come back bit by bit; an absent one counts."""


def pairs(layouts: list[ParallelSizes]) -> list[tuple[ParallelSizes, ParallelSizes]]:
    """Pairs every layout with itself and with the next one, as (saved at, exported at), grouped by the first."""
    following = layouts[1:] + layouts[:1]
    found = itertools.chain.from_iterable(((a, a), (a, b)) for a, b in zip(layouts, following, strict=True))
    return list(dict.fromkeys(found))


def round_trips(
    hf_dir: Path,
    work: Path,
    layouts: list[ParallelSizes],
    to_megatron: Callable[[Path, Path, ParallelSizes], None],
    to_hf: Callable[[Path, Path, ParallelSizes], None],
    remove: Callable[[Path], None],
) -> list[RoundTrip]:
    """Converts there and back through folders in `work`, at most one of each at a time."""
    results = []
    for saved_at, group in itertools.groupby(pairs(layouts), key=lambda pair: pair[0]):
        megatron, back = work / "megatron", work / "hf"
        to_megatron(hf_dir, megatron, saved_at)
        for _, exported_at in group:
            to_hf(megatron, back, exported_at)
            names = list(hf_shapes(load_hf_config(hf_dir)))
            results.append(RoundTrip(saved_at, exported_at, len(names), different_tensors(hf_dir, back, names)))
            remove(back)
        remove(megatron)
    return results


def different_tensors(one: Path, other: Path, names: list[str]) -> list[str]:
    """Lists the tensors that differ between the folders in type, shape or bytes."""
    with SafetensorsSource(one) as a, SafetensorsSource(other) as b:
        surplus = [name for name in b.names if name not in set(names)]
        return surplus + [name for name in names if not (name in b.names and _same(a, b, name))]


def _same(a: SafetensorsSource, b: SafetensorsSource, name: str) -> bool:
    shape = a.shape(name)
    if shape != b.shape(name) or a.dtype(name) != b.dtype(name):
        return False
    rows = shape[0]
    step = max(1, _ROWS_BYTES * rows // max(1, a.dtype(name).itemsize * torch.Size(shape).numel()))
    return all(
        torch.equal(*(x.get_slice(name, (slice(i, i + step),)).reshape(-1).view(torch.uint8) for x in (a, b)))
        for i in range(0, rows, step)
    )
