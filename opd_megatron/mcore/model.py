"""A Megatron GPT model from a Hugging Face config: hidden states out, the head left to the fused divergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from transformers import PretrainedConfig

from opd_megatron.config import Dtype, PrecisionConfig, StudentConfig
from opd_megatron.mcore.cpu.platform import device, has_gpu
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.rope import attention_factor, inverse_frequencies, rope_theta
from opd_megatron.mcore.spec import block_spec
from opd_megatron.mcore.stages import ModelChunks, StageLayout
from opd_megatron.mcore.te import fp8_arguments, fused_arguments
from opd_megatron.types import DTYPES, places_of
from opd_megatron.weights.families import Dims, Family, family_of
from opd_megatron.weights.layout import layers_of_parts


class HiddenStatesModel(GPTModel):
    """GPTModel whose last stage returns final hidden states [S, B, h] instead of logits [B, S, v].

    The head's weight stays a parameter of the model (`head_weight`); the objective multiplies it out chunk by
    chunk, so that [tokens, vocab] never exists.
    """

    positions_from_batch = False
    """Whether rotary angles are looked up by the positions of a packed row, rather than counted by a kernel."""

    def _preprocess(self, *, position_ids: torch.Tensor, packed_seq_params: Any = None, **arguments: Any) -> Any:
        # Upstream would count positions from sequence lengths that it reads from the device in every layer.
        prepared = super()._preprocess(position_ids=position_ids, packed_seq_params=packed_seq_params, **arguments)
        if packed_seq_params is None or not self.positions_from_batch:
            return prepared
        angles = torch.outer(position_ids[0].to(self.rotary_pos_emb.inv_freq), self.rotary_pos_emb.inv_freq)
        return (prepared[0], torch.cat((angles, angles), -1).unsqueeze(1), *prepared[2:])

    def _postprocess(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        # Upstream's hook after the decoder: everything it does beyond this point is the head and its loss.
        return hidden_states

    def tie_embeddings_and_output_weights_state_dict(
        self, sharded_state_dict: dict[str, Any], output_layer_weight_key: str, first_stage_word_emb_key: str,
        metadata: dict[str, Any],
    ) -> None:  # fmt: skip
        """The checkpoint entry of a tied head on its own pipeline stage: a replica of the first stage's embedding.

        Upstream's version does the same but asks a global for the data-parallel rank.
        """
        if self.pre_process or not self.post_process:
            return
        group = metadata["dp_cp_group"]
        sharded_state_dict[output_layer_weight_key] = make_tp_sharded_tensor_for_checkpoint(
            tensor=self.head_weight,
            key=first_stage_word_emb_key,
            replica_id=(1, 0, group.rank()),
            allow_shape_mismatch=True,
            tp_group=self.pg_collection.tp,
            dp_cp_group=group,
        )

    @property
    def head_weight(self) -> torch.Tensor:
        """Returns [v, h]: this rank's rows of the LM head (the embedding where tied). Last stage only."""
        assert self.post_process, "the head lives on the last pipeline stage"
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    @property
    def is_embedding_too(self) -> bool:
        """Whether the head is the embedding of this very rank."""
        return bool(self.pre_process and self.post_process and self.share_embeddings_and_output_weights)

    def response_rows(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Selects the rows of `hidden_states` [S, B, h] where `mask` [B, S], on the CPU: [T, h] in the order of
        `mask.nonzero()`.

        Under sequence parallelism `hidden_states` is this rank's [S / tp, B, h], and so is what is returned: its rows,
        [R, h], padded with zeros to the number R of the rank that has most. `gather_index` says where each token's row
        is. Only response rows ever travel, when the loss gathers them.
        """
        rows, device = hidden_states.transpose(0, 1).flatten(0, 1), hidden_states.device
        if not self.config.sequence_parallel:
            return rows.index_select(0, places_of(mask, device))
        group = self.pg_collection.tp
        masks = _by_sequence_shard(mask, group.size())
        rows = rows.index_select(0, places_of(masks[group.rank()], device))
        return F.pad(rows, (0, 0, 0, int(masks.sum(1).max()) - len(rows)))

    def gather_index(self, mask: torch.Tensor) -> torch.Tensor | None:
        """Index of the row of each token of `mask` [B, S], on the CPU, in all ranks' concatenated `response_rows`: [T]
        int64 on the model's device.

        None without sequence parallelism, where every rank has all rows in order."""
        if not self.config.sequence_parallel:
            return None
        index = _gather_index(mask, self.pg_collection.tp.size())
        return index.to(self.rotary_pos_emb.inv_freq.device, non_blocking=True)


Model = HiddenStatesModel | ModelChunks
"""A rank's shard of a model: one part of it, or several with virtual stages."""


def chunks_of(model: Model) -> list[HiddenStatesModel]:
    """Its parts."""
    if isinstance(model, ModelChunks):
        return [cast("HiddenStatesModel", chunk) for chunk in model]
    return [model]


def _gather_index(mask: torch.Tensor, ranks: int) -> torch.Tensor:
    masks = _by_sequence_shard(mask, ranks)
    counts = masks.cumsum(1)
    most = counts[:, -1].max()
    places = counts - 1 + most * torch.arange(ranks, device=mask.device).unsqueeze(1)
    batch, length = mask.shape
    return places.view(ranks, batch, length // ranks).transpose(0, 1).reshape(batch, length)[mask]


def gathered_rows(shard: torch.Tensor, mask: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Joins what `response_rows` or `sequence_shards` gave each sequence-parallel rank of `group`, [R, h], to all rows
    [T, h] in the order of `mask.nonzero()`, of a mask on the CPU. Collective; no gradient."""
    parts = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(parts, shard.contiguous(), group=group)
    return torch.cat(parts).index_select(0, _gather_index(mask, group.size()).to(shard.device))


def sequence_shards(rows: torch.Tensor, mask: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """Splits rows [T, h] in the order of `mask.nonzero()`, of a mask on the CPU, into what `response_rows` gives each
    of the sequence-parallel ranks: [R, h], padded with zeros."""
    places = torch.full(mask.shape, -1, dtype=torch.int64)
    places[mask] = torch.arange(len(rows))
    batch, length = mask.shape
    shards = places.view(batch, ranks, length // ranks).transpose(0, 1).reshape(ranks, -1)
    parts = [rows.index_select(0, shard[shard >= 0].to(rows.device)) for shard in shards]
    most = max(len(part) for part in parts)
    return [F.pad(part, (0, 0, 0, most - len(part))) for part in parts]


def _by_sequence_shard(mask: torch.Tensor, ranks: int) -> torch.Tensor:
    """Splits the mask [B, S] into the sequence-parallel ranks' parts, [ranks, B * S / ranks]."""
    batch, length = mask.shape
    return mask.view(batch, ranks, length // ranks).transpose(0, 1).reshape(ranks, -1)


def transformer_config(
    hf_config: PretrainedConfig,
    grid: ParallelGrid,
    *,
    dtype: Dtype,
    memory: StudentConfig | None = None,
    transformer_engine: bool = False,
    precision: PrecisionConfig | None = None,
    parts: Sequence[int] | None = None,
) -> TransformerConfig:
    """Describes a Llama-like model (RMSNorm, SwiGLU, rotary, grouped-query attention) to Megatron, dense or MoE.

    `memory`: what of its activations is recomputed or waits elsewhere; nothing by default.

    Raises:
        UnsupportedModelError: see `families.family_of`.
    """
    heads, dims, family = hf_config.num_attention_heads, Dims.of(hf_config), family_of(hf_config)
    return TransformerConfig(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_hidden_size=hf_config.intermediate_size,
        num_attention_heads=heads,
        num_query_groups=dims.groups,
        kv_channels=dims.head_dim,
        # The factor that YaRN puts on cosines and sines, and so on queries and keys alike.
        softmax_scale=attention_factor(hf_config) ** 2 / math.sqrt(dims.head_dim),
        normalization="RMSNorm",
        layernorm_epsilon=hf_config.rms_norm_eps,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=family.qkv_bias,
        qk_layernorm=family.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=grid.tp_size,
        pipeline_model_parallel_size=grid.pp_size,
        context_parallel_size=grid.cp_size,
        **_stages(hf_config.num_hidden_layers, grid, parts),
        sequence_parallel=grid.sequence_parallel,
        params_dtype=DTYPES[dtype],
        pipeline_dtype=DTYPES[dtype],
        bf16=dtype == "bf16",
        # The loss is a sum over tokens, divided once by the number of tokens of all micro batches and data-parallel
        # ranks. A mean of each micro batch's mean would give the tokens of short answers more weight, and the gradient
        # would depend on how the step is split. With this flag Megatron sums, counts the same way, and divides at the
        # end.
        calculate_per_token_loss=True,
        # Every parameter is read from a checkpoint. Initialisation still has to run, doing nothing: it is where
        # upstream marks a weight as tensor parallel, without which gradient norms would miss other ranks' shards.
        init_method=_leave_unset,
        output_layer_init_method=_leave_unset,
        embedding_init_method=_leave_unset,
        gradient_accumulation_fusion=False,  # needs Apex; DDP, or Transformer Engine, adds into the main gradient
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **(fused_arguments(experts=bool(family.experts)) if transformer_engine else _UNFUSED),
        **fp8_arguments(precision or PrecisionConfig(), experts=bool(family.experts)),
        **_recomputed(memory or StudentConfig()),
        **(_experts(hf_config, family, grid, grouped=transformer_engine) if family.experts else {}),
    )


_UNFUSED = {"bias_activation_fusion": False, "apply_rope_fusion": False}


def _recomputed(memory: StudentConfig) -> dict[str, Any]:
    """What the backward pass makes again, and what waits for it in the host's memory."""
    found: dict[str, Any] = {}
    if memory.recompute:
        layers = memory.recompute_layers
        found = {
            "recompute_granularity": "full",
            "recompute_method": "uniform" if layers is None else "block",
            "recompute_num_layers": 1 if layers is None else layers,
        }
    elif memory.recompute_modules:
        found = {"recompute_granularity": "selective", "recompute_modules": list(memory.recompute_modules)}
    if memory.offload_activations:
        found |= {"fine_grained_activation_offloading": True, "offload_modules": list(memory.offload_activations)}
    return found


def _stages(layers: int, grid: ParallelGrid, parts: Sequence[int] | None) -> dict[str, Any]:
    """How the layers are laid over the stages, and how these send to each other."""
    if grid.pp_size == 1:
        return {}
    parts = layers_of_parts(layers, grid.pp_size) if parts is None else parts
    virtual = len(parts) // grid.pp_size
    return {
        "pipeline_model_parallel_layout": StageLayout(parts, grid.pp_size, grid.pp_rank),
        # With virtual stages a stage's neighbours may be one rank. Messages of both directions must not be posted as
        # one batch then: they are matched by their order alone, and tensors silently change places.
        "overlap_p2p_comm": virtual > 1,
        "batch_p2p_comm": has_gpu() and virtual == 1,  # gloo pairs blocking-free sends with receives by itself
        "batch_p2p_sync": False,
    }


def _experts(hf_config: PretrainedConfig, family: Family, grid: ParallelGrid, *, grouped: bool) -> dict[str, Any]:
    dims = Dims.of(hf_config)
    return {
        "num_moe_experts": dims.experts,
        "moe_ffn_hidden_size": dims.expert_ffn,
        "moe_shared_expert_intermediate_size": dims.shared_ffn if family.shared_expert else None,
        "moe_shared_expert_gate": family.shared_expert,
        "moe_router_topk": hf_config.num_experts_per_tok,
        # Softmax over all experts, then the top k of it; or over the top k alone, which is the former normalised.
        "moe_router_pre_softmax": not hf_config.norm_topk_prob,
        "moe_router_dtype": "fp32",
        # The objective is the divergence and nothing else: no balancing loss pulls on the router.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": grouped,
        "expert_model_parallel_size": grid.ep_size,
        "expert_tensor_parallel_size": 1 if grid.whole_experts else grid.tp_size,
    }


def build_gpt_model(
    hf_config: PretrainedConfig,
    grid: ParallelGrid,
    *,
    padded_vocab: int,
    dtype: Dtype,
    memory: StudentConfig | None = None,
    transformer_engine: bool = False,
    precision: PrecisionConfig | None = None,
    parts: Sequence[int] | None = None,
) -> Model:
    """Builds this rank's shard of the model, with unset weights (`weights.load_weights` fills them).

    `memory`, `precision`: as in `transformer_config`.

    `parts`: layers of each part of the pipeline (`layers_of_parts`, the default); several on each stage make a
    `ModelChunks`.
    """
    parts = layers_of_parts(hf_config.num_hidden_layers, grid.pp_size) if parts is None else parts
    config = transformer_config(
        hf_config, grid, dtype=dtype, memory=memory, transformer_engine=transformer_engine, precision=precision,
        parts=parts,
    )  # fmt: skip
    mine = parts[grid.pp_rank :: grid.pp_size]
    chunks = []
    for number, layers in enumerate(mine):
        chunk = HiddenStatesModel(
            config=config,
            transformer_layer_spec=block_spec(config, layers, transformer_engine=transformer_engine),
            vocab_size=padded_vocab,
            max_sequence_length=hf_config.max_position_embeddings,
            pre_process=grid.is_first_stage and number == 0,
            post_process=grid.is_last_stage and number == len(mine) - 1,
            share_embeddings_and_output_weights=bool(hf_config.tie_word_embeddings),
            position_embedding_type="rope",
            rotary_base=rope_theta(hf_config),
            pg_collection=grid.groups,
            vp_stage=number if len(mine) > 1 else None,
        )
        chunk.rotary_pos_emb.inv_freq = inverse_frequencies(hf_config).to(device())
        chunk.positions_from_batch = not transformer_engine
        chunks.append(chunk.cuda() if has_gpu() else chunk)
    return chunks[0] if len(chunks) == 1 else ModelChunks(chunks)


def _leave_unset(weight: torch.Tensor) -> torch.Tensor:
    return weight
