"""The other side of `step_vs_trl.py`: TRL's DistillationTrainer on the same pair and prompts, one JSON object as the
result.

Fully on-policy, as it always is, reverse KL (beta=1) in its chunked form, temperature 1, AdamW without weight decay,
constant learning rate. Settings are TRL's fastest on a plain CPU: no gradient checkpointing, no logging, evaluation,
saving or workers. `--precision` chooses the arithmetic, of the teacher too:

    fp32        fp32 throughout: the fastest on a CPU without bf16 units
    bf16        bf16 weights, gradients and Adam moments: the smallest, and the fastest on a CPU with bf16 units
    mixed       TRL's defaults: fp32 weights and moments with bf16 autocast (opd_megatron keeps these in fp32 too);
                its generation runs outside autocast, in fp32

`--vllm` samples with vLLM in TRL's own process (`vllm_mode="colocate"`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

PRECISIONS = ("fp32", "bf16", "mixed")


class StepClock(TrainerCallback):
    """Seconds from the moment a batch is at hand to the end of its optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begin = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._begin)


class CountingTrainer(DistillationTrainer):
    """DistillationTrainer that remembers the number of sampled tokens and the loss of each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.sampled_tokens: list[int] = []
        self.losses: list[float] = []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.sampled_tokens.append(int(inputs["completion_mask"].sum()))
        self.losses.append(float(loss.detach()))
        return loss


def trainer_config(arguments: argparse.Namespace, output_dir: str) -> DistillationConfig:
    """The trainer's arguments."""
    return DistillationConfig(
        output_dir=output_dir,
        beta=1.0, temperature=1.0, max_completion_length=arguments.max_new_tokens,
        use_vllm=arguments.vllm, vllm_mode="colocate", vllm_max_model_length=1024,
        per_device_train_batch_size=arguments.batch, gradient_accumulation_steps=1, max_steps=arguments.steps,
        learning_rate=arguments.lr, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
        bf16=arguments.precision == "mixed", gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(),
        logging_strategy="no", save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_num_workers=0, dataloader_pin_memory=False,
    )  # fmt: skip


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the steps; returns their seconds, sampled tokens and losses."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.student)
    main = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    frozen = torch.float32 if arguments.precision == "fp32" else torch.bfloat16
    student = AutoModelForCausalLM.from_pretrained(arguments.student, dtype=main)
    teacher = AutoModelForCausalLM.from_pretrained(arguments.teacher, dtype=frozen)
    rows = [json.loads(line) for line in Path(arguments.prompts).read_text().splitlines()]
    prompts = [[{"role": "user", "content": row["question"]}] for row in rows]
    clock = StepClock()
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = CountingTrainer(
            model=student,
            teacher_model=teacher,
            args=trainer_config(arguments, output_dir),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    return {"seconds": clock.seconds, "tokens": trainer.sampled_tokens, "losses": trainer.losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("student", "teacher", "prompts", "out"):
        parser.add_argument(f"--{name}", required=True, metavar="PATH")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="prompts a step")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--vllm", action="store_true", help="sample with vLLM")
    arguments = parser.parse_args()
    Path(arguments.out).write_text(json.dumps(train(arguments)))


if __name__ == "__main__":
    main()
