"""What a causal trace costs, in forward passes: `python -m benchmarks.causal_trace`.

One forward is Hugging Face's with sdpa attention on the same prompt, run in the same process in the same repetition. The
whole of `causal_trace` is timed: the kept clean run, the corrupted run, the clean outputs, and all restored runs. Done
one by one, each restored run is at least one such forward; the code released with arXiv 2406.04236 runs three prompts
for each. Counted work is in forwards of the language tower's blocks, besides the kept run. A sample of cells is compared
with full forward passes under plain hooks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks._measure import BASELINE, OURS, alternate, arguments, markdown, start, summarise, write
from benchmarks._models import POSITIONS, hf_config, random_hf_model, random_prompt, sizes
from benchmarks._sweeps import token_layers_of_a_forward
from hooked_llava.analysis.causal_trace import causal_trace
from hooked_llava.experiments.corruptions import Noise, OtherImage
from hooked_llava.experiments.pairs import gaussian_noise
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.options.trace_kinds import TRACE_KINDS

ROWS: dict[str, dict[str, Any]] = {
    "one kind: MLP": {"kinds": ("mlp",)},
    "three kinds": {},
    "three kinds, windows of 3": {"window": 3},
    "three kinds, the first word after the image": {"words_between": 0},
    "three kinds, another image": {"words_between": 0, "other": True},
}
"""What is traced; `words_between` says how many words stand between image and constraint."""
WORDS_BETWEEN = 9
TO_REACH = {"three kinds": 12.0}
"""Counted forwards besides the kept run, at the medium geometry."""
_SAMPLE, _TOLERANCE = 6, 1e-4

Measured = dict[str, Any]


def options_of(row: str, prompt: dict[str, Tensor], n_image: int) -> dict[str, Any]:
    """Arguments of `causal_trace` for a row; the image stands after the first token."""
    given = dict(ROWS[row])
    first = 1 + n_image + min(given.pop("words_between", WORDS_BETWEEN), prompt["input_ids"].shape[1] - n_image - 4)
    corruption: Any = Noise()
    if given.pop("other", False):
        other = torch.randn(prompt["pixel_values"].shape, generator=torch.Generator().manual_seed(2))
        corruption = OtherImage({**prompt, "pixel_values": other})
    return {"constraint": [first, first + 1], "corruption": corruption, "kinds": tuple(TRACE_KINDS), **given}


def measure_row(row: str, model: HookedLLaVA, hf_model: Any, prompt: dict[str, Tensor], repetitions: int) -> Measured:
    """Seconds as a ratio to a forward, counted work, and the difference from plain hooks."""
    inputs = model.as_inputs(prompt)
    options = options_of(row, prompt, hf_model.config.image_seq_length)
    if not isinstance(options["corruption"], Noise):
        options["corruption"] = type(options["corruption"])(model.as_inputs(options["corruption"].image))
    trace = causal_trace(model, inputs, **options)
    difference = largest_difference(model, inputs, trace, options) if options.get("window", 1) == 1 else None
    if difference is not None and difference > _TOLERANCE:
        raise RuntimeError(f"{row}: differs from plain hooks by {difference:.1e} of the probability.")
    works = {BASELINE: lambda: hf_model(**prompt), OURS: lambda: causal_trace(model, inputs, **options)}
    token_layers = trace.work * model.cfg.n_layers * inputs.shape[1]
    return {
        "runs": int(trace.runs),
        "cells": int(trace.restored.size),
        "kept_runs": int(trace.n_forward),
        "counted": float(trace.work),
        "counted_with_vision_tower": token_layers / token_layers_of_a_forward(hf_model, inputs.shape[1]),
        "plain_hooks_difference": difference,
        **summarise(alternate(works, repetitions)),
    }


def largest_difference(model: HookedLLaVA, inputs: Any, trace: Any, options: dict[str, Any]) -> float:
    """Some cells against full forward passes with plain hooks, relative to the largest probability."""
    if not isinstance(options["corruption"], Noise):
        return _difference(model, options["corruption"].image, inputs, trace, {})
    noise = gaussian_noise(model, inputs, options["constraint"])

    def corrupt(tensor: Tensor, hook: object) -> Tensor:
        assert noise.operand is not None
        tensor[:, list(options["constraint"])] += noise.operand
        return tensor

    return _difference(model, inputs, inputs, trace, {"hook_embed": corrupt})


def _difference(model: HookedLLaVA, corrupted: Any, clean: Any, trace: Any, corrupt: dict[str, Any]) -> float:
    logits, cache = model.run_with_cache(clean, names_filter=[TRACE_KINDS[k].hook for k in trace.kind.values.tolist()])
    assert logits is not None
    answer = int(logits[0, -1].argmax())
    cells = [(k, i, j) for k in trace.kind.values.tolist() for i in trace.layer.values for j in trace.position.values]
    found, wanted = [], []
    for kind, layer, position in cells[:: max(1, len(cells) // _SAMPLE)]:
        name = model.hooks_table.name(TRACE_KINDS[kind].hook, layer)

        def restore(tensor: Tensor, hook: object, name: str = name, position: int = int(position)) -> Tensor:
            tensor[:, position] = cache[name][:, position]
            return tensor

        out = model.run_with_hooks(corrupted, fwd_hooks=[*corrupt.items(), (name, restore)])
        assert out is not None
        wanted.append(float(out[0, -1].float().softmax(-1)[answer]))
        found.append(float(trace.restored.sel(kind=kind, layer=layer, position=position)))
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True)) / max(wanted)


def table(rows: dict[str, Measured], geometry: str) -> str:
    """The rows with their cost."""
    cells = {
        row: [
            str(of["runs"]),
            f"{of['counted']:.2f}",
            f"{TO_REACH[row]:g}" if row in TO_REACH and geometry == "medium" else "-",
            f"{of[OURS]['ratio']:.2f} ({of[OURS]['median_s']:.3g} s)",
            f"{of['cells'] / of[OURS]['ratio']:.0f}",
        ]
        for row, of in rows.items()
    }
    columns = ["restored runs", "counted", "to reach", "all of it, in HF forwards", "cells for one forward"]
    return markdown(columns, cells, f"causal trace, {geometry}")


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, repetitions=5, geometries=("medium", "tiny-shapes"))
    options = start(parser, argv)
    measured = {}
    for geometry in options.geometry:
        config = hf_config(geometry)
        hf_model = random_hf_model(config)
        model = HookedLLaVA.from_hf(hf_model)
        prompt = random_prompt(config, POSITIONS[geometry])
        rows = {row: measure_row(row, model, hf_model, prompt, options.repetitions) for row in ROWS}
        measured[geometry] = {"sizes": sizes(config, POSITIONS[geometry]), "rows": rows}
        print(f"\n{table(rows, geometry)}")
    print(f"\nwritten to {write('causal_trace', options, geometries=measured)}")


if __name__ == "__main__":
    main()
