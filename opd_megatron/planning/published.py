"""Finding a model's config.json, and the names and shapes of its published tensors, where its weights are not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from opd_megatron.weights.hf_reader import INDEX_FILE, SINGLE_FILE, SafetensorsSource, read_json, resolve_model

PUBLISHED = Path(__file__).parent / "models"
Shapes = dict[str, tuple[int, ...] | None]
"""Tensor name -> shape, or None where only the name is known."""


def find_model(path: str, folders: Sequence[Path] = ()) -> Path:
    """Finds the folder with the config.json of a folder or hub id; no weights are needed.

    Looked for in this order: `path` itself, FOLDER/path for each of `folders`, the published configs that come with
    this package, and the hub (its cache first), of which only the small files are taken.

    Raises:
        MissingPathError: none of them has it.
    """
    if Path(path).expanduser().exists():
        return resolve_model(path)
    for folder in [*folders, PUBLISHED]:
        if (folder / path / "config.json").is_file():
            return folder / path
    return resolve_model(path, files=("*.json",))


def known_tensors(path: str, folder: Path) -> tuple[Shapes, str] | None:
    """Looks up the tensors of the model's published checkpoint, and where they are known from; None if unknown.

    The checkpoint's own files come first (shapes where they are all there, else the names of its index).

    Raises:
        WeightsError: an index or a file that cannot be read.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        names = read_json(index).get("weight_map", {})
        if not all((folder / file).is_file() for file in set(names.values())):
            return dict.fromkeys(names), INDEX_FILE
    if index.is_file() or (folder / SINGLE_FILE).is_file():
        with SafetensorsSource(folder) as source:
            return {name: source.shape(name) for name in source.names}, "its safetensors"
    for entry in _published():
        if path in entry["models"] and folder.is_relative_to(PUBLISHED):
            return _expanded(entry), "the published index"
    return None


def published_models() -> list[str]:
    """Lists the hub ids whose config.json comes with this package."""
    return sorted(str(file.parent.relative_to(PUBLISHED)) for file in PUBLISHED.rglob("config.json"))


@cache
def _published() -> list[dict]:
    return json.loads((PUBLISHED / "indexes.json").read_text())


def _expanded(entry: dict) -> Shapes:
    """Writes the patterns with {layer} and {expert} out."""
    shapes: Shapes = {}
    for name, shape in entry["tensors"].items():
        for layer in range(entry["layers"] if "{layer}" in name else 1):
            for expert in range(entry["experts"] if "{expert}" in name else 1):
                shapes[name.format(layer=layer, expert=expert)] = tuple(shape)
    return shapes
