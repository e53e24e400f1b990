from __future__ import annotations

import copy
import gc
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from importlib import import_module, metadata
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from sklearn.metrics import average_precision_score
from transformers.utils import logging

from benchmarks import (
    _feature_labels,
    _maps,
    analysis_costs,
    editing,
    feature_store,
    features,
    full_size,
    hook_overhead,
    memory_table,
    patch_importance,
    patching,
    sae,
    sae_stream,
    steering,
)
from benchmarks import _measure as measure
from benchmarks._geometries import FOR_COUNTING, GEOMETRIES
from benchmarks._host_reads import host_reads
from benchmarks._models import random_hf_model
from hooked_llava.analysis import causal_trace
from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.editing import EditRequest, multedit, weight_records
from hooked_llava.errors import HookedLLaVAWarning
from hooked_llava.loading import expected_tensors
from hooked_llava.loading.quantization import Quantization
from hooked_llava.machine.processes import Processes
from hooked_llava.model.components.kv_cache import KVCache
from hooked_llava.model.components.quantized import quantize_linears, quantized_linears
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.readout.answer_cache import cache_answer
from hooked_llava.replay import Replay
from hooked_llava.sae.autoencoder import SparseAutoencoder
from hooked_llava.sae.trainer import SAETrainer, TrainingConfig
from hooked_llava.toy.evaluate import embedded, held_out, prepare_examples
from hooked_llava.toy.wide_model import layout_of

EVERY_REPORT = {"benchmark", "quick", "threads", "python", "versions", "repetitions"}
EVERY_ROW = {"median_s", "iqr_s", "ratio", "ratio_iqr", "repetitions"}
COLUMNS = {measure.BASELINE, measure.HF_EAGER, measure.OURS, measure.BRIDGE}


Run = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> None:
    """Benchmarks collect garbage before every call: what earlier tests hold is not looked through each time."""
    gc.freeze()


def in_this_process(script: str, threads: int, *worker: str) -> dict[str, Any]:
    """In place of `in_fresh_process`, most of whose time are imports."""
    with redirect_stdout(StringIO()) as said:
        import_module(f"benchmarks.{script}").main(["--threads", str(threads), "--worker", *worker])
    return json.loads(said.getvalue().splitlines()[-1])


