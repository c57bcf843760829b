"""One rank of `packing.py`: `FOLDER STUDENT TEACHER PIPELINE TASK`, under the variables of a launcher; rank 0 writes
FOLDER/result.json."""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from _memory_rank import forget_peak, resident

SEQUENCES, PROMPT, MICRO = 16, 48, 8
BUDGET = 1024
REPEATS = 3


def lengths_of(longest: int, seed: int, sigma: float = 1.0) -> list[int]:
    """Answers of log-normal length, of median 48 tokens; one is as long as may be."""
    chance = random.Random(seed)
    found = [max(1, min(longest, round(chance.lognormvariate(math.log(48), sigma)))) for _ in range(SEQUENCES)]
    return [*found[:-1], longest]


def full_rows(longest: int, rows: int = 4) -> list[int]:
    """Answers of the same kind, one as long as may be, whose rows are full however long that is."""
    chance, found, left = random.Random(1), [longest], rows * BUDGET - longest - PROMPT
    while left > PROMPT + 1:
        answer = max(1, min(longest, left - PROMPT, round(chance.lognormvariate(math.log(48), 1.0))))
        found.append(answer)
        left -= answer + PROMPT
    return found


class Pair:
    """Student and teacher, ready to take a step padded or packed."""

    def __init__(self, student: str, teacher: str, pipeline: int) -> None:
        from opd_megatron.config import load_config
        from opd_megatron.mcore.grid import ParallelGrid
        from opd_megatron.mcore.student import Student
        from opd_megatron.run.checks import check_run
        from opd_megatron.teacher import build_teachers

        values = {
            "student.path": student, "teachers.0.path": teacher, "student.dtype": "bf16", "teachers.0.dtype": "bf16",
            "data.source": "unused", "parallel.pipeline": pipeline, "parallel.data": 1,
            "rollout.prompts_per_step": SEQUENCES, "parallel.micro_batch_size": MICRO,
            "rollout.max_new_tokens": BUDGET - PROMPT,
        }  # fmt: skip
        self.config = load_config(None, [f"{key}={value}" for key, value in values.items()])
        self.models = check_run(self.config)
        self.grid = ParallelGrid.build(1, pipeline, 1)
        padded = self.models.padded_vocab(1)
        self.student = Student(self.config, self.models.student, self.models.student_config, self.grid, padded)
        self.teachers = build_teachers(self.config, self.models, self.grid)

    def step(self, lengths: list[int], tokens: int | None, micro: int = MICRO) -> tuple[float, float, int]:
        """(seconds, loss, tokens that went through the layers) of a step."""
        import torch

        from opd_megatron.data.batching import MicroBatchBuilder
        from opd_megatron.teacher import ask_teachers
        from opd_megatron.types import Prompt, Rollout

        generator = torch.Generator().manual_seed(0)
        vocabulary = self.models.vocab_size
        prompt = Prompt("p", tuple(torch.randint(vocabulary, (PROMPT,), generator=generator).tolist()), "")
        rollouts = [
            Rollout(prompt, torch.randint(vocabulary, (n,), generator=generator), None, 0, "stop") for n in lengths
        ]
        builder = MicroBatchBuilder(0, 1, micro, self.grid.pp_size > 1, 1, torch.device("cpu"), tokens=tokens)
        began = time.perf_counter()
        step = builder.build(rollouts)
        inputs = ask_teachers(self.teachers, step)
        result = self.student.update(step, inputs, self.config.objective, vocabulary)
        return time.perf_counter() - began, result.metrics["loss"], sum(batch.tokens.numel() for batch in step)


def timed(pair: Pair) -> dict[str, Any]:
    lengths = lengths_of(400, seed=1)
    ways = {"padded": None, "packed": BUDGET}
    for tokens in ways.values():
        pair.step(lengths, tokens)  # compiles, allocates
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    known: dict[str, Any] = {}
    for _ in range(REPEATS):
        for way, tokens in ways.items():
            taken, _, count = pair.step(lengths, tokens)
            seconds[way].append(taken)
            known[way] = count
    return {
        way: {"seconds": statistics.median(seconds[way]), "tokens": known[way], "useful": sum(lengths) + 16 * PROMPT}
        for way in ways
    }


def peaks(pair: Pair) -> list[dict[str, Any]]:
    """How far the resident memory of a step rises, for longer and longer answers."""
    import gc

    from opd_megatron.mcore.cpu.platform import release_memory

    pair.step(full_rows(64), BUDGET)
    found = []
    for longest in (128, 256, 512, BUDGET - PROMPT):
        row: dict[str, Any] = {"longest": longest}
        for way, tokens, micro in (("packed", BUDGET, 1), ("padded", None, 4)):
            gc.collect()
            release_memory()
            before = resident("VmRSS")
            forget_peak()
            lengths = full_rows(longest)
            pair.step(lengths[: len(lengths) // micro * micro], tokens, micro)
            row[way] = resident("VmHWM") - before
        found.append(row)
    return found


def main() -> None:
    student, teacher, task = sys.argv[2], sys.argv[3], sys.argv[5]
    folder, pipeline, rank = Path(sys.argv[1]), int(sys.argv[4]), int(os.environ["RANK"])
    import torch
    import torch.distributed as dist

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // pipeline))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=pipeline)
    from opd_megatron.mcore.cpu.platform import init_distributed

    init_distributed()
    pair = Pair(student, teacher, pipeline)
    result: Any = timed(pair) if task == "time" else peaks(pair)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
