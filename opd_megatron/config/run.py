"""A whole run's configuration, and the rules between sections."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, PositiveInt, PrivateAttr, field_validator, model_validator

from opd_megatron.config.objective import ObjectiveConfig
from opd_megatron.config.recipes import RECIPES
from opd_megatron.config.rewards import RewardsConfig
from opd_megatron.config.sections import (
    GOLD,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    NonNegativeInt,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RolloutConfig,
    Section,
    StudentConfig,
    UserPath,
)
from opd_megatron.config.spellings import spell_out
from opd_megatron.config.teacher_rules import check_teachers
from opd_megatron.config.teachers import (
    REFERENCE,
    STUDENT,
    AnyTeacherConfig,
    MegatronTeacherConfig,
    OwnRanksTeacherConfig,
    StudentRanksTeacherConfig,
    TeacherConfig,
)
from opd_megatron.errors import ConfigError
from opd_megatron.losses.schedules import largest

_RECIPES: Any = Literal[tuple(RECIPES)]
_OF_TEACHERS = ("eval/forward_kl", "eval/reverse_kl", "reverse_kl", "forward_kl", "top1_agreement")
"""Metrics that there are with teachers alone."""
DEFAULT_PACK = 4096
"""Tokens of a micro batch on a rank."""
DEFAULT_ROUTE = "default"
"""Key of `routes` for the samples of every other task, and of none."""


def _default_teacher() -> TeacherConfig:
    return StudentRanksTeacherConfig(path="teacher")


class RunConfig(Section):
    """One run, whole."""

    output_dir: UserPath = "runs/default"
    """Run directory: config.yaml, metrics.jsonl, checkpoints/, hf/, report/."""
    steps: PositiveInt = 100
    """Optimizer steps."""
    seed: NonNegativeInt = 0
    """Seeds prompts, sampling and every random number of the run."""
    trust_remote_code: bool = False
    """Let a tokenizer run code that came with it. Only for sources you have read."""
    recipe: _RECIPES | None = None
    """One of the field's, by name (docs/objectives.md): fills in the keys that it is made of."""
    student: StudentConfig = Field(default_factory=StudentConfig)
    """The model that is trained."""
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)
    """FP8 of the student."""
    teachers: list[AnyTeacherConfig] = Field(default_factory=lambda: [_default_teacher()])
    """The models it learns from; none are loaded where the objective asks none."""
    routes: dict[str, str | list[str]] = Field(default_factory=dict)
    """Which teachers score the samples of which task, by name: `{math: t1, code: [t2, t3], default: t1}`; several are
    an ensemble. All teachers score every sample by default."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Prompts."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    """How the student samples answers."""
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    """What is minimised."""
    rewards: RewardsConfig = Field(default_factory=RewardsConfig)
    """Who judges answers, and what becomes of the scores."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """How the models are laid over ranks."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """What is saved, and when."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """Held-out measurements."""
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    """What a person sees."""
    _left_out: list[str] = PrivateAttr(default_factory=list)

    @property
    def left_out(self) -> list[str]:
        """Paths of teachers that were given though the objective asks none."""
        return self._left_out

    @property
    def sequences_per_step(self) -> int:
        return self.rollout.prompts_per_step * self.rollout.samples_per_prompt

    @property
    def samples(self) -> bool:
        """Whether the student samples answers."""
        return self.data.on_policy_fraction > 0

    @property
    def uses_engine(self) -> bool:
        """Whether it answers anything, in training or in evaluation."""
        return self.samples or (self.evaluation.task is not None and self.evaluation.every > 0)

    @property
    def world_size(self) -> int:
        """Ranks the run needs when `parallel.data` is left at its default outside torchrun."""
        student = self.parallel.model * (self.parallel.data or self.parallel.least_data)
        return student + self.teacher_ranks + (self.rollout.hosts or 0)

    @property
    def teacher_names(self) -> list[str]:
        """What `routes` and metrics call the teachers."""
        return [str(number) if each.name is None else each.name for number, each in enumerate(self.teachers)]

    @property
    def teacher_ranks(self) -> int:
        """Ranks that hold teachers alone."""
        return sum(teacher.ranks for teacher in self.teachers if isinstance(teacher, OwnRanksTeacherConfig))

    def without_teacher_ranks(self) -> RunConfig:
        """The same run for a command that asks no teacher: it needs the student's ranks alone."""
        shared = set(MegatronTeacherConfig.model_fields)
        teachers = [
            StudentRanksTeacherConfig(**teacher.model_dump(include=shared), tensor=1, pipeline=1)
            if isinstance(teacher, OwnRanksTeacherConfig) else teacher
            for teacher in self.teachers
        ]  # fmt: skip
        return self.model_copy(update={"teachers": teachers})

    @property
    def takes_turns(self) -> bool:
        """Whether engines on GPUs give their memory back while the student trains: where they share it, unless they
        sample then too."""
        rollout = self.rollout
        return rollout.sleep and rollout.placement == "student" and rollout.steps_ahead == 0

    def without_engine_hosts(self) -> RunConfig:
        """The same run for a command that samples nothing: it needs the student's ranks alone."""
        if self.rollout.hosts is None:
            return self
        rollout = self.rollout.model_copy(update={"placement": "student", "hosts": None})
        return self.model_copy(update={"rollout": rollout})

    @model_validator(mode="after")
    def _teachers_that_are_asked(self) -> RunConfig:
        """Leaves teachers out where the objective asks none, and adds the reference where it has one."""
        objective, teachers = self.objective, self.teachers
        kept = [each for each in teachers if objective.needs_teacher or each.name == REFERENCE]
        if "teachers" in self.model_fields_set:
            self._left_out = [each.path for each in teachers if each not in kept]
        has_reference = any(each.name == REFERENCE for each in kept)
        if largest(objective, "reference_kl") == 0 and has_reference:
            raise ValueError(
                f"a teacher named {REFERENCE!r} has no effect without objective.reference_kl: set it, or choose "
                "another name"
            )
        if largest(objective, "reference_kl") > 0 and not has_reference:
            kept = [*kept, StudentRanksTeacherConfig(path=STUDENT, name=REFERENCE, dtype=self.student.dtype)]
        if not kept and objective.needs_teacher:
            raise ValueError(
                f"teachers=[] but objective.type={objective.type} with lambda_distill above 0 asks one: name one, or "
                "set objective.lambda_distill=0 (with lambda_rl above 0), or objective.type=sft"
            )
        # Past the validation of assignments, which would come back here.
        self.__dict__["teachers"] = kept
        if not objective.needs_teacher:
            self.__dict__["routes"] = {}
        return self

    @property
    def reference(self) -> int | None:
        """Number of the reference in `teachers`, which teaches nothing; None without one."""
        return next((number for number, each in enumerate(self.teachers) if each.name == REFERENCE), None)

    @model_validator(mode="after")
    def _cross_field_rules(self) -> RunConfig:
        parallel, optimizer = self.parallel, self.optimizer
        if self.data.sources and "source" in self.data.model_fields_set and self.data.source != "gsm_symbolic":
            raise ValueError(
                f"data.source={self.data.source!r} has no effect beside data.sources: list it there, or leave one out"
            )
        if parallel.sequence_parallel and parallel.tensor == 1:
            raise ValueError(
                "parallel.sequence_parallel=true needs parallel.tensor > 1, got 1: raise it or switch it off"
            )
        if parallel.expert_tensor not in (None, 1, parallel.tensor):
            raise ValueError(
                f"parallel.expert_tensor={parallel.expert_tensor} must be 1 or parallel.tensor={parallel.tensor}: "
                "experts are whole or cut as everything else"
            )
        if parallel.data is not None and parallel.data * parallel.beside_data % parallel.expert:
            raise ValueError(
                f"parallel.expert={parallel.expert} must divide parallel.data={parallel.data}"
                + (f" * parallel.context={parallel.context}" if parallel.context > 1 else "")
                + (f" * parallel.tensor={parallel.tensor}" if parallel.whole_experts else "")
                + ", whose ranks divide the experts: change one of them"
            )
        self._check_stages()
        if optimizer.warmup_steps >= self.steps and optimizer.warmup_steps > 0:
            raise ValueError(
                f"optimizer.warmup_steps={optimizer.warmup_steps} must be below steps={self.steps}: "
                "shorten the warm-up or train longer"
            )
        if optimizer.min_lr > optimizer.lr:
            raise ValueError(
                f"optimizer.min_lr={optimizer.min_lr} must not exceed optimizer.lr={optimizer.lr}: lower min_lr"
            )
        check_teachers(self)
        self._check_best_metric()
        self._check_temperatures()
        self._check_engines()
        self._check_given_answers()
        self._check_packs()
        self._check_fp8()
        self.micro_batch_size(parallel.data or 1)
        return self

    @property
    def pack_tokens(self) -> int | None:
        """Tokens of a packed micro batch, on all its context-parallel ranks together; None where sequences are
        padded."""
        parallel = self.parallel
        if parallel.micro_batch_size is not None:
            return None
        if parallel.tokens_per_micro_batch is not None:
            return parallel.tokens_per_micro_batch * parallel.context
        return max(self.longest_sequence, DEFAULT_PACK * parallel.context)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt and answer, padded to what context-parallel ranks divide."""
        longest, multiple = self.data.max_prompt_tokens + self.rollout.max_new_tokens, 2 * self.parallel.context
        return longest if multiple == 2 else -(-longest // multiple) * multiple

    def _check_packs(self) -> None:
        parallel = self.parallel
        budget, size, context = parallel.tokens_per_micro_batch, parallel.micro_batch_size, parallel.context
        if size is not None:
            for key in ("context", "virtual_stages"):
                if getattr(parallel, key) > 1:
                    raise ValueError(
                        f"parallel.{key}={getattr(parallel, key)} needs packed sequences, got "
                        f"parallel.micro_batch_size={size}, which pads them: set tokens_per_micro_batch instead"
                    )
        if budget is None:
            return
        if size is not None:
            raise ValueError(
                f"parallel.micro_batch_size={size} has no effect with parallel.tokens_per_micro_batch={budget}: leave "
                "one of them out"
            )
        prompt, answer = self.data.max_prompt_tokens, self.rollout.max_new_tokens
        if budget * context < self.longest_sequence:
            raise ValueError(
                f"parallel.tokens_per_micro_batch={budget}"
                + (f" * parallel.context={context}" if context > 1 else "")
                + f" must hold the longest sequence, data.max_prompt_tokens {prompt} + rollout.max_new_tokens {answer} "
                f"= {prompt + answer} tokens"
                + (f", padded to {self.longest_sequence}" if self.longest_sequence > prompt + answer else "")
                + ": raise it, or shorten them"
            )

    def _check_fp8(self) -> None:
        for key, precision, dtype in self.precisions():
            if precision.fp8 is not None and dtype == "fp32":
                raise ValueError(
                    f"{key}precision.fp8={precision.fp8} needs {key or 'student.'}dtype=bf16, got fp32: set it"
                )
            if precision.fp8 is not None and self.student.transformer_engine == "off":
                raise ValueError(
                    f"{key}precision.fp8={precision.fp8} needs layers of Transformer Engine, got "
                    "student.transformer_engine=off: leave that out"
                )
        if self.rollout.quantization is not None and self.rollout.engine != "vllm":
            raise ValueError(
                f"rollout.quantization={self.rollout.quantization} needs rollout.engine=vllm, got "
                f"{self.rollout.engine}: change one of them"
            )

    def precisions(self) -> list[tuple[str, PrecisionConfig, str]]:
        """(beginning of its keys, section, dtype) of the student and of every teacher that this job computes."""
        found: list[tuple[str, PrecisionConfig, str]] = [("", self.precision, self.student.dtype)]
        for number, teacher in enumerate(self.teachers):
            precision = getattr(teacher, "precision", None)
            if precision is not None:
                found.append((f"teachers.{number}.", precision, getattr(teacher, "dtype", "auto")))
        return found

    @property
    def micro_batch_multiple(self) -> int:
        """Tokens of a micro batch, on all of a replica's ranks, are a multiple of this: sequence- and context-parallel
        ranks divide them, and FP8 products want multiples on each."""
        parallel = self.parallel
        ranks = (parallel.tensor if parallel.sequence_parallel else 1) * parallel.context
        return ranks * math.lcm(*(precision.alignment for _, precision, _ in self.precisions()))

    def _check_stages(self) -> None:
        parallel = self.parallel
        if parallel.virtual_stages > 1 and parallel.pipeline == 1:
            raise ValueError(
                f"parallel.virtual_stages={parallel.virtual_stages} needs parallel.pipeline above 1, got 1: set it, or "
                "leave the virtual stages out"
            )
        parts = parallel.pipeline * parallel.virtual_stages
        if parallel.stages is not None and len(parallel.stages) != parts:
            raise ValueError(
                f"parallel.stages={parallel.stages} has {len(parallel.stages)} entries but parallel.pipeline="
                f"{parallel.pipeline}"
                + (f" * parallel.virtual_stages={parallel.virtual_stages}" if parallel.virtual_stages > 1 else "")
                + f" makes {parts} parts: give the layers of each"
            )

    def _check_best_metric(self) -> None:
        objective = self.objective
        best = self.checkpoint.best_metric
        if best in _OF_TEACHERS and not objective.needs_teacher:
            raise ValueError(
                f"checkpoint.best_metric={best} needs a teacher, and objective.type={objective.type} with "
                f"lambda_distill={objective.lambda_distill} asks none: choose eval/nll, or loss"
            )
        if best == "eval/accuracy" and self.evaluation.task is None:
            raise ValueError(
                "checkpoint.best_metric=eval/accuracy needs evaluation.task, which judges held-out answers: set it "
                "(gsm8k, math, code, ifeval, or module:function), or choose eval/nll"
            )
        if best == "reward" and not self.rewards.judges:
            raise ValueError("checkpoint.best_metric=reward needs rewards.task, which judges answers: set it")
        if best is not None and best.startswith("eval/") and self.evaluation.every == 0:
            raise ValueError(
                f"checkpoint.best_metric={best} needs evaluation.every > 0, got 0: switch evaluation on, or choose a "
                "training metric such as reverse_kl"
            )

    def _check_temperatures(self) -> None:
        objective = self.objective
        if objective.is_sampled and objective.temperature != self.rollout.temperature:
            # The engine's log-probabilities are at the one, the trainer's at the other: their ratio would mean nothing.
            raise ValueError(
                f"objective.temperature={objective.temperature} must equal rollout.temperature="
                f"{self.rollout.temperature} with objective.type={objective.type}, which scores sampled tokens: "
                "set one to the other"
            )
        if self.rollout.steps_ahead and objective.temperature != self.rollout.temperature:
            # How far the student has moved since is read from the ratio of the two.
            raise ValueError(
                f"rollout.steps_ahead={self.rollout.steps_ahead} needs objective.temperature={objective.temperature} "
                f"to equal rollout.temperature={self.rollout.temperature}: set one to the other, or steps_ahead to 0"
            )

    def _check_engines(self) -> None:
        offloads = [f"student.offload={self.student.offload}"] if self.student.offload else []
        offloads += [f"teachers.{i}.offload=true" for i, t in enumerate(self.teachers) if getattr(t, "offload", False)]
        if offloads and not self.takes_turns:
            raise ValueError(
                f"{offloads[0]} needs engines that take turns with the student: rollout.sleep=true, "
                "rollout.placement=student and rollout.steps_ahead=0, got "
                f"{str(self.rollout.sleep).lower()}, {self.rollout.placement} and {self.rollout.steps_ahead}"
            )
        if (self.rollout.placement == "own") != (self.rollout.hosts is not None):
            raise ValueError(
                f"rollout.placement={self.rollout.placement} with rollout.hosts={self.rollout.hosts}: engines on ranks "
                "of their own need both rollout.placement=own and rollout.hosts, their number of ranks"
            )

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, tree: Any) -> Any:
        return spell_out(tree) if isinstance(tree, dict) else tree

    @field_validator("routes", mode="before")
    @classmethod
    def _names_of_teachers(cls, value: Any) -> Any:
        for task, names in value.items() if isinstance(value, dict) else ():
            listed = names if isinstance(names, list) else [names]
            if not listed or not all(isinstance(name, str) and name for name in listed):
                raise ValueError(f"routes.{task}={names!r} must be the name of a teacher, or a list of names")
        return value

    @property
    def teacher_sets(self) -> list[list[str]]:
        """Names of the teachers that score a sample together, for each route."""
        sets = [[names] if isinstance(names, str) else names for names in self.routes.values()]
        return sets or [[name for name in self.teacher_names if name != REFERENCE]]

    def micro_batch_size(self, data_parallel: int) -> int:
        """Sequences in one forward pass of padded ones. Raises ConfigError unless a step's split evenly over ranks."""
        total, size = self.sequences_per_step, self.parallel.micro_batch_size
        if self.pack_tokens is not None:
            return 1  # packs have tokens
        if total % (data_parallel * (size or 1)):
            raise ConfigError(
                f"rollout.prompts_per_step * rollout.samples_per_prompt = {total} must be a multiple of data-parallel "
                f"size {data_parallel} * parallel.micro_batch_size {size or 1}: change one of them"
            )
        return size or 1

    def _check_given_answers(self) -> None:
        objective = self.objective
        given = self.data.on_policy_fraction < 1
        if given and objective.is_sampled:
            raise ValueError(
                f"data.on_policy_fraction={self.data.on_policy_fraction} needs an objective over whole distributions: "
                f"objective.type={objective.type} scores what the student has sampled; set it to reverse_kl, or the "
                "fraction to 1"
            )
        if objective.type == "sft" and self.data.on_policy_fraction > 0:
            raise ValueError(
                f"data.on_policy_fraction={self.data.on_policy_fraction} has no effect with objective.type=sft, which "
                "trains on given answers: leave it out, or choose another type beside objective.sft_coef"
            )
        if largest(objective, "sft_coef") > 0 and not given:
            raise ValueError(
                f"objective.sft_coef={largest(objective, 'sft_coef')} needs given answers: set data.on_policy_fraction "
                "below 1, and data.answers"
            )
        if not given and self.data.answers != GOLD:
            raise ValueError(
                f"data.answers={self.data.answers!r} has no effect with data.on_policy_fraction=1: lower it, or leave "
                "the answers out"
            )

    def check_rewards(self) -> None:
        """Raises ConfigError unless there is somebody to judge what a policy gradient is to be made of."""
        rewards, weight = self.rewards, largest(self.objective, "lambda_rl")
        if weight > 0 and not rewards.judges:
            raise ConfigError(
                f"objective.lambda_rl={weight} needs rewards.task, which judges the answers (gsm8k, math, code, "
                "ifeval, or module:function): set it, or set objective.lambda_rl=0 to distil alone"
            )
        if weight > 0 and self.rollout.samples_per_prompt == 1:
            raise ConfigError(
                f"objective.lambda_rl={weight} with rollout.samples_per_prompt=1: an answer's advantage is over the "
                "others to its prompt, so that it would always be 0; set it to 4 or more"
            )
