"""Every element of every published tensor is held once, over all ranks; a wrong table or slice is found."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PretrainedConfig

from opd_megatron.config import ParallelConfig
from opd_megatron.errors import WeightsError
from opd_megatron.planning import coverage
from opd_megatron.planning.coverage import build_and_check, check_coverage
from opd_megatron.planning.published import find_model, known_tensors
from opd_megatron.weights import sharding as weights_plan
from opd_megatron.weights.families import FAMILIES, LLAMA, ParamMapping, TPSharding, architecture_of
from opd_megatron.weights.hf_reader import load_hf_config
from tests.tiny_models import save_tiny

TOTALS: dict[str, dict[str, int]] = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "published_totals.json").read_text()
)
LAYOUTS = {  # tensor, pipeline, data, expert: 64 ranks each
    "Qwen/Qwen2.5-7B": (4, 4, 4, 1),
    "Qwen/Qwen2.5-72B": (8, 4, 2, 1),
    "Qwen/Qwen3-30B-A3B": (2, 4, 8, 4),
    "meta-llama/Llama-3.1-70B": (8, 8, 1, 1),
}


def _published(name: str) -> PretrainedConfig:
    return load_hf_config(find_model(name))


@pytest.mark.parametrize("name", TOTALS)
def test_the_committed_index_adds_up_to_the_published_size(name: str) -> None:
    shapes, _ = known_tensors(name, find_model(name)) or ({}, "")
    assert len(shapes) == TOTALS[name]["tensors"]
    assert 2 * sum(math.prod(shape or ()) for shape in shapes.values()) == TOTALS[name]["total_size"], "bf16"


@pytest.mark.parametrize(("sizes", "data", "shards"), [
    ({"tensor": 2, "expert": 4, "expert_tensor": 1}, 2, 4), ({"tensor": 2, "expert": 2, "expert_tensor": 1}, 1, 2),
    ({"tensor": 2, "expert": 4, "expert_tensor": 1, "pipeline": 2}, 4, 8), ({"expert": 4, "context": 2}, 2, 4),
])  # fmt: skip
def test_whole_experts_and_those_of_context_parallel_ranks_are_held_once(
    tmp_path: Path, sizes: dict[str, int], data: int, shards: int
) -> None:
    hf = load_hf_config(save_tiny(tmp_path / "model", "qwen3_moe"))
    parallel = ParallelConfig(**sizes, sequence_parallel=sizes.get("tensor", 1) > 1)
    assert build_and_check(hf, parallel, data, 272, None).shards == shards


@pytest.mark.parametrize(("sizes", "shards"), [
    ({"pipeline": 2, "stages": [1, 3]}, 2), ({"pipeline": 3}, 3), ({"pipeline": 2, "virtual_stages": 2}, 2),
    ({"pipeline": 2, "virtual_stages": 2, "stages": [1, 1, 1, 1], "tensor": 2}, 4),
])  # fmt: skip
def test_stages_of_any_kind_hold_every_layer_once(tmp_path: Path, sizes: dict[str, Any], shards: int) -> None:
    hf = load_hf_config(save_tiny(tmp_path / "model"))
    assert build_and_check(hf, ParallelConfig(**sizes), 1, 272, None).shards == shards


@pytest.mark.parametrize("name", TOTALS)
def test_64_ranks_hold_every_published_tensor_exactly_once(name: str) -> None:
    hf = _published(name)
    if architecture_of(hf) not in FAMILIES:
        pytest.skip(f"{architecture_of(hf)} has no weight table")
    tensor, pipeline, data, expert = LAYOUTS[name]
    padded = math.ceil(hf.vocab_size / (8 * tensor)) * 8 * tensor
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, data=data, expert=expert, sequence_parallel=True)
    found = build_and_check(hf, parallel, data, padded, known_tensors(name, find_model(name)))
    assert found.shards == tensor * pipeline * expert
    assert 2 * found.elements == TOTALS[name]["total_size"]
    assert found.index is not None


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("coverage") / "model", vocab_size=250)


def _check(folder: Path, tensor: int = 2, pipeline: int = 2) -> coverage.Coverage:
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    return build_and_check(load_hf_config(folder), parallel, 1, 272, known_tensors(str(folder), folder))


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_a_tied_model_with_a_padded_vocabulary_is_covered(tiny: Path, tensor: int, pipeline: int) -> None:
    found = _check(tiny, tensor, pipeline)
    assert found.index == "its safetensors"
    assert found.shards == tensor * pipeline


def _with_rows(monkeypatch: pytest.MonkeyPatch, change: Callable[[ParamMapping], ParamMapping | None]) -> None:
    """Llama's table with one row changed, or left out."""
    layer = tuple(row for row in map(change, LLAMA.layer) if row is not None)
    monkeypatch.setitem(FAMILIES, "LlamaForCausalLM", dataclasses.replace(LLAMA, layer=layer))


