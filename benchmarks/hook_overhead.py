"""What naming, reading, writing and caching activations costs: `python -m benchmarks.hook_overhead`.

Every ratio is to the plain forward of Hugging Face's model with sdpa attention, run in the same process in the same
repetition. Each contestant has its own copy of the same random weights and gets tensors that are already prepared.
"""

from __future__ import annotations

import copy
import functools
import statistics
import subprocess
import sys
import timeit
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint as LensHookPoint

from benchmarks._hook_works import ROWS, bridge_works, hf_works, nnsight_works, our_works, read
from benchmarks._measure import (
    BASELINE,
    BRIDGE,
    HF_EAGER,
    NNSIGHT,
    OURS,
    Work,
    alternate,
    arguments,
    markdown,
    ratio_table,
    start,
    summarise,
    write,
)
from benchmarks._models import (
    POSITIONS,
    has_nnsight,
    hf_config,
    make_bridge,
    random_hf_model,
    random_prompt,
    sizes,
    with_attention,
)
from hooked_llava.model.components import HookPoint, reads_only
from hooked_llava.model.llava import HookedLLaVA

HF_OWN = "HF sdpa, own means"
NOTES = """Hugging Face's own means: a forward hook on the layer module; output_hidden_states; eager attention with
output_attentions; both of these for "cache everything". nnsight's "everything" is the output of every layer, attention
and MLP, its patterns are left out. hooked_llava and the bridge cache what their run_with_cache caches by default."""


def contestants(geometry: str) -> dict[str, list[Work | None]]:
    """For each contestant its calls, row by row; None where it has none."""
    config = hf_config(geometry)
    inputs = random_prompt(config, POSITIONS[geometry])
    sdpa = random_hf_model(config)
    forward = functools.partial(sdpa, **inputs)
    works = {
        BASELINE: [forward] * len(ROWS),
        HF_OWN: [None, *hf_works(sdpa, inputs, eager=False)[1:]],
        HF_EAGER: hf_works(with_attention(sdpa, "eager"), inputs, eager=True),
        OURS: our_works(HookedLLaVA.from_hf(copy.deepcopy(sdpa)), inputs),
        BRIDGE: bridge_works(make_bridge(copy.deepcopy(sdpa)), inputs),
    }
    if has_nnsight():
        works[NNSIGHT] = nnsight_works(copy.deepcopy(sdpa), inputs)
    return works


def measure(geometry: str, repetitions: int) -> dict[str, dict[str, Any]]:
    """Row -> contestant -> medians and ratios."""
    works = contestants(geometry)
    rows = {}
    for i, row in enumerate(ROWS):
        present = {name: work for name, calls in works.items() if (work := calls[i]) is not None}
        rows[row] = summarise(alternate(present, repetitions))
    return rows


def hook_point_costs(quick: bool) -> dict[str, float]:
    """Microseconds per call of a hook point, ours and TransformerLens's, on a tensor of 4 KB."""
    calls, tensor = (200 if quick else 20_000), torch.zeros(1, 1, 1024)
    costs = {}
    for label, kind in (("hooked_llava", HookPoint), ("TransformerLens", LensHookPoint)):
        point = kind()
        costs[f"{label}: no hooks"] = _microseconds(lambda point=point: point(tensor), calls)
        costs[f"{label}: attach and remove"] = _microseconds(
            lambda point=point: (point.add_hook(read), point.remove_hooks()), calls // 10
        )
        point.add_hook(read)
        costs[f"{label}: one reading function"] = _microseconds(lambda point=point: point(tensor), calls)
    point = HookPoint()
    point.add_hook(reads_only(lambda tensor, hook: None))
    costs["hooked_llava: one function marked reads_only"] = _microseconds(lambda: point(tensor), calls)
    return costs


def _microseconds(work: Work, calls: int) -> float:
    return statistics.median(timeit.repeat(work, number=calls, repeat=7)) / calls * 1e6


def import_seconds(repetitions: int) -> dict[str, float]:
    """What `import hooked_llava` with its model class adds to the libraries below it, each time in a new process.

    transformers imports its model code only when something asks for it, which whoever loads a model does; that part
    is counted as transformers' own, and once more as ours.
    """
    bases = {
        "after transformers' model code": "from transformers import AutoProcessor, LlavaForConditionalGeneration",
        "after `import transformers` alone": "import transformers",
    }
    seconds = {}
    for label, base in bases.items():
        code = (
            f"import time, torch, transformer_lens; {base}; start = time.perf_counter(); "
            "import hooked_llava, hooked_llava.model.llava; print(time.perf_counter() - start)"
        )
        command = [sys.executable, "-c", code]
        runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(repetitions)]
        seconds[label] = statistics.median(float(run.stdout.split()[-1]) for run in runs)
    return seconds


def main(argv: list[str] | None = None) -> None:
    options = start(arguments(__doc__, geometries=("medium", "tiny-shapes")), argv)
    measured = {}
    for geometry in options.geometry:
        rows = measure(geometry, options.repetitions)
        columns = [name for name in (BASELINE, HF_OWN, HF_EAGER, OURS, BRIDGE, NNSIGHT) if name in rows[ROWS[1]]]
        measured[geometry] = {"sizes": sizes(hf_config(geometry), POSITIONS[geometry]), "rows": rows}
        print(f"\n{ratio_table(rows, columns, geometry)}")
    costs = hook_point_costs(options.quick)
    imports = import_seconds(1 if options.quick else 5)
    print(f"\n{NOTES}\n")
    print(markdown(["us per call"], {name: [f"{us:.2f}"] for name, us in costs.items()}, "hook point"), end="\n\n")
    print(markdown(["s"], {name: [f"{s:.2f}"] for name, s in imports.items()}, "`import hooked_llava` adds"))
    path = write("hook_overhead", options, geometries=measured, hook_point_us=costs, import_s=imports)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
