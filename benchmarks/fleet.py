"""A fleet of engines: how rollout time falls with their number, what one step ahead saves, what a push to two costs.

Three measurements, the first two with engines of a set speed (stand-ins that sleep a set time for every answer, so that
what is measured is the dealing, the collectives and the overlap, not this machine's cores):

    engines     rollout seconds with 1, 2, 4 and 8 engines, against 1/N of one engine's
    ahead       a step with `rollout.steps_ahead=1`, against the longer of sampling and training, plus the push
    push        weights of the demo's student into two real vLLM engines of this machine, against one
    own rank    `--real`: the demo's run with the engine on the student's rank and on one of its own, 0 and 1 step ahead
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import _processes as processes
import torch
from harness import Check, Report, Row, main

from opd_megatron.rollout import MachineShare, RolloutClient
from opd_megatron.rollout.vllm_engine import VLLMEngine, VLLMOptions
from opd_megatron.types import Bucket, Prompt, Rollout, SampleRequest, Sampling
from opd_megatron.weight_sync.bucket_store import bucket_store
from opd_megatron.weight_sync.fan_out import FanOut
from opd_megatron.weight_sync.format import WeightFormat

ENGINES_LIMIT = AHEAD_LIMIT = 1.1
PUSH_LIMIT = 1.3
SAMPLING = Sampling(max_new_tokens=4)


class SleepingEngine:
    """Answers a request in a set time, one after another, and takes weights in a set time."""

    def __init__(self, answer_seconds: float, push_seconds: float = 0.0) -> None:
        self.policy_version = -1
        self._answer_seconds, self._push_seconds = answer_seconds, push_seconds

    def spawn(self) -> None: ...

    def wait_ready(self) -> None: ...

    def close(self) -> None: ...

    def update_weights(self, payloads: Any, version: int) -> None:
        for _ in payloads:
            pass
        time.sleep(self._push_seconds)
        self.policy_version = version

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Rollout]:
        time.sleep(self._answer_seconds * len(requests))
        ids, logprobs = torch.tensor([1, 2]), torch.tensor([-1.0, -1.0])
        return [Rollout(r.prompt, ids, logprobs, self.policy_version, "stop", group=r.group) for r in requests]


def requests(prompts: int, answers: int) -> list[SampleRequest]:
    """Prompts of many lengths, several answers to each."""
    return [
        SampleRequest(Prompt(f"p{i}", tuple(range(10 + 7 * i % 50)), ""), seed=i * answers + j, group=i)
        for i in range(prompts)
        for j in range(answers)
    ]


def client(engines: Sequence[Any], weights: Any = lambda: iter(())) -> RolloutClient:
    return RolloutClient(dict(enumerate(engines)), len(engines), weights, None, max_restarts=0, on_event=print)


def measure_engines(seconds: float) -> tuple[list[Row], list[Check]]:
    """`seconds`: of all answers by one engine."""
    asked = requests(16, 4)
    rows, checks, alone = [], [], 0.0
    for count in (1, 2, 4, 8):
        fleet = client([SleepingEngine(seconds / len(asked)) for _ in range(count)])
        fleet.start(0)
        begin = time.perf_counter()
        fleet.sample(asked, SAMPLING)
        took = time.perf_counter() - begin
        alone = alone or took
        ratio = took / (alone / count)
        rows.append(row(f"rollout, {count} engine(s)", took, ratio, f"{count} x its time / one engine's"))
        checks.append(Check.at_most(f"rollout with {count} engines / (one engine's / {count})", ratio, ENGINES_LIMIT))
    return rows, checks


def measure_ahead(sample: float, train: float, push: float, steps: int) -> tuple[list[Row], list[Check]]:
    """A step of the trainer's line with sleeping parts: seconds to sample, to train and to push."""
    asked = requests(8, 1)
    rows, checks = [], []
    for ahead in (0, 1):
        fleet = client([SleepingEngine(sample / len(asked), push)])
        fleet.start(0)
        seconds = [step_seconds(fleet, asked, train, step, ahead) for step in range(steps)][1:]
        took = statistics.median(seconds)
        expected = (max(sample, train) if ahead else sample + train) + push
        name = f"step, sample {sample:g} s, train {train:g} s, push {push:g} s, steps_ahead={ahead}"
        rows.append(row(name, took, took / expected, "measured / expected"))
        checks.append(Check.at_most(f"{name}: measured / expected", took / expected, AHEAD_LIMIT))
    return rows, checks


def step_seconds(fleet: RolloutClient, asked: list[SampleRequest], train: float, step: int, ahead: int) -> float:
    """One step in the order of `OPDTrainer.step` and `run.ahead`."""
    begin = time.perf_counter()
    if not ahead or step == 0:
        fleet.sample(asked, SAMPLING)
    if ahead:
        fleet.begin(asked, SAMPLING)
    time.sleep(train)
    if ahead:
        fleet.collect()
    fleet.sync_weights(step + 1)
    return time.perf_counter() - begin


