"""`opd-megatron plan`: finds models without weights, says what fits, suggests what would, writes JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd_megatron import cli
from opd_megatron.config import decide_precision, load_config
from opd_megatron.models.lengths import AnswerLengths
from opd_megatron.models.sizes import RunSizes
from opd_megatron.planning.gpus import GPUS, gpu_named
from opd_megatron.planning.layouts import stage_memories, suggestions, usable
from opd_megatron.planning.published import find_model, published_models
from opd_megatron.planning.run_plan import make_plan
from opd_megatron.planning.timing import rollout_seconds, step_seconds
from opd_megatron.planning.traffic import traffic
from opd_megatron.run.checks import check_run
from opd_megatron.system.processor import BF16_GPU
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
    assert "32 = tensor 4 x pipeline 1 x data 8" in printed
    assert "ranks 32-63 on 4 nodes, 8 engines" in printed
    assert "fits" in printed
    assert tree["fits"]
    models = tree["models"]
    assert models["Qwen/Qwen2.5-72B-Instruct"]["elements"] == 72_706_203_648
    assert models["Qwen/Qwen2.5-7B-Instruct"]["elements"] == 7_615_616_512
    assert [stage["stage"] for stage in tree["stages"]] == [0]
    for stage in tree["stages"]:
        assert stage["engine_bytes"] == 0, "engines have GPUs of their own"
        assert stage["peak_bytes"] == pytest.approx(sum(stage["bytes"].values()))
        assert stage["activation_bytes"]["recomputed"] < stage["activation_bytes"]["kept"]
    # bf16 weights of the 72B model over tensor 4.
    held = sum(stage["bytes"]["teachers"] + stage["bytes"]["teacher heads"] for stage in tree["stages"])
    assert held == pytest.approx(2 * 72_706_203_648 / 4, rel=0.001)
    seconds = tree["seconds"]
    assert {name for name, value in seconds.items() if not value} == {
        "expert transfers", "pipeline transfers", "offload", "waiting for teachers",
    }  # fmt: skip
    assert tree["engines"] == 8
    assert tree["total_seconds"] < 8
    rest = sum(seconds.values()) - seconds["rollout"] - seconds["weight sync"]
    assert tree["total_seconds"] == pytest.approx(max(seconds["rollout"], rest) + seconds["weight sync"])
    for word in ("weight sync", "assumed", "sampled beside the rest", "teacher states", "checkpoint"):
        assert word in printed


def test_a_teacher_on_ranks_of_its_own_frees_the_students_and_is_planned_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = gpu_named("H100")
    own = ["rollout.hosts=16", "teachers.0.placement=own", "teachers.0.tensor=8", "teachers.0.data=2"]
    plan, before = make_plan(load_config(CONFIG, own), gpu), make_plan(load_config(CONFIG), gpu)
    assert plan.sizes.job_ranks == 64
    stage, there = plan.stages[0], before.stages[0]
    assert stage.parts["teachers"] == 0
    assert stage.parts["teacher heads"] == there.parts["teacher heads"]
    assert stage.parts["teacher states"] < there.parts["teacher states"]
    assert plan.seconds["teacher"] < 0.1 * before.seconds["teacher"], "the head alone"
    assert plan.seconds["waiting for teachers"] > 0
    path = tmp_path / "plan.json"
    assert cli.main(["plan", str(CONFIG), *own, "--gpu", "H100", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "teacher 0 ranks 32-47 on 2 nodes" in printed
    held = json.loads(path.read_text())["teacher_bytes"]["0"]
    assert held["weights"] == pytest.approx(2 * 72_706_203_648 / 8, rel=0.01)
    found = make_plan(load_config(CONFIG, own), gpu, suggest=True).suggestions
    assert found
    for suggestion in found:
        words = [f"{key}={value}" for key, value in suggestion.overrides.items()]
        assert make_plan(load_config(CONFIG, [*own, *words]), gpu).sizes.job_ranks == 64
    error = refused(capsys, str(CONFIG), *own[:2], "teachers.0.data=16", "--gpu", "H100")
    assert "a rank of teacher 0 needs" in error
    assert "teachers.0.tensor" in error


def test_engines_and_student_take_turns_with_memory(tmp_path: Path) -> None:
    shared = [
        "rollout.steps_ahead=0", "rollout.placement=student", "rollout.hosts=null", "parallel.data=8",
        "parallel.pipeline=2", "rollout.gpu_memory_utilization=0.3",
    ]  # fmt: skip
    gpu = gpu_named("H100")
    plan = make_plan(load_config(CONFIG, shared), gpu)
    assert len(plan.stages) == 2
    for stage in plan.stages:
        assert stage.engine == pytest.approx(0.3 * gpu.memory_bytes)
        assert stage.peak == pytest.approx(max(stage.total, stage.resident + stage.engine))
    offload = ["student.offload=[optimizer,gradients]", "teachers.0.offload=true"]
    less = make_plan(load_config(CONFIG, [*shared, *offload]), gpu)
    for stage, before in zip(less.stages, plan.stages, strict=True):
        names = ("optimizer", "gradients", "teachers", "teacher heads")
        assert before.resident - stage.resident == pytest.approx(sum(before.parts[name] for name in names))
        assert stage.total == before.total
    assert less.seconds["offload"] > 0
    assert plan.seconds["offload"] == 0


def test_answers_that_are_shorter_on_average_cost_less_time_and_no_less_memory() -> None:
    gpu = gpu_named("H100")
    long, short = (_sizes([], mean) for mean in (1024, 200))
    assert stage_memories(short, gpu) == stage_memories(long, gpu)
    slow, fast = (step_seconds(sizes, traffic(sizes), gpu) for sizes in (long, short))
    for phase in ("rollout", "teacher", "student", "tensor collectives"):
        assert fast[phase] < slow[phase]
    assert fast["weight sync"] == slow["weight sync"]


def _sizes(overrides: list[str], mean: float | None = None) -> RunSizes:
    config, _ = decide_precision(load_config(CONFIG, overrides), machine=BF16_GPU)
    return RunSizes(config, check_run(config, find_model), mean_answer=mean)


def test_more_engines_sample_faster_until_each_step_costs_what_it_must() -> None:
    gpu = gpu_named("H100")
    settings = ["rollout.prompts_per_step=4096", "rollout.tensor=1"]
    times = [rollout_seconds(_sizes([*settings, f"rollout.engines={n}"]), gpu) for n in (1, 2, 4, 8, 16, 32)]
    assert times == sorted(times, reverse=True)
    assert times[0] / times[1] > 1.5, "one engine is full"
    assert times[-1] > 1024 * 0.003, "the longest answer takes its steps"


def test_the_fastest_layouts_of_as_many_ranks_are_found_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    slow = ["parallel.tensor=2", "parallel.pipeline=4", "parallel.data=4", "rollout.tensor=1"]
    assert cli.main(["plan", str(CONFIG), "--gpu", "H100", "--suggest", *slow]) == 0
    assert "faster layouts   parallel.tensor=" in capsys.readouterr().out
    plan = make_plan(load_config(CONFIG, slow), gpu_named("H100"), suggest=True)
    best = plan.suggestions[0]
    assert best.seconds < plan.total_seconds
    assert best.seconds < 8
    overrides = [*slow, *(f"{key}={value}" for key, value in best.overrides.items())]
    again = make_plan(load_config(CONFIG, overrides), gpu_named("H100"))
    assert again.fits
    assert again.sizes.job_ranks == 64
    assert again.total_seconds == pytest.approx(best.seconds)


def test_an_engine_whose_share_does_not_hold_its_weights_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, str(CONFIG), "--gpu", "H100", "rollout.tensor=1", "rollout.gpu_memory_utilization=0.15")
    assert "rollout.gpu_memory_utilization=0.15" in error
    assert "rollout.tensor=1" in error


@pytest.mark.parametrize("mean", ["0", "-5", "1025"])
def test_a_mean_beyond_the_longest_is_refused(mean: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, str(CONFIG), "--gpu", "H100", f"--mean-answer={mean}")
    assert "rollout.max_new_tokens=1024" in error


def test_suggestions_need_a_gpu_to_judge_by(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--gpu NAME" in refused(capsys, str(CONFIG), "--suggest")


@pytest.mark.parametrize(("mean", "longest"), [(795, 4096), (512, 1024), (1, 2000), (999, 1000), (64, 64)])
def test_lengths_have_the_mean_that_was_asked_for(mean: int, longest: int) -> None:
    lengths = AnswerLengths(mean, longest)
    assert lengths.longest_of(1) == pytest.approx(mean, rel=0.02)
    expected = [lengths.longest_of(count) for count in (1, 2, 8, 64, 4096)]
    assert expected == sorted(expected)
    assert expected[-1] <= longest
    assert mean**2 * 0.98 <= lengths.mean_square <= mean * longest * 1.02


def test_a_layout_that_does_not_fit_is_refused_with_layouts_that_do(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["parallel.tensor=1", "parallel.pipeline=1", "parallel.data=32", "parallel.sequence_parallel=false"]
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
        assert again.sizes.job_ranks == 64
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
    overrides = [
        "parallel.data=1",
        "parallel.tensor=1",
        "parallel.sequence_parallel=false",
        "rollout.hosts=1",
        "rollout.tensor=1",
    ]
    assert "use more ranks" in refused(capsys, str(CONFIG), "--gpu", "A100-80G", *overrides)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parallel.tensor=8", ("parallel.tensor=8", "28 attention heads", "[1, 2, 4]")),
        ("parallel.pipeline=32", ("parallel.pipeline=32", "28 layers", "lower it")),
        ("parallel.stages=[20]", ("parallel.stages=[20] add up to 20", "28")),
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
