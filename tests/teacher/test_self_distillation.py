"""Teachers that read more than the student, and the student as its own teacher: frozen, live, as a moving average."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.config import RunConfig
from opd_megatron.data.contexts import ContextTemplate
from opd_megatron.data.rows import Example
from opd_megatron.errors import OPDError
from opd_megatron.train import check, run_training
from tests.e2e.runs import make_inputs, small_config
from tests.ranks import RankError, run_ranks
from tests.teacher.dense import DenseStep, dense_step, one_step
from tests.teacher.test_placements import SETTINGS, STUDENTS, _agree, _long
from tests.teacher.test_routing import _run

HINT = "{prompt} (answer: {answer}) {{so}} {note}"
DECAY = 0.5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("contexts")
    found: dict[str, Any] = make_inputs(folder)
    rows = [json.loads(line) for line in Path(found["data.source"]).read_text().splitlines()]
    with Path(found["data.source"]).open("w") as file:
        for n, row in enumerate(rows):
            file.write(json.dumps(row | {"note": "n" * (n % 7)}) + "\n")
    return found | {"teachers.0.prompt": HINT, "rollout.prompts_per_step": 8}


def _one_step(rank: int, world_size: int, config: RunConfig) -> tuple[dict[str, Any], DenseStep, list[tuple[str, str]]]:
    """A step's metrics, the same densely, and what student and teacher read."""
    models = check(config)
    row, taken, tokenizer = one_step(config, models)
    texts = [(tokenizer.decode(each.prompt.token_ids), tokenizer.decode(each.prompt.contexts[0])) for each in taken]
    expected = dense_step(
        str(models.student),
        taken,
        lambda rollout: [(str(models.teachers[0][0]), 1.0, rollout.prompt.contexts[0])],
        models.vocab_size,
    )
    return row, expected, texts


@pytest.mark.parametrize(
    "teacher",
    [{}, {"teachers.0.path": "student"}, {"teachers.0.path": "student", "teachers.0.update": "live"}],
    ids=["another", "frozen", "live"],
)
def test_a_teacher_that_reads_more_is_the_dense_one_at_the_students_positions(
    inputs: dict[str, Any], tmp_path: Path, teacher: dict[str, Any]
) -> None:
    config = small_config(inputs | teacher, tmp_path / "run", **SETTINGS)
    [(row, expected, texts)] = run_ranks(1, _one_step, config)
    assert row["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert row["loss"] > 1e-3, "what the teacher reads makes a difference"
    assert row["grad_norm"] == pytest.approx(expected.grad_norm, rel=1e-5)
    for student, its in texts:
        question = student.split("user\n")[1].split("<|im_end|>")[0]
        assert f"{question} (answer: It is " in its
        assert "{so} " in its
        assert its.endswith("<|im_start|>assistant\n")


@pytest.fixture(scope="module")
def alone(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict]]:
    return _run(inputs, tmp_path_factory.mktemp("alone") / "run", 1, **{"evaluation.every": 1})


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("SP2", {}),
        ("PP2", {"placement": "own"}),
        ("TP2 PP2", {"tensor": 1, "pipeline": 2}),
        *_long(("SP2", {"placement": "own"}), ("DP2", {}), ("PP2", {}), ("DP2", {"tensor": 2}), ("TP2", {})),
    ],
)
def test_its_own_prompt_teaches_the_same_in_every_layout(
    inputs: dict[str, Any], alone: Any, tmp_path: Path, student: str, teacher: dict[str, Any]
) -> None:
    ranks = (4 if student == "TP2 PP2" else 2) + ("placement" in teacher)
    layout = {f"teachers.0.{key}": value for key, value in teacher.items()}
    _agree(_run(inputs, tmp_path / "run", ranks, **STUDENTS[student], **layout, **{"evaluation.every": 1}), alone)


def _averages(rank: int, world_size: int, config: RunConfig, steps: int) -> dict[str, Any]:
    """Trains up to `steps`; the average by its formula, and as the trainer has it, before and after."""
    from opd_megatron.trainer import OPDTrainer

    with OPDTrainer.from_config(config, check(config)) as trainer:
        trainer.restore("latest" if trainer.resume_from else "initial")
        [average] = trainer.student.averages.values()
        found = {"begin": {name: values.clone() for name, values in average.values.items()}}
        expected = {name: values.double() for name, values in found["begin"].items()}
        trainer.rollout_client.start(trainer.step_count)
        while trainer.step_count < steps:
            trainer.step()
            for name, parameter in trainer.student.model.named_parameters():
                expected[name] = DECAY * expected[name] + (1 - DECAY) * parameter.detach().double()
        trainer.save({})
        trainer.saver.finish()
        found["end"] = {name: values.clone() for name, values in average.values.items()}
        found["model"] = {name: parameter.detach().clone() for name, parameter in average.model.named_parameters()}
        return found | {"expected": expected}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["one", "TP2", "DP2"])
