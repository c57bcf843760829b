"""`placement: student`: a teacher on the student's own ranks, in its layout or its own, or the student itself."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from opd_megatron.config import ParallelConfig, RunConfig, StudentRanksTeacherConfig, decided
from opd_megatron.errors import ConfigError
from opd_megatron.mcore.average import WeightAverage
from opd_megatron.models import check_divisible
from opd_megatron.models.sizes import BYTES_PER_ELEMENT, LayerSizes, RunSizes
from opd_megatron.teacher.base import Surroundings, Teacher, TeacherCost
from opd_megatron.teacher.colocated import ColocatedTeacher
from opd_megatron.teacher.relaid import RelaidTeacher
from opd_megatron.teacher.self_distillation import DEFAULT_DECAY, AverageTeacher, LiveTeacher
from opd_megatron.teacher.source import StatesSource, load_teacher
from opd_megatron.types import DTYPES
from opd_megatron.weights.families import family_of

AVERAGE_BYTES = 4
"""Of an element of a moving average, beside the element that the teacher computes with where that has fewer."""


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
        if teacher.update == "live":
            assert around.student is not None
            return LiveTeacher(around.student, weight)
        if link is None:
            model = load_teacher(
                teacher, source, around.models, around.grid, around.config, like_student=teacher.update == "ema"
            )
            if teacher.update == "ema":
                assert around.student is not None
                decay = DEFAULT_DECAY if teacher.decay is None else teacher.decay
                average = WeightAverage(model, around.student.model, decay)
                around.student.averages[f"teachers.{around.number}"] = average
                return AverageTeacher(average, around.student, weight, offload=teacher.offload)
            return ColocatedTeacher(model, around.grid, weight, offload=teacher.offload)
        assert link.grid is not None
        model = load_teacher(teacher, source, around.models, link.grid, around.config)
        states = StatesSource(
            model, link.grid, link.route, sharded=around.grid.sequence_parallel,
            multiple_of=teacher.precision.alignment,
        )  # fmt: skip
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
            head = sizes.head_columns(hf_config) * hf_config.hidden_size if last else 0
        states = sizes.step_response_tokens * hf_config.hidden_size * element if last else 0
        held = float((shard.parameters - (head if same else 0)) * element)
        held += sizes.frozen_fp8_bytes(hf_config, shard, teacher.precision, element)
        if teacher.update == "live":
            held, head = 0.0, 0
        elif teacher.update == "ema" and element < AVERAGE_BYTES:
            held += shard.parameters * AVERAGE_BYTES
        translated = 0  # of a teacher with another tokenizer, beside the model's own
        if teacher.alignment is not None and same and last:
            translated = sizes.head_columns(hf_config) * hf_config.hidden_size
        layout = ParallelConfig(
            tensor=tensor, pipeline=pipeline, expert=sizes.ep_size, data=sizes.ranks // (tensor * pipeline)
        )
        to_experts = 2 * layer.experts_per_token * hf_config.hidden_size * hf_config.num_hidden_layers * element
        return TeacherCost(
            memory={
                "teachers": held,
                "teacher heads": (head + translated) * element,
                "teacher states": states,
            },
            logits_bytes=sizes.head_columns(hf_config) * element,
            tensor_bytes=2 * hf_config.num_hidden_layers * hf_config.hidden_size * element,
            pipeline_bytes=hf_config.hidden_size * element,
            expert_bytes=to_experts,
            states_bytes=0.0 if same else states,
            flops=sizes.body_flops(hf_config) + sizes.head_flops(hf_config),
            away=(held + (head * element if same else 0)) if teacher.offload else 0.0,
            layout=None if same else layout,
        )
