"""Every recipe, and every term beside a type: loss and gradient equal float64 autograd of the formula as it is written
in its paper, from the configuration that a user writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opd_megatron.config import load_config
from opd_megatron.config.recipes import RECIPES
from opd_megatron.data.stages import prefixes
from opd_megatron.errors import ConfigError
from opd_megatron.losses.reference import kl
from opd_megatron.mcore.step_loss import StepLoss
from opd_megatron.types import Batch, Prompt, Rollout, TeacherInputs

V, H = 23, 6
PAGE = Path(__file__).parents[2] / "docs/objectives.md"


class Case:
    """Two answers of 5 and 3 tokens, with a student, a teacher and the student as it was."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)
        self.batch = self._batch()
        self.mask = self.batch.weights > 0
        self.tokens = int(self.mask.sum())
        self.hidden = self._random(self.tokens, H).requires_grad_()
        self.head = self._random(V, H).requires_grad_()
        self.models = {"teacher": (self._random(self.tokens, 4), self._random(V, 4))}
        initial = self.hidden.detach() + 0.3 * self._random(self.tokens, H)
        self.models["student"] = (initial, self.head.detach().clone())
        self.targets = self.batch.targets[self.mask]
        assert self.batch.rollout_logprobs is not None
        self.log_roll = self.batch.rollout_logprobs[self.mask].double()
        self.sequences = [slice(0, 5), slice(5, 8)]

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def _batch(self) -> Batch:
        tokens = torch.randint(0, V, (2, 9), generator=self.generator)
        weights = torch.zeros(2, 9)
        weights[0, 2:7] = weights[1, 3:6] = 1
        logprobs = -2 - 2 * torch.rand(2, 9, generator=self.generator)
        advantages = torch.tensor([[0.7], [-1.3]]) * weights
        return Batch(tokens, tokens.roll(-1, 1), weights, logprobs * weights, advantages)

    def log_p(self) -> torch.Tensor:
        return (self.hidden @ self.head.t()).log_softmax(-1)

    def log_q(self, name: str = "teacher") -> torch.Tensor:
        states, head = self.models[name]
        return (states @ head.t()).log_softmax(-1)

    def at(self, logprobs: torch.Tensor) -> torch.Tensor:
        return logprobs.gather(-1, self.targets[:, None])[:, 0]

    def computed(
        self, *overrides: str, batch: Batch | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        config = load_config(None, list(overrides))
        total = sum(each.weight for number, each in enumerate(config.teachers) if number != config.reference) or 1
        teachers = [
            TeacherInputs([self.models[each.path]], each.weight / total, reference=number == config.reference)
            for number, each in enumerate(config.teachers)
        ]
        model: Any = SimpleNamespace(head_weight=self.head, gather_index=lambda mask: None)
        grid: Any = SimpleNamespace(tp_size=1)
        loss = StepLoss(model, grid, teachers, config.objective, V, sampled=False)
        value, tokens, sums = loss(0, self.hidden, batch or self.batch)
        assert sums.names == loss.names
        assert int(tokens) == self.tokens
        metrics = dict(zip(sums.names, (sums.sums / self.tokens).tolist(), strict=True))
        return value, self._gradient(value), metrics

    def _gradient(self, value: torch.Tensor) -> torch.Tensor:
        found = torch.autograd.grad(value, [self.hidden, self.head])
        return torch.cat([each.flatten() for each in found])

    def check(self, formula: Callable[[], torch.Tensor], *overrides: str, surrogate: bool = False) -> dict[str, float]:
        """Compares with the per-token losses of a formula; of a `surrogate` only the gradient means something."""
        value, gradient, metrics = self.computed(*overrides)
        expected = formula().sum()
        if not surrogate:
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)
            assert metrics["loss"] == pytest.approx(expected.item() / self.tokens)
        torch.testing.assert_close(gradient, self._gradient(expected), rtol=1e-6, atol=1e-9)
        return metrics


@pytest.fixture
def case() -> Case:
    return Case()


