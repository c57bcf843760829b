"""A run that is killed with SIGKILL again and again: `python -m tests.e2e.lives CONFIG KILLS SEED`.

Each life is forked from a process that has imported everything, which is what takes the time, and is killed at a
random moment after its first step; every other one while a checkpoint's files are being written. The last life is
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


def main() -> None:
    config, kills, chance = load_config(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    during_saves = 0
    for number in range(kills):
        pid = _fork(config)
        assert _lives_to_see_a_step(pid, config), "the run ended before it was killed often enough: give it more steps"
        time.sleep(chance.uniform(0, 0.15))
        if number % 2:
            assert _lives_to_see_a_save(pid, config), "the run ended before it was killed often enough"
            time.sleep(chance.uniform(0, 0.01))
        saving = _is_saving(config)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), "the run ended before it was killed often enough: give it more steps"
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


def _lives_to_see_a_step(pid: int, config: RunConfig) -> bool:
    metrics = Path(config.output_dir) / "metrics.jsonl"
    begun = time.time()
    while _is_alive(pid):
        # Written anew when the run is resumed, then longer with each step.
        if metrics.exists() and metrics.stat().st_mtime > begun and _last_step(metrics) > 0:
            return True
        time.sleep(0.002)
    return False


def _last_step(metrics: Path) -> int:
    lines = metrics.read_text().splitlines()
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


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
