"""torchrun for runs over several machines: `python -m opd_megatron.command.agent ARGUMENTS` (launch/torchrun.sh).

The same agent and the same arguments, but its ranks are told of the stop signals that it gets, and the exit code is 0
when they have saved and stopped. torchrun by itself dies of SIGUSR1, and kills ranks half a minute after a SIGTERM.
"""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Sequence

from opd_megatron.command import launcher
from opd_megatron.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    from torch.distributed import run

    words = ["--signals-to-handle", launcher.AGENT_SIGNALS, *(sys.argv[1:] if argv is None else argv)]
    arguments = run.parse_args(words)

    def start() -> int:
        _check_address(arguments)
        return launcher.run_agent(lambda: run.run(arguments))

    return launcher.run_command(start)


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