def test_mixed_is_a_weighted_sum_of_both_kls(case: Case) -> None:
    log_q = case.log_q()
    case.check(lambda: 0.5 * kl(log_q, case.log_p()) + 0.5 * kl(case.log_p(), log_q), "recipe=mixed")
    case.check(
        lambda: 0.2 * kl(log_q, case.log_p()) + 0.8 * kl(case.log_p(), log_q), "recipe=mixed",
        "objective.forward_weight=0.2",
    )  # fmt: skip


def test_eopd_adds_forward_kl_where_the_teachers_entropy_is_above_the_threshold(case: Case) -> None:
    log_q = case.log_q()
    entropy = -(log_q.exp() * log_q).sum(-1)
    threshold = float(entropy.median())
    unsure = entropy > threshold
    assert 0 < unsure.sum() < case.tokens

    def formula() -> torch.Tensor:
        return kl(case.log_p(), log_q) + unsure * kl(log_q, case.log_p())

    metrics = case.check(formula, "recipe=eopd", f"objective.entropy_threshold={threshold}")
    assert metrics["forward_share"] == pytest.approx(float(unsure.double().mean()))
    case.check(lambda: kl(case.log_p(), log_q), "recipe=eopd", "objective.entropy_threshold=50")


def test_exopd_is_reverse_kl_to_the_teacher_extrapolated_from_the_initial_student(case: Case) -> None:
    """max E log(q / r)^lambda - KL(p|r) has the gradient of -KL(p | q^lambda r^(1 - lambda) / Z)."""
    for weight in (1.25, 2.0):
        log_q, log_r = case.log_q(), case.log_q("student")

        def reward(weight: float = weight, log_q: torch.Tensor = log_q, log_r: torch.Tensor = log_r) -> torch.Tensor:
            gain = weight * (case.log_p().exp() * (log_q - log_r)).sum(-1)
            return -(gain - kl(case.log_p(), log_r))

        overrides = ["recipe=exopd", "teachers.0.path=teacher", f"teachers.0.weight={weight}"]
        case.check(reward, *overrides, surrogate=True)
        target = (weight * log_q + (1 - weight) * log_r).log_softmax(-1)
        case.check(lambda target=target: kl(case.log_p(), target), *overrides)


def test_iw_opd_amplifies_what_comes_before_most_of_the_disagreement(case: Case) -> None:
    gap = case.at(case.log_q()) - case.log_roll
    weight = torch.empty_like(gap)
    for sequence in case.sequences:
        distance = gap[sequence].abs()
        weight[sequence] = 1 + 0.5 * (1 - (distance.cumsum(0) - distance) / distance.sum())
    ratio = (case.at(case.log_p()) - case.log_roll).exp().clamp(max=2.0).detach()
    case.check(lambda: -ratio * weight * gap * case.at(case.log_p()), "recipe=iw_opd", surrogate=True)


def test_prefix_trains_on_the_first_tokens_alone_and_ends_sampling_there() -> None:
    config = load_config(None, ["recipe=prefix", "objective.prefix_tokens=2"])
    assert config.rollout.max_new_tokens == 2
    judged = load_config(None, ["recipe=prefix", "objective.prefix_tokens=2", "rewards.task=gsm8k"])
    assert judged.rollout.max_new_tokens == load_config(None).rollout.max_new_tokens
    rollout = Rollout(Prompt("a", (1, 2), ""), torch.tensor([3, 4, 5]), torch.tensor([-1.0, -2.0, -3.0]), 7, "stop")
    (cut,) = prefixes([rollout], config.objective.prefix_tokens)
    assert cut.response_ids.tolist() == [3, 4]
    assert cut.logprobs is not None
    assert cut.logprobs.tolist() == [-1.0, -2.0]
    assert (cut.policy_version, cut.finish_reason) == (7, "stop")
    assert prefixes([rollout], None) == [rollout]


@pytest.mark.parametrize("clip", [0.005, 0.05, 10.0])
def test_entry_clip_cuts_what_single_entries_add(case: Case, clip: float) -> None:
    log_q = case.log_q()

    def formula() -> torch.Tensor:
        return (log_q.exp() * (log_q - case.log_p())).clamp(max=clip).sum(-1)

    case.check(formula, "recipe=entry_clip", f"objective.entry_clip={clip}")


