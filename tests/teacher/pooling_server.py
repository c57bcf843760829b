"""A small HTTP server that answers as vLLM does in pooling mode, from transformers; and the real one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

Change = Callable[[int, dict[str, Any], bytes], "tuple[int, dict[str, Any] | None, bytes]"]
"""(request number, metadata, body) -> (status, metadata, body): what goes wrong."""


@contextlib.contextmanager
def stub(folder: str, change: Change | None = None) -> Iterator[tuple[str, list[int]]]:
    """Serves a model's final hidden states; yields its address and the number of sequences of each request."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model.eval()
    requests: list[int] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock, torch.no_grad():
                requests.append(len(asked["input"]))
                number = len(requests)
                parts = [model(torch.tensor([ids])).last_hidden_state[0] for ids in asked["input"]]
            kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[asked["embed_dtype"]]
            body = b"".join(part.to(kind).view(torch.uint8).numpy().tobytes() for part in parts)
            metadata = {"data": [{"index": i, "shape": list(part.shape)} for i, part in enumerate(parts)]}
            status, headers, body = (200, metadata, body) if change is None else change(number, metadata, body)
            self.send_response(status)
            if headers is not None:
                self.send_header("metadata", json.dumps(headers))
            self.send_header("Content-Length", str(len(body)))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who asked has given up
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def vllm_server(folder: str, log: Path, *, generates: bool = False) -> Iterator[str]:
    """The commands of docs/teachers.md, on a CPU: in pooling mode, or one that `generates`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pooler = json.dumps({"task": "token_embed", "use_activation": False})
    pooling = ["--runner", "pooling", "--convert", "embed", "--pooler-config", pooler]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder,
        *(["--max-logprobs", "272"] if generates else pooling),
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "256", "--enforce-eager",
    ]  # fmt: skip
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            _wait_until_up(process, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_until_up(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.3)
    raise AssertionError(f"vLLM did not come up: {log.read_text()[-3000:]}")
