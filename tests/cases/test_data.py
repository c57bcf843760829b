"""Data as users bring them: every format and shape is read, or refused in one line that names file and row."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from opd_megatron import cli
from opd_megatron.config import RunConfig, load_config
from opd_megatron.data.prompts import build_train_and_eval
from opd_megatron.data.rows import Example
from opd_megatron.data.sources import read_rows
from opd_megatron.errors import DataError
from tests.byte_tokenizer import TURN_END, save_byte_tokenizer
from tests.cases.inputs import addition_rows, make_pair, refused, train_words, write_rows

ROWS = addition_rows(10)


def config_for(source: Path | str | None, **data: Any) -> RunConfig:
    settings = {"source": str(source)} if source is not None else {}
    return RunConfig.model_validate(
        {"teachers": [{"path": "t"}], "data": settings | data, "evaluation": {"prompts": 2}}
    )


def questions(config: RunConfig) -> list[str]:
    rows = read_rows(config)
    return [row.question for row in [*rows.train, *rows.held_out]]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes rows in the format that the suffix names."""
    name = path.name.lower()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith(".parquet"):
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif ".csv" in name or ".tsv" in name:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if ".tsv" in name else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text(text)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a.csv", "A.CSV", "a.tsv", "a.parquet", "a.PARQUET", "a.jsonl.gz",
     "a.csv.gz", "a.Json.GZ"],
)  # fmt: skip
def test_every_format_is_read_whatever_the_case_of_its_suffix(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ROWS)
    rows = read_rows(config_for(path))
    assert [row.question for row in [*rows.train, *rows.held_out]] == [row["question"] for row in ROWS]
    assert [row.answer for row in [*rows.train, *rows.held_out]] == [row["answer"] for row in ROWS]
    assert rows.train[0].id == f"{name.split('.')[0]}:0"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.jsonl", b"\xef\xbb\xbf" + b"\n".join(json.dumps(row).encode() for row in ROWS)),
        ("bom.csv", b"\xef\xbb\xbfquestion,answer\n" + b"".join(f"q{n},a\n".encode() for n in range(10))),
        ("object.json", json.dumps({"version": 1, "data": ROWS}).encode()),
        ("lines.json", b"\n".join(json.dumps(row).encode() for row in ROWS)),
        ("list.jsonl", json.dumps(ROWS, indent=2).encode()),
        ("crlf.jsonl", b"\r\n".join(json.dumps(row).encode() for row in ROWS) + b"\r\n\r\n"),
        ("quoted.csv", b"question,answer\n" + b"".join(f'"{r["question"]}","a ""b"",\nc"\n'.encode() for r in ROWS)),
    ],
)  # fmt: skip
def test_what_other_programs_write_is_read(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    expected = [f"q{n}" for n in range(10)] if name == "bom.csv" else [row["question"] for row in ROWS]
    assert questions(config_for(tmp_path / name)) == expected


@pytest.mark.parametrize("folder", ["parquet", "jsonl", "saved", "dictionary"])
def test_a_folder_of_files_or_of_a_saved_set_is_read(tmp_path: Path, folder: str) -> None:
    import datasets

    path = tmp_path / folder
    if folder in ("saved", "dictionary"):
        rows = datasets.Dataset.from_list(ROWS)
        (rows if folder == "saved" else datasets.DatasetDict(train=rows)).save_to_disk(path)
    else:
        path.mkdir()
        write(path / f"train.{folder}", ROWS)
    assert questions(config_for(path, answer_column=None)) == [row["question"] for row in ROWS]


SYSTEM = {"role": "system", "content": "Add."}
EARLIER = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
ASKED = {"role": "user", "content": "2+2?"}


@pytest.mark.parametrize(
    ("record", "settings", "expected"),
    [
        (
            {"prompt": [SYSTEM, *EARLIER, ASKED], "data_source": "sums", "ability": "math",
             "reward_model": {"style": "rule", "ground_truth": "4"}, "extra_info": {"index": 0}},
            {"task_column": "data_source"},
            ("2+2?", "4", 4, "sums"),
        ),
        ({"prompt": [ASKED]}, {}, ("2+2?", None, 1, None)),
        ({"prompt": "2+2?"}, {}, ("2+2?", None, 0, None)),
        ({"prompt": "2+2?", "completion": "4"}, {}, ("2+2?", "4", 0, None)),
        ({"messages": [SYSTEM, ASKED, {"role": "assistant", "content": "4"}]}, {}, ("2+2?", "4", 2, None)),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}]}, {}, ("2+2?", None, 1, None)),
        ({"problem": "2+2?", "solution": "4"}, {}, ("2+2?", "4", 0, None)),
        ({"a": {"b": ["x", "2+2?"]}, "c": {"d": 4}}, {"prompt_column": "a.b.1", "answer_column": "c.d"},
         ("2+2?", "4", 0, None)),
        ({"a.b": "2+2?", "n": 4.0}, {"prompt_column": "a.b", "answer_column": "n"}, ("2+2?", "4", 0, None)),
        ({"question": "2+2?", "answer": 0.5}, {}, ("2+2?", "0.5", 0, None)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_usual_shapes_are_read(
    tmp_path: Path, suffix: str, record: dict[str, Any], settings: dict[str, Any],
    expected: tuple[str, str | None, int, str | None],
) -> None:  # fmt: skip
    path = write(tmp_path / f"rows.{suffix}", [record] * 3)
    config = config_for(path, **settings)
    config.evaluation.every = 0
    row = read_rows(config).train[0]
    assert (row.question, row.answer, len(row.messages), row.task) == expected


def test_what_was_found_otherwise_than_named_is_said(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{n}?"} for n in range(5)])
    rows = read_rows(config_for(path))
    assert rows.held_out == []
    assert rows.notes == [
        f"{path}: prompts from column 'prompt'",
        f"{path}: no gold answers: there is no column 'answer'",
    ]


def test_system_and_earlier_turns_reach_the_model(tmp_path: Path) -> None:
    tokenizer = save_byte_tokenizer(tmp_path / "tokenizer")
    rows = [{"messages": [*([SYSTEM] if n else []), *EARLIER, ASKED]} for n in range(2)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    stream, _ = build_train_and_eval(config_for(path, system_prompt="Be brief."), tokenizer)
    texts = [tokenizer.decode(prompt.token_ids) for prompt in stream.dataset]
    for text, system in zip(texts, ("Be brief.", "Add."), strict=True):
        assert [text.count(part) for part in (system, "1+1?", "2+2?")] == [1, 1, 1]
        assert text.count("<|im_start|>system") == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "half \ud800 pair", "answer": "a"}, "no text"),
        ({"question": "q", "answer": "half \udc00 pair"}, "no text"),
        ({"question": [{"role": "user", "content": "half \ud800"}], "answer": "a"}, "role and a text content"),
        ({"question": "q", "answer": {"ground_truth": "a"}}, "a path into it such as answer.ground_truth"),
        ({"question": "q", "answer": ["a"]}, "must hold text or a number"),
        ({"question": "q", "answer": float("nan")}, "holds nan"),
        ({"question": "q", "answer": float("-inf")}, "holds -inf"),
        ({"question": "q", "answer": True}, "must hold text or a number"),
        ({"question": 7, "answer": "a"}, "must hold text or a list of messages"),
        ({"question": None, "answer": "a"}, "must hold text or a list of messages"),
        ({"question": [], "answer": "a"}, "one of the role 'user'"),
        ({"question": [{"role": "assistant", "content": "hi"}], "answer": "a"}, "one of the role 'user'"),
        ({"question": [{"role": "user"}], "answer": "a"}, "role and a text content"),
        ({"question": [{"role": "user", "content": "x", "tool_calls": [1]}], "answer": "a"}, "tool_calls"),
    ],
)
def test_a_row_that_is_no_text_is_refused_before_anything_starts(
    tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS, row])
    with pytest.raises(DataError, match=said) as caught:
        read_rows(config_for(path))
    assert f"row 10 of {str(path)!r} (line 11)" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    str(caught.value).encode("ascii")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"x", "suffix '.txt', which is not read"),
        ("a.parquet", b"PAR1xx", "no whole Parquet file"),
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-4], "cannot be read"),
        ("a.jsonl.gz", b"plain", "cannot be read"),
        ("a.jsonl", b"{\"question\": \"\xff\"}", "not UTF-8"),
        ("a.jsonl", b"[" * 100_000, "nested too deeply"),
        ("a.jsonl", b"{\"a\": " + b"1" * 5000 + b"}", "not valid JSON"),
        ("a.json", b"{\"question\"", "not valid JSON"),
        ("a.json", b"7", "must hold a list of objects"),
        ("a.json", json.dumps({"train": ROWS, "test": ROWS}).encode(), "'train', 'test'"),
        ("a.csv", b"question,answer\na,b,c\n", "more cells"),
        ("a.csv", b"question,answer\n\"a,b\n", "not valid CSV"),
        ("a.csv", b"question,answer\n,b\n", "must hold text"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        read_rows(config_for(tmp_path / name))
    assert len(str(caught.value).splitlines()) == 1
    assert name in str(caught.value)


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pair(tmp_path)
    for name in ("train.parquet", "./rows", str(tmp_path / "none"), "a/b/c"):
        assert "does not exist" in refused(capsys, *train_words(tmp_path, f"data.source={name}"))


def test_home_is_expanded_wherever_a_path_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    make_pair(tmp_path)
    (tmp_path / "run.yaml").write_text(
        "output_dir: ~/run\nstudent: {path: ~/student, tokenizer: ~/teacher}\nteachers: [{path: ~/teacher}]\n"
        "data: {source: ~/prompts.jsonl, eval_source: ~/prompts.jsonl}\n"
    )
    config = load_config(tmp_path / "run.yaml")
    assert {config.output_dir, config.student.path, config.data.source} == {
        str(tmp_path / name) for name in ("run", "student", "prompts.jsonl")
    }
    words = [
        word for word in train_words(tmp_path) if not word.startswith(("output_dir", "student.path", "data.source"))
    ]
    assert cli.main([words[0], "run.yaml", *words[1:]]) == 0
    assert (tmp_path / "run/hf").is_dir()
    assert not (tmp_path / "~").exists()


def test_sources_get_their_share_at_every_point_of_a_run_and_go_on_after_a_resume(tmp_path: Path) -> None:
    tokenizer = save_byte_tokenizer(tmp_path / "tokenizer")
    a = write_rows(tmp_path / "a.jsonl", [{"question": f"a{n}", "answer": "x"} for n in range(30)])
    b = write_rows(tmp_path / "b.jsonl", [{"text": f"b{n}", "label": "y"} for n in range(5)])
    sources = [
        {"source": str(a), "weight": 3},
        {"source": str(b), "prompt_column": "text", "answer_column": "label", "task": "letters"},
    ]
    config = config_for(None, sources=sources)
    config.rollout.prompts_per_step = 4
    stream, held_out = build_train_and_eval(config, tokenizer)
    assert {prompt.id[0] for prompt in held_out} == {"a", "b"}
    steps = [stream.next_prompts() for _ in range(6)]
    for step in steps:
        assert sorted(prompt.id[0] for prompt in step) == ["a", "a", "a", "b"]
        assert {prompt.task for prompt in step if prompt.id[0] == "b"} == {"letters"}
    again, _ = build_train_and_eval(config, tokenizer)
    again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert [p.id for p in again.next_prompts()] == [p.id for p in stream.next_prompts()]


def test_a_source_beside_sources_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"data\.source='x\.jsonl' has no effect beside data\.sources"):
        config_for("x.jsonl", sources=[{"source": "y.jsonl"}])


def test_a_tokenizer_that_closes_every_text_leaves_the_prompt_open(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    from opd_megatron.data.prompts import PromptDataset

    tokenizer = save_byte_tokenizer(tmp_path / "tokenizer")
    eos = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, tokenizer.eos_token_id)]
    )
    assert tokenizer("ab").input_ids[-1] == tokenizer.eos_token_id
    (prompt,) = PromptDataset([Example("r", "ab", "c")], tokenizer, template="raw")
    assert prompt.token_ids == (*b"ab",)


def test_data_command_shows_what_the_models_see(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pair(tmp_path)
    assert cli.main(["data", *train_words(tmp_path)[1:], "--show", "2"]) == 0
    out = capsys.readouterr().out
    assert "20 prompts to train on, 4 held out with a gold answer" in out
    assert f"256:'<|endoftext|>', {TURN_END}:'<|im_end|>', or after 8 tokens" in out
    assert "    | <|im_start|>user" in out
    assert out.count("gold answer, ") == 3
    assert "it is cut at rollout.max_new_tokens=8" in out
    assert not (tmp_path / "run").exists()