def run_here(command: list[str], **_: object) -> SimpleNamespace:
    """In place of `subprocess.run` of `python -c CODE`."""
    with redirect_stdout(StringIO()) as said:
        exec(command[command.index("-c") + 1], {})
    return SimpleNamespace(stdout=said.getvalue())


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Gives the report of one benchmark at its smallest, which starts no other processes.

    What a benchmark sets for the whole process is set back afterwards.
    """

    def of(script: str, out: Path, *options: str) -> dict[str, Any]:
        module = import_module(f"benchmarks.{script}")
        if hasattr(module, "in_fresh_process"):
            monkeypatch.setattr(module, "in_fresh_process", in_this_process)
        module.main(["--quick", "--repetitions", "1", "--out", str(out), *options])
        assert "| " in capsys.readouterr().out
        assert [path.name for path in out.parent.iterdir()] == [out.name]
        report = json.loads(out.read_text(encoding="utf-8"))
        assert report.keys() >= EVERY_REPORT
        assert report["benchmark"] == script
        return report

    threads, shows_bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    with torch.enable_grad():
        yield of
    torch.set_num_threads(threads)
    if shows_bars:
        logging.enable_progress_bar()


@pytest.mark.slow
def test_hook_overhead_reports_every_row_of_every_contestant(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook_overhead, "subprocess", SimpleNamespace(run=run_here))
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
def test_cache_memory_reports_peaks_beside_the_bytes_of_the_tensors(run: Run, tmp_path: Path) -> None:
    rows = run("cache_memory", tmp_path / "report.json")["geometries"]["quick"]["rows"]
    plain, everything = rows["forward, no hooks"], rows["cache everything"]
    assert plain[measure.OURS]["peak_bytes"] >= 0
    ours = everything[measure.OURS]
    assert ours["tensors"] > 0
    assert ours["forecast_bytes"] >= ours["tensor_bytes"] * 0.9  # neighbors that share storage are counted each
    assert ours["ratio"] == ours["over_forward_bytes"] / ours["tensor_bytes"]


@pytest.mark.slow
def test_loading_reports_memory_and_seconds(run: Run, tmp_path: Path) -> None:
    report = run("loading", tmp_path / "report.json")
    assert 90e6 < report["weight_bytes"] < 110e6
    for row in report["rows"].values():
        assert row.keys() == EVERY_ROW | {"peak_over_weights"}
        assert row["peak_over_weights"] > 0.9


@pytest.mark.slow
def test_generation_reports_both_batches_and_the_same_tokens(run: Run, tmp_path: Path) -> None:
    batches = run("generation", tmp_path / "report.json")["geometries"]["quick"]["batches"]
    assert batches.keys() == {"1", "4"}
    for batch in batches.values():
        assert batch["same_tokens"][measure.OURS] is True
        assert len(batch["rows"]) == 3
        assert all(row.keys() == COLUMNS for row in batch["rows"].values())


@pytest.mark.slow
def test_patching_reports_cost_counted_work_and_agreement_with_plain_hooks(run: Run, tmp_path: Path) -> None:
    found = run("patching", tmp_path / "report.json")["geometries"]["quick"]
    assert found["rows"].keys() == {"kept", "text", "z-last", "z-all", "block", "attribution"}
    for row, measured in found["rows"].items():
        assert measured[measure.OURS].keys() == EVERY_ROW
        if row not in ("kept", "attribution"):
            assert measured["plain_hooks_difference"] < 1e-5
            assert 0 < measured["counted"] < measured["runs"]
    theirs = found["rows"]["text"][measure.BRIDGE]
    assert theirs["extrapolated_from_runs"] == 3
    assert found["rows"]["text"]["bridge_difference"] < 1e-4
    assert [point["runs"] for point in found["scaling"]] == [5, 10, 20]
    assert found["memory"].keys() == {"one full forward with a plain hook", "text"}


@pytest.mark.slow
def test_knockout_reports_the_released_procedure_beside_ours(run: Run, tmp_path: Path) -> None:
    rows = run("knockout", tmp_path / "report.json")["geometries"]["quick"]["rows"]
    assert rows.keys() == {"window 3"}, "nine layers would be all of two"
    for row in rows.values():
        assert row["counted_forwards"] <= 2.0
        assert row["percentage_points_difference"] < 0.05


@pytest.mark.slow
def test_patch_importance_reports_every_method_against_the_truth(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "report" / "report.json"
    report = run("patch_importance", out, "--partial", str(tmp_path / "maps"), "--n", "1")
    assert report["checkpoints"]["all"].keys() == {*_maps.METHODS, _maps.RANDOM}
    for row in report["checkpoints"]["all"].values():
        assert row["auc"][1] <= row["auc"][0] <= row["auc"][2]


@pytest.mark.slow
def test_information_flow_reports_every_edge_and_kind(run: Run, tmp_path: Path) -> None:
    (found,) = run("information_flow", tmp_path / "report.json")["checkpoints"].values()
    assert len(found["kinds"]) == 7
    assert "image->question|rest|last" in found["edges"]


@pytest.mark.slow
def test_lenses_are_measured_by_span_norm_and_layer(run: Run, tmp_path: Path) -> None:
    (found,) = run("tuned_lens", tmp_path / "report.json")["checkpoints"].values()
    assert found["layers"][-1] == "final"
    for by_norm in found["kl"].values():
        assert list(by_norm) == ["none", "final", "tuned"]
        assert by_norm["final"][-1] == pytest.approx(0, abs=1e-5)
        assert {len(values) for values in by_norm.values()} == {len(found["layers"])}


@pytest.mark.slow
def test_top_heads_reports_overlap_and_ablation(run: Run, tmp_path: Path) -> None:
    (found,) = run("top_heads", tmp_path / "report.json")["checkpoints"].values()
    assert 0 <= found["overlap"]["share"][0] <= 1
    assert found["overlap"]["chance"] == 10 / found["heads"]
    for rankings in found["ablation"].values():
        assert rankings.pop("none")["correct"][0] > 0.5
        assert rankings.keys() == {"largest scores", "most attention", "random"}
        assert all(of.keys() == {"1", "2", "4", "8", "16"} for of in rankings.values())


def test_three_measurements_of_a_image_are_one_of_its_mean() -> None:
    auc = np.random.default_rng(0).normal(0.5, 0.1, size=(3, 40)) + np.random.default_rng(1).normal(0, 0.3, size=40)
    auc[0, 0] = np.nan
    each = {str(i): {"map": {"auc": row, "milliseconds": float(i)}} for i, row in enumerate(auc)}
    pooled = patch_importance.pooled(each)["map"]
    np.testing.assert_allclose(pooled["auc"], np.nanmean(auc, 0))
    assert pooled["milliseconds"] == 1.0
    _, low, high = patch_importance.summary({"map": pooled})["map"]["auc"]
    error = np.nanmean(auc, 0).std() / np.sqrt(40)  # not / sqrt(120)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.15)
    assert patch_importance.summary({"map": pooled})["map"]["images"] == 40
    assert np.isnan(patch_importance.pooled({"0": {"map": {"auc": np.array([np.nan])}}})["map"]["auc"][0])


def test_maps_are_kept_for_the_same_weights_options_and_questions_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [HookedLLaVA.from_pretrained(folder) for folder in embedded()[:2]]
    some, name, file = _maps.cases("query_color", 2), "attention, mean of all heads", tmp_path / "maps"
    prepared, clock = _maps.prepared, [0.0]

    def slowly(*args: Any, **options: Any) -> Any:
        clock[0] += 5.0
        return prepared(*args, **options)

    with monkeypatch.context() as slow:
        slow.setattr(_maps, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
        slow.setattr(_maps, "prepared", slowly)
        first = _maps.maps_of(models[0], some, name, file)
    assert clock[0] > 0
    assert first.seconds == 0, "preparing is not the method's"
    monkeypatch.setattr(_maps, "prepared", lambda *args, **options: pytest.fail("made anew"))
    xr.testing.assert_identical(_maps.maps_of(models[0], some, name, file), first)
    monkeypatch.setattr(_maps, "prepared", prepared)
    other = _maps.maps_of(models[1], some, name, file)
    assert not np.allclose(other, first)
    asked = _maps.maps_of(models[1], some, name, file, other=True)
    assert not np.allclose(asked, other)
    monkeypatch.setitem(_maps.METHODS, name, {"method": "attention", "heads": 1})
    assert not np.allclose(_maps.maps_of(models[1], some, name, file, other=True), asked)


def test_a_stroke_does_not_end_a_cell() -> None:
    table = measure.markdown(["`a|b`"], {"image->question|rest": ["1|2"]}, "|")
    assert table.splitlines() == ["| \\| | `a\\|b` |", "|---|---|", "| image->question\\|rest | 1\\|2 |"]


@pytest.mark.slow
def test_causal_trace_reports_cost_counted_work_and_agreement_with_plain_hooks(run: Run, tmp_path: Path) -> None:
    rows = run("causal_trace", tmp_path / "report.json")["geometries"]["quick"]["rows"]
    assert len(rows) == 5
    for row in rows.values():
        assert row[measure.OURS].keys() == EVERY_ROW
        assert 0 < row["runs"] <= row["cells"]
        assert 0 < row["counted"] < row["runs"]
        assert row["plain_hooks_difference"] is None or row["plain_hooks_difference"] < 1e-4
    assert [row["kept_runs"] for row in rows.values()] == [1, 1, 1, 1, 2]


@pytest.mark.slow
def test_causal_trace_study_reports_every_corruption(run: Run, tmp_path: Path) -> None:
    report = run("causal_trace_study", tmp_path / "report.json")
    (found,) = report["checkpoints"].values()
    for asked in ("by image", "by name"):
        corruptions = found[asked]["corruptions"]
        assert corruptions.keys() == {"another shape's name", "noise", "mean embedding", "one word everywhere"}
        for of in corruptions.values():
            assert len(of["lowered_by"]) == of["traced"]
            assert of["left_out"] == sum(drop < 0.1 for drop in of["lowered_by"])
            assert ("best" in of) == (of["left_out"] < of["traced"])
        assert len(found[asked]["windows"]) == 2
    assert found["errors"]["asked"] == 16
    assert len(found["by image"]["messages"]["norm"]) == 6


@pytest.mark.slow
def test_every_analysis_is_counted(run: Run, tmp_path: Path) -> None:
    counted = run("analysis_costs", tmp_path / "report.json")["geometries"]["quick"]["forwards"]
    assert counted.keys() == analysis_costs.CALLS.keys()
    assert all(0.5 < value < 20 for value in counted.values())
    assert counted["edge_attribution, 4 steps (EAP-IG)"] > counted["edge_attribution (EAP)"]


@pytest.mark.slow
def test_the_traced_table_counts_the_questions_of_each_kind(run: Run, tmp_path: Path) -> None:
    kinds = run("trace_table", tmp_path / "report.json")["kinds"]
    assert kinds.keys() >= {"all", "Known"}
    assert kinds["all"]["traced"] == sum(of["traced"] for kind, of in kinds.items() if kind != "all")
    for of in kinds.values():
        assert of["lowered"][0] == pytest.approx(1 - of["left_out"] / of["traced"], abs=1e-4)
        assert of["best"].keys() == {"mlp", "attn", "resid"}


def test_traces_that_lower_nothing_are_left_out_of_the_editing_report(monkeypatch: pytest.MonkeyPatch) -> None:
    dims = ("kind", "layer", "position")

    def trace(_: Any, case: int) -> tuple[Any, dict[str, int]]:
        effect = (dims, [[[case + 0.1, case + 0.2]]])
        data = xr.Dataset({"indirect_effect": effect, "lowered_by": case / 10}, {"kind": ["mlp"], "position": [3, 7]})
        return data, {"constraint": 3, "last": 7}

    monkeypatch.setattr(editing, "_trace", trace)
    found = editing.run_trace(None, [0, 5, 7])  # type: ignore[arg-type]
    assert (found["cases"], found["left_out"], found["lowered_by"]) == ([0, 5, 7], [0], 0.4)
    assert found["indirect_effect"] == {"last": [6.2], "constraint": [6.1]}
    assert editing.run_trace(None, [0])["indirect_effect"] == {}  # type: ignore[arg-type]
    row = {"efficacy": 1.0, "generalisation": 1.0, "specificity_drop": 0.0}
    layers = {"last 0": [row], "constraint 0": [row]}
    assert list(editing.correlations({"seed1": {"layers": layers, "trace": found}})) == [
        f"seed1, {where} (2 of 3 facts traced)" for where in ("position last", "position constraint", "all cells")
    ]


def test_editing_reports_what_one_edit_takes_by_itself() -> None:
    row = {
        "efficacy": 1.0,
        "specificity_drop": 2.0,
        "locality_kl": 0.5,
        "accuracy": dict.fromkeys(editing.ASKED, 0.75),
    }
    rows = [{**row, "case": 0, "seconds_alone": 0.25}, {**row, "case": 1, "seconds_alone": 0.75}, {**row, "case": 2}]
    table = editing.method_table({"seed1": {"methods": {"A": rows}}}, "methods", corner="edits")
    header, _, line = (list(map(str.strip, text.split("|")))[1:-1] for text in table.splitlines())
    cells = dict(zip(header, line, strict=True))
    assert (cells["s for one edit alone"], cells["edits"], cells["other colors"]) == ("0.500", "3", "0.750 ± 0.000")


def test_a_row_measured_later_joins_the_others_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(patching, "start", lambda parser, argv: parser.parse_args(argv))  # no threads or grad mode set
    monkeypatch.setattr(patching, "make_setting", lambda *_: None)
    monkeypatch.setattr(patching, "WithImage", lambda _: None)
    cost = {"ratio": 0.5, "median_s": 1.0}
    monkeypatch.setattr(patching, "measure_row", lambda row, *_: {"row": row, measure.OURS: cost})
    out = tmp_path / "report.json"
    for row in ("kept", "whole"):
        patching.main(["--quick", "--geometry", "quick", "--out", str(out), "--rows", row])
    rows = json.loads(out.read_text(encoding="utf-8"))["geometries"]["quick"]["rows"]
    assert [rows[row]["row"] for row in ("kept", "whole")] == ["kept", "whole"]
    assert "every layer x every position | - | - | 0.50 (1 s) | 1000 | -" in capsys.readouterr().out


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


def test_a_worker_answers_with_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("""#!/bin/sh\necho "$@"\necho '{"peak_bytes": 3}'\n""", encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert measure.in_fresh_process("loading", 1, "ours", "folder") == {"peak_bytes": 3}


