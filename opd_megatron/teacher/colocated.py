"""A teacher on the student's own ranks, in the same tensor- and pipeline-parallel layout."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PretrainedConfig

from opd_megatron.config import ParallelConfig, RunConfig, StudentRanksTeacherConfig, decided
from opd_megatron.errors import ConfigError
from opd_megatron.mcore.forward import response_hidden
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.model import HiddenStatesModel
from opd_megatron.models import check_divisible
from opd_megatron.models.sizes import BYTES_PER_ELEMENT, LayerSizes, RunSizes
from opd_megatron.system.host_memory import HostMemory
from opd_megatron.teacher.base import Surroundings, Teacher, TeacherCost
from opd_megatron.teacher.relaid import RelaidTeacher
from opd_megatron.teacher.source import StatesSource, load_teacher
from opd_megatron.types import DTYPES, Batch, TeacherInputs
from opd_megatron.weights.families import family_of


class ColocatedTeacher:
    """Frozen Megatron model. Its vocabulary is padded like the student's, so its head already lies where the
    student's does and needs no copy."""

    beside = False

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

    def check(
        self, number: int, teacher: StudentRanksTeacherConfig, hf_config: PretrainedConfig, config: RunConfig,
        data_parallel: int,
    ) -> None:  # fmt: skip
        """Requires that the sizes divide the teacher's heads, columns, layers and experts, and the student's ranks."""
        parallel, name = config.parallel, f"teacher {teacher.path!r}"
        tensor, pipeline = teacher.tensor or parallel.tensor, teacher.pipeline or parallel.pipeline
        same = (tensor, pipeline) == (parallel.tensor, parallel.pipeline)
        keys = "parallel" if teacher.tensor is None and teacher.pipeline is None else f"teachers.{number}"
        check_divisible(name, hf_config, tensor, pipeline, parallel.expert, keys)
        ranks = parallel.model * data_parallel
        copies, rest = divmod(ranks, tensor * pipeline)
        if rest or (family_of(hf_config).experts and copies % parallel.expert and not same):
            raise ConfigError(
                f"teachers.{number}.tensor={tensor} * pipeline={pipeline} must divide the student's {ranks} ranks"
                + (f" into a multiple of parallel.expert={parallel.expert}" if not rest else "")
                + ": change one of them, or give the teacher ranks of its own (placement: own)"
            )

    def build(
        self, teacher: StudentRanksTeacherConfig, source: tuple[Path, PretrainedConfig], weight: float,
        surroundings: Surroundings,
    ) -> Teacher:  # fmt: skip
        """Loads this rank's shard of the teacher."""
        around, link, dtype = surroundings, surroundings.link, decided(teacher.dtype)
        if link is None:
            model = load_teacher(teacher, source, around.models, around.grid, around.config)
            return ColocatedTeacher(model, around.grid, weight, offload=teacher.offload)
        assert link.grid is not None
        model = load_teacher(teacher, source, around.models, link.grid, around.config)
        states = StatesSource(model, link.grid, link.route, sharded=around.grid.sequence_parallel)
        head = around.heads.of(*source, dtype)
        return RelaidTeacher(
            states, link, head, around.grid, weight, width=source[1].hidden_size, dtype=DTYPES[dtype],
            offload=teacher.offload, name=repr(teacher.path),
        )  # fmt: skip

    def cost(
        self, teacher: StudentRanksTeacherConfig, hf_config: PretrainedConfig, sizes: RunSizes, stage: int
    ) -> TeacherCost:
        """Estimates its shard of frozen weights, its head on the last stage, and there the hidden states of a step."""
        element, layer = BYTES_PER_ELEMENT[decided(teacher.dtype)], LayerSizes.of(hf_config)
        tensor, pipeline = teacher.tensor or sizes.tp_size, teacher.pipeline or sizes.pp_size
        same = (tensor, pipeline) == (sizes.tp_size, sizes.pp_size)
        shard = sizes.stage(hf_config, stage) if same else sizes.largest_stage(hf_config, tensor, pipeline)
        last = stage == sizes.pp_size - 1
        head = 0 if shard.tied else shard.head
        if not same:
            head = sizes.vocab_per_rank * hf_config.hidden_size if last else 0
        states = sizes.response_tokens * sizes.micro_batches * hf_config.hidden_size * element if last else 0
        held = (shard.parameters - (head if same else 0)) * element
        layout = ParallelConfig(
            tensor=tensor, pipeline=pipeline, expert=sizes.ep_size, data=sizes.ranks // (tensor * pipeline)
        )
        to_experts = 2 * layer.experts_per_token * hf_config.hidden_size * hf_config.num_hidden_layers * element
        return TeacherCost(
            memory={
                "teachers": held,
                "teacher heads": head * element,
                "teacher states": states,
            },
            logits_bytes=sizes.vocab_per_rank * element,
            tensor_bytes=2 * hf_config.num_hidden_layers * hf_config.hidden_size * element,
            pipeline_bytes=hf_config.hidden_size * element,
            expert_bytes=to_experts,
            states_bytes=0.0 if same else states,
            flops=sizes.body_flops(hf_config) + sizes.head_flops(hf_config),
            away=(held + (head * element if same else 0)) if teacher.offload else 0.0,
            layout=None if same else layout,
        )
