"""On-policy distillation, one step at a time.

    prompts -> rollout -> teacher hidden states -> fused divergence -> backward -> optimizer -> weights into the engine

`OPDTrainer.step` is that line. Everything else here is the order of a run: start, resume, evaluate, save, finish.
"""

from __future__ import annotations

import json
from hashlib import sha256
from types import TracebackType
from typing import Any

import torch.distributed as dist

from opd_megatron.config import RunConfig
from opd_megatron.data.batching import global_length, make_micro_batches, shard_rollouts
from opd_megatron.data.transcript import readable_sample
from opd_megatron.errors import StopRequestedError
from opd_megatron.mcore.checkpoint import all_ranks_max, load_checkpoint, named_checkpoint
from opd_megatron.mcore.student import TeacherInputs
from opd_megatron.metrics import MetricsLog, NullLog, PhaseTimers, peak_memory_bytes
from opd_megatron.run.build import RunParts, build_parts
from opd_megatron.run.report import write_report
from opd_megatron.system.signals import stop_requested
from opd_megatron.types import Batch, Rollout, Sampling, StepMetrics


class OPDTrainer:
    """A run on this rank. Use as a context manager: leaving it ends the rollout engine."""

    def __init__(self, parts: RunParts) -> None:
        self.config: RunConfig = parts.config
        self.parts = parts
        self.step_count = 0
        """Optimizer steps done; the policy version of the weights."""
        self.timers = PhaseTimers()
        self._cursor = parts.prompts.state_dict()
        """Where the prompts of the next step begin; the stream itself is further on while a step is under way."""
        self._saved_step = 0

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
        """Trains to the last step, resuming from the newest checkpoint of the run directory if there is one.

        A stop signal on any rank (`stopping`) ends it after the current step, with a checkpoint of that step.
        """
        self.restore()
        parts, config = self.parts, self.config
        with self._log() as log:
            if self.step_count == 0:
                self._log_step_zero(log)
            try:
                if self.step_count < config.steps and not self._between_steps():
                    parts.sampler.start(self.step_count)
                    while self.step_count < config.steps:
                        self._train_step(log)
                        if self._between_steps():
                            break
            except StopRequestedError:  # on all ranks: an engine that was coming up was given up
                pass
        if self.step_count > self._saved_step:
            self.save({})
        parts.saver.finish()
        if self.step_count == config.steps:
            self._finish()
        else:
            parts.display.note(f"stopped after step {self.step_count}: the same command goes on from there")

    def restore(self, name: str = "latest") -> None:
        """Takes weights, optimizer and data cursor from a checkpoint: `latest` (the newest whole one; without any the
        student's own weights stay), `best`, or a step."""
        parts, found = self.parts, self.parts.found
        for warning in found.skipped if found else ():
            parts.display.note(warning)
        if name == "latest" and found is None:
            return
        path = found.path if found and name == "latest" else named_checkpoint(parts.run_dir.checkpoints, name)
        state = load_checkpoint(path, parts.student, parts.identity)
        parts.prompts.load_state_dict(state["prompts"])
        self._cursor = parts.prompts.state_dict()
        self.step_count = self._saved_step = int(state["policy_version"])
        parts.display.note(f"resumed from step {self.step_count} ({path})")

    def save(self, figures: dict[str, float]) -> None:
        """Begins a checkpoint of this very step; `figures` of its row of metrics may make it the best one."""
        identity = self.parts.identity
        state: dict[str, Any] = {
            "step": self.step_count,
            "policy_version": self.step_count,
            "prompts": self._cursor,
            "metrics": {key: value for key, value in figures.items() if key == self.config.checkpoint.best_metric},
            "identity": identity,
            "config_hash": sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        }
        self.parts.saver.save(self.step_count, self.parts.student, state)
        self._saved_step = self.step_count

    def evaluate(self) -> dict[str, float]:
        """Held-out figures at temperature 1, in nats per token of the gold answers (`Evaluator.figures`)."""
        return self.parts.evaluator.figures(self.parts.student)

    def _train_step(self, log: MetricsLog | NullLog) -> None:
        metrics = self.step()
        self._cursor = self.parts.prompts.state_dict()
        saves = self._due(self.config.checkpoint.every)
        if self._evaluates(saves):
            metrics.extra.update(self.evaluate())
        log.write(metrics)
        self.parts.display.step(metrics)
        if saves:
            self.save(metrics.as_dict())

    def _between_steps(self) -> bool:
        """Publishes the checkpoint that all ranks have written; True when any rank was asked to stop."""
        saver = self.parts.saver
        stop, writing = all_ranks_max(stop_requested(), saver.is_writing)
        if saver.pending and not writing:
            saver.finish()
        return stop

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
        mine = shard_rollouts(rollouts, grid.dp_rank, grid.dp_size)
        # Stages of a pipeline exchange tensors of one shape; without one, each micro batch is as long as it must be.
        length = global_length(rollouts) if grid.pp_size > 1 else None
        return make_micro_batches(
            [(rollout.prompt.token_ids, rollout.response_ids) for rollout in mine],
            self.config.micro_batch_size(grid.dp_size),
            logprobs=[rollout.logprobs for rollout in mine],
            length=length,
            multiple_of=self.parts.length_multiple,
            device=self.parts.device,
        )

    def _ask_teachers(self, micro_batches: list[Batch]) -> list[TeacherInputs]:
        return [
            TeacherInputs(teacher.hidden_states(micro_batches), teacher.head, teacher.weight)
            for teacher in self.parts.teachers
        ]

    def _evaluates(self, saves: bool) -> bool:
        every, best = self.config.evaluation.every, self.config.checkpoint.best_metric
        return every > 0 and (self._due(every) or (saves and best is not None and best.startswith("eval/")))

    def _due(self, every: int) -> bool:
        return self.step_count == self.config.steps or (every > 0 and self.step_count % every == 0)

    def _show_sample(self, rollouts: list[Rollout]) -> None:
        every = self.config.logging.sample_every
        if every and (self.step_count == 1 or self.step_count % every == 0):
            self.parts.display.sample(readable_sample(rollouts[0], self.parts.tokenizer))

    def _log_step_zero(self, log: MetricsLog | NullLog) -> None:
        """Row 0 of the metrics, and a line that shows a wrong or half-loaded teacher before it has taught anything."""
        figures = self.evaluate()
        log.write({"step": 0, "policy_version": 0, **figures})
        for line in self.parts.evaluator.teacher_summary(figures, [teacher.path for teacher in self.config.teachers]):
            self.parts.display.note(line)


def _rollout_figures(rollouts: list[Rollout]) -> dict[str, float]:
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    return {
        "rollout/mean_length": sum(lengths) / len(lengths),
        "rollout/finished": sum(rollout.finish_reason == "stop" for rollout in rollouts) / len(rollouts),
    }
