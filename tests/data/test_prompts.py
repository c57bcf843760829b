import itertools
from collections import Counter

import pytest

from opd_megatron.config import RunConfig
from opd_megatron.data.prompts import PromptDataset, PromptStream, build_train_and_eval
from opd_megatron.data.sources import Example
from opd_megatron.errors import CheckpointError, DataError
from tests.byte_tokenizer import END_OF_TEXT, TURN_END, TURN_START, save_byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def rows(count, length=5):
    return [Example(f"r:{i}", f"{i:0{length}d}", f"{i}") for i in range(count)]


def test_a_chat_prompt_is_the_template_with_the_assistants_turn_opened(tokenizer):
    (prompt,) = PromptDataset([Example("r:0", "2+3?", "5")], tokenizer, system_prompt="Add.")
    turn = [TURN_START, *b"system\nAdd.", TURN_END, *b"\n", TURN_START, *b"user\n2+3?", TURN_END, *b"\n"]
    assert list(prompt.token_ids) == [*turn, TURN_START, *b"assistant\n"]
    assert (prompt.id, prompt.text, prompt.answer) == ("r:0", "2+3?", "5")
    assert prompt.answer_ids == (*b"5", TURN_END)


def test_a_raw_prompt_is_the_text_itself_and_its_answer_ends_with_end_of_sequence(tokenizer):
    (prompt,) = PromptDataset([Example("r:0", "é", None)], tokenizer, template="raw")
    assert prompt.token_ids == tuple("é".encode())
    assert prompt.answer_ids is None
    (prompt,) = PromptDataset([Example("r:0", "q", "ab")], tokenizer, template="raw")
    assert prompt.answer_ids == (*b"ab", END_OF_TEXT)


def test_prompt_and_answer_ids_together_are_what_the_template_makes_of_the_whole_conversation(tokenizer):
    (prompt,) = PromptDataset([Example("r:0", "2+3?", "5")], tokenizer)
    chat = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]
    whole = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    assert [*prompt.token_ids, *prompt.answer_ids] == whole[:-1]  # the template closes with a newline


def test_a_gold_answer_is_cut_where_training_cuts_answers(tokenizer):
    (prompt,) = PromptDataset([Example("r:0", "q", "abcdef")], tokenizer, max_answer_tokens=4)
    assert prompt.answer_ids == tuple(b"abcd")


def test_prompts_over_the_limit_are_named_at_once_or_dropped_and_counted(tokenizer):
    data = [Example("r:0", "short", None), Example("r:1", "x" * 100, None), Example("r:2", "also short", None)]
    length = len(PromptDataset(data, tokenizer)[1].token_ids)
    assert len(PromptDataset(data, tokenizer, max_prompt_tokens=length)) == 3
    with pytest.raises(DataError, match=rf"'r:1' has {length} tokens, over data.max_prompt_tokens={length - 1}"):
        PromptDataset(data, tokenizer, max_prompt_tokens=length - 1)
    kept = PromptDataset(data, tokenizer, max_prompt_tokens=length - 1, drop_long=True)
    assert ([prompt.id for prompt in kept], kept.dropped) == (["r:0", "r:2"], 1)
    with pytest.raises(DataError, match="all 3 prompts are longer"):
        PromptDataset(data, tokenizer, max_prompt_tokens=5, drop_long=True)


def test_empty_data_and_a_missing_template_are_data_errors(tokenizer, tmp_path):
    with pytest.raises(DataError, match="no rows"):
        PromptDataset([], tokenizer)
    plain = save_byte_tokenizer(tmp_path)
    plain.chat_template = None
    with pytest.raises(DataError, match=r"no chat template: set data\.template=raw"):
        PromptDataset(rows(1), plain)


def take(stream, steps):
    return [[prompt.id for prompt in stream.next_prompts()] for _ in range(steps)]


def test_every_epoch_holds_every_prompt_once_in_another_order(tokenizer):
    stream = PromptStream(PromptDataset(rows(10), tokenizer), 4, seed=3)
    ids = list(itertools.chain(*take(stream, 5)))
    assert sorted(ids[:10]) == sorted(ids[10:]) == sorted(f"r:{i}" for i in range(10))
    assert ids[:10] != ids[10:]
    assert take(PromptStream(stream.dataset, 4, seed=3), 5) == take(PromptStream(stream.dataset, 4, seed=3), 5)
    assert take(PromptStream(stream.dataset, 4, seed=3), 5) != take(PromptStream(stream.dataset, 4, seed=4), 5)


@pytest.mark.parametrize("done", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("count", [10, 8, 3])
def test_a_resumed_stream_goes_on_exactly_where_the_other_would_have(tokenizer, done, count):
    dataset = PromptDataset(rows(count), tokenizer)
    stream = PromptStream(dataset, 4, seed=1)
    take(stream, done)
    state = stream.state_dict()
    resumed = PromptStream(dataset, 4, seed=1)
    resumed.load_state_dict(state)
    assert take(resumed, 6) == take(stream, 6)


def test_a_data_set_smaller_than_a_step_still_fills_it(tokenizer):
    stream = PromptStream(PromptDataset(rows(3), tokenizer), 8, seed=0)
    steps = take(stream, 3)
    assert [len(step) for step in steps] == [8, 8, 8]
    assert set(Counter(itertools.chain(*steps)).values()) == {8}


def test_a_cursor_of_another_data_set_or_seed_is_refused(tokenizer):
    state = PromptStream(PromptDataset(rows(10), tokenizer), 4, seed=1).state_dict()
    with pytest.raises(CheckpointError, match="rows=10, this run has 9"):
        PromptStream(PromptDataset(rows(9), tokenizer), 4, seed=1).load_state_dict(state)
    with pytest.raises(CheckpointError, match="seed=1, this run has 2"):
        PromptStream(PromptDataset(rows(10), tokenizer), 4, seed=2).load_state_dict(state)


def test_training_stream_and_held_out_prompts_are_built_from_the_configuration(tokenizer):
    config = RunConfig.model_validate(
        {
            "teachers": [{"path": "t"}],
            "data": {"limit": 60, "max_prompt_tokens": 2000},
            "rollout": {"prompts_per_step": 5, "max_new_tokens": 30},
            "evaluation": {"prompts": 6},
        }
    )
    stream, held_out = build_train_and_eval(config, tokenizer)
    assert len(stream.next_prompts()) == 5
    assert len(held_out) == 6
    assert all(len(prompt.answer_ids) <= 30 for prompt in held_out)
    config.evaluation.every = 0
    assert build_train_and_eval(config, tokenizer)[1] == []
