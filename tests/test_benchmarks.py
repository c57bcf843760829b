"""Properties of what the benchmark scripts share. The measurements themselves are made by the scripts."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if not path.name.startswith("_") and path.stem != "harness")


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("harness")


def report_of(harness: ModuleType, value: float) -> object:
    rows = [{"trainer": "ours", "step, s": value, "tokens": 384}]
    return harness.Report(rows, [harness.Check.at_most("time", value, 0.5)], "A note.")


@pytest.mark.parametrize(("value", "code"), [(0.4, 0), (0.5, 0), (0.6, 1), (math.nan, 1)])
def test_a_check_that_fails_or_has_no_number_fails_the_script_and_the_json_says_so(harness, tmp_path, value, code):
    path = tmp_path / "out.json"
    with pytest.raises(SystemExit) as stopped:
        harness.main("name", "text", lambda _: report_of(harness, value), argv=["--json", str(path), "--quick"])
    assert stopped.value.code == code

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    tree = json.loads(path.read_text(), parse_constant=refuse)
    assert {"device", "rows", "checks"} <= set(tree)
    expected = None if math.isnan(value) else value
    assert tree["checks"] == [{"name": "time", "value": expected, "limit": 0.5, "ok": code == 0}]


def test_the_strict_check_refuses_equality(harness):
    assert not harness.Check.below("memory", 1.0, 1.0).ok
    assert harness.Check.below("memory", 0.99, 1.0).ok


def test_only_the_text_between_the_markers_of_a_readme_changes(harness, tmp_path):
    readme = tmp_path / "README.md"
    before, after = "# Title\n<!-- measured:a:begin -->", "<!-- measured:a:end -->\ntail\n"
    for value in (0.25, 0.125):  # the second write replaces the first
        readme.write_text(readme.read_text() if readme.exists() else before + "old" + after)
        harness.write_between_markers(readme, "a", harness.markdown(report_of(harness, value)))
        text = readme.read_text()
        assert text.startswith(before)
        assert text.endswith(after)
        assert f"| ours | {value:.3g} | 384 |" in text
    assert text.count("ours") == 1
    assert "old" not in text


def test_a_readme_without_markers_is_left_alone(harness, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n")
    with pytest.raises(harness.BenchmarkError, match="measured:a:begin"):
        harness.write_between_markers(readme, "a", "body")
    assert readme.read_text() == "# Title\n"


def test_memory_of_a_command_includes_its_child_processes_until_the_given_time(harness):
    processes = importlib.import_module("_processes")
    hold = "import time; block = bytearray(b'1') * 2**27; time.sleep(1)"
    command = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"]
    memory = processes.run_measured(command)
    assert 2**27 < memory.peak_bytes() < 2**28
    assert memory.peak_bytes(until=0.0) == 0


def test_a_command_that_fails_shows_what_it_printed(harness):
    processes = importlib.import_module("_processes")
    with pytest.raises(harness.BenchmarkError, match="reason 42"):
        processes.run_measured([sys.executable, "-c", "import sys; sys.exit('reason 42')"])


def test_memory_of_a_contestant_counts_what_is_kept_and_the_temporaries_inside_operations(harness):
    contestants, meters = (importlib.import_module(f"_divergence_{name}") for name in ("contestants", "meters"))
    x = torch.randn(512, 1024)
    y, z = x.clone().requires_grad_(), x.bfloat16().requires_grad_()
    # exp keeps its result, and backward makes the gradient from it. A product of two dtypes converts one of its inputs
    # inside the operation, where only the allocator sees it, and keeps nothing but its inputs.
    for leaf, forward, held, peak in ((y, lambda: y.exp().sum(), 1, 2), (z, lambda: (z * x).sum(), 0, 2)):
        found = [meters.memory(contestants.Contestant(forward, (leaf,))) for _ in range(2)]
        assert found[0] == found[1]
        assert found[0].held == held * x.nbytes
        assert peak * x.nbytes <= found[0].peak < (peak + 0.01) * x.nbytes


def test_a_ratio_is_to_the_fastest_peer_of_the_same_round(harness):
    meters = importlib.import_module("_divergence_meters")
    times = meters.Times({"ours": [2.0, 40.0, 6.0], "a": [1.0, 20.0, 4.0], "b": [4.0, 10.0, 3.0]})
    assert times.ratio("ours", "a", "b") == 2.0  # of 2, 4 and 2
    assert times.milliseconds("ours") == 6000.0


def test_every_contestant_runs_in_every_round_from_a_place_that_changes(harness):
    meters = importlib.import_module("_divergence_meters")
    ran: list[str] = []
    times = meters.race({name: lambda name=name: ran.append(name) for name in "abc"}, rounds=3, device="cpu")
    rounds = ["".join(ran[i : i + 3]) for i in range(3, 12, 3)]  # the first three warm up
    assert rounds == ["abc", "bca", "cab"]
    assert all(len(seconds) == 3 for seconds in times.rounds.values())


@pytest.mark.parametrize("peer", ["dense", "liger"])
def test_peers_of_the_divergence_benchmark_compute_what_ours_does(harness, peer):
    contestants = importlib.import_module("_divergence_contestants")
    inputs = contestants.Inputs.of(contestants.Case(24, 16, 300, torch.float32))
    if peer == "liger":
        pytest.importorskip("liger_kernel")
        pairs = [(contestants.LIGER_LOSS, contestants.liger(inputs))]
    else:
        pairs = [(loss, contestants.dense(inputs, loss)) for loss in contestants.DENSE]
    for loss, way in pairs:
        assert contestants.difference(contestants.ours(inputs, loss), way) < 1e-5, loss
    # The comparison can fail: another divergence is far away.
    assert contestants.difference(contestants.ours(inputs, contestants.Loss("gkd", "beta", 0.1)), pairs[0][1]) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_takes_the_common_options(script):
    done = subprocess.run([sys.executable, str(FOLDER / script), "--help"], capture_output=True, text=True, check=True)
    assert all(option in done.stdout for option in ("--quick", "--json", "--write-docs"))
