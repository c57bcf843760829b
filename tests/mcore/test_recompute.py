"""Every way to make activations again, or to recompute some of them, is the same step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.mcore.one_step import LENGTHS, agree, one_step, ranks_of
from tests.ranks import run_ranks
from tests.tiny_models import save_tiny

WAYS: dict[str, dict[str, Any]] = {
    "whole layers": {"student.recompute": "true"},
    "one layer": {"student.recompute": "true", "student.recompute_layers": 1},
    "attention": {"student.recompute_modules": "[core_attn]"},
    "feed-forward": {"student.recompute_modules": "[mlp]"},
    "both": {"student.recompute_modules": "[core_attn, mlp]"},
}
LAYOUTS: dict[str, dict[str, Any]] = {"one": {}, "PP2": {"pipeline": 2}, "CP2": {"context": 2}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    families = ("llama", "qwen3_moe", "qwen2_moe")
    made = {family: save_tiny(root / family, family, seed=1) for family in families}
    return made | {"teacher": save_tiny(root / "teacher", seed=2, num_hidden_layers=2)}


@pytest.fixture(scope="module")
def plain(models: dict[str, Path]) -> dict[str, Any]:
    return {
        family: run_ranks(1, one_step, (models[family], models["teacher"]), {}, 64, LENGTHS, {})[0]
        for family in ("llama", "qwen3_moe", "qwen2_moe")
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_made_again_is_what_it_was(
    models: dict[str, Path], plain: dict[str, Any], way: str, layout: str
) -> None:
    pair = models["llama"], models["teacher"]
    found = run_ranks(ranks_of(LAYOUTS[layout]), one_step, pair, LAYOUTS[layout], 64, LENGTHS, WAYS[way])
    agree(found[0], plain["llama"])


@pytest.mark.parametrize(
    ("family", "way"), [("qwen3_moe", "moe"), ("qwen2_moe", "moe"), ("qwen2_moe", "shared_experts")]
)
def test_experts_that_are_made_again_are_what_they_were(
    models: dict[str, Path], plain: dict[str, Any], family: str, way: str
) -> None:
    pair, settings = (models[family], models["teacher"]), {"student.recompute_modules": f"[{way}]"}
    agree(run_ranks(1, one_step, pair, {}, 64, LENGTHS, settings)[0], plain[family])
