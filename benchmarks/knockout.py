"""Six knockout edges in every window of layers, beside the released procedure: `python -m benchmarks.knockout`.

The procedure that Zhang et al. (arXiv 2411.18620) released runs the whole prompt once unblocked and once for each center
of the window, for each edge anew: 54 forward passes for six edges and 8 layers, each under masks added to the scores.
One forward is Hugging Face's with sdpa attention on the same prompt, all logits. One pass of the released procedure is
timed in turn with it and multiplied by their number; all of them are run once, and their percentages compared with ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks._measure import BASELINE, OURS, alternate, arguments, markdown, start, summarise, write
from benchmarks._models import POSITIONS, hf_config, random_hf_model, random_prompt, sizes, with_attention
from hooked_llava.analysis import attention_knockout
from hooked_llava.experiments.windows import centered_window, widest_window
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs

EDGES = (
    "question->last",
    "image->last",
    "last->last",
    "image->question",
    "object->question",
    "other->question",
)
RELEASED = "one pass of the released procedure"
QUESTION, TAIL = 0.3, 0.37  # of the text: 13 tokens of the question and 16 of instruction and "ASSISTANT:", of 43
WINDOWS = (9, 3)
_TOLERANCE = 0.05  # in percent of the answer's probability

Measured = dict[str, Any]
Ends = tuple[list[int], list[int]]


@contextmanager
def masked(hf_model: Any, blocked: Sequence[int], ends: Ends, n: int) -> Iterator[None]:
    """Masks added to the scores as the released code adds them: built anew, the lowest number where an edge is blocked."""
    lowest = torch.finfo(hf_model.dtype).min
    causal = torch.full((1, 1, n, n), lowest, dtype=hf_model.dtype).triu(1)
    closed = causal.clone()
    source, target = ends
    closed[0, 0, torch.tensor(target)[:, None], torch.tensor(source)] = lowest

    def put(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": closed if module.layer_idx in blocked else causal}

    layers = hf_model.model.language_model.layers
    handles = [layer.self_attn.register_forward_pre_hook(put, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def released_pass(hf_model: Any, prompt: dict[str, Tensor], blocked: Sequence[int], ends: Ends) -> Tensor:
    """Probabilities [d_vocab] of the next token."""
    with masked(hf_model, blocked, ends, prompt["input_ids"].shape[1]):
        return hf_model(**prompt, logits_to_keep=1).logits[0, -1].softmax(-1)


def released_percentages(
    hf_model: Any, prompt: dict[str, Tensor], edges: dict[str, Ends], width: int
) -> list[list[float]]:
    """100 (p2 - p1) / p1 of the first token, [edge][center], by whole passes."""
    n_layers = hf_model.config.text_config.num_hidden_layers
    table = []
    for ends in edges.values():
        before = released_pass(hf_model, prompt, (), ends)
        token = int(before.argmax())
        after = [
            released_pass(hf_model, prompt, centered_window(c, width, n_layers), ends)[token] for c in range(n_layers)
        ]
        table.append([float(100 * (p - before[token]) / before[token]) for p in after])
    return table


def with_asked_spans(inputs: Inputs) -> Inputs:
    """A question in the text after the image, and an object in the image."""
    image, n = inputs.token_map["image"], inputs.shape[1]
    n_text = n - len(image) - 1
    end = n - round(TAIL * n_text)
    first = image[0] + len(image) // 3
    thing = range(first, first + max(1, len(image) // 10))
    return inputs.with_spans(question=range(end - round(QUESTION * n_text), end), object=thing)


def measure(geometry: str, width: int, repetitions: int) -> Measured:
    """Seconds and ratios to a forward, counted work, and the largest difference of percentages."""
    config = hf_config(geometry)
    n, n_layers = POSITIONS[geometry], config.get_text_config().num_hidden_layers
    hf_model = random_hf_model(config)
    eager = with_attention(hf_model, "eager")
    model = HookedLLaVA.from_hf(hf_model)
    prompt = random_prompt(config, n)
    inputs = with_asked_spans(model.as_inputs(prompt))
    spans = {name: list(inputs.token_map[name]) for name in ("question", "image", "last", "object")}
    spans["other"] = [p for p in spans["image"] if p not in spans["object"]]
    edges = {edge: (spans[edge.split("->")[0]], spans[edge.split("->")[1]]) for edge in EDGES}
    result = attention_knockout(model, inputs, EDGES, width)
    theirs = released_percentages(eager, prompt, edges, width)
    difference = float(abs(result.effect.values - theirs).max())
    if difference > _TOLERANCE:
        raise RuntimeError(f"Percentages differ from the released procedure's by {difference:.2g} points.")
    works = {
        BASELINE: lambda: hf_model(**prompt),
        RELEASED: lambda: released_pass(eager, prompt, range(n_layers), edges[EDGES[3]]),
        OURS: lambda: attention_knockout(model, inputs, EDGES, width),
    }
    passes = len(EDGES) * (1 + n_layers)
    return {
        **summarise(alternate(works, repetitions)),
        "window": width,
        "passes": passes,
        "runs": result.attrs["runs"],
        "counted_forwards": result.attrs["n_forward"] + result.attrs["work"],
        "percentage_points_difference": difference,
        "largest_effect": float(abs(result.effect.values).max()),
    }


def cells(measured: Measured) -> list[str]:
    """One row of the table."""
    one, ours = measured[RELEASED]["ratio"], measured[OURS]["ratio"]
    return [
        f"{measured['passes']}",
        f"{one * measured['passes']:.1f}",
        f"{measured['counted_forwards']:.2f}",
        f"{ours:.2f}",
        f"{one * measured['passes'] / ours:.0f}",
        f"{measured['percentage_points_difference']:.1e}",
    ]


def table(rows: dict[str, Measured], geometry: str) -> str:
    """Cost in forward passes, the base run included."""
    columns = (
        "released: passes",
        "released: time",
        "ours: counted",
        "ours: time",
        "times faster",
        "difference (points)",
    )
    return markdown(
        columns, {name: cells(row) for name, row in rows.items()}, f"six edges, every window, in forwards, {geometry}"
    )


def main(argv: list[str] | None = None) -> None:
    options = start(arguments(__doc__, repetitions=7), argv)
    measured = {}
    for geometry in options.geometry:
        size = sizes(hf_config(geometry), POSITIONS[geometry])
        widths = [width for width in WINDOWS if width <= widest_window(size["layers"])]
        rows = {f"window {width}": measure(geometry, width, options.repetitions) for width in widths}
        measured[geometry] = {"sizes": size, "rows": rows}
        print(f"\n{table(rows, geometry)}")
    print(f"\nwritten to {write('knockout', options, geometries=measured)}")


if __name__ == "__main__":
    main()
