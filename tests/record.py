"""A record of what tiny runs compute, to prove that a change of the code's structure changes no behaviour.

    python -m tests.record make record.json       before the change
    python -m tests.record compare record.json    after it: prints `identical`, or every value that differs

The runs cover every `objective.type`, every kind of parallelism and a resume, in fp32 with the plain torch engine. They
are compared bit by bit: every metric of every step except times and memory, and a hash of the exported weights. A
record holds for one machine and one set of installed packages, so it is made anew from the older commit
(`git worktree add`), never committed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.byte_tokenizer import save_byte_tokenizer
from tests.e2e.runs import make_inputs, small_config
from tests.ranks import close_pool, run_ranks
from tests.tiny_models import save_tiny

SAMPLED = {"objective.temperature": 0.8, "rollout.temperature": 0.8, "rollout.samples_per_prompt": 2}
SEQUENCE = {**SAMPLED, "objective.type": "on_policy_distill", "objective.ratio_level": "sequence"}
CLIPPED = {"objective.truncation": None, "objective.clip_low": 0.2, "objective.clip_high": 0.2}
TP2, PP2 = {"parallel.tensor": 2}, {"parallel.pipeline": 2, "parallel.micro_batch_size": 1}
SP2 = {**TP2, "parallel.sequence_parallel": True}
DP2 = {"parallel.data": 2}
COMMON = {"optimizer.decay": "constant", "logging.progress": False}

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "reverse_kl": (1, {"objective.type": "reverse_kl"}),
    "forward_kl": (1, {"objective.type": "forward_kl", "objective.temperature": 1.5}),
    "gkd": (1, {"objective.type": "gkd", "objective.beta": 0.3, "objective.lambda_distill": 0.5}),
    "skew_reverse_kl": (1, {"objective.type": "skew_reverse_kl", "objective.alpha": 0.2}),
    "skew_forward_kl": (1, {"objective.type": "skew_forward_kl"}),
    "lambda_jsd": (1, {"objective.type": "lambda_jsd", "objective.lambda_coef": 0.3}),
    "on_policy_distill": (1, {**SAMPLED, "objective.type": "on_policy_distill", "objective.kl_coef": 0.7}),
    "jsd": (1, {**SAMPLED, "objective.type": "jsd", "objective.beta": 0.3}),
    "jsd of lambda, clipped": (1, {**SAMPLED, **CLIPPED, "objective.type": "jsd", "objective.lambda_coef": 0.7}),
    "sequence ratio": (1, SEQUENCE),
    "tp2": (2, TP2),
    "tp2, sampled": (2, {**TP2, **SAMPLED, "objective.type": "on_policy_distill"}),
    "tp2, sequence parallel": (2, SP2),
    "tp2, sequence parallel, sequence ratio": (2, {**SP2, **SEQUENCE}),
    "pp2": (2, PP2),
    "pp2, jsd": (2, {**PP2, **SAMPLED, "objective.type": "jsd"}),
    "dp2": (2, DP2),
    "ep2": (2, {**DP2, "parallel.expert": 2, "student.path": "moe"}),
    "resumed": (1, {"steps": 4}),
    "resumed, dp2": (2, {"steps": 4, **DP2}),
}
_VOLATILE = ("time/", "memory/")


def _run(rank: int, world: int, inputs: dict[str, str], folder: str, settings: dict[str, Any]) -> None:
    """One run on this rank."""
    from opd_megatron.trainer import OPDTrainer

    config = small_config(inputs, Path(folder), **settings)
    with contextlib.redirect_stdout(io.StringIO()), OPDTrainer.from_config(config) as trainer:
        trainer.train()


def make() -> dict[str, Any]:
    """Runs every case; returns its metrics and the hash of its weights."""
    torch.set_num_threads(1)
    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        inputs = make_inputs(root)
        save_tiny(root / "moe", "qwen3_moe", seed=3, head_dim=32)
        save_byte_tokenizer(root / "moe")
        for name, (ranks, settings) in CASES.items():
            values = settings if "student.path" not in settings else {**settings, "student.path": str(root / "moe")}
            out = root / "runs" / name
            for steps in range(2, values.get("steps", 2) + 1, 2):  # the second run resumes the first
                run_ranks(ranks, _run, inputs, str(out), {**COMMON, **values, "steps": steps})
            record[name] = {"rows": list(_rows(out)), "weights": _hash_of(out / "hf")}
            print(f"{name}: {record[name]['weights'][:12]}", file=sys.stderr, flush=True)
    close_pool()
    return record


def _rows(run: Path) -> Iterator[dict[str, Any]]:
    for line in (run / "metrics.jsonl").read_text().splitlines():
        yield {key: value for key, value in json.loads(line).items() if not key.startswith(_VOLATILE)}


def _hash_of(folder: Path) -> str:
    from safetensors import safe_open

    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line for every value of the two records that is not the same."""
    lines = [f"{name}: only in one record" for name in sorted(before.keys() ^ after.keys())]
    for name in before.keys() & after.keys():
        old, new = before[name], after[name]
        if len(old["rows"]) != len(new["rows"]):
            lines.append(f"{name}: {len(old['rows'])} rows, now {len(new['rows'])}")
        for a, b in zip(old["rows"], new["rows"], strict=False):
            changed = {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}
            lines += [f"{name}: step {a['step']} {key}: {a.get(key)!r}, now {b.get(key)!r}" for key in sorted(changed)]
        if old["weights"] != new["weights"]:
            lines.append(f"{name}: other weights")
    return lines


def main() -> int:
    action, path = sys.argv[1], Path(sys.argv[2])
    assert action in ("make", "compare"), __doc__
    record = make()
    if action == "make":
        path.write_text(json.dumps(record, indent=1))
        print(f"{len(record)} runs recorded in {path}")
        return 0
    lines = differences(json.loads(path.read_text()), record)
    print("\n".join(lines) if lines else f"identical: {len(record)} runs")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
