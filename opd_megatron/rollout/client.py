"""Makes a fleet of engines, each on some rank, look like one on all: samples and errors are shared, a dead engine is
replaced while the others keep what they have.

    client.start(version)           bring the engines up, give them the weights
    client.sample(requests, how)    -> the same list of rollouts on every rank, all from the version last synced
    client.sync_weights(version)    after every optimizer step

    client.begin(requests, how)     `sample` in two halves, with other work of the rank between them
    client.collect()

Each call is a collective over `group`. Whatever happens to an engine, its rank tells the others before anyone acts on
it, so that all ranks raise, restart or go on together.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from opd_megatron.errors import EngineDiedError, EngineMemoryError, OPDError, StalePolicyError
from opd_megatron.rollout.base import RolloutEngine, Sleeper
from opd_megatron.rollout.shares import share_out
from opd_megatron.rollout.side_by_side import InThreads, Outcome, fed_from, gathered, gathered_in_time, in_threads
from opd_megatron.system.commands import Commands
from opd_megatron.types import Rollout, SampleRequest, Sampling
from opd_megatron.weight_sync.format import WeightPayload

_MEMORY_PATIENCE = 2.0
"""Seconds before an engine that found too little memory is started again."""
_Packed = tuple[list[int], torch.Tensor, torch.Tensor, list[str], int]
"""Lengths, all tokens (int32), all logprobs, finish reasons, policy version."""


@dataclass(slots=True)
class _Sampling:
    """Answers under way."""

    requests: Sequence[SampleRequest]
    sampling: Sampling
    waiting: dict[int, list[int]]
    """Indices of the requests that an engine has not answered yet."""
    answers: dict[int, Rollout] = field(default_factory=dict)
    asked: InThreads = field(default_factory=lambda: InThreads({}))


class RolloutClient:
    """See the module. Not for concurrent use."""

    def __init__(
        self,
        engines: Mapping[int, RolloutEngine],
        count: int,
        weights: Callable[[], Iterator[WeightPayload]],
        group: ProcessGroup | None,
        *,
        max_restarts: int,
        on_event: Callable[[str], None],
        commands: Commands | None = None,
        sleeps: bool = False,
        make_room: Callable[[], None] = lambda: None,
        take_back: Callable[[], None] = lambda: None,
        on_progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> None:
        """
        Args:
            engines: this rank's engines by their number in the fleet; each number is on exactly one rank.
            count: engines of the whole fleet.
            weights: called on every rank; a collective generator of the current weights whose payloads come out on
                every rank that has engines (`weight_sync.WeightPublisher.stream`). It is exhausted on every rank.
            group: a gloo group of all ranks that sample (objects travel over it, so NCCL will not do); None for
                a single process.
            max_restarts: how often in a row each engine is replaced when it has died.
            on_event: gets one line about each restart, on rank 0.
            commands: tells ranks that `serve` of each call; None where all ranks of the group make the same calls.
            sleeps: engines give their memory back when they have sampled, and take it again before they sample next.
            make_room: frees what this rank holds without need while engines are awake, before they take memory.
            take_back: undoes that when the engines have fallen asleep.
            on_progress: gets (done, of) of the answers every few seconds while they are waited for, on rank 0.
        """
        assert count > 0
        assert not (sleeps and commands), "engines on ranks of their own have nobody to take turns with"
        self._engines = dict(engines)
        self._count = count
        self._weights = weights
        self._group = group
        self._max_restarts = max_restarts
        self._on_event = on_event
        self._commands = commands
        self._sleeps, self._make_room, self._take_back = sleeps, make_room, take_back
        self._on_progress = on_progress
        self._asleep = False
        self._is_first = group is None or dist.get_rank(group) == 0
        self._sampling: _Sampling | None = None
        self._version = -1
        self._deaths: Counter[int] = Counter()
        """In a row, of each engine; the same on every rank."""

    def start(self, version: int) -> None:
        """Brings the engines up and gives them the current weights as `version`."""
        self._tell("start", version)
        self._version = version
        self._bring_up(range(self._count))

    def sync_weights(self, version: int) -> None:
        """Gives the engines the current weights as `version`. Engines that sleep get them when they wake: until then
        their memory is the trainer's, to evaluate or save in.

        Raises, on all ranks (as `start` and `sample` do):
            EngineDiedError: an engine died more than `max_restarts` times in a row.
            OPDError: whatever else an engine raised, with its type and message.
        """
        self._tell("sync_weights", version)
        self._version = version
        if not self._asleep:
            fed = self._feed(range(self._count))
            self._note_lives(fed)
            self._bring_up(self._note_deaths(fed))

    def wake(self) -> None:
        """Has engines that sleep take memory and the current weights, as the version last synced; `begin` does it
        too. Raises what `sync_weights` raises."""
        if not self._asleep:
            return
        self._asleep = False
        dead = self._note_deaths(self._wake("weights", range(self._count)))
        fed = self._feed([index for index in range(self._count) if index not in dead])
        dead += self._note_deaths(fed)
        woken = self._wake("cache", [index for index in fed if index not in dead])
        dead += self._note_deaths(woken)
        self._note_lives(woken)
        self._bring_up(dead)

    def sample(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Rollout]:
        """Samples one answer a request, in order; every rank passes the same list and gets the same rollouts.

        The share of an engine that dies is sampled again, by that engine when it is back; the others' answers stay.

        Raises StalePolicyError when an engine samples from other weights than the ones last synced, and what
        `sync_weights` raises.
        """
        self.begin(requests, sampling)
        return self.collect()

    def begin(self, requests: Sequence[SampleRequest], sampling: Sampling) -> None:
        """Starts to sample, from the weights last synced; `collect` must come before the next sync. Other work of this
        rank runs beside it."""
        assert self._sampling is None, "what was begun before has not been collected"
        self.wake()
        self._tell("begin", requests, sampling)
        shares = enumerate(share_out(requests, self._count))
        self._sampling = _Sampling(requests, sampling, {index: share for index, share in shares if share})
        self._ask(self._sampling)

    def collect(self) -> list[Rollout]:
        """Waits for what was begun; returns and raises as `sample` does.

        An engine that died meanwhile gets the weights of now, which may be newer than those of the other answers.
        """
        self._tell("collect")
        step, self._sampling = self._sampling, None
        assert step is not None, "nothing was begun"
        while True:
            outcomes = gathered_in_time(step.asked, self._group, self._answered, functools.partial(self._told, step))
            for index in [index for index, outcome in outcomes.items() if not outcome.died]:
                share = step.waiting.pop(index)
                rollouts = _unpack([step.requests[i] for i in share], outcomes[index].value)
                step.answers |= dict(zip(share, rollouts, strict=True))
            self._note_lives(outcomes)
            self._bring_up(self._note_deaths(outcomes))
            if not step.waiting:
                self._fall_asleep()
                return [step.answers[i] for i in range(len(step.requests))]
            self._ask(step)

    def _answered(self) -> int:
        return sum(getattr(engine, "answered", 0) for engine in self._engines.values())

    def _told(self, step: _Sampling, count: int) -> None:
        if self._is_first:
            self._on_progress(len(step.answers) + count, len(step.requests))

    def _fall_asleep(self) -> None:
        """Whoever dies of it is found dead at the next sync, when its memory is wanted again."""
        if self._sleeps:
            self._on_engines(lambda _, engine: engine.sleep(), range(self._count))
            self._asleep = True
            self._together()
            self._take_back()

    def _wake(self, what: Sleeper, which: Collection[int]) -> dict[int, Outcome]:
        self._make_room()
        self._together()
        return self._on_engines(lambda _, engine: engine.wake(what), which)

    def _ask(self, step: _Sampling) -> None:
        """Has this rank's engines sample what is not answered yet."""

        def generate(index: int, engine: RolloutEngine) -> _Packed:
            return _pack(self._sample_fresh(engine, [step.requests[i] for i in step.waiting[index]], step.sampling))

        mine = {
            index: functools.partial(generate, index, engine)
            for index, engine in self._engines.items()
            if index in step.waiting
        }
        step.asked = InThreads(mine)

    def serve(self) -> None:
        """Makes the calls that the first rank tells of, until it closes: on a rank that holds engines and no model.

        Every rank raises the same error, and what becomes of the run is the trainer's to decide.
        """
        assert self._commands is not None
        while True:
            name, arguments = self._commands.next()
            if name == "close":
                return
            with contextlib.suppress(OPDError):
                getattr(self, name)(*arguments)

    def close(self) -> None:
        """Ends this rank's engines, and has the ranks that `serve` end theirs. Not a collective; safe to call twice."""
        if self._commands is not None and self._is_first:
            self._commands.close()
        in_threads({index: engine.close for index, engine in self._engines.items()})

    def _tell(self, name: str, *arguments: Any) -> None:
        if self._commands is not None and self._is_first:
            self._commands.tell(name, *arguments)

    def _bring_up(self, which: Collection[int]) -> None:
        """Starts engines and gives them the weights, again while one dies on the way and restarts are left."""
        while which:
            self._make_room()
            self._together()
            started = self._on_engines(lambda _, engine: self._start(engine), which)
            dead = self._note_deaths(started)
            fed = self._feed([index for index in which if index not in dead])
            which = sorted({*dead, *self._note_deaths(fed)})

    def _together(self) -> None:
        """Waits for all ranks: an engine may have the GPUs of several."""
        if self._sleeps:
            gathered({}, self._group)

    def _start(self, engine: RolloutEngine) -> None:
        try:
            engine.wait_ready()
        except EngineMemoryError:
            # What a process has freed, or one that died held, is not always free at once.
            self._make_room()
            time.sleep(_MEMORY_PATIENCE)
            engine.wait_ready()

    def _note_lives(self, outcomes: Mapping[int, Outcome]) -> None:
        """What an engine has done without dying ends its row of deaths. Not its start, after which it may die again."""
        for index in [index for index, outcome in outcomes.items() if not outcome.died]:
            self._deaths[index] = 0

    def _note_deaths(self, outcomes: Mapping[int, Outcome]) -> list[int]:
        """Counts who died; returns their numbers. Raises EngineDiedError when one did so too often in a row."""
        dead = []
        for index, outcome in sorted(outcomes.items()):
            if not outcome.died:
                continue
            self._deaths[index] += 1
            name = "the rollout engine" if self._count == 1 else f"rollout engine {index} of {self._count}"
            if self._deaths[index] > self._max_restarts:
                raise EngineDiedError(
                    f"{name} died {self._deaths[index]} times in a row, rollout.max_restarts={self._max_restarts} "
                    f"allows no further start; the last time: {outcome.message}"
                )
            if self._is_first:
                which = "" if self._count == 1 else f" engine {index}"
                self._on_event(f"{outcome.message}; restarting{which} {self._deaths[index]}/{self._max_restarts}")
            dead.append(index)
        return dead

    def _feed(self, which: Collection[int]) -> dict[int, Outcome]:
        """Sends the weights to some of the engines; every rank takes part."""
        if not which:
            return {}
        mine = {
            index: lambda payloads, engine=engine: engine.update_weights(payloads, self._version)
            for index, engine in self._engines.items()
            if index in which
        }
        return gathered(fed_from(self._weights(), mine), self._group)

    def _on_engines(self, action: Callable[[int, RolloutEngine], Any], which: Collection[int]) -> dict[int, Outcome]:
        """Runs `action` on some of the engines side by side; every rank learns what came of each, and raises what one
        of them raised unless it died."""
        mine = {
            index: lambda index=index, engine=engine: action(index, engine)
            for index, engine in self._engines.items()
            if index in which
        }
        return gathered_in_time(InThreads(mine), self._group)

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
