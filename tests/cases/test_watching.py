"""Nothing that only watches ends a run: terminals, TensorBoard, Weights & Biases, samples, the report."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opd_megatron import cli
from opd_megatron.metrics import MetricsLog, TrainingDisplay, read_metrics
from tests.cases.inputs import make_pair, train_words, write_rows

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("encoding", ["ascii"])
def test_a_terminal_that_is_not_utf8_shows_what_it_can(tmp_path: Path, encoding: str) -> None:
    make_pair(tmp_path)
    rows = [{"question": f"Größe → {n} 🙂?", "answer": "naïve"} for n in range(12)]
    write_rows(tmp_path / "prompts.jsonl", rows)
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    words = train_words(tmp_path, "logging.sample_every=1")
    done = subprocess.run(
        [sys.executable, "-m", "opd_megatron.cli", *words], cwd=ROOT, env=environment, capture_output=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode(encoding, "replace")
    assert b"sample" in done.stdout
    assert (tmp_path / "run/hf").is_dir()


class _Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_terminal_that_is_gone_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingDisplay(3, console=Console(file=_Gone(), force_terminal=True)) as display:
        for step in (1, 2, 3):
            display.step({"step": step, "loss": 1.0, "reverse_kl": 1.0, "tokens": 5})
            display.sample("text")
            display.note("line")
    assert capsys.readouterr().err.count("shows nothing from here on") == 1


class _Failing:
    def __getattr__(self, name: str) -> Any:
        def fail(*_: Any, **__: Any) -> None:
            raise FileNotFoundError(f"no place to {name}")

        return fail


def test_writers_that_fail_are_noted_once_and_left_out(tmp_path: Path) -> None:
    notes: list[str] = []
    log = MetricsLog(tmp_path, on_problem=notes.append)
    log._tensorboard, log._wandb = _Failing(), _Failing()
    for step in range(3):
        log.write({"step": step, "loss": 1.0})
    log.close()
    assert [note.split(" could")[0] for note in notes] == ["warning: TensorBoard", "warning: W&B"]
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2]


def test_rows_that_could_not_be_written_are_written_with_the_next(tmp_path: Path) -> None:
    notes: list[str] = []
    log = MetricsLog(tmp_path / "run", on_problem=notes.append)
    log.write({"step": 0})
    (tmp_path / "run").rename(tmp_path / "away")
    log.write({"step": 1})
    log.write({"step": 2})
    (tmp_path / "away").rename(tmp_path / "run")
    log.write({"step": 3})
    log.close()
    assert len(notes) == 1
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2, 3]


def test_a_wandb_that_cannot_start_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("not logged in")

    monkeypatch.setattr("opd_megatron.metrics.jsonl._start_wandb", refuse)
    notes: list[str] = []
    with MetricsLog(tmp_path, wandb_project="p", on_problem=notes.append) as log:
        log.write({"step": 1})
    assert notes == ["warning: W&B cannot be started, the run goes on without (RuntimeError: not logged in)"]


def test_a_run_outlives_tensorboards_folder_its_samples_and_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pair(tmp_path)
    import opd_megatron.trainer as trainer

    step = trainer.OPDTrainer.step

    def cleaning(self: Any) -> Any:
        shutil.rmtree(tmp_path / "run/tensorboard", ignore_errors=True)
        return step(self)

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(trainer.OPDTrainer, "step", cleaning)
    monkeypatch.setattr(trainer, "readable_sample", fail)
    monkeypatch.setattr(trainer, "write_report", fail)
    assert cli.main(train_words(tmp_path, "logging.tensorboard=true", "steps=3")) == 0
    out = capsys.readouterr().out
    assert "sample: cannot be shown" in out
    assert "no report" in out
    assert len(read_metrics(tmp_path / "run")) == 4
    assert (tmp_path / "run/hf").is_dir()


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', "\u0000"])
def test_a_damaged_row_of_metrics_is_named_unless_it_is_the_last(
    tmp_path: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.dumps({"step": n, "loss": 1.0, "reverse_kl": 1.0, "tokens": 3}) for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([rows[0], line]))
    assert len(read_metrics(tmp_path)) == 1
    (tmp_path / "metrics.jsonl").write_text("\n".join([rows[0], line, rows[1]]))
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "metrics.jsonl' line 2 is not a row of metrics" in capsys.readouterr().err
