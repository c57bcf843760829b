"""A model's weights alone as a Megatron checkpoint (`dist_checkpointing`, format torch_dist), any layout to any other.

Saving and loading hold one tensor beyond the model: upstream's writer forks a process and first copies every tensor
that is a view (gate and up of each layer), and its loader joins those two in new memory. Tensors are read into the
model's own parameters here. What is written is Megatron's format all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from opd_megatron.errors import MissingPathError, OPDError, WeightsError, one_line
from opd_megatron.mcore.checkpoint.io_errors import IO_ERRORS
from opd_megatron.mcore.checkpoint.streaming_reader import StreamingReader
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.model import Model
from opd_megatron.system.collectives import raise_on_all_ranks

Progress = Callable[[int], None]
"""Called with the number of bytes that are done since the last call."""

_BESIDE = ("optimizer", "chained_", "averages.")
"""Beginnings of tensor names that a training checkpoint holds beside the model's."""


def save_model(model: Model, grid: ParallelGrid, folder: Path, progress: Progress = lambda _: None) -> None:
    """Writes the weights into an existing empty folder, each by one of the ranks that hold it. Collective.

    Raises:
        WeightsError: on every rank, when one of them could not write.
    """
    state = model.sharded_state_dict(metadata={"dp_cp_group": grid.groups.dp_cp})
    error: BaseException | None = None
    try:
        dist_checkpointing.save(state, str(folder), sharded_strategy=_TensorByTensor(progress))
    except IO_ERRORS as problem:
        error = problem
    raise_on_all_ranks(error, f"Megatron checkpoint {folder.name!r} was not written", WeightsError)


