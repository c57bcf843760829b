import random
from dataclasses import replace

import pytest
import torch

from opd_megatron.data.batching import MicroBatchBuilder, make_batch, shard_rollouts
from opd_megatron.data.stages import apply_stages
from opd_megatron.types import Batch, Prompt, Rollout


def rollout(index, prompt_length, response_length):
    return of_ids(
        list(range(1, 1 + prompt_length)),
        list(range(100, 100 + response_length)),
        [-1.0 - index - position / 64 for position in range(response_length)],
        name=f"r:{index}",
    )


def of_ids(prompt, response, logprobs=None, *, name="r"):
    values = None if logprobs is None else torch.tensor(logprobs)
    return Rollout(Prompt(name, tuple(prompt), ""), torch.tensor(response, dtype=torch.int64), values, 0)


def random_rollouts(count, seed=0):
    draw = random.Random(seed)
    return [rollout(i, draw.randint(1, 40), draw.randint(1, 60)) for i in range(count)]


def builder(rank=0, ranks=1, size=2, *, one_length=False, multiple_of=1):
    return MicroBatchBuilder(rank, ranks, size, one_length, multiple_of, torch.device("cpu"))


def responses(batches):
    """Every response of the batches, read off weights and targets."""
    return [tuple(b.targets[row][b.weights[row] == 1].tolist()) for b in batches for row in range(len(b.tokens))]


def test_position_i_predicts_token_i_plus_1_and_only_response_targets_count():
    batch = make_batch([of_ids([5, 6, 7], [8, 9]), of_ids([5], [6])])
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9], [5, 6, 0, 0, 0]]
    assert batch.targets.tolist() == [[6, 7, 8, 9, 0], [6, 0, 0, 0, 0]]
    assert batch.weights.tolist() == [[0, 0, 1, 1, 0], [1, 0, 0, 0, 0]]
    assert (batch.tokens.dtype, batch.weights.dtype) == (torch.int64, torch.float32)
    assert batch.num_tokens == 3


def test_for_any_batch_the_weighted_targets_read_in_order_are_the_responses():
    rollouts = random_rollouts(20)
    batch = make_batch(rollouts, multiple_of=8, pad_id=3)
    assert batch.tokens.shape[1] % 8 == 0
    for row, item in enumerate(rollouts):
        chosen = batch.weights[row] == 1
        assert torch.equal(batch.targets[row][chosen], item.response_ids)
        assert torch.equal(batch.targets[row][chosen], batch.tokens[row].roll(-1)[chosen])
        end = len(item.prompt.token_ids) + len(item.response_ids)
        assert set(batch.tokens[row, end:].tolist()) <= {3}
        assert batch.targets[row, end - 1 :].sum() == 0
        assert torch.equal(batch.rollout_logprobs[row][chosen], item.logprobs), "each beside the token it is of"
        assert batch.rollout_logprobs[row][~chosen].abs().sum() == 0
        assert int(chosen.nonzero()[0]) == len(item.prompt.token_ids) - 1
    assert batch.num_tokens == sum(len(item.response_ids) for item in rollouts)


@pytest.mark.parametrize(("length", "multiple", "size"), [(None, 1, 5), (None, 4, 8), (6, 1, 6), (6, 4, 8), (5, 5, 5)])
def test_length_is_rounded_up_and_never_cuts_a_sequence(length, multiple, size):
    assert make_batch([of_ids([1, 2], [3, 4, 5])], multiple_of=multiple, length=length).tokens.shape == (1, size)
    with pytest.raises(AssertionError, match="does not hold"):
        make_batch([of_ids([1, 2], [3, 4, 5])], length=4)


def test_an_empty_response_counts_nothing():
    batch = make_batch([of_ids([1, 2], [], []), of_ids([1], [2], [-0.5])])
    assert batch.weights.tolist() == [[0, 0], [1, 0]]
    assert batch.rollout_logprobs.tolist() == [[0, 0], [-0.5, 0]]


