"""One teacher, wherever and however it runs: what is learnt does not depend on it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opd_megatron.config import RunConfig
from opd_megatron.errors import OPDError
from opd_megatron.train import check, run_training
from tests.byte_tokenizer import save_byte_tokenizer
from tests.e2e.runs import make_inputs, small_config
from tests.ranks import RankError, as_launched, run_ranks
from tests.tiny_models import save_tiny

SETTINGS = {
    "steps": 2, "evaluation.every": 0, "rollout.prompts_per_step": 8, "parallel.micro_batch_size": 1,
    "optimizer.eps": 1e-2,  # AdamW makes much of the rounding of a gradient that is nearly 0
}  # fmt: skip
HIDDEN = 64
"""Of the tiny models."""
PACKED = {"parallel.micro_batch_size": None, "parallel.tokens_per_micro_batch": 120}
"""Three sequences or four in a row, without padding."""
STUDENTS: dict[str, dict[str, Any]] = {
    "one": {"parallel.data": 1},
    "TP2": {"parallel.tensor": 2, "parallel.data": 1},
    "SP2": {"parallel.tensor": 2, "parallel.sequence_parallel": True, "parallel.data": 1},
    "PP2": {"parallel.pipeline": 2, "parallel.data": 1},
    "DP2": {"parallel.data": 2},
    "TP2 PP2": {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.data": 1},
    "CP2": {"parallel.context": 2, "parallel.data": 1} | PACKED,
    "CP2 SP2": {
        "parallel.context": 2,
        "parallel.tensor": 2,
        "parallel.sequence_parallel": True,
        "parallel.data": 1,
    }
    | PACKED,
    "virtual": {"parallel.pipeline": 2, "parallel.virtual_stages": 2, "parallel.data": 1} | PACKED,
}
TEACHERS = {"one": {}, "TP2": {"tensor": 2}, "PP2": {"pipeline": 2}, "DP2": {"data": 2}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_inputs(tmp_path_factory.mktemp("teachers"))


def _train(rank: int, world_size: int, config: RunConfig) -> None:
    run_training(config, check(config))


def _run(inputs: dict[str, str], folder: Path, ranks: int, **overrides: Any) -> tuple[dict[str, Any], list[dict]]:
    config = small_config(inputs, folder, **(SETTINGS | overrides))
    run_ranks(ranks, _train, config)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return load_file(folder / "hf" / "model.safetensors"), rows


@pytest.fixture(scope="module")
def alone(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict]]:
    """One rank, with the teacher on it."""
    return _run(inputs, tmp_path_factory.mktemp("alone") / "run", 1)


def _agree(found: tuple[dict[str, Any], list[dict]], expected: tuple[dict[str, Any], list[dict]]) -> None:
    (weights, rows), (theirs, their_rows) = found, expected
    for row, other in zip(rows, their_rows, strict=True):
        for name in ("loss", "reverse_kl", "forward_kl", "grad_norm", "teacher_entropy", "eval/teacher_nll"):
            if name in other:
                assert row[name] == pytest.approx(other[name], rel=1e-5), name
    for name, tensor in theirs.items():
        assert torch.allclose(weights[name], tensor, rtol=1e-3, atol=1e-5), name


def _long(*cases: tuple[Any, ...]) -> list[Any]:
    return [pytest.param(*case, marks=pytest.mark.long) for case in cases]


def _own(**sizes: int) -> dict[str, Any]:
    return {"teachers.0.placement": "own", **{f"teachers.0.{name}": size for name, size in sizes.items()}}


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("one", "PP2"), ("TP2", "TP2"), ("SP2", "one"), ("PP2", "DP2"), ("DP2", "PP2"), ("TP2 PP2", "TP2"),
        *_long(("one", "one"), ("one", "DP2"), ("TP2", "one"), ("SP2", "TP2"), ("PP2", "one"), ("DP2", "one"),
               ("DP2", "DP2"), ("TP2 PP2", "PP2")),
    ],
)  # fmt: skip
def test_a_teacher_on_ranks_of_its_own_teaches_the_same(
    inputs: dict[str, str], alone: Any, tmp_path: Path, student: str, teacher: str
) -> None:
    sizes = TEACHERS[teacher]
    ranks = {"one": 1, "TP2 PP2": 4}.get(student, 2) + (2 if sizes else 1)
    found = _run(inputs, tmp_path / "run", ranks, **STUDENTS[student], **_own(**sizes))
    _agree(found, alone)
    for row in found[1][1:]:
        whole = row["tokens"] * HIDDEN * 4
        # Of data-parallel ranks each takes its own; of sequence-parallel ones the rows of its half, or of the fuller.
        least, most = {"SP2": (0.5, 1.0), "DP2": (0.5, 0.75)}.get(student, (1.0, 1.0))
        assert least * whole <= row["teacher/0/bytes"] <= most * whole, "hidden states of each token, once"
        assert row["teacher/0/waited"] >= 0


@pytest.mark.parametrize(
    ("student", "tensor", "pipeline"),
    [
        ("SP2", 1, 2), ("PP2", 2, 1), ("DP2", 2, 1), ("TP2 PP2", 1, 2),
        *_long(("TP2", 1, 1), ("TP2", 1, 2), ("PP2", 1, 1), ("DP2", 1, 2), ("TP2 PP2", 2, 1)),
    ],
)  # fmt: skip
def test_a_teacher_in_a_layout_of_its_own_over_the_students_ranks_teaches_the_same(
    inputs: dict[str, str], alone: Any, tmp_path: Path, student: str, tensor: int, pipeline: int
) -> None:
    layout = {"teachers.0.tensor": tensor, "teachers.0.pipeline": pipeline}
    ranks = 4 if student == "TP2 PP2" else 2
    _agree(_run(inputs, tmp_path / "run", ranks, **STUDENTS[student], **layout), alone)


@pytest.mark.parametrize(
    ("student", "ranks", "teacher"),
    [
        ("one", 3, _own(pipeline=2)), ("SP2", 3, _own()), ("TP2 PP2", 6, _own(tensor=2)),
        ("PP2", 2, {"teachers.0.tensor": 2, "teachers.0.pipeline": 1}), ("DP2", 2, {}),
        ("SP2", 2, {"teachers.0.tensor": 1, "teachers.0.pipeline": 2}),
        ("CP2", 2, {}), ("CP2", 4, _own(pipeline=2)), ("CP2 SP2", 5, _own()),
        ("CP2", 2, {"teachers.0.tensor": 2}), ("CP2 SP2", 4, {"teachers.0.tensor": 1, "teachers.0.pipeline": 2}),
        ("virtual", 2, {}), ("virtual", 3, _own()),
    ],
)  # fmt: skip
def test_packed_sequences_are_taught_the_same(
    inputs: dict[str, str], alone: Any, tmp_path: Path, student: str, ranks: int, teacher: dict[str, Any]
) -> None:
    _agree(_run(inputs, tmp_path / "run", ranks, **(STUDENTS[student] | teacher | PACKED)), alone)


@pytest.fixture(scope="module")
def two(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A second teacher, of another depth and width."""
    folder = tmp_path_factory.mktemp("second")
    save_tiny(folder, head_dim=32, seed=5, hidden_size=96, num_hidden_layers=2, tie_word_embeddings=True)
    save_byte_tokenizer(folder)
    return {"teachers.1.path": str(folder), "teachers.1.dtype": "fp32", "teachers.1.weight": 2.0}


