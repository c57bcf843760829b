import json
from pathlib import Path

import pytest

from opd_megatron.config import RunConfig
from opd_megatron.data.sources import GSM_SYMBOLIC_ROWS, gsm_symbolic_rows, train_and_eval_rows
from opd_megatron.errors import DataError, MissingPathError

GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k/test.jsonl"


def run_config(source, eval_prompts=4, every=1, seed=0, **data):
    return RunConfig.model_validate(
        {
            "teachers": [{"path": "t"}],
            "data": {"source": str(source)} | data,
            "evaluation": {"prompts": eval_prompts, "every": every},
            "seed": seed,
        }
    )


def write_rows(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def numbered(count):
    return [{"question": f"q{i}", "answer": f"a{i}"} for i in range(count)]


def test_gsm_symbolic_has_worked_answers_and_never_trains_on_a_held_out_question():
    train, held_out = train_and_eval_rows(run_config("gsm_symbolic", eval_prompts=500))
    assert len(held_out) == 500
    assert len(train) > 0.95 * GSM_SYMBOLIC_ROWS
    assert not {row.question for row in train} & {row.question for row in held_out}
    assert len({row.question for row in train}) == len(train)
    assert all("####" in row.answer for row in held_out)


def test_gsm_symbolic_follows_the_seed_and_the_limit():
    first = train_and_eval_rows(run_config("gsm_symbolic", limit=50))
    again = train_and_eval_rows(run_config("gsm_symbolic", limit=50))
    other = train_and_eval_rows(run_config("gsm_symbolic", limit=50, seed=1))
    assert first == again
    assert 45 <= len(first[0]) <= 50
    assert not {row.question for row in first[0]} & {row.question for row in other[0]}


def test_a_longer_gsm_symbolic_starts_with_the_same_random_draws_only_within_one_seed():
    seeds = [[row.question for row in gsm_symbolic_rows(seed, 40)] for seed in (0, 1, 2)]
    shared = set(seeds[0]) & set(seeds[1]) | set(seeds[1]) & set(seeds[2])
    assert len(shared) <= 1


def test_a_file_keeps_its_last_rows_apart_and_at_most_a_fifth(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", numbered(30))
    train, held_out = train_and_eval_rows(run_config(path))
    assert [row.question for row in held_out] == ["q26", "q27", "q28", "q29"]
    assert [row.id for row in train] == [f"rows:{i}" for i in range(26)]
    train, held_out = train_and_eval_rows(run_config(path, eval_prompts=100))
    assert (len(train), len(held_out)) == (24, 6)
    train, held_out = train_and_eval_rows(run_config(path, limit=10))
    assert (len(train), [row.question for row in held_out]) == (8, ["q8", "q9"])


def test_a_question_that_is_held_out_is_not_trained_on_where_it_occurs_again(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [*numbered(9), {"question": "q3", "answer": "a"}])
    train, held_out = train_and_eval_rows(run_config(path, eval_prompts=1))
    assert [row.question for row in held_out] == ["q3"]
    assert "q3" not in [row.question for row in train]
    assert len(train) == 8


def test_an_evaluation_file_leaves_all_other_rows_for_training(tmp_path):
    path = write_rows(tmp_path / "train.jsonl", numbered(5))
    other = write_rows(tmp_path / "test.json", [json.dumps([{"question": "new", "answer": 7}])])
    train, held_out = train_and_eval_rows(run_config(path, eval_source=str(other)))
    assert len(train) == 5
    assert [(row.question, row.answer) for row in held_out] == [("new", "7")]
    train, held_out = train_and_eval_rows(run_config(path, eval_source=str(other), answer_column=None))
    assert {row.answer for row in train} == {None}
    assert held_out[0].answer == "7"


def test_nothing_is_held_out_without_evaluation_or_without_answers(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", numbered(5))
    for config in (run_config(path, every=0), run_config(path, answer_column=None)):
        train, held_out = train_and_eval_rows(config)
        assert (len(train), held_out) == (5, [])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question": "q", "x": 1}, {"prompt": "p"}], r"row 1 .* no column 'question' \(it has: prompt\)"),
        ([*numbered(1), {"prompt": "p", "answer": "a"}], r"row 1 .* no column 'question' \(it has: prompt, answer\)"),
        ([*numbered(1), {"question": ["x"], "answer": "a"}], r"row 1 .* must hold messages"),
        ([*numbered(1), {"question": " ", "answer": "a"}], r"row 1 .* must hold text"),
        ([*numbered(1), "\n", '{"question": \n'], r"rows\.jsonl line 3' is not valid JSON"),
        ([*numbered(1), "[1]\n"], r"line 2 must be a JSON object, got list"),
        (["\n"], "has no rows"),
        (numbered(1), "has one row"),
        ([{"question": f"q{i}", "answer": None} for i in range(5)], "have no answer"),
    ],
)
def test_a_bad_file_is_refused_by_row_or_line(tmp_path, rows, said):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=said) as caught:
        train_and_eval_rows(run_config(path))
    assert len(str(caught.value).splitlines()) == 1
    assert "rows.jsonl" in str(caught.value)


def test_line_separators_inside_a_text_do_not_split_a_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a\u2028b\x85c", "answer": "1"}\r\n{"question": "d", "answer": "2"}', "utf-8")
    train, held_out = train_and_eval_rows(run_config(path))
    assert [row.question for row in [*train, *held_out]] == ["a\u2028b\x85c", "d"]


def test_missing_sources_are_named_with_a_remedy(tmp_path, monkeypatch):
    with pytest.raises(MissingPathError, match=r"does not exist: give a \.jsonl file"):
        train_and_eval_rows(run_config(tmp_path / "none.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(DataError, match="not UTF-8"):
        train_and_eval_rows(run_config(tmp_path / "latin.jsonl"))

    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        MissingPathError, match=r"'openai/gsm8k' \(ConnectionError: Couldn't reach the hub long story\): check the name"
    ) as caught:
        train_and_eval_rows(run_config("openai/gsm8k"))
    assert len(str(caught.value).splitlines()) == 1


def test_a_hub_data_set_is_read_by_subset_and_split(monkeypatch):
    import datasets

    asked = []

    def fake(source, name, split):
        asked.append((source, name, split))
        return datasets.Dataset.from_list([{"question": f"{split} {i}", "answer": "1"} for i in range(6)])

    monkeypatch.setattr(datasets, "load_dataset", fake)
    train, held_out = train_and_eval_rows(run_config("openai/gsm8k"))
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    assert [row.question for row in held_out] == [f"test {i}" for i in range(4)]
    assert train[5].id == "openai/gsm8k:5"


def test_a_data_set_folder_with_a_wrong_split_is_a_data_error(tmp_path):
    write_rows(tmp_path / "train.jsonl", numbered(3))
    with pytest.raises(DataError, match=r"split 'none' .*: set data\.subset"):
        train_and_eval_rows(run_config(tmp_path, split="none"))


@pytest.mark.skipif(not GSM8K.is_file(), reason="the GSM8K file is not beside this checkout")
def test_the_gsm8k_file_reads_whole():
    train, held_out = train_and_eval_rows(run_config(GSM8K, eval_prompts=32))
    assert (len(train), len(held_out)) == (1287, 32)
    assert train[0].question.startswith("Janet")
