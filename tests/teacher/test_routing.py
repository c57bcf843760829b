"""Several teachers, each for its tasks: what is learnt is the sum of what each would teach alone, in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opd_megatron.config import RunConfig, load_config
from opd_megatron.data.batching import token_scales
from opd_megatron.errors import OPDError
from opd_megatron.teacher import Routing, check_tasks
from opd_megatron.teacher.routing import Views
from opd_megatron.train import check, run_training
from tests.byte_tokenizer import save_byte_tokenizer
from tests.data.test_batching import random_rollouts
from tests.e2e.runs import make_inputs, small_config
from tests.ranks import run_ranks
from tests.teacher.dense import DenseStep, dense_step, one_step
from tests.teacher.test_placements import SETTINGS, STUDENTS, _agree, _long
from tests.tiny_models import save_tiny

TASKS = ["sum", "poem", "poem", "chat", None]
ROUTES = {"sum": "first", "poem": ["first", "second"], "default": "second"}
OF_TASK = {"sum": [0], "poem": [0, 1]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two teachers of different depth and width, rows of several tasks."""
    folder = tmp_path_factory.mktemp("routes")
    found: dict[str, Any] = make_inputs(folder)
    save_tiny(folder / "second", head_dim=32, seed=5, hidden_size=96, num_hidden_layers=2)
    save_byte_tokenizer(folder / "second")
    rows = folder / "rows.jsonl"
    with rows.open("w") as file:
        for n in range(60):
            task = TASKS[n % len(TASKS)]
            row = {"question": f"What is {n} and {n * n}?", "answer": f"It is {n}."}
            file.write(json.dumps(row | {"kind": task or "none"}) + "\n")
    return found | {
        "data.source": str(rows),
        "data.task_column": "kind",
        "teachers.0.name": "first",
        "teachers.1.name": "second",
        "teachers.1.path": str(folder / "second"),
        "teachers.1.dtype": "fp32",
        "teachers.1.weight": 2.0,
        "routes": ROUTES,
    }


def _train(rank: int, world_size: int, config: RunConfig) -> None:
    run_training(config, check(config))


def _run(inputs: dict[str, Any], folder: Path, ranks: int, **overrides: Any) -> tuple[dict[str, Any], list[dict]]:
    from safetensors.torch import load_file

    config = small_config(inputs, folder, **(SETTINGS | {"parallel.micro_batch_size": 2} | overrides))
    run_ranks(ranks, _train, config)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return load_file(folder / "hf" / "model.safetensors"), rows


def _one_step(rank: int, world_size: int, config: RunConfig) -> tuple[dict[str, Any], list[str | None], DenseStep]:
    """A step's metrics, the tasks of its answers, and the same densely."""
    models = check(config)
    row, taken, _ = one_step(config, models)
    expected = dense_step(
        str(models.student),
        taken,
        lambda rollout: [
            (str(models.teachers[n][0]), config.teachers[n].weight, None)
            for n in OF_TASK.get(rollout.prompt.task or "", [1])
        ],
        models.vocab_size,
        token_scales(taken, config.objective.balance),
    )
    return row, [rollout.prompt.task for rollout in taken], expected


@pytest.mark.parametrize("balance", ["tokens", "samples", "tasks"])
def test_a_mixed_step_is_the_sum_of_its_tasks_each_with_its_teachers(
    inputs: dict[str, Any], tmp_path: Path, balance: str
) -> None:
    settings = SETTINGS | {"parallel.micro_batch_size": 4, "rollout.prompts_per_step": 12, "objective.balance": balance}
    [(row, tasks, expected)] = run_ranks(1, _one_step, small_config(inputs, tmp_path / "run", **settings))
    assert {"sum", "poem", "chat"} <= set(tasks)
    assert row["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert row["grad_norm"] == pytest.approx(expected.grad_norm, rel=1e-5)


@pytest.fixture(scope="module")
def alone(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict]]:
    return _run(inputs, tmp_path_factory.mktemp("alone") / "run", 1, **{"evaluation.every": 1})


