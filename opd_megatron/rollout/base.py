"""The seam to rollout engines: sample from token ids, take new weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from opd_megatron.types import Rollout, SampleRequest, Sampling
from opd_megatron.weight_sync.format import WeightPayload


@dataclass(frozen=True, slots=True)
class MachineShare:
    """What of its machine an engine may use."""

    devices: str | None = None
    """Its CUDA_VISIBLE_DEVICES; None leaves them as they are."""
    neighbours: int = 1
    """Engines on the machine, itself included, that sample at the same time and share its cores."""


WHOLE_MACHINE = MachineShare()

Sleeper = Literal["weights", "cache"]
"""What an engine gives back while it sleeps."""


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples answers with the weights that it was last given.

    An engine lives on one rank; `rollout.client.RolloutClient` makes a fleet of them look like one on all. Engines of
    one rank are called from threads, each engine from one at a time. What weights it takes is its `WeightFormat`, which
    every rank knows from the configuration (`rollout.weight_format`).
    Every method raises EngineDiedError when the process behind it has ended; `wait_ready` then brings up a new one,
    which has no usable weights until the next `update_weights`.

    One whose answers take long may have an attribute `answered`, how many of those that it was last asked for are done:
    the display shows it.
    """

    policy_version: int
    """Version of the weights it holds; -1 until the first `update_weights`."""

    def spawn(self) -> None:
        """Starts the engine's process and returns at once, so that slow imports run beside other work."""

    def wait_ready(self) -> None:
        """Brings the engine up (again), spawning it where needed. Weights are unset until `update_weights`."""

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Rollout]:
        """Samples one answer a request, in order. Each carries `policy_version` and per-token logprobs in nats."""

    def update_weights(self, payloads: Iterable[WeightPayload], version: int) -> None:
        """Replaces all weights, drops cached prefixes and sets `policy_version`. The payloads hold the whole model."""

    def sleep(self) -> None:
        """Gives its GPU's memory back. It has neither weights nor cache until `wake`, and needs an update between."""

    def wake(self, what: Sleeper) -> None:
        """Takes memory again: for `weights` before the update, for the `cache` after it."""

    def close(self) -> None:
        """Ends the engine. Safe to call twice."""
