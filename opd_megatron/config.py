"""The typed run configuration: YAML + `a.b=value` overrides, every rule checked before a process group exists.

Adding an option means adding a field with its `description`; `--help`, the resolved `config.yaml` and the error
messages follow from it. Rules that need the model's own `config.json` (heads, layers, vocabulary) live in
`mcore.layout`, which is checked before any process group exists too.
"""

from __future__ import annotations

import difflib
import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from opd_megatron.errors import ConfigError, MissingPathError, NotAvailableError

Dtype = Literal["bf16", "fp32"]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, numbers are finite, values are checked on assignment too."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class StudentConfig(Section):
    path: str = "student"
    """Hugging Face folder or hub id of the model to train."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; the student's own by default."""
    dtype: Dtype = "bf16"
    """Arithmetic of the forward and backward pass; the optimizer keeps fp32 main weights."""
    recompute: bool = False
    """Recompute activations layer by layer in the backward pass: less memory, about a third more time."""
    transformer_engine: Literal["auto", "off"] = "auto"
    """`auto` uses Transformer Engine layers on a GPU where it is installed."""


class TeacherConfig(Section):
    path: str
    """Hugging Face folder or hub id."""
    weight: PositiveFloat = 1.0
    """Share in an ensemble; shares are normalised to sum to one."""
    dtype: Dtype = "bf16"
    """Arithmetic of the teacher's forward pass."""


class DataConfig(Section):
    source: str = "gsm_symbolic"
    """`gsm_symbolic` (made offline), a .jsonl file, or the hub id of a data set such as openai/gsm8k."""
    subset: str | None = None
    """Configuration name of a hub data set; openai/gsm8k uses `main` by default."""
    split: str = "train"
    """Split of a hub data set to train on."""
    prompt_column: str = "question"
    """Column that holds the user's message."""
    answer_column: str | None = "answer"
    """Column that holds the gold answer; null where there is none (held-out NLL then needs eval_source)."""
    system_prompt: str | None = None
    """System message put before every prompt."""
    template: Literal["chat", "raw"] = "chat"
    """`chat` applies the tokenizer's chat template; `raw` continues the text as it stands."""
    max_prompt_tokens: PositiveInt = 512
    """A longer prompt is an error, or is dropped where `drop_long_prompts` is set."""
    drop_long_prompts: bool = False
    """Leave out prompts over `max_prompt_tokens` instead of stopping."""
    limit: PositiveInt | None = None
    """Use only the first N rows."""
    eval_source: str | None = None
    """Where held-out rows come from; by default the same source (its test split, or rows kept apart)."""
    eval_split: str = "test"
    """Split of a hub data set to evaluate on."""


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
    dtype: Dtype | None = None
    """Arithmetic of the engine; the student's by default."""
    tensor: PositiveInt = 1
    """Tensor-parallel size inside the engine."""
    bucket_mib: PositiveInt = 256
    """Weights leave the trainer in buckets: what a rank may hold of them beyond its own shards, in MiB (a parameter
    with more than a third of it is gathered all the same). Larger is faster until a step's weights are few buckets."""
    shard_to_shard: bool = True
    """Where `tensor` equals `parallel.tensor` (and is more than 1), each rank hands its shards to the engine's worker
    of the same rank and no full tensor is built. False gathers them, as is done where the two differ."""
    kv_cache_gib: PositiveFloat = 1.0
    """Key-value cache on CPU, in GiB."""
    gpu_memory_utilization: Fraction = 0.4
    """Share of the GPU that the engine may take, cache included."""
    max_restarts: NonNegativeInt = 3
    """How often in a row a dead engine is restarted before the run stops."""
    start_timeout: PositiveFloat = 600.0
    """Seconds the engine may take to start or to answer a call."""


