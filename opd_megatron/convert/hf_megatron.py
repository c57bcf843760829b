"""Hugging Face folder -> Megatron checkpoint -> Hugging Face folder, exact, in a shard's memory, whole or not at all.

Every rank of the layout calls the same function. A Megatron folder is Megatron's own `dist_checkpointing` format
(torch_dist) with the model's config.json and tokenizer files beside it; any layout reads what another one wrote.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from opd_megatron.config.run_folder import is_run, named_run
from opd_megatron.convert.display import Display
from opd_megatron.errors import ConfigError, MissingPathError, WeightsError
from opd_megatron.system.atomic import new_folder, partial_path
from opd_megatron.system.collectives import on_all_ranks
from opd_megatron.types import DTYPES
from opd_megatron.weights.families import Dims, family_of, sizes_split_by_tensor
from opd_megatron.weights.hf_reader import SafetensorsSource, load_hf_config, read_json, resolve_model
from opd_megatron.weights.layout import ShardLayout, pad_vocab
from opd_megatron.weights.load import load_weights
from opd_megatron.weights.parts import LocalShards
from opd_megatron.weights.safetensors_writer import PROVENANCE, SafetensorsWriter
from opd_megatron.weights.save import SHARD_BYTES, copy_tokenizer_files, write_parts
from opd_megatron.weights.sharding import hf_shapes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from opd_megatron.mcore.grid import ParallelGrid
    from opd_megatron.mcore.model import Model


@dataclass(frozen=True, slots=True)
class ParallelSizes:
    """The layout that a conversion runs in; the files do not depend on it."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    """Ranks of a stage that share every layer's experts out; the rest of the layer is the same on all of them."""

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.expert

    def __str__(self) -> str:
        return f"TP{self.tensor} PP{self.pipeline}" + (f" EP{self.expert}" if self.expert > 1 else "")

    def check(self, hf_config: PretrainedConfig) -> None:
        """Raises ConfigError when the model does not split this way."""
        experts = Dims.of(hf_config).experts if family_of(hf_config).experts else 0
        if self.expert > 1 and not experts:
            raise ConfigError(f"--expert {self.expert} needs a MoE model, this one has no experts: leave it out")
        if experts % self.expert:
            raise ConfigError(f"--expert {self.expert} must divide the model's {experts} experts: use another size")
        for what, size in sizes_split_by_tensor(hf_config).items():
            if size % self.tensor:
                raise ConfigError(f"--tensor {self.tensor} must divide the model's {size} {what}: use another size")
        layers = hf_config.num_hidden_layers
        if layers % self.pipeline:
            raise ConfigError(f"--pipeline {self.pipeline} must divide the model's {layers} layers: use another size")


def hf_to_megatron(
    hf_dir: str | Path, out: str | Path, sizes: ParallelSizes, *, dtype: str | None = None, progress: bool = False
) -> None:
    """Writes the Megatron folder `out` from a Hugging Face folder or hub id. Collective over all ranks.

    Raises:
        OPDError: the same on every rank; `out` is then as it was before.
    """
    source = resolve_model(str(hf_dir))
    config = load_hf_config(source)
    family_of(config)
    sizes.check(config)
    kind = DTYPES[dtype] if dtype else hf_dtype(source, config)
    with _on_ranks(sizes) as grid, _shared_folder(Path(out)) as folder, Display(progress) as display:
        model, layout = _build(config, grid, kind)
        total = sum(parameter.nbytes for parameter in model.parameters())
        with on_all_ranks("the model was not read", WeightsError):
            load_weights(model, source, config, layout, display.bar("reading", total))
        from opd_megatron.mcore.checkpoint.weights_only import save_model

        save_model(model, grid, folder, display.bar("writing", total))
        facts = {**asdict(sizes), "padded_vocab": layout.padded_vocab}
        with on_all_ranks("the checkpoint was not written", WeightsError):
            if dist.get_rank() == 0:
                _copy_config(source / "config.json", folder / "config.json", kind, config)
                copy_tokenizer_files(source, folder)
                _write_provenance(folder, "hf_to_megatron", source, dtype=_name(kind), **facts)


