"""torchrun for runs over several machines: `python -m opd_megatron.command.agent ARGUMENTS` (launch/torchrun.sh).

The same agent and the same arguments, but its ranks are told of the stop signals that it gets, and the exit code is 0
when they have saved and stopped. torchrun by itself dies of SIGUSR1, and kills ranks half a minute after a SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType

from opd_megatron.command import launcher
from opd_megatron.errors import ConfigError, one_line

ABSENT = 1
_PATIENCE_SECONDS = 20.0
_CPP_LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"


def main(argv: Sequence[str] | None = None) -> int:
    run = _quiet_torchrun()
    words = ["--signals-to-handle", launcher.AGENT_SIGNALS, *(sys.argv[1:] if argv is None else argv)]
    arguments = run.parse_args(words)

    def start() -> int:
        _check_address(arguments)
        if arguments.standalone or arguments.nnodes == "1":
            return launcher.run_agent(lambda: run.run(arguments))
        return _with_others(arguments, lambda: launcher.run_agent(lambda: run.run(arguments)))

    return launcher.run_command(start)


def _quiet_torchrun() -> ModuleType:
    """Imports torchrun without the words of its C++ half, which prints forty frames where another machine is late.
    The ranks keep theirs."""
    own = os.environ.get(_CPP_LOG_LEVEL)
    os.environ[_CPP_LOG_LEVEL] = own or "FATAL"
    from torch.distributed import run

    if own is None:
        del os.environ[_CPP_LOG_LEVEL]
    return run


def _with_others(arguments: argparse.Namespace, agent: Callable[[], int]) -> int:
    """Runs one of several machines' agents; says after a while that others have not come, and when it gives up.

    It then returns 1: not a user's mistake, as a node may be lost at the start, and a job script tries again.
    """
    from torch import distributed as dist

    where = arguments.rdzv_endpoint or f"{arguments.master_addr}:{arguments.master_port}"
    who = f"machine {arguments.node_rank} of {arguments.nnodes}"
    remedy = "launch/torchrun.sh on all of them, with the same MASTER_ADDR, MASTER_PORT and NNODES"

    def tell() -> None:
        if not launcher.child_pids():
            print(f"{who} is waiting for the others at {where}: start {remedy}", file=sys.stderr, flush=True)

    timer = threading.Timer(_PATIENCE_SECONDS, tell)
    timer.daemon = True
    timer.start()
    try:
        return agent()
    except (dist.DistError, TimeoutError) as error:
        print(
            f"opd-megatron: error: {who} did not meet the others at {where} in time ({one_line(error)}): start "
            f"{remedy}; START_TIMEOUT is the seconds that one waits", file=sys.stderr, flush=True,
        )  # fmt: skip
        return ABSENT
    finally:
        timer.cancel()


def _check_address(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for a name that means nothing here: torchrun would ask for its address for minutes."""
    if arguments.standalone or arguments.rdzv_endpoint:
        return
    try:
        socket.getaddrinfo(arguments.master_addr, arguments.master_port)
    except OSError as error:
        raise ConfigError(
            f"MASTER_ADDR={arguments.master_addr!r} has no address on {socket.gethostname()} ({error.strerror}): give "
            "the name or address of machine 0 as this machine knows it"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
