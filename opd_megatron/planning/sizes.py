"""What memory, traffic and time follow from: parameters by the weight tables, tokens by the configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import PretrainedConfig

from opd_megatron.config import Dtype, RunConfig
from opd_megatron.models import ResolvedModels
from opd_megatron.weights.families import Dims, family_of
from opd_megatron.weights.layout import ShardLayout
from opd_megatron.weights.sharding import ShardingTable, StageParameter, sharding_table

WIDTH: dict[Dtype, int] = {"bf16": 2, "fp32": 4}
"""Bytes of an element."""


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
    routed: int
    """Experts that a token is copied to; 0 in a dense model."""

    @property
    def matrix(self) -> int:
        """Weights that a token is multiplied with."""
        return self.hidden * (2 * self.query + 2 * self.key + 3 * self.ffn)

    @staticmethod
    def of(hf_config: PretrainedConfig) -> LayerSizes:
        dims = Dims.of(hf_config)
        routed = hf_config.num_experts_per_tok if family_of(hf_config).experts else 0
        ffn = routed * dims.expert_ffn + dims.shared_ffn if routed else dims.ffn
        return LayerSizes(dims.hidden, dims.q, dims.kv, dims.q // dims.head_dim, dims.head_dim, ffn, routed)


@dataclass(frozen=True, slots=True)
class RunSizes:
    """One run in one layout."""

    config: RunConfig
    models: ResolvedModels
    shards: dict[tuple[int, ShardLayout], list[StageShard]] = field(default_factory=dict, compare=False)
    """What `stage` has worked out, by model and first rank: other layouts of the same models may share it."""

    @property
    def tensor(self) -> int:
        return self.config.parallel.tensor

    @property
    def pipeline(self) -> int:
        return self.config.parallel.pipeline

    @property
    def data(self) -> int:
        return self.models.data_parallel

    @property
    def expert(self) -> int:
        return self.config.parallel.expert

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def sequence_shards(self) -> int:
        """Ranks that share out the activations between tensor-parallel regions."""
        return self.tensor if self.config.parallel.sequence_parallel else 1

    @property
    def micro_size(self) -> int:
        """Sequences of a micro batch."""
        return self.config.micro_batch_size(self.data)

    @property
    def micro_batches(self) -> int:
        """Of a rank in a step."""
        return self.config.sequences_per_step // self.data // self.micro_size

    @property
    def length(self) -> int:
        """Tokens of the longest sequence, padding to the sequence-parallel ranks included."""
        longest = self.config.data.max_prompt_tokens + self.config.rollout.max_new_tokens
        return -(-longest // self.sequence_shards) * self.sequence_shards

    @property
    def tokens(self) -> int:
        """Of a micro batch of longest sequences."""
        return self.micro_size * self.length

    @property
    def responses(self) -> int:
        """Tokens of a micro batch that the objective is about."""
        return self.micro_size * self.config.rollout.max_new_tokens

    @property
    def columns(self) -> int:
        """Vocabulary columns of a rank."""
        return self.models.padded_vocab(self.tensor) // self.tensor

    @property
    def width(self) -> int:
        """Bytes of one of the student's numbers."""
        return WIDTH[self.config.student.dtype]

    @property
    def teachers(self) -> list[tuple[PretrainedConfig, int]]:
        """Config and bytes of a number of each."""
        return [
            (hf_config, WIDTH[teacher.dtype])
            for teacher, (_, hf_config) in zip(self.config.teachers, self.models.teachers, strict=True)
        ]

    def stage(self, hf_config: PretrainedConfig, stage: int) -> StageShard:
        """By the weight tables, so that it is what the modules hold (`coverage` builds and compares them)."""
        layers = hf_config.num_hidden_layers // self.pipeline
        first = ShardLayout(
            self.models.padded_vocab(self.tensor), 0, layers,
            tp_size=self.tensor, pp_size=self.pipeline, ep_size=self.expert,
        )  # fmt: skip
        if (id(hf_config), first) not in self.shards:
            self.shards[id(hf_config), first] = _stage_shards(hf_config, first)
        return self.shards[id(hf_config), first][stage]


def _stage_shards(hf_config: PretrainedConfig, first: ShardLayout) -> list[StageShard]:
    """Of every stage. `first` is the place of the grid's first rank."""
    plan, family = sharding_table(hf_config, first), family_of(hf_config)
    shards = []
    for stage in range(first.pp_size):
        entries = plan.stage(stage)
        sizes = {entry.megatron: math.prod(plan.shard_shape(entry, first)) for entry in entries}
        embedding = sizes.get(family.first[0].megatron, 0)
        tied = first.pp_size == 1 and plan.tied
        head = embedding if tied else sizes.get(family.head.megatron, 0)
        experts = sum(sizes[entry.megatron] for entry in entries if entry.expert_rank is not None)
        shards.append(
            StageShard(sum(sizes.values()), experts, max(sizes.values()), embedding, head, tied, first.num_layers)
        )
    return shards


def parameters(hf_config: PretrainedConfig) -> int:
    """Of the whole model."""
    dims = Dims.of(hf_config)
    plan: ShardingTable = sharding_table(hf_config, ShardLayout(dims.vocab, first_layer=0, num_layers=dims.layers))
    entries: list[StageParameter] = plan.exported()
    return sum(entry.numel for entry in entries)
