import torch

from opd_megatron.data.transcript import readable_sample
from opd_megatron.types import Prompt, Rollout
from tests.byte_tokenizer import TURN_END, save_byte_tokenizer


def test_a_sample_shows_question_answer_gold_and_how_it_ended(tmp_path):
    tokenizer = save_byte_tokenizer(tmp_path)
    prompt = Prompt("gsm:3", (1,), "What is\n2+3?", "5")
    answer, logprobs = torch.tensor([*b"[5]", TURN_END]), torch.tensor([-1.0, -2.0, -0.5, -0.5])
    text = readable_sample(Rollout(prompt, answer, logprobs, 7, "stop"), tokenizer)
    assert text.splitlines() == [
        "gsm:3 | policy 7 | 4 tokens, stop | 1.00 nats/token",
        "  question: What is",
        "            2+3?",
        "  student:  [5]<|im_end|>",
        "  gold:     5",
    ]


def test_long_and_unprintable_answers_are_tamed(tmp_path):
    tokenizer = save_byte_tokenizer(tmp_path)
    answer = torch.tensor([*b"\x1b[31m", *b"x" * 500, *b"end"])
    text = readable_sample(
        Rollout(Prompt("p", (1,), "q"), answer, torch.zeros(len(answer)), 0), tokenizer, max_chars=60
    ).splitlines()[2]
    assert "\x1b" not in text
    assert text.endswith("end")
    assert " [...] " in text
    assert len(text) == len("  student:  ") + 60
    assert "gold" not in text


def test_an_empty_answer_is_shown_as_such(tmp_path):
    text = readable_sample(
        Rollout(Prompt("p", (1,), "q"), torch.tensor([], dtype=torch.int64), torch.tensor([]), 0),
        save_byte_tokenizer(tmp_path),
    )
    assert "0 tokens, length | 0.00 nats/token" in text
