"""What head scores and a patch map cost beside a forward pass: `python -m benchmarks.head_scores`.

Seconds are ratios to Hugging Face's forward (sdpa attention, all logits) in the same process and repetition. Memory is
the peak over what was resident before, each from a fresh process; ratios are to that of Hugging Face's forward, once
for what the work adds and once with the weights counted in. Linux only, for the peak.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from benchmarks._measure import (
    BASELINE,
    OURS,
    Work,
    alternate,
    arguments,
    in_fresh_process,
    markdown,
    peak_bytes,
    reset_peak,
    start,
    summarise,
    write,
)
from benchmarks._models import POSITIONS, hf_config, random_hf_model, random_prompt, sizes
from hooked_llava.analysis import head_scores, layer_scores, patch_importance
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.readout.answer_cache import cache_answer

FORWARD, HEADS, BOTH, ALL = "forward, all logits", "head scores", "head scores and a patch map", "map of all heads"
_MB = 2**20


def works(geometry: str) -> dict[str, Work]:
    """Each thing that is timed, on the same weights and the same prompt."""
    config = hf_config(geometry)
    inputs = random_prompt(config, POSITIONS[geometry])
    hf = random_hf_model(config)
    return {BASELINE: lambda: hf(**inputs), **ours(HookedLLaVA.from_hf(hf), inputs)}


def ours(model: HookedLLaVA, inputs: dict[str, Tensor]) -> dict[str, Work]:
    """Our forward, and what is read from it."""
    prompt = model.as_inputs(inputs)
    return {
        FORWARD: lambda: model(prompt),
        HEADS: lambda: head_scores(model, prompt),
        BOTH: lambda: heads_and_map(model, prompt),
        ALL: lambda: patch_importance(model, prompt, heads="all"),
        "head scores, layer scores and three maps": lambda: everything(model, prompt),
    }


def heads_and_map(model: HookedLLaVA, prompt: Any) -> list[Any]:
    """Scores of all heads, and the map of the best: one forward pass."""
    decision = cache_answer(model, prompt, parts=("pattern", "v", "z"))
    return [head_scores(model, decision), patch_importance(model, decision)]


def everything(model: HookedLLaVA, prompt: Any) -> list[Any]:
    """All that one forward pass gives."""
    decision = cache_answer(model, prompt)
    return [
        head_scores(model, decision),
        layer_scores(model, decision),
        patch_importance(model, decision),
        patch_importance(model, decision, heads=4),
        patch_importance(model, decision, method="attention"),
    ]


def worker(geometry: str, name: str) -> dict[str, int]:
    """Peak over what is resident before one run, after a warm-up that loads what is loaded once."""
    config = hf_config(geometry)
    inputs = random_prompt(config, POSITIONS[geometry])
    hf = random_hf_model(config)
    work: Callable[[], object] = (
        (lambda: hf(**inputs)) if name == BASELINE else ours(HookedLLaVA.from_hf(hf), inputs)[name]
    )
    work()
    reset_peak()
    before = peak_bytes()
    work()
    weights = sum(p.numel() * p.element_size() for p in hf.parameters())
    return {"peak_bytes": peak_bytes() - before, "weight_bytes": weights}


def memory(geometry: str, names: Sequence[str], threads: int) -> dict[str, dict[str, float]]:
    """Each work's peak, alone and with the weights, against Hugging Face's."""
    rows = {name: in_fresh_process("head_scores", threads, geometry, name) for name in names}
    base = rows[BASELINE]
    for row in rows.values():
        row["ratio"] = row["peak_bytes"] / base["peak_bytes"]
        row["ratio_with_weights"] = (row["peak_bytes"] + row["weight_bytes"]) / (
            base["peak_bytes"] + base["weight_bytes"]
        )
    return rows


def table(rows: dict[str, dict[str, Any]], geometry: str) -> str:
    """Time and memory against Hugging Face's forward."""
    cells = {
        f"{OURS}: {name}" if name != BASELINE else f"{name}: {FORWARD}": [
            f"{row['ratio']:.2f} ({row['median_s']:.3g} s)",
            f"{row['memory']['ratio']:.2f} ({row['memory']['peak_bytes'] / _MB:.0f} MiB)",
            f"{row['memory']['ratio_with_weights']:.2f}",
        ]
        for name, row in rows.items()
    }
    return markdown(
        ["time", "memory over the weights", "memory with the weights"], cells, f"heads and patches, {geometry}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--worker", nargs=2, help="internal: geometry and name of the work; prints its memory as JSON")
    options = start(parser, argv)
    if options.worker:
        print(json.dumps(worker(*options.worker)))
        return
    measured = {}
    for geometry in options.geometry:
        named = works(geometry)
        seconds = summarise(alternate(named, options.repetitions))
        peaks = memory(geometry, list(named), options.threads)
        rows = {name: {**seconds[name], "memory": peaks[name]} for name in named}
        measured[geometry] = {"sizes": sizes(hf_config(geometry), POSITIONS[geometry]), "rows": rows}
        print(f"\n{table(rows, geometry)}")
    print(f"\nwritten to {write('head_scores', options, geometries=measured)}")


if __name__ == "__main__":
    main()
