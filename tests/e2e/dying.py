"""One rank of a run that is killed at a given moment: `-m tests.e2e.dying MOMENT RANK CONFIG`, under the agent.

MOMENT is a phase of the third step (`rollout`, `teacher`, `train`, `sync`, `evaluate`), or a point of the third
checkpoint (`snapshot`, `writing`, `written`, `publish`); `never` leaves the run alone.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

MOMENTS: dict[str, tuple[str, str, str]] = {
    "evaluate": ("opd_megatron.run.evaluation", "Evaluator", "evaluate"),
    "snapshot": ("opd_megatron.mcore.checkpoint.writer", "ShardWriter", "prepare"),
    "writing": ("opd_megatron.mcore.checkpoint.writer", "ShardWriter", "_write_items"),
    "written": ("opd_megatron.mcore.checkpoint.writer", "ShardWriter", "wait"),
    "publish": ("opd_megatron.mcore.checkpoint.saver", "CheckpointSaver", "_publish"),
}
"""What is called at the moment: module, class, method. The others are phases of `PhaseTimers`."""


TIMES = {"rollout": 5, "sync": 5, "evaluate": 4}
"""Which time it is in the third step, where not the third: some phases come twice, and step 0 is evaluated too."""


def _deadly(moment: str, action: Callable[..., Any]) -> Callable[..., Any]:
    """Dies instead of doing something in the third step."""
    count = 0

    @functools.wraps(action)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == TIMES.get(moment, 3):
            os.kill(os.getpid(), signal.SIGKILL)
        return action(*args, **kwargs)

    return wrapper


def arm(moment: str) -> None:
    if moment == "never":
        return
    if moment in MOMENTS:
        module, name, method = MOMENTS[moment]
        owner = getattr(__import__(module, fromlist=[name]), name)
        setattr(owner, method, _deadly(moment, getattr(owner, method)))
        return
    from opd_megatron.metrics.timers import PhaseTimers

    real, dies = PhaseTimers.phase, _deadly(moment, lambda: None)

    def phase(self: PhaseTimers, name: str) -> Any:
        if name == moment:
            dies()
        return real(self, name)

    PhaseTimers.phase = phase  # type: ignore[method-assign]


def main() -> int:
    moment, rank, config = sys.argv[1:]
    from opd_megatron.train import main as train

    if os.environ["RANK"] == rank:
        arm(moment)
    return train([config])


if __name__ == "__main__":
    sys.exit(main())
