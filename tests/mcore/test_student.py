"""One training step in every layout equals the same step in plain transformers and torch.optim.AdamW."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from opd_megatron.config import load_config
from opd_megatron.errors import NonFiniteError
from opd_megatron.losses import TopKTeacher
from opd_megatron.mcore.cpu.platform import init_distributed
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.student import Student
from opd_megatron.run.checks import check_run
from opd_megatron.teacher import ask_teachers, build_teachers
from opd_megatron.types import Batch, TeacherInputs
from opd_megatron.weight_sync.gathered import gather_student
from tests.ranks import run_ranks
from tests.tiny_models import save_tiny

LR, WEIGHT_DECAY, CLIP, STEPS = 3e-3, 0.1, 0.5, 3
LAYOUTS = [
    # tensor, pipeline, data, sequence parallel
    pytest.param((1, 1, 1, False), id="one-rank"),
    pytest.param((2, 1, 1, False), id="tp2"),
    pytest.param((2, 1, 1, True), id="tp2-sequence-parallel"),
    pytest.param((1, 2, 1, False), id="pp2"),
    pytest.param((2, 2, 1, False), id="tp2-pp2"),
    pytest.param((1, 1, 2, False), id="dp2"),
    pytest.param((2, 1, 2, True), id="tp2-dp2-sequence-parallel"),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    student = save_tiny(root / "student", seed=1, vocab_size=250)
    teacher = save_tiny(
        root / "teacher",
        "qwen2",
        seed=2,
        vocab_size=256,
        hidden_size=32,
        num_hidden_layers=2,
        tie_word_embeddings=False,
    )
    return student, teacher


def _batches(steps: int) -> list[Batch]:
    """Per step 8 right-padded sequences of 16 tokens with responses of different lengths, some of one token. Whoever
    sampled them gave other probabilities than the student does: some ratios lie below every bound and some above."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(steps):
        tokens = torch.randint(0, 250, (8, 16), generator=generator)
        weights = torch.zeros(8, 16)
        for row in range(8):
            weights[row, 4 : 5 + row] = 1
        targets = torch.roll(tokens, -1, dims=1)
        logprobs = -8 + 5 * torch.rand(8, 16, generator=generator)
        rewards = torch.sin(torch.arange(8.0))[:, None] * weights
        batches.append(Batch(tokens, targets, weights, logprobs * weights, rewards))
    return batches


def _config(pair: tuple[Path, Path], tmp: str, **overrides: Any) -> Any:
    values = {
        "student.path": pair[0],
        "student.dtype": "fp32",
        "teachers.0.path": pair[1],
        "teachers.0.dtype": "fp32",
        "output_dir": tmp,
        "optimizer.lr": LR,
        "optimizer.weight_decay": WEIGHT_DECAY,
        "optimizer.clip_grad": CLIP,
        "optimizer.decay": "constant",
        "data.max_prompt_tokens": 8,
        "rollout.max_new_tokens": 8,
        "steps": STEPS,
        **overrides,
    }
    return load_config(None, [f"{key}={value}" for key, value in values.items()])


def _train(
    rank: int, world: int, pair: tuple[Path, Path], layout: tuple[int, int, int, bool], objective: dict[str, Any]
) -> Any:
    init_distributed()
    tensor, pipeline, data, sequence_parallel = layout
    parallel = {
        "parallel.tensor": tensor, "parallel.pipeline": pipeline, "parallel.data": data,
        "parallel.sequence_parallel": sequence_parallel,
    }  # fmt: skip
    config = _config(pair, "unused", **parallel, **objective)
    models = check_run(_config(pair, "unused", **parallel))  # there are no rewards for a run yet: refused there
    grid = ParallelGrid.build(
        tensor, pipeline, data, ep_size=config.parallel.expert, sequence_parallel=sequence_parallel
    )
    padded = models.padded_vocab(tensor)
    student = Student(config, models.student, models.student_config, grid, padded)
    (teacher,) = build_teachers(config, models, grid)
    results = []
    for batch in _batches(STEPS):
        rows = slice(grid.dp_rank, None, data)
        mine = batch.rows(rows).micro_batches(2)
        views = ask_teachers([teacher], mine)
        results.append(student.update(mine, views, config.objective, models.vocab_size))
    weights = {name: tensor.clone() for bucket in gather_student(student) for name, tensor in bucket}
    return [(r.metrics, r.tokens, r.grad_norm, r.lr) for r in results], weights


