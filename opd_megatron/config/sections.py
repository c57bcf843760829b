"""The sections of a run's configuration, one class each, with the rules that concern one section alone."""

from __future__ import annotations

import math
import os
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

Dtype = Literal["bf16", "fp32"]
Precision = Literal["auto", "bf16", "fp32"]
"""`auto` is decided once, by `config.precision`, and kept with the run."""
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


RecomputedModule = Literal["core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts"]
OffloadedModule = Literal["attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act"]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, numbers are finite, values are checked on assignment too."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def _expand(path: str) -> str:
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"path {path!r} names a home folder that does not exist: write it out")
    return expanded


UserPath = Annotated[str, AfterValidator(_expand)]
"""A path, or an id that looks like none; `~` is the home folder."""


class StudentConfig(Section):
    path: UserPath = "student"
    """Hugging Face folder or hub id of the model to train."""
    tokenizer: UserPath | None = None
    """Folder or hub id of the tokenizer; the student's own by default."""
    dtype: Precision = "auto"
    """Arithmetic of the forward and backward pass; the optimizer keeps fp32 main weights. `auto` is bf16 on a GPU and
    on a CPU with AMX-BF16 or AVX512-BF16, fp32 elsewhere; a run keeps what it began with."""
    recompute: bool = False
    """Recompute activations layer by layer in the backward pass: less memory, about a third more time."""
    recompute_layers: PositiveInt | None = None
    """With `recompute`: so many layers of each pipeline stage (of each part of it, with virtual stages), the first
    ones; all by default."""
    recompute_modules: list[RecomputedModule] = Field(default_factory=list)
    """Instead of `recompute`: what of every layer is recomputed. `mlp`, `moe` and `shared_experts` are the feed-forward
    part; `core_attn` is attention itself; `layernorm` and `moe_act` keep their inputs alone, with Transformer Engine's
    layers."""
    offload_activations: list[OffloadedModule] = Field(default_factory=list)
    """Inputs of these modules wait in pinned host memory for the backward pass, on a GPU with Transformer Engine's
    layers: attention (`attn_norm`, `qkv_linear`, `core_attn`, `attn_proj`), the feed-forward part (`mlp_norm`) and
    experts (`expert_fc1`, `moe_act`)."""
    offload: list[Literal["optimizer", "gradients"]] = Field(default_factory=list)
    """What leaves the GPU while the rollout engine is awake, which takes turns with the student (`rollout.sleep`):
    `optimizer` (main weights and moments) waits in pinned host memory, `gradients` are freed. Without effect on a
    CPU."""
    transformer_engine: Literal["auto", "on", "off"] = "auto"
    """Layers of Transformer Engine, of the student and of teachers in this job: `auto` uses them on a GPU where it is
    installed, `on` wants them."""

    @field_validator("transformer_engine", mode="before")
    @classmethod
    def _off_is_false_in_yaml(cls, value: Any) -> Any:
        return {False: "off", True: "on"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _one_way_to_recompute(self) -> StudentConfig:
        if self.recompute and self.recompute_modules:
            raise ValueError(
                f"student.recompute=true with student.recompute_modules={self.recompute_modules}: whole layers are "
                "recomputed already, leave one of them out"
            )
        if self.recompute_layers is not None and not self.recompute:
            raise ValueError(
                f"student.recompute_layers={self.recompute_layers} needs student.recompute=true: set it, or leave the "
                "layers out"
            )
        if self.offload_activations and self.recompute:
            raise ValueError(
                f"student.offload_activations={self.offload_activations} with student.recompute=true, which keeps "
                "nothing that could wait: leave one of them out"
            )
        if "attn_proj" in self.offload_activations and "core_attn" not in self.offload_activations:
            raise ValueError(
                "student.offload_activations with attn_proj needs core_attn too, whose output it is that attention's "
                "backward pass wants: add it"
            )
        return self


class PrecisionConfig(Section):
    """FP8 matrix products, by Transformer Engine on a GPU. Embedding, head, norms, attention and the optimizer stay as
    they are."""

    fp8: Literal["e4m3", "hybrid"] | None = None
    """Format of FP8 products: `hybrid` is e4m3 forward and e5m2 for gradients. null: none."""
    recipe: Literal["tensorwise", "blockwise", "mxfp8", "delayed"] = "tensorwise"
    """How numbers are scaled: `tensorwise` by one maximum of each tensor, `blockwise` by one of each block (Hopper on),
    `mxfp8` of 32 numbers each (Blackwell). `delayed` needs a history that this trainer has no group for."""
    first_last_bf16: NonNegativeInt = 1
    """So many layers at either end stay in bf16."""
    param: bool = False
    """Keep the weights of those products in FP8 too, and gather them so after an update: half of their memory. fp32
    main weights stay with the optimizer."""

    @property
    def alignment(self) -> int:
        """Tokens, and widths of matrices, must be multiples of this."""
        if self.fp8 is None:
            return 1
        return 32 if self.recipe == "mxfp8" else 16

    @model_validator(mode="after")
    def _a_recipe_that_works(self) -> PrecisionConfig:
        if self.fp8 is None:
            changed = ["param=true"] if self.param else []
            changed += [f"recipe={self.recipe}"] if self.recipe != "tensorwise" else []
            if changed:
                raise ValueError(f"{changed[0]} has no effect without fp8: set fp8=hybrid, or leave it out")
            return self
        if self.recipe == "delayed":
            raise ValueError(
                "recipe=delayed reduces a history of maxima over a group that Megatron-Core takes from globals, which "
                "this trainer does not set: it would be all ranks, whose stages differ; use recipe=tensorwise"
            )
        return self


class DataSourceConfig(Section):
    source: UserPath
    """As `data.source`."""
    source_arguments: dict[str, Any] = Field(default_factory=dict)
    """As `data.source_arguments`, which is the default."""
    subset: str | None = None
    """As `data.subset`."""
    split: str | None = None
    """As `data.split`, which is the default."""
    prompt_column: str | None = None
    """As `data.prompt_column`, which is the default."""
    answer_column: str | None = None
    """As `data.answer_column`, which is the default."""
    task: str | None = None
    """Name of its rows' task, where `data.task_column` names none; `source` as it is written by default."""
    weight: PositiveFloat = 1.0
    """Share of the prompts that come from here, relative to the other sources' weights."""


GOLD = "gold"
"""`data.answers` of the data's own answers."""


class DataConfig(Section):
    source: UserPath = "gsm_symbolic"
    """`gsm_symbolic` or `reasoning_gym:NAME` (made offline); a .jsonl, .json, .csv, .tsv or .parquet file; a folder of
    such; or the hub id of a data set such as openai/gsm8k."""
    source_arguments: dict[str, Any] = Field(default_factory=dict)
    """Of a `reasoning_gym:NAME`, such as `{min_terms: 2, max_terms: 4}`."""
    sources: list[DataSourceConfig] = Field(default_factory=list)
    """Several sources, instead of `source`, each with its share of the prompts."""
    subset: str | None = None
    """Configuration name of a hub data set; openai/gsm8k uses `main` by default."""
    split: str = "train"
    """Split of a hub data set to train on."""
    prompt_column: str = "question"
    """Column that holds the user's message, or a list of messages of a role and a content; `a.b` is a path into one. By
    default also `prompt`, `messages`, `problem` or `instruction`, where there is no `question`."""
    answer_column: str | None = "answer"
    """Column (or path, such as `reward_model.ground_truth`) that holds the gold answer; null where there is none
    (held-out NLL then needs eval_source)."""
    task_column: str | None = None
    """Column that names the row's task, such as verl's `data_source`."""
    system_prompt: str | None = None
    """System message put before every prompt."""
    template: Literal["chat", "raw"] = "chat"
    """`chat` applies the tokenizer's chat template; `raw` continues the text as it stands."""
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template, such as `{enable_thinking: false}`."""
    allow_missing_tokens: bool = False
    """Let one of student and teacher have special tokens that the other's tokenizer lacks; they are never sampled."""
    max_prompt_tokens: PositiveInt = 512
    """A longer prompt is an error, or is dropped where `drop_long_prompts` is set."""
    drop_long_prompts: bool = False
    """Leave out prompts over `max_prompt_tokens` instead of stopping."""
    limit: PositiveInt | None = None
    """Use only the first N rows; of a source that makes its rows, 4096 by default."""
    on_policy_fraction: Fraction = 1.0
    """Share of a step's prompts whose answers the student samples (GKD's lambda); the others have `answers`. With 0
    nothing is sampled and no engine starts."""
    answers: UserPath = GOLD
    """Answers that are not sampled: `gold` for those of the data; or what a run has saved (`logging.rollouts`): its
    directory, a folder of such files, or one."""
    eval_source: UserPath | None = None
    """Where held-out rows come from; by default the same source (its test split, or rows kept apart)."""
    eval_split: str = "test"
    """Split of a hub data set to evaluate on."""
    eval_subset: str | None = None
    """As `subset`, of `eval_source`; `subset` itself by default."""
    eval_prompt_column: str | None = None
    """As `prompt_column`, of `eval_source`; `prompt_column` itself by default."""
    eval_answer_column: str | None = None
    """As `answer_column`, of `eval_source`; `answer_column` itself by default."""


class RolloutConfig(Section):
    engine: Literal["vllm", "torch"] = "vllm"
    """`vllm` in a process of its own; `torch` is a slow plain engine for tests."""
    prompts_per_step: PositiveInt = 8
    """Prompts sampled in one step, over all data-parallel ranks."""
    samples_per_prompt: PositiveInt = 1
    """Answers sampled for each prompt."""
    max_new_tokens: PositiveInt = 256
    """Longest answer, in tokens."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature (> 0: greedy answers are not samples of the student's distribution)."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus mass; below 1 the samples are no longer the student's own distribution."""
    dtype: Precision = "auto"
    """Arithmetic of the engine; `auto` is the student's."""
    quantization: Literal["fp8"] | None = None
    """`fp8`: the engine quantizes the weights of its matrix products at each push (vLLM on a GPU). Its samples are then
    of a slightly other policy: `mismatch` says how much. null: none."""
    engines: PositiveInt | None = None
    """Engines that sample side by side, each in a process of its own. By default one for every `tensor` GPUs of their
    ranks on each node; on a CPU one in all, or one a host. Answers do not depend on how many there are."""
    placement: Literal["student", "own"] = "student"
    """`student`: engines take turns with the student on its ranks. `own`: they have the last `hosts` ranks of the job
    to themselves, which hold no model; weights reach them by broadcast."""
    hosts: PositiveInt | None = None
    """Ranks that hold engines alone, with `placement: own`: on a GPU machine `tensor` of them for each engine."""
    steps_ahead: Annotated[int, Field(ge=0, le=1)] = 0
    """How many optimizer steps old an answer may be when it is trained on. 1 samples the answers of the next step while
    this one trains; a step then costs the longer of the two instead of their sum."""
    tensor: PositiveInt = 1
    """Tensor-parallel size inside each engine: its GPUs, which are of one node."""
    bucket_mib: PositiveInt = 256
    """Extra memory per rank for weight sync, in MiB: weights are sent in buckets of a third of it, and a tensor above
    that is sent alone. As much again lies in buffers where engines map them (`transport`). Larger is faster until a
    step's weights are few buckets."""
    shard_to_shard: bool = True
    """Where `tensor` equals `parallel.tensor` (and is more than 1), each rank hands its shards to the engine's worker
    of the same rank and no full tensor is built. False gathers them, as is done where the two differ, with expert
    parallelism, and where the ranks share no folder with the engine."""
    transport: Literal["auto", "memory", "files"] = "auto"
    """How weights reach the engines of a node: `memory` that they map (CUDA IPC on a GPU), or `files` in /dev/shm.
    `auto` is memory on a GPU and files on a CPU. GPUs that do not reach each other's memory need files."""
    kv_cache_gib: PositiveFloat = 1.0
    """Key-value cache on CPU, in GiB."""
    gpu_memory_utilization: Fraction = 0.4
    """Share of the GPU that the engine may take, cache included."""
    sleep: bool = True
    """Let engines on the student's GPUs give their memory back while it trains. Without effect on a CPU, on ranks of
    their own, and with `steps_ahead`."""
    max_restarts: NonNegativeInt = 3
    """How often in a row a dead engine is restarted before the run stops; counted for each engine."""
    startup_timeout: PositiveFloat = 1800.0
    """Seconds an engine may take to start: load its model, compile, capture graphs."""
    request_timeout: PositiveFloat = 600.0
    """Seconds an engine may be silent. One that samples tells how far it is, so that answers may take hours; any other
    request must be done by then."""

    @field_validator("dtype", mode="before")
    @classmethod
    def _null_is_auto(cls, value: Any) -> Any:
        return "auto" if value is None else value  # as earlier releases wrote it


class OptimizerConfig(Section):
    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the decay."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0."""
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the decay after warm-up, ending at the last step."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled (AdamW) weight decay."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""
    clip_grad: NonNegativeFloat = 1.0
    """Global gradient norm is clipped to this; 0 switches clipping off."""


class ParallelConfig(Section):
    tensor: PositiveInt = 1
    """Tensor-parallel size of student and colocated teachers."""
    pipeline: PositiveInt = 1
    """Pipeline-parallel size."""
    data: PositiveInt | None = None
    """Data-parallel size; world size / (tensor * context * pipeline) by default, what `expert` needs when started
    without torchrun."""
    stages: list[PositiveInt] | None = None
    """Layers of each pipeline stage, first to last; with `virtual_stages`, of each part of them in the model's order.
    By default equally many, or, where that does not divide, with embedding and head counted as a layer each."""
    virtual_stages: PositiveInt = 1
    """Parts of the model on each stage, which take turns (interleaved schedule): a smaller bubble for more
    transfers."""
    context: PositiveInt = 1
    """Context-parallel size: ranks that share every sequence, for answers whose activations one cannot hold."""
    expert: PositiveInt = 1
    """Expert-parallel size. Must divide the data-parallel size times `context`, and with `expert_tensor: 1` times
    `tensor`."""
    expert_tensor: PositiveInt | None = None
    """Ranks that an expert's matrices are cut over: `tensor` by default, or 1, which keeps small experts whole and
    deals them to tensor-parallel ranks too."""
    sequence_parallel: bool = False
    """Shard activations along the sequence between tensor-parallel regions; needs tensor > 1."""
    overlap_grad_reduce: bool | None = None
    """Sum gradients over data-parallel ranks, bucket by bucket, while the backward pass goes on; on GPUs by default."""
    bucket_size: PositiveInt | None = None
    """Parameters of such a bucket; Megatron's 40 million, or a million for each data-parallel rank, by default."""
    start_timeout: PositiveFloat = 1800.0
    """Seconds for all ranks to find each other."""
    collective_timeout: PositiveFloat = 1800.0
    """Seconds that ranks wait for each other in one collective. Answers may take longer: engines tell how far they are
    (`rollout.request_timeout`). What a teacher may take for a micro batch must be less."""
    tokens_per_micro_batch: PositiveInt | None = None
    """Tokens in one forward pass of a rank, of sequences that follow each other without padding; times `context` at
    least the longest prompt and answer. 4096 by default, or what these need."""
    micro_batch_size: PositiveInt | None = None
    """Sequences in one forward pass of a rank, padded to one length, instead of `tokens_per_micro_batch`: slower where
    lengths differ, for comparisons with padding trainers."""

    @property
    def least_data(self) -> int:
        """The smallest data-parallel size with which `expert` divides the ranks that experts are dealt to."""
        return self.expert // math.gcd(self.expert, self.beside_data)

    @property
    def whole_experts(self) -> bool:
        """Whether experts are not cut though all else is."""
        return self.expert_tensor == 1 and self.tensor > 1

    @property
    def beside_data(self) -> int:
        """Ranks that experts are dealt to, for each data-parallel one."""
        return self.context * (self.tensor if self.whole_experts else 1)

    @property
    def model(self) -> int:
        """Ranks that hold one copy of the student, or of its part of every sequence."""
        return self.tensor * self.context * self.pipeline


_MORE_IS_BETTER = ("eval/accuracy", "reward", "top1_agreement")


class CheckpointConfig(Section):
    every: NonNegativeInt = 50
    """Steps between checkpoints; 0 saves only at the end."""
    keep: PositiveInt = 2
    """Newest checkpoints kept."""
    async_save: bool = True
    """Write while training goes on, from a copy in host memory of this rank's share of weights and optimizer state
    (14 bytes a parameter in bf16, 12 in fp32, divided by the data-parallel size). `false` needs no copy and lets
    training wait for the files."""
    best_metric: (
        Literal[
            "eval/accuracy", "eval/forward_kl", "eval/reverse_kl", "eval/nll", "loss", "reward", "reverse_kl",
            "forward_kl", "top1_agreement",
        ]
        | None
    ) = None  # fmt: skip
    """Keep the checkpoint with the best value of this column of metrics.jsonl besides the newest `keep`; an `eval/`
    metric is then measured at every checkpoint. null keeps only the newest."""
    best_mode: Literal["min", "max"] | None = None
    """Whether the lowest or the highest value of `best_metric` is the best; by default the highest of accuracy, reward
    and agreement, the lowest of others."""
    allow_changed: list[Literal["teachers", "objective"]] = Field(default_factory=list)
    """What may be another than that of the run which is resumed: `teachers` (their models, prompts and routes) or
    `objective`. Curves then show two runs as one."""
    export_hf: bool = True
    """Write the student as a Hugging Face folder (`hf/`) at the end."""

    @property
    def better(self) -> Literal["min", "max"]:
        """`best_mode`, decided."""
        return self.best_mode or ("max" if self.best_metric in _MORE_IS_BETTER else "min")


class EvaluationConfig(Section):
    every: NonNegativeInt = 10
    """Steps between held-out evaluations (step 0 and the last are always evaluated); 0 switches them off."""
    prompts: PositiveInt = 32
    """Held-out rows that are scored."""
    task: str | None = None
    """Who judges answers to held-out rows, which the engine then gives too, greedily: `eval/accuracy`. As
    `rewards.task`; what the task asks for is put after held-out questions. null: nobody."""
    task_prompts: PositiveInt | None = None
    """Held-out rows that are answered; as many as `prompts` by default."""
    samples: NonNegativeInt = 0
    """Answers besides, at rollout.temperature, for `eval/avg@k` and `eval/pass@k`."""
    pass_at: list[PositiveInt] = Field(default_factory=list)
    """The k of pass@k, at most `samples`; powers of two by default."""
    agreement: bool = True
    """At the start of a run, compare the likelihood of one short sequence with transformers', for student and
    teacher."""

    @model_validator(mode="after")
    def _enough_samples(self) -> EvaluationConfig:
        if any(k > self.samples for k in self.pass_at):
            raise ValueError(
                f"evaluation.pass_at={self.pass_at} with evaluation.samples={self.samples}: pass@k needs k samples or "
                "more, raise samples or lower k"
            )
        if self.task is None and (self.samples or self.pass_at or self.task_prompts):
            raise ValueError(
                "evaluation.samples, pass_at and task_prompts have no effect without evaluation.task, which judges "
                "answers: set it (gsm8k, math, code, ifeval, or module:function)"
            )
        return self

    @property
    def asked(self) -> int:
        """Held-out rows that are answered."""
        return 0 if self.task is None else self.task_prompts or self.prompts

    @property
    def rows(self) -> int:
        """Held-out rows that are wanted."""
        return max(self.prompts, self.asked) if self.every else 0


class LoggingConfig(Section):
    tensorboard: bool = True
    """Write TensorBoard events into the run directory."""
    wandb_project: str | None = None
    """Weights & Biases project; off by default."""
    rollouts: bool = False
    """Save every step's prompts and answers, with their tokens, as rollouts/step-N.jsonl."""
    sample_every: NonNegativeInt = 5
    """Steps between readable samples on the terminal; 0 switches them off."""
    progress: bool = True
    """Progress bar on a terminal."""
    profile_step: PositiveInt | None = None
    """Step that torch's profiler watches on every rank; each writes profile/step-N-rank-R.json.gz, a trace for
    Perfetto or chrome://tracing. null: none."""