class ObjectiveConfig(Section):
    type: Literal[
        "reverse_kl", "forward_kl", "gkd", "skew_reverse_kl", "skew_forward_kl", "lambda_jsd",
        "on_policy_distill", "jsd",
    ] = "reverse_kl"  # fmt: skip
    """Divergence at every response token, exact over the whole vocabulary; `on_policy_distill` and `jsd` are the
    sampled-token forms: a policy gradient that sees the sampled token alone."""
    beta: Fraction = 0.5
    """gkd: 0 is forward KL, 1 is reverse KL. jsd: the same beta of the divergence that is sampled."""
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """skew_reverse_kl: KL(student|m), m = alpha student + (1 - alpha) teacher (DistiLLM). skew_forward_kl: the same
    with the models exchanged. 0 is the plain KL."""
    lambda_coef: Fraction | None = None
    """lambda_jsd: weight of KL(student|m), the rest is KL(teacher|m), m their mean; 0.5 by default. jsd: where set,
    this divergence is sampled instead of the one of `beta`."""
    temperature: PositiveFloat = 1.0
    """Divides both models' logits in the loss; sampled-token forms need it equal to `rollout.temperature`."""
    lambda_distill: NonNegativeFloat = 1.0
    """Weight of the divergence, or of the policy gradient that is its sampled-token form."""
    lambda_rl: NonNegativeFloat = 0.0
    """Weight of the policy gradient on rewards."""
    kl_coef: NonNegativeFloat = 1.0
    """Sampled-token forms: multiplies the advantage, e.g. log q(a) - log p_rollout(a) of on_policy_distill."""
    truncation: PositiveFloat | None = 2.0
    """Sampled-token forms: cap on the importance weight p / p_rollout, which corrects for an engine with other
    arithmetic than the trainer's; 2 is usual. null: no cap, and `clip_low` with `clip_high` may bound the ratio."""
    clip_low: Fraction | None = None
    """Sampled-token forms: the ratio p / p_rollout is clipped below 1 - clip_low as in PPO; null does not clip."""
    clip_high: NonNegativeFloat | None = None
    """The same above 1 + clip_high; goes together with `clip_low`, and with truncation=null."""
    ratio_level: Literal["token", "sequence"] = "token"
    """Sampled-token forms: a ratio for each token, or its geometric mean over the sequence (GSPO)."""
    combine: Literal["logit_mean", "prob_mean"] = "logit_mean"
    """How several teachers are mixed."""
    chunk_tokens: PositiveInt | None = None
    """Tokens whose logits exist at one time; chosen for the cache by default."""

    @property
    def is_sampled(self) -> bool:
        """Whether the loss is a policy gradient on the sampled tokens."""
        return self.type in ("on_policy_distill", "jsd")

    @property
    def clip(self) -> tuple[float, float] | None:
        if self.clip_low is None or self.clip_high is None:
            return None
        return self.clip_low, self.clip_high

    @model_validator(mode="after")
    def _rules(self) -> ObjectiveConfig:
        low, high = self.clip_low, self.clip_high
        if (low is None) != (high is None):
            raise ValueError(
                f"objective.clip_low={low} and objective.clip_high={high} must be given together: PPO uses 0.2 and 0.2"
            )
        if low is not None and self.truncation is not None:
            raise ValueError(
                f"objective.clip_low={low} has no effect beside objective.truncation={self.truncation}, whose ratio is "
                "1 at the one update of a step: set objective.truncation=null to clip p / p_rollout instead"
            )
        if self.lambda_distill == 0 and self.lambda_rl == 0:
            raise ValueError(
                "objective.lambda_distill=0 and objective.lambda_rl=0 leave nothing to minimise: raise lambda_distill"
            )
        return self


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
    """Data-parallel size; world size / (tensor * pipeline) by default, `expert` when started without torchrun."""
    expert: PositiveInt = 1
    """Expert-parallel size: so many data-parallel ranks share the experts of every layer out; it divides `data`."""
    sequence_parallel: bool = False
    """Shard activations along the sequence between tensor-parallel regions; needs tensor > 1."""
    micro_batch_size: PositiveInt | None = None
    """Sequences in one forward pass of a rank; the largest divisor of its sequences up to 8 by default."""

    @property
    def model(self) -> int:
        """Ranks that hold one copy of the student."""
        return self.tensor * self.pipeline


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
        Literal["eval/forward_kl", "eval/reverse_kl", "eval/nll", "loss", "reverse_kl", "forward_kl", "top1_agreement"]
        | None
    ) = None
    """Keep the checkpoint with the best value of this column of metrics.jsonl besides the newest `keep`; an `eval/`
    figure is then measured at every checkpoint. null keeps only the newest."""
    best_mode: Literal["min", "max"] = "min"
    """Whether the lowest or the highest value of `best_metric` is the best."""
    export_hf: bool = True
    """Write the student as a Hugging Face folder (`hf/`) at the end."""


