"""Whole runs with a fleet of engines: what is learnt depends neither on how many there are nor on whether one dies."""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from opd_megatron import cli
from opd_megatron.config import RunConfig
from opd_megatron.errors import ConfigError, EngineDiedError, OPDError, StalePolicyError
from opd_megatron.rollout.torch_engine import TorchEngine
from opd_megatron.run.ahead import StepRollouts
from opd_megatron.train import check, run_training
from opd_megatron.trainer import OPDTrainer
from opd_megatron.types import Rollout
from tests.e2e.runs import make_inputs, small_config
from tests.ranks import as_launched, run_ranks

SETTINGS = {"steps": 3, "evaluation.every": 0, "rollout.prompts_per_step": 4, "rollout.samples_per_prompt": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_inputs(tmp_path_factory.mktemp("fleet"))


class DyingEngine(TorchEngine):
    """The first that is asked dies once, in the middle of its share of a step's answers."""

    lock = threading.Lock()
    healthy = False
    shares: ClassVar[list[int]] = []

    def generate(self, requests: Any, sampling: Any) -> list[Rollout]:
        with self.lock:
            dies, DyingEngine.healthy = not self.healthy, True
        if dies:
            super().generate(requests[: len(requests) // 2], sampling)
            self.shares.append(-len(requests))
            raise EngineDiedError("killed in the middle of an answer")
        self.shares.append(len(requests))
        return super().generate(requests, sampling)


def _train(rank: int, world_size: int, config: RunConfig, dies: bool, nodes: tuple[int, ...] | None) -> list[int]:
    with pytest.MonkeyPatch.context() as patch:
        if nodes:
            patch.setenv("LOCAL_WORLD_SIZE", str(world_size // len(set(nodes))))
        if dies:
            DyingEngine.healthy, DyingEngine.shares = rank != world_size - 1, []
            patch.setattr("opd_megatron.rollout.torch_engine.TorchEngine", DyingEngine)
        run_training(config, check(config))
    return DyingEngine.shares


def _run(
    inputs: dict[str, str], folder: Path, ranks: int, *, dies: bool = False, nodes: tuple[int, ...] | None = None,
    **overrides: Any,
) -> tuple[dict[str, torch.Tensor], list[float], list[list[int]]]:  # fmt: skip
    """Final weights, losses, and how many requests each call of a dying engine had."""
    config = small_config(inputs, folder, **(SETTINGS | overrides))
    shares = run_ranks(ranks, _train, config, dies, nodes)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return load_file(folder / "hf" / "model.safetensors"), [row["loss"] for row in rows if row["step"]], shares


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("layout", [{}, {"parallel.tensor": 2}, {"parallel.pipeline": 2}], ids=["DP2", "TP2", "PP2"])
def test_the_weights_learnt_do_not_depend_on_the_number_of_engines(
    inputs: dict[str, str], tmp_path: Path, layout: dict[str, Any]
) -> None:
    weights, losses, _ = _run(inputs, tmp_path / "one", 2, **layout)
    for engines in (2, 4):
        found, others, _ = _run(inputs, tmp_path / str(engines), 2, **layout, **{"rollout.engines": engines})
        assert others == losses
        assert _same(found, weights)


def _train_in_turns(rank: int, world_size: int, config: RunConfig) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for module in ("build", "engines"):  # as on a GPU
            patch.setattr(f"opd_megatron.run.{module}.sleeps", lambda config, on_gpu: config.takes_turns)
        run_training(config, check(config))


def test_a_run_in_turns_with_its_engines_learns_the_same(inputs: dict[str, str], tmp_path: Path) -> None:
    settings = {"evaluation.every": 2, "checkpoint.every": 2, "rollout.engines": 2}
    weights, losses, _ = _run(inputs, tmp_path / "beside", 2, **settings)
    turns = {"student.offload": ["optimizer", "gradients"], "teachers.0.offload": True}
    config = small_config(inputs, tmp_path / "turns", **(SETTINGS | settings | turns))
    run_ranks(2, _train_in_turns, config)
    rows = [json.loads(line) for line in (tmp_path / "turns" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows if row["step"]] == losses
    assert _same(load_file(tmp_path / "turns" / "hf" / "model.safetensors"), weights)


def test_engines_on_another_node_are_sent_the_same_weights(inputs: dict[str, str], tmp_path: Path) -> None:
    weights, losses, _ = _run(inputs, tmp_path / "one", 2)
    found, others, _ = _run(inputs, tmp_path / "two", 2, nodes=(0, 1), **{"rollout.engines": 2})
    assert others == losses
    assert _same(found, weights)


def test_a_run_of_one_process_has_as_many_engines_as_it_is_told(inputs: dict[str, str], tmp_path: Path) -> None:
    weights, losses, _ = _run(inputs, tmp_path / "one", 1)
    found, others, _ = _run(inputs, tmp_path / "three", 1, **{"rollout.engines": 3})
    assert others == losses
    assert _same(found, weights)


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_engine_killed_mid_answer_costs_its_share_and_nothing_else(
    inputs: dict[str, str], tmp_path: Path, ranks: int
) -> None:
    weights, losses, _ = _run(inputs, tmp_path / "unharmed", ranks)
    found, others, shares = _run(inputs, tmp_path / "killed", ranks, dies=True, **{"rollout.engines": 2})
    assert others == losses
    assert _same(found, weights)
    asked = sorted(size for each in shares for size in each)
    assert asked == [-4, *[4] * (2 * SETTINGS["steps"])], "the other engine's answers are kept"


def test_more_engines_than_gpus_is_one_error_on_every_rank(inputs: dict[str, str], tmp_path: Path) -> None:
    config = small_config(inputs, tmp_path / "run", **SETTINGS, **{"rollout.engines": 3})
    errors = run_ranks(2, _refused, config)
    assert errors[0] == errors[1]
    assert "rollout.engines=3 of rollout.tensor=1 GPUs each do not fit the 2 GPUs" in errors[0]


def _refused(rank: int, world_size: int, config: RunConfig) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opd_megatron.run.build.has_gpu", lambda: True)
        try:
            run_training(config, check(config))
        except OPDError as error:
            return str(error)
    return "no error"


OWN = {"rollout.placement": "own", "rollout.hosts": 1}


@pytest.mark.parametrize(
    ("layout", "own", "nodes"),
    [
        ({}, OWN, None),
        ({"parallel.data": 2}, OWN | {"rollout.engines": 2}, (0, 1, 2)),
        ({"parallel.pipeline": 2}, OWN | {"rollout.hosts": 2}, (0, 0, 1, 1)),
        ({"parallel.tensor": 2}, OWN, None),
    ],
    ids=["one and one", "DP2 and two engines on another node", "PP2 and two hosts on another node", "TP2 and one"],
)
def test_engines_on_ranks_of_their_own_teach_the_same_weights(
    inputs: dict[str, str], tmp_path: Path, layout: dict[str, Any], own: dict[str, Any], nodes: tuple[int, ...] | None
) -> None:
    student = 2 if layout else 1
    weights, losses, _ = _run(inputs, tmp_path / "turns", student, **layout)
    found, others, _ = _run(inputs, tmp_path / "own", student + own["rollout.hosts"], nodes=nodes, **layout, **own)
    assert others == losses
    assert _same(found, weights)


def test_an_engine_of_a_host_that_dies_costs_its_share_and_nothing_else(inputs: dict[str, str], tmp_path: Path) -> None:
    weights, losses, _ = _run(inputs, tmp_path / "unharmed", 1)
    found, others, shares = _run(inputs, tmp_path / "killed", 2, dies=True, **OWN, **{"rollout.engines": 2})
    assert others == losses
    assert _same(found, weights)
    assert sorted(size for each in shares for size in each) == [-4, *[4] * (2 * SETTINGS["steps"])]


def test_a_run_with_hosts_goes_on_where_it_was_and_is_evaluated_without_them(
    inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, _, _ = _run(inputs, tmp_path / "whole", 1)
    run = tmp_path / "halted"
    stopping = small_config(inputs, run, **SETTINGS, **OWN)
    run_ranks(2, _stop_after_one_step, stopping)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2, "step 0 and step 1"
    found, _, _ = _run(inputs, run, 2, **OWN)
    assert _same(found, weights)
    assert cli.main(["evaluate", str(run)]) == 0
    assert "eval/forward_kl" in capsys.readouterr().out


def _stop_after_one_step(rank: int, world_size: int, config: RunConfig) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OPDTrainer, "_between_steps", lambda self: self.step_count == 1)
        run_training(config, check(config))


@pytest.mark.parametrize(
    ("world", "settings", "words"),
    [
        (2, {"rollout.placement": "own"}, "both rollout.placement=own and rollout.hosts"),
        (2, {"rollout.hosts": 1}, "both rollout.placement=own and rollout.hosts"),
        (2, {**OWN, "rollout.hosts": 2}, "world size 2 must"),
        (3, {**OWN, "parallel.tensor": 2, "rollout.hosts": 2}, "parallel.tensor 2 .* rollout.hosts 2"),
        (4, {**OWN, "parallel.data": 2}, "world size 4 must equal .* parallel.data 2 . rollout.hosts 1"),
    ],
)
def test_places_that_do_not_add_up_are_one_error(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, settings: dict[str, Any],
    words: str,
) -> None:  # fmt: skip
    as_launched(monkeypatch, world)
    with pytest.raises(ConfigError, match=words) as error:
        check(small_config(inputs, tmp_path / "run", **settings))
    assert "\n" not in str(error.value)


AHEAD = {"rollout.steps_ahead": 1, "steps": 5}


def test_one_step_ahead_trains_on_answers_that_are_one_version_old(inputs: dict[str, str], tmp_path: Path) -> None:
    _run(inputs, tmp_path / "run", 1, **AHEAD)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][1:]
    assert [row["policy_version"] for row in rows] == [0, 0, 1, 2, 3]
    assert [row["policy_lag"] for row in rows] == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("layout", [{}, {"parallel.data": 2} | OWN | {"rollout.engines": 2}], ids=["turns", "own"])
@pytest.mark.parametrize("kind", ["stopped", "killed in a step"])
def test_a_run_one_step_ahead_resumes_to_the_same_weights(
    inputs: dict[str, str], tmp_path: Path, layout: dict[str, Any], kind: str
) -> None:
    ranks = 3 if layout else 1
    weights, losses, _ = _run(inputs, tmp_path / "whole", ranks, **AHEAD, **layout)
    run = tmp_path / "halted"
    config = small_config(
        inputs, run, **(SETTINGS | AHEAD | layout | {"checkpoint.every": 2, "checkpoint.async_save": False})
    )
    run_ranks(ranks, _stop_after_two_steps if kind == "stopped" else _die_in_the_fourth_step, config)
    found, others, _ = _run(inputs, run, ranks, **AHEAD, **layout)
    assert others == losses
    assert _same(found, weights)


def _stop_after_two_steps(rank: int, world_size: int, config: RunConfig) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OPDTrainer, "_between_steps", lambda self: self.step_count == 2)
        run_training(config, check(config))


def _die_in_the_fourth_step(rank: int, world_size: int, config: RunConfig) -> None:
    """Between the forward pass and the end of a step, with answers under way; the checkpoint is of step 2."""

    take = StepRollouts.take
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            StepRollouts, "take",
            lambda self, step: take(self, step) if step < 3 else (take(self, step), 1 // 0),
        )  # fmt: skip
        with contextlib.suppress(ZeroDivisionError):
            run_training(config, check(config))


def test_an_answer_older_than_allowed_is_refused(inputs: dict[str, str], tmp_path: Path) -> None:
    config = small_config(inputs, tmp_path / "run", **(SETTINGS | AHEAD))
    with OPDTrainer.from_config(config) as trainer:
        trainer.rollout_client.start(0)
        trainer.rollouts.take(0)
        trainer.rollouts.collect()
        trainer.rollout_client.sync_weights(1)
        trainer.rollouts.take(1)
        trainer.rollouts.collect()
        with pytest.raises(StalePolicyError, match=r"policy version 1, but version 3 is .* rollout.steps_ahead=1"):
            trainer.rollouts.take(3)


def test_a_ratio_between_two_temperatures_is_refused(inputs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout.steps_ahead=1 needs objective.temperature=2.0 to equal") as error:
        small_config(inputs, tmp_path, **(AHEAD | {"objective.temperature": 2.0}))
    assert "\n" not in str(error.value)
