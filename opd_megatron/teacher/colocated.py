"""A teacher on the student's own ranks, in the same tensor- and pipeline-parallel layout."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PretrainedConfig

from opd_megatron.config import RunConfig, StudentRanksTeacherConfig, decided
from opd_megatron.mcore.forward import response_hidden
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.model import HiddenStatesModel, build_gpt_model
from opd_megatron.mcore.spec import use_transformer_engine
from opd_megatron.models import ResolvedModels, check_divisible
from opd_megatron.models.sizes import BYTES_PER_ELEMENT, LayerSizes, RunSizes
from opd_megatron.system.host_memory import HostMemory
from opd_megatron.teacher.base import TeacherCost
from opd_megatron.types import Batch, TeacherInputs
from opd_megatron.weights.load import load_weights


class ColocatedTeacher:
    """Frozen Megatron model. Its vocabulary is padded like the student's, so its head already lies where the
    student's does and needs no copy."""

    def __init__(self, model: HiddenStatesModel, grid: ParallelGrid, weight: float, *, offload: bool = False) -> None:
        self._model, self._grid, self._weight = model, grid, weight
        self._offload, self._host = offload, HostMemory()
        self._hidden: list[torch.Tensor] = []

    def submit(self, micro_batches: list[Batch]) -> None:
        """Runs the forward passes: there is nobody else to wait for."""
        self._hidden = response_hidden(self._model, self._grid, micro_batches)

    def collect(self) -> TeacherInputs:
        """Hands over hidden states and head of every micro batch; keeps neither."""
        hidden, self._hidden = self._hidden, []
        if not self._grid.is_last_stage:
            return TeacherInputs((), self._weight)
        head = self._model.head_weight.detach()
        return TeacherInputs([(states, head) for states in hidden], self._weight)

    def move_out(self) -> None:
        """Moves its weights to the host's memory if `offload` says so."""
        if self._offload:
            self._host.move_out(self._model.parameters())

    def move_back(self) -> None:
        """Takes its weights back."""
        self._host.move_back()

    def close(self) -> None:
        """Does nothing: memory is all that it holds."""


class StudentRanks:
    """`placement: student`."""

    def check(self, teacher: StudentRanksTeacherConfig, hf_config: PretrainedConfig, config: RunConfig) -> None:
        """Requires that the student's sizes divide the teacher's heads, columns, layers and experts too."""
        check_divisible(f"teacher {teacher.path!r}", hf_config, config)

    def build(
        self, teacher: StudentRanksTeacherConfig, source: tuple[Path, PretrainedConfig], models: ResolvedModels,
        grid: ParallelGrid, config: RunConfig, weight: float,
    ) -> ColocatedTeacher:  # fmt: skip
        """Loads this rank's shard of the teacher."""
        folder, hf_config = source
        padded_vocab = models.padded_vocab(grid.tp_size)
        model = build_gpt_model(
            hf_config,
            grid,
            padded_vocab=padded_vocab,
            dtype=decided(teacher.dtype),
            transformer_engine=use_transformer_engine(config.student.transformer_engine),
        )
        load_weights(model, folder, hf_config, grid.layout(hf_config.num_hidden_layers, padded_vocab))
        model.requires_grad_(False)
        model.eval()
        return ColocatedTeacher(model, grid, weight, offload=teacher.offload)

    def cost(
        self, teacher: StudentRanksTeacherConfig, hf_config: PretrainedConfig, sizes: RunSizes, stage: int
    ) -> TeacherCost:
        """Estimates its shard of frozen weights, its head on the last stage, and there the hidden states of a step."""
        element, shard, layer = (
            BYTES_PER_ELEMENT[decided(teacher.dtype)],
            sizes.stage(hf_config, stage),
            LayerSizes.of(hf_config),
        )
        head = 0 if shard.tied else shard.head
        last = stage == sizes.pp_size - 1
        states = sizes.response_tokens * sizes.micro_batches * hf_config.hidden_size * element if last else 0
        to_experts = 2 * layer.experts_per_token * hf_config.hidden_size * hf_config.num_hidden_layers * element
        return TeacherCost(
            memory={
                "teachers": (shard.parameters - head) * element,
                "teacher heads": head * element,
                "teacher states": states,
            },
            logits_bytes=sizes.vocab_per_rank * element,
            tensor_bytes=2 * hf_config.num_hidden_layers * hf_config.hidden_size * element,
            pipeline_bytes=hf_config.hidden_size * element,
            expert_bytes=to_experts,
            flops=sizes.body_flops(hf_config) + sizes.head_flops(hf_config),
        )
