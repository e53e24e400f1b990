"""What sweeps of interventions cost, in forward passes: `python -m benchmarks.patching`.

One forward is Hugging Face's with sdpa attention on the same prompt, all logits, run in the same process in the same
repetition. Done one by one, every run of a sweep is at least one such forward. Counted work is in the same unit:
multiplications by weights in the language tower's blocks, against all of them in that forward. Runs are compared with
full forward passes under plain hooks on a sample. The sweep over every position ("whole") takes long, is timed once,
and only when named in --rows; what a result file holds of other rows stays.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from benchmarks._measure import (
    BASELINE,
    BRIDGE,
    OURS,
    Summary,
    Work,
    alternate,
    arguments,
    in_fresh_process,
    markdown,
    peak_bytes,
    quartiles,
    reset_peak,
    result_path,
    start,
    summarise,
    write,
)
from benchmarks._models import POSITIONS, hf_config, make_config, sizes
from benchmarks._sweeps import (
    TEXT,
    WINDOW,
    Setting,
    Sweep,
    WithImage,
    blocked,
    largest_difference,
    make_setting,
    metric,
    resid_pre,
    sample,
    token_layers_of_a_forward,
    z,
)
from hooked_llava.analysis import attribution_patching
from hooked_llava.prompt.where import positions_of
from hooked_llava.replay import Replay

ROWS = {
    "kept": "the kept run",
    "text": f"resid_pre, every layer x last {TEXT} positions",
    "whole": "resid_pre, every layer x every position",
    "z-last": "z of every head, last position",
    "z-all": "z of every head, all positions together",
    "block": f"block image -> last, windows of {WINDOW} layers",
    "attribution": "attribution patching of all nodes, both runs included",
}
TO_REACH = {"kept": 0.9, "text": 2.5, "whole": 1000.0, "z-last": 0.2, "z-all": 30.0, "block": 0.1, "attribution": 3.2}
"""In forwards, at the medium geometry; the sweeps besides the kept run."""
NODES = ("hook_embed", "resid_pre", "attn_out", "z", "mlp_out")
PARTS = ("memory", "scaling")
PLAIN = "one full forward with a plain hook"
SCALING_TEXT, SCALING_LAYERS = (10, 20, 40, 80), (2, 4, 8, 16)
_MB = 2**20
_SAMPLE, _BRIDGE_SAMPLE, _TOLERANCE = 8, 3, 1e-4
_FORWARDS = 5  # timed before, and as many after, a sweep that is timed once
_FIRST = 8  # positions, of the sweep over all of them, whose memory is measured

Measured = dict[str, Any]


def sweep_of(row: str, setting: Setting) -> Sweep:
    """The runs of a row."""
    n_positions = setting.inputs.shape[1]
    positions = range(n_positions)
    if row in ("text", "whole"):
        return resid_pre(setting, positions[-TEXT:] if row == "text" else positions)
    if row == "block":
        return blocked(setting)
    return z(setting, positions[-1:] if row == "z-last" else positions)


def measure_row(row: str, setting: Setting, bridge: WithImage | None, repetitions: int) -> Measured:
    """Seconds and ratios to a forward of one row; of a sweep also counted work and differences."""
    model, inputs = setting.model, setting.inputs
    if row == "kept":
        return _ratios(setting, {OURS: lambda: Replay(model, inputs).logits()}, repetitions)
    if row == "attribution":
        clean = model.as_inputs(setting.clean)
        work = lambda: attribution_patching(model, clean, inputs, hooks=NODES, metric=metric)  # noqa: E731
        return _ratios(setting, {OURS: work}, repetitions)
    sweep = sweep_of(row, setting)
    checked = sample(sweep, _SAMPLE)
    difference = largest_difference(setting, Replay(model, inputs), sweep, checked)
    if difference > _TOLERANCE:
        raise RuntimeError(f"{ROWS[row]}: differs from plain hooks by {difference:.1e} of the largest logit.")
    return {
        "plain_hooks_difference": difference,
        "plain_hooks_sample": len(checked),
        **measure_sweep(sweep, setting, bridge, 0 if row == "whole" else repetitions),
    }


def measure_sweep(sweep: Sweep, setting: Setting, bridge: WithImage | None, repetitions: int) -> Measured:
    """A sweep beside forwards and TransformerLens's own on a sample; with 0 repetitions timed once, with a bar."""
    replay, runs = Replay(setting.model, setting.inputs), [run.data for run in sweep.runs]
    chosen = sample(sweep, _BRIDGE_SAMPLE)
    values: dict[str, Any] = {}
    works: dict[str, Work] = {OURS: lambda: values.update(ours=replay.run(runs, metric, progress=not repetitions))}
    if bridge is not None and sweep.tool is not None:
        works[BRIDGE] = lambda: values.update(theirs=bridge.sweep(sweep, chosen))
    measured = _ratios(setting, works, repetitions)
    token_layers = replay.work.token_layers * len(runs) / replay.work.runs
    forward = token_layers_of_a_forward(setting.hf_model, setting.inputs.shape[1])
    measured |= {"runs": len(runs), "token_layers": token_layers, "counted": token_layers / forward}
    if BRIDGE in measured:
        measured[BRIDGE] = _extrapolated(measured[BRIDGE], len(runs), len(chosen))
        measured["bridge_difference"] = float((values["ours"][chosen] - values["theirs"]).abs().max())
    return measured


