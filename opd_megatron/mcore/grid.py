"""The process grid: every process group a model needs, made once and passed on as arguments."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection

from opd_megatron.weights.layout import ShardLayout


@dataclass(frozen=True, slots=True)
class ParallelGrid:
    """One model's place in the world: sizes, this rank's coordinates and its process groups.

    Ranks are ordered tensor, context, data, pipeline from fastest to slowest, as in Megatron-LM, so that tensor
    parallel ranks are neighbours (one node) and pipeline stages are far apart. Expert parallelism takes no ranks of its
    own: `ep_size` neighbouring data-parallel ranks of a stage share every layer's experts out among themselves and send
    each other the tokens meant for them. Experts are sharded over the tensor-parallel ranks like everything else.
    """

    tp_size: int
    pp_size: int
    dp_size: int
    ep_size: int
    sequence_parallel: bool
    groups: ProcessGroupCollection
    world: dist.ProcessGroup
    """All ranks of this grid."""

    @classmethod
    def build(
        cls,
        tp_size: int,
        pp_size: int,
        dp_size: int,
        *,
        ep_size: int = 1,
        sequence_parallel: bool = False,
        rank_offset: int = 0,
    ) -> ParallelGrid:
        """Makes the groups; every rank of the default process group must call it with the same arguments."""
        assert dp_size % ep_size == 0, (
            f"{dp_size} data-parallel ranks do not split into expert-parallel groups of {ep_size}"
        )
        comm = HyperCommGrid([tp_size, 1, dp_size, pp_size], ["tp", "cp", "dp", "pp"], rank_offset=rank_offset)
        groups = ProcessGroupCollection(
            tp=comm.create_pg("tp"),
            cp=comm.create_pg("cp"),
            pp=comm.create_pg("pp"),
            dp=comm.create_pg("dp"),
            dp_cp=comm.create_pg(["cp", "dp"]),
            mp=comm.create_pg(["tp", "pp"]),
            tp_cp=comm.create_pg(["tp", "cp"]),
            tp_dp_cp=comm.create_pg(["tp", "cp", "dp"]),
        )
        world = comm.create_pg(["tp", "cp", "dp", "pp"])
        groups.embd = _first_and_last_stage_group(comm)
        groups.pos_embd = None  # rotary models have no position embedding to keep in step
        groups.intra_dist_opt = world
        _add_expert_groups(groups, tp_size, ep_size, dp_size // ep_size, pp_size, rank_offset)
        return cls(tp_size, pp_size, dp_size, ep_size, sequence_parallel, groups, world)

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
    def ep_rank(self) -> int:
        return self.groups.ep.rank()

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def layout(self, num_layers: int, padded_vocab: int) -> ShardLayout:
        """Returns this rank's part of a model with `num_layers` layers."""
        per_stage = num_layers // self.pp_size
        return ShardLayout(
            padded_vocab=padded_vocab,
            first_layer=self.pp_rank * per_stage,
            num_layers=per_stage,
            tp_rank=self.tp_rank,
            tp_size=self.tp_size,
            pp_rank=self.pp_rank,
            pp_size=self.pp_size,
            tp_group=self.groups.tp,
            pp_group=self.groups.pp,
            ep_rank=self.ep_rank,
            ep_size=self.ep_size,
            ep_group=self.groups.ep,
        )


def _add_expert_groups(
    groups: ProcessGroupCollection, tp_size: int, ep_size: int, expert_dp_size: int, pp_size: int, rank_offset: int
) -> None:
    """Makes the expert-parallel groups; `expert_dp_size` ranks hold the same experts."""
    groups.expt_tp = groups.tp
    if ep_size == 1:  # upstream wants the groups even so
        groups.ep, groups.tp_ep, groups.tp_ep_pp, groups.expt_dp = groups.cp, groups.tp, groups.mp, groups.dp
        return
    comm = HyperCommGrid([tp_size, ep_size, expert_dp_size, pp_size], ["tp", "ep", "dp", "pp"], rank_offset=rank_offset)
    groups.ep = comm.create_pg("ep")
    groups.tp_ep = comm.create_pg(["tp", "ep"])
    groups.tp_ep_pp = comm.create_pg(["tp", "ep", "pp"])
    groups.expt_dp = comm.create_pg("dp")


def _first_and_last_stage_group(comm: HyperCommGrid) -> dist.ProcessGroup | None:
    """Makes the group of first and last pipeline stage, which hold copies of a tied embedding; None on ranks in
    between."""
    mine = None
    for ranks in comm.get_rank_enum("pp"):
        members = sorted({ranks[0], ranks[-1]})
        group = dist.new_group(members)
        if dist.get_rank() in members:
            mine = group
    return mine