@pytest.mark.parametrize(
    ("student", "first", "second"),
    [
        ("SP2", {}, {}),
        ("PP2", {}, {"placement": "own"}),
        ("DP2", {"placement": "own"}, {"placement": "own"}),
        ("TP2 PP2", {"tensor": 1, "pipeline": 2}, {}),
        *_long(
            ("TP2", {}, {}), ("PP2", {}, {}), ("DP2", {}, {}), ("SP2", {"placement": "own"}, {"tensor": 1}),
            ("DP2", {"tensor": 2}, {"placement": "own", "data": 2}),
            ("one", {"placement": "own"}, {"placement": "own"}),
        ),
    ],
)  # fmt: skip
def test_routes_teach_the_same_in_every_layout(
    inputs: dict[str, Any], alone: Any, tmp_path: Path, student: str, first: dict[str, Any], second: dict[str, Any]
) -> None:
    layouts = {f"teachers.{n}.{key}": value for n, each in enumerate((first, second)) for key, value in each.items()}
    ranks = {"one": 1, "TP2 PP2": 4}.get(student, 2)
    ranks += sum(each.get("data", 1) for each in (first, second) if each.get("placement") == "own")
    found = _run(inputs, tmp_path / "run", ranks, **STUDENTS[student], **layouts, **{"evaluation.every": 1})
    _agree(found, alone)


def test_each_teacher_scores_its_own_samples_alone(alone: Any) -> None:
    for row in alone[1][1:]:
        scored = row["teacher/first/tokens"], row["teacher/second/tokens"]
        assert all(0 < tokens < row["tokens"] for tokens in scored)
        assert sum(scored) >= row["tokens"]
        assert row["teacher/first/seconds"] > 0
    assert any(row["teacher/first/tokens"] + row["teacher/second/tokens"] > row["tokens"] for row in alone[1][1:]), (
        "poems are for both"
    )


def test_tasks_of_several_sources_are_named_after_them(inputs: dict[str, Any], tmp_path: Path) -> None:
    """And a teacher that a step has no sample for is not asked."""
    folder = Path(inputs["data.source"]).parent
    settings = {
        "data.sources": [
            {"source": inputs["data.source"], "weight": 3}, {"source": str(folder / "prompts.jsonl"), "task": "b"},
        ],
        "data.task_column": None, "data.source": "gsm_symbolic", "evaluation.every": 0,
        "routes": {inputs["data.source"]: "first", "b": "second"}, "rollout.prompts_per_step": 2, "steps": 3,
    }  # fmt: skip
    rows = _run(inputs, tmp_path / "run", 1, **settings)[1]
    assert {row["teacher/second/tokens"] > 0 for row in rows[1:]} == {True, False}


