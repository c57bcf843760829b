"""What runs inside each vLLM worker: takes Hugging Face tensors and makes them the model's weights.

Injected by `worker_extension_cls`, the one seam that reaches a worker on CPU and GPU, in-process and in worker
processes of their own (engine tensor > 1). Methods return problems as text instead of raising: an exception in
one of several workers would leave the replies of the others unread and put every later call out of step.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform

from opd_megatron.weight_sync.bucket_buffers import Mappings

# It warns at every update about rotary tables and tied heads; `opd_end_update` tells what is really missing.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)


class WeightReceiver:
    """Mixed into vLLM's worker class; `self` is the worker."""

    opd_update_open: bool = False
    opd_shards: _PreShardedLoading | None = None
    opd_mappings: Mappings | None = None
    model_config: Any
    model_runner: Any
    device: torch.device
    vllm_config: Any

    def opd_begin_update(self) -> None:
        """Puts every layer into loading mode; closes an update that was left open."""
        if self.opd_update_open:
            self.opd_end_update()
        model = self.model_runner.get_model()
        _forget_packed_experts(model)
        with set_current_vllm_config(self.vllm_config):
            # Bare load_weights fails on CPU, where linear weights are prepacked; the layerwise reload unpacks,
            # loads, packs again and keeps the storage that CUDA graphs point to.
            initialize_layerwise_reload(model)
        self.opd_update_open = True
        self.opd_mappings = Mappings()

    def opd_load(self, paths: list[str]) -> str | None:
        """Loads a bucket: the only one, of full HF tensors, or its own of several, of just its shards.

        Returns what is wrong with it, if anything is. All files of an update are of one kind.
        """
        model = self.model_runner.get_model()
        path = paths[0]
        if len(paths) > 1:
            path = paths[get_tensor_model_parallel_rank()]
            self.opd_shards = self.opd_shards or _PreShardedLoading(model)
        try:
            with set_current_vllm_config(self.vllm_config):
                assert self.opd_mappings is not None
                tensors = self.opd_mappings.load(Path(path), self.device)
                model.load_weights(list(tensors.items()))
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())}"
        return None

    def opd_end_update(self) -> str | None:
        """Makes the loaded weights the ones in use; returns which modules did not get all of theirs, if any."""
        model = self.model_runner.get_model()
        tied = _tied_heads(model)
        missing = [name for name, layer in model.named_modules() if layer not in tied and _is_incomplete(layer)]
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(model, self.model_config)
            if self.opd_shards is not None:
                self.opd_shards.undo()
                self.opd_shards = None
            for head in tied:
                # The reload does not see that a tied head shares the embedding; on CPU it keeps its own packed copy.
                head.quant_method.process_weights_after_loading(head)
        self.opd_update_open = False
        self.opd_mappings = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return f"no or not enough values for {', '.join(missing[:5])} ({len(missing)} modules)" if missing else None


class _PreShardedLoading:
    """Pretends to be TP rank 0 of a model as large as this shard, so that vLLM loads the shard unsliced, until `undo`.

    vLLM's loaders take `tp_rank`'s part of a full tensor. For rank 0 that part begins at the tensor's first row or
    column and has the shard's size, so of a tensor that is just the shard it is all. Experts' loaders divide what they
    are given by the number of ranks, unless they are told that it is a shard.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before: list[tuple[Any, str, Any]] = []
        for layer in model.modules():
            if isinstance(layer, LinearBase):
                for owner in (layer, *layer.parameters(recurse=False)):
                    if hasattr(owner, "tp_rank"):
                        self._set(owner, "tp_rank", 0)
            elif isinstance(layer, VocabParallelEmbedding):
                rows = layer.shard_indices.num_org_elements
                first = dataclasses.replace(layer.shard_indices, org_vocab_start_index=0, org_vocab_end_index=rows)
                self._set(layer, "shard_indices", first)
                self._set(layer, "org_vocab_size", rows)
            elif isinstance(layer, RoutedExperts):
                for name in ("_load_w13", "_load_w2"):
                    self._set(layer, name, _load_as_shard(getattr(layer, name)))

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        for owner, name, value in self._before:
            setattr(owner, name, value)


def _load_as_shard(load: Callable[..., None]) -> Callable[..., None]:
    return lambda *args, **kwargs: load(*args, **{**kwargs, "load_full": True})


def _forget_packed_experts(model: nn.Module) -> None:
    """Makes a new expert kernel at the next call: on a CPU it packs the experts when it is made, and only then.

    (`UnquantizedFusedMoEMethod._setup_kernel` takes raw weights for packed ones at every update; on a GPU nothing is
    done to them at that place.)
    """
    if current_platform.is_cpu():
        for layer in model.modules():
            method = getattr(layer, "quant_method", None)
            if isinstance(method, FusedMoEMethodBase):
                method.moe_kernel = None


def _tied_heads(model: nn.Module) -> list[ParallelLMHead]:
    if not getattr(model.config, "tie_word_embeddings", False):
        return []
    return [layer for layer in model.modules() if isinstance(layer, ParallelLMHead)]


def _is_incomplete(layer: nn.Module) -> bool:
    """Whether a layer in loading mode still waits for parameters (a layer leaves that mode when it has them all)."""
    info = get_layerwise_info(layer)
    parameters, _ = info.restore_metadata
    if not info.can_load() or not parameters or is_deferred_attention_layer(layer):
        return False
    return info.load_numel < _checkpoint_numel(layer, sum(p.numel() for p in parameters.values()))


def _checkpoint_numel(layer: nn.Module, numel: int) -> int:
    # vLLM pads the vocabulary; the padding rows are in no checkpoint.
    if not isinstance(layer, VocabParallelEmbedding):
        return numel
    shard = layer.shard_indices
    return numel * shard.num_org_elements // layer.num_embeddings_per_partition
