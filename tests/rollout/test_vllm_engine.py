"""Real vLLM, one start for the module: what it samples from is exactly what was synced last.

Prompts are longer than 200 tokens and sampled before and after each update: a prefix cache that survived the
update would show in them, and only in them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import signal
import threading

import pytest
import torch

from opd_megatron.errors import EngineDiedError, RolloutError
from opd_megatron.rollout import RolloutClient
from opd_megatron.rollout.base import RolloutEngine
from opd_megatron.rollout.vllm_engine import VLLMEngine, VLLMOptions
from opd_megatron.types import Rollout, Sampling
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

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

PROMPTS = prompts_of(3, 230)
REQUESTS = requests_of(PROMPTS, seed=11)
SAMPLING = Sampling(max_new_tokens=12)


def make_engine(folder, tied: bool = True, **options) -> VLLMEngine:
    options = {"dtype": "fp32", "kv_cache_gib": 0.1, "log_path": folder / "rollout.log"} | options
    return VLLMEngine(VLLMOptions(model_dir=save_config(folder / "model", tied), max_model_len=256, **options))


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    engine = make_engine(tmp_path_factory.mktemp("vllm"))
    engine.wait_ready()
    yield engine
    engine.close()


def assert_sampled_from(model, rollouts: list[Rollout], temperature: float = 1.0, tolerance: float = 1e-4) -> None:
    """The logprobs that came with the samples are those of `model` under transformers."""
    for rollout in rollouts:
        ids = [*rollout.prompt.token_ids, *rollout.response_ids.tolist()]
        expected = reference_logprobs(model, ids, temperature)[-len(rollout.response_ids) :]
        assert rollout.logprobs.tolist() == pytest.approx(expected, abs=tolerance)


def test_there_is_nothing_to_sample_from_before_the_first_sync(engine):
    assert isinstance(engine, RolloutEngine)
    assert engine.policy_version == -1
    with pytest.raises(RolloutError, match="no weights yet"):
        engine.generate(REQUESTS, SAMPLING)


def test_an_engine_says_how_far_it_is_while_it_samples(engine, monkeypatch):
    engine.update_weights(buckets_of(tiny_model(seed=0)), 0)
    monkeypatch.setattr(engine._child, "_timeout", 4.0)
    seen, done = [], threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            seen.append(engine.answered)

    watcher = threading.Thread(target=watch)
    watcher.start()
    # Short and long ones, so that some are done long before others.
    requests = requests_of(prompts_of(64, 8), seed=3)
    rollouts = engine.generate(requests, Sampling(max_new_tokens=240, stop_token_ids=tuple(range(2))))
    done.set()
    watcher.join()
    assert len(rollouts) == 64
    assert seen == sorted(seen)
    assert 0 < max(seen) <= 64


def test_after_each_sync_long_prompts_are_continued_by_the_new_weights(engine, monkeypatch):
    for version, maps_memory in ((0, False), (1, True)):
        monkeypatch.setattr(engine, "options", dataclasses.replace(engine.options, maps_memory=maps_memory))
        model = tiny_model(seed=version)
        engine.update_weights(buckets_of(model), version)
        rollouts = engine.generate(REQUESTS, SAMPLING)
        assert [r.policy_version for r in rollouts] == [version] * 3
        assert_sampled_from(model, rollouts)


def test_a_sync_of_a_changed_embedding_changes_the_tied_head(engine):
    model = tiny_model(seed=2)
    engine.update_weights(buckets_of(model), 2)
    before = engine.generate(REQUESTS, SAMPLING)
    model.lm_head.weight.data.copy_(model.lm_head.weight.data.roll(1, dims=0))
    engine.update_weights(buckets_of(model), 3)
    after = engine.generate(REQUESTS, SAMPLING)
    assert_sampled_from(model, after)
    assert before[0].logprobs.tolist() != after[0].logprobs.tolist()


def test_logprobs_are_under_the_sampling_temperature(engine):
    model = tiny_model(seed=4)
    engine.update_weights(buckets_of(model), 4)
    rollouts = engine.generate(requests_of(PROMPTS, seed=1), Sampling(max_new_tokens=12, temperature=0.7))
    assert_sampled_from(model, rollouts, temperature=0.7)


def test_given_sequences_are_scored_at_temperature_one(engine):
    model = tiny_model(seed=5)
    engine.update_weights(buckets_of(model), 5)
    sequences = [list(p.token_ids) for p in prompts_of(2, 240, seed=9)] + [[3, 4]]
    for ids, logprobs in zip(sequences, engine.token_logprobs(sequences), strict=True):
        assert logprobs == pytest.approx(reference_logprobs(model, ids), abs=1e-4)


def test_a_seed_repeats_the_answers_and_equal_prompts_get_different_ones(engine):
    engine.update_weights(buckets_of(tiny_model(seed=6)), 6)
    requests = requests_of([PROMPTS[0]] * 3, seed=11)
    first = engine.generate(requests, SAMPLING)
    second = engine.generate(requests[:1], SAMPLING) + engine.generate(requests[:0:-1], SAMPLING)[::-1]
    assert ids_of(first) == ids_of(second), "an answer depends neither on the order nor on the company of its request"
    assert len(set(map(tuple, ids_of(first)))) == 3


def test_an_answer_ends_with_its_stop_token_and_with_nothing_else(engine):
    engine.update_weights(buckets_of(tiny_model(seed=6)), 6)
    stopped = engine.generate(
        requests_of(PROMPTS, seed=1), Sampling(max_new_tokens=12, stop_token_ids=tuple(range(VOCAB)))
    )
    assert {(len(r.response_ids), len(r.logprobs), r.finish_reason) for r in stopped} == {(1, 1, "stop")}
    free = engine.generate(requests_of(PROMPTS, seed=1), Sampling(max_new_tokens=12))
    assert {(len(r.response_ids), r.finish_reason) for r in free} == {(12, "length")}


def test_a_prompt_over_the_context_names_the_lengths_and_harms_nothing(engine):
    engine.update_weights(buckets_of(tiny_model(seed=6)), 6)
    with pytest.raises(RolloutError, match=r"'p0': 230 tokens \+ max_new_tokens=40 .*max_model_len=256"):
        engine.generate(requests_of(PROMPTS), Sampling(max_new_tokens=40))
    assert len(engine.generate(REQUESTS, SAMPLING)) == 3


def test_a_request_that_vllm_refuses_is_an_error_at_once_and_harms_nothing(engine):
    """A stop id beyond the vocabulary: it was taken for a dead engine, which was restarted again and again."""
    engine.update_weights(buckets_of(tiny_model(seed=6)), 6)
    pid = engine.pid
    with pytest.raises(RolloutError, match="vLLM refuses the request") as refused:
        engine.generate(REQUESTS, Sampling(max_new_tokens=12, stop_token_ids=(10**9,)))
    assert not isinstance(refused.value, EngineDiedError)
    assert engine.pid == pid
    assert len(engine.generate(REQUESTS, SAMPLING)) == 3


@pytest.mark.parametrize("lost", ["model.embed_tokens", "layers.1.self_attn.k_proj", "model.norm"])
def test_a_missing_tensor_is_refused_and_the_next_full_sync_repairs_it(engine, lost):
    model = tiny_model(seed=7)
    stream = [[pair for pair in bucket if lost not in pair[0]] for bucket in buckets_of(model)]
    with pytest.raises(RolloutError, match=r"version 7: no or not enough values for .*must hold every tensor"):
        engine.update_weights(stream, 7)
    with pytest.raises(RolloutError, match="no weights yet"):
        engine.generate(REQUESTS, SAMPLING)
    engine.update_weights(buckets_of(model), 8)
    assert_sampled_from(model, engine.generate(REQUESTS, SAMPLING))


def test_a_trainer_that_fails_in_the_middle_of_a_sync_leaves_the_engine_usable(engine):
    model = tiny_model(seed=8)

    def failing():
        yield from list(buckets_of(model))[:2]
        raise KeyError("the trainer's own")

    with pytest.raises(KeyError):
        engine.update_weights(failing(), 8)
    engine.update_weights(buckets_of(model), 9)
    assert_sampled_from(model, engine.generate(REQUESTS, SAMPLING))


def test_a_killed_engine_is_an_error_for_its_user_and_restarted_by_the_client(engine):
    model = tiny_model(seed=10)
    engine.update_weights(buckets_of(model), 10)
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineDiedError, match="exit code -9"):
        engine.generate(REQUESTS, SAMPLING)

    events: list[str] = []
    impatient, patient = (
        RolloutClient({0: engine}, 1, lambda: buckets_of(model), None, max_restarts=n, on_event=events.append)
        for n in (0, 1)
    )
    with pytest.raises(EngineDiedError, match=r"died 1 times in a row.*max_restarts=0.*exit code -9"):
        impatient.sync_weights(10)
    assert events == []
    patient.sync_weights(11)
    assert_sampled_from(model, patient.sample(REQUESTS, SAMPLING))
    assert len(events) == 1
    assert "restarting 1/1" in events[0]


def test_a_tensor_of_the_wrong_shape_is_refused_and_ends_the_engine(engine):
    name, tensor = next(buckets_of(tiny_model(seed=7)))[0]
    with pytest.raises(RolloutError, match="cannot use the weights of version 7"):
        engine.update_weights([[(name, tensor[:-1])]], 7)
    assert engine.pid is None
    with pytest.raises(RolloutError, match="not running: call wait_ready first"):
        engine.update_weights(buckets_of(tiny_model(seed=7)), 7)


def test_banned_ids_are_never_drawn_and_a_head_that_config_json_denies_is_used(tmp_path):
    banned = torch.arange(0, VOCAB, 2)
    engine = make_engine(tmp_path, banned_ids=tuple(banned.tolist()), overrides={"tie_word_embeddings": False})
    try:
        engine.wait_ready()
        model = tiny_model(seed=3, tied=False)
        engine.update_weights(buckets_of(model), 0)
        for rollout in engine.generate(REQUESTS, SAMPLING):
            sampled = rollout.response_ids
            assert not set(sampled.tolist()) & set(banned.tolist())
            with torch.no_grad():
                ids = torch.tensor([[*rollout.prompt.token_ids, *sampled.tolist()]])
                logits = model(ids).logits[0, -len(sampled) - 1 : -1].double().index_fill(-1, banned, -torch.inf)
            expected = logits.log_softmax(-1).gather(-1, sampled[:, None])[:, 0]
            assert rollout.logprobs.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    finally:
        engine.close()
