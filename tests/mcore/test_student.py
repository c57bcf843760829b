"""One training step in every layout equals the same step in plain transformers and torch.optim.AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from opd_megatron.config import load_config
from opd_megatron.errors import NonFiniteError
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.layout import check
from opd_megatron.mcore.platform import init_distributed
from opd_megatron.mcore.student import Student, TeacherView
from opd_megatron.teacher import build_teachers
from opd_megatron.types import Batch
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
    """Per step 8 right-padded sequences of 16 tokens with responses of different lengths, some of one token."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(steps):
        tokens = torch.randint(0, 250, (8, 16), generator=generator)
        weights = torch.zeros(8, 16)
        for row in range(8):
            weights[row, 4 : 5 + row] = 1
        targets = torch.roll(tokens, -1, dims=1)
        batches.append(Batch(tokens, targets, weights))
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


def _train(rank: int, world: int, pair: tuple[Path, Path], layout: tuple[int, int, int, bool], kind: str) -> Any:
    init_distributed()
    tensor, pipeline, data, sequence_parallel = layout
    config = _config(pair, "unused", **{
        "parallel.tensor": tensor, "parallel.pipeline": pipeline, "parallel.data": data,
        "parallel.sequence_parallel": sequence_parallel, "objective.type": kind,
    })  # fmt: skip
    models = check(config)
    grid = ParallelGrid.build(tensor, pipeline, data, sequence_parallel=sequence_parallel)
    padded = models.padded_vocab(tensor)
    student = Student(config, models.student, models.student_config, grid, padded)
    (teacher,) = build_teachers(config, models.teachers, grid, padded)
    results = []
    for batch in _batches(STEPS):
        rows = slice(grid.dp_rank, None, data)
        mine = Batch(batch.tokens[rows], batch.targets[rows], batch.weights[rows]).micro_batches(2)
        views = [TeacherView(teacher.hidden_states(mine), teacher.head, 1.0)]
        results.append(student.update(mine, views, config.objective, models.vocab_size))
    weights = {name: tensor.clone() for bucket in student.export() for name, tensor in bucket}
    return [(r.metrics, r.tokens, r.grad_norm, r.lr) for r in results], weights


def _reference(pair: tuple[Path, Path], kind: str) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """The same training in float64 with dense logits and torch's own optimizer."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in pair)
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
        first, second = (log_p, log_q) if kind == "reverse_kl" else (log_q, log_p)
        loss = (first.exp() * (first - second)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    return curve, dict(student.named_parameters())


@pytest.fixture(scope="module", params=["reverse_kl", "forward_kl"])
def reference(request: pytest.FixtureRequest, pair: tuple[Path, Path]) -> tuple[str, Any, Any]:
    return request.param, *_reference(pair, request.param)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_equals_dense_float64_reference(
    pair: tuple[Path, Path], reference: tuple[str, Any, Any], layout: tuple[int, int, int, bool]
) -> None:
    kind, curve, expected = reference
    tensor, pipeline, data, _ = layout
    ranks = run_ranks(tensor * pipeline * data, _train, pair, layout, kind)
    for steps, _ in ranks:
        for (metrics, tokens, grad_norm, lr), (loss, norm) in zip(steps, curve, strict=True):
            assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
            assert metrics[kind] == pytest.approx(loss, rel=1e-5)
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


def _train_on_nan(rank: int, world: int, pair: tuple[Path, Path]) -> Any:
    init_distributed()
    config = _config(pair, "unused", **{"parallel.data": 2})
    models = check(config)
    grid = ParallelGrid.build(1, 1, 2)
    padded = models.padded_vocab(1)
    student = Student(config, models.student, models.student_config, grid, padded)
    (teacher,) = build_teachers(config, models.teachers, grid, padded)
    (batch,) = _batches(1)
    mine = Batch(batch.tokens[:4], batch.targets[:4], batch.weights[:4]).micro_batches(4)
    states = teacher.hidden_states(mine)
    if rank == 1:  # one rank alone sees the damage
        states.hidden[0][0, 0] = float("nan")
    before = {name: tensor.clone() for bucket in student.export() for name, tensor in bucket}
    with pytest.raises(NonFiniteError) as caught:
        student.update(mine, [TeacherView(states, teacher.head, 1.0)], config.objective, models.vocab_size)
    after = {name: tensor for bucket in student.export() for name, tensor in bucket}
    return str(caught.value), all(torch.equal(before[name], after[name]) for name in before)


def test_non_finite_loss_on_one_rank_stops_every_rank_before_weights_change(
    pair: tuple[Path, Path],
) -> None:
    for message, unchanged in run_ranks(2, _train_on_nan, pair):
        assert "must be finite" in message
        assert "\n" not in message
        assert unchanged
