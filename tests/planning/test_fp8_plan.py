"""`plan` with FP8: what is held and how long a step takes, and a GPU that has no units for it."""

from __future__ import annotations

from typing import Any

import pytest

from opd_megatron.cli import main
from opd_megatron.config import load_config
from opd_megatron.models.sizes import RunSizes
from opd_megatron.planning.gpus import gpu_named
from opd_megatron.planning.memory import rank_memory
from opd_megatron.planning.published import find_model
from opd_megatron.planning.timing import step_seconds
from opd_megatron.planning.traffic import traffic
from opd_megatron.run.checks import check_run

MODEL = "Qwen/Qwen2.5-7B"
WORDS = [
    f"student.path={MODEL}", f"teachers.0.path={MODEL}", "parallel.data=8", "rollout.prompts_per_step=64",
    "data.source=prompts.jsonl", "student.dtype=bf16", "teachers.0.dtype=bf16", "rollout.dtype=bf16",
    "rollout.max_new_tokens=4096",
]  # fmt: skip
PARAMETERS = 7.6e9


def _planned(*words: str) -> tuple[dict[str, float], dict[str, float]]:
    """(bytes by what they are for, seconds by phase) on an H100."""
    config = load_config(None, [*WORDS, *words])
    sizes = RunSizes(config, check_run(config, find_model))
    memory = rank_memory(sizes, 0, gpu=True, device_bytes=gpu_named("H100").memory_bytes)
    return memory.parts, step_seconds(sizes, traffic(sizes), gpu_named("H100"))


@pytest.fixture(scope="module")
def bf16() -> Any:
    return _planned()


def test_products_in_fp8_take_less_time_and_room_for_activations_and_copies_of_weights(bf16: Any) -> None:
    memory, seconds = _planned("precision.fp8=hybrid")
    before, slower = bf16
    assert 0.5 < seconds["student"] / slower["student"] < 0.8
    assert 0.6 < memory["activations"] / before["activations"] < 0.95
    assert 1.4 < (memory["weights"] - before["weights"]) / PARAMETERS < 2.0, "two copies of a byte, of the layers"
    assert memory["optimizer"] == before["optimizer"]
    assert seconds["rollout"] == slower["rollout"]


def test_weights_in_fp8_are_no_more_than_those_of_bf16_and_a_frozen_teachers_half(bf16: Any) -> None:
    memory, _ = _planned("precision.fp8=hybrid", "precision.param=true")
    assert memory["weights"] == bf16[0]["weights"], "a byte forward and one backward"
    words = ["teachers.0.precision.fp8=hybrid", "teachers.0.precision.param=true"]
    teacher = _planned(*words)[0]["teachers"] / bf16[0]["teachers"]
    assert 0.5 < teacher < 0.65


def test_a_gpu_without_the_units_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "precision.fp8=e4m3", "precision.recipe=mxfp8"]
    assert main(["plan", "configs/gkd_gsm8k.yaml", "--gpu", "H100", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "recipe=mxfp8 needs a GPU of compute capability 10.0, H100 has 9.0" in error
