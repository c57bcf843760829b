"""Hugging Face folders: written from a bucket stream, whole or not at all, or by all ranks from their own shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from opd_megatron.errors import WeightsError
from opd_megatron.system.atomic import new_folder
from opd_megatron.types import Bucket
from opd_megatron.weights.families import architecture_of
from opd_megatron.weights.hf_reader import CONFIG_FILE, INDEX_FILE, read_json
from opd_megatron.weights.parts import LocalShards
from opd_megatron.weights.safetensors_writer import SafetensorsWriter
from opd_megatron.weights.sharding import hf_shapes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SHARD_BYTES = 4 * 2**30
GENERATION_FILE = "generation_config.json"
# What a Hugging Face folder holds besides weights and config.json.
_TOKENIZER_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_TEMPLATE_FOLDER = "additional_chat_templates"


def save_hf(
    buckets: Iterable[Bucket],
    hf_config: PretrainedConfig,
    out_dir: str | Path,
    *,
    tokenizer_dir: str | Path | None = None,
    model_dir: str | Path | None = None,
    stop_token_ids: Sequence[int] = (),
    dtype: torch.dtype,
    max_shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes safetensors, config.json, generation_config.json and, from `tokenizer_dir`, tokenizer and templates. One
    rank calls it.

    config.json is that of `model_dir`, the folder that the model was read from, with what has changed; readers from
    transformers 4 on find what they look for. An answer ends where it ended in training, at `stop_token_ids`.

    Everything is written beside `out_dir` and moved there at the end, so that an earlier export stays whole until the
    new one is. Host memory: the buckets'.

    Raises:
        WeightsError: `out_dir` holds files that are not an export's, or cannot be written.
    """
    out_dir = Path(out_dir).absolute()
    _refuse_foreign(out_dir)
    with new_folder(out_dir, WeightsError, replaces=True) as partial:
        write_hf(
            buckets, hf_config, partial, tokenizer_files=tokenizer_dir, model_dir=model_dir, dtype=dtype,
            max_shard_bytes=max_shard_bytes,
        )  # fmt: skip
        _write_generation_config(partial, model_dir, stop_token_ids)
    return out_dir


def write_hf(
    buckets: Iterable[Bucket],
    hf_config: PretrainedConfig,
    folder: Path,
    *,
    tokenizer_files: str | Path | None = None,
    model_dir: str | Path | None = None,
    dtype: torch.dtype,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Fills an empty folder with safetensors, config.json, and the tokenizer and generation files of `tokenizer_files`.

    The stream may bring the tensors in any order; none is kept. OSError when the disk refuses.
    """
    shapes = hf_shapes(hf_config)
    missing = set(shapes)
    with SafetensorsWriter(folder, shapes, dtype, max_shard_size=max_shard_bytes) as writer:
        for bucket in buckets:
            for name, tensor in bucket:
                writer.write(name, tensor)
                missing.remove(name)
    assert not missing, f"tensors that never came: {sorted(missing)[:3]}"
    _write_config(hf_config, folder, dtype, model_dir)
    if tokenizer_files is not None:
        copy_tokenizer_files(Path(tokenizer_files), folder)


def write_parts(
    parts: LocalShards, writer: SafetensorsWriter, progress: Callable[[int], None] = lambda _: None
) -> None:
    """Writes this rank's part of every Hugging Face tensor where it belongs: nothing is gathered, no tensor is built.

    All ranks of a layout together write everything once. `progress` is told the bytes of each part.
    """
    for tensor in parts.contributed():
        piece, values = parts.piece(tensor, parts.layout.tp_rank), parts.own(tensor)
        if piece is not None:
            writer.write_part(tensor.name, values, dim=piece.dim, start=piece.start)
        progress(values.nbytes)


def copy_tokenizer_files(source: Path, folder: Path) -> None:
    """Copies what a Hugging Face folder holds besides weights and config.json."""
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / _TEMPLATE_FOLDER).is_dir():
        shutil.copytree(source / _TEMPLATE_FOLDER, folder / _TEMPLATE_FOLDER, dirs_exist_ok=True)


def config_tree(hf_config: PretrainedConfig, dtype: torch.dtype, model_dir: str | Path | None) -> dict[str, Any]:
    """Builds the content of config.json: the model's own with what has changed, or else what transformers writes, with
    the names that transformers 4 and 5 each look for."""
    own = Path(model_dir) / CONFIG_FILE if model_dir is not None else None
    tree = read_json(own) if own is not None and own.is_file() else json.loads(hf_config.to_json_string())
    tree["architectures"] = [architecture_of(hf_config)]
    tree["tie_word_embeddings"] = bool(hf_config.tie_word_embeddings)
    tree["dtype"] = tree["torch_dtype"] = str(dtype).removeprefix("torch.")
    rope = dict(getattr(hf_config, "rope_parameters", None) or {})
    if "rope_parameters" in tree and "rope_theta" in rope:
        tree["rope_theta"] = rope.pop("rope_theta")
        tree["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    return tree


def _write_config(hf_config: PretrainedConfig, folder: Path, dtype: torch.dtype, model_dir: str | Path | None) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps(config_tree(hf_config, dtype, model_dir), indent=2) + "\n")


def _write_generation_config(folder: Path, model_dir: str | Path | None, stop_token_ids: Sequence[int]) -> None:
    """Writes how the model is sampled by default: its own settings, or the tokenizer's folder's, and where it stops."""
    path, own = folder / GENERATION_FILE, Path(model_dir or folder) / GENERATION_FILE
    tree = read_json(own) if own.is_file() else read_json(path) if path.is_file() else {}
    if stop_token_ids:
        tree["eos_token_id"] = list(stop_token_ids) if len(stop_token_ids) > 1 else stop_token_ids[0]
    if tree:
        path.write_text(json.dumps(tree, indent=2) + "\n")


def _refuse_foreign(out_dir: Path) -> None:
    """Replacing a folder deletes it, so it must be an earlier export or empty."""
    if not out_dir.exists():
        return
    ours = {CONFIG_FILE, INDEX_FILE, _TEMPLATE_FOLDER, *_TOKENIZER_FILES}
    inside = list(out_dir.iterdir()) if out_dir.is_dir() else [out_dir]
    foreign = [path.name for path in inside if path.name not in ours and path.suffix != ".safetensors"]
    if foreign:
        raise WeightsError(f"export folder {str(out_dir)!r} holds {foreign[0]!r}, which is no export's: choose another")
