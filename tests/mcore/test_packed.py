"""Packed micro batches mean what padded ones mean, in every family and layout, also where a rank has no tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.mcore.one_step import CLOSE, LENGTHS, agree, go_on, one_step, ranks_of, save_after_a_step
from tests.ranks import run_ranks
from tests.tiny_models import save_tiny

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {}, "TP2": {"tensor": 2}, "SP2": {"tensor": 2, "sequence_parallel": True}, "PP2": {"pipeline": 2},
    "DP2": {"data": 2}, "EP2": {"data": 2, "expert": 2}, "TP2 PP2": {"tensor": 2, "pipeline": 2},
    "SP2 DP2": {"tensor": 2, "sequence_parallel": True, "data": 2}, "PP2 DP2": {"pipeline": 2, "data": 2},
    "PP2 EP2": {"pipeline": 2, "data": 2, "expert": 2}, "SP2 EP2": {
        "tensor": 2, "sequence_parallel": True, "data": 2, "expert": 2,
    },
    "CP2": {"context": 2}, "CP4": {"context": 4}, "CP2 TP2": {"context": 2, "tensor": 2},
    "CP2 SP2": {"context": 2, "tensor": 2, "sequence_parallel": True}, "CP2 PP2": {"context": 2, "pipeline": 2},
    "CP2 DP2": {"context": 2, "data": 2}, "CP2 EP2": {"context": 2, "expert": 2},
    "CP2 DP2 EP4": {"context": 2, "data": 2, "expert": 4},
    "SP2 EP2 whole": {"tensor": 2, "sequence_parallel": True, "expert": 2, "expert_tensor": 1},
    "SP2 DP2 EP4 whole": {"tensor": 2, "sequence_parallel": True, "data": 2, "expert": 4, "expert_tensor": 1},
    "SP2 PP2 EP2 whole": {"tensor": 2, "sequence_parallel": True, "pipeline": 2, "expert": 2, "expert_tensor": 1},
    "CP2 EP2 TP2": {
        "context": 2, "expert": 2, "tensor": 2, "sequence_parallel": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    families = ("llama", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe")
    made = {family: save_tiny(root / family, family, seed=1, num_hidden_layers=2) for family in families}
    return made | {"teacher": save_tiny(root / "teacher", seed=2, num_hidden_layers=2)}


def _compare(
    models: dict[str, Path], family: str, layout: str, tokens: int = 64, lengths: list[int] = LENGTHS, **objective: Any
) -> list[Any]:
    pair = models[family], models["teacher"]
    expected = run_ranks(1, one_step, pair, {}, None, lengths, objective)[0]
    found = run_ranks(ranks_of(LAYOUTS[layout]), one_step, pair, LAYOUTS[layout], tokens, lengths, objective)
    assert len({count for count, *_ in found}) == 1, "every rank has equally many micro batches"
    agree(found[0], expected)
    return found


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen2_moe", "qwen3_moe"])
def test_packed_equals_padded_for_every_family(models: dict[str, Path], family: str) -> None:
    _compare(models, family, "one")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "EP" not in name])
def test_packed_equals_padded_in_every_layout(models: dict[str, Path], layout: str) -> None:
    _compare(models, "llama", layout)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "EP" in name])
def test_packed_experts_equal_padded_ones(models: dict[str, Path], layout: str) -> None:
    _compare(models, "qwen3_moe", layout)


@pytest.mark.parametrize("layout", ["DP2", "SP2 DP2", "PP2 DP2"])
def test_a_rank_with_fewer_sequences_than_micro_batches_runs_empty_ones(models: dict[str, Path], layout: str) -> None:
    found = _compare(models, "llama", layout, tokens=40, lengths=[36, 10, 11, 12, 13, 14, 15, 16, 9])
    assert found[0][0] > 1


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@pytest.mark.parametrize("layout", ["one", "CP2", "CP2 SP2"])
def test_ratios_of_sequences_are_those_of_their_own_tokens(
    models: dict[str, Path], layout: str, ratio_level: str
) -> None:
    objective = {"objective.type": "on_policy_distill", "objective.ratio_level": ratio_level}
    _compare(models, "llama", layout, **objective)


def test_recompute_sees_the_same_packs(models: dict[str, Path]) -> None:
    _compare(models, "llama", "PP2", **{"student.recompute": "true"})


@pytest.mark.parametrize("layout", ["DP2", "CP2", "CP4", "CP2 DP2"])
def test_the_gradient_norm_does_not_depend_on_how_sequences_are_dealt(models: dict[str, Path], layout: str) -> None:
    """The loss of a step is L = sum_t w_t l_t / N over its N response tokens t, wherever they are.

    With D data- and C context-parallel ranks, rank r holds a set T_r of tokens; these sets are disjoint and hold every
    token once. A rank's backward pass is of L_r = sum over T_r of w_t l_t alone, not divided. A token's loss also
    depends on keys and values that other context-parallel ranks have computed: the reduce-scatter behind their
    all-gather brings each rank the gradient of its own keys and values from all of them, so that the parameters of
    rank r get g_r = sum over all t of w_t (dl_t / d what r computed) (d what r computed / d theta). Everything is
    computed by one rank, so sum_r g_r = d(sum_t w_t l_t) / d theta: the chain rule, split by where a step was done.
    The buffers are summed over data- and context-parallel ranks together (`dp_cp`), and divided once by N, which is
    counted over the same group: a context-parallel rank counts its own tokens alone. Neither D nor C is in the result,
    and the norm is of that one vector.
    """
    found = _compare(models, "llama", layout)
    norms = {metrics["grad_norm"] for _, (metrics, _), *_ in found}
    assert len(norms) == 1, "the same on every rank"


@pytest.mark.parametrize(("saved", "resumed"), [("SP2 DP2 EP4 whole", "one"), ("EP2", "SP2 EP2 whole")])
def test_a_checkpoint_goes_on_with_experts_dealt_otherwise(
    models: dict[str, Path], tmp_path: Path, saved: str, resumed: str
) -> None:
    pair, before, after = (models["qwen3_moe"], models["teacher"]), LAYOUTS[saved], LAYOUTS[resumed]
    (metrics, tokens) = run_ranks(ranks_of(before), save_after_a_step, pair, before, tmp_path)[0]
    (path,) = [each for each in tmp_path.iterdir() if each.is_dir()]
    (found, their_tokens) = run_ranks(ranks_of(after), go_on, pair, after, path)[0]
    assert their_tokens == tokens
    assert found == pytest.approx(metrics, **CLOSE)
