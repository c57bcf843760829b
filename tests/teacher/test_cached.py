"""Teachers whose hidden states lie on disk: the same losses, and one clear line for what is not there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from opd_megatron.config import RunConfig, decide_precision
from opd_megatron.data.saved_rollouts import read_rollouts
from opd_megatron.errors import ConfigError, DataError, MissingPathError, OPDError, TeacherError
from opd_megatron.run.cache_command import as_pass, cache_teachers
from opd_megatron.teacher.states_cache import CacheWriter, StatesCache, answer_key, sequence_key
from opd_megatron.train import check
from opd_megatron.types import Prompt, Rollout
from tests.byte_tokenizer import save_byte_tokenizer
from tests.e2e.runs import make_inputs, small_config
from tests.ranks import RankError, run_ranks
from tests.teacher.test_placements import STUDENTS, _agree, _long
from tests.teacher.test_routing import SETTINGS, _run
from tests.tiny_models import save_tiny

HIDDEN = 64


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_inputs(tmp_path_factory.mktemp("cached")) | {"evaluation.every": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def alone(inputs: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[dict]]:
    return _run(inputs, folder / "run", 1, **{"logging.rollouts": True})


def _cached(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "teachers.0.placement": "cached", "teachers.0.cache": str(folder),
        **{f"teachers.0.{name}": value for name, value in settings.items()},
    }  # fmt: skip


def _pass(rank: int, world_size: int, config: RunConfig, options: dict[str, Any]) -> list[str]:
    config, cached = as_pass(decide_precision(config)[0])
    return cache_teachers(config, check(config), cached, **options)


def _cache(inputs: dict[str, Any], folder: Path, ranks: int = 1, options: Any = None, **settings: Any) -> str:
    values = SETTINGS | {"parallel.micro_batch_size": 2} | _cached(folder) | settings
    config = small_config(inputs, folder.parent / "unused", **values)
    lines: list[list[str]] = run_ranks(ranks, _pass, config, {"answers": False} | (options or {}))
    return "\n".join(lines[0])


@pytest.fixture(scope="module")
def cache(inputs: dict[str, Any], alone: Any, folder: Path) -> Path:
    """What the run of `alone` needs, by two tensor-parallel ranks."""
    line = _cache(inputs, folder / "states", 2, {"rollouts": [folder / "run"]}, **{"teachers.0.tensor": 2})
    assert "sequences of" in line
    return folder / "states"


@pytest.mark.parametrize("student", ["SP2", "TP2 PP2", "CP2", *_long(("one",), ("TP2",), ("PP2",), ("DP2",))])
def test_a_cached_teacher_teaches_the_same_in_every_layout(
    inputs: dict[str, Any], alone: Any, cache: Path, tmp_path: Path, student: str
) -> None:
    ranks = {"one": 1, "TP2 PP2": 4}.get(student, 2)
    found = _run(inputs, tmp_path / "run", ranks, **STUDENTS[student], **_cached(cache))
    _agree(found, alone)
    for row in found[1][1:]:
        share = 0.75 if student == "DP2" else 1.0
        assert 0 < row["teacher/0/bytes"] <= share * row["tokens"] * HIDDEN * 4


@pytest.mark.parametrize(
    ("student", "layout"),
    [
        ("SP2", {}),
        ("CP2", {}),
        ("DP2", {"tensor": 2}),
        *_long(("one", {}), ("TP2 PP2", {}), ("SP2", {"tensor": 1, "pipeline": 2})),
    ],
)
def test_what_is_missing_is_computed_beside_what_is_there(
    inputs: dict[str, Any], alone: Any, folder: Path, tmp_path: Path, student: str, layout: dict[str, Any]
) -> None:
    """Every other answer of every step is cached."""
    for file in (folder / "run" / "rollouts").glob("*.jsonl"):
        (tmp_path / file.name).write_text("\n".join(file.read_text().splitlines()[::2]))
    _cache(inputs, tmp_path / "states", 1, {"rollouts": [tmp_path]})
    ranks = {"one": 1, "TP2 PP2": 4}.get(student, 2)
    settings = _cached(tmp_path / "states", missing="compute", **layout)
    found = _run(inputs, tmp_path / "run", ranks, **STUDENTS[student], **settings)
    _agree(found, alone)
    for row in found[1][1:]:
        assert 0 < row["teacher/0/bytes"] < row["tokens"] * HIDDEN * 4


def test_a_teacher_with_a_prompt_of_its_own_is_cached_after_that_prompt(
    inputs: dict[str, Any], alone: Any, cache: Path, tmp_path: Path
) -> None:
    own = {"teachers.0.prompt": "{prompt} ({answer})"}
    expected = _run(inputs, tmp_path / "expected", 1, **own, **{"logging.rollouts": True})
    _cache(inputs, tmp_path / "states", 1, {"rollouts": [tmp_path / "expected"]}, **own)
    _agree(_run(inputs, tmp_path / "run", 1, **own, **_cached(tmp_path / "states")), expected)
    with pytest.raises(RankError, match=r"lies there after another context.*teachers.N.prompt of this run"):
        _run(inputs, tmp_path / "other", 1, **own, **_cached(cache))


def test_one_of_several_teachers_is_cached_for_its_own_tasks(inputs: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        {"question": f"{task} {number}?", "answer": str(number), "task": task}
        for number in range(8) for task in ("math", "code")
    ]  # fmt: skip
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    routed = {
        "data.source": str(tmp_path / "tasks.jsonl"), "data.task_column": "task",
        "teachers.0.name": "small", "teachers.1.name": "large", "teachers.1.path": inputs["student.path"],
        "teachers.1.dtype": "fp32", "routes": {"math": "small", "code": ["small", "large"]},
    }  # fmt: skip
    cached = {"teachers.1.placement": "cached", "teachers.1.cache": str(tmp_path / "states")}
    expected = _run(inputs, tmp_path / "expected", 1, **routed, **{"logging.rollouts": True})
    config = small_config(inputs, tmp_path / "unused", **(SETTINGS | routed | cached))
    run_ranks(1, _pass, config, {"answers": False, "rollouts": [tmp_path / "expected"]})
    found = _run(inputs, tmp_path / "run", 2, **STUDENTS["TP2"], **routed, **cached, **{"evaluation.agreement": True})
    _agree(found, expected)
    code = [each for each in read_rollouts(tmp_path / "expected") if each.prompt.task == "code"]
    cache = StatesCache(tmp_path / "states", fingerprint=None, width=HIDDEN, name="'large'")
    assert all(sequence_key(each) in cache for each in code)
    assert not any(
        sequence_key(each) in cache for each in read_rollouts(tmp_path / "expected") if each.prompt.task == "math"
    )
    first = json.loads((tmp_path / "expected" / "rollouts" / "step-000001.jsonl").read_text().splitlines()[0])
    (tmp_path / "of-others.jsonl").write_text(json.dumps(first | {"task": "chat"}))
    with pytest.raises(RankError, match="task 'chat' of 1 rows has no route"):
        run_ranks(1, _pass, config, {"answers": False, "rollouts": [tmp_path / "of-others.jsonl"]})


def test_the_start_is_compared_with_transformers(
    inputs: dict[str, Any], alone: Any, cache: Path, tmp_path: Path
) -> None:
    """The pass writes the sequence that the comparison takes."""
    found = _run(inputs, tmp_path / "run", 1, **_cached(cache), **{"evaluation.agreement": True})
    _agree(found, alone)


def test_a_pass_goes_on_where_another_ended(inputs: dict[str, Any], alone: Any, folder: Path, tmp_path: Path) -> None:
    states, run = tmp_path / "states", folder / "run" / "rollouts"
    first = _cache(inputs, states, 1, {"rollouts": [run / "step-000001.jsonl"], "shard_bytes": 4096})
    assert len([*states.glob("states-*")]) > 1, "shards are bounded"
    (states / ".states-00000-00077.safetensors.partial").write_bytes(b"half")
    before = {file.name: file.read_bytes() for file in states.glob("states-*")}
    second = _cache(inputs, states, 2, {"rollouts": [run]}, **{"parallel.data": 2})
    third = _cache(inputs, states, 1, {"rollouts": [run]})
    assert "were there" not in first
    assert f"; {first.split(': ')[1].split()[0]} were there" in second
    assert ": 0 sequences of 0 answer tokens" in third
    assert not [*states.glob(".states-*")]
    assert before.items() <= {file.name: file.read_bytes() for file in states.glob("states-*")}.items()
    _agree(_run(inputs, tmp_path / "run", 1, **_cached(states)), alone)


def test_the_command_takes_gold_answers_and_a_run_reads_them(inputs: dict[str, Any], tmp_path: Path) -> None:
    values = {
        "student.path": inputs["student.path"], "teachers.0.path": inputs["teachers.0.path"],
        "data.source": inputs["data.source"], "rollout.max_new_tokens": 8, "data.max_prompt_tokens": 80,
        "student.dtype": "fp32", "teachers.0.dtype": "fp32",
        "teachers.0.placement": "cached", "teachers.0.cache": str(tmp_path / "states"),
        "output_dir": str(tmp_path / "unused"),
    }  # fmt: skip
    words = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    command = [sys.executable, "-m", "opd_megatron.cli", "cache-teacher", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "written to" in done.stdout
    assert not (tmp_path / "unused").exists()
    with safe_open(next((tmp_path / "states").glob("states-*")), framework="pt") as shard:
        assert len(shard.get_tensor("keys")) >= 16


def _sequence(context: tuple[int, ...], *answer: int) -> Rollout:
    return Rollout(Prompt("p", context, "?"), torch.tensor(answer), None, policy_version=0)


def _written(folder: Path, fingerprint: str = "a", width: int = 4) -> list[Rollout]:
    sequences = [_sequence((1, 2), 3, 4, 5), _sequence((1,), 2, 3), _sequence((1, 2, 3), 4)]
    writer = CacheWriter(folder, 0, {"fingerprint": fingerprint, "teacher": "t"}, shard_bytes=5 * width * 4)
    writer.add(sequences, torch.arange(6.0 * width).view(6, width))
    writer.add(sequences[:1], torch.full((3, width), -1.0))
    writer.flush()
    return sequences


def test_states_come_back_as_they_were_written(tmp_path: Path) -> None:
    sequences = _written(tmp_path)
    cache = StatesCache(tmp_path, fingerprint="a", width=4, name="'t'")
    assert len(cache) == len(sequences)
    assert torch.equal(
        torch.cat([cache.states(sequence_key(each)) for each in sequences]), torch.arange(24.0).view(6, 4)
    )
    moved = _sequence((9,), 3, 4, 5)
    assert sequence_key(moved) not in cache
    assert cache.has_answer(answer_key(moved))
    assert sequence_key(_sequence((1,), 2, 3, 4, 5)) not in cache, "where the context ends is part of what was read"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fingerprint": "b"}, "holds hidden states of 't' with fingerprint a, teacher 't' has b"),
        ({"width": 8}, "states of width 4, the teacher's is 8.*remove it and run"),
    ],
)
def test_states_of_another_teacher_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    _written(tmp_path)
    with pytest.raises(TeacherError, match=words) as failure:
        StatesCache(tmp_path, **({"fingerprint": "a", "width": 4, "name": "'t'"} | change))
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import save_file

    _written(tmp_path)
    file = sorted(tmp_path.glob("states-*"))[0]
    if damage == "other":
        save_file({"weight": torch.ones(2)}, file)
    else:
        file.write_bytes({"cut": file.read_bytes()[:-8], "empty": b"", "text": b"a" * 100}[damage])
    with pytest.raises(TeacherError, match=r"states-00000-00000.safetensors.*or damaged.*remove it and run"):
        StatesCache(tmp_path, fingerprint="a", width=4, name="'t'")


def test_what_a_run_cannot_use_ends_it_with_one_line(
    inputs: dict[str, Any], alone: Any, cache: Path, tmp_path: Path
) -> None:
    for where, settings, words in (
        (cache, {"seed": 3}, "has no cached states of .* sequences in .*or set teachers.N.missing=compute"),
        (tmp_path / "nowhere", {}, "holds no cached states .*cache-teacher CONFIG"),
        (cache, {"teachers.0.path": inputs["student.path"]}, "holds hidden states of .* with fingerprint"),
    ):
        with pytest.raises(RankError, match=words):
            _run(inputs, tmp_path / f"run{len(words)}", 2, **STUDENTS["DP2"], **(_cached(where) | settings))


def test_what_a_pass_cannot_use_is_named(inputs: dict[str, Any], alone: Any, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no teacher of this run is cached: set teachers.N.placement=cached"):
        as_pass(small_config(inputs, tmp_path / "run"))
    save_tiny(tmp_path / "other", head_dim=32, seed=77)
    save_byte_tokenizer(tmp_path / "other")
    shutil.copytree(cache, tmp_path / "states")
    with pytest.raises(RankError, match=r"holds hidden states of .* with fingerprint"):
        _cache(inputs, tmp_path / "states", 1, **{"teachers.0.path": str(tmp_path / "other")})
    (tmp_path / "file").write_text("x")
    with pytest.raises(RankError, match=r"teachers.0.cache=.* cannot be used"):
        _cache(inputs, tmp_path / "file", 1)
    lines = (cache.parent / "run" / "rollouts" / "step-000001.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    (tmp_path / "of-others.jsonl").write_text(json.dumps(first | {"prompt_ids": [1, 2, 3]}))
    with pytest.raises(RankError, match="belongs to other data or another template than this run's"):
        _cache(
            inputs, tmp_path / "more", 1, {"rollouts": [tmp_path / "of-others.jsonl"]},
            **{"teachers.0.prompt": "{prompt} {answer}"},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"prompt_ids": [1]}', "response_ids"),
        ('{"prompt_id": "a", "prompt_ids": [1], "response_ids": []}', "no tokens"),
        ('{"prompt_id": "a", "prompt_ids": [1], "response_ids": [1.5]}', "1.5 is no token id"),
        ('{"prompt_id": "a", "prompt_ids": [1], "response_ids": [1, 2], "logprobs": [0]}', "1 logprobs for 2"),
    ],
)
def test_a_line_that_is_no_rollout_is_named(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "step-000001.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=rf"step-000001.jsonl' line 1 is no saved rollout .*{words}") as failure:
        list(read_rollouts(tmp_path))
    assert "\n" not in str(failure.value)
    with pytest.raises(MissingPathError, match=r"logging.rollouts=true"):
        list(read_rollouts(tmp_path / "nowhere"))


def test_saved_rollouts_are_the_ones_that_were_trained_on(
    inputs: dict[str, Any], alone: Any, folder: Path, tmp_path: Path
) -> None:
    assert isinstance(TeacherError("x"), OPDError)
    saved = [*read_rollouts(folder / "run")]
    tokens = sum(row.get("tokens", 0) for row in alone[1])
    assert sum(len(each.response_ids) for each in saved) == tokens
    assert {each.policy_version for each in saved} == {0, 1}
    assert all(each.logprobs is not None and bool((each.logprobs <= 0).all()) for each in saved)
