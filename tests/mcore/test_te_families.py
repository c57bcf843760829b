"""Every family is built of Transformer Engine layers (of a stand-in for it) as of plain ones: names, steps, export."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.mcore.one_step import CLOSE
from tests.stubs.with_te import run_with_te
from tests.tiny_models import save_tiny

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="the real one is installed"
)
FAMILIES = ("llama", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe")
LAYOUTS: dict[str, dict[str, Any]] = {"SP2": {"tensor": 2, "sequence_parallel": True}}


def steps_of(folder: str) -> dict[str, Any]:
    """A packed step of every family, with each kind of layers, and whether what was loaded comes out again."""
    import torch.distributed as dist
    from safetensors.torch import load_file

    from tests.mcore.one_step import LENGTHS, Run

    root, found = Path(folder), {}
    for family in FAMILIES:
        pair, source = (root / family, root / "teacher"), load_file(root / family / "model.safetensors")
        of_kind: dict[str, Any] = {}
        for kind in ("on", "off"):
            run = Run(pair, LAYOUTS["SP2"], 64, **{"student.transformer_engine": kind})
            loaded = run.weights()
            names = sorted(name for name, _ in run.student.model.named_parameters())
            exact = all(torch.equal(loaded[name], source[name]) for name in loaded)
            _, (metrics, tokens) = run.step(LENGTHS)
            weights = {name: float(value.double().norm()) for name, value in run.weights().items()}
            of_kind[kind] = {
                "exact": exact, "missing": sorted(source.keys() - loaded.keys()), "names": names,
                "metrics": metrics, "tokens": tokens, "weights": weights, "evaluated": run.evaluated(LENGTHS[:5]),
                "fused": [type(each).__module__.split(".")[0] for each in run.student.model.modules()],
            }  # fmt: skip
            dist.destroy_process_group()
        found[family] = of_kind
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("models")
    save_tiny(root / "teacher", seed=2, num_hidden_layers=2)
    for family in FAMILIES:
        save_tiny(root / family, family, seed=1, num_hidden_layers=2)
    result: dict[str, Any] = run_with_te(2, f"{__name__}.steps_of", root)
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_its_layers_is_that_of_plain_ones(found: dict[str, Any], family: str) -> None:
    te, plain = found[family]["on"], found[family]["off"]
    assert te["tokens"] == plain["tokens"]
    for part in ("metrics", "evaluated"):
        # A mean of differences that cancel (k1, its gap) has rounding of its own.
        assert te[part] == pytest.approx(plain[part], rel=CLOSE["rel"], abs=1e-6)
    assert te["weights"] == pytest.approx(plain["weights"], rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_loaded_comes_out_again_bit_for_bit(found: dict[str, Any], family: str) -> None:
    for kind in ("on", "off"):
        assert found[family][kind]["exact"]
        assert found[family][kind]["missing"] in ([], ["lm_head.weight"])


def test_its_layers_are_its_own(found: dict[str, Any]) -> None:
    for family in FAMILIES:
        names = found[family]["on"]["names"]
        assert any("linear_qkv.layer_norm_weight" in name for name in names)
        assert not any("input_layernorm" in name for name in names)
