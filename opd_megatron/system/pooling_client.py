"""Final hidden states from vLLM servers in pooling mode (`POST /pooling`, raw bytes): retries and back-pressure."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

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


class PoolingClient:
    """Requests go to the server that has fewest, at most `in_flight` in all for each server. One that does not answer
    is passed over for another, or asked again after a pause."""

    def __init__(self, urls: Sequence[str], *, name: str, in_flight: int, timeout: float, retries: int) -> None:
        """
        Args:
            name: of the teacher, for errors.
            timeout: seconds for an answer.
            retries: how often a request is sent again.
        """
        self._servers = [_Server(url) for url in urls]
        self._name, self._retries = name, retries
        self.in_flight = in_flight * len(urls)
        self._http = httpx.Client(timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)), trust_env=False)
        self._threads = ThreadPoolExecutor(self.in_flight, thread_name_prefix="teacher")
        self._lock = threading.Lock()

    def submit(self, sequences: Sequences, width: int, dtype: torch.dtype) -> Future[torch.Tensor]:
        """Asks for [T, width]: the states before each of the last tokens of every sequence, one sequence after another.

        The result raises TeacherError."""
        return self._threads.submit(self._asked, list(sequences), width, dtype)

    def try_servers(self, width: int, dtype: torch.dtype) -> None:
        """Asks every server for the states of two tokens. Raises TeacherError for the first that gives none."""
        for server in self._servers:
            self._sent(server, [([0, 1], 1)], width, dtype, tries=self._retries + 1)

    def close(self) -> None:
        """Ends the connections; requests that have not begun are given up. Safe to call twice."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    def _asked(self, sequences: Sequences, width: int, dtype: torch.dtype) -> torch.Tensor:
        problem: TeacherError | None = None
        tried: list[_Server] = []
        for attempt in range(self._retries + 1):
            with self._lock:
                server = min(self._servers, key=lambda each: (tried.count(each), each.under_way))
                server.under_way += 1
            try:
                return self._sent(server, sequences, width, dtype)
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

    def _sent(
        self, server: _Server, sequences: Sequences, width: int, dtype: torch.dtype, tries: int = 1
    ) -> torch.Tensor:
        body = {
            "input": [ids for ids, _ in sequences], "encoding_format": "bytes", "embed_dtype": _WIRE[dtype],
            "use_activation": False,
        }  # fmt: skip
        for attempt in range(tries):
            try:
                response = self._http.post(f"{server.url}/pooling", json=body)
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
                f"{' '.join(response.text.split())[:300]}): start it in pooling mode (docs/teachers.md)"
            )
        return self._rows(server, response, sequences, width, dtype)

    def _rows(
        self, server: _Server, response: httpx.Response, sequences: Sequences, width: int, dtype: torch.dtype
    ) -> torch.Tensor:
        try:
            shapes = [tuple(each["shape"]) for each in json.loads(response.headers["metadata"])["data"]]
        except (KeyError, TypeError, ValueError):
            raise TeacherError(
                f"teacher {self._name} at {server.url} answers without the shapes of its states: start vLLM in pooling "
                "mode (docs/teachers.md)"
            ) from None
        expected = [(len(ids), width) for ids, _ in sequences]
        size = sum(rows * width for rows, width in expected) * dtype.itemsize
        if shapes != expected or len(response.content) != size:
            raise TeacherError(
                f"teacher {self._name} at {server.url} gives states of shapes {shapes[:3]} in {len(response.content)} "
                f"bytes where {expected[:3]} are asked for in {size}: it serves another model than teachers.N.path, or "
                "pools them (docs/teachers.md has the command that starts it)"
            )
        states = torch.frombuffer(bytearray(response.content), dtype=dtype).view(-1, width)
        parts = states.split([rows for rows, _ in expected])
        # The row before a token predicts it.
        return torch.cat(
            [part[len(part) - wanted - 1 : -1] for part, (_, wanted) in zip(parts, sequences, strict=True)]
        )

    def _unreachable(self, server: _Server, why: str) -> _UnreachableError:
        return _UnreachableError(
            f"teacher {self._name} at {server.url} gives no hidden states ({why}): see its log, or raise "
            "teachers.N.request_timeout or retries"
        )


class _UnreachableError(TeacherError):
    """A server that another, or a later try, may stand in for."""
