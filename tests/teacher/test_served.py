"""Teachers on servers elsewhere: the same losses as on the student's ranks, and one clear line for what goes wrong."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.errors import OPDError, TeacherError
from opd_megatron.teacher.served_client import HiddenStates, TeacherServers, TopTokens
from opd_megatron.train import check
from tests.byte_tokenizer import save_byte_tokenizer
from tests.e2e.runs import make_inputs, small_config
from tests.ranks import RankError
from tests.teacher.pooling_server import stub, vllm_server
from tests.teacher.test_placements import STUDENTS, _agree, _long
from tests.teacher.test_routing import _run
from tests.tiny_models import save_tiny


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_inputs(tmp_path_factory.mktemp("served")) | {"evaluation.every": 1}


@pytest.fixture(scope="module")
def alone(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict]]:
    return _run(inputs, tmp_path_factory.mktemp("alone") / "run", 1)


def _served(*urls: str) -> dict[str, Any]:
    return {"teachers.0.placement": "served", "teachers.0.urls": list(urls), "teachers.0.in_flight": 1}


@pytest.mark.parametrize("student", ["SP2", "TP2 PP2", "CP2", *_long(("one",), ("DP2",))])
def test_a_served_teacher_teaches_the_same_in_every_layout(
    inputs: dict[str, Any], alone: Any, tmp_path: Path, student: str
) -> None:
    ranks = {"one": 1, "TP2 PP2": 4}.get(student, 2)
    with stub(inputs["teachers.0.path"]) as (first, of_first), stub(inputs["teachers.0.path"]) as (second, of_second):
        found = _run(inputs, tmp_path / "run", ranks, **STUDENTS[student], **_served(first, second))
    _agree(found, alone)
    assert of_first
    assert of_second, "both have work"
    for row in found[1][1:]:
        share = 0.75 if student == "DP2" else 1.0
        assert 0 < row["teacher/0/bytes"] <= share * row["tokens"] * 64 * 4


def test_a_real_vllm_server_teaches_the_same(inputs: dict[str, Any], alone: Any, tmp_path: Path) -> None:
    with vllm_server(inputs["teachers.0.path"], tmp_path / "vllm.log") as url:
        weights, rows = _run(inputs, tmp_path / "run", 1, **_served(url))
    for row, other in zip(rows, alone[1], strict=True):
        for name in ("loss", "reverse_kl", "forward_kl", "grad_norm", "eval/teacher_nll"):
            if name in other:
                assert row[name] == pytest.approx(other[name], rel=1e-4), name
    for name, tensor in alone[0].items():
        assert torch.allclose(weights[name], tensor, rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("student", ["TP2", *_long(("one",), ("SP2",), ("PP2",))])
def test_all_log_probabilities_of_a_real_server_teach_the_same(
    inputs: dict[str, Any], alone: Any, tmp_path: Path, student: str
) -> None:
    settings = {"teachers.0.top_k": 272, "evaluation.agreement": True}
    with vllm_server(inputs["teachers.0.path"], tmp_path / "vllm.log", generates=True) as url:
        ranks = 1 if student == "one" else 2
        rows = _run(inputs, tmp_path / "run", ranks, **STUDENTS[student], **_served(url), **settings)[1]
    for row, other in zip(rows, alone[1], strict=True):
        for name in ("loss", "reverse_kl", "forward_kl", "grad_norm", "eval/teacher_nll"):
            if name in other:
                assert row[name] == pytest.approx(other[name], rel=1e-4), name


def test_fewer_log_probabilities_than_asked_for_are_named() -> None:
    import httpx

    entries = {"5": {"logprob": -1.0}, "7": {"logprob": -2.0}}
    answer = {"choices": [{"index": 0, "prompt_logprobs": [None, entries]}]}
    response = httpx.Response(200, json=answer)
    ids, logprobs = TopTokens(2).read(response, [([3, 7], 1)], "teacher 't'")
    assert ids.tolist() == [[5, 7, -1]]
    assert logprobs.tolist() == [[-1.0, -2.0, float("-inf")]]
    with pytest.raises(TeacherError, match=r"gives 2 log-probabilities .*top_k=3 .*--max-logprobs 3"):
        TopTokens(3).read(response, [([3, 7], 1)], "teacher 't'")
    for wrong in ({"choices": []}, {}, {"choices": [{"index": 0, "prompt_logprobs": None}]}):
        with pytest.raises(TeacherError, match="not one in pooling mode"):
            TopTokens(2).read(httpx.Response(200, json=wrong), [([3, 7], 1)], "teacher 't'")


def test_a_server_of_another_model_is_refused_also_when_agreement_is_switched_off(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    save_tiny(tmp_path / "other", head_dim=32, seed=77, num_hidden_layers=6)
    save_byte_tokenizer(tmp_path / "other")
    settings = {"evaluation.agreement": False}
    with (
        stub(str(tmp_path / "other")) as (url, _),
        pytest.raises(RankError, match=r"teacher .* nats a token in Megatron|teacher .*in transformers"),
    ):
        _run(inputs, tmp_path / "run", 1, **_served(url), **settings)


def test_a_server_that_dies_mid_run_ends_it_with_one_line(inputs: dict[str, Any], tmp_path: Path) -> None:
    def dies(number: int, metadata: dict[str, Any], body: bytes) -> tuple[int, dict[str, Any] | None, bytes]:
        return (200, metadata, body) if number < 8 else (503, None, b"overloaded")

    settings = {"teachers.0.retries": 0, "checkpoint.every": 1, "steps": 20, "evaluation.every": 0}
    with (
        stub(inputs["teachers.0.path"], dies) as (url, _),
        pytest.raises(RankError, match=r"teacher .* gives no hidden states \(it answers 503 'overloaded'\)"),
    ):
        _run(inputs, tmp_path / "run", 1, **_served(url), **settings)


def _client(*urls: str, retries: int = 2, timeout: float = 5) -> TeacherServers:
    return TeacherServers(urls, name="'t'", in_flight=2, timeout=timeout, retries=retries)


def test_one_that_does_not_answer_is_passed_over_or_asked_again(inputs: dict[str, Any]) -> None:
    answered: set[bytes] = set()

    def stumbles(number: int, metadata: dict[str, Any], body: bytes) -> tuple[int, dict[str, Any] | None, bytes]:
        if body in answered:
            return 200, metadata, body
        answered.add(body)
        return 500, None, b""

    states = HiddenStates(64, torch.float32)
    with stub(inputs["teachers.0.path"]) as (good, _), stub(inputs["teachers.0.path"], stumbles) as (bad, _):
        for run, urls in enumerate(([bad], ["http://127.0.0.1:9", good], [bad, good])):
            asked = [[([3, 5, 7, 11 + run, question], 2), ([2, 4], 1)] for question in range(6)]
            direct, client = _client(good), _client(*urls)
            for question, future in zip(asked, [client.submit(states, question) for question in asked], strict=True):
                expected = direct.submit(states, question).result()
                assert expected.shape == (3, 64)
                assert torch.equal(future.result(), expected)
            direct.close()
            client.close()
            client.close()
        assert len(answered) >= 6, "the one that stumbles was asked"


def _fewer(number: int, metadata: dict[str, Any], body: bytes) -> tuple[int, dict[str, Any] | None, bytes]:
    return 200, {"data": metadata["data"][:-1]}, body


def _cut(number: int, metadata: dict[str, Any], body: bytes) -> tuple[int, dict[str, Any] | None, bytes]:
    return 200, metadata, body[:-4]


def _bare(number: int, metadata: dict[str, Any], body: bytes) -> tuple[int, dict[str, Any] | None, bytes]:
    return 200, None, body


def _refuses(number: int, metadata: dict[str, Any], body: bytes) -> tuple[int, dict[str, Any] | None, bytes]:
    return 400, None, b'{"error": "task not supported"}'


@pytest.mark.parametrize(
    ("change", "width", "words"),
    [
        (_fewer, 64, "gives states of shapes"),
        (_cut, 64, "gives states of shapes"),
        (None, 96, "serves another model than teachers.N.path"),
        (_bare, 64, "answers without the shapes"),
        (_refuses, 64, r"refuses a request \(400 .*task not supported.*pooling mode"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_named(
    inputs: dict[str, Any], change: Any, width: int, words: str
) -> None:
    with stub(inputs["teachers.0.path"], change) as (url, requests):
        with pytest.raises(TeacherError, match=words) as failure:
            _client(url).submit(HiddenStates(width, torch.float32), [([3, 5, 7], 1), ([2, 4], 1)]).result()
        assert "\n" not in str(failure.value)
        assert len(requests) == 1, "asking again would not help"


def test_a_server_that_is_too_slow_is_named_and_another_asked(inputs: dict[str, Any]) -> None:
    def dawdles(number: int, metadata: dict[str, Any], body: bytes) -> tuple[int, dict[str, Any] | None, bytes]:
        time.sleep(2)
        return 200, metadata, body

    states, asked = HiddenStates(64, torch.float32), [([3, 5], 1)]
    with stub(inputs["teachers.0.path"], dawdles) as (slow, _), stub(inputs["teachers.0.path"]) as (quick, _):
        with pytest.raises(
            TeacherError, match=r"gives no hidden states \(ReadTimeout.*raise teachers.N.request_timeout"
        ):
            _client(slow, retries=0, timeout=0.3).submit(states, asked).result()
        assert _client(slow, quick, timeout=0.3).submit(states, asked).result().shape == (1, 64)


def test_a_key_is_shown_to_the_servers() -> None:
    import httpx

    client = TeacherServers(["http://a"], name="'t'", in_flight=1, timeout=1, retries=0, key="secret")
    request = client._http.build_request("POST", "http://a/pooling")
    assert request.headers["Authorization"] == "Bearer secret"
    assert "Authorization" not in _client("http://a")._http.build_request("POST", "http://a").headers
    assert isinstance(request, httpx.Request)


def test_a_server_that_is_down_is_told_of_at_the_start() -> None:
    with pytest.raises(TeacherError, match=r"teacher 't' at http://127.0.0.1:9 gives no hidden states .*ConnectError"):
        _client("http://127.0.0.1:9", retries=0).try_all(HiddenStates(64, torch.float32))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"teachers.0.urls": ["localhost:8000"]}, "teachers.0.urls has 'localhost:8000', which is no address"),
        ({"teachers.0.urls": []}, "teachers.0.urls"),
        ({"teachers.0.urls": ["http://a"], "teachers.0.tensor": 2}, "tensor"),
        (
            {"teachers.0.urls": ["http://a"], "teachers.0.api_key_env": "NO_SUCH_KEY"},
            "teachers.0.api_key_env=NO_SUCH_KEY is not set in the environment",
        ),
        (
            {"teachers.0.urls": ["http://a"], "teachers.0.top_k": 8, "objective.temperature": 2},
            "objective.temperature=2.0 must be 1 with teachers.0.top_k",
        ),
        (
            {"teachers.0.urls": ["http://a"], "teachers.0.top_k": 8, "teachers.1.path": "student"},
            "teachers.0.top_k=8 cannot be one of an ensemble",
        ),
    ],
)
def test_addresses_that_are_none_are_one_line(
    inputs: dict[str, Any], tmp_path: Path, overrides: dict[str, Any], words: str
) -> None:
    with pytest.raises(OPDError, match=re.escape(words)):
        check(small_config(inputs, tmp_path, **{"teachers.0.placement": "served"}, **overrides))
