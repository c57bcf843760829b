"""Sampled-token terms under tensor parallelism: exact, in the same two collectives."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist

from opd_megatron.losses import linear_divergence_terms
from opd_megatron.losses.kernels import use_backend
from tests.distributed.test_losses_tp import _COLLECTIVES, _count_collectives, _shard
from tests.losses.policy_reference import dense_policy_loss
from tests.losses.reference import Errors, dense_divergence, failures, pad_columns, relative_error
from tests.losses.test_policy import OPTIONS, policy_case
from tests.ranks import run_ranks

VOCABULARY, COLUMNS = 37, 40


def _body(rank: int, ranks: int, options: dict, backend: str) -> tuple[Errors, int, int]:
    """Errors; collectives of forward and backward."""
    student, teacher, targets, weights, term = policy_case(options, 9, VOCABULARY)
    generator = torch.Generator().manual_seed(0)
    identity = torch.eye(VOCABULARY)
    head = _shard(pad_columns(identity, COLUMNS, generator, dim=0), rank, ranks, 0)
    hidden = student.clone().requires_grad_()
    counts: Counter = Counter()
    patches = _count_collectives(counts)
    for patch in patches:
        patch.start()
    try:
        with use_backend(backend):
            terms = linear_divergence_terms(
                hidden, head, [(teacher, head)], type="gkd", beta=0.3, vocab_size=VOCABULARY, group=dist.group.WORLD,
                lambda_distill=1.3, token_weights=weights, targets=targets, policy=term, temperature=1.0,
            )  # fmt: skip
        forward = sum(counts[name] for name in _COLLECTIVES)
        terms.loss_sum.backward()
        backward = sum(counts[name] for name in _COLLECTIVES) - forward
    finally:
        for patch in patches:
            patch.stop()
    dense = student.double().requires_grad_()
    log_p, log_q = dense.log_softmax(-1), teacher.double().log_softmax(-1)
    of_policy = dense_policy_loss(log_p, log_q, targets, term, weights != 0)
    per_token = 1.3 * dense_divergence(dense, [teacher], "gkd", beta=0.3) + term.coef * of_policy
    expected = (per_token * weights).sum()
    expected.backward()
    errors = {
        "loss": relative_error(terms.loss_sum.detach(), expected.detach()),
        "d hidden": relative_error(hidden.grad, dense.grad),
    }
    return errors, forward, backward


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("ranks", [2, 4])
def test_mixed_objective_is_exact_in_two_collectives(ranks: int, options: dict) -> None:
    results = run_ranks(ranks, _body, options, "torch")
    assert not failures([errors for errors, *_ in results], 1e-5)
    for _, forward, backward in results:
        # Backward: the sum of d hidden that every column-parallel linear makes.
        assert (forward, backward) == (2, 1)


def test_mixed_objective_is_exact_on_the_compiled_backend() -> None:
    results = run_ranks(2, _body, OPTIONS[3], "compiled")
    assert not failures([errors for errors, *_ in results], 1e-5)
