"""The family table worked out for one model: every parameter of every stage, and where each Hugging Face row goes.

`pieces` is the whole of the sharding arithmetic. Loading copies Hugging Face slices into shards by it and exporting
copies shards back by it, so that the two are inverses by construction. Every rank can work out every other rank's
part from the config alone, which is why nothing but weights ever travels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from opd_megatron.errors import WeightsError
from opd_megatron.weights.families import Dims, ParamMapping, TPSharding, family_of
from opd_megatron.weights.layout import ShardLayout
from opd_megatron.weights.quantized import is_quantized

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True)
class StageParameter:
    """One Megatron parameter of one pipeline stage."""

    stage: int
    megatron: tuple[str, ...]
    """Its possible names on that stage."""
    shard: TPSharding
    hf_tensors: dict[str, tuple[int, ...]]
    """Full Hugging Face tensors it is made of, with their shapes."""
    tied_copy: bool = False
    """The last stage's copy of a tied embedding: loaded, but not exported a second time."""
    expert_rank: int | None = None
    """The expert-parallel rank that alone holds it; None where all of them do."""

    @property
    def numel(self) -> int:
        """Elements of the full Hugging Face tensors."""
        return sum(math.prod(shape) for shape in self.hf_tensors.values())


@dataclass(frozen=True, slots=True)
class ShardSlice:
    """A slice of one Hugging Face tensor and its place in a rank's shard.

    The slice, `length` rows (dim 0) or columns (dim 1) from `start`, is cut into `blocks` of `width` rows. The shard
    is cut into as many blocks; block i of the slice lies in block i of the shard from row `offset`.
    """

    name: str
    dim: int
    start: int
    length: int
    blocks: int
    offset: int
    width: int

    def of_shard(self, shard: torch.Tensor) -> torch.Tensor:
        """View [blocks, width, ...] of the slice's numbers within the shard."""
        return shard.unflatten(0, (self.blocks, shard.shape[0] // self.blocks)).narrow(1, self.offset, self.width)

    def slices(self) -> tuple[slice, ...]:
        """Index of the slice in the full Hugging Face tensor."""
        return (slice(None),) * self.dim + (slice(self.start, self.start + self.length),)


@dataclass(frozen=True, slots=True)
class ShardingTable:
    """All parameters of a model in streaming order: embedding, layers, final norm, output layer."""

    params: tuple[StageParameter, ...]
    dims: Dims
    tied: bool

    def stage(self, pp_rank: int, ep_rank: int = 0) -> list[StageParameter]:
        """What a rank of that stage holds."""
        return [param for param in self.params if param.stage == pp_rank and param.expert_rank in (None, ep_rank)]

    def exported(self) -> list[StageParameter]:
        return [param for param in self.params if not param.tied_copy]

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every Hugging Face tensor of the model and its shape, in streaming order."""
        return {name: shape for param in self.params for name, shape in param.hf_tensors.items()}

    def pieces(self, param: StageParameter, layout: ShardLayout, tp_rank: int) -> list[ShardSlice]:
        """What makes up `tp_rank`'s shard of a parameter; padding rows of the vocabulary are in no piece."""
        if param.shard is TPSharding.VOCAB:
            return _vocab_pieces(param, self.dims.vocab, layout.padded_vocab // layout.tp_size, tp_rank)
        if param.shard is TPSharding.ROW:
            ((name, (rows, columns)),) = param.hf_tensors.items()
            part = _divide(columns, layout.tp_size)
            return [ShardSlice(name, 1, tp_rank * part, part, blocks=1, offset=0, width=rows)]
        replicated = param.shard is TPSharding.REPLICATED
        split, index = (1, 0) if replicated else (layout.tp_size, tp_rank)
        blocks = _divide(self.dims.groups, split) if param.shard is TPSharding.QKV else 1
        pieces, offset = [], 0
        for name, (rows, *_) in param.hf_tensors.items():
            part = _divide(rows, split)
            width = _divide(part, blocks)
            pieces.append(ShardSlice(name, 0, index * part, part, blocks, offset, width))
            offset += width
        return pieces

    def shard_shape(self, param: StageParameter, layout: ShardLayout) -> tuple[int, ...]:
        """Shape of one rank's parameter, the same on all tensor-parallel ranks."""
        rows, rest = sum(shape[0] for shape in param.hf_tensors.values()), next(iter(param.hf_tensors.values()))[1:]
        if param.shard is TPSharding.VOCAB:
            return (_divide(layout.padded_vocab, layout.tp_size), *rest)
        if param.shard is TPSharding.ROW:
            return (rows, _divide(rest[0], layout.tp_size))
        return (rows if param.shard is TPSharding.REPLICATED else _divide(rows, layout.tp_size), *rest)


def sharding_table(hf_config: PretrainedConfig, layout: ShardLayout) -> ShardingTable:
    """Works the family's table out for a model whose layers are spread over the pipeline stages as the layout says, and
    whose experts are spread evenly over the expert-parallel ranks.

    Raises:
        UnsupportedModelError: see `family_of`.
    """
    family, dims, stages = family_of(hf_config), Dims.of(hf_config), layout.pp_size
    places = layout.places()
    mine = [layer for layer, (stage, _, _) in enumerate(places) if stage == layout.pp_rank]
    assert len(places) == dims.layers, f"the stages have {len(places)} layers, the model {dims.layers}"
    assert (mine[0], len(mine)) == (layout.first_layer, layout.num_layers)
    assert layout.padded_vocab >= dims.vocab
    # Chunks of a stage are modules of their own in a list.
    prefixes = [f"{chunk}." for chunk in range(layout.chunks)] if layout.chunks > 1 else [""]
    first, last = prefixes[0], prefixes[-1]
    params = [_stage_parameter(mapping, dims, 0, first) for mapping in family.first]
    for layer, (stage, chunk, local) in enumerate(places):
        prefix = prefixes[chunk]
        params += [_stage_parameter(mapping, dims, stage, prefix, layer, local) for mapping in family.layer]
        for expert in range(dims.experts if family.experts else 0):
            rank, index = divmod(expert, _divide(dims.experts, layout.ep_size))
            params += [
                _expert_parameter(
                    mapping, dims, stage, prefix, (layer, expert), (local, index), rank, whole=layout.whole_experts
                )
                for mapping in family.experts
            ]
    params += [_stage_parameter(mapping, dims, stages - 1, last) for mapping in family.last]
    tied = bool(hf_config.tie_word_embeddings)
    if not tied:
        params.append(_stage_parameter(family.head, dims, stages - 1, last))
    elif stages > 1:
        embedding = family.first[0]
        copy = ParamMapping(family.head.megatron, embedding.shard, embedding.hf_tensors)
        params.append(_stage_parameter(copy, dims, stages - 1, last, tied=True))
    return ShardingTable(tuple(params), dims, tied)


def hf_shapes(hf_config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of a model and its shape, in streaming order."""
    dims = Dims.of(hf_config)
    return sharding_table(hf_config, ShardLayout(dims.vocab, first_layer=0, num_layers=dims.layers)).tensors()


def stage_parameters(
    model: nn.Module, table: ShardingTable, layout: ShardLayout
) -> list[tuple[StageParameter, torch.Tensor]]:
    """This rank's parameters as (description, tensor), wrappers (`module.`) seen through. Nothing may be left over.

    Raises:
        WeightsError: the model has a parameter the table does not name, lacks one, or has one of another shape.
    """
    # Of a quantized parameter itself: it is told what it is made of (`quantized.take`).
    parameters: dict[str, torch.Tensor] = {
        _unwrapped(name): parameter if is_quantized(parameter) else parameter.detach()
        for name, parameter in model.named_parameters()
    }
    pairs = []
    for param in table.stage(layout.pp_rank, layout.ep_rank):
        names = [name for name in param.megatron if name in parameters]
        if len(names) != 1:
            raise WeightsError(
                f"the Megatron model has no parameter {param.megatron[0]!r} for {list(param.hf_tensors)}"
            )
        parameter, shape = parameters.pop(names[0]), table.shard_shape(param, layout)
        if tuple(parameter.shape) != shape:
            raise WeightsError(
                f"parameter {names[0]!r} has shape {list(parameter.shape)}, the config says {list(shape)}"
            )
        pairs.append((param, parameter))
    if parameters:
        raise WeightsError(f"the Megatron model has parameters without a Hugging Face tensor: {sorted(parameters)[:3]}")
    return pairs


def _unwrapped(name: str) -> str:
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _stage_parameter(
    mapping: ParamMapping, dims: Dims, stage: int, prefix: str, layer: int = 0, local: int = 0, tied: bool = False
) -> StageParameter:
    hf_tensors = {name.format(layer=layer): dims.shape(shape) for name, shape in mapping.hf_tensors.items()}
    names = tuple(prefix + name.format(layer=local) for name in mapping.megatron)
    return StageParameter(stage, names, mapping.shard, hf_tensors, tied)


def _expert_parameter(
    mapping: ParamMapping, dims: Dims, stage: int, prefix: str, theirs: tuple[int, int], ours: tuple[int, int],
    rank: int, *, whole: bool,
) -> StageParameter:  # fmt: skip
    """`theirs` and `ours` are (layer, expert), in the whole model and on the rank. `whole`: not cut."""
    layer, expert = theirs
    hf_tensors = {
        name.format(layer=layer, expert=expert): dims.shape(shape) for name, shape in mapping.hf_tensors.items()
    }
    layer, expert = ours
    megatron = tuple(prefix + name.format(layer=layer, expert=expert) for name in mapping.megatron)
    shard = TPSharding.REPLICATED if whole else mapping.shard
    return StageParameter(stage, megatron, shard, hf_tensors, expert_rank=rank)


def _vocab_pieces(param: StageParameter, vocab: int, rows: int, tp_rank: int) -> list[ShardSlice]:
    ((name, _),) = param.hf_tensors.items()
    start = tp_rank * rows
    length = min(vocab, start + rows) - start
    return [ShardSlice(name, 0, start, length, blocks=1, offset=0, width=length)] if length > 0 else []


def _divide(size: int, parts: int) -> int:
    assert size % parts == 0, f"{size} does not split into {parts} equal parts"
    return size // parts
