"""A Hugging Face checkpoint into this rank's Megatron parameters; what several ranks hold is read once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from opd_megatron.errors import WeightsError
from opd_megatron.weights.families import TPSharding
from opd_megatron.weights.hf_reader import EMBEDDING, HEAD, SafetensorsSource
from opd_megatron.weights.layout import ShardLayout
from opd_megatron.weights.quantized import staging, take
from opd_megatron.weights.sharding import ShardingTable, ShardSlice, StageParameter, sharding_table, stage_parameters
from opd_megatron.weights.shared_reading import SharedReading

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Buffers that older checkpoints store although they follow from the config.
_DERIVED = re.compile(r".*rotary_emb\.inv_freq")


@torch.no_grad()
def load_weights(
    model: nn.Module,
    source_dir: Path,
    hf_config: PretrainedConfig,
    layout: ShardLayout,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Fills every parameter of `model`, cast to its dtype; vocabulary padding rows become zero.

    Collective over the groups of the layout (`weights.shared_reading`); without groups a rank reads all that it holds.
    `progress` is told the bytes of each parameter that is filled. With tied embeddings and several pipeline stages the
    last stage's output layer gets the embedding.

    Raises, on all ranks of the layout:
        UnsupportedModelError: see `families.family_of`.
        WeightsError: a tensor is absent, damaged, of the wrong shape, or has no place in the model; or the model has
            a parameter that the checkpoint cannot fill.
    """
    table = sharding_table(hf_config, layout)
    pairs = stage_parameters(model, table, layout)
    shared, what = SharedReading(layout), f"{str(source_dir)!r} could not be read"
    with ExitStack() as stack:
        source: SafetensorsSource | None = None

        def open_source() -> None:
            nonlocal source
            source = stack.enter_context(SafetensorsSource(source_dir))
            _check(source, table, [param for param, _ in pairs])

        shared.attempt(open_source)
        shared.finish(what)  # most mistakes are found here, before anything large is read
        assert source is not None
        for param, tensor in pairs:
            expert, values = param.expert_rank is not None, staging(tensor)
            if shared.reads(expert=expert):
                _fill(values, param, table, layout, source, shared)
            shared.hand_on(values, expert=expert)
            if values is not tensor:
                shared.settle()
                take(tensor, values)
            progress(values.nbytes)
        shared.finish(what)


@torch.no_grad()
def load_head(
    source_dir: Path, hf_config: PretrainedConfig, tensor: torch.Tensor, *, tp_rank: int, tp_size: int
) -> None:
    """Fills `tensor` [v, h] with one tensor-parallel rank's rows of a model's LM head (its embedding where tied), cast
    to its dtype; rows past the vocabulary become zero. No collective; reads nothing else.

    Raises:
        WeightsError: the head is absent, damaged or of the wrong shape.
    """
    layout = ShardLayout(len(tensor) * tp_size, 0, hf_config.num_hidden_layers, tp_rank=tp_rank, tp_size=tp_size)
    table = sharding_table(hf_config, layout)
    wanted = EMBEDDING if table.tied else HEAD
    [param] = [param for param in table.params if wanted in param.hf_tensors]
    with SafetensorsSource(source_dir) as source:
        _find_tied(source, table)
        _expect_shapes(source, param)
        _fill_rows(tensor, table.pieces(param, layout, layout.tp_rank), source)


_HEAD_ROWS = 8192


@torch.no_grad()
def load_head_rows(source_dir: Path, hf_config: PretrainedConfig, ids: torch.Tensor, tensor: torch.Tensor) -> None:
    """Fills `tensor` [n, h] with the rows of some tokens, `ids` [n], of a model's LM head (its embedding where tied),
    cast to its dtype.

    Raises:
        WeightsError: as `load_head`.
    """
    table = sharding_table(hf_config, ShardLayout(hf_config.vocab_size, 0, hf_config.num_hidden_layers))
    with SafetensorsSource(source_dir) as source:
        name = EMBEDDING if table.tied and EMBEDDING in source.names else HEAD
        source.expect_shape(name, (hf_config.vocab_size, hf_config.hidden_size))
        for first in range(0, hf_config.vocab_size, _HEAD_ROWS):
            rows = source.get_slice(name, (slice(first, first + _HEAD_ROWS),))
            wanted = ((ids >= first) & (ids < first + _HEAD_ROWS)).nonzero().squeeze(1)
            tensor[wanted.to(tensor.device)] = rows[ids[wanted] - first].to(tensor)


def _check(source: SafetensorsSource, table: ShardingTable, params: Iterable[StageParameter]) -> None:
    """Makes sure that the files hold what the model is made of, and nothing else; reads their headers alone."""
    _find_tied(source, table)
    _refuse_unknown(source, table)
    for param in params:
        _expect_shapes(source, param)


def _find_tied(source: SafetensorsSource, table: ShardingTable) -> None:
    if table.tied and EMBEDDING not in source.names and HEAD in source.names:
        source.rename(HEAD, EMBEDDING)  # tied either way round


def _expect_shapes(source: SafetensorsSource, param: StageParameter) -> None:
    for name, shape in param.hf_tensors.items():
        source.expect_shape(name, shape)
        source.dtype(name)


def _fill(
    tensor: torch.Tensor,
    param: StageParameter,
    table: ShardingTable,
    layout: ShardLayout,
    source: SafetensorsSource,
    shared: SharedReading,
) -> None:
    pieces = table.pieces(param, layout, layout.tp_rank)
    if param.shard is TPSharding.ROW and layout.tp_size > 1 and layout.tp_group is not None:
        shared.read_columns(source, pieces[0].name, tensor)
    else:
        shared.attempt(lambda: _fill_rows(tensor, pieces, source))


def _fill_rows(tensor: torch.Tensor, pieces: Sequence[ShardSlice], source: SafetensorsSource) -> None:
    if sum(piece.blocks * piece.width for piece in pieces) < tensor.shape[0]:
        tensor.zero_()
    for piece in pieces:
        source.copy_slice(piece.name, piece.slices(), piece.of_shard(tensor))


def _refuse_unknown(source: SafetensorsSource, table: ShardingTable) -> None:
    known = table.tensors()
    unknown = [name for name in source.names if name not in known and not _DERIVED.fullmatch(name)]
    if table.tied:
        unknown = [name for name in unknown if name != "lm_head.weight"]
    if unknown:
        raise WeightsError(
            f"{str(source.folder)!r} holds {len(unknown)} tensors (first {unknown[0]!r}) with no place in the model "
            "that its config.json describes: the checkpoint and its config do not belong together"
        )
