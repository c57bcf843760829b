"""What the ranks of tests/command/test_launcher.py do: `python -m tests.launched CASE` under the launcher."""

import os
import sys
import time

from opd_megatron.command.launcher import leave_cleanly_on_sigterm, run_command
from opd_megatron.errors import ConfigError

RANK = int(os.environ["RANK"])


def every_rank_refuses() -> None:
    raise ConfigError("steps=0 must be positive: raise it")


def last_rank_refuses_and_breaks_the_others() -> None:
    if RANK == 1:
        raise ConfigError("rank 1 alone found the mistake: mend it")
    time.sleep(1)  # a collective that its peer's end breaks
    raise RuntimeError("connection closed by peer")


def last_rank_crashes() -> None:
    if RANK == 1:
        raise ZeroDivisionError("a bug")
    time.sleep(60)


def last_rank_is_killed() -> None:
    if RANK == 1:
        os.kill(os.getpid(), 9)
    time.sleep(60)


def prints_threads() -> None:
    print(f"threads={os.environ['OMP_NUM_THREADS']} world={os.environ['WORLD_SIZE']}", flush=True)


def waits() -> None:
    print("waiting", os.getpid(), flush=True)
    time.sleep(60)


if __name__ == "__main__":
    leave_cleanly_on_sigterm()
    sys.exit(run_command(globals()[sys.argv[1]]))
