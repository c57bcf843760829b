"""Makes one engine, on one rank, look the same on all: samples and errors are shared, a dead engine is replaced.

    client.start(version)           bring the engine up, give it the weights
    client.sample(requests, how)    -> the same list of rollouts on every rank, all from the version last synced
    client.sync_weights(version)    after every optimizer step

Each call is a collective over `group`. Whatever happens to the engine, rank 0 tells the others before anyone acts
on it, so that all ranks raise, restart or go on together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from opd_megatron.errors import EngineDiedError, RolloutError, StalePolicyError
from opd_megatron.rollout.base import RolloutEngine
from opd_megatron.system.collectives import on_rank_0
from opd_megatron.types import Rollout, SampleRequest, Sampling
from opd_megatron.weight_sync.format import WeightPayload

Result = TypeVar("Result")
_Packed = tuple[list[int], torch.Tensor, torch.Tensor, list[str], int]
"""Lengths, all tokens (int32), all logprobs, finish reasons, policy version."""


class RolloutClient:
    """See the module. Not for concurrent use."""

    def __init__(
        self,
        engine: RolloutEngine | None,
        weights: Callable[[], Iterator[WeightPayload]],
        group: ProcessGroup | None,
        *,
        max_restarts: int,
        on_event: Callable[[str], None],
    ) -> None:
        """
        Args:
            engine: the engine on rank 0 of `group`, None on the others.
            weights: called on every rank; a collective generator of the current weights whose payloads come out on
                rank 0 (`weight_sync.WeightPublisher.stream`). It is always exhausted on every rank.
            group: a gloo group of all ranks that sample (objects travel over it, so NCCL will not do); None for
                a single process.
            max_restarts: how often in a row a dead engine is replaced.
            on_event: gets one line about each restart, on rank 0.
        """
        self._is_host = group is None or dist.get_rank(group) == 0
        assert (engine is not None) == self._is_host, "the engine belongs on rank 0 of the group, and only there"
        self._engine = engine
        self._weights = weights
        self._group = group
        self._max_restarts = max_restarts
        self._on_event = on_event
        self._version = -1

    def start(self, version: int) -> None:
        """Brings the engine up and gives it the current weights as `version`."""
        self._version = version
        self._with_restarts(self._restart, again=self._restart)

    def sync_weights(self, version: int) -> None:
        """Gives the engine the current weights as `version`.

        Raises, on all ranks (as `start` and `sample` do):
            EngineDiedError: the engine died more than `max_restarts` times in a row.
            OPDError: whatever else the engine on rank 0 raised, with its type and message.
        """
        self._version = version
        self._with_restarts(self._sync, again=self._restart)

    def sample(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Rollout]:
        """Samples one answer a request, in order; every rank passes the same list and gets the same rollouts.

        Raises StalePolicyError when the engine samples from other weights than the ones last synced, and what
        `sync_weights` raises.
        """

        def generate() -> list[Rollout]:
            packed = self._on_host(lambda engine: _pack(self._sample_fresh(engine, requests, sampling)))
            return _unpack(requests, packed)

        def bring_up_and_generate() -> list[Rollout]:
            self._restart()
            return generate()

        return self._with_restarts(generate, again=bring_up_and_generate)

    def close(self) -> None:
        """Ends the engine. Not a collective; safe to call twice."""
        if self._engine is not None:
            self._engine.close()

    def _with_restarts(self, first: Callable[[], Result], again: Callable[[], Result]) -> Result:
        """Runs `first()`, then `again()` as often as the engine dies on the way and restarts are left."""
        deaths = 0
        while True:
            try:
                return again() if deaths else first()
            except EngineDiedError as error:
                deaths += 1
                if deaths > self._max_restarts:
                    raise EngineDiedError(
                        f"the rollout engine died {deaths} times in a row, rollout.max_restarts="
                        f"{self._max_restarts} allows no further start; the last time: {error}"
                    ) from None
                if self._is_host:
                    self._on_event(f"{error}; restarting {deaths}/{self._max_restarts}")

    def _restart(self) -> None:
        self._on_host(lambda engine: engine.wait_ready())
        self._sync()

    def _sync(self) -> None:
        payloads = iter(self._weights())

        def update(engine: RolloutEngine) -> None:
            try:
                engine.update_weights(payloads, self._version)
            finally:
                _exhaust(payloads)  # also when the engine stopped reading: the other ranks are in these collectives

        if not self._is_host:
            _exhaust(payloads)
        self._on_host(update)

    def _sample_fresh(
        self, engine: RolloutEngine, requests: Sequence[SampleRequest], sampling: Sampling
    ) -> list[Rollout]:
        rollouts = engine.generate(requests, sampling)
        stale = next((r for r in rollouts if r.policy_version != self._version), None)
        if stale is not None:
            raise StalePolicyError(
                f"the answer to prompt {stale.prompt.id!r} was sampled by policy version {stale.policy_version}, but "
                f"version {self._version} is being trained: sync the weights before sampling"
            )
        return rollouts

    def _on_host(self, action: Callable[[RolloutEngine], Result]) -> Result:
        """Runs `action` on rank 0; every rank returns its result or raises its error."""

        def run() -> Result:
            assert self._engine is not None
            return action(self._engine)

        if self._group is None:
            return run()
        return on_rank_0(run, "the rollout engine failed", RolloutError, group=self._group)


def _exhaust(iterator: Iterable[Any]) -> None:
    for _ in iterator:
        pass


def _pack(rollouts: Sequence[Rollout]) -> _Packed:
    """Joins the responses into two tensors. Requests stay at home: every rank has them."""
    sampled = [rollout.logprobs for rollout in rollouts if rollout.logprobs is not None]
    assert len(sampled) == len(rollouts), "an engine gives the logprobs of what it sampled"
    return (
        [len(rollout.response_ids) for rollout in rollouts],
        torch.cat([rollout.response_ids for rollout in rollouts]).to(torch.int32),
        torch.cat(sampled),
        [rollout.finish_reason for rollout in rollouts],
        rollouts[0].policy_version,
    )


def _unpack(requests: Sequence[SampleRequest], packed: _Packed) -> list[Rollout]:
    lengths, tokens, logprobs, reasons, version = packed
    pieces = zip(requests, tokens.to(torch.int64).split(lengths), logprobs.split(lengths), reasons, strict=True)
    return [Rollout(r.prompt, ids, values, version, reason, group=r.group) for r, ids, values, reason in pieces]
