"""The engine's side of the pipe: `python -m opd_megatron.rollout.vllm_server FD`, a process that owns `vllm.LLM`.

Started by `vllm_engine.VLLMEngine` with the descriptor of a connected socket. Requests are `(name, arguments)`,
replies `("ok", value)` or `("refused", reason)`; before its reply, a request that samples sends
`("progress", (done, of))` now and then. All of them are plain Python numbers, strings and lists. The first request is
`start`. vLLM checks what it is asked to sample before it samples: a request that it refuses is refused to the client,
which would be no wiser after a new start. Any other exception ends the process: a vLLM that has raised once is not to
be trusted, and the client knows how to start another one.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_SAMPLING = ("generate", "token_logprobs")
_TELL_SECONDS = 1.0


class Server:
    """One vLLM engine; public methods are the requests."""

    def __init__(self, options: dict[str, Any], tell: Callable[[tuple[int, int]], None] = lambda _: None) -> None:
        """`tell`: gets (done, of) of the sequences that are sampled, at most once a second."""
        from vllm import LLM

        self.llm = LLM(**options)
        self._tell, self._of, self._told = tell, 0, 0.0
        engine = self.llm.llm_engine
        engine.step = self._telling(engine.step)

    def generate(
        self, prompts: list[list[int]], seeds: list[int | None], sampling: dict[str, Any]
    ) -> list[tuple[list[int], list[float], str]]:
        """Returns (sampled tokens, their logprobs under the sampling policy, finish reason) of each prompt."""
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                **sampling,
                seed=seed,
                logprobs=0,
                ignore_eos=True,  # only `stop_token_ids` end an answer
                detokenize=False,
            )
            for seed in seeds
        ]
        outputs = [result.outputs[0] for result in self._run(prompts, parameters)]
        return [
            (
                list(out.token_ids),
                [step[token].logprob for token, step in zip(out.token_ids, out.logprobs, strict=True)],
                str(out.finish_reason),
            )
            for out in outputs
        ]

    def token_logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, ignore_eos=True, detokenize=False)
        results = self._run(sequences, [parameters] * len(sequences))
        return [
            [step[token].logprob for token, step in zip(ids[1:], result.prompt_logprobs[1:], strict=True)]
            for ids, result in zip(sequences, results, strict=True)
        ]

    def begin_update(self) -> None:
        self.llm.collective_rpc("opd_begin_update")

    def load(self, paths: list[str]) -> str | None:
        """Loads one file of full tensors into all workers, or a file of shards into each."""
        problem = _first(self.llm.collective_rpc("opd_load", args=(paths,)))
        for path in paths:
            os.unlink(path)
        return problem

    def end_update(self) -> str | None:
        problem = _first(self.llm.collective_rpc("opd_end_update"))
        # Cached prefixes hold keys and values of the old weights; vLLM does not drop them by itself.
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be reset after a weight update")
        return problem

    def sleep(self) -> None:
        self.llm.sleep(level=2)  # weights are not kept: the next update brings all of them

    def wake(self, tag: str) -> None:
        self.llm.wake_up(tags=[tag])

    def _run(self, prompts: list[list[int]], parameters: list[Any]) -> list[Any]:
        self._of, self._told = len(prompts), time.monotonic()
        return self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)

    def _telling(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """The engine's step, which says that it lives: one that hangs has no other sign than silence."""

        def run() -> Any:
            outputs, now = step(), time.monotonic()
            if now - self._told >= _TELL_SECONDS:
                self._told = now
                self._tell((self._of - self.llm.llm_engine.get_num_unfinished_requests(), self._of))
            return outputs

        return run

    def is_idle(self) -> bool:
        """Tells whether a request that failed left nothing behind: vLLM takes back what it had added of it."""
        return not self.llm.llm_engine.has_unfinished_requests()


def _first(problems: list[str | None]) -> str | None:
    return next((problem for problem in problems if problem), None)


def serve(connection: Connection) -> None:
    """Answers requests until the client hangs up."""
    import vllm  # noqa: F401  most of the start, worth doing before it is asked for
    from vllm.exceptions import VLLMClientError

    server: Server | None = None
    while True:
        try:
            name, arguments = connection.recv()
        except (EOFError, OSError):
            return
        if server is None:
            assert name == "start"
            server = _start(connection, arguments)
            connection.send(("ok", None))
        else:
            method: Callable[..., Any] = getattr(server, name)
            try:
                reply = ("ok", method(**arguments))
            except (ValueError, VLLMClientError) as error:
                if name not in _SAMPLING or not server.is_idle():
                    raise
                reply = ("refused", f"vLLM refuses the request: {' '.join(str(error).split())[:300]}")
            connection.send(reply)


def _start(connection: Connection, options: dict[str, Any]) -> Server:
    try:
        return Server(options, lambda progress: connection.send(("progress", progress)))
    except Exception as error:
        # A model or a size that vLLM does not take will not be taken at the next start either.
        with contextlib.suppress(OSError):
            connection.send(("refused", f"{type(error).__name__}: {' '.join(str(error).split())}"))
        raise


def _end_with(parent: int) -> None:
    """Ends this process when the trainer is gone, also in the middle of a long request."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    code = 0
    try:
        serve(Connection(descriptor))
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # No interpreter shutdown: vLLM's may wait for threads and workers that the client ends anyway.
    os._exit(code)


if __name__ == "__main__":
    main()
