"""How much memory a cache takes beyond the forward's own: `python -m benchmarks.cache_memory`.

Each number comes from a fresh process: model, one warm-up forward, then the peak of resident memory during the work
over what was resident before. A cache's cost is that number less the plain forward's, against the bytes of the cached
tensors, each storage counted once. Linux only: the peak is read and reset under /proc.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from benchmarks._measure import (
    BRIDGE,
    HF_EAGER,
    OURS,
    arguments,
    in_fresh_process,
    markdown,
    peak_bytes,
    reset_peak,
    start,
    write,
)
from benchmarks._models import POSITIONS, hf_config, make_bridge, random_hf_model, random_prompt, sizes
from hooked_llava.model.llava import HookedLLaVA

PLAIN = "forward, no hooks"
ROWS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "cache everything": {},
    "cache resid_post of all layers": {"names_filter": "resid_post"},
    "cache patterns of all layers": {"names_filter": "pattern"},
    'cache everything, positions="last"': {"positions": "last"},
}
"""What is cached, in the words of our run_with_cache."""
_MB = 2**20
NOTES = """Cells: peak over the plain forward's / bytes of the cached tensors (how many, and model.cache_size's forecast
where there is one), in MiB. The forecast counts each hook's tensor, also where neighbors share one storage."""

Forward = Callable[[], object]
Cache = Callable[[], Iterable[object]]
Measured = dict[str, Any]


def ours(config: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> tuple[Forward, Cache, int | None]:
    model = HookedLLaVA.from_hf(random_hf_model(config))
    prompt = model.as_inputs(inputs)
    forecast = model.cache_size(prompt, **options)
    return (lambda: model(prompt)), (lambda: list(model.run_with_cache(prompt, **options)[1].values())), forecast


def bridge(config: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> tuple[Forward, Cache, int | None]:
    model = make_bridge(random_hf_model(config))
    ids, rest = inputs["input_ids"], {name: tensor for name, tensor in inputs.items() if name != "input_ids"}
    if "names_filter" in options:
        ending = f"hook_{options['names_filter']}"
        options = {"names_filter": lambda name: name.startswith("blocks.") and name.endswith(ending)}
    elif "positions" in options:
        options = {"pos_slice": -1}

    def cache() -> list[object]:
        return list(model.run_with_cache(ids, **options, **rest)[1].values())

    return (lambda: model(ids, **rest)), cache, None


def hf_eager(config: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> tuple[Forward, Cache, int | None]:
    model = random_hf_model(config, "eager")
    wanted = options.get("names_filter")
    outputs = {"output_hidden_states": wanted != "pattern", "output_attentions": wanted != "resid_post"}

    def cache() -> list[object]:
        output = model(**inputs, **outputs)
        return [output.logits, *(output.hidden_states or ()), *(output.attentions or ())]

    return (lambda: model(**inputs)), cache, None


CONTESTANTS = {OURS: ours, BRIDGE: bridge, HF_EAGER: hf_eager}


def worker(contestant: str, row: str, geometry: str) -> Measured:
    """One measurement in this process, which should have done nothing else."""
    config = hf_config(geometry)
    inputs = random_prompt(config, POSITIONS[geometry])
    forward, cache, forecast = CONTESTANTS[contestant](config, inputs, ROWS[row])
    forward()
    reset_peak()
    before = peak_bytes()
    kept = forward() if row == PLAIN else cache()
    measured: Measured = {"peak_bytes": peak_bytes() - before}
    if row != PLAIN:
        assert isinstance(kept, Iterable)
        tensors = [tensor for tensor in kept if isinstance(tensor, Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        measured |= {"tensors": len(tensors), "tensor_bytes": sum(storages.values()), "forecast_bytes": forecast}
    return measured


def measure(
    geometry: str, repetitions: int, threads: int, rows: list[str], names: list[str]
) -> dict[str, dict[str, Measured]]:
    """Row -> contestant -> medians, with what the cache took over the plain forward."""
    runs = {
        (row, name): [in_fresh_process("cache_memory", threads, name, row, geometry) for _ in range(repetitions)]
        for row in rows
        for name in names
        if not (name == HF_EAGER and "positions" in ROWS[row])
    }
    rows_measured: dict[str, dict[str, Measured]] = {row: {} for row in rows}
    for (row, name), of in runs.items():
        peaks = [run["peak_bytes"] for run in of]
        result = {**of[0], "peak_bytes": statistics.median(peaks), "peak_range": [min(peaks), max(peaks)]}
        if row != PLAIN:
            result["over_forward_bytes"] = result["peak_bytes"] - rows_measured[PLAIN][name]["peak_bytes"]
            result["ratio"] = result["over_forward_bytes"] / result["tensor_bytes"]
        rows_measured[row][name] = result
    return rows_measured


def cell(measured: Measured | None) -> str:
    if measured is None:
        return "-"
    if "ratio" not in measured:
        return f"peak {measured['peak_bytes'] / _MB:.0f}"
    forecast = measured["forecast_bytes"]
    about = f"{measured['tensors']}" + ("" if forecast is None else f", forecast {forecast / _MB:.0f}")
    over, held = measured["over_forward_bytes"] / _MB, measured["tensor_bytes"] / _MB
    return f"{over:.0f} / {held:.0f} = {measured['ratio']:.2f} ({about})"


def table(found: dict[str, Any], geometry: str) -> str:
    """Memory of each row's cache, of each contestant."""
    names = list(found["rows"][PLAIN])
    return markdown(names, {row: [cell(of.get(name)) for name in names] for row, of in found["rows"].items()}, geometry)


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, repetitions=3)
    parser.add_argument("--worker", nargs=3, metavar=("CONTESTANT", "ROW", "GEOMETRY"), help="one measurement, as JSON")
    options = start(parser, argv)
    if options.worker:
        print(json.dumps(worker(*options.worker)))
        return
    rows, names, repetitions = list(ROWS), list(CONTESTANTS), options.repetitions
    if options.quick:  # a process each, of which the imports alone take seconds
        rows, names, repetitions = rows[:2], [OURS], 1
    measured = {}
    for geometry in options.geometry:
        result = measure(geometry, repetitions, options.threads, rows, names)
        measured[geometry] = {"sizes": sizes(hf_config(geometry), POSITIONS[geometry]), "rows": result}
        print(f"\n{table(measured[geometry], geometry)}")
    print(f"\n{NOTES}")
    print(f"\nwritten to {write('cache_memory', options, geometries=measured)}")


if __name__ == "__main__":
    main()
