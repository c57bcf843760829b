"""How a step's requests are dealt to the engines of a fleet."""

from __future__ import annotations

import random

import pytest

from opd_megatron.rollout.shares import share_out
from opd_megatron.types import Prompt, SampleRequest


def _requests(lengths: list[int], answers: int) -> list[SampleRequest]:
    return [
        SampleRequest(Prompt(str(group), tuple(range(length)), ""), seed=group * answers + answer, group=group)
        for group, length in enumerate(lengths)
        for answer in range(answers)
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 13])
@pytest.mark.parametrize("answers", [1, 4, 7])
@pytest.mark.parametrize("prompts", [1, 3, 8, 16])
def test_every_request_is_dealt_once_and_evenly(count: int, answers: int, prompts: int) -> None:
    generator = random.Random(0)
    requests = _requests([generator.randint(1, 500) for _ in range(prompts)], answers)
    shares = share_out(requests, count)
    assert sorted(i for share in shares for i in share) == list(range(len(requests)))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert share_out(requests, count) == shares


def test_the_answers_to_one_prompt_stay_together_where_that_is_even() -> None:
    requests = _requests([5, 9, 2, 7, 3, 3, 8, 1], answers=4)
    for share in share_out(requests, 4):
        assert len({requests[i].group for i in share}) == 2


def test_the_tokens_of_prompts_are_spread() -> None:
    generator = random.Random(1)
    requests = _requests([generator.choice([10, 20, 400]) for _ in range(64)], answers=1)
    tokens = [sum(len(requests[i].prompt.token_ids) for i in share) for share in share_out(requests, 4)]
    assert max(tokens) <= 1.1 * min(tokens)
