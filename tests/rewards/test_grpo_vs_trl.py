"""Rewards alone are GRPO: loss and gradient equal TRL's `GRPOTrainer` on the same tensors."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opd_megatron.config import load_config
from opd_megatron.data.batching import token_scales
from opd_megatron.mcore.step_loss import StepLoss
from opd_megatron.rewards.advantages import advantages
from opd_megatron.types import Batch, Prompt, Rollout, TeacherInputs

trl = pytest.importorskip("trl.trainer.grpo_trainer", reason="trl is not installed")
B, P, C, V, H, GROUP = 6, 3, 7, 29, 5, 3
LENGTHS = (7, 4, 1, 6, 7, 3)
REWARDS = (1.0, 0.0, 0.0, 0.5, 1.0, 0.25)


class Tensors:
    """Six answers of two groups: logits from states and a head, and what the engine said of its samples."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(11)
        self.ids = torch.randint(0, V, (B, P + C), generator=generator)
        self.mask = (torch.arange(C)[None] < torch.tensor(LENGTHS)[:, None]).double()
        self.states = torch.randn(B, P + C, H, generator=generator, dtype=torch.float64).requires_grad_()
        self.head = torch.randn(V, H, generator=generator, dtype=torch.float64).requires_grad_()
        drift = 0.4 * torch.randn(B, C, generator=generator, dtype=torch.float64)
        self.old = (self.logprobs() + drift).detach() * self.mask
        self.reference = (self.logprobs() + drift.flip(0)).detach()

    def logprobs(self) -> torch.Tensor:
        """[B, C] of the sampled tokens."""
        logits = self.states[:, P - 1 : -1] @ self.head.t()
        return logits.log_softmax(-1).gather(-1, self.ids[:, P:, None])[..., 0]

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([each.flatten() for each in torch.autograd.grad(loss, [self.states, self.head])])

    def batch(self, scale: list[float], advantage: torch.Tensor) -> Batch:
        weights, logprobs, given = (torch.zeros(B, P + C) for _ in range(3))
        weights[:, P - 1 : -1] = self.mask.float() * torch.tensor(scale)[:, None]
        logprobs[:, P - 1 : -1] = self.old.float()
        given[:, P - 1 : -1] = (self.mask * advantage[:, None]).float()
        return Batch(self.ids, self.ids.roll(-1, 1), weights, logprobs, given)


def _theirs(tensors: Tensors, advantage: torch.Tensor, kind: str, **settings: Any) -> torch.Tensor:
    """`GRPOTrainer._compute_loss`, of a trainer that has only what it reads."""
    values: dict[str, Any] = {
        "loss_type": kind, "importance_sampling_level": "token", "epsilon_low": 1e9, "epsilon_high": 1e9, "beta": 0.0,
        "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "use_vllm": False, "aux_loss_enabled": False,
        "vllm_importance_sampling_correction": False, "current_gradient_accumulation_steps": 1,
        "_entropy_bonus_enabled": False, "use_adaptive_entropy": False, "max_completion_length": C,
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        "accelerator": SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x),
        "model": SimpleNamespace(training=True), "_metrics": {"train": defaultdict(list)},
        **settings,
    }  # fmt: skip
    trainer = SimpleNamespace(**values)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
        tensors.logprobs(), torch.zeros(B, C, dtype=torch.float64), None
    )  # fmt: skip
    inputs = {
        "prompt_ids": tensors.ids[:, :P], "prompt_mask": torch.ones(B, P), "completion_ids": tensors.ids[:, P:],
        "completion_mask": tensors.mask, "advantages": advantage, "old_per_token_logps": tensors.old,
        "num_items_in_batch": tensors.mask.sum(),
    }  # fmt: skip
    found: torch.Tensor = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    return found


def _ours(tensors: Tensors, advantage: torch.Tensor, *overrides: str) -> torch.Tensor:
    config = load_config(None, ["objective.lambda_distill=0", "objective.lambda_rl=1", *overrides])
    rollouts = [Rollout(Prompt(str(i), (1,), ""), torch.zeros(n), None, 0) for i, n in enumerate(LENGTHS)]
    batch = tensors.batch(token_scales(rollouts, config.objective.balance), advantage)
    model: Any = SimpleNamespace(head_weight=tensors.head, gather_index=lambda mask: None)
    grid: Any = SimpleNamespace(tp_size=1)
    teachers: list[TeacherInputs] = []
    loss = StepLoss(model, grid, teachers, config.objective, V, sampled=False)
    hidden = tensors.states[:, : P + C][batch.weights > 0]
    value, tokens, _ = loss(0, hidden, batch)
    return value / tokens


@pytest.mark.parametrize(
    ("kind", "settings", "overrides"),
    [
        ("bnpo", {}, ["objective.truncation=null"]),
        ("dapo", {}, ["objective.truncation=null"]),
        ("grpo", {}, ["objective.truncation=null", "objective.balance=samples"]),
        (
            "dapo", {"epsilon_low": 0.2, "epsilon_high": 0.28},
            ["objective.truncation=null", "objective.clip_low=0.2", "objective.clip_high=0.28"],
        ),
        (
            "grpo", {"epsilon_low": 0.2, "epsilon_high": 0.2},
            ["objective.truncation=null", "objective.clip_low=0.2", "objective.clip_high=0.2",
             "objective.balance=samples"],
        ),
        (
            "dapo", {"importance_sampling_level": "sequence", "epsilon_low": 3e-2, "epsilon_high": 4e-2},
            ["objective.truncation=null", "objective.clip_low=3e-2", "objective.clip_high=4e-2",
             "objective.ratio_level=sequence"],
        ),
    ],
)  # fmt: skip
def test_loss_and_gradient_equal_trls(kind: str, settings: dict[str, Any], overrides: list[str]) -> None:
    tensors = Tensors()
    advantage = torch.tensor([0.9, -0.4, -0.5, -0.3, 1.1, -0.8], dtype=torch.float64)
    theirs, ours = _theirs(tensors, advantage, kind, **settings), _ours(tensors, advantage, *overrides)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(tensors.gradient(ours), tensors.gradient(theirs), rtol=1e-5, atol=1e-7)
    if "epsilon_low" in settings:
        assert not torch.allclose(theirs, _theirs(tensors, advantage, kind)), "some ratios are clipped"


def test_advantages_equal_trls() -> None:
    table = torch.tensor(REWARDS, dtype=torch.float64).view(-1, GROUP)
    mean, std = table.mean(1, keepdim=True), table.std(1, keepdim=True)
    groups, lengths = [0] * GROUP + [1] * GROUP, list(LENGTHS)
    for kind, expected in (("grpo", (table - mean) / (std + 1e-4)), ("group_mean", table - mean)):
        found = advantages(REWARDS, groups, lengths, kind, drop_equal=False)
        assert found == pytest.approx(expected.flatten().tolist())