def load_model(
    model: Model, grid: ParallelGrid, folder: Path, *, vocab_size: int, progress: Progress = lambda _: None
) -> None:
    """Fills every parameter from a Megatron checkpoint of any layout; rows past `vocab_size` become zero. Collective.

    A training checkpoint will do: its optimizer state is passed over.

    Raises:
        WeightsError: on every rank: a file is damaged, or the checkpoint is another model's.
    """
    tensors = _sharded_tensors(model, grid)
    _check_belongs(folder, tensors, vocab_size)
    grouped, _, _ = _replace_state_dict_keys_with_sharded_keys(dict(tensors))
    planner = _LoadPlanner(
        progress,
        shapes_validation_sharded_tensors=[t for t in tensors.values() if not t.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={t.key: t for t in tensors.values() if t.allow_shape_mismatch},
    )
    error: BaseException | None = None
    try:
        dcp.load(
            mcore_to_pyt_state_dict(grouped, is_loading=True), storage_reader=StreamingReader(folder), planner=planner
        )
    except IO_ERRORS as problem:
        error = problem
    raise_on_all_ranks(
        error, f"Megatron checkpoint {str(folder)!r} cannot be read", WeightsError, remedy="copy it again"
    )
    _clear_padding(tensors.values(), vocab_size)


def stored_dtype(folder: Path) -> torch.dtype:
    """Reads the dtype of the weights in a Megatron checkpoint.

    Raises:
        MissingPathError, WeightsError: see `read_index`; also when they are no floating point numbers, or of two types.
    """
    stored = _stored_tensors(folder)
    wrong = [name for name, tensor in stored.items() if not tensor.properties.dtype.is_floating_point]
    if wrong:
        raise WeightsError(
            f"tensor {wrong[0]!r} in {str(folder)!r} has dtype {stored[wrong[0]].properties.dtype}: "
            "only checkpoints of floating point weights are read"
        )
    kinds = sorted({str(tensor.properties.dtype).removeprefix("torch.") for tensor in stored.values()})
    if len(kinds) != 1:
        raise WeightsError(f"{str(folder)!r} holds weights of types {', '.join(kinds) or 'none'}: choose one, --dtype")
    return getattr(torch, kinds[0])  # type: ignore[no-any-return]


def read_index(folder: Path) -> Metadata:
    """Reads the checkpoint's `.metadata` and checks that every file is as long as it says.

    Raises:
        MissingPathError: no Megatron checkpoint lies there.
        WeightsError: the index or a file is damaged or missing.
    """
    if not (folder / ".metadata").is_file():
        raise MissingPathError(f"{str(folder)!r} is no Megatron checkpoint: it has no .metadata (torch_dist format)")
    try:
        index = FileSystemReader(folder).read_metadata()
        places = [(key.fqn, folder / info.relative_path, info) for key, info in index.storage_data.items()]
    except Exception as error:  # unpickling damaged bytes raises anything
        raise WeightsError(f"'{folder}/.metadata' is damaged: copy the checkpoint again ({one_line(error)})") from None
    sizes: dict[Path, int] = {}
    for name, path, info in sorted(places, key=lambda place: (place[1], place[2].offset)):
        if path not in sizes:
            sizes[path] = path.stat().st_size if path.is_file() else -1
        if sizes[path] < 0:
            raise WeightsError(f"{str(path)!r} (for tensor {name!r}) does not exist: copy the checkpoint again")
        if info.offset + info.length > sizes[path]:
            raise WeightsError(
                f"tensor {name!r} in {str(path)!r} cannot be read: the file was cut short, copy it again"
            )
    return index


class _TensorByTensor(TorchDistSaveShardedStrategy):
    """Writes in this process, one file a rank, a tensor at a time."""

    def __init__(self, progress: Progress) -> None:
        super().__init__("torch_dist", 1)
        self._progress = progress

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        grouped, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        planner = _SavePlanner(self._progress, flatten_state_dict=False)
        dcp.save(mcore_to_pyt_state_dict(grouped), storage_writer=FileSystemWriter(checkpoint_dir), planner=planner)


class _SavePlanner(MCoreSavePlanner):
    def __init__(self, progress: Progress, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._progress = progress

    def resolve_data(self, write_item: Any) -> Any:
        data = super().resolve_data(write_item)
        self._progress(data.nbytes if isinstance(data, torch.Tensor) else 0)
        return data


class _LoadPlanner(MCoreLoadPlanner):
    def __init__(self, progress: Progress, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._progress = progress

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        super().commit_tensor(read_item, tensor)
        self._progress(tensor.nbytes)


def _sharded_tensors(model: Model, grid: ParallelGrid) -> dict[str, ShardedTensor]:
    """Lists what to load, each a view of a parameter, so that loading needs no second copy."""
    state, _, _ = load_preprocess(model.sharded_state_dict(metadata={"dp_cp_group": grid.groups.dp_cp}))
    tensors = {f"{i}": value for i, value in enumerate(nested_values(state)) if isinstance(value, ShardedTensor)}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for tensor in tensors.values():
        assert tensor.data.is_contiguous(), f"{tensor.key} would be loaded into a copy"
        assert tensor.data.untyped_storage().data_ptr() in own, f"{tensor.key} would be loaded into a copy"
    return tensors


def _stored_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    return {
        name: entry
        for name, entry in read_index(folder).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith(_BESIDE)
    }


def _check_belongs(folder: Path, tensors: dict[str, ShardedTensor], vocab_size: int) -> None:
    """Raises WeightsError on every rank unless the checkpoint holds exactly this model's tensors. Collective."""
    error: OPDError | None = None
    wanted: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(wanted, {tensor.key for tensor in tensors.values()})
    try:
        stored = _stored_tensors(folder)
        mismatch = next(_mismatches(stored, tensors, set().union(*wanted), vocab_size), None)
        if mismatch is not None:
            error = WeightsError(f"Megatron checkpoint {str(folder)!r} {mismatch}: it is another model's")
    except OPDError as problem:
        error = problem
    raise_on_all_ranks(error, "", WeightsError)


def _mismatches(
    stored: dict[str, TensorStorageMetadata], tensors: dict[str, ShardedTensor], wanted: set[str], vocab_size: int
) -> Iterator[str]:
    for tensor in tensors.values():
        if tensor.key not in stored:
            yield f"holds no tensor {tensor.key!r}"
            continue
        there, expected = list(stored[tensor.key].size), list(tensor.global_shape)
        padded = tensor.allow_shape_mismatch  # the vocabulary, which every layout pads to its own size
        if there[padded:] != expected[padded:] or (padded and there[0] < vocab_size):
            yield f"has tensor {tensor.key!r} of shape {there}, the config says {expected}"
    surplus = sorted(stored.keys() - wanted)
    if surplus:
        yield f"holds {len(surplus)} tensors (first {surplus[0]!r}) with no place in the model of its config"


def _clear_padding(tensors: Any, vocab_size: int) -> None:
    """Zeroes the rows past the vocabulary: the checkpoint's own padding may have been trained."""
    for tensor in tensors:
        if tensor.allow_shape_mismatch:
            first = max(0, vocab_size - tensor.global_offset[0])
            tensor.data[first:].zero_()