class EvaluationConfig(Section):
    every: NonNegativeInt = 10
    """Steps between held-out evaluations (step 0 and the last are always evaluated); 0 switches them off."""
    prompts: PositiveInt = 32
    """Held-out rows that are scored."""


class LoggingConfig(Section):
    tensorboard: bool = True
    """Write TensorBoard events into the run directory."""
    wandb_project: str | None = None
    """Weights & Biases project; off by default."""
    sample_every: NonNegativeInt = 5
    """Steps between readable samples on the terminal; 0 switches them off."""
    progress: bool = True
    """Progress bar on a terminal."""


class RunConfig(Section):
    """One run, whole."""

    output_dir: str = "runs/default"
    """Run directory: config.yaml, metrics.jsonl, checkpoints/, hf/, report/."""
    steps: PositiveInt = 100
    """Optimizer steps."""
    seed: NonNegativeInt = 0
    """Seeds prompts, sampling and every random number of the run."""
    trust_remote_code: bool = False
    """Let a tokenizer run code that came with it. Only for sources you have read."""
    student: StudentConfig = Field(default_factory=StudentConfig)
    """The model that is trained."""
    teachers: list[TeacherConfig] = Field(default_factory=lambda: [TeacherConfig(path="teacher")], min_length=1)
    """The models it learns from."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Prompts."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    """How the student samples answers."""
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    """What is minimised."""
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

    @property
    def sequences_per_step(self) -> int:
        return self.rollout.prompts_per_step * self.rollout.samples_per_prompt

    @property
    def world_size(self) -> int:
        """Ranks the run needs when `parallel.data` is left at its default outside torchrun."""
        return self.parallel.model * (self.parallel.data or self.parallel.expert)

    @model_validator(mode="after")
    def _cross_field_rules(self) -> RunConfig:
        parallel, optimizer = self.parallel, self.optimizer
        if parallel.sequence_parallel and parallel.tensor == 1:
            raise ValueError(
                "parallel.sequence_parallel=true needs parallel.tensor > 1, got 1: raise it or switch it off"
            )
        if parallel.data is not None and parallel.data % parallel.expert:
            raise ValueError(
                f"parallel.expert={parallel.expert} must divide parallel.data={parallel.data}, whose ranks share the "
                "experts out: change one of them"
            )
        if optimizer.warmup_steps >= self.steps and optimizer.warmup_steps > 0:
            raise ValueError(
                f"optimizer.warmup_steps={optimizer.warmup_steps} must be below steps={self.steps}: "
                "shorten the warm-up or train longer"
            )
        if optimizer.min_lr > optimizer.lr:
            raise ValueError(
                f"optimizer.min_lr={optimizer.min_lr} must not exceed optimizer.lr={optimizer.lr}: lower min_lr"
            )
        best = self.checkpoint.best_metric
        if best is not None and best.startswith("eval/") and self.evaluation.every == 0:
            raise ValueError(
                f"checkpoint.best_metric={best} needs evaluation.every > 0, got 0: switch evaluation on, or choose a "
                "training figure such as reverse_kl"
            )
        objective = self.objective
        if objective.is_sampled and objective.temperature != self.rollout.temperature:
            # The engine's log-probabilities are at the one, the trainer's at the other: their ratio would mean nothing.
            raise ValueError(
                f"objective.temperature={objective.temperature} must equal rollout.temperature="
                f"{self.rollout.temperature} with objective.type={objective.type}, which scores sampled tokens: "
                "set one to the other"
            )
        self.micro_batch_size(parallel.data or 1)
        return self

    def micro_batch_size(self, data_parallel: int) -> int:
        """Sequences in one forward pass. Raises ConfigError unless a step's sequences split evenly over ranks."""
        total, size = self.sequences_per_step, self.parallel.micro_batch_size
        if total % (data_parallel * (size or 1)):
            raise ConfigError(
                f"rollout.prompts_per_step * rollout.samples_per_prompt = {total} must be a multiple of data-parallel "
                f"size {data_parallel} * parallel.micro_batch_size {size or 1}: change one of them"
            )
        per_rank = total // data_parallel
        return size or max(n for n in range(1, min(per_rank, 8) + 1) if per_rank % n == 0)

    def require_available(self) -> None:
        """Raises NotAvailableError for what the configuration can name but this release does not do."""
        if self.objective.lambda_rl > 0:
            raise NotAvailableError(
                f"objective.lambda_rl={self.objective.lambda_rl} is not available yet: there are no rewards for its "
                "policy gradient; set objective.lambda_rl=0 to distil alone"
            )
        if len(self.teachers) > 1:
            raise NotAvailableError(
                f"teachers (a list of {len(self.teachers)}) is not available yet: this release trains with one teacher"
            )