def test_mopd_leaves_out_tokens_whose_ratio_is_outside_the_window(case: Case) -> None:
    ratio = (case.at(case.log_p()) - case.log_roll).exp().detach()
    low, high = (float(ratio.quantile(share)) for share in (0.3, 0.7))
    inside = (ratio >= low) & (ratio <= high)
    assert 0 < inside.sum() < case.tokens
    gap = case.at(case.log_q()) - case.log_roll
    metrics = case.check(
        lambda: -ratio * inside * gap * case.at(case.log_p()), "recipe=mopd", f"objective.ratio_window=[{low},{high}]",
        surrogate=True,
    )  # fmt: skip
    assert metrics["clip_fraction"] == pytest.approx(float((~inside).double().mean()))
    assert load_config(None, ["recipe=mopd"]).objective.ratio_window == (0.2, 5.0)


def test_thinking_machines_is_importance_sampling_of_each_tokens_own_advantage(case: Case) -> None:
    gap = case.at(case.log_q()) - case.log_roll
    case.check(lambda: -(case.at(case.log_p()) - case.log_roll).exp() * gap, "recipe=thinking_machines")


def test_every_recipe_is_on_the_page_and_shows_its_keys() -> None:
    lines = PAGE.read_text().splitlines()
    for name, recipe in RECIPES.items():
        keys = ", ".join(f"`{key}`" for key in (*recipe.fixed, *recipe.defaults))
        assert f"| `{name}` | {recipe.description} | {keys} | {recipe.paper} |" in lines
        objective = load_config(None, [f"recipe={name}"]).model_dump()["objective"]
        for key, value in {**recipe.fixed, **recipe.defaults}.items():
            found = objective[key.removeprefix("objective.")]
            assert (list(found) if isinstance(found, tuple) else found) == value


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["recipe=mixd"], "recipe='mixd' is not one: did you mean 'mixed'?"),
        (["recipe=mixed", "objective.type=gkd"], "recipe=mixed has objective.type=mixed, got gkd"),
        (["recipe=exopd", "teachers.0.path=t", "teachers.0.weight=1"], "needs teachers.0.weight above 1, got 1"),
        (["objective.type=on_policy_distill", "objective.ratio_window=[5, 0.2]"], "must be [low, high]"),
        (["objective.type=on_policy_distill", "objective.ratio_window=[0.2, 5]", "objective.truncation=3"],
         "objective.truncation=3.0 has no effect beside objective.ratio_window"),
        (["objective.entry_clip=0.1"], "objective.entry_clip=0.1 has no effect with objective.type=reverse_kl"),
        (["objective.type=clipped_reverse_kl", "objective.entry_clip=0"], "greater than 0"),
    ],
)  # fmt: skip
def test_what_contradicts_a_recipe_is_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


# Terms beside a type


def test_rewards_alone_need_no_teacher_and_are_a_policy_gradient(case: Case) -> None:
    advantages = case.batch.advantages[case.mask].double()
    metrics = case.check(
        lambda: -(case.at(case.log_p()) - case.log_roll).exp() * advantages,
        "objective.lambda_distill=0", "objective.lambda_rl=1", "objective.truncation=null",
    )  # fmt: skip
    assert metrics.keys() >= {"policy_loss", "student_entropy", "nll"}
    assert not metrics.keys() & {"reverse_kl", "teacher_nll", "divergence"}


def test_rewards_with_a_reference_and_a_teacher_are_the_sum_of_the_three(case: Case) -> None:
    advantages = case.batch.advantages[case.mask].double()
    log_q, log_r = case.log_q(), case.log_q("student")

    def formula() -> torch.Tensor:
        policy = -(case.at(case.log_p()) - case.log_roll).exp() * advantages
        return 0.3 * kl(log_q, case.log_p()) + 0.7 * policy + 0.05 * kl(case.log_p(), log_r)

    metrics = case.check(
        formula, "objective.type=forward_kl", "objective.lambda_distill=0.3", "objective.lambda_rl=0.7",
        "objective.truncation=null", "objective.reference_kl=0.05", "teachers.0.path=teacher",
    )  # fmt: skip
    assert metrics["reference_kl"] == pytest.approx(float(kl(case.log_p(), log_r).mean()))
    assert metrics["forward_kl"] == pytest.approx(float(kl(log_q, case.log_p()).mean()))


