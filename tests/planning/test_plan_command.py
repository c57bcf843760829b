"""`opd-megatron plan`: finds models without weights, says what fits, suggests what would, writes JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd_megatron import cli
from opd_megatron.config import load_config
from opd_megatron.models.sizes import RunSizes
from opd_megatron.planning.gpus import GPUS, gpu_named
from opd_megatron.planning.layouts import suggestions, usable
from opd_megatron.planning.published import find_model, published_models
from opd_megatron.planning.run_plan import make_plan
from opd_megatron.run.checks import check_run
from opd_megatron.weights.hf_reader import load_hf_config
from tests.tiny_models import save_tiny

CONFIG = Path(__file__).parents[2] / "configs" / "qwen2.5_7b_from_72b.yaml"


@pytest.fixture(autouse=True)
def plainly_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["plan", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("opd-megatron: error: ")
    assert error.count("\n") == 1
    return error


def test_7b_from_72b_on_64_gpus_of_80_gb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    assert cli.main(["plan", str(CONFIG), "--gpu", "h100", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    tree = json.loads(path.read_text())
    assert "64 = tensor 4 x pipeline 2 x data 8" in printed
    assert "fits" in printed
    assert tree["fits"]
    models = tree["models"]
    assert models["Qwen/Qwen2.5-72B-Instruct"]["elements"] == 72_706_203_648
    assert models["Qwen/Qwen2.5-7B-Instruct"]["elements"] == 7_615_616_512
    assert {stage["stage"] for stage in tree["stages"]} == {0, 1}
    for stage in tree["stages"]:
        in_turns = max(sum(stage["bytes"].values()), stage["resident_bytes"] + stage["engine_bytes"])
        assert stage["peak_bytes"] == pytest.approx(in_turns)
        assert stage["activation_bytes"]["recomputed"] < stage["activation_bytes"]["kept"]
    # bf16 weights of the 72B model over tensor 4 x pipeline 2.
    held = sum(stage["bytes"]["teachers"] + stage["bytes"]["teacher heads"] for stage in tree["stages"])
    assert held == pytest.approx(2 * 72_706_203_648 / 4, rel=0.001)
    assert tree["seconds"].pop("expert transfers") == 0, "dense models send no tokens to experts"
    assert all(seconds > 0 for seconds in tree["seconds"].values())
    assert tree["engines"] == 64
    for word in ("64 engines", "weight sync", "assumed", "rollout engine", "teacher states"):
        assert word in printed


def test_a_layout_that_does_not_fit_is_refused_with_layouts_that_do(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["parallel.tensor=1", "parallel.pipeline=1", "parallel.data=64", "parallel.sequence_parallel=false"]
    error = refused(capsys, str(CONFIG), "--gpu", "H100", *overrides)
    assert "try parallel.tensor=" in error
    plan = make_plan(load_config(CONFIG, overrides), gpu_named("H100"))
    assert not plan.fits
    assert plan.suggestions
    for suggestion in plan.suggestions:  # what is suggested is a configuration, and it fits
        again = make_plan(
            load_config(CONFIG, [*overrides, *(f"{key}={value}" for key, value in suggestion.overrides.items())]),
            gpu_named("H100"),
        )
        assert again.fits
        assert again.sizes.ranks == 64
        assert again.peak.peak == pytest.approx(suggestion.peak)
    assert [s.seconds for s in plan.suggestions] == sorted(s.seconds for s in plan.suggestions)


def test_experts_may_be_shared_out_where_they_do_not_fit() -> None:
    model = "Qwen/Qwen3-30B-A3B"
    config = load_config(
        None,
        [f"student.path={model}", f"teachers.0.path={model}", "parallel.data=8", "rollout.prompts_per_step=64",
         "data.source=prompts.jsonl", "student.dtype=bf16", "teachers.0.dtype=bf16", "rollout.dtype=bf16"],
    )  # fmt: skip
    found = suggestions(RunSizes(config, check_run(config, find_model)), gpu_named("H200"), limit=100)
    assert any(suggestion.overrides.get("parallel.expert", 1) > 1 for suggestion in found)
    assert len({str(suggestion) for suggestion in found}) == len(found)


def test_where_nothing_fits_more_ranks_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["parallel.data=1", "parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence_parallel=false"]
    assert "use more ranks" in refused(capsys, str(CONFIG), "--gpu", "A100-80G", *overrides)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parallel.tensor=8", ("parallel.tensor=8", "28 attention heads", "[1, 2, 4]")),
        ("parallel.pipeline=3", ("parallel.pipeline=3", "28 layers", "use one of")),
        ("student.path=nobody/nothing", ("nobody/nothing",)),
    ],
)
def test_a_broken_rule_names_the_choices(
    override: str, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, str(CONFIG), override)
    assert all(word in error for word in words), error


def test_a_folder_with_nothing_but_a_config_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_tiny(tmp_path / "whole")
    bare = tmp_path / "configs" / "someone" / "model"
    bare.mkdir(parents=True)
    (bare / "config.json").write_text((source / "config.json").read_text())
    lengths = ["data.max_prompt_tokens=64", "rollout.max_new_tokens=64"]
    for student, extra in ((bare, []), ("someone/model", ["--model-configs", str(tmp_path / "configs")])):
        assert cli.main(["plan", f"student.path={student}", f"teachers.0.path={source}", *lengths, *extra]) == 0
        printed = capsys.readouterr().out
        assert "no index to compare names with" in printed
        assert "names and shapes as in its safetensors" in printed


def test_an_index_without_its_files_is_compared_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_tiny(tmp_path / "whole")
    names = {"weight_map": {"model.norm.weight": "model-1.safetensors"}}
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps(names))
    lengths = ["data.max_prompt_tokens=64", "rollout.max_new_tokens=64"]
    capsys.readouterr()  # transformers' progress bar
    error = refused(capsys, f"student.path={source}", f"teachers.0.path={source}", *lengths)
    assert "model.safetensors.index.json lacks" in error


@pytest.mark.parametrize("name", published_models())
def test_every_published_config_is_read_by_transformers(name: str) -> None:
    hf = load_hf_config(find_model(name))
    assert hf.num_hidden_layers in (28, 48, 64, 80)
    assert not hf.tie_word_embeddings


@pytest.mark.parametrize("name", GPUS)
def test_a_plan_never_fills_a_gpu(name: str) -> None:
    gpu = gpu_named(name.upper())
    assert 0.9 * gpu.memory_bytes < usable(gpu) < gpu.memory_bytes
