"""Several engines of one rank at the same time, and what came of them on all ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from opd_megatron.errors import EngineDiedError, OPDError, RolloutError
from opd_megatron.system.collectives import raise_on_all_ranks
from opd_megatron.weight_sync.format import WeightPayload

_PULSE_SECONDS = 10.0
"""Between two signs of life of a rank whose engines are at work."""
_TRAINER = -1
"""Stands beside the engines' numbers for the trainer's own side of a weight sync."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one engine's call: a value, a death, or another error."""

    value: Any = None
    error: BaseException | None = None
    """Known on the engine's own rank only."""
    died: bool = False
    message: str = ""
    """Of the death."""

    @classmethod
    def of(cls, action: Callable[[], Any]) -> Outcome:
        """Runs the action."""
        try:
            return cls(action())
        except EngineDiedError as error:
            return cls(error=error, died=True, message=str(error))
        except Exception as error:
            return cls(error=error)


class InThreads:
    """Each engine's action in a thread of its own, begun at once."""

    def __init__(self, actions: Mapping[int, Callable[[], Any]]) -> None:
        self._outcomes: dict[int, Outcome] = {}
        self._order = list(actions)
        self._threads = [threading.Thread(target=self._run, args=item, daemon=True) for item in actions.items()]
        for thread in self._threads:
            thread.start()

    def _run(self, index: int, action: Callable[[], Any]) -> None:
        self._outcomes[index] = Outcome.of(action)

    def ended(self, seconds: float) -> bool:
        """Waits for all of them, but no longer than that; True when they are done."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def outcomes(self) -> dict[int, Outcome]:
        """Waits for all of them."""
        for thread in self._threads:
            thread.join()
        return {index: self._outcomes[index] for index in self._order}


def in_threads(actions: Mapping[int, Callable[[], Any]]) -> dict[int, Outcome]:
    """Runs the engines' actions side by side; a single one in the caller's thread."""
    if len(actions) == 1:
        return {index: Outcome.of(action) for index, action in actions.items()}
    return InThreads(actions).outcomes()


def gathered_in_time(
    asked: InThreads,
    group: ProcessGroup | None,
    answered: Callable[[], int] = lambda: 0,
    tell: Callable[[int], None] = lambda _: None,
) -> dict[int, Outcome]:
    """As `gathered`, of work that takes as long as it takes: an hour of sampling is no failure. Collective.

    The ranks ask each other every few seconds, so that none waits longer in one collective, and one that is gone is
    noticed.

    Args:
        answered: how many answers this rank's engines have so far.
        tell: gets the sum of it over all ranks, each time.
    """
    while True:
        state = torch.tensor([int(not asked.ended(_PULSE_SECONDS)), answered()])
        if group is not None:
            dist.all_reduce(state, group=group)
        busy, count = state.tolist()
        if not busy:
            return gathered(asked.outcomes(), group)
        tell(count)


def gathered(mine: Mapping[int, Outcome], group: ProcessGroup | None) -> dict[int, Outcome]:
    """The outcomes of all ranks' engines, in the order of their numbers. Collective.

    Raises:
        OPDError: on every rank, what an engine raised unless it died. A bug keeps its type on its own rank.
    """
    error = next((outcome.error for outcome in mine.values() if outcome.error and not outcome.died), None)
    if group is None:
        if error is not None:
            raise error
        return dict(mine)
    try:
        raise_on_all_ranks(error, "the rollout engine failed", RolloutError, group=group)
    except OPDError:
        if error is not None and not isinstance(error, (OPDError, OSError, ValueError)):
            raise error from None
        raise
    found: list[dict[int, Outcome]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(found, {index: replace(outcome, error=None) for index, outcome in mine.items()}, group=group)
    return dict(sorted(item for part in found for item in part.items() if item[0] != _TRAINER))


def fed_from(
    payloads: Iterator[WeightPayload], consumers: Mapping[int, Callable[[Iterable[WeightPayload]], None]]
) -> dict[int, Outcome]:
    """Gives every payload to each of this rank's engines, which take them at the same time.

    The payloads are exhausted whatever becomes of the engines: other ranks are in the collectives behind them. One is
    asked for when all engines that live want it. An error of the trainer's side is every engine's.
    """
    if not consumers:
        outcome = Outcome.of(lambda: _exhaust(payloads))
        return {_TRAINER: outcome} if outcome.error else {}
    if len(consumers) == 1:
        [(index, consume)] = consumers.items()

        def feed() -> None:
            try:
                consume(payloads)
            finally:
                _exhaust(payloads)

        return {index: Outcome.of(feed)}
    handoffs = {index: _Handoff() for index in consumers}
    pump = threading.Thread(target=_pump, args=(payloads, list(handoffs.values()), _current_gpu()), daemon=True)
    pump.start()
    outcomes = in_threads({index: handoffs[index].feeding(consume) for index, consume in consumers.items()})
    pump.join()
    return outcomes


class _Handoff:
    """One payload at a time from the stream's thread to one engine's."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._wanted = self._closed = False
        self._given: list[WeightPayload | BaseException | None] = []

    def give(self, payload: WeightPayload | BaseException | None) -> None:
        """Hands over a payload, an error, or None for the end."""
        with self._changed:
            self._given, self._wanted = [payload], False
            self._changed.notify_all()

    def wait_until_wanted(self) -> None:
        """Until the engine asks for a payload, or needs none any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._wanted or self._closed)

    def feeding(self, consume: Callable[[Iterable[WeightPayload]], None]) -> Callable[[], None]:
        """The engine's side: consumes, then takes no more."""

        def run() -> None:
            try:
                consume(self._taken())
            finally:
                with self._changed:
                    self._closed = True
                    self._changed.notify_all()

        return run

    def _taken(self) -> Iterator[WeightPayload]:
        while True:
            with self._changed:
                self._wanted = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._given)
                payload = self._given.pop()
            if payload is None:
                return
            if isinstance(payload, BaseException):
                raise payload
            yield payload


def _pump(payloads: Iterator[WeightPayload], handoffs: list[_Handoff], gpu: int | None) -> None:
    """The stream's thread: it makes the collectives, so it needs this rank's GPU."""
    if gpu is not None:
        torch.cuda.set_device(gpu)
    last: BaseException | None = None
    try:
        while True:
            for handoff in handoffs:
                handoff.wait_until_wanted()
            payload = next(payloads, None)
            if payload is None:
                break
            for handoff in handoffs:
                handoff.give(payload)
    except BaseException as error:
        last = error
    for handoff in handoffs:
        handoff.give(last)


def _current_gpu() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_available() else None


def _exhaust(iterator: Iterable[Any]) -> None:
    for _ in iterator:
        pass