def _ratios(setting: Setting, works: dict[str, Work], repetitions: int) -> Measured:
    if repetitions:
        return dict(summarise(alternate({BASELINE: setting.forward, **works}, repetitions)))
    forwards = [_seconds(setting.forward) for _ in range(_FORWARDS)]
    seconds = {name: [_seconds(work)] for name, work in works.items()}
    forwards += [_seconds(setting.forward) for _ in range(_FORWARDS)]
    return {**summarise({BASELINE: [statistics.median(forwards)], **seconds}), "forwards_s": quartiles(forwards)}


def _seconds(work: Work) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _extrapolated(summary: Summary, n_runs: int, n_timed: int) -> Summary:
    """The whole sweep's cost, from that of a sample of its runs."""
    factor = n_runs / n_timed
    scaled = {key: summary[key] * factor for key in ("median_s", "ratio")}
    scaled |= {key: [value * factor for value in summary[key]] for key in ("iqr_s", "ratio_iqr")}
    return {**summary, **scaled, "extrapolated_from_runs": n_timed}


def measure_scaling(repetitions: int, *, quick: bool) -> list[Measured]:
    """The sweep over the last positions in every layer, for longer texts and for deeper language towers."""
    shape: dict[str, Any] = {"image_size": 336, "patch_size": 14, "d_vision": 512, "d_model": 512, "d_mlp": 1376}
    n_vision_layers, texts, depths = 8, SCALING_TEXT, SCALING_LAYERS
    if quick:
        shape = {"image_size": 32, "patch_size": 8, "d_vision": 32, "d_model": 32, "d_mlp": 64, "d_vocab": 199}
        n_vision_layers, texts, depths = 2, (5, 10), (1, 2)
    points = [(n_text, depths[-2]) for n_text in texts] + [(texts[1], n_layers) for n_layers in depths]
    found = []
    for n_text, n_layers in dict.fromkeys(points):
        config = make_config(**shape, n_layers=n_layers, n_vision_layers=n_vision_layers)
        setting = Setting.of(config, 1 + config.image_seq_length + n_text)
        positions = range(setting.inputs.shape[1])[-n_text:]
        measured = measure_sweep(resid_pre(setting, positions), setting, None, repetitions)
        microseconds = measured[OURS]["median_s"] / measured["token_layers"] * 1e6
        found.append({"text": n_text, "layers": n_layers, "us_per_token_layer": microseconds, **measured})
    return found


def worker(row: str, geometry: str) -> Measured:
    """Peak memory of one sweep, in this process, which should have done nothing else."""
    setting = make_setting(geometry, POSITIONS[geometry])
    sweep = sweep_of("text" if row == PLAIN else row, setting)
    runs = [run.data for run in sweep.runs]
    if row == "whole":  # the longest rows, of which its largest batches are made
        firsts = [positions_of(run[0].positions, None, setting.inputs.shape[1])[0] for run in runs]
        runs = [run for run, first in zip(runs, firsts, strict=True) if first < _FIRST]
    replay = Replay(setting.model, setting.inputs)
    if row == PLAIN:
        runs = runs[:1]
    reset_peak()
    before = peak_bytes()
    if row == PLAIN:
        setting.model.run_with_hooks(setting.inputs, fwd_hooks=sweep.runs[0].plain)
    else:
        replay.run(runs, metric, progress=False)
    return {"peak_bytes": peak_bytes() - before, "runs": len(runs), "kept_bytes": replay.nbytes}


