"""Teachers: what all of them have, and one class a placement with the keys of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Discriminator, Field, PositiveFloat, PositiveInt, Tag

from opd_megatron.config.sections import Precision, PrecisionConfig, Section, UserPath

STUDENT = "student"
"""`teachers.N.path` of self-distillation."""


REFERENCE = "reference"
"""`teachers.N.name` of the model that `objective.reference_kl` is about."""


class TeacherConfig(Section):
    """What every teacher has, wherever it runs. `placement` chooses the class of an entry of `teachers:`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")] | None = None
    """What `routes` and the metrics call it; its number in the list by default."""
    path: UserPath
    """Hugging Face folder or hub id; `student` is the student itself (a folder of that name is `./student`)."""
    weight: float = 1.0
    """Share among the teachers that score a sample; their shares are normalised to sum to one. Below 0, with
    `objective.combine=logit_mean`, the student is pushed away from it: a teacher of weight 1.25 and one of -0.25 are
    the first one, extrapolated."""
    prompt: str | None = None
    """What it reads in the place of the student's prompt: a text with columns of the row in braces, such as `{prompt}`,
    `{answer}` or `{reward_model.ground_truth}`, in the chat template as the user's message; `{sibling}` is another
    right answer of the student's. A brace itself is written twice."""

    alignment: Literal["spans", "shared_vocabulary"] | None = None
    """For a teacher with another tokenizer, which is refused by default. `spans`, with a sampled-token objective:
    log-probabilities of stretches of text that both tokenizations cut out alike. `shared_vocabulary`, with any other:
    distributions over the tokens that both have and one event for all others, where both have read the same text."""
    fingerprint: str | None = None
    """What it must be: a hash of its configuration, weights and tokenizer, as the start of a run prints it. A run fills
    it in in its own config.yaml, and refuses another teacher under the same path."""

    @property
    def is_student(self) -> bool:
        """Whether it has the student's own weights: those that training starts from, or goes on with."""
        return self.path == STUDENT


class MegatronTeacherConfig(TeacherConfig):
    """A teacher of one architecture and dtype, whose LM head the job holds."""

    dtype: Precision = "auto"
    """Arithmetic of the teacher's forward pass; `auto` as for the student."""


class StudentRanksTeacherConfig(MegatronTeacherConfig):
    """A teacher on the student's own ranks, in the student's layout unless it has one of its own."""

    placement: Literal["student"] = "student"
    """Where the teacher runs: `student` is on the student's ranks, `own` on ranks of its own, `served` on vLLM servers
    elsewhere, `cached` in states on disk."""
    tensor: PositiveInt | None = None
    """Tensor-parallel size; the student's by default. `tensor * pipeline` divides the student's ranks."""
    pipeline: PositiveInt | None = None
    """Pipeline-parallel size; the student's by default."""
    offload: bool = False
    """Let its weights wait in pinned host memory while the rollout engine is awake; as `student.offload`."""
    update: Literal["frozen", "live", "ema"] = "frozen"
    """With `path: student`: `frozen` keeps the weights that training starts from; `live` is the student of each step;
    `ema` is an exponential moving average of its weights, kept in fp32 and in checkpoints."""
    decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the average that each optimizer step keeps, with `update: ema`; 0.999 by default."""
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)
    """FP8 of this teacher; as the student's `precision`."""


class OwnRanksTeacherConfig(MegatronTeacherConfig):
    """A teacher on ranks of its own, behind the student's, in the same job."""

    placement: Literal["own"] = "own"
    """As above."""
    tensor: PositiveInt = 1
    """Tensor-parallel size."""
    pipeline: PositiveInt = 1
    """Pipeline-parallel size."""
    data: PositiveInt = 1
    """Copies of the teacher, which share the micro batches out."""
    expert: PositiveInt = 1
    """Expert-parallel size; must divide `data`."""
    in_flight: PositiveInt = 2
    """Micro batches whose states may be on their way to each of the student's ranks."""
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)
    """FP8 of this teacher; as the student's `precision`."""

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data


class ServedTeacherConfig(MegatronTeacherConfig):
    """A teacher that vLLM servers run somewhere else, in pooling mode: they answer with final hidden states."""

    placement: Literal["served"] = "served"
    """As above."""
    urls: list[str] = Field(min_length=1)
    """Addresses of the servers, such as `http://host:8000`; requests go to the one that has fewest."""
    top_k: PositiveInt | None = None
    """Take only so many log-probabilities of each token, from servers that generate: the rest of the vocabulary is one
    more event. By default hidden states, which are exact, from servers in pooling mode."""
    in_flight: PositiveInt = 4
    """Micro batches that each of the student's replicas has on their way to every server."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the servers' key (vLLM's `--api-key`), where they want one."""
    request_timeout: PositiveFloat = 600.0
    """Seconds that a server may take to answer."""
    retries: Annotated[int, Field(ge=0)] = 3
    """How often a request is sent again, to another server first, where one does not answer."""


class CachedTeacherConfig(MegatronTeacherConfig):
    """A teacher whose final hidden states `opd-megatron cache-teacher` has written to disk."""

    placement: Literal["cached"] = "cached"
    """As above."""
    cache: UserPath
    """Folder of the states, on storage that all ranks share."""
    missing: Literal["error", "compute"] = "error"
    """What becomes of a sequence that is not there: `compute` keeps the teacher on the student's ranks for it."""
    tensor: PositiveInt | None = None
    """Tensor-parallel size of a teacher that computes; the student's by default."""
    pipeline: PositiveInt | None = None
    """Its pipeline-parallel size; the student's by default."""
    offload: bool = False
    """Let its weights wait in pinned host memory while the rollout engine is awake; as `student.offload`."""
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)
    """FP8 of this teacher; as the student's `precision`."""

    def computing(self) -> StudentRanksTeacherConfig:
        """The same teacher on the student's ranks: of the pass that writes states, and of what is missing."""
        shared = self.model_dump(include=set(StudentRanksTeacherConfig.model_fields) - {"placement"})
        return StudentRanksTeacherConfig(**shared)


def by_placement(*classes: type[TeacherConfig]) -> Any:
    """Builds the annotation of one teacher: the class that its `placement` names, the first class by default."""
    if len(classes) == 1:
        return classes[0]
    names = [kind.model_fields["placement"].default for kind in classes]

    def name_of(entry: Any) -> Any:
        given = entry.get("placement") if isinstance(entry, dict) else getattr(entry, "placement", None)
        return names[0] if given is None else given

    tagged = tuple(Annotated[kind, Tag(name)] for kind, name in zip(classes, names, strict=True))
    return Annotated[Union[tagged], Discriminator(name_of)]  # noqa: UP007  a tuple of any length


if TYPE_CHECKING:
    AnyTeacherConfig = TeacherConfig
else:
    AnyTeacherConfig = by_placement(
        StudentRanksTeacherConfig,
        OwnRanksTeacherConfig,
        ServedTeacherConfig,
        CachedTeacherConfig,
    )
