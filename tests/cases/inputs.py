"""Tiny models, tokenizers and rows as users bring them, and a command line that runs in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opd_megatron import cli
from tests.byte_tokenizer import save_byte_tokenizer
from tests.tiny_models import save_tiny

SETTINGS = [
    "steps=2", "student.dtype=fp32", "teachers.0.dtype=fp32", "data.max_prompt_tokens=120", "rollout.engine=torch",
    "rollout.prompts_per_step=4", "rollout.max_new_tokens=8", "evaluation.every=2", "evaluation.prompts=4",
    "logging.tensorboard=false", "evaluation.agreement=false",
]  # fmt: skip


def make_pair(
    folder: Path, family: str = "llama", *, student: dict[str, Any] | None = None, teacher: dict[str, Any] | None = None
) -> None:
    """student/, teacher/ and prompts.jsonl."""
    for seed, (name, changes) in enumerate({"student": student, "teacher": teacher}.items(), start=1):
        save_tiny(folder / name, family, num_hidden_layers=2, seed=seed, **(changes or {}))
        save_byte_tokenizer(folder / name)
    write_rows(folder / "prompts.jsonl", addition_rows())


def addition_rows(count: int = 24) -> list[dict[str, Any]]:
    return [{"question": f"What is {n} plus {n + 1}?", "answer": f"It is {2 * n + 1}."} for n in range(count)]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=1))


def train_words(folder: Path, *overrides: str) -> list[str]:
    """The command line of a run in `folder`; later words win."""
    return [
        "train", f"student.path={folder / 'student'}", f"teachers.0.path={folder / 'teacher'}",
        f"data.source={folder / 'prompts.jsonl'}", f"output_dir={folder / 'run'}", *SETTINGS, *overrides,
    ]  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Runs a command that a user has to correct; returns the one line that it prints."""
    capsys.readouterr()
    code = cli.main(list(words))
    captured = capsys.readouterr()
    assert code == 2, captured.out + captured.err
    errors = [line for line in captured.err.splitlines() if line.startswith("opd-megatron: error: ")]
    assert len(errors) == 1, captured.err
    assert "Traceback" not in captured.err
    return errors[0]
