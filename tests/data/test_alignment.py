"""Two tokenizations of an answer, laid side by side: against a reference that compares all prefixes of the text."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd_megatron.data.alignment import TokenizerPair, aligned_tokens
from opd_megatron.data.token_bytes import TokenBytes
from opd_megatron.errors import TokenizerMismatchError
from tests.byte_tokenizer import save_byte_tokenizer
from tests.other_tokenizers import END, save_bpe_tokenizer

WORDS = [
    "the cat",
    " naïve",
    " café",
    "数学",
    "楽しい",
    " 🙂",
    "🙃",
    " 42",
    "4 2",
    "\n\n",
    " plus ",
    "é",
    "e\u0301",
    "x" * 9,
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedTokenizerFast]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "sums": save_bpe_tokenizer(folder / "sums", "sums", 350, specials=("<think>",)),
        "words": save_bpe_tokenizer(folder / "words", "words", 420, specials=("<think>", "<tool>")),
        "pieces": save_bpe_tokenizer(folder / "pieces", "words", 600, sentencepiece=True),
        "bytes": save_byte_tokenizer(folder / "bytes"),
    }


PAIRS = list(itertools.permutations(("sums", "words", "pieces", "bytes"), 2))


def _pair(tokenizers: dict[str, PreTrainedTokenizerFast], student: str, teacher: str) -> TokenizerPair:
    mine, other = tokenizers[student], tokenizers[teacher]
    ends = mine.eos_token_id, other.eos_token_id
    return TokenizerPair(mine, other, stops=(ends[0],), ends=ends, names=(student, teacher))


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def _text(bytes_of: TokenBytes, ids: list[int]) -> list[bytes]:
    """The bytes before each token and after the last, with a mark for every special token."""
    found, done = [b""], b""
    for token_id in ids:
        done += bytes_of.of.get(token_id, b"\xff")
        found.append(done)
    return found


def _expected(student: list[bytes], teacher: list[bytes]) -> tuple[list[int], list[int], list[int]]:
    """Rows and spans from the prefixes of both."""
    rows = [teacher[:-1].index(prefix) if prefix in teacher[:-1] else -1 for prefix in student[:-1]]
    common = [prefix for prefix in student[1:] if prefix in teacher[1:]]

    def spans(prefixes: list[bytes]) -> list[int]:
        return [
            next((n for n, end in enumerate(common) if len(end) >= len(prefix)), -1) for prefix in prefixes[1:]
        ]  # fmt: skip

    return rows, spans(student), spans(teacher)


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_places_and_spans_are_those_of_all_common_prefixes(tokenizers: Any, student: str, teacher: str) -> None:
    pair, choose = _pair(tokenizers, student, teacher), random.Random(student + teacher)
    mine, other = (TokenBytes(tokenizers[name], name) for name in (student, teacher))
    for _ in range(30):
        text = "".join(choose.choices(WORDS, k=choose.randint(1, 8)))
        ids = _ids(tokenizers[student], text)
        if choose.random() < 0.5:
            ids.append(tokenizers[student].eos_token_id)
        found = pair.translated(ids)
        before = _text(other, found.ids)
        if teacher == "pieces":  # every text begins with a space of SentencePiece's own
            ours = _text(mine, ids)
            before = [prefix if ours[-1].startswith(prefix) else prefix.removeprefix(b" ") for prefix in before]
        rows, spans, of_teacher = _expected(_text(mine, ids), before)
        assert before[-1] == _text(mine, ids)[-1], "the teacher reads the very bytes of the student"
        assert found.rows.tolist() == rows
        assert found.spans.tolist() == spans
        assert found.of_teacher.tolist() == of_teacher
        assert min(spans) >= 0


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_shared_tokens_stand_for_the_same_bytes_once(tokenizers: Any, student: str, teacher: str) -> None:
    pair = _pair(tokenizers, student, teacher)
    mine, other = (TokenBytes(tokenizers[name], name) for name in (student, teacher))
    ours, theirs = pair.shared
    assert len(set(ours)) == len(ours) == len(theirs) == len(set(theirs)) > 200
    assert ours == sorted(ours)
    for a, b in zip(ours, theirs, strict=True):
        assert mine.of.get(a, b"special") == other.of.get(b, b"special")
    assert (tokenizers[student].eos_token_id, tokenizers[teacher].eos_token_id) in zip(ours, theirs, strict=True)


@pytest.mark.parametrize("teacher", ["words", "pieces"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_half_a_character_at_a_cut_is_not_scored(tokenizers: Any, teacher: str, cut: int) -> None:
    pair = _pair(tokenizers, "bytes", teacher)
    found = pair.translated([*b"ok ", *"🙂".encode()[:cut]])
    assert found.spans.tolist()[3:] == [-1] * cut
    assert min(found.spans[:3]) >= 0
    assert found.rows[3] == -1, "after it the teacher has no token"
    assert min(pair.translated([*b"ok ", *"🙂".encode()]).spans) >= 0


def test_bytes_that_are_no_text_are_read_as_bytes(tokenizers: Any) -> None:
    student = tokenizers["bytes"]
    for teacher, token in (("words", "ÿ"), ("pieces", "<0xFF>")):
        pair = TokenizerPair(student, tokenizers[teacher], stops=(256,), ends=(256, tokenizers[teacher].eos_token_id))
        found = pair.translated([*b"a\xffb", 256])
        assert token in tokenizers[teacher].convert_ids_to_tokens(found.ids)
        assert min(found.spans) >= 0
        assert tokenizers[teacher].convert_ids_to_tokens(found.ids)[-1] == END


def test_special_tokens_meet_by_name_and_others_are_read_as_their_text(tokenizers: Any) -> None:
    student, teacher = tokenizers["words"], tokenizers["sums"]
    pair = _pair(tokenizers, "words", "sums")
    think, tool = (student.convert_tokens_to_ids(name) for name in ("<think>", "<tool>"))
    found = pair.translated([think, *_ids(student, "the"), tool, *_ids(student, " cat"), student.eos_token_id])
    tokens = teacher.convert_ids_to_tokens(found.ids)
    assert tokens[0] == "<think>"
    assert "".join(tokens[1:-1]) == "the<tool>Ġcat"
    assert tokens[-1] == END
    assert min(found.spans) >= 0
    written = pair.translated([*_ids(student, "a")[:1], *_ids(tokenizers["words"], "<thi"), *_ids(student, "nk>")])
    assert teacher.convert_tokens_to_ids("<think>") not in written.ids, "text that looks like a special token is text"


def test_an_end_of_answer_meets_the_others(tokenizers: Any) -> None:
    student = tokenizers["bytes"]
    pair = TokenizerPair(student, tokenizers["words"], stops=(256, 258), ends=(258, tokenizers["words"].eos_token_id))
    for end in (256, 258):
        found = pair.translated([*b"ok", end])
        assert tokenizers["words"].convert_ids_to_tokens(found.ids)[-1] == END, "either of the student's stops"
    assert (258, tokenizers["words"].eos_token_id) in zip(*pair.shared, strict=True)
    assert 256 not in pair.shared[0], "in one pair at most"


def test_the_teachers_context_bounds_its_answer(tokenizers: Any) -> None:
    pair = _pair(tokenizers, "sums", "words")
    ids = _ids(tokenizers["sums"], "It is what it is, and that is all there is to it.")
    whole, cut = pair.translated(ids), pair.translated(ids, 3)
    assert cut.ids == whole.ids[:3]
    assert cut.spans.tolist()[-1] == -1
    assert cut.rows.max() <= 2


def test_an_answer_without_anything_in_common_still_has_a_token(tokenizers: Any) -> None:
    pair = _pair(tokenizers, "bytes", "words")
    found = pair.translated([*"🙂".encode()[:2]])
    assert len(found.ids) == 1
    assert found.spans.tolist() == found.rows.tolist() == [-1, -1]
    assert found.of_teacher.tolist() == [-1]


def test_the_answers_of_a_micro_batch_are_numbered_through(tokenizers: Any) -> None:
    pair = _pair(tokenizers, "sums", "words")
    each = [pair.translated(_ids(tokenizers["sums"], text)) for text in ("It is", "the answer", "🙂")]
    joined = aligned_tokens(each, torch.device("cpu"))
    rows = spans = 0
    for n, one in enumerate(each):
        begin = sum(len(other.rows) for other in each[:n])
        mine = slice(begin, begin + len(one.rows))
        assert joined.rows[mine].tolist() == [row + rows if row >= 0 else -1 for row in one.rows.tolist()]
        assert joined.spans[mine].tolist() == [span + spans if span >= 0 else -1 for span in one.spans.tolist()]
        rows, spans = rows + len(one.ids), spans + max(one.spans) + 1
    assert joined.targets.tolist() == [token for one in each for token in one.ids]


def test_tokens_without_bytes_are_refused(tmp_path: Path, tokenizers: Any) -> None:
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "Hello": 1, ",": 2, "world": 3}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    with pytest.raises(TokenizerMismatchError, match=r"neither byte-level BPE nor SentencePiece.*one tokenizer family"):
        TokenBytes(words, "teacher 't'")
