"""The student: a Megatron model with its optimizer, trained on the terms of its objective."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import get_model_config
from transformers import PretrainedConfig

from opd_megatron.config import ObjectiveConfig, RunConfig, decided
from opd_megatron.errors import NonFiniteError
from opd_megatron.losses.reduction import TokenSums, global_means
from opd_megatron.mcore.average import WeightAverage
from opd_megatron.mcore.forward import run_schedule
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.model import Model, build_gpt_model, chunks_of
from opd_megatron.mcore.optimizer import (
    build_optimizer,
    build_scheduler,
    clip_and_step,
    make_optimizer_state,
    optimizer_tensors,
    wrap_ddp,
)
from opd_megatron.mcore.step_loss import StepLoss
from opd_megatron.mcore.te import fuse_weight_gradients, use_transformer_engine
from opd_megatron.system.host_memory import HostMemory
from opd_megatron.types import Batch, StepOutput, TeacherInputs
from opd_megatron.weights.layout import ShardLayout
from opd_megatron.weights.load import load_weights


class Student:
    """One rank's shard of the student, its gradients and its share of the optimizer state."""

    def __init__(
        self, config: RunConfig, source: Path, hf_config: PretrainedConfig, grid: ParallelGrid, padded_vocab: int
    ) -> None:
        self.hf_config, self.grid = hf_config, grid
        rollout = config.rollout
        # Whether the engine's log-probabilities are of the distribution that the loss computes.
        self._comparable = rollout.top_p == 1 and rollout.temperature == config.objective.temperature
        parallel = config.parallel
        self.layout: ShardLayout = grid.layout(
            hf_config.num_hidden_layers, padded_vocab, virtual=parallel.virtual_stages, stages=parallel.stages
        )
        transformer_engine = use_transformer_engine(config.student.transformer_engine)
        self.model: Model = build_gpt_model(
            hf_config,
            grid,
            padded_vocab=padded_vocab,
            dtype=decided(config.student.dtype),
            memory=config.student,
            transformer_engine=transformer_engine,
            precision=config.precision,
            parts=self.layout.parts,
        )
        load_weights(self.model, source, hf_config, self.layout)
        if transformer_engine:
            fuse_weight_gradients(self.model)
        self.chunks = [
            wrap_ddp(
                chunk,
                grid,
                overlap=parallel.overlap_grad_reduce,
                bucket_size=parallel.bucket_size,
                first=number == 0,
                precision=config.precision,
            )
            for number, chunk in enumerate(chunks_of(self.model))
        ]
        self.optimizer = build_optimizer(config.optimizer, self.chunks, grid, config.precision)
        self.scheduler = build_scheduler(config.optimizer, self.optimizer, config.steps)
        schedule_hooks = get_model_config(self.model)
        schedule_hooks.finalize_model_grads_func = finalize_model_grads
        syncs = [chunk.no_sync for chunk in self.chunks]
        schedule_hooks.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
        self.averages: dict[str, WeightAverage] = {}
        """Averages that follow its weights, by the name of who teaches with them; part of its checkpoints."""
        self._offloads = config.student.offload
        self._host = HostMemory()

    def update(
        self, micro_batches: list[Batch], teachers: list[TeacherInputs], objective: ObjectiveConfig, vocab_size: int
    ) -> StepOutput:
        """Makes one optimizer step: forward, loss and its gradient, backward, clip, update.

        Raises:
            NonFiniteError: loss or gradient norm is NaN or infinite, on every rank and before weights change.
        """
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sampled = self._comparable and all(batch.rollout_logprobs is not None for batch in micro_batches)
        loss = self._loss(teachers, objective, vocab_size, sampled=sampled)
        sums = run_schedule(list(self.chunks), self.grid, micro_batches, loss)
        metrics, tokens = self._global_means(sums, loss.names)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        if not (math.isfinite(metrics["loss"]) and math.isfinite(grad_norm)):
            raise NonFiniteError(
                f"loss={metrics['loss']} grad_norm={grad_norm} must be finite, {_who(metrics)}: the weights were "
                "left as they were"
            )
        self.scheduler.step(increment=1)
        with torch.no_grad():
            clip_and_step(self.optimizer, grad_norm)
        return StepOutput(metrics, tokens, grad_norm, self.lr)

    @torch.no_grad()
    def evaluate(
        self, micro_batches: list[Batch], teachers: list[TeacherInputs], objective: ObjectiveConfig, vocab_size: int
    ) -> dict[str, float]:
        """Computes the token means of the same metrics, without touching gradients."""
        self.model.eval()
        loss = self._loss(teachers, objective, vocab_size)
        sums = run_schedule(self.model, self.grid, micro_batches, loss, forward_only=True)
        return self._global_means(sums, loss.names)[0]

    def make_optimizer_state(self) -> None:
        """Takes the memory of the moments now, so that what else wants memory finds how much there is."""
        make_optimizer_state(self.optimizer)

    def move_out(self) -> None:
        """Frees the memory of what `student.offload` names, until `move_back`: the optimizer state goes to the host,
        gradients are those of a step that is done. Weights stay."""
        if "optimizer" in self._offloads:
            self._host.move_out(optimizer_tensors(self.optimizer, self.model))
        if "gradients" in self._offloads:
            for buffer in self._gradient_buffers():
                buffer.offload_to_cpu(move_params=False, move_grads=True)

    def move_back(self) -> None:
        """Makes the student trainable again; gradients are 0."""
        self._host.move_back()
        if "gradients" in self._offloads:
            for buffer in self._gradient_buffers():
                buffer.reload_from_cpu(move_params=False, move_grads=True)

    def _gradient_buffers(self) -> list[Any]:
        return [buffer for chunk in self.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]

    @property
    def dp_rank(self) -> int:
        """Which copy of the weights this rank's are: context-parallel ranks have one each."""
        return self.grid.groups.dp_cp.rank()

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _loss(
        self, teachers: list[TeacherInputs], objective: ObjectiveConfig, vocab_size: int, *, sampled: bool = False
    ) -> StepLoss:
        return StepLoss(self.model, self.grid, teachers, objective, vocab_size, sampled)

    def _global_means(self, sums: list[TokenSums], names: tuple[str, ...]) -> tuple[dict[str, float], int]:
        """Reduces to token means over all micro batches and ranks, the same on every rank."""
        groups = self.grid.groups
        device = next(self.model.parameters()).device
        means, tokens = global_means(sums, [groups.dp_cp, groups.pp], device, names)
        return dict(zip(names, means, strict=True)), tokens


def _who(metrics: dict[str, float]) -> str:
    """Says which side's numbers are not finite, and what to do about that."""
    own = all(math.isfinite(metrics[name]) for name in ("nll", "student_entropy") if name in metrics)
    theirs = all(math.isfinite(metrics[name]) for name in ("teacher_nll", "teacher_entropy") if name in metrics)
    if own and not theirs:
        return "the teacher's logits are not (its weights hold NaN or infinite values, download it again)"
    if theirs and not own:
        return (
            "the student's logits are not (its weights hold NaN or infinite values, or the last steps were too large: "
            "download it again, or lower optimizer.lr and resume from the last checkpoint)"
        )
    return "lower optimizer.lr or resume from the last checkpoint"
