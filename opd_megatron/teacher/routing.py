"""Which teachers score which sample, and what each of them reads: its own view of a step."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

import torch

from opd_megatron.config import DEFAULT_ROUTE, RunConfig
from opd_megatron.data.alignment import TokenizerPair, Translation, aligned_tokens
from opd_megatron.data.batching import StepBatches
from opd_megatron.errors import ConfigError
from opd_megatron.models import ResolvedModels
from opd_megatron.types import Rollout, TeacherView


@dataclass(frozen=True, slots=True)
class Routing:
    """`routes:` of a configuration, by numbers. A route is a set of teachers; equal sets share one."""

    teachers: tuple[frozenset[int], ...]
    """Of each route, by their number in `teachers:`."""
    tasks: Mapping[str, int]
    """Task -> its route."""
    default: int | None
    """Route of samples without a task, or of another; None where there is none."""

    @staticmethod
    def of(config: RunConfig) -> Routing | None:
        """Reads `routes:`; None where every teacher scores every sample."""
        if not config.routes:
            return None
        numbers = {name: number for number, name in enumerate(config.teacher_names)}
        sets = {
            task: frozenset(numbers[name] for name in ([names] if isinstance(names, str) else names))
            for task, names in config.routes.items()
        }
        routes = list(dict.fromkeys(sets.values()))
        tasks = {task: routes.index(members) for task, members in sets.items()}
        return Routing(tuple(routes), tasks, tasks.get(DEFAULT_ROUTE))

    def route_of(self, rollout: Rollout) -> int:
        """The route of a sample whose task has gone through `check_tasks`."""
        task = rollout.prompt.task
        route = self.default if task is None else self.tasks.get(task, self.default)
        assert route is not None, f"task {task!r} has no route"
        return route

    def routes_to(self, teacher: int) -> frozenset[int]:
        """Numbers of the routes that lead to a teacher."""
        return frozenset(number for number, members in enumerate(self.teachers) if teacher in members)


def check_tasks(config: RunConfig, tasks: Iterable[str | None]) -> list[str]:
    """Checks `routes:` against the tasks of a run's rows; returns notes.

    Raises:
        ConfigError: a task has no route and there is no default.
    """
    routing = Routing.of(config)
    if routing is None:
        return []
    found = Counter(tasks)
    if routing.default is None:
        for task, rows in found.items():
            if task is None:
                raise ConfigError(
                    f"{rows} rows name no task, and routes has no {DEFAULT_ROUTE}: set data.task_column or "
                    f"data.sources.N.task, or add routes.{DEFAULT_ROUTE}"
                )
            if task not in routing.tasks:
                near = get_close_matches(task, [*routing.tasks], n=1)
                hint = f" (did you mean routes.{near[0]}?)" if near else ""
                raise ConfigError(
                    f"task {task!r} of {rows} rows has no route{hint}: add routes.{task}, or routes.{DEFAULT_ROUTE} "
                    "for all other tasks"
                )
    named = ", ".join(f"{task or 'none'} {rows}" for task, rows in found.most_common(6))
    return [
        f"warning: routes.{task} is the route of no row (rows by task: {named})"
        for task in routing.tasks
        if task != DEFAULT_ROUTE and task not in found
    ]


@dataclass(frozen=True, slots=True)
class Views:
    """What every teacher sees of a step."""

    routing: Routing | None
    pairs: Mapping[int, TokenizerPair] = field(default_factory=dict)
    """Of teachers with another tokenizer, by their number."""
    contexts: Mapping[int, int] = field(default_factory=dict)
    """Tokens that these can read at once."""
    spans: frozenset[int] = frozenset()
    """Those of them that are compared over spans."""
    reference: int | None = None
    """Number of what teaches nothing, and sees everything."""

    @staticmethod
    def of_run(config: RunConfig, models: ResolvedModels, pairs: Mapping[int, TokenizerPair]) -> Views:
        """Reads what a run's teachers see from its configuration."""
        contexts = {n: getattr(models.teachers[n][1], "max_position_embeddings", None) or sys.maxsize for n in pairs}
        spans = frozenset(n for n in pairs if config.teachers[n].alignment == "spans")
        return Views(Routing.of(config), pairs, contexts, spans, config.reference)

    def of(self, teacher: int, step: StepBatches, *, routed: bool = True) -> tuple[StepBatches, TeacherView | None]:
        """Shows a step to teacher number `teacher`: its samples alone (all of them where it is not `routed`), with its
        own prompts and in its own tokens. No view where that is the step as it is."""
        routing = self.routing if routed and teacher != self.reference else None
        routes = None if routing is None else routing.routes_to(teacher)
        everything = routing is None or routes == frozenset(range(len(routing.teachers)))
        own_prompts = any(teacher in rollout.prompt.contexts for rollout in step.rollouts)
        if everything and not own_prompts and teacher not in self.pairs:
            return step, None
        translations: dict[int, Translation] = {}

        def seen(rollout: Rollout) -> Rollout | None:
            if not everything and routing is not None and routing.route_of(rollout) not in (routes or ()):
                return None
            if teacher in self.pairs:
                shown, translation = self.translated(teacher, rollout)
                translations[id(shown)] = translation
                return shown
            context = rollout.prompt.contexts.get(teacher)
            if context is None:
                return rollout
            return replace(rollout, prompt=replace(rollout.prompt, token_ids=context))

        shown = step.view(seen)
        numbers = shown.numbers(shown.builder.dp_rank)
        places = {number: place for place, number in enumerate(numbers)}
        view = TeacherView(shown[: len(numbers)], places, None if everything else routes)
        return shown, self._aligned(teacher, shown, translations, view) if teacher in self.pairs else view

    def translated(self, teacher: int, rollout: Rollout) -> tuple[Rollout, Translation]:
        """The same answer in the teacher's tokens, after its own prompt or, without one, a translation of the
        student's."""
        pair = self.pairs[teacher]
        context = rollout.prompt.contexts.get(teacher)
        if context is None:
            context = tuple(pair.translated(rollout.prompt.token_ids).ids)
        room = max(1, self.contexts.get(teacher, sys.maxsize) - len(context))
        translation = pair.translated(rollout.response_ids.tolist(), room)
        shown = replace(
            rollout, prompt=replace(rollout.prompt, token_ids=context), response_ids=torch.tensor(translation.ids),
            logprobs=None, advantage=None,
        )  # fmt: skip
        return shown, translation

    def _aligned(
        self, teacher: int, shown: StepBatches, translations: Mapping[int, Translation], view: TeacherView
    ) -> TeacherView:
        """Adds where the answers of this rank's micro batches meet, and how often those of all ranks do."""
        builder = shown.builder
        aligned = [
            aligned_tokens([translations[id(shown.rollouts[i])] for i in portion.rollouts], builder.device)
            for portion in shown.deal[builder.dp_rank]
            if portion.number >= 0
        ]
        dealt = [translations[id(shown.rollouts[i])] for i in shown.dealt]
        met = [each.spans if teacher in self.spans else each.rows for each in dealt]
        share = sum(int((places >= 0).sum()) for places in met) / max(1, sum(len(places) for places in met))
        return replace(view, aligned=aligned, aligned_share=share)
