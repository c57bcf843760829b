"""Damaged versions of every side file, at every command: the right result, or one line and exit code 2."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from opd_megatron import cli
from opd_megatron.run.lock import LOCK_FILE
from tests.cases.inputs import make_pair, train_words


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": _cut,
    "empty": lambda data: b"",
    "a list": lambda data: b"[1, 2]",
    "no text": lambda data: b"\xff\xfe\x00" + data,
    "null": lambda data: b"null",
    "other types": lambda data: data.replace(b": ", b': "x", "y": ', 1) if data.lstrip().startswith(b"{") else b"a: [b",
}
OF_A_RUN = ["config.yaml", "run.json", "metrics.jsonl"]
OF_A_MODEL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
FILES = [
    *(f"run/{name}" for name in OF_A_RUN), *(f"student/{name}" for name in OF_A_MODEL),
    "teacher/config.json", "teacher/tokenizer.json", "student/model.safetensors.index.json", "run/checkpoints/latest",
]  # fmt: skip
COMMANDS = ["train", "resume", "evaluate", "export", "data", "report", "plan", "convert"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("damaged") / "home"
    root.mkdir()
    make_pair(root)
    (root / "student/generation_config.json").write_text('{"eos_token_id": 256}')
    (root / "student/model.safetensors.index.json").write_text("{}")
    _whole_index(root / "student")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert cli.main(train_words(Path("."), "output_dir=run", "steps=1", "checkpoint.export_hf=false")) == 0
    return root


def _whole_index(folder: Path) -> None:
    import json

    from safetensors.torch import load_file

    names = load_file(folder / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def words_of(command: str) -> list[str]:
    new = train_words(Path("."), "output_dir=new", "steps=1", "evaluation.every=0", "checkpoint.export_hf=false")
    return {
        "train": new,
        "resume": ["train", "run", "steps=1"],
        "evaluate": ["evaluate", "run"],
        "export": ["export", "run"],
        "data": ["data", *new[1:]],
        "report": ["report", "run"],
        "plan": ["plan", "run"],
        "convert": ["convert", "hf-to-megatron", "--hf", "student", "--out", "out"],
    }[command]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_line_or_does_not_matter(
    trained: Path, tmp_path: Path, file: str, damage: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A training command is tried where the file is one that it reads; every other command with every file."""
    home = tmp_path / "home"
    shutil.copytree(trained, home)
    monkeypatch.chdir(home)
    path = home / file
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    for command in COMMANDS:
        if command in ("train", "resume") and file.startswith("run/") != (command == "resume"):
            continue
        capsys.readouterr()
        code = cli.main(words_of(command))
        captured = capsys.readouterr()
        assert code in (0, 2), f"{command}: {captured.err}"
        errors = [line for line in captured.err.splitlines() if line.startswith("opd-megatron: error: ")]
        assert len(errors) == (1 if code else 0), f"{command}: {captured.err}"
        assert "Traceback" not in captured.err
        assert not (home / "run" / LOCK_FILE).exists()
        shutil.rmtree(home / "new", ignore_errors=True)
        shutil.rmtree(home / "out", ignore_errors=True)
    assert (home / "run/checkpoints/step_00000001").is_dir(), "nothing of the run is lost"
