"""What vLLM servers say of given tokens: final hidden states in pooling mode (`POST /pooling`, raw bytes), or the
likeliest tokens (`POST /v1/completions` with `prompt_logprobs`). With retries and back-pressure."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import httpx
import torch

from opd_megatron.errors import TeacherError, one_line

_WIRE = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float16: "float16"}
_FIRST_PAUSE = 0.5
"""Seconds before a request is tried again; doubled each time."""

Sequences = Sequence[tuple[list[int], int]]
"""Token ids of each sequence, and how many rows of its end are wanted."""


class _Server:
    """One address and the requests that are on their way to it."""

    def __init__(self, url: str) -> None:
        self.url, self.under_way = url.rstrip("/"), 0


class Question(Protocol):
    """What is asked of a server about some sequences, and how its answer is read."""

    @property
    def path(self) -> str:
        """Of the request."""

    def body(self, sequences: Sequences) -> dict[str, Any]:
        """The request, in JSON."""

    def read(self, response: httpx.Response, sequences: Sequences, where: str) -> Any:
        """What is wanted of the answer. Raises TeacherError, which names the teacher as `where`."""


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """[T, width]: the states before each of the last tokens of every sequence, one sequence after another."""

    width: int
    dtype: torch.dtype
    path: str = "/pooling"

    def body(self, sequences: Sequences) -> dict[str, Any]:
        return {
            "input": [ids for ids, _ in sequences], "encoding_format": "bytes", "embed_dtype": _WIRE[self.dtype],
            "use_activation": False,
        }  # fmt: skip

    def read(self, response: httpx.Response, sequences: Sequences, where: str) -> torch.Tensor:
        try:
            shapes = [tuple(each["shape"]) for each in json.loads(response.headers["metadata"])["data"]]
        except (KeyError, TypeError, ValueError):
            raise TeacherError(
                f"{where} answers without the shapes of its states: start vLLM in pooling mode (docs/teachers.md)"
            ) from None
        expected = [(len(ids), self.width) for ids, _ in sequences]
        size = sum(rows * self.width for rows, _ in expected) * self.dtype.itemsize
        if shapes != expected or len(response.content) != size:
            raise TeacherError(
                f"{where} gives states of shapes {shapes[:3]} in {len(response.content)} bytes where {expected[:3]} "
                f"are asked for in {size}: it serves another model than teachers.N.path, or pools them "
                "(docs/teachers.md has the command that starts it)"
            )
        states = torch.frombuffer(bytearray(response.content), dtype=self.dtype).view(-1, self.width)
        parts = states.split([rows for rows, _ in expected])
        # The row before a token predicts it.
        return torch.cat([part[len(part) - n - 1 : -1] for part, (_, n) in zip(parts, sequences, strict=True)])


@dataclass(frozen=True, slots=True)
class TopTokens:
    """Ids [T, k + 1] and log-probabilities of the k likeliest tokens at each of the last tokens of every sequence, and
    of that token itself where it is none of them (else -1 and -inf)."""

    k: int
    path: str = "/v1/completions"

    def body(self, sequences: Sequences) -> dict[str, Any]:
        return {"prompt": [ids for ids, _ in sequences], "max_tokens": 1, "prompt_logprobs": self.k}

    def read(self, response: httpx.Response, sequences: Sequences, where: str) -> tuple[torch.Tensor, torch.Tensor]:
        count = sum(wanted for _, wanted in sequences)
        ids = torch.full((count, self.k + 1), -1, dtype=torch.int64)
        logprobs = torch.full((count, self.k + 1), -torch.inf)
        row = 0
        try:
            choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
            for choice, (tokens, wanted) in zip(choices, sequences, strict=True):
                found = choice["prompt_logprobs"]
                for token, entries in zip(tokens[-wanted:], found[len(tokens) - wanted : len(tokens)], strict=True):
                    kept = {int(name): entry["logprob"] for name, entry in entries.items()}
                    if len(kept) < self.k or token not in kept:
                        raise TeacherError(
                            f"{where} gives {len(kept)} log-probabilities of a token where teachers.N.top_k={self.k} "
                            f"are asked for: start it with --max-logprobs {self.k}, or lower top_k"
                        )
                    ids[row, : len(kept)] = torch.tensor(list(kept))
                    logprobs[row, : len(kept)] = torch.tensor(list(kept.values()))
                    row += 1
        except (KeyError, TypeError, ValueError, AttributeError):
            raise TeacherError(
                f"{where} answers without the log-probabilities of the tokens it was given: start a vLLM that "
                "generates, not one in pooling mode"
            ) from None
        return ids, logprobs


class TeacherServers:
    """Requests go to the server that has fewest, at most `in_flight` in all for each server. One that does not answer
    is passed over for another, or asked again after a pause."""

    def __init__(
        self, urls: Sequence[str], *, name: str, in_flight: int, timeout: float, retries: int, key: str | None = None
    ) -> None:
        """
        Args:
            name: of the teacher, for errors.
            key: what the servers want to be shown.
            timeout: seconds for an answer.
            retries: how often a request is sent again.
        """
        self._servers = [_Server(url) for url in urls]
        self._name, self._retries = name, retries
        self.in_flight = in_flight * len(urls)
        self._http = httpx.Client(
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)),
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            trust_env=False,
        )
        self._threads = ThreadPoolExecutor(self.in_flight, thread_name_prefix="teacher")
        self._lock = threading.Lock()

    def submit(self, question: Question, sequences: Sequences) -> Future[Any]:
        """Asks one of the servers. The result raises TeacherError."""
        return self._threads.submit(self._asked, question, list(sequences))

    def try_all(self, question: Question) -> None:
        """Asks every server about two tokens. Raises TeacherError for the first that gives no answer."""
        for server in self._servers:
            self._sent(server, question, [([0, 1], 1)], tries=self._retries + 1)

    def close(self) -> None:
        """Ends the connections; requests that have not begun are given up. Safe to call twice."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    def _asked(self, question: Question, sequences: Sequences) -> Any:
        problem: TeacherError | None = None
        tried: list[_Server] = []
        for attempt in range(self._retries + 1):
            with self._lock:
                server = min(self._servers, key=lambda each: (tried.count(each), each.under_way))
                server.under_way += 1
            try:
                return self._sent(server, question, sequences)
            except _UnreachableError as error:
                problem = error
                tried.append(server)
            finally:
                with self._lock:
                    server.under_way -= 1
            if attempt < self._retries and len(tried) >= len(self._servers):
                time.sleep(_FIRST_PAUSE * 2 ** (len(tried) // len(self._servers) - 1))
        assert problem is not None
        raise problem

    def _sent(self, server: _Server, question: Question, sequences: Sequences, tries: int = 1) -> Any:
        body = question.body(sequences)
        for attempt in range(tries):
            try:
                response = self._http.post(f"{server.url}{question.path}", json=body)
                break
            except httpx.HTTPError as error:
                if attempt == tries - 1:
                    raise self._unreachable(server, f"{type(error).__name__}: {one_line(error)}") from None
                time.sleep(_FIRST_PAUSE * 2**attempt)
        if response.status_code >= 500 or response.status_code == 429:
            raise self._unreachable(server, f"it answers {response.status_code} {response.text[:200]!r}")
        if response.status_code != 200:
            raise TeacherError(
                f"teacher {self._name} at {server.url} refuses a request ({response.status_code} "
                f"{' '.join(response.text.split())[:300]}): start it as docs/teachers.md says "
                "(in pooling mode, unless teachers.N.top_k is set)"
            )
        return question.read(response, sequences, f"teacher {self._name} at {server.url}")

    def _unreachable(self, server: _Server, why: str) -> _UnreachableError:
        return _UnreachableError(
            f"teacher {self._name} at {server.url} gives no hidden states ({why}): see its log, or raise "
            "teachers.N.request_timeout or retries"
        )


class _UnreachableError(TeacherError):
    """A server that another, or a later try, may stand in for."""
