"""torchrun for runs over several machines: `python -m opd_megatron.command.agent ARGUMENTS` (launch/torchrun.sh).

The same agent and the same arguments, but its ranks are told of the stop signals that it gets, and the exit code is 0
when they have saved and stopped. torchrun by itself dies of SIGUSR1, and kills ranks half a minute after a SIGTERM.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from opd_megatron.command import launcher


def main(argv: Sequence[str] | None = None) -> int:
    from torch.distributed import run

    words = ["--signals-to-handle", launcher.AGENT_SIGNALS, *(sys.argv[1:] if argv is None else argv)]
    return launcher.run_agent(lambda: run.run(run.parse_args(words)))


if __name__ == "__main__":
    sys.exit(main())