def megatron_to_hf(
    megatron: str | Path,
    out: str | Path,
    sizes: ParallelSizes,
    *,
    hf_config: str | Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Writes the Hugging Face folder `out` from a Megatron folder or a run's checkpoint. Collective over all ranks.

    `hf_config` is the folder that config.json and tokenizer are taken from where the checkpoint has none.

    Raises:
        OPDError: the same on every rank; `out` is then as it was before.
    """
    from opd_megatron.mcore.checkpoint.weights_only import load_model, stored_dtype

    source = Path(megatron)
    tokenizer_files = _config_folder(source, hf_config)
    config = load_hf_config(tokenizer_files)
    family_of(config)
    sizes.check(config)
    kind = DTYPES[dtype] if dtype else stored_dtype(source)
    with _on_ranks(sizes) as grid, _shared_folder(Path(out)) as folder, Display(progress) as display:
        model, layout = _build(config, grid, kind)
        total = sum(parameter.nbytes for parameter in model.parameters())
        load_model(model, grid, source, vocab_size=config.vocab_size, progress=display.bar("reading", total))
        parts = LocalShards(model, config, layout)
        shown = display.bar("writing", parts.contributed_numel() * kind.itemsize)
        shapes, first = hf_shapes(config), dist.get_rank() == 0
        refused = "the model was not written"
        with on_all_ranks(refused, WeightsError):
            if first:
                writer = SafetensorsWriter(folder, shapes, kind, max_shard_size=max_shard_bytes)
        with on_all_ranks(refused, WeightsError):
            if not first:
                writer = SafetensorsWriter(folder, shapes, kind, max_shard_size=max_shard_bytes, creates=False)
            with writer:
                write_parts(parts, writer, shown)
        with on_all_ranks(refused, WeightsError):
            if first:
                _copy_config(tokenizer_files / "config.json", folder / "config.json", kind, config)
                copy_tokenizer_files(tokenizer_files, folder)
                _write_provenance(folder, "megatron_to_hf", source, dtype=_name(kind))


def hf_dtype(source: Path, config: PretrainedConfig) -> torch.dtype:
    """Reads the dtype of a Hugging Face folder's weights. Raises WeightsError when there are several."""
    wanted = hf_shapes(config).keys()
    with SafetensorsSource(source) as files:
        found = {files.dtype(name): name for name in files.names if name in wanted}
        if not found:
            raise WeightsError(f"{str(source)!r} holds none of the tensors that its config.json describes")
        if len(found) > 1 or not found.keys() <= set(DTYPES.values()):
            examples = ", ".join(f"{name} is {_name(kind)}" for kind, name in sorted(found.items(), key=str))
            raise WeightsError(f"{str(source)!r} holds weights that need one type, --dtype: {examples}")
        return next(iter(found))


def _build(config: PretrainedConfig, grid: ParallelGrid, kind: torch.dtype) -> tuple[Model, ShardLayout]:
    from opd_megatron.mcore.model import build_gpt_model

    padded_vocab = pad_vocab(config.vocab_size, grid.tp_size)
    model = build_gpt_model(config, grid, padded_vocab=padded_vocab, dtype="fp32" if kind.itemsize == 4 else "bf16")
    return model.to(kind), grid.layout(config.num_hidden_layers, padded_vocab)


def _config_folder(megatron: Path, hf_config: str | Path | None) -> Path:
    """Finds config.json and tokenizer: the named folder, the Megatron folder, or its run's student."""
    if hf_config is not None:
        return resolve_model(str(hf_config))
    if not megatron.is_dir():
        raise MissingPathError(f"Megatron checkpoint {str(megatron)!r} does not exist: give its folder")
    if (megatron / "config.json").is_file():
        return megatron
    run = megatron.resolve().parent.parent
    section = named_run(run).get("student") if is_run(run) else None
    student = section.get("path") if isinstance(section, dict) else None
    if not isinstance(student, str):
        raise MissingPathError(
            f"{str(megatron)!r} holds no config.json and lies in no run: name the model's folder with --hf-config"
        )
    return resolve_model(student)


@contextmanager
def _on_ranks(sizes: ParallelSizes) -> Iterator[ParallelGrid]:
    """Joins the ranks and makes the groups of the layout."""
    from opd_megatron.mcore.cpu.platform import init_distributed
    from opd_megatron.mcore.grid import ParallelGrid

    started = not dist.is_initialized()
    init_distributed()
    try:
        world = dist.get_world_size()
        if world != sizes.ranks:
            raise ConfigError(
                f"world size {world} must equal --tensor {sizes.tensor} * --pipeline {sizes.pipeline} * --expert "
                f"{sizes.expert}: start another number of ranks or change them"
            )
        everyone = dist.group.WORLD
        grids = _grids.setdefault(everyone, {})
        if sizes not in grids:
            grids[sizes] = ParallelGrid.build(sizes.tensor, sizes.pipeline, dp_size=sizes.expert, ep_size=sizes.expert)
        yield grids[sizes]
    finally:
        if started:
            dist.destroy_process_group()


_grids: WeakKeyDictionary[Any, dict[ParallelSizes, ParallelGrid]] = WeakKeyDictionary()
"""Of each default process group that lives: a caller that converts many models in one makes thirty groups, of three
threads each, once and not for each model."""


@contextmanager
def _shared_folder(out: Path) -> Iterator[Path]:
    """Opens one `new_folder` for all ranks: it becomes `out` when every rank leaves the block well. Collective."""
    with ExitStack() as publishing:
        folder = partial_path(out.absolute())
        with on_all_ranks(f"{str(out)!r} was not written", WeightsError):
            if dist.get_rank() == 0:
                folder = publishing.enter_context(new_folder(out, WeightsError))
        yield folder
        with on_all_ranks(f"{str(out)!r} was not written", WeightsError):
            publishing.close()


def _copy_config(original: Path, copy: Path, kind: torch.dtype, config: PretrainedConfig) -> None:
    """Copies the model's config.json as it is, except for the dtype and what the weights say otherwise; transformers
    would rewrite the rest."""
    tree = read_json(original)
    changes: dict[str, Any] = {"torch_dtype" if "torch_dtype" in tree else "dtype": str(kind).removeprefix("torch.")}
    tied = "tie_word_embeddings"
    if bool(tree.get(tied, getattr(type(config)(), tied, False))) != bool(config.tie_word_embeddings):
        changes[tied] = bool(config.tie_word_embeddings)
    if tree | changes == tree:
        shutil.copyfile(original, copy)
    else:
        copy.write_text(json.dumps(tree | changes, indent=2) + "\n")


def _write_provenance(folder: Path, tool: str, source: Path, **facts: Any) -> None:
    tree: dict[str, Any] = {"tool": tool, "source": source.name, **facts}
    if (source / PROVENANCE).is_file():
        tree["parent"] = read_json(source / PROVENANCE)
    (folder / PROVENANCE).write_text(json.dumps(tree, indent=2) + "\n")


def _name(kind: torch.dtype) -> str:
    return next((name for name, value in DTYPES.items() if value is kind), str(kind).removeprefix("torch."))