Outcome = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""Mean loss, and metrics to compare."""
LossOfBatch = Callable[[torch.Tensor, torch.Tensor, Batch], Outcome]
"""Of log p and log q [T, V] at the response tokens of a batch."""


def _reference(
    pair: tuple[Path, Path], loss_of: LossOfBatch
) -> tuple[list[tuple[dict[str, float], float]], dict[str, torch.Tensor]]:
    """The same training in float64 with dense logits and torch's own optimizer."""
    # Its grouped matrix product for experts knows no float64.
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager") for path in pair
    )
    decayed = [p for p in student.parameters() if p.ndim > 1]
    plain = [p for p in student.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}],
        lr=LR, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    curve = []
    for batch in _batches(STEPS):
        mask = batch.weights > 0
        log_p = student(batch.tokens).logits[mask][:, :250].log_softmax(-1)
        with torch.no_grad():
            log_q = teacher(batch.tokens).logits[mask][:, :250].log_softmax(-1)
        loss, known = loss_of(log_p, log_q, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        curve.append(({"loss": loss.item(), **{name: value.item() for name, value in known.items()}}, norm.item()))
    return curve, dict(student.named_parameters())


def _reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor, _: Batch) -> Outcome:
    loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return loss, {"reverse_kl": loss}


def _forward_kl(log_p: torch.Tensor, log_q: torch.Tensor, _: Batch) -> Outcome:
    loss = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    return loss, {"forward_kl": loss}


def _on_policy_distill(log_p: torch.Tensor, log_q: torch.Tensor, batch: Batch) -> Outcome:
    """kl_coef 0.5, weights capped at 2."""
    at_p, at_q, rollout = _at_samples(log_p, log_q, batch)
    ratio = (at_p - rollout).exp().detach()
    advantage = 0.5 * (at_q - rollout)
    # The value is that of -w A, the gradient that of -w A log p.
    loss = -(ratio.clamp(max=2) * advantage * (at_p - at_p.detach()).exp()).mean()
    k1 = at_p - at_q
    known = {"ratio": ratio.mean(), "advantage": advantage.mean(), "policy_loss": loss, "k1": k1.mean()}
    exact = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return loss, {**known, "divergence": exact, "reverse_kl": exact, "k1_gap": k1.mean() - exact}


def _reverse_kl_and_rewards(log_p: torch.Tensor, log_q: torch.Tensor, batch: Batch) -> Outcome:
    """lambda_rl 0.5, ratios clipped to [0.8, 1.2]: the sum of two losses."""
    at_p, _, rollout = _at_samples(log_p, log_q, batch)
    assert batch.advantages is not None
    ratio, advantage = (at_p - rollout).exp(), batch.advantages[batch.weights > 0].double()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    exact = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return exact - 0.5 * surrogate.mean(), {"reverse_kl": exact, "policy_loss": -surrogate.mean()}


def _on_policy_distill_and_rewards(log_p: torch.Tensor, log_q: torch.Tensor, batch: Batch) -> Outcome:
    """lambda_distill 2, kl_coef 0.5, lambda_rl 0.25, weights capped at 2: one policy gradient on both advantages."""
    at_p, at_q, rollout = _at_samples(log_p, log_q, batch)
    assert batch.advantages is not None
    advantage = 2 * 0.5 * (at_q - rollout) + 0.25 * batch.advantages[batch.weights > 0].double()
    weight = (at_p - rollout).exp().detach().clamp(max=2)
    loss = -(weight * advantage * (at_p - at_p.detach()).exp()).mean()
    return loss, {"policy_loss": loss, "advantage": advantage.mean()}


def _jsd_clipped(log_p: torch.Tensor, log_q: torch.Tensor, batch: Batch) -> Outcome:
    """beta 0.3, ratios clipped to [0.8, 1.2], lambda_distill 2."""
    at_p, at_q, rollout = _at_samples(log_p, log_q, batch)
    ratio = (at_p - rollout).exp()
    log_m = torch.log(0.3 * log_q.exp() + 0.7 * log_p.exp())
    advantage = 0.7 * (torch.log(0.3 * at_q.exp() + 0.7 * at_p.exp()) - at_p).detach()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    exact = 0.3 * (log_q.exp() * (log_q - log_m)).sum(-1) + 0.7 * (log_p.exp() * (log_p - log_m)).sum(-1)
    clipped = (surrogate < ratio * advantage).double()
    assert 0 < clipped.mean() < 1
    known = {"policy_loss": -surrogate.mean(), "clip_fraction": clipped.mean(), "divergence": exact.mean()}
    return -2 * surrogate.mean(), known


