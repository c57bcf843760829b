"""Teachers with another tokenizer: the same losses as written out densely, in every layout and place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.config import RunConfig
from opd_megatron.data.alignment import TokenizerPair
from opd_megatron.data.encoder import Encoder
from opd_megatron.errors import ConfigError
from opd_megatron.train import check
from opd_megatron.types import Rollout
from tests.byte_tokenizer import save_byte_tokenizer
from tests.e2e.runs import make_inputs, small_config
from tests.other_tokenizers import END, save_bpe_tokenizer
from tests.ranks import RankError, run_ranks
from tests.teacher.dense import DenseStep, one_step
from tests.teacher.pooling_server import stub
from tests.teacher.test_cached import _cache
from tests.teacher.test_placements import STUDENTS, _agree, _long, _own
from tests.teacher.test_routing import SETTINGS, _run
from tests.tiny_models import save_tiny

SPANS = {"teachers.0.alignment": "spans", "objective.type": "on_policy_distill"}
SHARED = {"teachers.0.alignment": "shared_vocabulary", "objective.type": "reverse_kl"}
CASES = {"spans": SPANS, "shared": SHARED}


def _inputs(folder: Path, *, sentencepiece: bool = False) -> dict[str, Any]:
    """A student of byte pairs, and a teacher of others."""
    inputs = make_inputs(folder)
    sizes = {"student": ("sums", 350, False), "teacher": ("words", 600 if sentencepiece else 420, sentencepiece)}
    for number, (name, (texts, size, pieces)) in enumerate(sizes.items()):
        tokenizer = save_bpe_tokenizer(folder / name, texts, size, sentencepiece=pieces)
        # More columns than tokens, as most models have, and not the same number.
        columns = len(tokenizer) + 6
        save_tiny(folder / name, head_dim=32, seed=number + 1, vocab_size=columns, hidden_size=64 + 32 * number)
    return inputs | {"evaluation.every": 1}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _inputs(tmp_path_factory.mktemp("aligned"))


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CASES[request.param]


@pytest.fixture(scope="module")
def alone(inputs: dict[str, Any], case: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return _run(inputs, tmp_path_factory.mktemp("alone") / "run", 1, **case, **{"logging.rollouts": True})


def _pair(config: RunConfig, models: Any) -> TokenizerPair:
    from opd_megatron.data.tokenizer import load_tokenizer, stop_token_ids

    mine, other = (Encoder.of(load_tokenizer(path), config.data) for path in (models.student, models.teachers[0][0]))
    assert mine.template is not None
    stops = stop_token_ids(mine.template, models.student)
    return TokenizerPair(mine.tokenizer, other.tokenizer, stops=stops, ends=(mine.end_of_turn, other.end_of_turn))


def _model(folder: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def _logprobs(model: Any, context: Any, answer: list[int]) -> torch.Tensor:
    ids = torch.tensor([[*context, *answer]])
    found: torch.Tensor = model(ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
    return found


def _shared_kl(log_p: torch.Tensor, log_q: torch.Tensor, shared: Any) -> torch.Tensor:
    mine, other = shared
    p, q = log_p[:, mine].exp(), log_q[:, other].exp()
    p, q = (torch.cat([each, 1 - each.sum(-1, keepdim=True)], -1) for each in (p, q))
    return (p * (p / q).log()).sum(-1)


def _dense(models: Any, pair: TokenizerPair, rollouts: list[Rollout], *, spans: bool) -> DenseStep:
    student, teacher = _model(models.student), _model(models.teachers[0][0])
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for rollout in rollouts:
        answer = rollout.response_ids.tolist()
        found = pair.translated(answer)
        log_p = _logprobs(student, rollout.prompt.token_ids, answer)
        with torch.no_grad():
            log_q = _logprobs(teacher, rollout.prompt.contexts[0], found.ids)
        tokens += len(answer)
        if not spans:
            met = [(i, row) for i, row in enumerate(found.rows.tolist()) if row >= 0]
            places, rows = (list(each) for each in zip(*met, strict=True))
            total = total + _shared_kl(log_p[places], log_q[rows], pair.shared).sum()
            continue
        of_teacher = log_q[range(len(found.ids)), found.ids]
        assert rollout.logprobs is not None
        drawn, now = rollout.logprobs.double(), log_p[range(len(answer)), answer]
        for span in range(max(found.spans) + 1):
            mine, other = torch.tensor(found.spans == span), torch.tensor(found.of_teacher == span)
            advantage = (of_teacher[other].sum() - drawn[mine].sum()) / mine.sum()
            weight = (now[mine].detach() - drawn[mine]).exp().clamp(max=2.0)
            total = total - (weight * (now[mine] - now[mine].detach()).exp() * advantage).sum()
    gradients = torch.autograd.grad(total / tokens, [*student.parameters()])
    return DenseStep(float(total / tokens), float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt()))


def _one_step(rank: int, world_size: int, config: RunConfig) -> tuple[dict[str, Any], DenseStep]:
    models = check(config)
    row, taken, _ = one_step(config, models)
    spans = config.teachers[0].alignment == "spans"
    return row, _dense(models, _pair(config, models), taken, spans=spans)


@pytest.mark.parametrize("sentencepiece", [False, True])
def test_a_step_equals_the_dense_reference(case: dict[str, Any], tmp_path: Path, sentencepiece: bool) -> None:
    inputs = _inputs(tmp_path, sentencepiece=sentencepiece)
    config = small_config(inputs, tmp_path / "run", **(SETTINGS | case | {"rollout.max_new_tokens": 16}))
    [(row, expected)] = run_ranks(1, _one_step, config)
    assert row["loss"] == pytest.approx(expected.loss, rel=1e-5, abs=1e-7)
    assert row["grad_norm"] == pytest.approx(expected.grad_norm, rel=1e-5)
    assert 0.3 < row["teacher/0/aligned"] <= 1


@pytest.mark.parametrize("student", ["SP2", *_long(("TP2 PP2",), ("TP2",), ("PP2",), ("DP2",))])
def test_it_is_the_same_in_every_layout(
    inputs: dict[str, Any], case: dict[str, Any], alone: Any, tmp_path: Path, student: str
) -> None:
    ranks = {"one": 1, "TP2 PP2": 4}.get(student, 2)
    _agree(_run(inputs, tmp_path / "run", ranks, **STUDENTS[student], **case), alone)


def test_it_is_the_same_wherever_the_teacher_is(
    inputs: dict[str, Any], case: dict[str, Any], alone: Any, tmp_path: Path
) -> None:
    _agree(_run(inputs, tmp_path / "own", 4, **STUDENTS["SP2"], **case, **_own(pipeline=2)), alone)
    relaid = {"teachers.0.tensor": 1, "teachers.0.pipeline": 2}
    _agree(_run(inputs, tmp_path / "relaid", 2, **STUDENTS["TP2"], **case, **relaid), alone)
    with stub(inputs["teachers.0.path"]) as (url, _):
        served = {"teachers.0.placement": "served", "teachers.0.urls": [url], "evaluation.agreement": True}
        _agree(_run(inputs, tmp_path / "served", 2, **STUDENTS["DP2"], **case, **served), alone)


def test_it_is_the_same_from_a_cache(inputs: dict[str, Any], case: dict[str, Any], tmp_path: Path) -> None:
    expected = _run(inputs, tmp_path / "expected", 1, **case, **{"logging.rollouts": True})
    _cache(inputs, tmp_path / "states", 1, {"rollouts": [tmp_path / "expected"]}, **case)
    cached = {"teachers.0.placement": "cached", "teachers.0.cache": str(tmp_path / "states")}
    _agree(_run(inputs, tmp_path / "run", 1, **case, **cached, **{"evaluation.agreement": True}), expected)


def test_a_task_may_have_a_teacher_of_another_tokenizer(inputs: dict[str, Any], tmp_path: Path) -> None:
    """Micro batches of both tasks: one teacher sees all columns, the other those that it shares."""
    rows = [
        {"question": f"What is {n} plus {n}?", "answer": str(2 * n), "task": task} for n in range(8) for task in "ab"
    ]  # fmt: skip
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    save_bpe_tokenizer(tmp_path / "like", "sums", 350)
    columns = json.loads((Path(inputs["student.path"]) / "config.json").read_text())["vocab_size"]
    save_tiny(tmp_path / "like", head_dim=32, seed=9, vocab_size=columns, num_hidden_layers=2)
    routed = {
        "data.source": str(tmp_path / "tasks.jsonl"), "data.task_column": "task", "teachers.0.name": "other",
        "teachers.0.alignment": "shared_vocabulary", "teachers.1.name": "like",
        "teachers.1.path": str(tmp_path / "like"), "teachers.1.dtype": "fp32", "routes": {"a": "other", "b": "like"},
        "evaluation.agreement": True, "parallel.micro_batch_size": 4,
    }  # fmt: skip
    config = small_config(inputs, tmp_path / "step", **(SETTINGS | routed))
    [(row, loss)] = run_ranks(1, _routed_step, config)
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    assert row["teacher/like/tokens"] + row["teacher/other/tokens"] != row["tokens"], "the other counts its own tokens"
    assert "teacher/like/aligned" not in row
    alone = _run(inputs, tmp_path / "alone", 1, **routed)
    _agree(_run(inputs, tmp_path / "split", 4, **STUDENTS["TP2 PP2"], **routed), alone)


def _routed_step(rank: int, world_size: int, config: RunConfig) -> tuple[dict[str, Any], float]:
    models = check(config)
    row, taken, _ = one_step(config, models)
    of_other = [each for each in taken if each.prompt.task == "a"]
    student, like = _model(models.student), _model(models.teachers[1][0])
    total = _dense(models, _pair(config, models), of_other, spans=False).loss * sum(
        len(each.response_ids) for each in of_other
    )
    for each in taken:
        if each.prompt.task == "b":
            p, q = (_logprobs(m, each.prompt.token_ids, each.response_ids.tolist()) for m in (student, like))
            total += float((p.exp() * (p - q)).sum())
    return row, total / sum(len(each.response_ids) for each in taken)


def test_a_byte_student_learns_from_a_teacher_with_merges(inputs: dict[str, Any], tmp_path: Path) -> None:
    """Sampled bytes of an untrained student are mostly no text."""
    save_tiny(tmp_path / "student", head_dim=32, seed=1)
    save_byte_tokenizer(tmp_path / "student")
    settings = {"student.path": str(tmp_path / "student"), "steps": 6, "optimizer.lr": 3e-3}
    rows = _run(inputs, tmp_path / "run", 1, **settings, **SHARED)[1]
    assert rows[-1]["reverse_kl"] < rows[1]["reverse_kl"]
    assert all(0.2 < row["teacher/0/aligned"] <= 1 for row in rows[1:])


def test_another_tokenizer_is_refused_unless_asked_for(inputs: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"token id .* is .* to the student .*or set teachers\.N\.alignment"):
        _run(inputs, tmp_path / "run", 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (SPANS | {"objective.type": "gkd"}, "alignment=spans does not go with objective.type=gkd.*shared_vocabulary"),
        (SHARED | {"objective.type": "jsd"}, "alignment=shared_vocabulary does not go with objective.type=jsd.*spans"),
        (
            SHARED | {"teachers.0.path": "student"},
            "alignment=shared_vocabulary has no effect with",
        ),
        (SHARED | {"teachers.1.path": "x"}, "alignment=shared_vocabulary cannot be one of an ensemble"),
        (
            SHARED | {"teachers.0.placement": "served", "teachers.0.urls": ["http://a"], "teachers.0.top_k": 8},
            "alignment=shared_vocabulary needs the hidden states",
        ),
        ({"teachers.0.alignment": "bytes"}, "teachers.0.alignment"),
    ],
)
def test_what_does_not_go_together_is_named(
    inputs: dict[str, Any], tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        small_config(inputs, tmp_path / "run", **settings)


def test_tokenizers_without_bytes_are_refused_at_the_start(inputs: dict[str, Any], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"[UNK]": 0, "Hello": 1}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    save_tiny(tmp_path / "words")
    words = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", eos_token="[UNK]", chat_template="x")
    words.save_pretrained(tmp_path / "words")
    with pytest.raises(RankError, match=r"bytes of the tokens of teacher .* cannot be told"):
        _run(inputs, tmp_path / "run", 1, **SHARED, **{"teachers.0.path": str(tmp_path / "words")})


def test_data_and_start_say_what_the_teacher_reads(
    inputs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from opd_megatron.run.data_command import show_data

    lines = "\n".join(show_data(small_config(inputs, tmp_path / "run", **SPANS), 1))
    assert "has another tokenizer (386 tokens), 268 of the student's 350 are in it" in lines
    assert "teacher 0 reads in its place" in lines
    assert "[user] What is" in lines.split("reads in its place")[1]
    assert END in lines
