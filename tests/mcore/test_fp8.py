"""FP8 of a stand-in for Transformer Engine: products alone change arithmetic and nothing else; weights in FP8 are
filled, trained, saved and exported through their fp32 main weights."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.stubs.with_te import run_with_te
from tests.tiny_models import save_tiny

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="the real one is installed"
)
STAGES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "products": {"precision.fp8": "hybrid"},
    "weights": {"precision.fp8": "hybrid", "precision.param": "true"},
    "e4m3 blockwise": {"precision.fp8": "e4m3", "precision.recipe": "blockwise", "precision.first_last_bf16": 0},
    "mxfp8": {"precision.fp8": "e4m3", "precision.recipe": "mxfp8"},
}
FAMILIES = ("llama", "qwen3_moe")
STEP = 2.0**-3
"""Of e4m3, relative: three bits of mantissa."""


def _run(root: Path, family: str, settings: dict[str, Any], tokens: int = 64) -> Any:
    from opd_megatron.mcore.cpu.platform import device
    from tests.mcore.one_step import Run

    layout = {"data": 2} | ({"expert": 2} if "moe" in family else {})
    kinds = {"student.transformer_engine": "on", "student.dtype": "bf16", "teachers.0.dtype": "bf16"}
    run = Run((root / family, root / "teacher"), layout, tokens, **kinds, **settings)
    run.builder = replace(run.builder, multiple_of=run.config.micro_batch_multiple, device=device())
    return run


def _described(run: Any) -> dict[str, Any]:
    """Names, shapes and kinds of parameters and of the optimizer's main weights."""
    import torch.distributed as dist

    from opd_megatron.weights.quantized import is_quantized

    model = dict(run.student.model.named_parameters())
    mains = [
        main for part in run.student.optimizer.chained_optimizers for group in part.optimizer.param_groups
        for main in group["params"]
    ]  # fmt: skip
    total = torch.stack([main.double().abs().sum() for main in mains]).sum()
    dist.all_reduce(total)
    return {
        "shapes": {name: list(each.shape) for name, each in model.items()},
        "dtypes": sorted({str(each.dtype) for each in model.values()}),
        "quantized": sorted(name for name, each in model.items() if is_quantized(each)),
        "mains": sorted(len(main) for main in mains),
        "sum of mains": float(total),
        "main dtypes": sorted({str(main.dtype) for main in mains}),
    }


def of_stages(folder: str) -> dict[str, Any]:
    """Every stage of every family: what it is made of, what comes out of it, how it trains and resumes."""
    import torch.distributed as dist
    from safetensors.torch import load_file

    from opd_megatron.mcore.checkpoint import CheckpointSaver, checkpoint_path, load_checkpoint
    from tests.mcore.one_step import LENGTHS

    root, found = Path(folder), {}
    for family in FAMILIES:
        source = load_file(root / family / "model.safetensors")
        for stage, settings in STAGES.items():
            if "moe" in family and stage not in ("bf16", "products", "weights"):
                continue
            run = _run(root, family, settings)
            row = _described(run)
            weights = run.weights()
            errors = (
                float(((value - source[name].bfloat16()).float().abs() / source[name].abs().max()).max())
                for name, value in weights.items()
            )
            row["export error"] = max(errors, default=0.0)  # the other replica exports nothing
            row["first"] = run.step(LENGTHS)[1][0]
            saver = CheckpointSaver(root / f"{family} {stage}", asynchronous=False)
            saver.save(1, run.student, {"policy_version": 1})
            saver.finish()
            row["second"] = run.step(LENGTHS, seed=5)[1][0]
            row["evaluated"] = run.evaluated(LENGTHS[:5])
            row["trained"] = {name: float(value.double().norm()) for name, value in run.weights().items()}
            dist.destroy_process_group()
            again = _run(root, family, settings)
            load_checkpoint(checkpoint_path(root / f"{family} {stage}", 1), again.student)
            row["resumed"] = again.step(LENGTHS, seed=5)[1][0]
            dist.destroy_process_group()
            found[f"{family} {stage}"] = row
    for stage, other in (("products", "weights"), ("weights", "bf16"), ("bf16", "weights")):
        again = _run(root, "llama", STAGES[other])
        load_checkpoint(checkpoint_path(root / f"llama {stage}", 1), again.student)
        found[f"{stage} as {other}"] = again.step(LENGTHS, seed=5)[1][0]
        dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    save_tiny(root / "teacher", seed=2, num_hidden_layers=2)
    for family in FAMILIES:
        save_tiny(root / family, family, seed=1, **sizes)
    result: dict[str, Any] = run_with_te(2, f"{__name__}.of_stages", root, timeout=400)
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_products_in_fp8_change_no_name_shape_or_weight(found: dict[str, Any], family: str) -> None:
    plain, fp8 = found[f"{family} bf16"], found[f"{family} products"]
    for key in ("shapes", "dtypes", "mains", "main dtypes", "sum of mains", "export error"):
        assert fp8[key] == plain[key], key
    assert fp8["quantized"] == []
    assert fp8["export error"] == 0
    assert fp8["first"]["loss"] != plain["first"]["loss"]
    assert fp8["first"]["loss"] == pytest.approx(plain["first"]["loss"], rel=0.1)


@pytest.mark.parametrize("case", ["llama products", "qwen3_moe products", "llama e4m3 blockwise", "llama mxfp8"])
def test_a_run_with_fp8_products_is_resumed_bit_for_bit(found: dict[str, Any], case: str) -> None:
    assert found[case]["resumed"] == found[case]["second"]


@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_weights_are_those_of_products_but_in_the_first_and_last_layer(found: dict[str, Any], family: str) -> None:
    plain, fp8 = found[f"{family} bf16"], found[f"{family} weights"]
    assert fp8["shapes"] == plain["shapes"]
    middle = {name for name in plain["shapes"] if ".layers.1." in name or ".layers.2." in name}
    products = {name for name in middle if "linear_" in name and "layer_norm" not in name and "router" not in name}
    assert {*fp8["quantized"]} == products


@pytest.mark.parametrize("family", FAMILIES)
def test_main_weights_are_what_was_loaded_and_not_fp8_numbers(found: dict[str, Any], family: str) -> None:
    plain, fp8 = found[f"{family} bf16"], found[f"{family} weights"]
    assert fp8["main dtypes"] == ["torch.float32"]
    assert fp8["sum of mains"] == pytest.approx(plain["sum of mains"], rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_weights_come_out_within_a_step_of_fp8(found: dict[str, Any], family: str) -> None:
    assert 0 < found[f"{family} weights"]["export error"] <= STEP / 2
    trained, plain = found[f"{family} weights"]["trained"], found[f"{family} products"]["trained"]
    assert trained == pytest.approx(plain, rel=STEP)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_with_fp8_weights_is_resumed_from_its_main_weights(found: dict[str, Any], family: str) -> None:
    row = found[f"{family} weights"]
    assert row["resumed"] == row["second"]
    assert row["second"]["loss"] == pytest.approx(found[f"{family} bf16"]["second"]["loss"], rel=0.1)


def test_checkpoints_cross_fp8_both_ways(found: dict[str, Any]) -> None:
    for stage, other in (("products", "weights"), ("weights", "bf16"), ("bf16", "weights")):
        expected = found[f"llama {other}"]["second"]["loss"]
        assert found[f"{stage} as {other}"]["loss"] == pytest.approx(expected, rel=0.1)