def _lambda_jsd_of_sequences(log_p: torch.Tensor, log_q: torch.Tensor, batch: Batch) -> Outcome:
    """lambda 0.7, one weight for a sequence, capped at 2."""
    at_p, at_q, rollout = _at_samples(log_p, log_q, batch)
    lengths = (batch.weights > 0).sum(1).tolist()
    of_sequence = [part.mean().exp().expand(len(part)) for part in (at_p - rollout).split(lengths)]
    ratio = torch.cat(of_sequence).detach()
    p, log_m = at_p.exp(), torch.log((at_p.exp() + at_q.exp()) / 2)
    # Minus the derivative of the divergence with respect to p, with the constant that makes it 0 where p = q.
    advantage = -(0.7 * (at_p - log_m) + (0.5 - 0.7) * (p / log_m.exp() - 1)).detach()
    loss = -(ratio.clamp(max=2) * advantage * (at_p - at_p.detach()).exp()).mean()
    return loss, {"ratio": ratio.mean(), "advantage": advantage.mean()}


def _at_samples(
    log_p: torch.Tensor, log_q: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = batch.weights > 0
    assert batch.rollout_logprobs is not None
    chosen = batch.targets[mask][:, None]
    return log_p.gather(1, chosen)[:, 0], log_q.gather(1, chosen)[:, 0], batch.rollout_logprobs[mask].double()


OBJECTIVES: dict[str, tuple[dict[str, Any], LossOfBatch]] = {
    "reverse_kl": ({"objective.type": "reverse_kl"}, _reverse_kl),
    "forward_kl": ({"objective.type": "forward_kl"}, _forward_kl),
    "on_policy_distill": ({"objective.type": "on_policy_distill", "objective.kl_coef": 0.5}, _on_policy_distill),
    "jsd, clipped": (
        {
            "objective.type": "jsd", "objective.beta": 0.3, "objective.lambda_distill": 2.0,
            "objective.truncation": "null", "objective.clip_low": 0.2, "objective.clip_high": 0.2,
        },
        _jsd_clipped,
    ),
    "reverse_kl and rewards": (
        {
            "objective.lambda_rl": 0.5, "objective.truncation": "null",
            "objective.clip_low": 0.2, "objective.clip_high": 0.2,
        },
        _reverse_kl_and_rewards,
    ),
    "on_policy_distill and rewards": (
        {
            "objective.type": "on_policy_distill", "objective.kl_coef": 0.5,
            "objective.lambda_distill": 2.0, "objective.lambda_rl": 0.25,
        },
        _on_policy_distill_and_rewards,
    ),
    "jsd of lambda, sequences": (
        {"objective.type": "jsd", "objective.lambda_coef": 0.7, "objective.ratio_level": "sequence"},
        _lambda_jsd_of_sequences,
    ),
}  # fmt: skip
# Every layout for a divergence; where vocabulary, stages and sequences are split, for the sampled-token forms too.
CASES = [
    *itertools.product(["reverse_kl", "forward_kl"], LAYOUTS),
    *itertools.product(["on_policy_distill", "jsd, clipped", "jsd of lambda, sequences"], LAYOUTS[:2] + LAYOUTS[-1:]),
    ("on_policy_distill", LAYOUTS[4]),
    ("reverse_kl and rewards", LAYOUTS[0]),
    ("reverse_kl and rewards", LAYOUTS[-1]),
    ("on_policy_distill and rewards", LAYOUTS[0]),
]


@pytest.fixture(scope="module")
def references(pair: tuple[Path, Path]) -> Callable[[str], Any]:
    return functools.cache(lambda name: _reference(pair, OBJECTIVES[name][1]))


@pytest.mark.parametrize(
    ("name", "layout"), [pytest.param(name, *case.values, id=f"{name}-{case.id}") for name, case in CASES]
)
def test_training_equals_dense_float64_reference(
    pair: tuple[Path, Path], references: Callable[[str], Any], name: str, layout: tuple[int, int, int, bool]
) -> None:
    curve, expected = references(name)
    # Signed means over samples, and ratios of single tokens, keep fewer digits than a divergence.
    close = {"rel": 1e-5} if name in ("reverse_kl", "forward_kl") else {"rel": 1e-4, "abs": 1e-5}
    tensor, pipeline, data, _ = layout
    ranks = run_ranks(tensor * pipeline * data, _train, pair, layout, OBJECTIVES[name][0])
    for steps, _ in ranks:
        for (metrics, tokens, grad_norm, lr), (known, norm) in zip(steps, curve, strict=True):
            for metric, value in known.items():
                assert metrics[metric] == pytest.approx(value, **close), metric
            assert grad_norm == pytest.approx(norm, rel=1e-4)
            assert tokens == sum(range(1, 9))
            assert lr == LR
    weights = ranks[0][1]
    assert all(not other for _, other in ranks[1:]), "only rank 0 is given the exported weights"
    assert set(weights) == set(expected)
    for name, tensor_ in weights.items():
        # Adam turns tiny gradient differences into differences of up to the learning rate where gradients vanish;
        # an average over the tensor is insensitive to those few entries and sensitive to any systematic mistake.
        difference = (tensor_.double() - expected[name]).abs()
        assert difference.mean() < 1e-3 * LR, name


def _train_on_entries(
    rank: int, world: int, pair: tuple[Path, Path], layout: tuple[int, int, int, bool]
) -> list[dict[str, float]]:
    """Metrics of a step on the teacher's hidden states, and of the same step on its log-probabilities."""
    init_distributed()
    tensor, pipeline, data, sequence_parallel = layout
    config = _config(pair, "unused", **{
        "parallel.tensor": tensor, "parallel.pipeline": pipeline, "parallel.sequence_parallel": sequence_parallel,
    })  # fmt: skip
    models = check_run(config)
    grid = ParallelGrid.build(tensor, pipeline, data, sequence_parallel=sequence_parallel)
    mine = _batches(1)[0].micro_batches(4)
    (teacher,) = build_teachers(config, models, grid)
    dense = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32)
    with torch.no_grad():
        logprobs = [dense(batch.tokens).logits[batch.weights > 0][:, :250].log_softmax(-1) for batch in mine]
    entries = [TopKTeacher(torch.arange(250).expand_as(values), values) for values in logprobs]
    inputs = [ask_teachers([teacher], mine), [TeacherInputs(entries if grid.is_last_stage else ())]]
    results = []
    for given in inputs:
        student = Student(config, models.student, models.student_config, grid, models.padded_vocab(tensor))
        output = student.update(mine, given, config.objective, models.vocab_size)
        results.append({**output.metrics, "grad_norm": output.grad_norm})
    return results


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[2], LAYOUTS[3]])
def test_a_teacher_may_give_top_k_entries_instead_of_hidden_states(
    pair: tuple[Path, Path], layout: tuple[int, int, int, bool]
) -> None:
    """Entries that cover the vocabulary say the same as hidden states with a head."""
    for of_hidden, of_entries in run_ranks(layout[0] * layout[1] * layout[2], _train_on_entries, pair, layout):
        assert of_entries == pytest.approx(of_hidden, rel=1e-4, abs=1e-5)


