"""One measured process of `long_answers.py`: `SIDE STUDENT TEACHER LENGTH OUT`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _memory_rank import resident

PROMPT, STEPS = 64, 2


def ours(student: str, teacher: str, length: int) -> list[float]:
    import torch

    from opd_megatron.config import load_config
    from opd_megatron.mcore.cpu.platform import init_distributed
    from opd_megatron.mcore.student import Student
    from opd_megatron.run.build import _batches, _grid
    from opd_megatron.run.checks import check_run
    from opd_megatron.teacher import Views, ask_teachers, build_teachers
    from opd_megatron.types import Prompt, Rollout

    values = {
        "student.path": student, "teachers.0.path": teacher, "data.source": "unused", "student.dtype": "bf16",
        "teachers.0.dtype": "bf16", "rollout.dtype": "bf16", "student.recompute": "true", "parallel.data": 1,
        "data.max_prompt_tokens": PROMPT, "rollout.max_new_tokens": length, "rollout.prompts_per_step": 1,
    }  # fmt: skip
    config = load_config(None, [f"{key}={value}" for key, value in values.items()])
    init_distributed()
    models = check_run(config)
    grid = _grid(config, models)
    made = Student(config, models.student, models.student_config, grid, models.padded_vocab(1))
    teachers = build_teachers(config, models, grid)
    builder = _batches(config, models, grid, Views.of_run(config, models, {}))
    generator, seconds = torch.Generator().manual_seed(0), []
    for _ in range(STEPS):
        prompt = tuple(torch.randint(models.vocab_size, (PROMPT,), generator=generator).tolist())
        answer = torch.randint(models.vocab_size, (length,), generator=generator)
        step = builder.build([Rollout(Prompt("p", prompt, ""), answer, None, 0, "length")])
        began = time.perf_counter()
        made.update(step, ask_teachers(teachers, step), config.objective, models.vocab_size)
        seconds.append(time.perf_counter() - began)
    return seconds


def trl(student: str, teacher: str, length: int) -> list[float]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DistillationConfig, DistillationTrainer

    class GivenAnswers(DistillationTrainer):
        """Answers without sampling them."""

        def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
            self.began = time.perf_counter()
            return [torch.randint(1000, 40000, (length,)).tolist() for _ in prompt_ids]

    seconds: list[float] = []
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in (student, teacher)]
    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            output_dir=folder, beta=1.0, temperature=1.0, max_completion_length=length,
            per_device_train_batch_size=1, gradient_accumulation_steps=1, max_steps=STEPS, learning_rate=1e-5,
            lr_scheduler_type="constant", weight_decay=0.0, gradient_checkpointing=True, use_cpu=True, bf16=False,
            logging_strategy="no", save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True,
            dataloader_num_workers=0, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = GivenAnswers(
            model=models[0], teacher_model=models[1], args=config,
            processing_class=AutoTokenizer.from_pretrained(student),
            train_dataset=Dataset.from_dict({"prompt": ["word " * PROMPT] * STEPS}),
        )  # fmt: skip
        began = time.perf_counter()
        trainer.train()
        seconds.append((time.perf_counter() - began) / STEPS)
    return seconds


def main() -> None:
    side, student, teacher, length, out = sys.argv[1:6]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    seconds = {"ours": ours, "trl": trl}[side](student, teacher, int(length))
    Path(out).write_text(json.dumps({"peak": resident("VmHWM"), "seconds": min(seconds)}))


if __name__ == "__main__":
    main()
