"""What an engine takes as weights, and what it is given: the contract between the publisher and the engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from opd_megatron.types import Bucket


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """One bucket, sharded as a tensor-parallel engine shards it."""

    paths: tuple[Path, ...]
    """safetensors files the engine's process can read; file i holds what worker i needs, and is removed when read."""


WeightPayload = Bucket | ShardFiles
"""One piece of a weight sync: a bucket of full Hugging Face tensors, or the shard files of one."""


def tensors_of(payload: WeightPayload) -> Bucket:
    """The tensors of a payload, for an engine whose `WeightFormat` asks for full tensors."""
    assert isinstance(payload, Sequence), f"the engine takes full tensors, not {type(payload).__name__}"
    return payload


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """What an engine says about the weights it takes. Known on every rank, from the configuration alone."""

    dtype: torch.dtype
    tp_size: int = 1
    """Workers that each hold a tensor-parallel shard."""
    vocab_rows: int | None = None
    """Rows of embedding and head on each worker but the last, for an engine that takes `ShardFiles`; None for one that
    takes full tensors only."""
