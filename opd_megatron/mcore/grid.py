"""The process grid: every process group a model needs, made once and passed on as arguments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection

from opd_megatron.system.groups import model_group
from opd_megatron.weights.layout import ShardLayout, layers_of_parts


@dataclass(frozen=True, slots=True)
class ParallelGrid:
    """One model's place in the world: sizes, this rank's coordinates and its process groups.

    Ranks are ordered tensor, context, data, pipeline from fastest to slowest, as in Megatron-LM, so that tensor
    parallel ranks are neighbours (one node) and pipeline stages are far apart. Context-parallel ranks hold the same
    weights and each a part of every sequence, so that to all but attention they are further data-parallel ranks. Expert
    parallelism takes no ranks of its own: `ep_size` neighbouring ranks of those share every layer's experts out among
    themselves and send each other the tokens meant for them. Experts are sharded over the tensor-parallel ranks like
    everything else.
    """

    tp_size: int
    pp_size: int
    dp_size: int
    ep_size: int
    sequence_parallel: bool
    groups: ProcessGroupCollection
    world: dist.ProcessGroup
    """All ranks of this grid."""
    cp_size: int = 1
    whole_experts: bool = False
    """Whether experts are dealt to tensor-parallel ranks rather than cut over them."""

    @classmethod
    def build(
        cls,
        tp_size: int,
        pp_size: int,
        dp_size: int,
        *,
        ep_size: int = 1,
        cp_size: int = 1,
        whole_experts: bool = False,
        sequence_parallel: bool = False,
        rank_offset: int = 0,
    ) -> ParallelGrid:
        """Makes the groups; every rank of the default process group must call it with the same arguments, also one that
        is not of this grid and has no use for what it gets."""
        replicas = cp_size * dp_size * (tp_size if whole_experts else 1)
        assert replicas % ep_size == 0, f"{replicas} replicas do not split into expert-parallel groups of {ep_size}"
        comm = HyperCommGrid([tp_size, cp_size, dp_size, pp_size], ["tp", "cp", "dp", "pp"], rank_offset=rank_offset)
        alone = _Groups()
        made = _Groups(alone)
        groups = ProcessGroupCollection(
            tp=made.of(comm.get_rank_enum("tp")),
            # Of its own also where `dp_cp` is the same ranks: keys travel while gradients are summed.
            cp=_Groups(alone).of(comm.get_rank_enum("cp")),
            pp=made.of(comm.get_rank_enum("pp")),
            dp=made.of(comm.get_rank_enum("dp")),
            dp_cp=made.of(comm.get_rank_enum(["cp", "dp"])),
            mp=made.of(comm.get_rank_enum(["tp", "pp"])),
            tp_cp=made.of(comm.get_rank_enum(["tp", "cp"])),
            tp_dp_cp=made.of(comm.get_rank_enum(["tp", "cp", "dp"])),
        )
        world = made.of(comm.get_rank_enum(["tp", "cp", "dp", "pp"]))
        # First and last pipeline stage hold copies of a tied embedding; the ranks in between are in no such group.
        groups.embd = made.of([ranks[0], ranks[-1]] for ranks in comm.get_rank_enum("pp"))
        groups.pos_embd = None  # rotary models have no position embedding to keep in step
        groups.intra_dist_opt = world
        whole = whole_experts and tp_size > 1
        expert_tp = 1 if whole else tp_size
        _add_expert_groups(groups, alone, expert_tp, ep_size, replicas // ep_size, pp_size, rank_offset, whole=whole)
        return cls(tp_size, pp_size, dp_size, ep_size, sequence_parallel, groups, world, cp_size, whole)

    @property
    def tp_rank(self) -> int:
        return self.groups.tp.rank()

    @property
    def pp_rank(self) -> int:
        return self.groups.pp.rank()

    @property
    def dp_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def cp_rank(self) -> int:
        return self.groups.cp.rank()

    @property
    def ep_rank(self) -> int:
        return self.groups.ep.rank()

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def layout(
        self, num_layers: int, padded_vocab: int, *, virtual: int = 1, stages: Sequence[int] | None = None
    ) -> ShardLayout:
        """Returns this rank's part of a model with `num_layers` layers. `virtual`, `stages`: of `ParallelConfig`."""
        parts = layers_of_parts(num_layers, self.pp_size, virtual, stages)
        return ShardLayout(
            padded_vocab=padded_vocab,
            first_layer=sum(parts[: self.pp_rank]),
            num_layers=sum(parts[self.pp_rank :: self.pp_size]),
            parts=parts,
            tp_rank=self.tp_rank,
            tp_size=self.tp_size,
            pp_rank=self.pp_rank,
            pp_size=self.pp_size,
            tp_group=self.groups.tp,
            pp_group=self.groups.pp,
            ep_rank=self.ep_rank,
            ep_size=self.ep_size,
            ep_group=self.groups.ep,
            dp_group=self.groups.dp_cp,
            expert_dp_group=self.groups.expt_dp,
            whole_experts=self.whole_experts,
            world=self.world,
        )


class _Groups:
    """Makes a group for each partition of ranks, once whatever it is called: with sizes of 1 many are the same, and
    every group is a communicator more."""

    def __init__(self, alone: _Groups | None = None) -> None:
        """`alone`: where groups of one rank are looked up and made; here by default."""
        self._made: dict[frozenset[tuple[int, ...]], dist.ProcessGroup | None] = {}
        self._alone = alone or self

    def of(self, partition: Iterable[Iterable[int]]) -> Any:
        """This rank's group of the partition; None where it is in none. Every rank asks for the same ones in the same
        order."""
        sets = sorted(tuple(sorted(set(ranks))) for ranks in partition)
        made = self._made if any(len(ranks) > 1 for ranks in sets) else self._alone._made
        key = frozenset(sets)
        if key not in made:
            mine = None
            for ranks in sets:
                group = model_group(ranks)
                if dist.get_rank() in ranks:
                    mine = group
            made[key] = mine
        return made[key]


def _add_expert_groups(
    groups: ProcessGroupCollection, alone: _Groups, tp_size: int, ep_size: int, expert_dp_size: int, pp_size: int,
    rank_offset: int, *, whole: bool,
) -> None:  # fmt: skip
    """Makes the expert-parallel groups; `tp_size` ranks share an expert and `expert_dp_size` hold the same ones.

    Of their own also where the ranks are those of a dense group: tokens travel while gradients are summed, and in one
    communicator they would wait for each other.
    """
    comm = HyperCommGrid([tp_size, ep_size, expert_dp_size, pp_size], ["tp", "ep", "dp", "pp"], rank_offset=rank_offset)
    made = _Groups(alone)
    groups.ep = made.of(comm.get_rank_enum("ep"))
    groups.expt_tp = made.of(comm.get_rank_enum("tp")) if whole else groups.tp
    if ep_size == 1 and not whole:  # upstream wants the groups even so
        groups.tp_ep, groups.tp_ep_pp, groups.expt_dp = groups.tp, groups.mp, groups.dp_cp
        return
    groups.tp_ep = made.of(comm.get_rank_enum(["tp", "ep"]))
    groups.tp_ep_pp = made.of(comm.get_rank_enum(["tp", "ep", "pp"]))
    groups.expt_dp = made.of(comm.get_rank_enum("dp"))