def test_failing_worker_shows_what_it_said() -> None:
    with pytest.raises(RuntimeError, match="No module named"):
        measure.in_fresh_process("not_there", 1)


@pytest.mark.slow
def test_steering_reports_generation_and_attribution(run: Run, tmp_path: Path) -> None:
    found = run("steering", tmp_path / "report.json")["geometries"]["quick"]
    assert list(found["rows"]) == ["6 tokens, steered", "6 tokens, not steered"]
    assert all(row.keys() == {measure.BASELINE, measure.OURS} for row in found["rows"].values())
    assert found["attribution"][steering.FORWARD]["ratio"] == 1.0
    assert found["attribution"][steering.GRADIENT]["ratio"] > 0


def test_sae_stream_reports_costs_and_memory(run: Run, tmp_path: Path) -> None:
    report = run("sae_stream", tmp_path / "report.json")
    rows = report["geometries"]["quick"]["rows"]
    assert list(rows) == [sae_stream.FORWARD, *sae_stream.STREAMS, sae_stream.STEP]
    assert rows[sae_stream.FORWARD]["ratio"] == 1.0
    assert all(row.keys() == EVERY_ROW and row["median_s"] > 0 for row in rows.values())
    assert report["memory"]["steps"] == 40
    assert report["memory"]["resident_bytes"] > 2**20


