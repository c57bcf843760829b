"""The plain engine: the reference the other rooms' tests rely on, so it is held to transformers itself."""

import math

import pytest

from opd_megatron.errors import RolloutError
from opd_megatron.rollout.base import RolloutEngine
from opd_megatron.rollout.torch_engine import TorchEngine
from opd_megatron.types import Sampling
from tests.rollout.tiny import VOCAB, buckets_of, prompts_of, reference_logprobs, save_config, tiny_model


@pytest.fixture
def engine(tmp_path):
    engine = TorchEngine(save_config(tmp_path), max_model_len=64)
    engine.start()
    return engine


def test_is_a_rollout_engine(engine):
    assert isinstance(engine, RolloutEngine)


def test_sampling_before_the_first_weights_is_refused(engine):
    with pytest.raises(RolloutError, match="no weights yet"):
        engine.generate(prompts_of(1, 5), Sampling(max_new_tokens=2))


def test_logprobs_are_those_of_the_pushed_weights(engine):
    model = tiny_model(seed=3)
    engine.update_weights(buckets_of(model), version=7)
    ids = list(prompts_of(1, 40)[0].token_ids)
    assert engine.token_logprobs([ids])[0] == pytest.approx(reference_logprobs(model, ids), abs=1e-4)


def test_sampled_logprobs_are_under_the_sampling_temperature(engine):
    model = tiny_model(seed=3)
    engine.update_weights(buckets_of(model), version=7)
    for rollout in engine.generate(prompts_of(2, 20), Sampling(max_new_tokens=8, temperature=0.6, seed=1)):
        ids = [*rollout.prompt.token_ids, *rollout.response_ids]
        assert rollout.policy_version == 7
        assert rollout.logprobs == pytest.approx(reference_logprobs(model, ids, 0.6)[-8:], abs=1e-4)


def test_a_seed_repeats_the_answers_and_sequences_differ(engine):
    engine.update_weights(buckets_of(tiny_model(seed=3)), version=0)
    prompt = prompts_of(1, 20)[0]
    first, second = (engine.generate([prompt, prompt], Sampling(max_new_tokens=12, seed=5)) for _ in range(2))
    assert first == second
    assert first[0].response_ids != first[1].response_ids


def test_an_answer_ends_with_the_stop_token(engine):
    engine.update_weights(buckets_of(tiny_model(seed=3)), version=0)
    every_token = tuple(range(VOCAB))
    (rollout,) = engine.generate(prompts_of(1, 5), Sampling(max_new_tokens=9, seed=0, stop_token_ids=every_token))
    assert (len(rollout.response_ids), rollout.finish_reason) == (1, "stop")


@pytest.mark.parametrize("sampling", [Sampling(8, top_k=1, seed=0), Sampling(8, top_p=1e-6, seed=0)])
def test_a_policy_of_one_token_has_logprob_zero_and_is_greedy(engine, sampling):
    engine.update_weights(buckets_of(tiny_model(seed=3)), version=0)
    (only,) = engine.generate(prompts_of(1, 5), sampling)
    (greedy,) = engine.generate(prompts_of(1, 5), Sampling(8, temperature=0.0))
    assert only.response_ids == greedy.response_ids
    assert all(math.isclose(logprob, 0.0, abs_tol=1e-6) for logprob in only.logprobs)


def test_a_stream_that_does_not_cover_the_model_is_refused(engine):
    stream = list(buckets_of(tiny_model(seed=3)))
    with pytest.raises(RolloutError, match="lack"):
        engine.update_weights(stream[:-1], version=1)
    assert engine.policy_version == -1


def test_a_prompt_over_the_context_names_the_lengths(engine):
    engine.update_weights(buckets_of(tiny_model(seed=3)), version=0)
    with pytest.raises(RolloutError, match=r"60 tokens \+ max_new_tokens=5 .*max_model_len=64"):
        engine.generate(prompts_of(1, 60), Sampling(max_new_tokens=5))
