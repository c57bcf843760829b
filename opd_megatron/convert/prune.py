"""Depth pruning: a smaller student made of evenly kept layers of a Hugging Face model."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from opd_megatron.errors import MissingPathError, UnsupportedModelError, WeightsError
from opd_megatron.system.atomic import new_folder
from opd_megatron.weights.hf_reader import SAFETENSORS_DTYPES, read_json
from opd_megatron.weights.safetensors_writer import INDEX_NAME, PROVENANCE, write_safetensors

COPIED = ("tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "chat_template*",
          "generation_config.json", "LICENSE*")  # fmt: skip
_LAYER = re.compile(r"^(model\.layers\.)(\d+)(\..+)$")
_PRUNED_DTYPES = {name: SAFETENSORS_DTYPES[name] for name in ("F32", "BF16", "F16")}


def kept_layers(total: int, keep: int) -> list[int]:
    """Chooses `keep` evenly spaced layers out of `total`; the first and the last are always among them."""
    if not 2 <= keep <= total:
        raise WeightsError(f"cannot keep {keep} of {total} layers: give a number from 2 to {total}")
    gaps = keep - 1
    return [(2 * i * (total - 1) + gaps) // (2 * gaps) for i in range(keep)]


def prune_depth(source: str | Path, layers: int, out: str | Path, *, progress: bool = False) -> Path:
    """Writes a copy of the Hugging Face folder `source` with `layers` of its layers into the new folder `out`.

    Raises:
        MissingPathError: no such folder, or no safetensors in it.
        UnsupportedModelError: its parameters are not named `model.layers.N.*`.
        WeightsError: an impossible number of layers, damaged weights, or `out` is not empty.
    """
    source, out = Path(source), Path(out)
    config = _read_config(source)
    files = _weight_files(source)
    kept = kept_layers(int(config["num_hidden_layers"]), layers)
    with ExitStack() as stack, new_folder(out, WeightsError) as folder:
        names, dtype = _plan(kept, int(config["num_hidden_layers"]), files, stack)
        shapes = {new: tuple(file.get_slice(old).get_shape()) for new, (old, file) in names.items()}
        write_safetensors(folder, shapes, lambda new: _read(new, names), dtype, progress=progress)
        (folder / "config.json").write_text(json.dumps(_pruned_config(config, kept), indent=2) + "\n")
        for path in source.iterdir():
            if path.is_file() and any(fnmatch(path.name, pattern) for pattern in COPIED):
                shutil.copy(path, folder / path.name)
        provenance = {"tool": "prune_depth", "source": source.name, "kept_layers": kept}
        (folder / PROVENANCE).write_text(json.dumps(provenance | _parent(source), indent=2) + "\n")
    return out


def _read_config(source: Path) -> dict[str, Any]:
    path = source / "config.json"
    if not path.is_file():
        raise MissingPathError(f"{str(source)!r} is not a Hugging Face model folder: it has no config.json")
    config = read_json(path)
    if not isinstance(config.get("num_hidden_layers"), int):
        raise UnsupportedModelError(f"{str(path)!r} has no num_hidden_layers: only decoder models can be pruned")
    return config


def _weight_files(source: Path) -> list[Path]:
    index = source / INDEX_NAME
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise WeightsError(f"{str(index)!r} has no weight_map: download it again")
        files = sorted({source / str(name) for name in weight_map.values()})
    else:
        files = [source / "model.safetensors"]
    for path in files:
        if not path.is_file():
            raise MissingPathError(f"weights {str(path)!r} do not exist: the folder must hold safetensors")
    return files


def _plan(
    kept: list[int], total: int, files: list[Path], stack: ExitStack
) -> tuple[dict[str, tuple[str, Any]], torch.dtype]:
    """New name -> (old name, open file), and the type of the weights. Nothing is read yet."""
    new_index = {old: new for new, old in enumerate(kept)}
    names: dict[str, tuple[str, Any]] = {}
    found, kinds = set(), set()
    for path in files:
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise WeightsError(f"{str(path)!r} is damaged ({error}): fetch it again") from None
        for old in file.keys():  # noqa: SIM118 - safe_open is not a mapping
            match = _LAYER.match(old)
            if match:
                found.add(int(match[2]))
                if int(match[2]) not in new_index:
                    continue
            new = f"{match[1]}{new_index[int(match[2])]}{match[3]}" if match else old
            names[new] = (old, file)
            kinds.add(file.get_slice(old).get_dtype())
    if found != set(range(total)):
        raise UnsupportedModelError(
            f"{str(files[0].parent)!r} holds {len(found)} layers named model.layers.N, its config says {total}: "
            "only decoder models with that naming can be pruned"
        )
    if len(kinds) != 1 or not kinds <= _PRUNED_DTYPES.keys():
        raise WeightsError(f"{str(files[0].parent)!r} mixes or has unknown tensor types {sorted(kinds)}: convert first")
    return dict(sorted(names.items())), _PRUNED_DTYPES[kinds.pop()]


def _read(new: str, names: dict[str, tuple[str, Any]]) -> torch.Tensor:
    old, file = names[new]
    return file.get_tensor(old)


def _pruned_config(config: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    pruned = config | {"num_hidden_layers": len(kept)}
    if isinstance(config.get("layer_types"), list):
        pruned["layer_types"] = [config["layer_types"][i] for i in kept]
    return pruned


def _parent(source: Path) -> dict[str, Any]:
    path = source / PROVENANCE
    return {"parent": read_json(path)} if path.is_file() else {}
