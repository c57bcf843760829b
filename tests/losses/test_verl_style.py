"""The losses under verl's names: the values and gradients are the dense formulae's."""

from __future__ import annotations

import inspect

import pytest
import torch

from opd_megatron import losses
from opd_megatron.config import build_config
from opd_megatron.errors import OPDError
from opd_megatron.losses.reference import dense_divergence
from opd_megatron.losses.verl_style import (
    compute_forward_kl_loss,
    compute_generalized_jsd_loss,
    compute_hybrid_rl_distillation_loss,
    compute_on_policy_distillation_loss,
    compute_reverse_kl_loss,
)

B, S, V = 3, 5, 40


def _tensors(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    student, *teachers = (torch.randn(B, S, V, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = (torch.arange(S) < torch.tensor([[5], [2], [1]])).double()
    old, new, advantages = (torch.randn(B, S, generator=generator, dtype=torch.float64) for _ in range(3))
    return student.requires_grad_(), *teachers, mask, old, new.requires_grad_(), advantages


@pytest.mark.parametrize(
    ("compute", "name", "own"),
    [
        (compute_reverse_kl_loss, "reverse_kl", {}),
        (compute_forward_kl_loss, "forward_kl", {}),
        (compute_generalized_jsd_loss, "gkd", {"beta": 0.3}),
    ],
)
def test_each_divergence_is_its_formula_token_by_token(compute, name, own) -> None:
    student, first, second, *_ = _tensors()
    found = compute(student, first, temperature=2.0, **own)
    assert found.shape == (B, S)
    flat = [each.reshape(-1, V) for each in (student, first, second)]
    assert torch.allclose(found.view(-1), dense_divergence(flat[0], flat[1:2], name, 2.0, **own))
    mixed = compute(student, [first, second], combine="prob_mean", **own)
    assert torch.allclose(mixed.view(-1), dense_divergence(flat[0], flat[1:], name, combine="prob_mean", **own))


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_the_distillation_loss_and_its_gradient_are_the_masked_mean(mode: str) -> None:
    student, first, _, mask, old, new, advantages = _tensors()
    config = {"policy_loss": "on_policy_distillation", "distillation_type": "gkd", "distillation_beta": 0.1}
    loss, clipped, fall, _ = compute_on_policy_distillation_loss(
        old, new, advantages, mask, mode, config, teacher_logits=first, student_logits=student
    )
    dense = dense_divergence(student.view(-1, V), [first.view(-1, V)], "gkd", beta=0.1).view(B, S) * mask
    expected = {
        "token-mean": dense.sum() / mask.sum(),
        "seq-mean-token-sum": dense.sum(-1).mean(),
        "seq-mean-token-mean": (dense.sum(-1) / mask.sum(-1)).mean(),
    }[mode]
    assert torch.allclose(loss, expected)
    ours, theirs = (torch.autograd.grad(each, student, retain_graph=True)[0] for each in (loss, expected))
    assert torch.allclose(ours, theirs)
    assert float(clipped) == 0
    assert torch.allclose(fall, ((old - new) * mask).sum() / mask.sum())


def test_the_hybrid_adds_ppos_clipped_gradient_and_the_divergence() -> None:
    student, first, _, mask, old, new, advantages = _tensors()
    config = {"hybrid_lambda_rl": 0.5, "hybrid_lambda_distill": 2.0, "clip_ratio": 0.2}
    given = (old, new, advantages, mask, "token-mean", config)
    loss, clipped, *_ = compute_hybrid_rl_distillation_loss(*given, teacher_logits=first, student_logits=student)
    ratio = (new - old).exp()
    policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    dense = dense_divergence(student.view(-1, V), [first.view(-1, V)], "reverse_kl").view(B, S)
    expected = ((0.5 * policy + 2.0 * dense) * mask).sum() / mask.sum()
    assert torch.allclose(loss, expected)
    for tensor in (student, new):
        ours, theirs = (torch.autograd.grad(each, tensor, retain_graph=True)[0] for each in (loss, expected))
        assert torch.allclose(ours, theirs)
    assert 0 < float(clipped) < 1


def test_an_infinity_under_the_mask_is_no_nan() -> None:
    student, first, _, mask, old, new, advantages = _tensors()
    poisoned = first.clone()
    poisoned[2, 4] = float("nan")
    loss = compute_on_policy_distillation_loss(
        old, new, advantages, mask, teacher_logits=poisoned, student_logits=student
    )[0]
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, student)[0]).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher_logits": None}, "teacher_logits is missing"),
        ({"student_logits": None}, "student_logits is missing"),
        ({"config": {"distilation_type": "gkd"}}, "'distilation_type', which has no effect"),
        ({"config": {"distillation_type": "kl"}}, "is not a divergence"),
        ({"loss_agg_mode": "mean"}, "loss_agg_mode='mean' is not one"),
        ({"teacher_logits": torch.zeros(B, S + 1, V)}, "the same tokens"),
    ],
)
def test_what_is_missing_or_unknown_is_named(changes, words: str) -> None:
    student, first, _, mask, old, new, advantages = _tensors()
    given = {"teacher_logits": first, "student_logits": student} | changes
    with pytest.raises(OPDError, match=words):
        compute_on_policy_distillation_loss(old, new, advantages, mask, **given)


def test_the_names_are_those_of_the_library() -> None:
    assert losses.compute_on_policy_distillation_loss is compute_on_policy_distillation_loss
    names = list(inspect.signature(compute_on_policy_distillation_loss).parameters)
    assert names[:6] == ["old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config"]


def test_teacher_configs_name_a_teacher_for_each_task() -> None:
    teacher_configs = {"math": "A", "code": {"path": "B", "weight": 2}, "default": "C"}
    config = build_config({"teacher_configs": teacher_configs})
    assert config.teacher_names == ["math", "code", "default"]
    assert [teacher.path for teacher in config.teachers] == ["A", "B", "C"]
    assert config.routes == {"math": "math", "code": "code", "default": "default"}
    for wrong in ({"teacher_configs": []}, {"teacher_configs": {"math": 3}}):
        with pytest.raises(OPDError, match=r"teacher_configs=.* must name a teacher for each task"):
            build_config(wrong)
    with pytest.raises(OPDError, match="leave one of them out"):
        build_config({"teacher_configs": {"math": "A"}, "teachers": [{"path": "B"}]})