def test_features_reports_explanations_concepts_and_steering(run: Run, tmp_path: Path) -> None:
    report = run("features", tmp_path / "report.json")
    assert list(report["schemes"]) == list(features.SCHEMES)
    for seeds in report["schemes"].values():
        assert len(seeds) == features.QUICK.seeds
        for one in seeds:
            assert one["right"] <= one["explained"] <= one["features"]
            assert len(one["iou"]) == len(one["phrases"]) == one["explained"]
            assert all(0 <= iou <= 1 for iou in one["iou"])
            assert [len(run) for run in one["iou_random"]] == [one["explained"]] * features.QUICK.runs
    assert all(len(one["f1"]) == len(features.PATCH_LABELS) for one in report["concepts"])
    made = {"kind": "color", "word": "red", "steered": [0.0, 1.0], "random_feature": [0.0, 0.0]}
    report |= {"settings": report["settings"] | {"strengths": [1.0, 2.0]}}
    table = features.steering_table(report | {"steering": [made, {**made, "steered": [1.0, 1.0]}]})
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in table.splitlines()}
    assert rows["| color, explained feature"][0] == "2"
    assert rows["| color, explained feature"][2].startswith("1.00")
    assert rows["| shape, random feature"] == ["0", "-", "- |"]


def test_sae_reports_sizes_precision_steering_and_attribution(run: Run, tmp_path: Path) -> None:
    report = run("sae", tmp_path / "report.json")
    assert [len(rows) for rows in report["sizes"].values()] == [2, 1]
    assert all(
        row["fvu"] > 0 and row["clean"] < row["mean_ablated"] for rows in report["sizes"].values() for row in rows
    )
    assert list(report["precision"]) == [sae.OURS, "neurons", "raw dimensions", "PCA", sae.RANDOM]
    assert {len(row) for rows in report["precision"].values() for row in rows} == {len(report["labels"])}
    assert set(report["steering"]) <= {"red", "blue"}
    assert report["steering"]
    for curves in report["steering"].values():
        assert all(len(curves[way]) == len(sae.STRENGTHS) for way in ("steered", "random_feature", "random_direction"))
    assert report["attribution"]["forwards"] <= 4


