"""Properties of the metrics room: nothing lost, nothing repeated, readable everywhere."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console

from opd_megatron.errors import ConfigError, MissingPathError
from opd_megatron.metrics import (
    MetricsLog,
    NullDisplay,
    PhaseTimers,
    TrainingDisplay,
    peak_memory_bytes,
    plot_curves,
    read_metrics,
    result_table,
    summarize,
)
from opd_megatron.types import StepMetrics


def step_row(step: int, kl: float = 1.0, **extra: float) -> StepMetrics:
    times = {"time/rollout": 2.0, "time/teacher": 0.5, "time/train": 4.0, "time/sync": 0.25, "time/step": 7.0}
    return StepMetrics(
        step=step, loss=kl, reverse_kl=kl, forward_kl=kl / 2, tokens=100, policy_version=step, grad_norm=1.0, lr=1e-4,
        extra={**times, "memory/peak": 2.0**30 + step, **extra},
    )  # fmt: skip


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def text_console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=terminal, width=100, color_system=None), stream


@pytest.fixture(scope="module")
def fresh_process() -> dict:
    """What a process that has only imported the room, then held and freed 256 MiB, says of itself."""
    code = """if True:
        import json, sys
        from opd_megatron.metrics import peak_memory_bytes
        modules = [n for n in ("matplotlib", "tensorboard", "wandb", "vllm", "megatron") if n in sys.modules]
        base = peak_memory_bytes()
        block = bytearray(b"1" * 2**28)
        del block
        print(json.dumps({"modules": modules, "base": base, "after": peak_memory_bytes()}))
    """
    ballast = torch.ones(2**29, dtype=torch.uint8)  # our size must not be taken for the child's
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    return json.loads(done.stdout) | {"parent": int(ballast.sum())}


# -- timers ------------------------------------------------------------------------------------------------------------


def test_phases_add_up_when_entered_twice_and_the_step_also_counts_the_gaps():
    clock = FakeClock()
    timers = PhaseTimers(clock)
    for seconds in (1.0, 2.0):
        with timers.phase("rollout"):
            clock.now += seconds
        clock.now += 0.5
    assert timers.collect() == {"time/rollout": 3.0, "time/step": 4.0}


def test_a_nested_phase_is_not_counted_twice():
    clock = FakeClock()
    timers = PhaseTimers(clock)
    with timers.phase("rollout"):
        clock.now += 1
        with timers.phase("sync"):
            clock.now += 10
        clock.now += 2
    assert timers.collect() == {"time/rollout": 3.0, "time/sync": 10.0, "time/step": 13.0}


def test_a_step_begins_at_start_or_at_its_first_phase_and_time_between_steps_is_nobodys():
    clock = FakeClock()
    timers = PhaseTimers(clock)
    timers.start()
    clock.now += 1
    with timers.phase("train"):
        clock.now += 1
    assert timers.collect() == {"time/train": 1.0, "time/step": 2.0}
    clock.now += 50  # an evaluation, a checkpoint
    with timers.phase("train"):
        clock.now += 3
    assert timers.collect() == {"time/train": 3.0, "time/step": 3.0}


def test_a_phase_that_raises_is_closed_and_counted():
    clock = FakeClock()
    timers = PhaseTimers(clock)

    def failing_phase() -> None:
        with timers.phase("rollout"):
            clock.now += 2
            raise ValueError

    with pytest.raises(ValueError):
        failing_phase()
    assert timers.collect()["time/rollout"] == 2.0


def test_peak_memory_remembers_what_was_freed_and_not_what_the_parent_process_held(fresh_process):
    assert 2**25 < fresh_process["base"] < fresh_process["parent"] < peak_memory_bytes()
    assert fresh_process["after"] >= fresh_process["base"] + 2**27


# -- metrics.jsonl -----------------------------------------------------------------------------------------------------


def test_every_row_is_on_disk_before_write_returns_and_reads_back_unchanged(tmp_path):
    log = MetricsLog(tmp_path)
    rows = [{"step": 0, "eval/nll": 2.5}, step_row(1).as_dict(), step_row(2, **{"eval/nll": 2.0}).as_dict()]
    for count, row in enumerate(rows, start=1):
        log.write(row)
        assert read_metrics(tmp_path) == rows[:count]
    log.close()
    log.close()


def test_the_contracts_keys_come_from_step_metrics(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(step_row(1))
    assert set(read_metrics(tmp_path)[0]) == {
        "step", "loss", "reverse_kl", "forward_kl", "tokens", "policy_version", "grad_norm", "lr",
        "time/rollout", "time/teacher", "time/train", "time/sync", "time/step", "memory/peak",
    }  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, torch.tensor(math.nan)])
def test_non_finite_numbers_become_null_so_that_every_line_is_strict_json(tmp_path, value):
    with MetricsLog(tmp_path, tensorboard=True) as log:
        log.write({"step": 1, "loss": value, "tokens": torch.tensor(7)})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "loss": None, "tokens": 7}


def test_resuming_drops_the_steps_that_will_be_repeated_and_a_half_written_line(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write({"step": 0, "eval/nll": 3.0})
        for step in range(1, 6):
            log.write(step_row(step, kl=1.0))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    with MetricsLog(tmp_path, resume_step=3) as log:
        assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3]
        log.write(step_row(4, kl=9.0))
    assert [(row["step"], row.get("loss")) for row in read_metrics(tmp_path)][-2:] == [(3, 1.0), (4, 9.0)]
    assert list(tmp_path.iterdir()) == [tmp_path / "metrics.jsonl"]


def test_a_run_that_starts_anew_does_not_inherit_rows(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(step_row(1))
    with MetricsLog(tmp_path):
        assert read_metrics(tmp_path) == []


def test_reading_names_what_is_wrong(tmp_path):
    with pytest.raises(MissingPathError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(ConfigError, match="line 2"):
        read_metrics(tmp_path)


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsLog(tmp_path, tensorboard=True) as log:
        for step in (1, 2, 3):
            log.write(step_row(step, kl=1.0))
    with MetricsLog(tmp_path, tensorboard=True, resume_step=1) as log:
        log.write(step_row(2, kl=5.0))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 5.0)]


def test_wandb_gets_every_number_under_one_run_id_across_a_resume(tmp_path, monkeypatch):
    calls: list[tuple] = []
    fake = types.ModuleType("wandb")
    run = types.SimpleNamespace(
        log=lambda row, step: calls.append(("log", step, row["loss"])), finish=lambda: calls.append(("finish",))
    )
    fake.init = lambda **kwargs: calls.append(("init", kwargs["project"], kwargs["id"], kwargs["config"])) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resume_step, step in ((None, 1), (1, 2)):
        with MetricsLog(tmp_path, wandb_project="p", config_dict={"seed": 1}, resume_step=resume_step) as log:
            log.write(step_row(step, kl=float(step)))
    assert [call[0] for call in calls] == ["init", "log", "finish"] * 2
    assert calls[0] == calls[3] == ("init", "p", calls[0][2], {"seed": 1})
    assert calls[1::3] == [("log", 1, 1.0), ("log", 2, 2.0)]


def test_a_missing_wandb_package_is_one_line_and_costs_no_history(tmp_path, monkeypatch):
    with MetricsLog(tmp_path) as log:
        log.write(step_row(1))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"wandb_project='p'.*pip install wandb") as caught:
        MetricsLog(tmp_path, wandb_project="p")
    assert "\n" not in str(caught.value)
    assert len(read_metrics(tmp_path)) == 1


# -- what a person sees ------------------------------------------------------------------------------------------------


def test_a_log_file_gets_plain_lines_with_no_control_characters():
    console, stream = text_console(terminal=False)
    with TrainingDisplay(3, console=console, plain_seconds=0) as display:
        display.step({"step": 0, "eval/nll": 2.5})
        for step in (1, 2, 3):
            display.step(step_row(step, kl=1.5))
        display.sample("2 + [bold] 2\nis four")
    lines = stream.getvalue().splitlines()
    assert [line for line in lines if line.startswith("step ") and "KL" in line and "/3" in line] == lines[1:4]
    assert "KL 1.500" in lines[1]
    assert "14 tok/s" in lines[1]
    assert lines[0] == "step 0: held-out NLL 2.500"
    assert "  | 2 + [bold] 2" in lines
    assert "\x1b" not in stream.getvalue()


def test_a_fast_run_does_not_flood_the_log_but_prints_the_first_step_and_the_last():
    console, stream = text_console(terminal=False)
    display = TrainingDisplay(500, start_step=100, console=console, plain_seconds=3600)
    for step in range(101, 501):
        display.step(step_row(step))
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["101/500", "500/500"]


def test_a_terminal_gets_a_bar_that_starts_where_the_run_resumes():
    console, stream = text_console(terminal=True)
    with TrainingDisplay(20, start_step=10, console=console) as display:
        display.step(step_row(11, kl=0.75))
        display.note("engine restarted")
        display.sample("a [red]b")
    text = stream.getvalue()
    assert "10/20" in text
    assert "11/20" in text
    assert "KL 0.750" in text
    assert "engine restarted" in text
    assert "a [red]b" in text


def test_other_ranks_print_nothing(capsys):
    with NullDisplay() as display:
        display.step(step_row(1))
        display.note("note")
        display.sample("sample")
        display.print("table")
    assert capsys.readouterr() == ("", "")


# -- summary and picture -----------------------------------------------------------------------------------------------


def finished_run() -> list[dict]:
    kls = [2.0, 1.5, 1.2, 0.9, 0.7, 0.8]
    rows = [{"step": 0, "eval/forward_kl": 2.4, "eval/nll": 3.0}]
    rows += [step_row(k, kl=kl).as_dict() for k, kl in enumerate(kls, start=1)]
    rows[-1] |= {"eval/forward_kl": 1.2, "eval/nll": 2.4}
    return rows


def test_the_summary_compares_the_untrained_student_with_the_trained_one():
    summary = summarize(finished_run())
    assert summary.change["reverse_kl"] == (2.0, pytest.approx((0.9 + 0.7 + 0.8) / 3))
    assert summary.ratio("reverse_kl") == pytest.approx(0.4)
    assert summary.ratio("eval/forward_kl") == pytest.approx(0.5)
    assert summary.ratio("eval/nll") == pytest.approx(0.8)
    assert summary.tokens_per_second == {"rollout": 50.0, "teacher": 200.0, "train": 25.0, "sync": 400.0}
    assert (summary.sync_seconds, summary.step_seconds, summary.peak_bytes) == (0.25, 7.0, 2.0**30 + 6)


def test_a_two_step_run_is_not_compared_with_its_own_first_step():
    rows = [step_row(1, kl=4.0).as_dict(), step_row(2, kl=1.0).as_dict()]
    assert summarize(rows).change["reverse_kl"] == (4.0, 1.0)


def test_one_evaluation_is_not_compared_with_itself():
    before, after = summarize(finished_run()[:4]).change["eval/nll"]
    assert before == 3.0
    assert math.isnan(after)


@pytest.mark.parametrize("rows", [[], finished_run()[:1], finished_run()[:2], finished_run()])
def test_table_and_picture_are_drawn_for_a_run_of_any_length(tmp_path, rows):
    console, stream = text_console(terminal=False)
    console.print(result_table(rows))
    assert "nan" not in stream.getvalue()
    if len(rows) == 7:
        assert "0.40" in stream.getvalue()
    with MetricsLog(tmp_path) as log:
        for row in rows:
            log.write(row)
    path = plot_curves(tmp_path)
    assert path == tmp_path / "report" / "curves.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_a_null_in_the_history_does_not_stop_summary_or_picture(tmp_path):
    rows = finished_run()
    rows[3] |= {"reverse_kl": None, "grad_norm": None, "time/step": None}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert summarize(read_metrics(tmp_path)).ratio("reverse_kl") == pytest.approx(0.4)
    assert plot_curves(tmp_path).exists()


def test_importing_the_room_loads_no_plotting_no_tensorboard_and_no_megatron(fresh_process):
    assert fresh_process["modules"] == []


@pytest.mark.parametrize(
    ("row", "titles"),
    [
        ({"reverse_kl": 1.0}, {"Divergence on own samples", "Learning rate"}),
        ({"nll": 1.0, "reward": 0.5}, {"NLL of what is trained on", "Reward and accuracy"}),
        ({"reverse_kl": 1.0, "eval/accuracy": 0.5}, {"Divergence on own samples", "Reward and accuracy"}),
    ],
)
def test_curves_are_of_what_a_run_has(row: dict, titles: set[str]) -> None:
    from matplotlib.figure import Figure

    from opd_megatron.metrics.plots import _draw

    axes = Figure().subplots(2, 3).flatten()
    _draw(axes, [{"step": step, "tokens": 1, "lr": 1e-3, "grad_norm": 1.0, **row} for step in (1, 2)])
    assert titles <= {ax.get_title(loc="left") or ax.get_title() for ax in axes}
    drawn = {line.get_label() for ax in axes for line in ax.get_lines()}
    assert ("reward of samples" in drawn) == ("reward" in row)
    assert ("held-out accuracy" in drawn) == ("eval/accuracy" in row)