@pytest.mark.parametrize("combine", ["logit_mean", "prob_mean"])
def test_an_ensemble_of_teachers_here_and_there_is_the_same_ensemble(
    inputs: dict[str, str], two: dict[str, str], tmp_path: Path, combine: str
) -> None:
    both = {**two, "objective.combine": combine}
    expected = _run(inputs, tmp_path / "here", 1, **both)
    elsewhere = _own(pipeline=2) | {"teachers.1.placement": "own"}
    _agree(_run(inputs, tmp_path / "there", 5, **both, **STUDENTS["TP2"], **elsewhere), expected)
    mixed = {"teachers.0.tensor": 1, "teachers.0.pipeline": 2, "teachers.1.placement": "own"}
    _agree(_run(inputs, tmp_path / "mixed", 3, **both, **STUDENTS["TP2"], **mixed), expected)


def _ensemble_loss(rank: int, world_size: int, config: RunConfig) -> tuple[float, float]:
    """The first step's loss by the trainer's own parts, and densely in float64 by transformers."""
    from transformers import AutoModelForCausalLM

    from opd_megatron.mcore.cpu.platform import init_distributed
    from opd_megatron.mcore.grid import ParallelGrid
    from opd_megatron.mcore.student import Student
    from opd_megatron.teacher import ask_teachers, build_teachers
    from tests.mcore.test_student import _batches

    init_distributed()
    models = check(config)
    grid = ParallelGrid.build(1, 1, 1)
    student = Student(config, models.student, models.student_config, grid, models.padded_vocab(1))
    teachers = build_teachers(config, models, grid)
    [batch] = _batches(1)
    result = student.update(
        [batch], ask_teachers(teachers, [batch]), config.objective, models.vocab_size
    )  # fmt: skip
    mask = batch.weights > 0
    paths = [models.student, *(folder for folder, _ in models.teachers)]
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)(batch.tokens).logits[mask][
                :, : models.vocab_size
            ]
            for path in paths
        ]
    log_p, *log_q = [each.log_softmax(-1) for each in logits]
    shares = torch.tensor([teacher.weight for teacher in config.teachers], dtype=torch.float64)
    shares /= shares.sum()
    if config.objective.combine == "logit_mean":
        mixed = sum(share * each for share, each in zip(shares, logits[1:], strict=True)).log_softmax(-1)
    else:
        mixed = torch.stack([share.log() + each for share, each in zip(shares, log_q, strict=True)]).logsumexp(0)
    return result.metrics["loss"], float((log_p.exp() * (log_p - mixed)).sum(-1).mean())


