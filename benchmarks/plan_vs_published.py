"""`opd-megatron plan` against step times that others have published on H100s: planned over published seconds.

Nothing is run: the published system's models and layout are put into a configuration of ours, its answers into
`--mean-answer`, and the same formulas that `plan` prints are read off. A phase within a factor of 1.5 is `ok`; for any
other the last column names the assumption that fails. What a source does not say is said in `_assumed`.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from harness import Check, Report, Row, main

from opd_megatron.config import decide_precision, load_config
from opd_megatron.models.sizes import RunSizes
from opd_megatron.planning.gpus import gpu_named
from opd_megatron.planning.published import find_model
from opd_megatron.planning.timing import step_seconds, total_seconds
from opd_megatron.planning.traffic import traffic
from opd_megatron.run.checks import check_run
from opd_megatron.system.processor import BF16_GPU

FACTOR = 1.5
PROMPT = 150
"""Tokens of a prompt where the source gives none."""
_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "head_dim": 128}
_QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "head_dim": 128}


def _shape(base: dict, hidden: int, layers: int, heads: int, groups: int, ffn: int, **more: Any) -> dict:
    return base | {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups,
        "intermediate_size": ffn, "tie_word_embeddings": False, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_theta": 5e5, "hidden_act": "silu", "torch_dtype": "bfloat16",
    } | more  # fmt: skip


MODELS = {
    "meta/Llama-3.1-8B": _shape(_LLAMA, 4096, 32, 32, 8, 14336),
    "meta/Llama-3.2-1B": _shape(_LLAMA, 2048, 16, 32, 8, 8192, head_dim=64, tie_word_embeddings=True),
    "Qwen/Qwen3-1.7B": _shape(_QWEN3, 2048, 28, 16, 8, 6144, tie_word_embeddings=True),
    "Qwen/Qwen3-32B": _shape(_QWEN3, 5120, 64, 64, 8, 25600),
}
"""As their config.json say; others come with the package."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """One line of a source."""

    source: str
    student: str
    teacher: str | None = None
    """The student itself where there is none: its log-probabilities are scored."""
    scored: int = 1
    """Forward passes of the teacher's size over all tokens."""
    sequences: int
    mean: float
    longest: int
    prompt: int = PROMPT
    layout: dict[str, Any]
    seconds: dict[str, float]
    """By phase: `train`, `score`, `sample`, `sync`; `step` is all of it."""
    upper: bool = False
    """The source gives a limit that its run stays under."""
    generates: bool = True
    fails: dict[str, str] = field(default_factory=dict)
    """Why a phase is off by more, by its name."""


_8B, _70B, _MOE = "meta/Llama-3.1-8B", "meta-llama/Llama-3.1-70B", "Qwen/Qwen3-30B-A3B"
TABLE = {
    "A1": Published(
        source="NeMo-RL issue 959: Llama-3.1-8B GRPO, 8 x H100", student=_8B, scored=2, sequences=2048, mean=795,
        longest=4096, layout={"parallel.pipeline": 2, "parallel.data": 4, "parallel.micro_batch_size": 4},
        seconds={"train": 28, "score": 18, "sample": 58, "sync": 5, "step": 112},
    ),
    "A2": Published(
        source="NeMo-RL issue 959: Llama-3.1-70B GRPO, 64 x H100", student=_70B, scored=2, sequences=2048, mean=398,
        longest=4096,
        layout={"parallel.tensor": 4, "parallel.pipeline": 4, "parallel.data": 4, "parallel.micro_batch_size": 4,
                "parallel.sequence_parallel": "true", "rollout.tensor": 8},
        seconds={"train": 28, "score": 18, "sample": 84, "sync": 14, "step": 147},
        fails={"sample": "the tail: answers that run to 4,096 tokens would make it 58 s (0.69)"},
    ),
    "A4": Published(
        source="NeMo-RL v0.6: Qwen3-30B-A3B GRPO, 32 x H100", student=_MOE, scored=2, sequences=2048, mean=3203,
        longest=4096,
        layout={"parallel.data": 32, "parallel.expert": 8, "parallel.micro_batch_size": 1, "rollout.tensor": 2},
        seconds={"step": 192},
    ),
    "A4, one step off": Published(
        source="the same, half of the GPUs sample", student=_MOE, scored=2, sequences=2048, mean=3203, longest=4096,
        layout={"parallel.data": 16, "parallel.expert": 8, "parallel.micro_batch_size": 1, "rollout.tensor": 2,
                "rollout.placement": "own", "rollout.hosts": 16, "rollout.steps_ahead": 1},
        seconds={"step": 152},
    ),
    "A6": Published(
        source="NeMo-RL issue 1560: Llama-3.1-8B GRPO, 16 x H100", student=_8B, scored=2, sequences=2048, mean=1060,
        longest=4096, layout={"parallel.data": 16, "parallel.micro_batch_size": 4}, seconds={"step": 97.7},
    ),
    "A6, one step off": Published(
        source="the same, half of the GPUs sample", student=_8B, scored=2, sequences=2048, mean=1060, longest=4096,
        layout={"parallel.data": 8, "parallel.micro_batch_size": 4, "rollout.placement": "own", "rollout.hosts": 8,
                "rollout.steps_ahead": 1},
        seconds={"step": 74.6},
    ),
    "A7": Published(
        source="NeMo-RL distillation gate: Qwen3-32B -> 1.7B, 8 x H100", student="Qwen/Qwen3-1.7B",
        teacher="Qwen/Qwen3-32B", sequences=32, mean=4096, longest=8192,
        layout={"parallel.tensor": 4, "parallel.data": 2, "parallel.sequence_parallel": "true",
                "parallel.micro_batch_size": 1},
        seconds={"step": 50}, upper=True,
    ),
    "A12": Published(
        source="TRL issue 6942: Llama-3.2-1B from itself, 1 x H100", student="meta/Llama-3.2-1B", sequences=32,
        mean=874, longest=874, layout={"parallel.data": 1, "parallel.micro_batch_size": 4}, seconds={"step": 1.224},
        generates=False,
    ),
}  # fmt: skip
_ASSUMED = (
    f"prompts of {PROMPT} tokens, sequences packed (as the sources' systems do), one engine for every "
    "rollout.tensor GPUs; one step off: half of the GPUs sample; A7: answers of 4,096 tokens on average, context "
    "parallel 2 as data parallel 2"
)


