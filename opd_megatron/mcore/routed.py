"""A micro batch of several tasks, cut into parts of one set of teachers each, with what these gave for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from opd_megatron.losses.shared import SharedTeacher, TranslatedHead
from opd_megatron.losses.topk import TopKTeacher
from opd_megatron.types import AlignedTokens, Batch, TeacherInputs, TeacherView

GatherIndex = Callable[[torch.Tensor], torch.Tensor | None]
"""`HiddenStatesModel.gather_index`."""


@dataclass(frozen=True, slots=True)
class Part:
    """The response tokens of a micro batch that the same teachers score: T of them."""

    mask: torch.Tensor
    """[B, S] bool, on the CPU: where they are."""
    kept: torch.Tensor | None
    """[T] int64, on the CPU: their places among all response tokens; None where they are all."""
    teachers: list[Any]
    """One `losses.TeacherOutput` of each of those teachers, for these tokens."""
    weights: list[float] | None
    """Their shares, which need not sum to one; None for one teacher."""

    def of_student(
        self, hidden: torch.Tensor, gather_index: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Selects its tokens: hidden states, or under sequence parallelism the rows to gather of all ranks' states."""
        if self.kept is None:
            return hidden, gather_index
        kept = self.kept.to(hidden.device, non_blocking=True)
        if gather_index is not None:
            return hidden, gather_index.index_select(0, kept)
        return hidden.index_select(0, kept), None


def parts_of(
    index: int, batch: Batch, mask: torch.Tensor, teachers: Sequence[TeacherInputs], gather_index: GatherIndex
) -> Iterator[Part]:
    """Cuts the student's micro batch `index`; `mask` [B, S], on the CPU, is where its response tokens are."""
    outputs = [_output(teacher, index) for teacher in teachers]  # each can be asked for once
    routes: list[int | None] = [None]
    if batch.routes is not None:  # also of sequences whose answers other context-parallel ranks have
        routes = list(batch.present)
    for route in routes:
        whole = len(routes) == 1
        scorers = [(n, teacher) for n, teacher in enumerate(teachers) if _scores(teacher, route)]
        assert scorers or not teachers, f"no teacher is asked of route {route}"
        yield Part(
            mask if whole else mask & (_routes(batch) == route),
            None if whole else _places(batch, mask, route),
            [_rows(outputs[n], teacher.view, index, batch, route, gather_index) for n, teacher in scorers],
            [teacher.weight for _, teacher in scorers] if len(scorers) > 1 else None,
        )


def rows_of(output: Any, kept: torch.Tensor, *, gathered: bool) -> Any:
    """Selects tokens of what a teacher gave for a part; `gathered`: states are every rank's own rows, and an index says
    which of them are a token's."""
    if isinstance(output, TopKTeacher):
        return output.of_tokens(kept)
    if isinstance(output, SharedTeacher):
        return replace(output, rows=output.rows[kept], spans=output.spans[kept])
    states, head, *rows = output
    if rows:
        return states, head, rows[0][kept]
    return (states if gathered else states.index_select(0, kept)), head


def _scores(teacher: TeacherInputs, route: int | None) -> bool:
    routes = None if teacher.view is None else teacher.view.routes
    return routes is None or route is None or route in routes


def _output(teacher: TeacherInputs, index: int) -> Any:
    if teacher.view is None:
        return teacher.outputs[index]
    place = teacher.view.places.get(index)
    return None if place is None else teacher.outputs[place]


def _places(batch: Batch, mask: torch.Tensor, route: int | None) -> torch.Tensor:
    return torch.nonzero(_routes(batch)[mask].eq(-1 if route is None else route)).squeeze(1)


def _routes(batch: Batch) -> torch.Tensor:
    routes = batch.on_host.routes
    assert routes is not None
    return routes


def _rows(
    output: Any, view: TeacherView | None, index: int, batch: Batch, route: int | None, gather_index: GatherIndex
) -> Any:
    """Selects a teacher's rows for the tokens of a route: it has them in its own order of the micro batch it saw."""
    seen = batch if view is None else view.batches[view.places[index]]
    mask = seen.response_mask
    if view is not None and view.aligned is not None:
        tokens = _aligned(view, view.aligned[view.places[index]], batch, route)
        return _of_another_vocabulary(output, tokens, gather_index(mask))
    kept = None
    if seen.routes is not None and route is not None:
        places = _places(seen, mask, route)
        kept = None if len(places) == int(mask.sum()) else places.to(seen.tokens.device, non_blocking=True)
    if view is None and kept is None:
        return output
    if isinstance(output, TopKTeacher):
        return output if kept is None else output.of_tokens(kept)
    states, head = output
    rows = gather_index(mask)
    if rows is not None:
        return states, head, rows if kept is None else rows[kept]
    return states if kept is None else states.index_select(0, kept), head


def _aligned(view: TeacherView, tokens: AlignedTokens, batch: Batch, route: int | None) -> AlignedTokens:
    """Selects the tokens of a route among the student's tokens that the teacher saw."""
    if batch.routes is None or route is None or view.routes is None:
        return tokens
    routes = _routes(batch)[batch.response_mask]
    seen = torch.isin(routes, torch.tensor(sorted(view.routes)))
    return tokens.of_tokens(torch.nonzero(routes[seen] == route).squeeze(1).to(tokens.rows.device))


def _of_another_vocabulary(output: Any, tokens: AlignedTokens, gather_index: torch.Tensor | None) -> SharedTeacher:
    states, head = output
    assert isinstance(head, TranslatedHead)
    return SharedTeacher(
        states, head.weight, head.columns, tokens.rows, tokens.spans, tokens.spans_of_rows,
        head.places[tokens.targets], gather_index, head.conditional,
    )  # fmt: skip