@pytest.mark.parametrize("combine", ["logit_mean", "prob_mean"])
def test_the_ensemble_is_that_of_its_formula(
    inputs: dict[str, str], two: dict[str, str], tmp_path: Path, combine: str
) -> None:
    config = small_config(inputs, tmp_path, **(SETTINGS | two | {"objective.combine": combine}))
    [(found, expected)] = run_ranks(1, _ensemble_loss, config)
    assert found == pytest.approx(expected, rel=1e-5)


def test_evaluation_and_resume_ask_a_distant_teacher_too(inputs: dict[str, str], alone: Any, tmp_path: Path) -> None:
    settings = {"evaluation.every": 1, "checkpoint.every": 1, "evaluation.agreement": True}
    expected = _run(inputs, tmp_path / "near", 1, **settings)
    _run(inputs, tmp_path / "far", 2, **settings, **_own(), steps=1)
    found = _run(inputs, tmp_path / "far", 2, **settings, **_own(), **{"checkpoint.export_hf": True})
    assert [row["step"] for row in found[1]] == [0, 1, 2]
    for row, other in zip(found[1], expected[1], strict=True):
        assert row["eval/teacher_nll"] == pytest.approx(other["eval/teacher_nll"], rel=1e-5)


def test_each_teacher_of_an_ensemble_is_compared_with_transformers(
    inputs: dict[str, str], two: dict[str, str], tmp_path: Path
) -> None:
    settings = {"evaluation.agreement": True, "steps": 1}
    _run(inputs, tmp_path / "right", 2, **two, **settings, **_own())
    with pytest.raises(RankError, match=r"teacher .* and 123\.0000 in transformers"):
        run_ranks(1, _train_with_reference, small_config(inputs, tmp_path / "w", **(SETTINGS | two | settings)))


