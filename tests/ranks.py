"""Real gloo ranks for tests: a pool of worker processes that is started once and runs many distributed tests.

    def _body(rank: int, world_size: int, scale: float) -> float: ...          # module level, picklable
    def test_something(): results = run_ranks(4, _body, 2.0)                   # one result per rank, in order

Importing torch and Megatron costs ten seconds, so a server that has them forks the workers, and the workers stay. Each
call makes a fresh default process group and destroys it again. A rank that fails or hangs fails the test and the pool
is replaced.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch.distributed as dist

_MANY_THREADS = 300
"""Every group has three, which wake up now and then: with a thousand of them the kernel takes half of the time."""
MAX_RANKS = 6
_ATTEMPTS = 3
_JOIN_SECONDS = 150.0
"""For the ranks to make their process group; the imports of new workers take most of it."""
_FEW_THREADS = 24
"""Looking through all objects takes a tenth of a second, so a few threads may stay for a while."""


class RankError(AssertionError):
    """A rank raised; the message holds its traceback and `cause` the exception it raised (if it pickles)."""

    def __init__(self, message: str, cause: BaseException | None = None) -> None:
        super().__init__(message)
        self.cause = cause


def run_ranks(world_size: int, body: Callable[..., Any], *args: Any, timeout: float = 300.0) -> list[Any]:
    """Runs `body(rank, world_size, *args)` on `world_size` gloo ranks; returns their results in rank order."""
    assert world_size <= MAX_RANKS
    with tempfile.TemporaryDirectory() as folder:
        for attempt in range(_ATTEMPTS):
            workers = _pool(world_size)[:world_size]
            jobs = [(rank, world_size, f"{folder}/store{attempt}", body, args, timeout) for rank in range(world_size)]
            # Once in some thousand times gloo's ranks wait for each other for ever, before the body has begun.
            if _have_joined(workers, jobs, time.monotonic() + _JOIN_SECONDS):
                return _collect(workers, time.monotonic() + timeout)
            close_pool()
    raise RankError(f"{world_size} ranks made no process group in {_ATTEMPTS} attempts")


def as_launched(monkeypatch: pytest.MonkeyPatch, world_size: int, rank: int = 0) -> None:
    """Makes this process look like one that torchrun started."""
    variables = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


_workers: list[tuple[Any, Connection]] = []


def _pool(size: int) -> list[tuple[Any, Connection]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    while len(_workers) < size:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,))  # not a daemon: saving forks writers
        process.start()
        theirs.close()
        _workers.append((process, ours))
    return _workers


@atexit.register
def close_pool() -> None:
    """Ends the workers; the next `run_ranks` starts new ones."""
    leaving = [_workers.pop() for _ in range(len(_workers))]
    for _, connection in leaving:
        connection.close()  # an idle worker ends by itself, and the helpers it started with it
    for process, _ in leaving:
        process.join(timeout=5)
        process.kill()  # one that hangs does not
        process.join()


def _have_joined(workers: list[tuple[Any, Connection]], jobs: list[Any], deadline: float) -> bool:
    """Hands out the jobs and waits until every rank is in the process group."""
    try:
        for (_, connection), job in zip(workers, jobs, strict=True):
            connection.send(job)
        return all(
            connection.poll(max(0.0, deadline - time.monotonic())) and connection.recv() is True
            for _, connection in workers
        )
    except (EOFError, OSError):  # a worker has ended
        return False


def _collect(workers: list[tuple[Any, Connection]], deadline: float) -> list[Any]:
    results: list[Any] = [None] * len(workers)
    pending = dict(enumerate(workers))
    failure: RankError | None = None
    while pending and time.monotonic() < deadline:
        ready = wait([connection for _, connection in pending.values()], deadline - time.monotonic())
        for rank, (process, connection) in list(pending.items()):
            if connection not in ready:
                continue
            try:
                ok, value, trace = pickle.loads(connection.recv_bytes())
            except EOFError:
                ok, value, trace = False, None, f"rank process ended with exit code {process.exitcode}"
            del pending[rank]
            if ok:
                results[rank] = value
            elif failure is None:
                failure = RankError(f"rank {rank} failed:\n{trace}", value)
                deadline = min(deadline, time.monotonic() + 10)  # the others may wait for it in a collective
    if pending:
        close_pool()
        failure = failure or RankError(f"ranks {sorted(pending)} did not finish in time")
    if failure is not None:
        raise failure
    return results


def _serve(connection: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            rank, world_size, store, body, args, timeout = connection.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(0.9 * timeout)  # where it hangs goes to the test's stderr
        os.environ.pop("LOCAL_WORLD_SIZE", None)  # of a body that imitated several machines
        os.environ.update(  # as torchrun would
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="localhost", MASTER_PORT="1",
            TORCHELASTIC_RUN_ID=store,
        )  # fmt: skip
        joined = False
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size,
                timeout=timedelta(seconds=timeout),
            )  # fmt: skip
            connection.send(True)
            joined = True
            try:
                reply = (True, body(rank, world_size, *args), "")
            finally:
                if dist.is_initialized():  # a whole run ends its own
                    dist.destroy_process_group()
        except Exception as error:
            reply = (False, error, traceback.format_exc())
            if not joined:
                connection.send(False)
        faulthandler.cancel_dump_traceback_later()
        _reply(connection, reply)
        body = args = reply = None
        _free_process_groups()
        if len(os.listdir("/proc/self/task")) > _MANY_THREADS:
            return  # something still holds groups of bodies that ended: a new worker costs less than their threads


def _free_process_groups() -> None:
    """Ends the threads of gloo groups that the body made: a group keeps some until nothing refers to it any more."""
    if len(os.listdir("/proc/self/task")) <= _FEW_THREADS:
        return
    rotary = sys.modules.get("megatron.core.models.common.embeddings.rotary_pos_embedding")
    if rotary is not None:  # its cache of tables holds the module, which holds a group
        rotary.RotaryEmbedding.forward.cache_clear()
    gc.collect()  # models and optimizers refer to themselves


def _reply(connection: Connection, reply: tuple[bool, Any, str]) -> None:
    """Sends the reply by value: what `send` shares of a tensor is gone when this worker ends before it was fetched."""
    try:
        message = pickle.dumps(reply)
    except Exception:  # an exception or result that does not pickle: its text must do
        message = pickle.dumps((False, None, reply[2] or "the result of the rank does not pickle"))
    connection.send_bytes(message)
