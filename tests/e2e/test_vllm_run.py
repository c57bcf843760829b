"""Runs with the real vLLM: it holds the trainer's weights after every step, and its death does not end the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.errors import EngineDiedError
from opd_megatron.mcore.forward import response_hidden
from opd_megatron.metrics import read_metrics
from opd_megatron.trainer import OPDTrainer
from opd_megatron.types import Batch, StepMetrics
from tests.byte_tokenizer import save_byte_tokenizer
from tests.e2e.runs import make_inputs, small_config
from tests.tiny_models import save_tiny

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@torch.no_grad()
def _own_logprobs(trainer: OPDTrainer, sequences: torch.Tensor) -> torch.Tensor:
    """log p(token i | before) of the trainer's Megatron student, [B, S - 1]."""
    student = trainer.student
    weights = torch.ones(sequences.shape)
    (hidden,) = response_hidden(student.model, student.grid, [Batch(sequences, sequences, weights)])
    logits = (hidden @ student.model.head_weight.T)[:, : trainer.models.vocab_size]
    logprobs = logits.log_softmax(-1).view(*sequences.shape, -1)[:, :-1]
    return logprobs.gather(-1, sequences[:, 1:, None])[..., 0]


def test_engine_scores_like_the_trainer_after_updates_a_kill_and_a_restart(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(
        inputs,
        tmp_path / "run",
        **{
            "steps": 3, "rollout.engine": "vllm", "data.max_prompt_tokens": 260,
            # The form whose loss reads the engine's own log-probabilities.
            "objective.type": "on_policy_distill", "objective.temperature": 0.7, "rollout.temperature": 0.7,
            "evaluation.task": "tests.rewards.verifiers:even", "evaluation.samples": 2,
        },
    )  # fmt: skip
    sequences = torch.randint(0, 256, (3, 220), generator=torch.Generator().manual_seed(0))
    gaps: list[float] = []
    pids: list[int] = []
    original = OPDTrainer.step

    def step_and_compare(self: OPDTrainer) -> StepMetrics:
        engine: Any = self.rollout_client._engines[0]
        pids.append(engine.pid)
        if self.step_count == 1:
            os.kill(engine.pid, signal.SIGKILL)
        metrics = original(self)
        theirs = torch.tensor(engine.token_logprobs(sequences.tolist()))
        gaps.append((theirs - _own_logprobs(self, sequences)).abs().max().item())
        return metrics

    monkeypatch.setattr(OPDTrainer, "step", step_and_compare)
    notes: list[str] = []
    with OPDTrainer.from_config(config) as trainer:
        monkeypatch.setattr(trainer.rollout_client, "_on_event", notes.append)
        trainer.train()

    # The prompts are the same long ones each time, so a stale prefix cache, head or layer would show.
    assert max(gaps) < 1e-3
    rows = read_metrics(tmp_path / "run")
    assert [row["policy_version"] for row in rows] == [0, 0, 1, 2]
    assert all(row["ratio"] == pytest.approx(1, abs=1e-3) for row in rows[1:]), "one temperature, one token, one model"
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 2, 3], "greedy answers, also of a new engine"
    assert all(0 <= row["eval/avg@2"] <= row["eval/pass@2"] + 1 for row in rows if "eval/accuracy" in row)
    assert len(notes) == 1
    assert "restarting 1/3" in notes[0]
    assert pids[2] != pids[1], "the third step ran on a new process"
    assert not Path(f"/proc/{pids[2]}").exists(), "the engine ends with the run"


def test_an_engine_that_keeps_dying_ends_the_run_with_one_line(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opd_megatron.rollout.vllm_engine import VLLMOptions

    config = small_config(inputs, tmp_path / "run", **{"rollout.engine": "vllm", "rollout.max_restarts": 1})
    environment = VLLMOptions.environment

    def broken(self: VLLMOptions, gpu: bool) -> dict[str, str]:
        # An interpreter that cannot find vLLM stands for every engine that cannot come up.
        return {**environment(self, gpu), "PYTHONPATH": str(_package_that_fails(tmp_path))}

    monkeypatch.setattr(VLLMOptions, "environment", broken)
    with pytest.raises(EngineDiedError) as caught, OPDTrainer.from_config(config) as trainer:
        trainer.train()
    message = str(caught.value)
    assert "\n" not in message
    assert "died 2 times in a row" in message


def _package_that_fails(folder: Path) -> str:
    package = folder / "broken" / "vllm"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("import os; os._exit(7)")
    repository = Path(__file__).parents[2]
    return f"{package.parent}{os.pathsep}{repository}"


@pytest.mark.long
def test_two_tensor_parallel_ranks_train_experts_with_one_engine_from_the_command_line(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    student = save_tiny(tmp_path / "student", "qwen3_moe", seed=5, head_dim=32, moe_intermediate_size=64)
    save_byte_tokenizer(student)
    config = small_config(
        inputs | {"student.path": str(student)},
        tmp_path / "run",
        **{
            "steps": 2, "rollout.engine": "vllm", "parallel.tensor": 2, "parallel.sequence_parallel": True,
            "objective.type": "on_policy_distill",
        },
    )  # fmt: skip
    from opd_megatron.config import dump_config

    (tmp_path / "config.yaml").write_text(dump_config(config))
    done = subprocess.run(
        [sys.executable, "-m", "opd_megatron.train", str(tmp_path / "config.yaml")],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["ratio"] == pytest.approx(1, abs=1e-3) for row in rows[1:]), "the engine samples from the trainer's"
    assert "Result after 2 steps" in done.stdout
    assert "Warning" not in done.stderr
