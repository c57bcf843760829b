"""`distill` and `hybrid`, the flags of the field's scripts, and `algorithm:`."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from opd_megatron.cli import main
from opd_megatron.command.cli_args import parse_run, run_parser
from opd_megatron.config import load_config
from opd_megatron.errors import ConfigError
from tests.e2e.runs import make_inputs


def _dry(capsys: Any, *words: str) -> dict[str, Any]:
    assert main([*words, "--dry-run"]) == 0
    text = capsys.readouterr().out
    found: dict[str, Any] = yaml.safe_load(text.partition("\n\n")[0])
    return found


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("flags")
    inputs = make_inputs(folder)
    return [
        f"--student_model_path={inputs['student.path']}", "--teacher_model_path", inputs["teachers.0.path"],
        "--dataset_path", inputs["data.source"], f"--output_dir={folder / 'run'}", "--max_prompt_length=200",
        "--max_new_tokens=32",
    ]  # fmt: skip


def test_distill_takes_the_flags_of_the_fields_script(flags: list[str], capsys: Any) -> None:
    found = _dry(
        capsys, "distill", *flags, "--distillation_type=on_policy_distill", "--kl_coef=0.5", "--learning_rate=1e-5",
        "--batch_size=4", "--max-steps", "7", "--seed=3", "--tensor_model_parallel_size=2",
    )  # fmt: skip
    assert found["objective"]["type"] == "on_policy_distill"
    assert found["objective"]["kl_coef"] == 0.5
    assert (found["steps"], found["seed"], found["optimizer"]["lr"]) == (7, 3, 1e-5)
    assert (found["rollout"]["prompts_per_step"], found["parallel"]["tensor"]) == (4, 2)
    assert found["objective"]["lambda_rl"] == 0


def test_hybrid_fills_in_what_a_hybrid_needs_and_leaves_what_is_given(flags: list[str], capsys: Any) -> None:
    found = _dry(capsys, "hybrid", *flags, "--reward_task=gsm8k")
    assert (found["objective"]["lambda_rl"], found["rollout"]["samples_per_prompt"]) == (0.5, 4)
    assert found["objective"]["lambda_distill"] == 1
    found = _dry(capsys, "hybrid", *flags, "--reward_task=gsm8k", "--lambda_rl=0.1", "--num_generations=8")
    assert (found["objective"]["lambda_rl"], found["rollout"]["samples_per_prompt"]) == (0.1, 8)
    assert main(["hybrid", *flags, "--dry-run"]) == 2
    assert "needs rewards.task" in capsys.readouterr().err


def test_no_two_flags_mean_the_same_and_dashes_do_too() -> None:
    parsed = parse_run(run_parser("x", "y"), ["--num-generations", "8", "steps=3", "--train_iters=3"])
    assert (parsed.config.rollout.samples_per_prompt, parsed.config.steps) == (8, 3)
    with pytest.raises(ConfigError, match="keep one"):
        parse_run(run_parser("x", "y"), ["--lr=1", "--learning_rate=2"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["algorithm=on_policy_distill"], {"type": "on_policy_distill"}),
        (["algorithm={name: jsd, kl_coef: 2, lambda_coef: 0.3}"], {"type": "jsd", "kl_coef": 2, "lambda_coef": 0.3}),
        (["algorithm.adv_estimator=jsd", "algorithm.kl_coef=2"], {"type": "jsd", "kl_coef": 2}),
        (["algorithm.kl_coef=2", "objective.type=jsd"], {"type": "jsd", "kl_coef": 2}),
        (["algorithm=grpo"], {"lambda_distill": 0, "lambda_rl": 1}),
        (["algorithm=sft"], {"type": "sft"}),
    ],
)  # fmt: skip
def test_an_algorithm_is_another_spelling(words: list[str], expected: dict[str, Any]) -> None:
    objective = load_config(None, words).model_dump()["objective"]
    assert {key: objective[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["algorithm=on_policy_distil"], "unknown algorithm 'on_policy_distil': did you mean 'on_policy_distill'?"),
        (["algorithm.kl_coeff=2"], "unknown key algorithm.kl_coeff"),
        (["algorithm=jsd", "objective.type=gkd"], "algorithm says type=jsd, objective.type is gkd"),
        (["algorithm=[jsd]"], "must be a name"),
    ],
)  # fmt: skip
def test_an_algorithm_that_is_none_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
