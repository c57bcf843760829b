"""Which layouts a model can have: rules on its `config.json`, checked before any process group exists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from opd_megatron.config import ParallelConfig, PrecisionConfig, RunConfig
from opd_megatron.errors import ConfigError
from opd_megatron.system.ranks import launched
from opd_megatron.weights.families import Dims, family_of, sizes_split_by_tensor
from opd_megatron.weights.hf_reader import load_hf_config, resolve_model
from opd_megatron.weights.layout import pad_vocab


@dataclass(frozen=True, slots=True)
class ResolvedModels:
    """Where the models of a run lie and what their configs say."""

    student: Path
    student_config: PretrainedConfig
    teachers: list[tuple[Path, PretrainedConfig]]
    tokenizer: Path
    data_parallel: int
    aligned: frozenset[int] = frozenset()
    """Numbers of the teachers with another vocabulary."""

    @property
    def vocab_size(self) -> int:
        """Vocabulary columns that every model of the student's vocabulary has; anything past them is padding to one of
        them."""
        return min(hf_config.vocab_size for hf_config in self._of_one_vocabulary)

    @property
    def _of_one_vocabulary(self) -> list[PretrainedConfig]:
        others = [hf_config for number, (_, hf_config) in enumerate(self.teachers) if number not in self.aligned]
        return [self.student_config, *others]

    @property
    def configs(self) -> list[PretrainedConfig]:
        return [self.student_config, *(hf_config for _, hf_config in self.teachers)]

    def padded_vocab(self, tensor: int, of: PretrainedConfig | None = None) -> int:
        """Pads the vocabulary: one number for every embedding and head of the student's vocabulary, so that all heads
        shard alike, and another `of` a teacher that has its own."""
        if of is not None and any(self.teachers[number][1] is of for number in self.aligned):
            return pad_vocab(of.vocab_size, tensor)
        return pad_vocab(max(hf_config.vocab_size for hf_config in self._of_one_vocabulary), tensor)


def resolve_models(config: RunConfig, resolve: Callable[[str], Path] = resolve_model) -> ResolvedModels:
    """Finds the models of a run and checks every rule of the student's layout. A teacher's
    placement checks its own layout (`teacher.check_teachers`).

    `resolve` finds the folder of a model; only its config.json is read.

    Raises:
        MissingPathError, UnsupportedModelError: see `weights`.
        ConfigError: a size that does not divide, or a world size that does not match.
    """
    data_parallel = _data_parallel(config)
    config.micro_batch_size(data_parallel)
    student = resolve(config.student.path)
    teachers = [student if teacher.is_student else resolve(teacher.path) for teacher in config.teachers]
    tokenizer = resolve(config.student.tokenizer) if config.student.tokenizer else student
    models = ResolvedModels(
        student,
        load_hf_config(student),
        [(path, load_hf_config(path)) for path in teachers],
        tokenizer,
        data_parallel,
        frozenset(number for number, teacher in enumerate(config.teachers) if teacher.alignment is not None),
    )
    for hf_config in models.configs:
        family_of(hf_config)
    parallel = config.parallel
    name = f"student {config.student.path!r}"
    check_divisible(name, models.student_config, parallel.tensor, parallel.pipeline, parallel.expert)
    check_stages(name, models.student_config, parallel)
    _check_fp8_shapes(name, "", config.precision, models.student_config, parallel.tensor, parallel.pipeline)
    for number, (teacher, (_, hf_config)) in enumerate(zip(config.teachers, models.teachers, strict=True)):
        if (precision := getattr(teacher, "precision", None)) is not None:
            _check_fp8_shapes(
                f"teacher {teacher.path!r}", f"teachers.{number}.", precision, hf_config,
                getattr(teacher, "tensor", None) or parallel.tensor,
                getattr(teacher, "pipeline", None) or parallel.pipeline,
            )  # fmt: skip
    _check_modules(models, config)
    _check_experts(models, config)
    _check_context("the student", models.student_config, config)
    for teacher, (_, hf_config) in zip(config.teachers, models.teachers, strict=True):
        _check_context(f"teacher {teacher.path!r}", hf_config, config)
    return models


def _data_parallel(config: RunConfig) -> int:
    """Computes the data-parallel size that the world size (torchrun's, or the config's) leaves the student."""
    parallel, hosts, taught_from = config.parallel, config.rollout.hosts or 0, config.teacher_ranks
    ranks = launched()
    world = config.world_size if ranks is None else ranks.world_size
    data, rest = divmod(world - hosts - taught_from, parallel.model)
    if data < 1 or rest or (parallel.data is not None and parallel.data != data):
        wanted = f"parallel.tensor {parallel.tensor} * parallel.pipeline {parallel.pipeline}"
        wanted += f" * parallel.context {parallel.context}" if parallel.context > 1 else ""
        if parallel.data is not None or hosts or taught_from:
            wanted += f" * parallel.data {parallel.data or 'of any size'}"
            wanted += f" + {taught_from} ranks of teachers' own" if taught_from else ""
            wanted += f" + rollout.hosts {hosts}" if hosts else ""
            relation = "equal"
        else:
            relation = "be a multiple of"
        raise ConfigError(f"world size {world} must {relation} {wanted}: start another number of ranks or change them")
    return data


def check_divisible(
    name: str, hf_config: PretrainedConfig, tensor: int, pipeline: int, expert: int, keys: str = "parallel"
) -> None:
    """Raises ConfigError unless the parallel sizes divide the model's heads, columns, layers and experts. `keys`: the
    section that they are keys of."""
    dims, family, sizes = Dims.of(hf_config), family_of(hf_config), sizes_split_by_tensor(hf_config)
    for what, size in sizes.items():
        if size % tensor:
            choices = [n for n in range(1, size + 1) if all(s % n == 0 for s in sizes.values())]
            raise ConfigError(f"{keys}.tensor={tensor} must divide the {size} {what} of {name}: use one of {choices}")
    if hf_config.num_hidden_layers < pipeline:
        raise ConfigError(
            f"{keys}.pipeline={pipeline} must not exceed the {hf_config.num_hidden_layers} layers of {name}: lower it"
        )
    if family.experts and dims.experts % expert:
        choices = [n for n in range(1, dims.experts + 1) if dims.experts % n == 0]
        raise ConfigError(
            f"{keys}.expert={expert} must divide the {dims.experts} experts of {name}: use one of {choices}"
        )


def check_stages(name: str, hf_config: PretrainedConfig, parallel: ParallelConfig) -> None:
    """Raises ConfigError unless the student's stages, or parts of them, have all of its layers."""
    layers, parts = hf_config.num_hidden_layers, parallel.pipeline * parallel.virtual_stages
    if parallel.stages is not None and sum(parallel.stages) != layers:
        raise ConfigError(
            f"parallel.stages={parallel.stages} add up to {sum(parallel.stages)} layers but {name} has {layers}: "
            "change them"
        )
    if layers < parts:
        raise ConfigError(
            f"parallel.virtual_stages={parallel.virtual_stages} * parallel.pipeline={parallel.pipeline} must not "
            f"exceed the {layers} layers of {name}: lower one of them"
        )


