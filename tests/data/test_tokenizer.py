import json
import shutil

import pytest
from transformers import AutoTokenizer

from opd_megatron.data.template import ChatTemplate
from opd_megatron.data.tokenizer import check_same_tokenizer, load_tokenizer, stop_token_ids
from opd_megatron.errors import ConfigError, DataError, MissingPathError, TokenizerMismatchError
from tests.byte_tokenizer import END_OF_TEXT, TURN_END, save_byte_tokenizer


@pytest.fixture
def tokenizer(tmp_path):
    return save_byte_tokenizer(tmp_path / "tokenizer")


def with_tokens(tokenizer, folder, changes=None, extra=()):
    """A copy of `tokenizer` in which ids of `changes` mean something else and `extra` tokens follow."""
    tokenizer.save_pretrained(folder)
    tree = json.loads((folder / "tokenizer.json").read_text())
    for old, new in (changes or {}).items():
        tree["model"]["vocab"][new] = tree["model"]["vocab"].pop(old)
        for token in tree["added_tokens"]:
            token["content"] = new if token["content"] == old else token["content"]
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    copy = AutoTokenizer.from_pretrained(folder)
    copy.add_tokens(list(extra))
    return copy


def test_a_tokenizer_survives_saving_and_loading(tokenizer, tmp_path):
    loaded = load_tokenizer(tmp_path / "tokenizer")
    assert loaded.encode("né 1<|im_end|>") == [*"né 1".encode(), TURN_END]
    check_same_tokenizer(tokenizer, loaded)


def test_a_path_without_a_tokenizer_is_one_line_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text('{"model_type": "llama"}')
    for path in (tmp_path / "none", tmp_path / "empty", "a/b/none", "models/nowhere"):
        with pytest.raises(MissingPathError) as caught:
            load_tokenizer(path)
        assert str(path) in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def test_one_id_with_another_meaning_is_named_with_both_tokens(tokenizer, tmp_path):
    other = with_tokens(tokenizer, tmp_path / "other", changes={"a": "zz", "b": "yy"})
    with pytest.raises(TokenizerMismatchError, match=r"token id 97 is 'a' to the student \(S\) but 'zz' to the teach"):
        check_same_tokenizer(tokenizer, other, "S", "T")


def test_trailing_ids_kept_free_may_be_missing_on_either_side(tokenizer, tmp_path):
    longer = with_tokens(tokenizer, tmp_path / "other", extra=["<|reserved_special_token_7|>", "<unused3>"])
    check_same_tokenizer(tokenizer, longer)
    check_same_tokenizer(longer, tokenizer)


def test_a_trailing_token_with_a_meaning_may_not_be_missing_on_either_side(tokenizer, tmp_path):
    longer = with_tokens(tokenizer, tmp_path / "other", extra=["<unused3>", "<think>"])
    with pytest.raises(TokenizerMismatchError, match=r"273 is unknown to the student .* but '<think>' to the teacher"):
        check_same_tokenizer(tokenizer, longer)
    with pytest.raises(TokenizerMismatchError, match=r"273 is '<think>' to the student .* but unknown to the teacher"):
        check_same_tokenizer(longer, tokenizer)


def test_a_reserved_id_that_a_later_release_named_passes_with_a_note(tokenizer, tmp_path):
    other = with_tokens(tokenizer, tmp_path / "other", changes={"<|reserved_3|>": "<|finetune_pad|>"})
    for pair in ((tokenizer, other), (other, tokenizer)):
        (note,) = check_same_tokenizer(*pair)
        assert "token id 262 is" in note
    plain = with_tokens(tokenizer, tmp_path / "plain", changes={"<|reserved_3|>": "zebra"})
    with pytest.raises(TokenizerMismatchError, match="token id 262"):
        check_same_tokenizer(tokenizer, plain)


def test_a_special_token_that_one_lacks_is_let_pass_when_asked_for(tokenizer, tmp_path):
    longer = with_tokens(tokenizer, tmp_path / "other", extra=["<think>"])
    with pytest.raises(TokenizerMismatchError, match=r"set data\.allow_missing_tokens=true"):
        check_same_tokenizer(tokenizer, longer)
    (note,) = check_same_tokenizer(tokenizer, longer, allow_missing=True)
    assert "'<think>' to the teacher" in note
    word = with_tokens(tokenizer, tmp_path / "word", extra=["zebra"])
    with pytest.raises(TokenizerMismatchError, match="token id 272"):
        check_same_tokenizer(tokenizer, word, allow_missing=True)


def test_stop_tokens_join_tokenizer_generation_config_and_end_of_turn(tokenizer, tmp_path):
    assert ChatTemplate(tokenizer).end_of_turn_id() == TURN_END
    assert stop_token_ids(ChatTemplate(tokenizer)) == (END_OF_TEXT, TURN_END)
    for listed, expected in (([2, 300], (2, END_OF_TEXT, TURN_END, 300)), (7, (7, END_OF_TEXT, TURN_END))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
        assert stop_token_ids(ChatTemplate(tokenizer), tmp_path) == expected


def test_without_a_chat_template_only_end_of_sequence_stops(tokenizer):
    tokenizer.chat_template = None
    assert ChatTemplate(tokenizer).end_of_turn_id() == END_OF_TEXT
    assert stop_token_ids(ChatTemplate(tokenizer)) == (END_OF_TEXT,)


def test_a_template_that_ends_turns_with_plain_text_falls_back_to_end_of_sequence(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    assert ChatTemplate(tokenizer).end_of_turn_id() == END_OF_TEXT


def test_a_template_that_refuses_is_a_data_error(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(DataError, match="no such role"):
        ChatTemplate(tokenizer).prompt([("user", "hello")])
    assert ChatTemplate(tokenizer).end_of_turn_id() == END_OF_TEXT


@pytest.mark.parametrize("content", ["{", "[1]", '{"eos_token_id": "x"}', '{"eos_token_id": [1, true]}', "\xff"])
def test_a_damaged_generation_config_is_one_line(tokenizer, tmp_path, content):
    (tmp_path / "generation_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"generation_config\.json") as caught:
        stop_token_ids(ChatTemplate(tokenizer), tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_remote_code_is_not_run_unless_asked_for(tokenizer, tmp_path):
    folder = tmp_path / "custom"
    shutil.copytree(tmp_path / "tokenizer", folder)
    tree = json.loads((folder / "tokenizer_config.json").read_text())
    tree |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tree))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(MissingPathError, match="trust_remote_code=true if you have read"):
        load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()
