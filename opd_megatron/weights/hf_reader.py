"""Hugging Face folders: finding one, reading its config, and reading slices of its safetensors."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from opd_megatron.errors import MissingPathError, UnsupportedModelError, WeightsError
from opd_megatron.system.once_a_node import once_a_node
from opd_megatron.system.reading import read_json_object

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MEGATRON_MARK = ".metadata"
"""The index of a torch_dist checkpoint, which Megatron's `dist_checkpointing` writes last but one."""
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
# Patterns match whole paths, and `*` crosses `/`: other formats of the same weights lie in folders of their own.
_NOT_WANTED = (
    "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model", "consolidated*.safetensors", "adapter_*",
)  # fmt: skip
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Anything else (int8, fp8, packed 4-bit) is a quantized checkpoint, whose numbers are not the weights.
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
READ_BYTES = 32 * 2**20
"""Read at a time where only some columns are wanted, and copied at a time: what loading needs beyond the model."""
_PAGE_BYTES = 4096
"""Columns that are narrower are read with what is beside them: storage gives no less at a time."""


def resolve_model(path: str, files: Sequence[str] = _HUB_FILES) -> Path:
    """The folder of a model: `path` itself when it is one, else the hub's snapshot of that id.

    Honours HF_HUB_OFFLINE and the hub's cache. `files` are patterns of what is wanted of a snapshot.

    Raises:
        MissingPathError: neither a folder with a config.json nor an id the hub (or its cache) has.
    """
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        raise MissingPathError(f"model path {path!r} holds no config.json: give a Hugging Face model folder")
    if not _HUB_ID.fullmatch(path) or path.startswith("."):
        raise MissingPathError(f"model path {path!r} does not exist: give a Hugging Face model folder or a hub id")
    return once_a_node(f"{path} {files}", lambda: _snapshot(path, files))


def _snapshot(path: str, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=list(files), ignore_patterns=list(_NOT_WANTED)))
    except Exception as error:  # the hub client raises its own, HTTP and OS errors
        cause = " ".join(str(error).split())[:160]
        raise MissingPathError(
            f"model {path!r} is neither a folder nor a hub id that can be had here: check the name, the network and "
            f"HF_HUB_OFFLINE, or give a folder ({type(error).__name__}: {cause})"
        ) from error