def test_patches_are_labelled_with_what_they_show_in_every_world(tiny_shapes: Any) -> None:
    examples = held_out("query_color", 1)
    scene = examples[0].scene
    assert scene is not None
    shown = _feature_labels.patch_labels(scene, prepare_examples(tiny_shapes, examples).token_map.layout())
    for one, coverage in zip(scene.objects, scene.patch_coverage, strict=True):
        covered = coverage.flatten() >= _feature_labels.COVERAGE
        for word in (one.color, one.shape):
            assert shown[covered, _feature_labels.LABELS.index(word)].all()
    assert shown.any(1).sum() == (scene.patch_coverage >= _feature_labels.COVERAGE).any(0).sum()
    wide = held_out("query_small", 1, world="tiny-shapes-next")[0].scene
    assert wide is not None
    layout = layout_of(wide.size)
    shown = _feature_labels.patch_labels(wide, layout)
    assert len(shown) == sum(layout.cell_features(grid.name).size for grid in layout.grids)
    words = {word for one in wide.objects for word in (one.color, one.shape)}
    assert {_feature_labels.LABELS[i] for i in shown.any(0).nonzero()[0]} == words  # small ones too, in a tile


def test_feature_store_reports_building_memory_and_questions(run: Run, tmp_path: Path) -> None:
    report = run("feature_store", tmp_path / "report.json")
    assert all(row.keys() == EVERY_ROW for row in report["geometries"]["quick"]["rows"].values())
    few, many = report["memory"].values()
    assert many["entries"] == 4 * few["entries"] > 0
    assert [found["entries"] for found in report["questions"].values()] == [20_480, 40_960]
    assert all(found[question] > 0 for found in report["questions"].values() for question in feature_store.QUESTIONS)