def _check_fp8_shapes(
    name: str, key: str, precision: PrecisionConfig, hf_config: PretrainedConfig, tensor: int, pipeline: int
) -> None:
    """Raises ConfigError unless a model's matrices, cut over tensor-parallel ranks, have widths that FP8 products can
    have, and every stage has the layers that stay in bf16."""
    if precision.fp8 is None:
        return
    dims, multiple = Dims.of(hf_config), precision.alignment
    widths = {"hidden columns": dims.hidden, "query columns": dims.q // tensor, "key columns": dims.kv // tensor}
    of_experts = {"columns of an expert": dims.expert_ffn, "columns of the shared expert": dims.shared_ffn}
    ffn = of_experts if family_of(hf_config).experts else {"feed-forward columns": dims.ffn}
    widths |= {what: size // tensor for what, size in ffn.items()}
    for what, size in widths.items():
        if size % multiple:
            raise ConfigError(
                f"{key}precision.fp8={precision.fp8} with recipe {precision.recipe} needs widths that are multiples of "
                f"{multiple}, but {name} has {size} {what}"
                + (f" on each of {tensor} tensor-parallel ranks" if tensor > 1 and size != dims.hidden else "")
                + f": leave {key}precision out"
                + (", or lower tensor" if tensor > 1 else "")
            )
    layers = hf_config.num_hidden_layers // pipeline
    if precision.first_last_bf16 > layers:
        raise ConfigError(
            f"{key}precision.first_last_bf16={precision.first_last_bf16} must not exceed the {layers} layers of a "
            f"stage of {name}: lower it"
        )


def _check_modules(resolved: ResolvedModels, config: RunConfig) -> None:
    """Raises ConfigError unless the student has the modules that are recomputed or wait in the host's memory."""
    student, family = config.student, family_of(resolved.student_config)
    for key in ("recompute_modules", "offload_activations"):
        for module in getattr(student, key):
            sparse = bool(family.experts)
            wants = {"moe": sparse, "moe_act": sparse, "expert_fc1": sparse}
            wants |= {"shared_experts": family.shared_expert, "mlp": not sparse}
            if not wants.get(module, True):
                has = "experts instead" if sparse and module == "mlp" else "none"
                raise ConfigError(f"student.{key} names {module}, and student {student.path!r} has {has}: leave it out")
    of_globals = sorted({"moe", "shared_experts"} & {*student.recompute_modules})
    if config.precision.fp8 is not None and of_globals:
        raise ConfigError(
            f"student.recompute_modules={of_globals} does not go with precision.fp8={config.precision.fp8}: "
            "Megatron-Core asks globals for a group there, which this trainer does not set; recompute whole layers"
        )


def _check_experts(resolved: ResolvedModels, config: RunConfig) -> None:
    parallel = config.parallel
    if parallel.expert > 1 and not any(family_of(hf_config).experts for hf_config in resolved.configs):
        raise ConfigError(
            f"parallel.expert={parallel.expert} needs a MoE model, student and teachers have no experts: set it to 1"
        )
    if resolved.data_parallel * parallel.beside_data % parallel.expert:
        raise ConfigError(
            f"parallel.expert={parallel.expert} must divide data-parallel size {resolved.data_parallel}"
            + (f" * parallel.context {parallel.context}" if parallel.context > 1 else "")
            + (f" * parallel.tensor {parallel.tensor}" if parallel.whole_experts else "")
            + ", whose ranks divide the experts: start more ranks or lower it"
        )
    if family_of(resolved.student_config).experts and parallel.tensor > 1 and not parallel.sequence_parallel:
        raise ConfigError(
            f"parallel.sequence_parallel=false with parallel.tensor={parallel.tensor}: a student of experts is trained "
            "with it only, set parallel.sequence_parallel=true"
        )


def _check_context(name: str, hf_config: PretrainedConfig, config: RunConfig) -> None:
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if longest > hf_config.max_position_embeddings:
        raise ConfigError(
            f"data.max_prompt_tokens {config.data.max_prompt_tokens} + rollout.max_new_tokens "
            f"{config.rollout.max_new_tokens} must not exceed the context of {name}, "
            f"{hf_config.max_position_embeddings} tokens: lower one of them"
        )