def test_sft_is_the_cross_entropy_of_all_tokens(case: Case) -> None:
    metrics = case.check(lambda: -case.at(case.log_p()), "objective.type=sft")
    assert metrics["sft_loss"] == metrics["nll"] == pytest.approx(float(-case.at(case.log_p()).mean()))
    assert set(metrics) == {"loss", "student_entropy", "nll", "sft_loss"}


def test_sft_with_a_reference_stays_near_it(case: Case) -> None:
    log_r = case.log_q("student")
    case.check(
        lambda: -case.at(case.log_p()) + 0.5 * kl(case.log_p(), log_r), "objective.type=sft",
        "objective.reference_kl=0.5",
    )  # fmt: skip


def test_sft_coef_is_of_given_answers_alone(case: Case) -> None:
    given = torch.zeros_like(case.batch.weights)
    given[1] = 1
    batch = Batch(case.batch.tokens, case.batch.targets, case.batch.weights, given=given * case.batch.weights)
    value, gradient, metrics = case.computed(
        "objective.type=reverse_kl", "objective.sft_coef=0.5", "data.on_policy_fraction=0.5", batch=batch
    )
    chosen = given[case.mask].double()
    expected = (kl(case.log_p(), case.log_q()) - 0.5 * chosen * case.at(case.log_p())).sum()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, case._gradient(expected))
    assert metrics["sft_loss"] == pytest.approx(float((-0.5 * chosen * case.at(case.log_p())).mean()))


def test_a_schedule_is_straight_lines_between_its_points() -> None:
    objective = load_config(
        None, ["objective.schedules={lambda_rl: {0: 0, 10: 1}, lambda_distill: {5: 1, 15: 0.2}}"]
    ).objective
    found = [(objective.at(step).lambda_rl, objective.at(step).lambda_distill) for step in (0, 5, 10, 15, 40)]
    assert found == [(0, 1), (0.5, 1), pytest.approx((1, 0.6)), pytest.approx((1, 0.2)), pytest.approx((1, 0.2))]
    assert objective.uses_rewards
    assert objective.needs_teacher


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective.lambda_distill=0"], "leave nothing to minimise"),
        (["objective.schedules={lambda_distill: {0: 0, 9: 1}}"], "leave nothing to minimise at step 0"),
        (["objective.schedules={lambda_rl: {0: 0}}", "objective.lambda_rl=1"], "no effect beside objective.schedules"),
        (["objective.schedules={lambda: {0: 0}}"], "schedules"),
        (["objective.schedules={lambda_rl: {}}"], "has no points"),
        (["objective.type=sft", "objective.lambda_rl=1"], "leave one of them out"),
        (["objective.type=sft", "data.on_policy_fraction=0.5"], "has no effect with objective.type=sft"),
        (["objective.type=sft", "objective.temperature=2"], "objective.temperature=2.0 does not go with"),
        (["objective.sft_coef=0.1"], "needs given answers"),
        (["objective.type=jsd", "objective.sft_coef=0.1", "data.on_policy_fraction=0.5"], "leave one of them out"),
        (["teachers=[]"], "teachers=[] but objective.type=reverse_kl"),
        (["objective.lambda_distill=0", "objective.lambda_rl=1", "checkpoint.best_metric=eval/forward_kl"],
         "needs a teacher"),
        (["teachers.0.path=a", "teachers.0.weight=-1"], "sum to -1"),
        (["teachers.0.path=a", "teachers.0.weight=0"], "teachers.0.weight=0 is no teacher"),
        (["teachers=[{path: a, weight: 2}, {path: b, weight: -1}]", "objective.combine=prob_mean"], "logit_mean"),
        (["teachers=[{path: a, name: reference}]"], "without objective.reference_kl"),
        (["teachers=[{path: a}, {path: b, name: reference}]", "objective.reference_kl=1",
          "routes={default: [\'0\', reference]}"], "leave it out there"),
    ],
)  # fmt: skip
def test_weights_that_do_not_go_together_are_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