def _train_on_nan(rank: int, world: int, pair: tuple[Path, Path]) -> Any:
    init_distributed()
    config = _config(pair, "unused", **{"parallel.data": 2})
    models = check_run(config)
    grid = ParallelGrid.build(1, 1, 2)
    padded = models.padded_vocab(1)
    student = Student(config, models.student, models.student_config, grid, padded)
    (teacher,) = build_teachers(config, models, grid)
    (batch,) = _batches(1)
    mine = batch.rows(slice(4)).micro_batches(4)
    inputs = ask_teachers([teacher], mine)
    if rank == 1:  # one rank alone sees the damage
        hidden, _ = inputs[0].outputs[0]
        hidden[0, 0] = float("nan")
    before = {name: tensor.clone() for bucket in gather_student(student) for name, tensor in bucket}
    with pytest.raises(NonFiniteError) as caught:
        student.update(mine, inputs, config.objective, models.vocab_size)
    after = {name: tensor for bucket in gather_student(student) for name, tensor in bucket}
    return str(caught.value), all(torch.equal(before[name], after[name]) for name in before)


def test_non_finite_loss_on_one_rank_stops_every_rank_before_weights_change(
    pair: tuple[Path, Path],
) -> None:
    for message, unchanged in run_ranks(2, _train_on_nan, pair):
        assert "must be finite" in message
        assert "\n" not in message
        assert unchanged
