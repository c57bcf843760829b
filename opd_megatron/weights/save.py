"""A bucket stream written as a Hugging Face folder, whole or not at all."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from opd_megatron.errors import WeightsError
from opd_megatron.types import Bucket
from opd_megatron.weights.families import architecture_of
from opd_megatron.weights.folder import write_safetensors
from opd_megatron.weights.plan import hf_shapes
from opd_megatron.weights.source import INDEX_FILE

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SHARD_BYTES = 4 * 2**30
# What a Hugging Face folder holds besides weights and config.json.
_COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def save_hf(
    buckets: Iterable[Bucket],
    hf_config: PretrainedConfig,
    out_dir: str | Path,
    *,
    tokenizer_dir: str | Path | None = None,
    dtype: torch.dtype,
    max_shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes safetensors, config.json and, from `tokenizer_dir`, tokenizer and generation_config. One rank calls it.

    Everything is written beside `out_dir` and moved there at the end, so that an earlier export stays whole until the
    new one is. Host memory: about one file's worth of tensors.

    Raises:
        WeightsError: `out_dir` holds files that are not an export's, or cannot be written.
    """
    out_dir = Path(out_dir).absolute()
    _refuse_foreign(out_dir)
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_tensors(buckets, hf_config, partial, dtype, max_shard_bytes)
        _write_config(hf_config, partial, dtype)
        if tokenizer_dir is not None:
            for name in _COMPANIONS:
                if (Path(tokenizer_dir) / name).is_file():
                    shutil.copyfile(Path(tokenizer_dir) / name, partial / name)
        _replace(out_dir, partial)
    except OSError as error:
        raise WeightsError(f"cannot write the export to {str(out_dir)!r}: check space and rights ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out_dir


def _write_tensors(
    buckets: Iterable[Bucket], hf_config: PretrainedConfig, folder: Path, dtype: torch.dtype, limit: int
) -> None:
    stream = iter(buckets)
    ahead: dict[str, torch.Tensor] = {}  # the writer gives a tensor over its limit a file out of turn

    def pull(name: str) -> torch.Tensor:
        while name not in ahead:
            ahead.update(next(stream))
        return ahead.pop(name).to("cpu", dtype)

    write_safetensors(folder, hf_shapes(hf_config), pull, dtype, max_shard_size=limit)
    surplus = [*ahead, *(name for bucket in stream for name, _ in bucket)]  # also lets the other ranks finish
    assert not surplus, f"tensors beyond the model's own: {surplus[:3]}"


def _write_config(hf_config: PretrainedConfig, folder: Path, dtype: torch.dtype) -> None:
    config = copy.deepcopy(hf_config)
    config.architectures = [architecture_of(hf_config)]
    config.dtype = dtype
    config.save_pretrained(folder)


def _refuse_foreign(out_dir: Path) -> None:
    """Replacing a folder deletes it, so it must be an earlier export or empty."""
    if not out_dir.exists():
        return
    ours = {"config.json", INDEX_FILE, *_COMPANIONS}
    inside = list(out_dir.iterdir()) if out_dir.is_dir() else [out_dir]
    foreign = [path.name for path in inside if path.name not in ours and path.suffix != ".safetensors"]
    if foreign:
        raise WeightsError(f"export folder {str(out_dir)!r} holds {foreign[0]!r}, which is no export's: choose another")


def _replace(out_dir: Path, new: Path) -> None:
    old = out_dir.with_name(f".{out_dir.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out_dir.exists():
        out_dir.rename(old)
    new.rename(out_dir)
    shutil.rmtree(old, ignore_errors=True)