def test_only_sampled_sequences_have_logprobs_and_every_token_of_them_has_one():
    assert make_batch([of_ids([1], [2])]).rollout_logprobs is None
    with pytest.raises(AssertionError, match="1 log-probabilities for a response of 2 tokens"):
        make_batch([of_ids([1], [2, 3], [-0.5])])
    with pytest.raises(AssertionError, match="some were sampled"):
        make_batch([of_ids([1], [2], [-0.5]), of_ids([1], [2])])


def test_an_advantage_lies_at_every_token_of_its_response():
    scored = [replace(of_ids([1, 2], [3, 4]), advantage=0.5), replace(of_ids([1], [2]), advantage=-1.0)]
    assert make_batch(scored).advantages.tolist() == [[0, 0.5, 0.5, 0], [-1, 0, 0, 0]]
    assert make_batch([of_ids([1], [2])]).advantages is None


def test_positions_and_sequences_are_derived_and_survive_splitting():
    batch = make_batch(random_rollouts(6), length=100)
    assert all(row == list(range(100)) for row in batch.position_ids.tolist())
    parts = batch.micro_batches(2)
    ids = torch.cat([part.sequence_ids for part in parts])
    assert ids.tolist() == [[row] * 100 for row in range(6)]
    packed = Batch(
        batch.tokens, batch.targets, batch.weights, position_ids=batch.position_ids + 1, sequence_ids=ids * 0
    )
    assert packed.rows(slice(2, 4)).position_ids[0, 0] == 1
    assert packed.to(torch.device("cpu")).sequence_ids.sum() == 0


@pytest.mark.parametrize("one_length", [False, True])
def test_micro_batches_of_a_step_hold_every_response_once(one_length):
    rollouts = random_rollouts(12)
    made = [builder(rank, 2, 3, one_length=one_length, multiple_of=4).build(rollouts) for rank in range(2)]
    assert [len(batches) for batches in made] == [2, 2]
    found = responses([batch for batches in made for batch in batches])
    assert sorted(found) == sorted(tuple(r.response_ids.tolist()) for r in rollouts)
    lengths = {batch.tokens.shape[1] for batches in made for batch in batches}
    assert (len(lengths) == 1) == one_length
    assert all(length % 4 == 0 for length in lengths)


@pytest.mark.parametrize(("count", "ranks"), [(5, 2), (1, 3), (8, 1), (7, 4)])
def test_any_number_of_rollouts_gives_every_rank_equally_many(count, ranks):
    rollouts = random_rollouts(count)
    made = [builder(rank, ranks, 3).build_any_number(rollouts) for rank in range(ranks)]
    sizes = [[len(batch.tokens) for batch in batches] for batches in made]
    assert all(own == sizes[0] and max(own) <= 3 for own in sizes)
    found = {response for batches in made for response in responses(batches)}
    assert found == {tuple(r.response_ids.tolist()) for r in rollouts}


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


def test_one_length_holds_the_longest_sequence_of_every_rank():
    rollouts = random_rollouts(8)
    sizes = {
        batch.tokens.shape
        for rank in range(2)
        for batch in builder(rank, 2, 4, one_length=True, multiple_of=16).build(rollouts)
    }
    ((count, length),) = sizes
    assert (count, length % 16) == (4, 0)
    assert length - 16 < max(len(r.prompt.token_ids) + len(r.response_ids) for r in rollouts) <= length


def test_stages_score_and_filter_in_their_order():
    def score(rollouts):
        return [replace(r, advantage=float(len(r.response_ids))) for r in rollouts]

    def keep_long(rollouts):
        return [r for r in rollouts if r.advantage > 2]

    rollouts = [rollout(i, 1, i + 1) for i in range(4)]
    assert [r.advantage for r in apply_stages(rollouts, [score, keep_long])] == [3, 4]
    assert apply_stages(rollouts, []) == rollouts
