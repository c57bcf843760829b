"""On-policy distillation, one step at a time.

    prompts -> rollout -> teacher hidden states -> fused divergence -> backward -> optimizer -> weights into the engine

`OPDTrainer.step` is that line. Everything else here is the order of a run: start, resume, evaluate, save, finish.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch.distributed as dist

from opd_megatron.build import RunParts, build_parts
from opd_megatron.config import RunConfig
from opd_megatron.data.batching import global_length, make_micro_batches, shard_rollouts
from opd_megatron.data.readable import readable_sample
from opd_megatron.mcore.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from opd_megatron.mcore.student import TeacherView
from opd_megatron.metrics import MetricsLog, NullLog, PhaseTimers, peak_memory_bytes
from opd_megatron.report import write_report
from opd_megatron.types import Batch, Rollout, Sampling, StepMetrics


class OPDTrainer:
    """A run on this rank. Use as a context manager: leaving it ends the rollout engine."""

    def __init__(self, parts: RunParts) -> None:
        self.config: RunConfig = parts.config
        self.parts = parts
        self.step_count = 0
        """Optimizer steps done; the policy version of the weights."""
        self.timers = PhaseTimers()

    @classmethod
    def from_config(cls, config: RunConfig, *, sampling: bool = True, scoring: bool = True) -> OPDTrainer:
        """Checks everything, joins the process group and loads the models.

        `evaluate` does without `sampling` (no rollout engine), an export without `scoring` too (no teachers).
        """
        return cls(build_parts(config, sampling=sampling, scoring=scoring))

    def __enter__(self) -> OPDTrainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.parts.close()

    # The line

    def step(self) -> StepMetrics:
        """One optimizer step on fresh samples of the student."""
        parts, config, timers = self.parts, self.config, self.timers
        prompts = [p for p in parts.prompts.next_prompts() for _ in range(config.rollout.samples_per_prompt)]
        with timers.phase("rollout"):
            rollouts = parts.sampler.sample(prompts, self._sampling())
        micro_batches = self._micro_batches(rollouts)
        with timers.phase("teacher"):
            teachers = self._ask_teachers(micro_batches)
        with timers.phase("train"):
            update = parts.student.update(micro_batches, teachers, config.objective, parts.vocab_size)
        self.step_count += 1
        with timers.phase("sync"):
            parts.sampler.push(self.step_count)
        self._show_sample(rollouts)
        means = dict(update.metrics)
        return StepMetrics(
            step=self.step_count,
            tokens=update.tokens,
            policy_version=rollouts[0].policy_version,
            grad_norm=update.grad_norm,
            lr=update.lr,
            loss=means.pop("loss"),
            reverse_kl=means.pop("reverse_kl"),
            forward_kl=means.pop("forward_kl"),
            extra={**means, **_rollout_figures(rollouts), **timers.collect(), "memory/peak": peak_memory_bytes()},
        )

    # The run

    def train(self) -> None:
        """Trains to the last step, resuming from the newest checkpoint of the run directory if there is one."""
        self.restore()
        parts, config = self.parts, self.config
        with self._log() as log:
            if self.step_count == 0:
                self._introduce_teachers(log)
            if self.step_count < config.steps:
                parts.sampler.start(self.step_count)
            while self.step_count < config.steps:
                self._train_step(log)
        self._finish()

    def restore(self) -> None:
        """Takes weights, optimizer and data cursor from the newest checkpoint; without one the student's own weights
        stay."""
        found = list_checkpoints(self.parts.run_dir.checkpoints)
        if not found:
            return
        step, path = found[-1]
        state = load_checkpoint(path, self.parts.student)
        self.parts.prompts.load_state_dict(state["prompts"])
        self.step_count = int(state["policy_version"])
        self.parts.display.note(f"resumed from step {step} ({path})")

    def save(self) -> None:
        """Writes a checkpoint of this very step."""
        state: dict[str, Any] = {
            "step": self.step_count,
            "policy_version": self.step_count,
            "prompts": self.parts.prompts.state_dict(),
        }
        folder = self.parts.run_dir.checkpoints
        save_checkpoint(folder, self.step_count, self.parts.student, state, keep=self.config.checkpoint.keep)

    def evaluate(self) -> dict[str, float]:
        """Held-out figures at temperature 1, in nats per token of the gold answers (`Evaluator.figures`)."""
        return self.parts.evaluator.figures(self.parts.student)

    def _train_step(self, log: MetricsLog | NullLog) -> None:
        metrics = self.step()
        every = self.config.evaluation.every
        if every and self._due(every):
            metrics.extra.update(self.evaluate())
        log.write(metrics)
        self.parts.display.step(metrics)
        if self._due(self.config.checkpoint.every):
            self.save()

    def _finish(self) -> None:
        """Exports the student and shows what came of the run."""
        parts = self.parts
        exported = parts.export_hf() if self.config.checkpoint.export_hf else None
        if dist.get_rank() == 0:
            parts.display.close()
            parts.display.print(write_report(parts.run_dir.root))
            if exported is not None:
                parts.display.note(f"student   {exported}")

    def _log(self) -> MetricsLog | NullLog:
        """metrics.jsonl on rank 0. The run directory is this run's from here on."""
        if dist.get_rank() > 0:
            return NullLog()
        self.parts.run_dir.prepare(self.config)
        logging = self.config.logging
        return MetricsLog(
            self.parts.run_dir.root,
            tensorboard=logging.tensorboard,
            wandb_project=logging.wandb_project,
            config_dict=self.config.model_dump(mode="json"),
            resume_step=self.step_count or None,
        )

    # Pieces of the line

    def _sampling(self) -> Sampling:
        rollout = self.config.rollout
        return Sampling(
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            stop_token_ids=self.parts.stop_token_ids,
            # Every sequence of the run has a seed of its own, which a resumed run finds again.
            seed=self.config.seed * 1_000_003 + self.step_count * self.config.sequences_per_step,
        )

    def _micro_batches(self, rollouts: list[Rollout]) -> list[Batch]:
        grid = self.parts.student.grid
        mine = shard_rollouts(rollouts, grid.dp_rank, grid.data)
        # Stages of a pipeline exchange tensors of one shape; without one, each micro batch is as long as it must be.
        length = global_length(rollouts) if grid.pipeline > 1 else None
        return make_micro_batches(
            [(rollout.prompt.token_ids, rollout.response_ids) for rollout in mine],
            self.config.micro_batch_size(grid.data),
            logprobs=[rollout.logprobs for rollout in mine],
            length=length,
            multiple_of=self.parts.length_multiple,
            device=self.parts.device,
        )

    def _ask_teachers(self, micro_batches: list[Batch]) -> list[TeacherView]:
        return [
            TeacherView(teacher.hidden_states(micro_batches), teacher.head, teacher.weight)
            for teacher in self.parts.teachers
        ]

    def _due(self, every: int) -> bool:
        return self.step_count == self.config.steps or (every > 0 and self.step_count % every == 0)

    def _show_sample(self, rollouts: list[Rollout]) -> None:
        every = self.config.logging.sample_every
        if every and (self.step_count == 1 or self.step_count % every == 0):
            self.parts.display.sample(readable_sample(rollouts[0], self.parts.tokenizer))

    def _introduce_teachers(self, log: MetricsLog | NullLog) -> None:
        """Row 0 of the metrics, and a line that shows a wrong or half-loaded teacher before it has taught anything."""
        figures = self.evaluate()
        log.write({"step": 0, "policy_version": 0, **figures})
        for line in self.parts.evaluator.teacher_lines(figures, [teacher.path for teacher in self.config.teachers]):
            self.parts.display.note(line)


def _rollout_figures(rollouts: list[Rollout]) -> dict[str, float]:
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    return {
        "rollout/mean_length": sum(lengths) / len(lengths),
        "rollout/finished": sum(rollout.finish_reason == "stop" for rollout in rollouts) / len(rollouts),
    }