def test_average_precision_of_units_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, (60, 4)).astype(float)  # many equal ones
    labels = rng.random((60, 3)) < 0.3
    found = _feature_labels.average_precisions(scores, labels)
    for unit in range(4):
        for label in range(3):
            assert found[unit, label] == pytest.approx(average_precision_score(labels[:, label], scores[:, unit]))


def test_a_dose_response_is_clear_if_the_color_is_reached_and_no_control_reaches_it() -> None:
    quiet = {"random_feature": [0.0, 0.1, 0.1], "random_direction": [0.0, 0.2, 0.1]}
    assert sae.is_clear({"steered": [0.0, 0.4, 0.9], **quiet})
    assert sae.is_clear({"steered": [0.0, 0.9, 0.7], **quiet}), "too much of it may break the answer"
    assert not sae.is_clear({"steered": [0.0, 0.3, 0.4], **quiet})
    assert not sae.is_clear({"steered": [0.3, 0.2, 0.9], **quiet})
    assert not sae.is_clear({"steered": [0.0, 0.4, 0.9], **quiet, "random_direction": [0.0, 0.6, 0.6]})


def test_quantized_reports_every_way_to_pack(run: Run, tmp_path: Path) -> None:
    report = run("quantized", tmp_path / "report.json")
    answered = report["models"]["tiny-shapes"]
    assert answered.keys() == {"float32", "8 bits", "nf4", "fp4"}
    assert set(answered["float32"].values()) == {1.0}
    assert all(len(by_kind) == 2 for by_kind in answered.values())


@pytest.mark.slow
def test_tiles_reports_both_grids_and_every_method(run: Run, tmp_path: Path) -> None:
    report = run("tiles", tmp_path / "report.json")
    shown = {"as it is", "base blanked", "tiles blanked", "commonest"}
    assert all(row.keys() in (shown, {"as it is", "commonest"}) for row in report["accuracy"].values())
    maps, of = report["query_color"]["patch maps"], {"base, answer", "tiles, answer", "together, answer"}
    assert {name for name in _maps.METHODS if not name.startswith(_maps.ONE_BY_ONE)} < maps.keys()
    assert all(row.keys() == of for row in maps.values())
    assert report["query_color"]["tiles of another image"]["all"]["follows"][0] == 1.0


@pytest.mark.slow
def test_full_size_reports_every_part_of_a_shrunken_geometry(run: Run, tmp_path: Path) -> None:
    report = run("full_size", tmp_path / "report.json", "--geometry", "llava-1.6-mistral-7b", "--device", "cpu")
    assert report["left_out"] == {}
    assert report["tiles"] == 5
    rows = report["rows"]
    assert len(rows) == 11
    for row in rows.values():
        for name in (measure.BASELINE, measure.OURS):
            assert row[name].keys() == EVERY_ROW | {"peak_bytes", "host_reads"}
    assert rows[full_size.FORWARD]["logits_difference"] < 1e-5
    assert rows["generate 4 tokens"]["same_tokens"] == 1.0
    assert rows[full_size.EDIT]["reverted_exactly"] is True
    assert [rows[row]["runs"] for row in (full_size.SWEEP, full_size.KNOCKOUT)] == [60, 18]
    for row in (full_size.SWEEP, full_size.KNOCKOUT, full_size.TRACE):
        assert full_size.mark_of(row, rows[row]) == pytest.approx(1.3 * rows[row]["counted"])


@pytest.mark.slow
def test_full_size_measures_every_part_in_bfloat16(run: Run, tmp_path: Path) -> None:
    """As on a GPU; there an update that bfloat16 is too coarse for would be left out."""
    report = run("full_size", tmp_path / "report.json", "--device", "cpu", "--dtype", "bfloat16")
    assert (report["geometry"], report["dtype"], report["left_out"]) == ("llava-1.5-7b", "bfloat16", {})
    assert len(report["rows"]) == 11
    assert report["rows"][full_size.EDIT]["reverted_exactly"] is True


IMPORTS = """
import sys

class Known:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {absent} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Known, sys.meta_path)
import benchmarks.full_size
"""


