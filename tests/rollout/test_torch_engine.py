"""The plain engine: the reference the other rooms' tests rely on, so it is held to transformers itself."""

import math

import pytest
import torch

from opd_megatron.errors import RolloutError
from opd_megatron.rollout.base import RolloutEngine
from opd_megatron.rollout.torch_engine import TorchEngine
from opd_megatron.types import Sampling
from tests.rollout.tiny import (
    VOCAB,
    buckets_of,
    ids_of,
    prompts_of,
    reference_logprobs,
    requests_of,
    save_config,
    tiny_model,
)


@pytest.fixture
def engine(tmp_path):
    engine = TorchEngine(save_config(tmp_path), max_model_len=64)
    engine.wait_ready()
    return engine


def test_is_a_rollout_engine(engine):
    assert isinstance(engine, RolloutEngine)


def test_sampling_before_the_first_weights_is_refused(engine):
    with pytest.raises(RolloutError, match="no weights yet"):
        engine.generate(requests_of(prompts_of(1, 5)), Sampling(max_new_tokens=2))


def test_logprobs_are_those_of_the_synced_weights(engine):
    model = tiny_model(seed=3)
    engine.update_weights(buckets_of(model), version=7)
    ids = list(prompts_of(1, 40)[0].token_ids)
    assert engine.token_logprobs([ids])[0] == pytest.approx(reference_logprobs(model, ids), abs=1e-4)


def test_sampled_logprobs_are_under_the_sampling_temperature(engine):
    model = tiny_model(seed=3)
    engine.update_weights(buckets_of(model), version=7)
    for rollout in engine.generate(requests_of(prompts_of(2, 20), seed=1), Sampling(max_new_tokens=8, temperature=0.6)):
        ids = [*rollout.prompt.token_ids, *rollout.response_ids.tolist()]
        assert rollout.policy_version == 7
        assert rollout.logprobs.tolist() == pytest.approx(reference_logprobs(model, ids, 0.6)[-8:], abs=1e-4)


def test_a_seed_repeats_the_answers_and_sequences_differ(engine):
    engine.update_weights(buckets_of(tiny_model(seed=3)), version=0)
    prompt = prompts_of(1, 20)[0]
    first, second = (
        engine.generate(requests_of([prompt, prompt], seed=5), Sampling(max_new_tokens=12)) for _ in range(2)
    )
    assert ids_of(first) == ids_of(second)
    assert all(torch.equal(one.logprobs, other.logprobs) for one, other in zip(first, second, strict=True))
    assert ids_of(first)[0] != ids_of(first)[1]


def test_an_answer_depends_neither_on_the_order_nor_on_the_company_of_its_request(engine):
    engine.update_weights(buckets_of(tiny_model(seed=3)), version=0)
    requests, sampling = requests_of(prompts_of(4, 20), seed=5), Sampling(max_new_tokens=12)
    together = engine.generate(requests, sampling)
    assert [rollout.group for rollout in together] == [0, 1, 2, 3]
    apart = [engine.generate([request], sampling)[0] for request in reversed(requests)]
    assert ids_of(apart) == ids_of(together)[::-1]


def test_an_answer_ends_with_the_stop_token(engine):
    engine.update_weights(buckets_of(tiny_model(seed=3)), version=0)
    every_token = tuple(range(VOCAB))
    (rollout,) = engine.generate(
        requests_of(prompts_of(1, 5), seed=0), Sampling(max_new_tokens=9, stop_token_ids=every_token)
    )
    assert (len(rollout.response_ids), rollout.finish_reason) == (1, "stop")


@pytest.mark.parametrize("sampling", [Sampling(8, top_k=1), Sampling(8, top_p=1e-6)])
def test_a_policy_of_one_token_has_logprob_zero_and_is_greedy(engine, sampling):
    engine.update_weights(buckets_of(tiny_model(seed=3)), version=0)
    (only,) = engine.generate(requests_of(prompts_of(1, 5), seed=0), sampling)
    (greedy,) = engine.generate(requests_of(prompts_of(1, 5)), Sampling(8, temperature=0.0))
    assert ids_of([only]) == ids_of([greedy])
    assert all(math.isclose(logprob, 0.0, abs_tol=1e-6) for logprob in only.logprobs.tolist())


def test_a_stream_that_does_not_cover_the_model_is_refused(engine):
    stream = list(buckets_of(tiny_model(seed=3)))
    with pytest.raises(RolloutError, match="lack"):
        engine.update_weights(stream[:-1], version=1)
    assert engine.policy_version == -1


def test_a_prompt_over_the_context_names_the_lengths(engine):
    engine.update_weights(buckets_of(tiny_model(seed=3)), version=0)
    with pytest.raises(RolloutError, match=r"60 tokens \+ max_new_tokens=5 .*max_model_len=64"):
        engine.generate(requests_of(prompts_of(1, 60)), Sampling(max_new_tokens=5))
