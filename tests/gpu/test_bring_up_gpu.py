"""On one, two and eight NVIDIA GPUs: layouts beside one GPU, Transformer Engine's layers beside plain ones, FP8."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
LAYOUTS = ("TP2 with SP", "PP2", "PP2, two parts a stage", "CP2", "DP")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        yield importlib.import_module("bring_up")


@pytest.fixture(scope="module")
def machine(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from opd_megatron.mcore import te

    found = script.Machine(
        torch.cuda.device_count(), torch.cuda.get_device_name(), te.why_missing() is None,
        (te.capability() or (0, 0)) >= (8, 9), True, tmp_path_factory.mktemp("bring up"),
    )  # fmt: skip
    found.deadline = time.monotonic() + 3600
    return found


@pytest.fixture(scope="module")
def alone(machine: Any) -> dict[str, Any]:
    found: dict[str, Any] = machine.measured("update", transformer_engine="off")
    return found


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_as_one_gpu_does(
    script: ModuleType, machine: Any, alone: dict[str, Any], layout: str, ranks: int
) -> None:
    if machine.gpus < ranks:
        pytest.skip(f"{machine.gpus} GPUs")
    layouts = script._bring_up_rank.layouts_of(ranks)
    name = next(each for each in layouts if each.startswith(layout))
    found = machine.measured("update", ranks, transformer_engine="off", layout=layouts[name])
    assert found["loss"] == pytest.approx(alone["loss"], rel=2e-2)


def test_its_layers_train_as_plain_ones_do(machine: Any, alone: dict[str, Any]) -> None:
    if not machine.has_te:
        pytest.skip("no Transformer Engine")
    assert machine.measured("update", transformer_engine="on")["loss"] == pytest.approx(alone["loss"], rel=2e-2)


@pytest.mark.parametrize("param", [False, True], ids=["products", "weights"])
def test_fp8_trains_nearly_alike_and_resumes(machine: Any, alone: dict[str, Any], param: bool) -> None:
    if not (machine.has_te and machine.fp8):
        pytest.skip("no FP8")
    settings = {"transformer_engine": "on", "fp8": "hybrid", "param": param}
    assert machine.measured("update", **settings)["loss"] == pytest.approx(alone["loss"], rel=0.1)
    assert machine.measured("resume", **settings)["difference"] == 0