def _is(row: ParamMapping, name: str) -> bool:
    return row.megatron[0].endswith(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: None if _is(row, "linear_fc2.weight") else row, "have no place in the model"),
        (
            lambda row: dataclasses.replace(row, shard=TPSharding.REPLICATED) if _is(row, "linear_fc2.weight") else row,
            "has shape",
        ),
        (
            lambda row: dataclasses.replace(
                row, hf_tensors={k.replace("o_proj", "out"): v for k, v in row.hf_tensors.items()}
            ),
            "have no place in the model",
        ),
        (
            lambda row: (
                dataclasses.replace(row, hf_tensors={k: v[::-1] for k, v in row.hf_tensors.items()})
                if len(row.hf_tensors) == 1
                else row
            ),
            "has shape",
        ),
    ],
    ids=["row missing", "wrong shard", "wrong name", "shape turned round"],
)
def test_a_wrong_row_of_the_table_is_found(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[ParamMapping], ParamMapping | None], message: str
) -> None:
    _with_rows(monkeypatch, change)
    with pytest.raises(WeightsError, match=message):
        _check(tiny)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": 0}, "is not held exactly once"),
        ({"offset": 0}, "filled exactly once"),
        (
            {"length": lambda piece: piece.length // 2, "width": lambda piece: piece.width // 2},
            "filled exactly once",
        ),
        ({"length": lambda piece: piece.length - 1}, "does not fill"),
    ],
    ids=["slice twice", "place twice", "half", "uneven"],
)
def test_a_wrong_piece_is_found(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    real = weights_plan.ShardingTable.pieces

    def wrong(self: Any, entry: Any, layout: Any, tp_rank: int) -> list[weights_plan.ShardSlice]:
        pieces = real(self, entry, layout, tp_rank)
        if entry.shard is not TPSharding.QKV or tp_rank == 0:
            return pieces
        values = {name: value(pieces[1]) if callable(value) else value for name, value in changes.items()}
        return [pieces[0], dataclasses.replace(pieces[1], **values), *pieces[2:]]

    monkeypatch.setattr(weights_plan.ShardingTable, "pieces", wrong)
    with pytest.raises(WeightsError, match=message):
        _check(tiny)


def test_a_rank_that_is_missing_is_found(tiny: Path) -> None:
    from opd_megatron.mcore.meta_shards import distinct_shards

    hf = load_hf_config(tiny)
    shards = list(distinct_shards(hf, ParallelConfig(tensor=2, pipeline=2), 1, 272))
    assert all(parameter.is_meta for module, _ in shards for parameter in module.parameters()), "nothing is stored"
    for left_out in range(len(shards)):
        with pytest.raises(WeightsError, match="not held exactly once"):
            check_coverage(hf, shards[:left_out] + shards[left_out + 1 :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: names | {"model.extra.weight": None}, "1 tensors of index .*model.extra.weight"),
        (lambda names: {k: v for k, v in names.items() if "norm" not in k}, "index lacks 9 tensors"),
        (lambda names: names | {"model.norm.weight": (65,)}, "has shape .65. in index, .64. here"),
    ],
)
def test_names_left_over_on_either_side_and_other_shapes_are_found(
    tiny: Path, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    names, _ = known_tensors(str(tiny), tiny) or ({}, "")
    with pytest.raises(WeightsError, match=message):
        build_and_check(load_hf_config(tiny), ParallelConfig(tensor=2), 1, 272, (change(dict(names)), "index"))
