"""Small complete runs for end-to-end tests: tiny models, a byte tokenizer, arithmetic prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opd_megatron.config import RunConfig, load_config
from tests.byte_tokenizer import save_byte_tokenizer
from tests.tiny_models import save_tiny


def make_inputs(folder: Path, *, rows: int = 40) -> dict[str, str]:
    """Student, teacher and a jsonl of prompts; returns the config keys that name them."""
    for name, settings in {"student": {"seed": 1}, "teacher": {"seed": 2, "num_hidden_layers": 6}}.items():
        save_tiny(folder / name, head_dim=32, **settings)
        save_byte_tokenizer(folder / name)
    with (folder / "prompts.jsonl").open("w") as file:
        for n in range(rows):
            file.write(json.dumps({"question": f"What is {n} plus {n + 1}?", "answer": f"It is {2 * n + 1}."}) + "\n")
    return {
        "student.path": str(folder / "student"),
        "teachers.0.path": str(folder / "teacher"),
        "data.source": str(folder / "prompts.jsonl"),
    }


def small_config(inputs: dict[str, str], output_dir: Path, **overrides: Any) -> RunConfig:
    """A run of a few seconds: 4 prompts a step, 8 new tokens, fp32, the plain torch engine."""
    values: dict[str, Any] = {
        **inputs,
        "output_dir": str(output_dir),
        "steps": 4,
        "student.dtype": "fp32",
        "evaluation.agreement": False,  # has tests of its own
        "teachers.0.dtype": "fp32",
        "data.max_prompt_tokens": 80,
        "rollout.engine": "torch",
        "rollout.prompts_per_step": 4,
        "rollout.max_new_tokens": 8,
        "evaluation.every": 2,
        "evaluation.prompts": 4,
        "optimizer.lr": 3e-3,
        "logging.tensorboard": False,
        **overrides,
    }
    return load_config(None, [f"{key}={json.dumps(value)}" for key, value in values.items()])
