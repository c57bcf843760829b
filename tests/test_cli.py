"""The command line: aliases, precedence, refusals, dry run, and the decision to start torchrun."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from opd_megatron import cli
from opd_megatron.command import launcher
from opd_megatron.command.cli_args import ALIASES, parse_run, run_parser
from opd_megatron.config import RunConfig
from opd_megatron.losses.objectives import users_of
from opd_megatron.system import signals
from opd_megatron.train import main as train_main
from tests.ranks import as_launched

QUESTION = '{"question": "What is 2 + 3?", "answer": "5"}\n'


@pytest.fixture(autouse=True)
def plainly_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE", launcher.PARENT_REPORTS):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shape of a small model: a folder with a config.json and nothing else."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        vocab_size=272, max_position_embeddings=512, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def config_file(model: Path, tmp_path: Path) -> Path:
    data = tmp_path / "data.jsonl"
    data.write_text(QUESTION * 8)
    path = tmp_path / "run.yaml"
    tree = {
        "output_dir": str(tmp_path / "run"),
        "student": {"path": str(model)},
        "teachers": [{"path": str(model)}],
        "data": {"source": str(data), "max_prompt_tokens": 64},
        "rollout": {"engine": "torch", "max_new_tokens": 16},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def parsed(*argv: str) -> RunConfig:
    return parse_run(run_parser("opd-megatron train", ""), argv).config


def refused(capsys: pytest.CaptureFixture[str], run: Callable[[], int]) -> str:
    """Runs a command that must exit with 2; returns its only line on stderr."""
    assert run() == 2
    output = capsys.readouterr()
    assert output.err.startswith("opd-megatron: error: ")
    assert output.err.count("\n") == 1
    return output.err


def value_at(config: RunConfig, key: str) -> object:
    node: object = config.model_dump()
    for part in key.split("."):
        node = node[int(part)] if isinstance(node, list) else node[part]  # type: ignore[index]
    return node


SAMPLE = {
    "data.on_policy_fraction": 0.5,
    "student.path": "s", "teachers.0.path": "t", "data.source": "d", "objective.type": "gkd", "objective.beta": 0.25,
    "objective.temperature": 2.0, "objective.lambda_rl": 0.5, "objective.lambda_distill": 0.75, "output_dir": "o",
    "objective.alpha": 0.2, "objective.lambda_coef": 0.3, "objective.kl_coef": 0.4, "objective.sft_coef": 0.5,
    "recipe": "mixed", "rewards.task": "math", "rewards.advantage": "group_mean", "rollout.prompts_per_step": 4,
    "rollout.samples_per_prompt": 6, "rollout.max_new_tokens": 33, "data.max_prompt_tokens": 44, "steps": 55,
    "optimizer.lr": 0.5, "parallel.tensor": 2, "parallel.pipeline": 2, "parallel.micro_batch_size": 2,
    "checkpoint.every": 7, "evaluation.every": 3, "seed": 9,
}  # fmt: skip
NEEDS = {"objective.sft_coef": ["data.on_policy_fraction=0.5"]}
"""Key -> overrides without which it has no effect."""


@pytest.mark.parametrize("spelling", ["--{} {}", "--{}={}"])
@pytest.mark.parametrize("dashes", [False, True])
@pytest.mark.parametrize(("key", "name"), [(key, name) for key, names in ALIASES.items() for name in names])
def test_every_spelling_of_an_alias_sets_its_key(key: str, name: str, dashes: bool, spelling: str) -> None:
    flag = name.replace("_", "-") if dashes else name
    users = users_of(key.removeprefix("objective."))
    others = [*[f"objective.type={name}" for name in users[:1]], *NEEDS.get(key, [])]
    config = parsed(*spelling.format(flag, SAMPLE[key]).split(), *others)
    assert value_at(config, key) == SAMPLE[key]


def test_the_published_flags_are_all_aliases() -> None:
    published = """student_model_path teacher_model_path dataset_path distillation_type distillation_beta
    distillation_temperature lambda_rl lambda_distill output_dir student_model teacher_model dataset temperature
    distillation_alpha skew_alpha lambda_coef kl_coef lmbda on_policy_fraction"""
    assert {name for names in ALIASES.values() for name in names} >= set(published.split())
    everyone = [name for names in ALIASES.values() for name in names]
    assert len(everyone) == len(set(everyone))


def test_file_then_aliases_then_overrides(config_file: Path) -> None:
    assert parsed(str(config_file)).output_dir.endswith("run")
    assert parsed(str(config_file), "--output_dir", "alias").output_dir == "alias"
    for order in (["--output_dir", "alias", "output_dir=key"], ["output_dir=key", "--output_dir", "alias"]):
        assert parsed(str(config_file), *order).output_dir == "key"


def test_words_may_stand_in_any_order(config_file: Path) -> None:
    config = parsed("steps=3", "--lambda_distill", "2", str(config_file), "--temperature=3", "seed=9")
    assert (config.steps, config.objective.lambda_distill, config.objective.temperature, config.seed) == (3, 2, 3, 9)
    assert parsed("--config", str(config_file), "steps=3").steps == 3


def test_aliases_alone_make_a_run() -> None:
    config = parsed("--student_model", "s", "--teacher_model", "t", "--dataset", "openai/gsm8k")
    assert (config.student.path, config.teachers[0].path, config.data.source) == ("s", "t", "openai/gsm8k")


def test_an_alias_value_is_taken_as_it_stands() -> None:
    assert parsed("--output_dir", "a: b # null").output_dir == "a: b # null"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lamda_rl", "1"], ("'--lamda_rl'", "did you mean '--lambda_rl'")),
        (["--objective.beta=1"], ("'--objective.beta'", "objective.beta=value")),
        (["--frobnicate"], ("'--frobnicate'", "--help")),
        ([], ("no config file",)),
        (["missing.yaml"], ("'missing.yaml'", "does not exist")),
        (["a.yaml", "b.yaml"], ("'a.yaml'", "'b.yaml'")),
        (["--student_model", "a", "--student_model_path", "b"], ("'a'", "'b'", "student.path")),
        (["--student_model"], ("--student_model", "expected one argument")),
        (["optimizer.rl=1"], ("'optimizer.rl'", "'lr'")),
        (["--distillation_type", "kl"], ("objective.type='kl'", "reverse_kl")),
    ],
)
@pytest.mark.parametrize("entry", ["opd-megatron train", "python -m opd_megatron.train"])
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(
    entry: str, argv: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, lambda: cli.main(["train", *argv]) if entry.endswith("n train") else train_main(argv))
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], "did you mean 'train'"),
        (["convert", "hf"], "unknown conversion 'hf': use one of hf-to-megatron"),
        (["plan", "x.yaml"], "'x.yaml'"),
        (["plan", "--gpu", "H1000", "steps=3"], "use one of A100-80G, H100"),
        (["report", "nowhere"], "nowhere"),
        (["train", "--distillation_type", "jsd", "--temperature", "2"], "must equal rollout.temperature=1.0"),
        (["train", "--lambda_rl", "0.5"], "objective.lambda_rl=0.5 needs rewards.task"),
        (["train", "--student_model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_commands_refuse_in_one_line(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refused(capsys, lambda: cli.main(argv))


def test_a_dry_run_prints_config_layout_and_memory_and_makes_nothing(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", str(config_file), "--dry-run", "parallel.tensor=2", "parallel.pipeline=2"]) == 0
    printed = capsys.readouterr().out
    assert "max_new_tokens: 16" in printed
    assert "tensor 2 x pipeline 2" in printed
    assert "memory" in printed
    assert not (config_file.parent / "run").exists()


@pytest.mark.parametrize(
    ("override", "value", "size"),
    [("parallel.tensor=4", "4", "2 key-value heads"), ("parallel.pipeline=5", "5", "4 layers")],
)
def test_a_layout_that_does_not_divide_is_refused_before_any_rank_starts(
    override: str,
    value: str,
    size: str,
    config_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launcher, "launch", lambda *_: pytest.fail("started ranks"))
    line = refused(capsys, lambda: cli.main(["train", str(config_file), override]))
    assert value in line
    assert size in line


@pytest.mark.parametrize(
    ("world", "overrides"),
    [("3", ["parallel.tensor=2"]), ("4", ["parallel.tensor=2", "parallel.data=1"]), ("1", ["parallel.pipeline=2"])],
)
def test_a_world_size_that_does_not_fit_is_refused(
    world: str,
    overrides: list[str],
    config_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    as_launched(monkeypatch, int(world))
    line = refused(capsys, lambda: train_main([str(config_file), *overrides]))
    assert world in line
    for override in overrides:
        assert override.partition("=")[0] in line


@pytest.mark.parametrize(
    ("overrides", "world", "ranks"),
    [
        (["parallel.tensor=2"], None, 2),
        (["parallel.tensor=2", "parallel.pipeline=2", "parallel.data=2"], None, 8),
        ([], None, None),
        (["parallel.tensor=2"], "2", None),
    ],
)
def test_torchrun_is_started_exactly_when_ranks_are_missing(
    overrides: list[str],
    world: str | None,
    ranks: int | None,
    config_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[int | None] = []
    monkeypatch.setattr(launcher, "launch", lambda module, argv, n: started.append(n) or 0)
    monkeypatch.setattr("opd_megatron.train.run_training", lambda *_: started.append(None))
    monkeypatch.setattr(signals, "note_stop_signals", lambda: None)
    if world is not None:
        as_launched(monkeypatch, int(world))
    assert train_main([str(config_file), *overrides]) == 0
    assert started == [ranks]


def test_an_error_that_only_the_ranks_can_find_is_one_line_and_exit_code_2(config_file: Path) -> None:
    """The folder has no tokenizer: found in the ranks, which the plain command starts itself."""
    command = [sys.executable, "-m", "opd_megatron.train", str(config_file), "parallel.data=2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    errors = [line for line in result.stderr.splitlines() if line.startswith("opd-megatron:")]
    assert result.returncode == 2, result.stderr
    assert len(errors) == 1
    assert "tokenizer" in errors[0]
    assert "Traceback" not in result.stderr


def test_help_shows_every_alias_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"--{name}" in printed and key in printed for key, names in ALIASES.items() for name in names)
    assert "opd-megatron train configs/demo.yaml" in printed


def test_the_list_of_keys_names_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config"]) == 0
    printed = capsys.readouterr().out
    sections = [
        "student.path",
        "teachers.0.weight",
        "data.source",
        "rollout.engine",
        "optimizer.lr",
        "logging.progress",
    ]
    assert all(f"{key}  (" in printed for key in sections)


def test_the_doctor_finds_this_environment_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for name in ("torch", "megatron-core", "transformers", "vllm", "gpu"):
        assert any(line.startswith(name) for line in printed.splitlines())


def test_the_doctor_names_what_is_missing_and_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from opd_megatron import doctor

    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "megatron-core" else "1.0")
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "cannot train here: megatron-core missing" in printed
    assert "make env" in printed
