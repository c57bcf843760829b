"""A run that is killed with SIGKILL again and again: `python -m tests.e2e.lives CONFIG KILLS SEED`.

Each life is forked from a process that has imported everything, which is what takes the time, and is killed at a
random moment of one of its first steps; every other one while a checkpoint's files are being written. The last life is
left alone. Prints one JSON object: how many were killed, and how many of these during a save.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from opd_megatron.config import RunConfig, load_config
from opd_megatron.trainer import OPDTrainer

TOO_SHORT = "the run ended before it was killed often enough: give it more steps"


def main() -> None:
    config, kills, chance = load_config(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    during_saves = 0
    for number in range(kills):
        pid = _fork(config)
        assert _lives_to_see_steps(pid, config, chance.randint(1, 2)), TOO_SHORT
        if number % 2:
            assert _lives_to_see_a_save(pid, config), TOO_SHORT
        time.sleep(chance.uniform(0, 0.02))
        saving = _is_saving(config)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), TOO_SHORT
        during_saves += saving and _is_saving(config)
    _, status = os.waitpid(_fork(config), 0)
    assert status == 0
    print(json.dumps({"killed": kills, "during_saves": during_saves}))


def _fork(config: RunConfig) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            with OPDTrainer.from_config(config) as trainer:
                trainer.train()
            code = 0
        finally:
            os._exit(code)
    return pid


def _lives_to_see_steps(pid: int, config: RunConfig, steps: int) -> bool:
    metrics = Path(config.output_dir) / "metrics.jsonl"
    before = metrics.stat().st_ino if metrics.exists() else None
    while not metrics.exists() or metrics.stat().st_ino == before:  # a run that begins or goes on replaces it
        if not _is_alive(pid):
            return False
        time.sleep(0.002)
    rows = len(metrics.read_text().splitlines())
    while len(metrics.read_text().splitlines()) < rows + steps:
        if not _is_alive(pid):
            return False
        time.sleep(0.002)
    return True


def _lives_to_see_a_save(pid: int, config: RunConfig) -> bool:
    while not _is_saving(config):
        if not _is_alive(pid):
            return False
    return True


def _is_saving(config: RunConfig) -> bool:
    return any((Path(config.output_dir) / "checkpoints").glob(".step_*.partial"))


def _is_alive(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


if __name__ == "__main__":
    main()
