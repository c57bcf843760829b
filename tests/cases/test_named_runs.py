"""A command that names a run acts on that run, wherever it lies and is named from, or fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from opd_megatron import cli
from tests.cases.inputs import edit_json, make_pair, refused, train_words
from tests.tiny_models import save_tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with student/, teacher/, prompts.jsonl and run/, started from inside it with relative paths."""
    root = tmp_path_factory.mktemp("home") / "work"
    root.mkdir()
    make_pair(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert cli.main(train_words(Path("."), "output_dir=run", "optimizer.lr=3e-3")) == 0
    return root


@pytest.fixture
def home(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to spoil, and the current folder."""
    shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def head_of(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["model.embed_tokens.weight"]


def is_trained(exported: Path, trained: Path) -> bool:
    return torch.equal(head_of(exported), head_of(trained / "run/hf")) and not torch.equal(
        head_of(exported), head_of(trained / "student")
    )


@pytest.mark.parametrize("name", ["moved", "./run", "../work/run", "absolute"])
def test_export_writes_the_trained_weights_of_the_folder_that_is_named(
    home: Path, trained: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(home / "run/hf")
    if name == "moved":
        (home / "run").rename(home / "moved")
    named = str(home / "run") if name == "absolute" else name
    assert cli.main(["export", named]) == 0
    assert is_trained(Path(named) / "hf", trained)
    assert (home / "run").exists() == (name != "moved")


def test_from_another_folder_relative_paths_lead_where_they_led(
    home: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(home / "run/hf")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli.main(["export", str(home / "run")]) == 0
    assert is_trained(home / "run/hf", trained)
    assert not list((tmp_path / "elsewhere").iterdir())
    assert cli.main(["evaluate", str(home / "run")]) == 0
    assert "eval/nll" in capsys.readouterr().out


def test_a_copy_is_a_run_of_its_own(home: Path, trained: Path) -> None:
    shutil.copytree("run", "copy")
    shutil.rmtree("run/hf")
    shutil.rmtree("copy/hf")
    assert cli.main(["export", "copy"]) == 0
    assert is_trained(Path("copy/hf"), trained)
    assert not Path("run/hf").exists()


def test_a_moved_run_goes_on_where_it_is(home: Path) -> None:
    Path("run").rename("moved")
    assert cli.main(["train", "moved", "steps=3"]) == 0
    assert not Path("run").exists()
    rows = [json.loads(line) for line in Path("moved/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert yaml.safe_load(Path("moved/config.yaml").read_text())["output_dir"] == "moved"


@pytest.mark.parametrize("command", ["export", "evaluate"])
def test_without_a_checkpoint_the_students_own_weights_must_be_asked_for(
    home: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("run/checkpoints")
    assert "holds no checkpoint" in refused(capsys, command, "run")
    assert cli.main([command, "run", "--checkpoint", "initial"]) == 0
    if command == "export":
        assert torch.equal(head_of(Path("run/hf")), head_of(Path("student")))


def test_a_run_that_is_named_is_not_another_output_dir(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "another run than 'run'" in refused(capsys, "export", "run", "output_dir=other")
    assert not Path("other").exists()


def test_a_folder_that_is_no_run_is_said_to_be_none(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "evaluate", "export"):
        assert "'student' is a folder without config.yaml" in refused(capsys, command, "student")


@pytest.mark.parametrize("spelling", ["./student", "../work/student", "absolute", "renamed"])
def test_another_spelling_of_a_path_is_the_same_run(
    home: Path, spelling: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(home / "student") if spelling == "absolute" else spelling
    if spelling == "renamed":
        Path("student").rename(path)
    assert (
        cli.main(train_words(Path("."), "output_dir=run", f"student.path={path}", "steps=3", "optimizer.lr=3e-3")) == 0
    )
    out = capsys.readouterr().out
    assert "resumed from step 2" in out
    assert ("is 'renamed' now (the same by content)" in out) == (spelling == "renamed")


def test_another_model_under_the_same_name_is_another_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(home / "student", num_hidden_layers=2, seed=77)
    assert "other weights (student.weights" in refused(capsys, "export", "run")
    words = train_words(Path("."), "output_dir=run", "steps=3")
    assert "other weights (student.weights" in refused(capsys, *words)


def test_other_rows_in_the_same_file_are_another_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = Path("prompts.jsonl").read_text().splitlines()
    Path("prompts.jsonl").write_text("\n".join([rows[1], rows[0], *rows[2:]]) + "\n")
    assert "other rows of data" in refused(capsys, *train_words(Path("."), "output_dir=run", "steps=3"))
    assert cli.main(["export", "run"]) == 0, "an export needs no rows"


def test_another_setting_is_named_with_both_values(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = train_words(Path("."), "output_dir=run", "steps=3", "data.template_kwargs={enable_thinking: false}")
    assert "data.template_kwargs={}" in refused(capsys, *words)


def test_a_run_without_its_record_is_read_as_before(home: Path, trained: Path) -> None:
    Path("run/run.json").unlink()
    shutil.rmtree("run/hf")
    assert cli.main(["export", "run"]) == 0
    assert is_trained(Path("run/hf"), trained)


def test_a_conversion_of_a_runs_checkpoint_finds_its_student_from_anywhere(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (checkpoint,) = (home / "run/checkpoints").glob("step_*2")
    assert cli.main(["convert", "megatron-to-hf", "--megatron", str(checkpoint), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/model.safetensors").is_file()


def test_a_checkpoint_of_an_older_release_is_taken_with_a_note(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its identity has paths among the settings, and no hashes."""
    from opd_megatron.mcore.checkpoint.manifest import MANIFEST, write_manifest

    (checkpoint,) = Path("run/checkpoints").glob("step_*2")
    (state_file,) = (path for path in checkpoint.glob("*.json") if "identity" in path.read_text())
    state = json.loads(state_file.read_text())
    identity = state["identity"]
    paths = identity.pop("paths")
    for key in ("student.weights", "teachers.0.weights", "tokenizer", "data.rows"):
        identity.pop(key)
    edit_json(state_file, identity=identity | paths)
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, {})
    Path("run/run.json").unlink()
    Path("student").rename("renamed")
    assert cli.main(["export", "run", "student.path=renamed"]) == 0
    assert "an older checkpoint: not compared by content" in capsys.readouterr().out
