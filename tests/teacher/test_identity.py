"""What a teacher is goes with the run: in config.yaml, metrics, checkpoints and on the terminal; another is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from opd_megatron.config import load_config
from opd_megatron.errors import OPDError
from opd_megatron.mcore.checkpoint import checkpoint_path
from opd_megatron.mcore.checkpoint.folder import STATE_FILE
from opd_megatron.run.teacher_lines import teacher_lines
from opd_megatron.train import check
from tests.byte_tokenizer import save_byte_tokenizer
from tests.e2e.runs import make_inputs, small_config
from tests.ranks import RankError, run_ranks
from tests.teacher.test_placements import SETTINGS, _train
from tests.tiny_models import save_tiny


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("identity")
    found = make_inputs(folder)
    save_tiny(folder / "other", head_dim=32, seed=9, num_hidden_layers=6)
    save_byte_tokenizer(folder / "other")
    return found | {"optimizer.decay": "constant"}


def _run(inputs: dict[str, Any], folder: Path, **overrides: Any) -> list[dict[str, Any]]:
    run_ranks(1, _train, small_config(inputs, folder, **(SETTINGS | overrides)))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_teachers_fingerprint_is_in_config_metrics_and_checkpoint(inputs: dict[str, Any], tmp_path: Path) -> None:
    rows = _run(inputs, tmp_path / "run", steps=1, **{"teachers.0.name": "big"})
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    fingerprint = config["teachers"][0]["fingerprint"]
    assert len(fingerprint) == 16
    assert rows[0]["teacher/big/fingerprint"] == fingerprint
    state = json.loads((checkpoint_path(tmp_path / "run/checkpoints", 1) / STATE_FILE).read_text())
    assert {"teachers.0.weights", "teachers.0.tokenizer"} <= state["identity"].keys()
    loaded = load_config(tmp_path / "run")
    [line] = teacher_lines(loaded, check(loaded))
    assert all(word in line for word in ("teacher big:", "llama", "on the student's ranks", fingerprint))
    moved = shutil.copytree(inputs["teachers.0.path"], tmp_path / "moved")
    assert _run(inputs, tmp_path / "run", steps=2, **{"teachers.0.name": "big", "teachers.0.path": str(moved)})


def test_another_teacher_is_refused_on_resume_unless_it_is_allowed(inputs: dict[str, Any], tmp_path: Path) -> None:
    _run(inputs, tmp_path / "run", steps=1)
    other = {"teachers.0.path": str(Path(inputs["teachers.0.path"]).parent / "other")}
    with pytest.raises(RankError, match=r"other weights \(teachers.0.weights: .*allow_changed=\[teachers\]"):
        _run(inputs, tmp_path / "run", steps=2, **other)
    with pytest.raises(RankError, match=r"belongs to a run with objective.type.*allow_changed=\[objective\]"):
        _run(inputs, tmp_path / "run", steps=2, **{"objective.type": "forward_kl"})
    rows = _run(inputs, tmp_path / "run", steps=2, **other, **{"checkpoint.allow_changed": ["teachers"]})
    assert [row["step"] for row in rows] == [0, 1, 2]
    with pytest.raises(RankError, match=r"objective.type"):
        _run(inputs, tmp_path / "run", steps=3, **other, **{"objective.type": "forward_kl"})


def test_a_teacher_that_is_not_the_one_of_its_fingerprint_is_refused(inputs: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"is another than teachers.0.fingerprint=0123 says \(it is [0-9a-f]{16}\)"):
        _run(inputs, tmp_path / "run", steps=1, **{"teachers.0.fingerprint": "0123"})


def test_what_may_change_is_named_rightly(inputs: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(OPDError, match="allow_changed"):
        small_config(inputs, tmp_path, **{"checkpoint.allow_changed": ["student"]})
