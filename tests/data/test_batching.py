import random

import pytest
import torch

from opd_megatron.data.batching import (
    check_context,
    global_length,
    make_batch,
    make_micro_batches,
    rollouts_to_batch,
    shard_rollouts,
)
from opd_megatron.errors import DataError
from opd_megatron.types import Prompt, Rollout


def rollout(index, prompt_length, response_length):
    ids = tuple(range(1, 1 + prompt_length))
    response = tuple(range(100, 100 + response_length))
    logprobs = tuple(-1.0 - index - position / 64 for position in range(response_length))
    return Rollout(Prompt(f"r:{index}", ids, ""), response, logprobs, 0)


def random_rollouts(count, seed=0):
    draw = random.Random(seed)
    return [rollout(i, draw.randint(1, 40), draw.randint(1, 60)) for i in range(count)]


def test_position_i_predicts_token_i_plus_1_and_only_response_targets_count():
    batch = make_batch([([5, 6, 7], [8, 9]), ([5], [6])])
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9], [5, 6, 0, 0, 0]]
    assert batch.targets.tolist() == [[6, 7, 8, 9, 0], [6, 0, 0, 0, 0]]
    assert batch.weights.tolist() == [[0, 0, 1, 1, 0], [1, 0, 0, 0, 0]]
    assert (batch.tokens.dtype, batch.weights.dtype) == (torch.int64, torch.float32)
    assert batch.num_tokens == 3


def test_for_any_batch_the_weighted_targets_read_in_order_are_the_responses():
    rollouts = random_rollouts(20)
    batch = rollouts_to_batch(rollouts, multiple_of=8, pad_id=3)
    assert batch.tokens.shape[1] % 8 == 0
    for row, item in enumerate(rollouts):
        chosen = batch.weights[row] == 1
        assert tuple(batch.targets[row][chosen].tolist()) == item.response_ids
        assert torch.equal(batch.targets[row][chosen], batch.tokens[row].roll(-1)[chosen])
        end = len(item.prompt.token_ids) + len(item.response_ids)
        assert set(batch.tokens[row, end:].tolist()) <= {3}
        assert batch.targets[row, end - 1 :].sum() == 0
        assert tuple(batch.rollout_logprobs[row][chosen].tolist()) == item.logprobs, "each beside the token it is of"
        assert batch.rollout_logprobs[row][~chosen].abs().sum() == 0
        assert int(chosen.nonzero()[0]) == len(item.prompt.token_ids) - 1
    assert batch.num_tokens == sum(len(item.response_ids) for item in rollouts)


@pytest.mark.parametrize(("length", "multiple", "size"), [(None, 1, 5), (None, 4, 8), (6, 1, 6), (6, 4, 8), (5, 5, 5)])
def test_length_is_rounded_up_and_never_cuts_a_sequence(length, multiple, size):
    assert make_batch([([1, 2], [3, 4, 5])], multiple_of=multiple, length=length).tokens.shape == (1, size)
    with pytest.raises(AssertionError, match="does not hold"):
        make_batch([([1, 2], [3, 4, 5])], length=4)


def test_an_empty_response_counts_nothing():
    batch = make_batch([([1, 2], []), ([1], [2])], logprobs=[[], [-0.5]])
    assert batch.weights.tolist() == [[0, 0], [1, 0]]
    assert batch.rollout_logprobs.tolist() == [[0, 0], [-0.5, 0]]


def test_only_sampled_sequences_have_logprobs_and_every_token_of_them_has_one():
    assert make_batch([([1], [2])]).rollout_logprobs is None
    with pytest.raises(AssertionError, match="1 log-probabilities for a response of 2 tokens"):
        make_batch([([1], [2, 3])], logprobs=[[-0.5]])


@pytest.mark.parametrize("sampled", [False, True])
def test_micro_batches_are_the_batch_in_pieces(sampled):
    rollouts = random_rollouts(6)
    pairs = [(item.prompt.token_ids, item.response_ids) for item in rollouts]
    logprobs = [item.logprobs for item in rollouts] if sampled else None
    length = global_length(rollouts)
    options = {"logprobs": logprobs, "length": length, "multiple_of": 4}
    made = make_micro_batches(pairs, 2, device=torch.device("cpu"), **options)
    split = make_batch(pairs, **options).micro_batches(2)
    assert len(made) == len(split) == 3
    for one, other in zip(made, split, strict=True):
        for name in ("tokens", "targets", "weights", "rollout_logprobs"):
            values = getattr(one, name)
            assert (values is None) == (name == "rollout_logprobs" and not sampled)
            assert values is None or torch.equal(values, getattr(other, name))


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_shards_are_a_partition_with_equal_counts_and_balanced_tokens(dp_size):
    rollouts = random_rollouts(32, seed=dp_size)
    shards = [shard_rollouts(rollouts, rank, dp_size) for rank in range(dp_size)]
    assert {len(shard) for shard in shards} == {32 // dp_size}
    assert sorted(r.prompt.id for shard in shards for r in shard) == sorted(r.prompt.id for r in rollouts)
    lengths = [[len(r.prompt.token_ids) + len(r.response_ids) for r in shard] for shard in shards]
    assert all(own == sorted(own, reverse=True) for own in lengths)
    loads = [sum(own) for own in lengths]
    assert max(loads) - min(loads) <= max(max(own) for own in lengths) // 4


def test_one_long_answer_gets_the_short_ones_for_company():
    rollouts = [rollout(0, 1, 90), *[rollout(i, 1, 9) for i in (1, 2)], rollout(3, 1, 40)]
    shards = [shard_rollouts(rollouts, rank, 2) for rank in range(2)]
    assert [[r.prompt.id for r in shard] for shard in shards] == [["r:0", "r:2"], ["r:3", "r:1"]]
    with pytest.raises(AssertionError, match="4 rollouts do not split over 3"):
        shard_rollouts(rollouts, 0, 3)


def test_global_length_holds_every_shard():
    rollouts = random_rollouts(8)
    length = global_length(rollouts, 16)
    assert length % 16 == 0
    sizes = {rollouts_to_batch(shard_rollouts(rollouts, r, 2), length=length).tokens.shape for r in range(2)}
    assert sizes == {(4, length)}
    assert length - 16 < max(len(r.prompt.token_ids) + len(r.response_ids) for r in rollouts) <= length


def test_a_prompt_whose_longest_answer_overflows_the_model_is_named():
    prompts = [rollout(0, 10, 1).prompt, rollout(1, 12, 1).prompt]
    check_context(prompts, 20, 32)
    with pytest.raises(DataError, match=r"'r:1' has 12 tokens, .* that is 33, over the model's 32 positions"):
        check_context(prompts, 21, 32)
