"""Which part of a model a rank holds. Made by `mcore`, read by `weights`; plain numbers and explicit groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """One rank's place in the tensor-, pipeline- and expert-parallel grid of one model."""

    padded_vocab: int
    """Rows of embedding and head over all tensor-parallel ranks; rows at or past the HF vocabulary are zero."""
    first_layer: int
    """Global index of this rank's first transformer layer."""
    num_layers: int
    """Transformer layers on this rank."""
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    tp_group: ProcessGroup | None = None
    """None only when tp_size is 1."""
    pp_group: ProcessGroup | None = None
    """The pipeline group of this tensor-parallel rank; None only when pp_size is 1."""
    ep_rank: int = 0
    """Which equal share of every layer's experts this rank holds, in the experts' order."""
    ep_size: int = 1
    ep_group: ProcessGroup | None = None
    """Ranks of this stage and tensor-parallel rank that divide the experts; None only when ep_size is 1."""

    dp_group: ProcessGroup | None = None
    """Ranks that hold the same, experts aside (data- and context-parallel ones); None where each reads for itself."""
    expert_dp_group: ProcessGroup | None = None
    """Ranks that hold the same experts."""
    whole_experts: bool = False
    """Whether experts are not cut over tensor-parallel ranks, but dealt to them too: the expert-parallel ranks are then
    those next to each other, of tensor-, context- and data-parallel ones."""
    world: ProcessGroup | None = None
    """All ranks of the model; None with the two before."""
    parts: tuple[int, ...] = ()
    """Layers of each part of the model, in its order (`layers_of_parts`); empty where every stage is one part of
    `num_layers`."""

    @property
    def replica(self) -> int:
        """Which copy of what is not an expert's this rank has a part of."""
        return 0 if self.dp_group is None else self.dp_group.rank()

    @property
    def expert_replica(self) -> int:
        """Which copy of its experts this rank has."""
        return 0 if self.expert_dp_group is None else self.expert_dp_group.rank()

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def chunks(self) -> int:
        """Parts of the model on each stage: more than one with virtual stages."""
        return len(self.parts) // self.pp_size or 1

    def places(self) -> list[tuple[int, int, int]]:
        """(stage, chunk of the stage, number in the chunk) of every layer."""
        parts = self.parts or (self.num_layers,) * self.pp_size
        return [
            (part % self.pp_size, part // self.pp_size, local) for part, count in enumerate(parts)
            for local in range(count)
        ]  # fmt: skip


def layers_of_parts(
    layers: int, pipeline: int, virtual: int = 1, chosen: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Layers of each part of a pipeline, in the model's order: part k is chunk k // pipeline of stage k % pipeline.

    The `chosen` ones; or equally many; or, where that does not divide, with embedding and head counted as a layer each.
    There must be a layer for each part.
    """
    parts = pipeline * virtual
    assert layers >= parts, f"{layers} layers for {parts} parts"
    if chosen is not None:
        assert len(chosen) == parts
        assert sum(chosen) == layers
        return tuple(chosen)
    if layers % parts == 0:
        return (layers // parts,) * parts
    counted = _even(layers + 2, parts)
    found = [count - (part == 0) - (part == parts - 1) for part, count in enumerate(counted)]
    return tuple(found if min(found) > 0 else _even(layers, parts))


def _even(items: int, parts: int) -> list[int]:
    each, more = divmod(items, parts)
    return [each + (part < more) for part in range(parts)]


def pad_vocab(vocab_size: int, tp_size: int) -> int:
    """Rows of embedding and head with the padding that lets every rank hold an equal part."""
    multiple = tp_size * 8  # tensor cores want multiples of 8 columns on each rank
    return -(-vocab_size // multiple) * multiple