def load_config(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Reads a YAML file, applies `a.b=value` overrides (values are YAML) and checks every rule.

    List elements are addressed by index (`teachers.0.path=...`). `path=None` starts from the defaults.

    Raises:
        MissingPathError: the file does not exist.
        ConfigError: the YAML is malformed, a key is unknown, or a value breaks a rule.
    """
    tree = _read_yaml(Path(path)) if path is not None else {}
    for override in overrides:
        _apply_override(tree, override)
    return build_config(tree)


def build_config(tree: dict[str, Any]) -> RunConfig:
    """Validates a nested dictionary; the first problem is raised as a one-line ConfigError."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, in the order of the schema."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingPathError(f"config file {str(path)!r} does not exist: give the path of a YAML file")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {str(path)!r} must hold a mapping of sections, got {type(tree).__name__}")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, sep, text = override.partition("=")
    if not sep or not key:
        raise ConfigError(f"override {override!r} must have the form key.path=value, e.g. optimizer.lr=1e-4")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML, quote it") from None
    set_by_path(tree, key, value)


def set_by_path(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets `a.b.0.c` in nested dictionaries and lists, making what is missing."""
    node: Any = tree
    parts = key.split(".")
    for part, following in itertools.pairwise(parts):
        node = _descend(node, part, key, [] if following.isdigit() else {})
    last = parts[-1]
    if isinstance(node, list):
        _grow(node, last, key, value)
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"override key {key!r} goes through a plain value: {last!r} has no parent section")


def _descend(node: Any, part: str, key: str, default: Any) -> Any:
    if isinstance(node, list):
        _grow(node, part, key, default)
        return node[int(part)]
    if not isinstance(node, dict):
        raise ConfigError(f"override key {key!r} goes through a plain value at {part!r}")
    if node.get(part) is None:
        node[part] = default
    return node[part]


def _grow(node: list[Any], part: str, key: str, default: Any) -> None:
    if not part.isdigit() or int(part) > len(node):
        raise ConfigError(f"override key {key!r}: {part!r} must be an index from 0 to {len(node)}")
    if int(part) == len(node):
        node.append(default)


def _one_line(error: ValidationError) -> str:
    # An unknown key is the likelier typo behind a "field required" next to it.
    first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    location = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _fields_at(first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown config key {location!r}: {hint}"
    cause = first.get("ctx", {}).get("error")
    if cause is not None:  # a rule of ours, which names what it concerns
        return str(cause)
    return f"{location}={first['input']!r}: {first['msg']}" if location else first["msg"]


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the section at `location`."""
    model: type[BaseModel] = RunConfig
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
