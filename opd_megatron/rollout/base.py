"""The seam to rollout engines: sample from token ids, take new weights, score tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from opd_megatron.types import Bucket, Prompt, Rollout, Sampling


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """One bucket, cut as a tensor-parallel engine cuts it."""

    paths: tuple[Path, ...]
    """safetensors files the engine's process can read; file i holds what worker i needs, and is removed when read."""


WeightPayload = Bucket | ShardFiles
"""What a push consists of: tensors, or where the engine's workers find theirs (one kind for each transport)."""


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples answers with the weights last pushed into it.

    An engine lives on one rank (global rank 0); `rollout.sampler.RolloutClient` makes it look the same on all.
    Every method raises EngineDiedError when the process behind it has ended; `start` then brings up a new one,
    which has no usable weights until the next `update_weights`.
    """

    policy_version: int
    """Version of the weights it holds; -1 until the first `update_weights`."""

    def launch(self) -> None:
        """Begins to come up and returns at once, so that slow imports run beside other work. `start` does the rest."""

    def start(self) -> None:
        """Brings the engine up (again). Weights are unset until `update_weights`."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        """One answer per prompt, in order. Each carries `policy_version` and per-token logprobs in nats."""

    def update_weights(self, shipments: Iterable[WeightPayload], version: int) -> None:
        """Replaces all weights with a stream of full HF tensors, or of shards that fit the engine's workers; drops
        cached prefixes, sets `policy_version`."""

    def token_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """For each sequence, log p(token i | tokens before i) in nats, for i = 1 .. len - 1."""

    def close(self) -> None:
        """Ends the engine. Safe to call twice."""