def planned_seconds(row: Published, folder: Path) -> dict[str, float]:
    """What `plan` expects of each phase that the source names."""
    values = {
        "student.path": row.student, "teachers.0.path": row.teacher or row.student, "data.source": "prompts.jsonl",
        "data.max_prompt_tokens": row.prompt, "rollout.max_new_tokens": row.longest,
        "rollout.prompts_per_step": row.sequences, "rollout.gpu_memory_utilization": 0.6, **row.layout,
    }  # fmt: skip
    config, _ = decide_precision(load_config(None, [f"{k}={v}" for k, v in values.items()]), machine=BF16_GPU)
    models = check_run(config, partial(find_model, folders=[folder]))
    sizes = RunSizes(config, models, mean_answer=row.mean, packed=True)
    gpu = gpu_named("H100")
    found = step_seconds(sizes, traffic(sizes), gpu)
    found["teacher"] *= row.scored
    if not row.generates:
        found |= {"rollout": 0.0, "weight sync": 0.0}
    phases = {"sample": found["rollout"], "score": found["teacher"], "sync": found["weight sync"]}
    phases["train"] = sum(found.values()) - sum(phases.values())
    return phases | {"step": total_seconds(sizes, found)}


def measure(arguments: argparse.Namespace) -> Report:
    report = Report()
    with tempfile.TemporaryDirectory() as scratch:
        for name, shape in MODELS.items():
            (folder := Path(scratch) / name).mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(shape))
        for name, row in TABLE.items():
            planned = planned_seconds(row, Path(scratch))
            for phase, seconds in row.seconds.items():
                report.rows.append(_line(name, row, phase, planned[phase], seconds))
                if phase not in row.fails:
                    ratio = planned[phase] / seconds
                    off = ratio if row.upper else math.exp(abs(math.log(ratio)))
                    report.checks.append(Check.at_most(f"{name} {phase}", off, 1.0 if row.upper else FACTOR))
    report.note = f"Planned on an H100 by the formulas of `opd-megatron plan`; {_ASSUMED}."
    return report


def _line(name: str, row: Published, phase: str, planned: float, seconds: float) -> Row:
    within = planned <= seconds if row.upper else 1 / FACTOR <= planned / seconds <= FACTOR
    verdict = row.fails.get(phase) or ("ok" if within else "off")
    return {
        "source": f"{name} {row.source}", "phase": phase, "planned, s": planned,
        "published, s": f"< {seconds:g}" if row.upper else seconds, "ratio": planned / seconds, "verdict": verdict,
    }  # fmt: skip


if __name__ == "__main__":
    main("plan_vs_published", __doc__, measure)
