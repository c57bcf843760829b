"""A student and a teacher that end their answers differently: said at the start, with what helps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd_megatron.run.inputs import read_inputs
from opd_megatron.train import check
from tests.e2e.runs import make_inputs, small_config


def _without_template(folder: Path) -> None:
    """As base models come: raw text, and an end of text."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    tree = json.loads(path.read_text())
    tree.pop("chat_template", None)
    path.write_text(json.dumps(tree))


def _notes(inputs: dict[str, str], folder: Path, **overrides: str) -> list[str]:
    config = small_config(inputs, folder / "run", **overrides)
    return [note for note in read_inputs(config, check(config)).notes if "ends its answers" in note]


@pytest.mark.parametrize("template", ["raw", "chat"])
def test_a_base_student_of_an_instruction_tuned_teacher_is_warned_of(tmp_path: Path, template: str) -> None:
    inputs = make_inputs(tmp_path)
    assert _notes(inputs, tmp_path, **{"data.template": "chat"}) == [], "alike"
    _without_template(tmp_path / "student")
    if template == "chat":
        teachers = {"student.tokenizer": inputs["teachers.0.path"], "data.template": "chat"}
        assert _notes(inputs, tmp_path, **teachers) == [], "the remedy"
        return
    [note] = _notes(inputs, tmp_path, **{"data.template": "raw"})
    assert note.startswith("warning: ")
    assert "'<|im_end|>'" in note
    assert "'<|endoftext|>'" in note
    assert f"student.tokenizer={inputs['teachers.0.path']}" in note
    assert "\n" not in note


def test_a_base_teacher_of_a_base_student_ends_alike(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    for name in ("student", "teacher"):
        _without_template(tmp_path / name)
    assert _notes(inputs, tmp_path, **{"data.template": "raw"}) == []
