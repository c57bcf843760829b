"""What of FP8 and Transformer Engine cannot work is one line, before any model is built."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from opd_megatron.cli import main
from opd_megatron.config import RunConfig, load_config
from opd_megatron.errors import ConfigError
from opd_megatron.mcore import te
from opd_megatron.run.checks import check_run
from tests.tiny_models import save_tiny


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2}
    return save_tiny(root / "student", **sizes), save_tiny(root / "teacher", **sizes)


def _config(pair: tuple[Path, Path], *words: str) -> RunConfig:
    settings = [
        "data.max_prompt_tokens=100",
        "rollout.max_new_tokens=50",
        "student.dtype=bf16",
        "teachers.0.dtype=bf16",
    ]
    return load_config(None, [f"student.path={pair[0]}", f"teachers.0.path={pair[1]}", *settings, *words])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["precision.fp8=e5m2"], ["precision.fp8", "e4m3"]),
        (["precision.fp8=hybrid", "precision.recipe=delayed"], ["recipe=delayed", "group", "tensorwise"]),
        (["precision.fp8=hybrid", "student.dtype=fp32"], ["precision.fp8=hybrid", "dtype=bf16", "fp32"]),
        (
            ["precision.fp8=hybrid", "student.transformer_engine=off"],
            ["precision.fp8=hybrid", "student.transformer_engine=off"],
        ),
        (["precision.param=true"], ["param=true", "without fp8"]),
        (["precision.recipe=mxfp8"], ["recipe=mxfp8", "without fp8"]),
        (["rollout.quantization=fp8", "rollout.engine=torch"], ["rollout.quantization=fp8", "vllm"]),
        (["student.recompute=true", "student.recompute_modules=[mlp]"], ["recompute_modules=['mlp']"]),
        (["student.recompute_layers=2"], ["recompute_layers=2", "student.recompute=true"]),
        (["student.offload_activations=[attn_proj]"], ["attn_proj", "core_attn"]),
        (["student.recompute=true", "student.offload_activations=[core_attn]"], ["offload_activations"]),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused_by_the_configuration(
    pair: tuple[Path, Path], words: list[str], parts: list[str]
) -> None:
    _refused(lambda: _config(pair, *words), parts)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["precision.fp8=hybrid", "parallel.tensor=2", "student.dtype=bf16"],
            [],
        ),
        (
            ["precision.fp8=e4m3", "precision.recipe=mxfp8", "parallel.tensor=2"],
            ["multiples of 32", "16 key columns", "each of 2"],
        ),
        (["precision.fp8=hybrid", "precision.first_last_bf16=5"], ["first_last_bf16=5", "4 layers"]),
        (["teachers.0.precision.fp8=hybrid", "teachers.0.precision.first_last_bf16=5"], ["teachers.0.precision", "5"]),
        (["student.recompute_modules=[moe]"], ["recompute_modules names moe", "none"]),
        (["student.offload_activations=[expert_fc1]"], ["offload_activations names expert_fc1"]),
    ],
    ids=str,
)
def test_what_does_not_fit_a_model_names_the_number(
    pair: tuple[Path, Path], words: list[str], parts: list[str]
) -> None:
    config = _config(pair, *words)
    if not parts:
        check_run(config)
        return
    _refused(lambda: check_run(config), parts)


def test_recompute_of_experts_in_fp8_is_refused(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    experts = save_tiny(tmp_path / "experts", "qwen2_moe", hidden_size=64, shared_expert_intermediate_size=48)
    config = _config((experts, pair[1]), "precision.fp8=hybrid", "student.recompute_modules=[moe]")
    _refused(lambda: check_run(config), ["recompute_modules=['moe']", "precision.fp8=hybrid"])


@pytest.mark.parametrize(
    ("words", "capability", "missing", "parts"),
    [
        (["precision.fp8=hybrid"], None, None, ["precision.fp8=hybrid needs a GPU"]),
        (["teachers.0.precision.fp8=e4m3"], None, None, ["teachers.0.precision.fp8=e4m3 needs a GPU"]),
        (["precision.fp8=hybrid"], (9, 0), "it is not installed", ["needs Transformer Engine", "EXTRAS=vllm,te,dev"]),
        (["precision.fp8=hybrid"], (8, 0), None, ["recipe=tensorwise needs", "8.9", "has 8.0"]),
        (["precision.fp8=e4m3", "precision.recipe=mxfp8"], (9, 0), None, ["mxfp8", "10.0", "has 9.0", "tensorwise"]),
        (["precision.fp8=e4m3", "precision.recipe=blockwise"], (8, 9), None, ["blockwise", "9.0", "tensorwise"]),
        (["student.transformer_engine=on"], (9, 0), "it fails to import (libcudnn)", ["=on", "libcudnn"]),
        (["student.offload_activations=[core_attn]"], None, None, ["offload_activations", "needs a GPU"]),
        (["student.recompute_modules=[layernorm]"], None, None, ["layernorm needs layers of Transformer Engine"]),
        (["rollout.quantization=fp8"], None, None, ["rollout.quantization=fp8 needs a GPU"]),
    ],
    ids=str,
)
def test_what_a_machine_lacks_is_named(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, words: list[str], capability: Any, missing: str | None,
    parts: list[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(te, "capability", lambda: capability)
    monkeypatch.setattr(te, "why_missing", lambda: missing)
    _refused(lambda: te.check_machine(_config(pair, *words)), parts)


def test_a_machine_that_has_everything_is_let_by(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(te, "capability", lambda: (10, 0))
    monkeypatch.setattr(te, "why_missing", lambda: None)
    words = [
        "precision.fp8=e4m3",
        "precision.recipe=mxfp8",
        "student.transformer_engine=on",
        "rollout.quantization=fp8",
    ]
    te.check_machine(_config(pair, *words))


@pytest.fixture
def _forgets() -> Iterator[None]:
    te.why_missing.cache_clear()
    yield
    te.why_missing.cache_clear()


@pytest.mark.usefixtures("_forgets")
@pytest.mark.parametrize(("error", "said"), [
    (ModuleNotFoundError("No module named 'transformer_engine'", name="transformer_engine"), "not installed"),
    (ImportError("libcudnn.so.9: cannot open shared object file"), "fails to import (ImportError: libcudnn.so.9"),
    (RuntimeError("CUDA driver is too old"), "fails to import (RuntimeError: CUDA driver is too old"),
])  # fmt: skip
def test_an_installation_that_is_broken_is_told_from_none(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    from megatron.core.extensions import transformer_engine as extension

    real = builtins.__import__

    def broken(name: str, *arguments: Any, **others: Any) -> Any:
        if name.split(".")[0] == "transformer_engine":
            raise error
        return real(name, *arguments, **others)

    monkeypatch.setattr(extension, "HAVE_TE", False)
    monkeypatch.setattr(te.importlib, "import_module", lambda name: broken(name))
    reason = te.why_missing()
    assert reason is not None
    assert said in reason


def test_a_run_that_asks_for_fp8_on_a_cpu_ends_in_one_line(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.e2e.runs import make_inputs, small_config

    config = small_config(make_inputs(tmp_path), tmp_path / "run", **{"student.dtype": "bf16"})
    capsys.readouterr()
    from opd_megatron.config import dump_config

    (tmp_path / "config.yaml").write_text(dump_config(config))
    try:
        assert main(["train", str(tmp_path / "config.yaml"), "precision.fp8=hybrid"]) == 2
    finally:
        if dist.is_initialized():  # as the command's own process would at its end
            dist.destroy_process_group()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "precision.fp8=hybrid needs a GPU" in error


def _refused(action: Any, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