def test_the_moving_average_is_its_formula_also_after_a_resume(
    inputs: dict[str, Any], tmp_path: Path, layout: str, dtype: str
) -> None:
    if layout != "one" and dtype == "bf16":
        pytest.skip("the arithmetic is that of one rank")
    settings = SETTINGS | {
        "teachers.0.path": "student", "teachers.0.update": "ema", "teachers.0.decay": DECAY, "steps": 8,
        "teachers.0.dtype": dtype, "optimizer.decay": "constant", "optimizer.lr": 1e-2,
    }  # fmt: skip
    config = small_config(inputs, tmp_path / "run", **settings, **STUDENTS[layout])
    ranks = 1 if layout == "one" else 2
    first = run_ranks(ranks, _averages, config, 5)
    second = run_ranks(ranks, _averages, config, 7)
    for before, after in zip(first, second, strict=True):
        for name, values in before["expected"].items():
            assert torch.allclose(before["end"][name].double(), values, rtol=1e-6, atol=1e-6), name
            assert not torch.equal(before["end"][name], before["begin"][name])
            assert torch.equal(after["begin"][name], before["end"][name]), "a resume goes on with it"
            assert torch.allclose(after["end"][name].double(), after["expected"][name], rtol=1e-6, atol=1e-6)
            assert torch.equal(after["model"][name], after["end"][name].to(after["model"][name].dtype))


def test_a_live_teacher_is_asked_anew_at_every_evaluation(inputs: dict[str, Any], tmp_path: Path) -> None:
    settings = {"teachers.0.path": "student", "teachers.0.update": "live", "evaluation.every": 1, "steps": 2}
    rows = _run(inputs, tmp_path / "run", 1, **settings, **{"optimizer.lr": 1e-2})[1]
    assert len({row["eval/teacher_nll"] for row in rows}) == 3
    frozen = _run(inputs, tmp_path / "frozen", 1, **{"teachers.0.path": "student", "evaluation.every": 1})[1]
    assert len({row["eval/teacher_nll"] for row in frozen}) == 1


def _train(rank: int, world_size: int, config: RunConfig) -> None:
    run_training(config, check(config))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"teachers.0.update": "ema"}, ["teachers.0.update=ema", "path=student"]),
        ({"teachers.0.path": "student", "teachers.0.update": "live", "teachers.0.prompt": None}, ["teaches nothing"]),
        ({"teachers.0.path": "student", "teachers.0.decay": 0.9}, ["teachers.0.decay", "set ema"]),
        ({"teachers.0.path": "student", "teachers.0.update": "ema", "teachers.0.decay": 1}, ["decay"]),
        ({"teachers.0.path": "student", "teachers.0.update": "live", "teachers.0.tensor": 2}, ["own layout", "tensor"]),
        ({"teachers.0.path": "student", "teachers.0.placement": "own", "teachers.0.update": "ema"}, ["update"]),
        ({"teachers.0.path": "student", "teachers.0.update": "sometimes"}, ["update"]),
    ],
)  # fmt: skip
def test_self_distillation_that_makes_no_sense_is_one_line(
    inputs: dict[str, Any], tmp_path: Path, overrides: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(OPDError) as failure:
        small_config(inputs | overrides, tmp_path)
    message = str(failure.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"teachers.0.prompt": "{prompt} {nota}"}, "no column 'nota' .*answer, note.*teachers.N.prompt"),
        ({"teachers.0.prompt": "{prompt"}, "teachers.0.prompt=.* is no template .*brace itself twice"),
        ({"teachers.0.prompt": "{}"}, "not the name of a column"),
        ({"teachers.0.prompt": "{prompt!r}"}, "not the name of a column"),
        ({"teachers.0.prompt": "{prompt} {sibling}"}, "sibling.* needs rewards"),
        ({"teachers.0.prompt": "{prompt}" * 30}, "teachers.0.prompt makes .* tokens of prompt .*room for 504"),
        ({"data.answer_column": None, "evaluation.every": 0}, "uses {answer}, but prompt .* has no gold answer"),
        ({"data.source": "gsm_symbolic"}, "gsm_symbolic have no column 'note'"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_fit_the_rows_is_one_line_before_anything_starts(
    inputs: dict[str, Any], tmp_path: Path, overrides: dict[str, Any], words: str
) -> None:
    from opd_megatron.run.inputs import read_inputs

    def read() -> None:
        config = small_config(inputs | overrides, tmp_path)
        read_inputs(config, check(config))

    with pytest.raises(OPDError, match=words) as failure:
        read()
    assert "\n" not in str(failure.value)


def test_a_conversation_keeps_its_turns_and_the_last_question_is_replaced() -> None:
    turns = (("system", "be brief"), ("user", "one?"), ("assistant", "1"), ("user", "two?"))
    row = Example("r", "two?", "2", turns, columns={"a.b": "x"})
    shown = ContextTemplate.read("teachers.0.prompt", "{prompt}{answer}{a.b}").applied_to(row)
    assert shown.messages == (*turns[:3], ("user", "two?2x"))
    assert shown.question == "two?2x"


def test_an_average_is_not_taken_from_a_run_that_had_none(inputs: dict[str, Any], tmp_path: Path) -> None:
    settings = {"teachers.0.path": "student", "optimizer.decay": "constant"}
    _run(inputs, tmp_path / "run", 1, **settings, steps=1)
    with pytest.raises(RankError, match=r"teachers.0.update='frozen', this one has 'ema'"):
        _run(inputs, tmp_path / "run", 1, **settings, **{"teachers.0.update": "ema"}, steps=2)
