"""Which teachers score which sample, and what each of them reads: its own view of a step."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from opd_megatron.config import DEFAULT_ROUTE, RunConfig
from opd_megatron.data.batching import StepBatches
from opd_megatron.errors import ConfigError
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

    def of(self, teacher: int, step: StepBatches) -> tuple[StepBatches, TeacherView | None]:
        """Shows a step to teacher number `teacher`: its samples alone, and its own prompts. No view where that is the
        step as it is."""
        routes = None if self.routing is None else self.routing.routes_to(teacher)
        everything = self.routing is None or routes == frozenset(range(len(self.routing.teachers)))
        own_prompts = any(teacher in rollout.prompt.contexts for rollout in step.rollouts)
        if everything and not own_prompts:
            return step, None

        def seen(rollout: Rollout) -> Rollout | None:
            if not everything and self.routing is not None and self.routing.route_of(rollout) not in (routes or ()):
                return None
            context = rollout.prompt.contexts.get(teacher)
            if context is None:
                return rollout
            return dataclasses.replace(rollout, prompt=dataclasses.replace(rollout.prompt, token_ids=context))

        shown = step.view(seen)
        numbers = shown.numbers(shown.builder.dp_rank)
        places = {number: place for place, number in enumerate(numbers)}
        return shown, TeacherView(shown[: len(numbers)], places, None if everything else routes)
