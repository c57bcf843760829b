"""Stages with unlike numbers of layers, and several parts of the model on each, mean what one rank means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opd_megatron.weights.layout import layers_of_parts
from tests.mcore.one_step import CLOSE, LENGTHS, agree, go_on, one_step, ranks_of, save_after_a_step
from tests.ranks import run_ranks
from tests.tiny_models import save_tiny

VIRTUAL = {"pipeline": 2, "virtual_stages": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "uneven": {"pipeline": 2},
    "chosen": {"pipeline": 2, "stages": "[1,4]"},
    "three": {"pipeline": 3, "stages": "[1,3,1]"},
    "virtual": VIRTUAL,
    "virtual chosen": {**VIRTUAL, "stages": "[1,1,1,2]"},
    "virtual TP2": {**VIRTUAL, "tensor": 2},
    "virtual SP2": {**VIRTUAL, "tensor": 2, "sequence_parallel": True},
    "virtual DP2": {**VIRTUAL, "data": 2},
    "virtual CP2": {**VIRTUAL, "context": 2},
    "virtual EP2": {**VIRTUAL, "data": 2, "expert": 2},
    "uneven EP2": {"pipeline": 2, "data": 2, "expert": 2},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A student of five layers and a teacher of three, which the same stages share out otherwise."""
    root = tmp_path_factory.mktemp("models")
    teacher = save_tiny(root / "teacher", seed=2, num_hidden_layers=3)
    made: dict[str, Path] = {}

    def of(family: str) -> tuple[Path, Path]:
        if family not in made:
            made[family] = save_tiny(root / family, family, seed=1, num_hidden_layers=5)
        return made[family], teacher

    return of


@pytest.fixture(scope="module")
def alone(pair: Callable[[str], tuple[Path, Path]]) -> Callable[[str, list[int]], Any]:
    """The same step on one rank."""
    known: dict[str, Any] = {}

    def of(family: str, lengths: list[int]) -> Any:
        key = f"{family} {lengths}"
        if key not in known:
            known[key] = run_ranks(1, one_step, pair(family), {}, None, lengths, {})[0]
        return known[key]

    return of


def test_layers_that_do_not_divide_count_embedding_and_head_as_layers() -> None:
    assert layers_of_parts(6, 3) == (2, 2, 2)
    assert layers_of_parts(6, 4) == (1, 2, 2, 1)
    assert layers_of_parts(5, 2) == (3, 2)
    assert layers_of_parts(28, 8) == (3, 4, 4, 4, 4, 4, 3, 2)
    assert layers_of_parts(5, 4) == (2, 1, 1, 1)  # nobody is left without a layer
    assert layers_of_parts(8, 2, virtual=2) == (2, 2, 2, 2)
    assert layers_of_parts(5, 2, chosen=[4, 1]) == (4, 1)
    assert all(sum(layers_of_parts(n, p)) == n for n in range(1, 40) for p in range(1, n + 1))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one" and "EP" not in name])
def test_any_stages_train_as_one_rank_does(
    pair: Callable[[str], tuple[Path, Path]], alone: Callable[[str, list[int]], Any], layout: str
) -> None:
    found = run_ranks(
        ranks_of(LAYOUTS[layout]), one_step, pair("llama"), LAYOUTS[layout], 64, LENGTHS, {}
    )  # fmt: skip
    agree(found[0], alone("llama", LENGTHS))


@pytest.mark.parametrize("layout", ["virtual EP2", "uneven EP2"])
def test_any_stages_of_experts_train_as_one_rank_does(
    pair: Callable[[str], tuple[Path, Path]], alone: Callable[[str, list[int]], Any], layout: str
) -> None:
    found = run_ranks(4, one_step, pair("qwen3_moe"), LAYOUTS[layout], 64, LENGTHS, {})
    agree(found[0], alone("qwen3_moe", LENGTHS))


def test_fewer_packs_than_stages_are_filled_up_with_empty_ones(
    pair: Callable[[str], tuple[Path, Path]], alone: Callable[[str, list[int]], Any]
) -> None:
    few = [9, 4, 6]
    found = run_ranks(2, one_step, pair("llama"), VIRTUAL, 1000, few, {})
    assert found[0][0] == 2
    agree(found[0], alone("llama", few))


@pytest.mark.parametrize(("saved", "resumed"), [
    ("virtual", "virtual"), ("virtual chosen", "one"), ("one", "virtual TP2"), ("uneven", "chosen"),
    ("virtual DP2", "three"),
])  # fmt: skip
def test_a_checkpoint_goes_on_in_other_stages(
    pair: Callable[[str], tuple[Path, Path]], tmp_path: Path, saved: str, resumed: str
) -> None:
    before, after = LAYOUTS[saved], LAYOUTS[resumed]
    (metrics, tokens) = run_ranks(ranks_of(before), save_after_a_step, pair("llama"), before, tmp_path)[0]
    (path,) = [each for each in tmp_path.iterdir() if each.is_dir()]
    (found, their_tokens) = run_ranks(ranks_of(after), go_on, pair("llama"), after, path)[0]
    assert their_tokens == tokens
    assert found == pytest.approx(metrics, **CLOSE)