def load_hf_config(folder: Path) -> PretrainedConfig:
    """Reads config.json; never runs code that came with the model.

    Where it says that embedding and head are tied and the weights hold two different ones, they are not: so
    transformers 5 decides too.

    Raises:
        MissingPathError: there is no config.json.
        WeightsError: it is not JSON.
        UnsupportedModelError: transformers does not know its `model_type`.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise MissingPathError(f"{str(file)!r} does not exist: give a Hugging Face model folder")
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = read_json(file).get("model_type")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers checks types and rules of fields with errors of many kinds
        cause = " ".join(str(error).split())[:160]
        if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
            raise WeightsError(f"{str(file)!r} is damaged ({cause}): download it again") from error
        raise UnsupportedModelError(
            f"{str(file)!r} has unknown model_type={model_type!r}: use a Llama, Mistral or Qwen model ({cause})"
        ) from error
    if getattr(config, "tie_word_embeddings", False) and _has_own_head(folder):
        config.tie_word_embeddings = False
    return config


def config_overrides(folder: Path, config: PretrainedConfig) -> dict[str, Any]:
    """Lists what `load_hf_config` found otherwise than config.json says, for others who read that file."""
    from transformers import AutoConfig

    said = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    tied = "tie_word_embeddings"
    return {} if bool(said.tie_word_embeddings) == bool(config.tie_word_embeddings) else {tied: False}


def _has_own_head(folder: Path) -> bool:
    """Compares head and embedding where the weights hold both."""
    if not (folder / INDEX_FILE).is_file() and not (folder / SINGLE_FILE).is_file():
        return False
    try:
        with SafetensorsSource(folder) as source:
            if not {EMBEDDING, HEAD} <= set(source.names) or source.shape(EMBEDDING) != source.shape(HEAD):
                return False
            rows, columns = source.shape(HEAD)
            step = max(1, READ_BYTES // max(1, columns * 4))
            parts = (slice(start, start + step) for start in range(0, rows, step))
            return any(
                not torch.equal(source.get_slice(EMBEDDING, (part,)).float(), source.get_slice(HEAD, (part,)).float())
                for part in parts
            )
    except WeightsError:
        return False  # whoever reads the weights will say what is wrong with them


@dataclass(frozen=True, slots=True)
class _File:
    """An open safetensors file whose header has been checked."""

    descriptor: int
    data: int
    """Where the tensors begin, in bytes."""
    header: dict[str, Any]


class SafetensorsSource:
    """The tensors of a checkpoint folder, in one file or many, read slice by slice.

    Reads rather than maps: pages of a mapped file count as the process's memory, and a file that shrinks while it is
    mapped ends the process. Raises WeightsError from every method: one line naming the file and the tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, _File] = {}
        self._aliases: dict[str, str] = {}
        self._file_of = self._locate()

    def __enter__(self) -> SafetensorsSource:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        while self._files:
            os.close(self._files.popitem()[1].descriptor)

    def rename(self, name: str, new: str) -> None:
        """Gives a tensor another name for this reader."""
        self._aliases[new] = name
        self._file_of[new] = self._file_of.pop(name)

    @property
    def names(self) -> Sequence[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name)["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """Raises WeightsError also for a quantized tensor."""
        kind = self._entry(name)["dtype"]
        if kind not in SAFETENSORS_DTYPES:
            raise WeightsError(
                f"{self._where(name)} has dtype {kind}: quantized checkpoints are not read, "
                "use the model's bf16 or fp32 weights"
            )
        return SAFETENSORS_DTYPES[kind]

    def get_slice(self, name: str, slices: tuple[slice, ...] = ()) -> torch.Tensor:
        """`tensor[slices]` on CPU in the file's dtype. Slices of the first two dimensions, step 1."""
        shape, dtype = self.shape(name), self.dtype(name)
        bounds = [part.indices(size)[:2] for part, size in zip(slices, shape, strict=False)]
        first, last = bounds[0] if bounds else (0, shape[0] if shape else 1)
        row = math.prod(shape[1:])  # elements
        if len(bounds) < 2:
            out = torch.empty((last - first, *shape[1:]) if shape else (), dtype=dtype)
            self._read(name, first * row * dtype.itemsize, out)
            return out
        left, right = bounds[1]
        out = torch.empty((last - first, right - left, *shape[2:]), dtype=dtype)
        column = math.prod(shape[2:])
        if (right - left) * column * dtype.itemsize >= _PAGE_BYTES:
            for index in range(first, last):
                self._read(name, (index * row + left * column) * dtype.itemsize, out[index - first])
            return out
        step = max(1, READ_BYTES // max(1, row * dtype.itemsize))
        for start in range(first, last, step):
            rows = torch.empty((min(step, last - start), *shape[1:]), dtype=dtype)
            self._read(name, start * row * dtype.itemsize, rows)
            out[start - first : start - first + len(rows)] = rows[:, left:right]
        return out

    def copy_slice(self, name: str, slices: tuple[slice, ...], target: torch.Tensor) -> None:
        """Copies `tensor[slices]` into `target` [blocks, width, ...], whose first two dimensions are its rows.

        Holds a few MiB of the slice at a time.
        """
        blocks, width = target.shape[:2]
        rows, *columns = slices
        first, last, _ = rows.indices(self.shape(name)[0])
        assert last - first == blocks * width, f"{name}: {last - first} rows for {blocks} x {width}"
        row_bytes = math.prod(self.shape(name)[1:]) * self.dtype(name).itemsize
        step = max(1, READ_BYTES // max(1, row_bytes))
        if blocks > 1:  # whole blocks at a time
            step = max(1, step // width) * width
        for start in range(0, last - first, step):
            stop = min(start + step, last - first)
            part = self.get_slice(name, (slice(first + start, first + stop), *columns))
            if blocks > 1:
                target[start // width : stop // width].copy_(part.unflatten(0, (-1, width)))
            else:
                target[0, start:stop].copy_(part)

    def expect_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if self.shape(name) != shape:
            raise WeightsError(
                f"{self._where(name)} has shape {list(self.shape(name))}, config.json says {list(shape)}: "
                "the checkpoint and its config do not belong together"
            )

    def _read(self, name: str, offset: int, out: torch.Tensor) -> None:
        """Fills the contiguous `out` from `offset` bytes into the tensor."""
        file, begin = self._open(self._file_of[name]), self._entry(name)["data_offsets"][0]
        view, position = out.reshape(-1).view(torch.uint8).numpy().data, file.data + begin + offset
        while len(view) > 0:
            try:
                count = os.preadv(file.descriptor, [view], position)
            except OSError as error:
                raise WeightsError(f"{self._where(name)} cannot be read: check the disk ({error})") from error
            if count == 0:
                raise WeightsError(f"{self._where(name)} cannot be read: the file was cut short, download it again")
            view, position = view[count:], position + count

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self._file_of:
            raise WeightsError(f"{str(self.folder)!r} holds no tensor {name!r}: the checkpoint is incomplete")
        header, stored = self._open(self._file_of[name]).header, self._aliases.get(name, name)
        if stored not in header:
            raise WeightsError(f"{self._where(name)} cannot be read: the file does not hold it, download it again")
        entry: dict[str, Any] = header[stored]
        return entry

    def _open(self, name: str) -> _File:
        if name not in self._files:
            path = self.folder / name
            try:
                with safe_open(path, framework="pt"):  # checks that header and file agree; reads no tensor
                    pass
                descriptor = os.open(path, os.O_RDONLY)
                length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
                header = json.loads(os.pread(descriptor, length, 8))
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{str(path)!r} is damaged or cut short: download it again ({error})") from error
            header.pop("__metadata__", None)
            self._files[name] = _File(descriptor, 8 + length, header)
        return self._files[name]

    def _where(self, name: str) -> str:
        return f"tensor {name!r} in {str(self.folder / self._file_of[name])!r}"

    def _locate(self) -> dict[str, str]:
        index = self.folder / INDEX_FILE
        if index.is_file():
            file_of = read_json(index).get("weight_map")
            if not isinstance(file_of, dict):
                raise WeightsError(f"{str(index)!r} has no weight_map: download it again")
            for name, file in file_of.items():
                if not (self.folder / file).is_file():
                    raise WeightsError(
                        f"{str(index)!r} names {file!r} (for tensor {name!r}), which does not exist: download it again"
                    )
            return file_of
        if (self.folder / SINGLE_FILE).is_file():
            return dict.fromkeys(self._open(SINGLE_FILE).header, SINGLE_FILE)
        if (self.folder / MEGATRON_MARK).is_file():
            raise WeightsError(
                f"{str(self.folder)!r} is a Megatron checkpoint: convert it first with `opd-megatron convert "
                "megatron-to-hf`"
            )
        remedy = "load it with transformers and save_pretrained it once"
        if not any(self.folder.glob("*.bin")):  # of a hub id none are fetched
            remedy = f"give a folder or hub id with safetensors, or where it has other formats, {remedy}"
        raise WeightsError(f"{str(self.folder)!r} holds no {SINGLE_FILE} or {INDEX_FILE}: {remedy}")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint. Raises WeightsError when it holds none."""
    return read_json_object(file, WeightsError, "download it again")
