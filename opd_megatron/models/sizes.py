"""Parameter and token counts that the estimates of memory, traffic and time use."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

from transformers import PretrainedConfig

from opd_megatron.config import PrecisionConfig, RunConfig, decided
from opd_megatron.models.lengths import AnswerLengths
from opd_megatron.models.rules import ResolvedModels
from opd_megatron.types import DTYPES
from opd_megatron.weights.families import Dims, family_of
from opd_megatron.weights.layout import ShardLayout, layers_of_parts
from opd_megatron.weights.sharding import ShardingTable, StageParameter, sharding_table

BYTES_PER_ELEMENT: dict[str, int] = {name: dtype.itemsize for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class StageShard:
    """One rank's parameters of one model on one pipeline stage, in elements."""

    parameters: int
    experts: int
    """Of routed experts, which fewer data-parallel ranks have copies of; counted in `parameters` too."""
    largest: int
    embedding: int
    """Of the input embedding; 0 off the first stage."""
    head: int
    """Of the output layer, also where it is the embedding; 0 off the last stage."""
    tied: bool
    """Whether the head is the embedding of this very rank."""
    layers: int


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """Widths of one transformer layer, before tensor parallelism."""

    hidden: int
    query: int
    key: int
    """Of keys, and of values again."""
    heads: int
    head_dim: int
    ffn: int
    """Feed-forward columns that a token goes through; of a mixture of experts, of its chosen and shared experts."""
    experts_per_token: int
    """Experts that a token is copied to; 0 in a dense model."""

    @property
    def matmul_params(self) -> int:
        """Weights that a token is multiplied with."""
        return self.hidden * (2 * self.query + 2 * self.key + 3 * self.ffn)

    @property
    def attention_length(self) -> float:
        """Tokens of a sequence of which attention over all of it takes as many operations as the products do."""
        return self.matmul_params / self.query

    @staticmethod
    def of(hf_config: PretrainedConfig) -> LayerSizes:
        dims = Dims.of(hf_config)
        experts_per_token = hf_config.num_experts_per_tok if family_of(hf_config).experts else 0
        ffn = experts_per_token * dims.expert_ffn + dims.shared_ffn if experts_per_token else dims.ffn
        return LayerSizes(dims.hidden, dims.q, dims.kv, dims.q // dims.head_dim, dims.head_dim, ffn, experts_per_token)


@dataclass(frozen=True)
class RunSizes:
    """One run in one layout."""

    config: RunConfig
    models: ResolvedModels
    shards: dict[tuple[int, ShardLayout], list[StageShard]] = field(default_factory=dict, compare=False)
    """What `stage` has worked out, by model and first rank: other layouts of the same models may share it."""
    mean_answer: float | None = None
    """Tokens of a mean answer; by default half of the longest."""
    packed: bool = False
    """Whether no sequence is padded to the longest of its micro batch."""

    @property
    def tp_size(self) -> int:
        return self.config.parallel.tensor

    @property
    def pp_size(self) -> int:
        return self.config.parallel.pipeline

    @property
    def dp_size(self) -> int:
        return self.models.data_parallel

    @property
    def cp_size(self) -> int:
        return self.config.parallel.context

    @property
    def replicas(self) -> int:
        """Ranks with copies of the same weights, experts aside."""
        return self.dp_size * self.cp_size

    @property
    def expert_copies(self) -> float:
        """Ranks with copies of the same experts."""
        return self.dp_size * self.config.parallel.beside_data / self.ep_size

    @property
    def stage_layers(self) -> tuple[int, ...]:
        """Layers of the student on each pipeline stage, those of all its parts together."""
        parallel = self.config.parallel
        parts = layers_of_parts(
            self.models.student_config.num_hidden_layers, self.pp_size, parallel.virtual_stages, parallel.stages
        )
        return tuple(sum(parts[stage :: self.pp_size]) for stage in range(self.pp_size))

    @property
    def ep_size(self) -> int:
        return self.config.parallel.expert

    @property
    def ranks(self) -> int:
        return self.tp_size * self.pp_size * self.replicas

    @property
    def job_ranks(self) -> int:
        """The student's ranks, those of teachers' own and those that hold engines alone."""
        return self.ranks + self.config.teacher_ranks + (self.config.rollout.hosts or 0)

    @property
    def sequence_shards(self) -> int:
        """Ranks among which activations between tensor-parallel regions are split (sequence parallelism)."""
        return self.tp_size if self.config.parallel.sequence_parallel else 1

    @property
    def micro_size(self) -> int:
        """Sequences in a micro batch; of a packed one the longest that it holds."""
        budget = self.config.pack_tokens
        return self.config.micro_batch_size(self.dp_size) if budget is None else max(1, budget // self.length)

    @property
    def micro_batches(self) -> int:
        """Micro batches of a rank in a step."""
        budget = self.config.pack_tokens
        if budget is not None:
            tokens = self.config.sequences_per_step * self.expected_length / self.dp_size
            multiple = self.pp_size if self.config.parallel.virtual_stages > 1 else 1
            return -(-max(1, math.ceil(tokens / budget)) // multiple) * multiple
        return self.config.sequences_per_step // self.dp_size // self.micro_size

    @property
    def length(self) -> int:
        """Tokens of the longest sequence, padding to the sequence-parallel ranks included."""
        longest = self.config.longest_sequence
        return -(-longest // self.sequence_shards) * self.sequence_shards

    @property
    def tokens(self) -> int:
        """Tokens on a rank of a micro batch of longest sequences."""
        return min(self._most_tokens, self.config.pack_tokens or self.micro_size * self.length) // self.cp_size

    @property
    def response_tokens(self) -> int:
        """Tokens on a rank of a micro batch that the objective is about."""
        return min(self.tokens, -(-self.micro_size * self.config.rollout.max_new_tokens // self.cp_size))

    @property
    def step_response_tokens(self) -> int:
        """Tokens on a rank of a whole step that the objective is about, all of them as long as they may be."""
        sequences = -(-self.config.sequences_per_step // self.dp_size)
        return -(-sequences * self.config.rollout.max_new_tokens // self.cp_size)

    @property
    def most_micro_batches(self) -> int:
        """Micro batches of a rank in a step whose sequences are as long as they may be."""
        budget = self.config.pack_tokens
        return self.micro_batches if budget is None else max(1, -(-self._most_tokens // budget))

    @property
    def _most_tokens(self) -> int:
        """Tokens of a data-parallel rank's longest sequences."""
        return max(1, -(-self.config.sequences_per_step // self.dp_size)) * self.length

    @cached_property
    def answers(self) -> AnswerLengths:
        """How long answers are expected to be. Memory is for the longest that may be, time for these."""
        longest = self.config.rollout.max_new_tokens
        return AnswerLengths(min(self.mean_answer or longest / 2, longest), longest)

    @cached_property
    def expected_length(self) -> float:
        """Tokens that a sequence is expected to take: a longest prompt, and its answer padded to the longest of its
        micro batch, under pipeline parallelism to the longest of the step."""
        beside = self.config.sequences_per_step if self.pp_size > 1 else self.micro_size
        packed = self.packed or self.config.pack_tokens is not None
        answer = self.answers.mean if packed else self.answers.longest_of(beside)
        return self.config.data.max_prompt_tokens + answer

    @property
    def vocab_per_rank(self) -> int:
        """Vocabulary columns on each tensor-parallel rank."""
        return self.models.padded_vocab(self.tp_size) // self.tp_size

    def head_columns(self, hf_config: PretrainedConfig) -> int:
        """The same of a teacher's head at the student's side; another vocabulary's are dealt to the ranks."""
        return self.models.padded_vocab(self.tp_size, hf_config) // self.tp_size

    def fp8_parameters(self, hf_config: PretrainedConfig, shard: StageShard, ends: int) -> int:
        """Counts those of a rank's parameters whose products are in FP8: those of its layers but `ends` at either end
        of the model, every stage taken to have its share of them."""
        layers = hf_config.num_hidden_layers
        outside = shard.embedding + (0 if shard.tied else shard.head)
        return round((shard.parameters - outside) * max(0, layers - 2 * ends) / layers)

    def frozen_fp8_bytes(
        self, hf_config: PretrainedConfig, shard: StageShard, precision: PrecisionConfig, element: int
    ) -> float:
        """What FP8 adds to a rank's weights of a frozen model: a copy for products, or the weights themselves in it."""
        if precision.fp8 is None:
            return 0.0
        numbers = self.fp8_parameters(hf_config, shard, precision.first_last_bf16)
        return numbers * (1.0 - (element if precision.param else 0))

    @property
    def bytes_per_element(self) -> int:
        """Bytes of one element of the student's weights."""
        return BYTES_PER_ELEMENT[decided(self.config.student.dtype)]

    def body_flops(self, hf_config: PretrainedConfig) -> float:
        """Counts the operations of one forward pass of a step's tokens through all layers of a model."""
        layer, length = LayerSizes.of(hf_config), self.expected_length
        tokens = self.config.sequences_per_step * length
        return hf_config.num_hidden_layers * tokens * (2 * layer.matmul_params + 2 * length * layer.query)

    def head_flops(self, hf_config: PretrainedConfig) -> float:
        """Counts the operations of the LM head on a step's response tokens."""
        response_tokens = self.config.sequences_per_step * self.answers.mean
        return 2.0 * response_tokens * hf_config.vocab_size * hf_config.hidden_size

    def stage(self, hf_config: PretrainedConfig, stage: int) -> StageShard:
        """Counts a stage's parameters by the sharding table, which `planning.coverage` compares with real modules."""
        layers = self.stage_layers if hf_config is self.models.student_config else None
        return self._stages(hf_config, self.tp_size, self.pp_size, layers)[stage]

    def largest_stage(self, hf_config: PretrainedConfig, tensor: int, pipeline: int) -> StageShard:
        """The stage with most parameters of a model in another layout."""
        return max(self._stages(hf_config, tensor, pipeline), key=lambda shard: shard.parameters)

    def _stages(
        self, hf_config: PretrainedConfig, tensor: int, pipeline: int, layers: tuple[int, ...] | None = None
    ) -> list[StageShard]:
        layers = layers or layers_of_parts(hf_config.num_hidden_layers, pipeline)
        first = ShardLayout(
            self.models.padded_vocab(tensor, hf_config), 0, layers[0],
            tp_size=tensor, pp_size=pipeline, ep_size=self.ep_size, parts=layers,
            whole_experts=self.config.parallel.whole_experts and tensor == self.tp_size,
        )  # fmt: skip
        if (id(hf_config), first) not in self.shards:
            self.shards[id(hf_config), first] = _stage_shards(hf_config, first)
        return self.shards[id(hf_config), first]


def _stage_shards(hf_config: PretrainedConfig, first: ShardLayout) -> list[StageShard]:
    """Counts the parameters of every stage. `first` is the layout of the grid's first rank."""
    table, family = sharding_table(hf_config, first), family_of(hf_config)
    shards = []
    for stage in range(first.pp_size):
        params = table.stage(stage)
        sizes = {param.megatron: math.prod(table.shard_shape(param, first)) for param in params}
        embedding = sizes.get(family.first[0].megatron, 0)
        tied = first.pp_size == 1 and table.tied
        head = embedding if tied else sizes.get(family.head.megatron, 0)
        experts = sum(sizes[param.megatron] for param in params if param.expert_rank is not None)
        shards.append(
            StageShard(sum(sizes.values()), experts, max(sizes.values()), embedding, head, tied, first.parts[stage])
        )
    return shards


def parameters(hf_config: PretrainedConfig) -> int:
    """Counts the parameters of a whole model."""
    dims = Dims.of(hf_config)
    key = (family_of(hf_config).name, dims, bool(hf_config.tie_word_embeddings))
    if key not in _counted:
        table: ShardingTable = sharding_table(hf_config, ShardLayout(dims.vocab, first_layer=0, num_layers=dims.layers))
        params: list[StageParameter] = table.exported()
        _counted[key] = sum(param.numel for param in params)
    return _counted[key]


_counted: dict[tuple[str, Dims, bool], int] = {}
"""A table of thousands of experts takes a tenth of a second, and a search of layouts asks a thousand times."""
