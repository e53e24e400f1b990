from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import _measure as measure

ROOT = Path(__file__).parent.parent
EVERY_REPORT = {"benchmark", "quick", "threads", "python", "versions", "repetitions"}
EVERY_ROW = {"median_s", "iqr_s", "ratio", "ratio_iqr", "repetitions"}
COLUMNS = {measure.BASELINE, measure.HF_EAGER, measure.OURS, measure.BRIDGE}


def run(script: str, out: Path) -> dict[str, Any]:
    """The report of one benchmark at its smallest, run as a user runs it."""
    command = [sys.executable, "-m", f"benchmarks.{script}", "--quick", "--repetitions", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| " in done.stdout
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report.keys() >= EVERY_REPORT
    assert report["benchmark"] == script
    return report


@pytest.mark.slow
def test_hook_overhead_reports_every_row_of_every_contestant(tmp_path: Path) -> None:
    report = run("hook_overhead", tmp_path / "report.json")
    rows = report["geometries"]["quick"]["rows"]
    assert len(rows) == 6
    for row in rows.values():
        assert row.keys() >= COLUMNS
        assert all(summary.keys() == EVERY_ROW for summary in row.values())
        assert row[measure.BASELINE]["ratio"] == 1.0
    assert all(us > 0 for us in report["hook_point_us"].values())
    assert len(report["import_s"]) == 2


@pytest.mark.slow
def test_cache_memory_reports_peaks_beside_the_bytes_of_the_tensors(tmp_path: Path) -> None:
    rows = run("cache_memory", tmp_path / "report.json")["geometries"]["quick"]["rows"]
    plain, everything = rows["forward, nobody listening"], rows["cache everything"]
    assert plain[measure.OURS]["peak_bytes"] >= 0
    ours = everything[measure.OURS]
    assert ours["tensors"] > 0
    assert ours["forecast_bytes"] >= ours["tensor_bytes"] * 0.9  # neighbours that share storage are counted each
    assert ours["ratio"] == ours["over_forward_bytes"] / ours["tensor_bytes"]


@pytest.mark.slow
def test_loading_reports_memory_and_seconds(tmp_path: Path) -> None:
    report = run("loading", tmp_path / "report.json")
    assert 90e6 < report["weight_bytes"] < 110e6
    for row in report["rows"].values():
        assert row.keys() == EVERY_ROW | {"peak_over_weights"}
        assert row["peak_over_weights"] > 0.9


@pytest.mark.slow
def test_generation_reports_both_batches_and_the_same_tokens(tmp_path: Path) -> None:
    batches = run("generation", tmp_path / "report.json")["geometries"]["quick"]["batches"]
    assert batches.keys() == {"1", "4"}
    for batch in batches.values():
        assert batch["same_tokens"][measure.OURS] is True
        assert len(batch["rows"]) == 3
        assert all(row.keys() == COLUMNS for row in batch["rows"].values())


def test_ratios_are_taken_within_a_repetition() -> None:
    seconds = {measure.BASELINE: [1.0, 2.0, 4.0], "other": [2.0, 2.0, 2.0]}
    other = measure.summarise(seconds)["other"]
    assert other["ratio"] == 1.0
    assert other["median_s"] == 2.0
    assert other["ratio_iqr"] == [0.75, 1.5]


def test_contestants_take_turns_and_all_run_in_every_repetition() -> None:
    calls: list[str] = []
    works = {name: (lambda name=name: calls.append(name)) for name in ("a", "b", "c")}
    seconds = measure.alternate(works, 4, at_least=0.0)
    assert {name: len(of) for name, of in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    timed = "".join(calls[6:])  # after warm-up and calibration
    assert [timed[i : i + 3] for i in range(0, 12, 3)] == ["abc", "acb", "cab", "cba"]


def test_failing_worker_shows_what_it_said() -> None:
    with pytest.raises(RuntimeError, match="No module named"):
        measure.in_fresh_process("not_there", 1)