def _train_with_reference(rank: int, world_size: int, config: RunConfig) -> None:
    """Transformers gives the second teacher's answer wrongly."""
    from opd_megatron.run import agreement

    real = agreement.reference_nll
    second = Path(config.teachers[1].path).resolve()

    def reference(folder: Path, *arguments: Any) -> float:
        return 123.0 if folder.resolve() == second else real(folder, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "reference_nll", reference)
        run_training(config, check(config))


def test_a_teacher_moves_to_other_ranks_when_a_run_is_resumed(inputs: dict[str, str], tmp_path: Path) -> None:
    settings = {"checkpoint.every": 1, "steps": 2, "optimizer.decay": "constant"}
    expected = _run(inputs, tmp_path / "stayed", 1, **settings)
    _run(inputs, tmp_path / "moved", 1, **settings | {"steps": 1})
    found = _run(inputs, tmp_path / "moved", 2, **settings, **_own())
    assert found[1][-1]["loss"] == pytest.approx(expected[1][-1]["loss"], rel=1e-3)


def test_teacher_engines_and_student_each_on_ranks_of_their_own(
    inputs: dict[str, str], alone: Any, tmp_path: Path
) -> None:
    engines = {"rollout.placement": "own", "rollout.hosts": 1, "rollout.engines": 2}
    _agree(_run(inputs, tmp_path / "run", 4, **STUDENTS["DP2"], **_own(), **engines), alone)


def _one_dies(rank: int, world_size: int, config: RunConfig, told: Path) -> None:
    from opd_megatron.errors import OPDError
    from opd_megatron.teacher.own_ranks import TeacherHost

    score, calls = TeacherHost._score, []

    def dies(self: TeacherHost, step: Any) -> None:
        calls.append(step)
        if len(calls) == 2:
            os._exit(9)
        score(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TeacherHost, "_score", dies)
        try:
            run_training(config, check(config))
        except OPDError as error:
            told.write_text(f"{type(error).__name__}: {error}")
            raise


def test_a_teacher_that_is_killed_ends_the_run_with_one_line(inputs: dict[str, str], tmp_path: Path) -> None:
    settings = SETTINGS | _own() | {"steps": 3, "evaluation.every": 0, "checkpoint.every": 1, "evaluation.prompts": 1}
    config = small_config(inputs, tmp_path / "run", **settings)
    told = tmp_path / "told"
    with pytest.raises(RankError):
        run_ranks(2, _one_dies, config, told)
    deadline = time.monotonic() + 20
    while not told.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert told.read_text().startswith("TeacherError: teacher '")
    assert "\n" not in told.read_text()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"teachers.0.placement": "own", "teachers.0.tensor": 3}, ["teachers.0.tensor=3", "must divide"]),
        ({"teachers.0.placement": "own", "teachers.0.pipeline": 8}, ["teachers.0.pipeline=8", "6 layers"]),
        ({"teachers.0.tensor": 2}, ["teachers.0.tensor=2 * pipeline=1", "the student's 1 ranks"]),
        ({"teachers.0.placement": "own", "teachers.0.expert": 2}, ["teachers.0.expert=2", "teachers.0.data=1"]),
        ({"teachers.0.placement": "own", "teachers.0.in_flight": 0}, ["in_flight"]),
        ({"teachers.0.placement": "own", "teachers.0.offload": True}, ["offload"]),
        ({"teachers.0.weight": 0}, ["teachers.0", "weight"]),
        ({"teachers.0.placement": "there"}, ["there"]),
    ],
)
def test_what_does_not_fit_is_one_line(
    inputs: dict[str, str], tmp_path: Path, overrides: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(OPDError) as failure:
        check(small_config(inputs, tmp_path, **{"parallel.data": 1}, **overrides))
    message = str(failure.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_ranks_that_do_not_add_up_are_spelled_out(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_launched(monkeypatch, 4)
    overrides = _own(tensor=2) | {"parallel.tensor": 2, "parallel.data": 2}
    with pytest.raises(OPDError, match=r"world size 4 must equal .* \+ 2 ranks of teachers' own"):
        check(small_config(inputs, tmp_path, **overrides))
