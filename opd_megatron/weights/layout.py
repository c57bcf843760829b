"""Which part of a model a rank holds. Made by `mcore`, read by `weights`; plain numbers and explicit groups."""

from __future__ import annotations

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
    """Ranks that hold the same, experts aside; None where each reads for itself."""
    expert_dp_group: ProcessGroup | None = None
    """Ranks that hold the same experts."""
    world: ProcessGroup | None = None
    """All ranks of the model; None with the two before."""

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1


def pad_vocab(vocab_size: int, tp_size: int) -> int:
    """Rows of embedding and head with the padding that lets every rank hold an equal part."""
    multiple = tp_size * 8  # tensor cores want multiples of 8 columns on each rank
    return -(-vocab_size // multiple) * multiple
