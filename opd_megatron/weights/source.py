"""Hugging Face folders: finding one, reading its config, and reading slices of its safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from opd_megatron.errors import MissingPathError, UnsupportedModelError, WeightsError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Anything else (int8, fp8, packed 4-bit) is a quantized checkpoint, whose numbers are not the weights.
_DTYPES = ("F64", "F32", "F16", "BF16")


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
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=list(files)))
    except Exception as error:  # the hub client raises its own, HTTP and OS errors
        cause = " ".join(str(error).split())[:160]
        raise MissingPathError(
            f"model {path!r} is neither a folder nor a hub id that can be had here: check the name, the network and "
            f"HF_HUB_OFFLINE, or give a folder ({type(error).__name__}: {cause})"
        ) from error


def load_hf_config(folder: Path) -> PretrainedConfig:
    """Reads config.json; never runs code that came with the model.

    Raises:
        MissingPathError: there is no config.json.
        WeightsError: it is not JSON.
        UnsupportedModelError: transformers does not know its `model_type`.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise MissingPathError(f"{str(file)!r} does not exist: give a Hugging Face model folder")
    from transformers import AutoConfig

    model_type = read_json(file).get("model_type")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        cause = " ".join(str(error).split())[:160]
        raise UnsupportedModelError(
            f"{str(file)!r} has unknown model_type={model_type!r}: use a Llama, Mistral or Qwen model ({cause})"
        ) from error


class SafetensorsSource:
    """The tensors of a checkpoint folder, in one file or many, memory-mapped: a slice reads the pages it lies on.

    Raises WeightsError from every method: one line naming the file and the tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._file_of = self._locate()

    def __enter__(self) -> SafetensorsSource:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._files.clear()

    @property
    def names(self) -> Sequence[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle(name).get_shape())

    def get_slice(self, name: str, slices: tuple[slice, ...] = ()) -> torch.Tensor:
        """`tensor[slices]` on CPU in the file's dtype: a view of the mapped file, read when it is used."""
        handle = self._handle(name)
        if handle.get_dtype() not in _DTYPES:
            raise WeightsError(
                f"{self._where(name)} has dtype {handle.get_dtype()}: quantized checkpoints are not read, "
                "use the model's bf16 or fp32 weights"
            )
        return handle[slices] if slices else handle[:]

    def expect_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if self.shape(name) != shape:
            raise WeightsError(
                f"{self._where(name)} has shape {list(self.shape(name))}, config.json says {list(shape)}: "
                "the checkpoint and its config do not belong together"
            )

    def _handle(self, name: str) -> Any:
        if name not in self._file_of:
            raise WeightsError(f"{str(self.folder)!r} holds no tensor {name!r}: the checkpoint is incomplete")
        try:
            return self._open(self._file_of[name]).get_slice(name)
        except SafetensorError as error:
            raise WeightsError(f"{self._where(name)} cannot be read: download the file again ({error})") from error

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise WeightsError(
                    f"{str(self.folder / file)!r} is damaged or cut short: download it again ({error})"
                ) from error
        return self._files[file]

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
            return dict.fromkeys(self._open(SINGLE_FILE).keys(), SINGLE_FILE)
        pickled = any(self.folder.glob("*.bin"))
        remedy = "load it with transformers and save_pretrained it once" if pickled else "give a folder with weights"
        raise WeightsError(f"{str(self.folder)!r} holds no {SINGLE_FILE} or {INDEX_FILE}: {remedy}")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint. Raises WeightsError when it holds none."""
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise WeightsError(f"{str(file)!r} is not valid JSON: download it again ({error})") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{str(file)!r} must hold a JSON object, got {type(content).__name__}")
    return content