def measure_memory(geometry: str, options: argparse.Namespace) -> dict[str, Measured]:
    """Peak over what is resident before (the kept run among it), for one full forward and for each sweep."""
    sweeps = ["text"] if options.quick else [row for row in ROWS if row not in ("kept", "attribution")]
    return {row: in_fresh_process("patching", options.threads, row, geometry) for row in (PLAIN, *sweeps)}


def table(rows: dict[str, Measured]) -> str:
    """The sweeps with their cost in forwards."""
    cells = {}
    for row, measured in rows.items():
        ours, bridge = measured[OURS], measured.get(BRIDGE)
        cells[ROWS[row]] = [
            str(measured.get("runs", "-")),
            f"{measured['counted']:.2f}" if "counted" in measured else "-",
            f"{ours['ratio']:.2f} ({ours['median_s']:.3g} s)",
            f"{TO_REACH[row]:g}",
            "-" if bridge is None else f"{bridge['ratio']:.0f} (from {bridge['extrapolated_from_runs']} runs)",
        ]
    return markdown(["runs", "counted", OURS, "to reach", BRIDGE], cells, "forwards")


def scaling_table(points: list[Measured]) -> str:
    """Cost against text and depth: measured and counted, in forwards of the same model."""
    cells = {
        f"{point['text']} positions x {point['layers']} layers": [
            str(point["runs"]),
            f"{point['counted']:.2f}",
            f"{point[OURS]['ratio']:.2f}",
            f"{point[OURS]['ratio'] / point['counted']:.2f}",
            f"{point['us_per_token_layer']:.0f}",
        ]
        for point in points
    }
    return markdown(["runs", "counted", OURS, "measured / counted", "us per token and layer"], cells, "sweep")


def memory_table(memory: dict[str, Measured]) -> str:
    """Peaks in MiB."""
    cells = {
        ROWS.get(row, row): [f"{of['runs']}", f"{of['peak_bytes'] / _MB:.0f}", f"{of['kept_bytes'] / _MB:.0f}"]
        for row, of in memory.items()
    }
    return markdown(["runs", "peak, MiB", "kept run, MiB"], cells, "memory")


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, repetitions=7)
    choices = [*ROWS, *PARTS]
    usual = [choice for choice in choices if choice != "whole"]
    parser.add_argument("--rows", nargs="+", choices=choices, default=usual, help="all but the long one by default")
    parser.add_argument("--worker", nargs=2, metavar=("ROW", "GEOMETRY"), help="peak memory of one sweep, as JSON")
    options = start(parser, argv)
    if options.worker:
        print(json.dumps(worker(*options.worker)))
        return
    path = result_path("patching", options)
    geometries: Measured = json.loads(path.read_text(encoding="utf-8"))["geometries"] if path.is_file() else {}
    rows = [row for row in ROWS if row in options.rows]
    for geometry in options.geometry:
        found = geometries.setdefault(geometry, {"sizes": sizes(hf_config(geometry), POSITIONS[geometry]), "rows": {}})
        setting = make_setting(geometry, POSITIONS[geometry])
        bridge = WithImage(setting) if set(rows) - {"kept", "attribution", "block"} else None
        for row in rows:
            found["rows"][row] = measure_row(row, setting, bridge, options.repetitions)
            write("patching", options, geometries=geometries)  # a long run that is cut off keeps what it has
        print(f"\n{geometry}\n\n{table({row: found['rows'][row] for row in ROWS if row in found['rows']})}")
        if "memory" in options.rows:
            found["memory"] = measure_memory(geometry, options)
            print(f"\n{memory_table(found['memory'])}")
        if "scaling" in options.rows:
            found["scaling"] = measure_scaling(options.repetitions, quick=options.quick)
            print(f"\n{scaling_table(found['scaling'])}")
    print(f"\nwritten to {write('patching', options, geometries=geometries)}")


if __name__ == "__main__":
    main()
