"""Sampled answers as files: one JSON object an answer, one file a step (`logging.rollouts`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from opd_megatron.errors import DataError, MissingPathError
from opd_megatron.system.atomic import write_file
from opd_megatron.types import Prompt, Rollout

FOLDER = "rollouts"
"""In the run directory."""


def save_rollouts(folder: Path, step: int, rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes those of a step, in place of what an interrupted run left of it. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, **_record(each, tokenizer)}, ensure_ascii=True) for each in rollouts]
    write_file(folder / f"step-{step:06d}.jsonl", "\n".join(lines) + "\n")


def _record(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    ids = rollout.response_ids.tolist()
    return {
        "prompt_id": rollout.prompt.id,
        "task": rollout.prompt.task,
        "group": rollout.group,
        "prompt": rollout.prompt.text,
        "response": tokenizer.decode(ids, skip_special_tokens=False),
        "finish_reason": rollout.finish_reason,
        "policy_version": rollout.policy_version,
        "advantage": rollout.advantage,
        "prompt_ids": list(rollout.prompt.token_ids),
        "response_ids": ids,
        "logprobs": None if rollout.logprobs is None else [round(value, 6) for value in rollout.logprobs.tolist()],
    }


def read_rollouts(path: Path) -> Iterator[Rollout]:
    """Reads them again, in order: of a file, or of all files of a folder or of a run's directory.

    Raises:
        MissingPathError: there is no such file.
        DataError: names the line that is none of them.
    """
    files = [path]
    if path.is_dir():
        folder = path / FOLDER if (path / FOLDER).is_dir() else path
        files = sorted(folder.glob("*.jsonl"))
    if not files or not files[0].is_file():
        raise MissingPathError(
            f"{str(path)!r} holds no saved rollouts (step-N.jsonl): a run writes them with logging.rollouts=true"
        )
    for file in files:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _rollout(line, f"{str(file)!r} line {number}")


def _rollout(line: str, where: str) -> Rollout:
    try:
        record = json.loads(line)
        prompt_ids, response_ids = ([*map(_token_id, record[key])] for key in ("prompt_ids", "response_ids"))
        logprobs, task = record.get("logprobs"), record.get("task")
        if not prompt_ids or not response_ids:
            raise ValueError("no tokens")
        if logprobs is not None and len(logprobs) != len(response_ids):
            raise ValueError(f"{len(logprobs)} logprobs for {len(response_ids)} tokens")
        prompt = Prompt(
            str(record["prompt_id"]), tuple(prompt_ids), str(record.get("prompt", "")),
            task=None if task is None else str(task),
        )  # fmt: skip
        return Rollout(
            prompt,
            torch.tensor(response_ids),
            None if logprobs is None else torch.tensor([float(value) for value in logprobs]),
            int(record.get("policy_version", -1)),
            str(record.get("finish_reason", "length")),
            group=int(record.get("group", 0)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{where} is no saved rollout ({type(error).__name__}: {error}): remove the line, or name files that "
            "logging.rollouts=true has written"
        ) from None


def _token_id(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no token id")
    return value
