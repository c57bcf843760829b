"""A model as a stream of Hugging Face tensors, and each rank's part of every one of them.

Everything that takes weights out of Megatron walks this stream: `weight_sync.gathered`, `weight_sync.sharded`, and the
files that all ranks of a converter write together (`save.write_parts`). They differ only in where the parts go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from opd_megatron.weights.families import TPSharding
from opd_megatron.weights.layout import ShardLayout
from opd_megatron.weights.quantized import dequantized, is_quantized
from opd_megatron.weights.sharding import ShardSlice, StageParameter, sharding_table, stage_parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True)
class HFTensor:
    """One Hugging Face tensor and the Megatron parameter that holds it."""

    name: str
    shape: tuple[int, ...]
    param: StageParameter

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def owner(self) -> tuple[int, int]:
        """(pipeline stage, expert-parallel rank) that exports it: of what all expert-parallel ranks hold, the first."""
        return self.param.stage, self.param.expert_rank or 0

    @property
    def replicated(self) -> bool:
        """Whether every tensor-parallel rank holds all of it."""
        return self.param.shard is TPSharding.REPLICATED


class TrainedModel(Protocol):
    """One rank's shard of a model that is trained, as those see it who send its weights elsewhere."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def hf_config(self) -> PretrainedConfig: ...
    @property
    def layout(self) -> ShardLayout: ...
    @property
    def dp_rank(self) -> int:
        """Which data-parallel replica of the model this rank belongs to."""
        ...


class LocalShards:
    """One rank's parts of a model's Hugging Face tensors. No collective."""

    def __init__(self, model: nn.Module, hf_config: PretrainedConfig, layout: ShardLayout) -> None:
        """Raises WeightsError: see `stage_parameters`."""
        self.layout = layout
        self.table = sharding_table(hf_config, layout)
        self._parameters = {param.megatron: value for param, value in stage_parameters(model, self.table, layout)}
        self.tensors = [
            HFTensor(name, shape, param) for param in self.table.exported() for name, shape in param.hf_tensors.items()
        ]
        """All of the model's, in streaming order; the same on every rank."""
        self._read: tuple[tuple[str, ...], torch.Tensor] | None = None

    def exports(self, tensor: HFTensor) -> bool:
        """Tells whether this rank's stage and expert-parallel rank export the tensor."""
        layout, (stage, expert) = self.layout, tensor.owner
        if not layout.whole_experts:
            return (stage, expert) == (layout.pp_rank, layout.ep_rank)
        of_rank = layout.replica == 0 if expert == 0 else (layout.ep_rank, layout.expert_replica) == (expert, 0)
        return stage == layout.pp_rank and of_rank

    def assembles(self, tensor: HFTensor) -> bool:
        """Of those that export it, whether this rank has it all in the end."""
        return self.layout.tp_rank == 0 or (self.layout.whole_experts and tensor.owner[1] > 0)

    def contributed(self) -> list[HFTensor]:
        """Lists the shards that this rank exports; together the ranks of a replica export every element once."""
        return [
            tensor for tensor in self.tensors
            if self.exports(tensor) and (self.assembles(tensor) or not tensor.replicated)
        ]  # fmt: skip

    def contributed_numel(self) -> int:
        """Counts the elements that this rank exports."""
        return sum(math.prod(self.shape(tensor, self.layout.tp_rank)) for tensor in self.contributed())

    def piece(self, tensor: HFTensor, tp_rank: int) -> ShardSlice | None:
        """What `tp_rank` holds of a tensor; None where it holds vocabulary padding alone."""
        pieces = self.table.pieces(tensor.param, self.layout, tp_rank)
        return next((piece for piece in pieces if piece.name == tensor.name), None)

    def shape(self, tensor: HFTensor, tp_rank: int) -> tuple[int, ...]:
        """Shape of `tp_rank`'s part."""
        piece = self.piece(tensor, tp_rank)
        if piece is None:
            return (0, *tensor.shape[1:])
        return tuple(piece.length if dim == piece.dim else size for dim, size in enumerate(tensor.shape))

    def own(self, tensor: HFTensor) -> torch.Tensor:
        """This rank's part of a tensor that it holds: a view of the parameter, or, of what Megatron interleaves
        (queries, keys and values), a copy."""
        parameter = self._parameters[tensor.param.megatron]
        piece = self.piece(tensor, self.layout.tp_rank)
        if piece is None:
            return parameter.new_empty((0, *tensor.shape[1:]))
        return piece.of_shard(self._values(tensor.param.megatron, parameter)).flatten(0, 1)

    def _values(self, name: tuple[str, ...], parameter: torch.Tensor) -> torch.Tensor:
        """Of a quantized parameter its numbers; they are kept while the tensors that it is made of are asked for."""
        if not is_quantized(parameter):
            return parameter
        if self._read is None or self._read[0] != name:
            self._read = name, dequantized(parameter)
        return self._read[1]

    def place(self, tensor: HFTensor, tp_rank: int, full: torch.Tensor) -> torch.Tensor:
        """View of `tp_rank`'s part within the full tensor."""
        piece = self.piece(tensor, tp_rank)
        return full[:0] if piece is None else full.narrow(piece.dim, piece.start, piece.length)


def buckets_of(tensors: Sequence[HFTensor], limit: int, numel: Callable[[HFTensor], int]) -> Iterator[list[HFTensor]]:
    """Tensors of one owner at a time, at most `limit` elements together unless one alone has more."""
    bucket: list[HFTensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (tensor.owner != bucket[0].owner or size + numel(tensor) > limit):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += numel(tensor)
    yield bucket