def test_experts_of_a_teacher_stay_in_step_where_ranks_have_unequal_shares(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "moe"
    save_tiny(folder, "qwen3_moe", seed=7)
    save_byte_tokenizer(folder)
    settings = {
        "teachers.1.path": str(folder), "student.path": str(folder), "rollout.prompts_per_step": 6,
        "parallel.micro_batch_size": 1, "optimizer.lr": 1e-4,
    }  # fmt: skip
    expected = _run(inputs, tmp_path / "one", 1, **settings)
    found = _run(inputs, tmp_path / "two", 2, **settings, **{"parallel.data": 2, "parallel.expert": 2})
    for row, other in zip(found[1][1:], expected[1][1:], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_view_keeps_places_and_order_and_leaves_nothing_of_others() -> None:
    from tests.data.test_batching import builder

    rollouts = random_rollouts(16)
    step = builder(1, 2, 4, multiple_of=2).build(rollouts)
    shown = step.view(lambda rollout: rollout if rollouts.index(rollout) % 3 == 0 else None)
    kept = [i for i in range(16) if i % 3 == 0]
    assert shown.dealt == kept
    for mine, seen in zip(step.deal, [shown.deal[0], shown.deal[1]], strict=True):
        for portion in seen:
            whole = mine[portion.number].rollouts
            assert portion.rollouts == tuple(i for i in whole if i in kept)
    assert len(shown) == len(shown.numbers(1))
    assert shown.num_tokens == sum(len(rollouts[i].response_ids) for i in kept)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"routes": {"sum": "frist"}}, ["routes.sum", "'frist'", "did you mean 'first'"]),
        ({"routes": {"sum": "first"}}, ["teacher 'second' is in no route"]),
        ({"routes": {"sum": ["first", "first"], "default": "second"}}, ["routes.sum", "twice"]),
        ({"routes": {"sum": [], "default": "second"}}, ["routes.sum"]),
        ({"teachers.1.name": "first"}, ["'first'", "twice"]),
        ({"teachers.1.name": "a/b"}, ["teachers.1"]),
        ({"teachers.0.weight": -1}, ["teachers.0", "weight"]),
    ],
)  # fmt: skip
def test_routes_that_make_no_sense_are_one_line(
    inputs: dict[str, Any], tmp_path: Path, overrides: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(OPDError) as failure:
        small_config(inputs, tmp_path, **overrides)
    message = str(failure.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def _config(routes: dict[str, Any]) -> RunConfig:
    names = ["teachers.0.path=a", "teachers.0.name=first", "teachers.1.path=b", "teachers.1.name=second"]
    return load_config(None, [*names, f"routes={json.dumps(routes)}"])


def test_a_task_without_a_route_is_an_error_unless_there_is_a_default() -> None:
    config = _config({"sum": "first", "poem": "second"})
    with pytest.raises(OPDError, match=r"task 'sums' of 2 rows has no route \(did you mean routes.sum\?\)"):
        check_tasks(config, ["sum", "sums", "sums"])
    with pytest.raises(OPDError, match=r"1 rows name no task.* set data.task_column"):
        check_tasks(config, ["sum", None])
    assert check_tasks(config, ["sum", "poem"]) == []
    config = _config({"maths": "first", "default": "second"})
    [note] = check_tasks(config, ["math", None])
    assert "routes.maths is the route of no row" in note


def test_equal_sets_of_teachers_are_one_route() -> None:
    routing = Routing.of(_config({"a": ["first", "second"], "b": ["second", "first"], "default": "first"}))
    assert routing is not None
    assert len(routing.teachers) == 2
    assert routing.routes_to(0) == {0, 1}
    assert Views(None).routing is None


def test_balance_gives_equal_weight_to_what_it_names() -> None:
    import dataclasses

    rollouts = random_rollouts(9)
    named = [
        dataclasses.replace(each, prompt=dataclasses.replace(each.prompt, task="ab"[i % 3 == 0]))
        for i, each in enumerate(rollouts)
    ]
    lengths = [len(each.response_ids) for each in named]
    total = sum(lengths)
    assert token_scales(named, "tokens") == [1.0] * 9
    for balance in ("samples", "tasks"):
        scales = token_scales(named, balance)
        assert sum(s * n for s, n in zip(scales, lengths, strict=True)) == pytest.approx(total)
    masses = [s * n for s, n in zip(token_scales(named, "samples"), lengths, strict=True)]
    assert masses == pytest.approx([total / 9] * 9)
    of_tasks = token_scales(named, "tasks")
    assert len({round(s, 9) for s in of_tasks}) == 2
    mass = sum(s * n for s, n, each in zip(of_tasks, lengths, named, strict=True) if each.prompt.task == "b")
    assert mass == pytest.approx(total * 3 / 9)


def test_a_run_is_not_resumed_with_other_routes(inputs: dict[str, Any], tmp_path: Path) -> None:
    from tests.ranks import RankError

    _run(inputs, tmp_path / "run", 1, steps=1)
    with pytest.raises(RankError, match=r"routes"):
        _run(inputs, tmp_path / "run", 1, steps=2, routes={"sum": "second", "default": "first"})