@pytest.mark.slow
def test_a_bare_machine_needs_no_more_than_the_list_says() -> None:
    """Everything else that is pinned is made to be absent; what torch and transformers bring is there."""
    root = Path(full_size.__file__).parents[1]
    listed = (root / "benchmarks" / "full_size_wheels.txt").read_text(encoding="utf-8").replace("\n#", " ")
    said = {word.strip(",.").partition("==")[0].lower().replace("_", "-") for word in listed.split()}
    said |= {"pillow", "pyyaml", "typing-extensions", "packaging", "requests", "python-dateutil"}
    brought = _required(
        "torch", "transformers", "accelerate", "huggingface-hub", "pandas", "rich", "xarray", "jaxtyping"
    )
    pinned = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    names = {line.partition("==")[0].lower().replace("_", "-") for line in pinned if "==" in line}
    by_import = metadata.packages_distributions()
    absent = {
        module
        for module, owners in by_import.items()
        if {owner.lower().replace("_", "-") for owner in owners} <= names - said - brought
    }
    assert {"wandb", "sentencepiece", "beartype", "matplotlib", "sklearn"} <= absent
    assert not absent & {"xxhash", "datasets", "fancy_einsum"}
    command = [sys.executable, "-c", IMPORTS.format(absent=absent)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _required(*names: str) -> set[str]:
    """What packages require, and what that requires."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        waiting += [re.split(r"[^\w-]", one)[0] for one in needed if "extra ==" not in one]
    return found


def test_what_was_measured_is_kept_where_a_part_fails_or_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(case: full_size.Case) -> Any:
        raise torch.OutOfMemoryError("no more\nof it")

    times = {"median_s": 1.0, "ratio": 1.0, "peak_bytes": 0, "host_reads": 0}
    parts = {
        "good": lambda case: {"row": {measure.BASELINE: times, measure.OURS: times}},
        "bad": fail,
        "late": lambda case: clock.update(now=1e6) or {},
        "never": fail,
    }
    clock = {"now": 0.0}
    monkeypatch.setattr(full_size, "PARTS", parts)
    monkeypatch.setattr(full_size, "time", SimpleNamespace(perf_counter=lambda: clock["now"]))
    with pytest.raises(SystemExit, match="bad.*OutOfMemoryError: no more"):
        full_size.main(
            ["--quick", "--device", "cpu", "--geometry", "onevision-0.5b", "--out", str(tmp_path / "r.json")]
        )
    torch.set_grad_enabled(True)
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert list(report["rows"]) == ["row"]
    assert report["left_out"] == {"bad": "OutOfMemoryError: no more", "never": "4 minutes were over"}
    assert "Not measured: bad: OutOfMemoryError" in capsys.readouterr().out


def test_geometries_have_as_many_weights_as_the_checkpoints() -> None:
    counted = {
        name: sum(int(np.prod(shape)) for shape in expected_tensors(LLaVAConfig.from_hf(geometry.config())).values())
        for name, geometry in FOR_COUNTING.items()
    }
    billions = {name: round(n / 1e9, 2) for name, n in counted.items()}
    assert billions == {
        "llava-1.5-7b": 7.06,
        "llava-1.6-mistral-7b": 7.57,
        "llama3-llava-next-8b": 8.36,
        "onevision-0.5b": 0.89,
        "onevision-7b": 8.03,
        "llava-1.5-13b": 13.35,
    }
    assert FOR_COUNTING.keys() - GEOMETRIES.keys() == {"llava-1.5-13b"}


def test_reads_of_numbers_on_the_device_are_counted() -> None:
    x = torch.arange(4.0)
    reads = {
        "bool": lambda: bool(x[0] > 0),
        "mask": lambda: x[x > 1],
        "nonzero": x.nonzero,
        "sum": lambda: x.sum() + x[1],
    }
    assert {name: host_reads(work, x.device) for name, work in reads.items()} == {
        "bool": 1, "mask": 1, "nonzero": 1, "sum": 0,
    }  # fmt: skip
    assert host_reads(lambda: bool(x[0] > 0), torch.device("meta")) == 0, "on another device"


def test_wheels_of_a_bare_machine_are_the_versions_that_are_tested() -> None:
    root = Path(full_size.__file__).parents[1]
    wheels = (root / "benchmarks" / "full_size_wheels.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line for line in wheels if line and not line.startswith("#")}
    assert pinned
    assert pinned <= set((root / "constraints.txt").read_text(encoding="utf-8").splitlines())


def storages(tensors: Any) -> int:
    """Bytes of memory of some tensors, each piece counted once."""
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(held.values())


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava-1.5-7b", "llama3-llava-next-8b"])
def test_forecasts_of_memory_are_what_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = GEOMETRIES[name].small()
    model = HookedLLaVA.from_hf(random_hf_model(geometry.config()))
    case = memory_table.Case.of(model, geometry.config(), geometry, 128, 4)
    inputs, stores = case.inputs, []
    made = KVCache.__init__
    monkeypatch.setattr(KVCache, "__init__", lambda self, *args, **how: made(self, *args, **how) or stores.append(self))
    model.generate(inputs, memory_table.NEW_TOKENS, stop_at_eos=False, return_type="tokens")
    (generated,) = stores
    cache = lambda *names, **how: storages(model.run_with_cache(inputs, names_filter=[*names], **how)[1].values())  # noqa: E731
    answers = cache_answer(model, inputs)
    sae = SparseAutoencoder(case.sae).reset(0)
    trainer = SAETrainer(sae, TrainingConfig(steps=2), Processes(0, 1))
    trainer.step([torch.randn(16, case.sae.d_in)])
    moments = [t for of in trainer.optimizer.state.values() for t in of.values() if t.ndim]
    kept = [
        storages(model.parameters()),
        *(_kept_packed(model, case.hf_config, how) for how in (memory_table.EIGHT_BITS, memory_table.FOUR_BITS)),
        generated.nbytes,
        cache("resid_post"),
        cache("pattern"),
        sum(t.nbytes for t in model.run_with_cache(inputs, positions="last")[1].values()),
        storages([*answers.resid, answers.scale, *answers.held.values()]),
        Replay(model, inputs).nbytes,
        _kept_by_a_trace(case, monkeypatch),
        _kept_by_an_edit(case),
        storages(sae.parameters()),
        storages([*sae.parameters(), *(p.grad for p in sae.parameters()), *moments]),
    ]
    found = memory_table.forecasts(case)
    assert found == pytest.approx(dict(zip(memory_table.KINDS, kept, strict=True)), rel=0.02)


def _kept_packed(model: HookedLLaVA, hf_config: Any, how: Any) -> int:
    names, packed = Quantization(how).names(hf_config, model.config), copy.deepcopy(model)
    quantize_linears(packed, names, how)
    for path, linear in quantized_linears(packed).items():
        linear.keep_weight(model.get_parameter(f"{path}.weight"))
    return storages(packed.parameters())


def _kept_by_a_trace(case: memory_table.Case, monkeypatch: pytest.MonkeyPatch) -> int:
    """The runs and the clean outputs that are alive when the restored runs begin."""
    kept: list[int] = []
    module = import_module("hooked_llava.analysis.causal_trace")
    outputs, corrupt = module._clean_activations, module.corrupt

    def corrupting(model: Any, clean: Replay, *args: Any) -> Any:
        corrupted = corrupt(model, clean, *args)
        kept.extend([clean.nbytes, *(replay.nbytes for replay in corrupted.replays)])
        return corrupted

    def clean_activations(*args: Any) -> Any:
        found = outputs(*args)
        kept.append(storages(found.values()))
        return found

    monkeypatch.setattr(module, "corrupt", corrupting)
    monkeypatch.setattr(module, "_clean_activations", clean_activations)
    causal_trace(case.model, case.inputs, constraint=case.constraint)
    assert len(kept) == 3
    return sum(kept)


def _kept_by_an_edit(case: memory_table.Case) -> int:
    token = int(case.model(case.inputs)[0, -1].topk(5).indices[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HookedLLaVAWarning)  # random weights need not learn it
        edit = multedit(case.model, EditRequest(case.inputs, target=[token]), layer=0, position="last")
    (name,) = edit.changes
    weight = case.model.get_parameter(name)
    with edit.applied():
        before = weight_records.original(weight)
        assert before.data_ptr() != weight.data_ptr()
        return before.nbytes + edit.nbytes


def test_the_memory_table_is_what_the_library_forecasts_today() -> None:
    report = json.loads((measure.RESULTS / "memory_table.json").read_text(encoding="utf-8"))
    assert list(report["geometries"]) == list(memory_table.CHOSEN)
    for name in ("llava-1.5-7b", "llama3-llava-next-8b"):
        case = memory_table.Case.counted(FOR_COUNTING[name])
        assert report["geometries"][name]["bytes"] == memory_table.forecasts(case)