def measure_push(student: Path, repeats: int) -> tuple[list[Row], list[Check]]:
    """Seconds to give one and two real engines the student's weights, taking turns."""
    from safetensors.torch import load_file

    tensors = load_file(student / "model.safetensors")

    def buckets() -> Iterator[Bucket]:
        names = sorted(tensors)
        for i in range(0, len(names), 32):
            yield [(name, tensors[name]) for name in names[i : i + 32]]

    with tempfile.TemporaryDirectory() as folder:
        engines = [
            VLLMEngine(
                VLLMOptions(
                    model_dir=student, max_model_len=128, dtype="fp32", kv_cache_gib=0.2,
                    share=MachineShare(neighbours=2), log_path=Path(folder) / f"rollout-{i}.log",
                )
            )
            for i in range(2)
        ]  # fmt: skip
        through = {"files": shared_by(False), "memory": shared_by(True)}
        one = client(engines[:1], buckets)
        two = client(engines, lambda: through["files"].stream(buckets()))
        mapping = client(engines, lambda: through["memory"].stream(buckets()))
        ways = [("one engine through files", one, False), ("two engines through files", two, False),
                ("one engine through memory", one, True), ("two engines through memory", mapping, True)]  # fmt: skip
        seconds: dict[str, list[float]] = {name: [] for name, *_ in ways}
        try:
            for engine in engines:
                engine.spawn()
            two.start(0)
            one.sync_weights(0)
            for version in range(1, repeats + 1):
                for name, fleet, maps_memory in ways:
                    for engine in engines:
                        engine.options = dataclasses.replace(engine.options, maps_memory=maps_memory)
                    begin = time.perf_counter()
                    fleet.sync_weights(version)
                    seconds[name].append(time.perf_counter() - begin)
        finally:
            two.close()
    took = {name: statistics.median(each) for name, each in seconds.items()}
    alone = took["one engine through files"]
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    rows = [
        row(f"push of {size:.0f} MB (as stored) to {name}", each, each / alone, "seconds / one engine's through files")
        for name, each in took.items()
    ]
    checks = [
        Check.at_most(
            f"push to two engines / to one, through {how}",
            took[f"two engines through {how}"] / took[f"one engine through {how}"],
            PUSH_LIMIT,
        )
        for how in through
    ]
    return rows, checks


def shared_by(maps_memory: bool) -> FanOut:
    """One node's way to its two engines."""
    store = bucket_store(WeightFormat(torch.float32, maps_memory=maps_memory), torch.device("cpu"))
    return FanOut([0, 0], [0], store)


def measure_real(arguments: argparse.Namespace, teacher: Path, student: Path) -> list[Row]:
    """The demo's step with the engine on the student's rank and on its own."""
    rows = []
    for placement, ahead in (("student", 0), ("student", 1), ("own", 0), ("own", 1)):
        settings: dict[str, Any] = processes.ONLY_STEPS | {
            "steps": arguments.steps, "student.path": str(student), "teachers.0.path": str(teacher),
            "rollout.steps_ahead": ahead, "rollout.placement": placement,
            "rollout.hosts": 1 if placement == "own" else None,
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            run = processes.train(arguments.config, Path(folder) / "run", settings)
        last = run.rows[1:-1] or run.rows[-1:]
        phases = {
            name: statistics.median(each[f"time/{name}"] for each in last)
            for name in ("step", "rollout", "teacher", "train", "sync")
        }
        others = ", ".join(f"{name} {value:.1f}" for name, value in phases.items() if name != "step")
        rows.append(row(f"demo, placement={placement}, steps_ahead={ahead}", phases["step"], None, others))
    return rows


def row(name: str, seconds: float, ratio: float | None, meaning: str) -> Row:
    return {"measured": name, "seconds": seconds, "ratio": ratio, "of what": meaning}


def measure(arguments: argparse.Namespace) -> Report:
    rows, checks = measure_engines(1.6 if arguments.quick else 8.0)
    steps = 4 if arguments.quick else 8
    for sample, train in ((0.4, 0.6), (0.6, 0.4)):
        found, also = measure_ahead(sample, train, 0.1, steps)
        rows, checks = rows + found, checks + also
    if not arguments.quick:
        teacher, student = processes.assets(arguments.assets)
        found, also = measure_push(student, arguments.pushes)
        rows, checks = rows + found, checks + also
        if arguments.real:
            rows += measure_real(arguments, teacher, student)
    note = (
        "Engines of a set speed sleep for every answer and push; the pushes and the demo's steps are real, with all "
        "engines on the same cores."
    )
    return Report(rows, checks, note)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    processes.add_demo(parser)
    parser.add_argument("--steps", type=int, default=5, help="steps of a real run, the first and last not counted")
    parser.add_argument("--pushes", type=int, default=5, help="pushes to one and to two engines")
    parser.add_argument("--real", action="store_true", help="also the demo's run, four times")


if __name__ == "__main__":
    main("fleet", __doc__, measure, add_arguments)
