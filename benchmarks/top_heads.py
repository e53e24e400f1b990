"""Do the heads with the largest scores carry the answer, in words as in images? `python -m benchmarks.top_heads`.

For every embedded checkpoint the comparison that Yu & Ananiadou (arXiv 2411.10950) make, and the check that they leave out.
The same question about a color is asked of an image and of sentences that say what is in it; the ten heads with the
largest mean scores are compared, and then the best heads' z at the answer's position is replaced by its mean over other
questions of the kind: the best 1, 2, 4, 8, 16 by score, by attention to the image (or the sentences), and at random.
Heads are ranked and means are taken on other questions than those that are asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from tqdm import tqdm

from benchmarks._maps import batches
from benchmarks._measure import arguments, markdown, start, write
from hooked_llava.analysis import (
    ablate_heads,
    head_overlap,
    head_scores,
    heads_by_attention,
    nested_sets,
    random_heads,
    top_heads,
)
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.results.map_quality import mean_intervals
from hooked_llava.toy.evaluate import Example, embedded, held_out

KINDS = {"color_tqa": "facts", "color_vqa": "image"}
"""Kinds of question, and the span that tells what is in the image."""
NAMES = {"color_tqa": "in words", "color_vqa": "in an image"}
TOP = 10
SIZES = (1, 2, 4, 8, 16)
SCORE, ATTENTION, RANDOM = "largest scores", "most attention", "random"
_N, _SEEDS, _DRAWN = 100, 5, 1000

Measured = dict[str, Any]
Ranking = list[tuple[int, int]]


def asked(model: HookedLLaVA, examples: Sequence[Example]) -> Inputs:
    """The prompts, with the sentences that stand for the image as the span `facts` where there is none."""
    images = [e.scene.render() for e in examples if e.scene is not None]
    inputs = model.prepare([e.prompt for e in examples], images=images or None, template=None)
    if images:
        return inputs
    return inputs.with_spans(facts=[e.question.text.partition(" What ")[0] for e in examples])


def measure(model: HookedLLaVA, n: int, seeds: int) -> Measured:
    """Overlap and ablation of one checkpoint."""
    scores, ablated = {}, {}
    for kind, span in KINDS.items():
        every = held_out(kind, 2 * n)
        reference, tested = asked(model, every[:n]), every[n:]
        scores[kind] = head_scores(model, reference)
        rankings = {SCORE: top_heads(scores[kind], max(SIZES))}
        rankings[ATTENTION] = top_heads(heads_by_attention(model, reference, span), max(SIZES))
        rankings |= {f"{RANDOM} {seed}": random_heads(model, seed)[: max(SIZES)] for seed in range(seeds)}
        ablated[kind] = ablation(model, tested, reference, rankings, seeds)
    return {"heads": model.cfg.n_layers * model.cfg.n_heads, "overlap": overlap(scores), "ablation": ablated}


def ablation(
    model: HookedLLaVA, tested: Sequence[Example], reference: Inputs, rankings: Mapping[str, Ranking], seeds: int
) -> Measured:
    """For every ranking and size the share of right answers and the mean log P of the right one, with intervals."""
    sets = {name: pairs for how, order in rankings.items() for name, pairs in nested_sets(how, order, SIZES).items()}
    parts = [
        ablate_heads(model, asked(model, batch), sets, [e.question.answer for e in batch], reference=reference)
        for batch in tqdm(list(batches(tested)), desc="ablation", leave=False, delay=5)
    ]
    found = xr.concat([part.drop_attrs() for part in parts], "prompt")
    rows = {how: [f"{how} {size}" for size in SIZES] for how in (SCORE, ATTENTION)}
    measured: Measured = {"none": _means(found.sel(set="none"))}
    for how, names in rows.items():
        measured[how] = {str(size): _means(found.sel(set=name)) for size, name in zip(SIZES, names, strict=True)}
    drawn = {size: [f"{RANDOM} {seed} {size}" for seed in range(seeds)] for size in SIZES}
    measured[RANDOM] = {str(size): _means(found.sel(set=names).mean("set")) for size, names in drawn.items()}
    return measured


def _means(found: xr.Dataset) -> dict[str, list[float]]:
    """Mean over questions and the ends of its interval."""
    return {
        str(name): np.round(mean_intervals(found[name].values.astype(float)), 4).tolist()
        for name in ("correct", "log_probability")
    }


def overlap(scores: Mapping[str, xr.DataArray]) -> Measured:
    """Share of the ten best heads in common, its interval over questions, and what two sets drawn at random share."""
    text, image = scores.values()
    best = {kind: top_heads(of, TOP) for kind, of in scores.items()}
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(_DRAWN):
        pair = [_best(of.values[rng.integers(len(of), size=len(of))].mean(0)) for of in (text, image)]
        drawn.append(len(pair[0] & pair[1]) / TOP)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {
        "share": [head_overlap(*best.values()), float(low), float(high)],
        "chance": TOP / text[0].size,
        "heads": {kind: [f"{layer}.{head}" for layer, head in pairs] for kind, pairs in best.items()},
    }


def _best(mean: np.ndarray) -> set[int]:
    return set(np.argsort(-mean.ravel(), kind="stable")[:TOP].tolist())


def table(checkpoints: Mapping[str, Measured]) -> str:
    """What the best heads share, and what is left of the answers without them: means, lowest and highest checkpoint."""
    shared = {name: _overlap_cells(of["overlap"], of["heads"]) for name, of in checkpoints.items()}
    columns = [f"of the {TOP} best in common", "by chance", *(f"best {NAMES[kind]}" for kind in KINDS)]
    tables = [markdown(columns, shared, "heads for colors in words and in images")]
    for number, corner in (("correct", "right answers without heads"), ("log_probability", "log P without heads")):
        rows = {}
        for kind in KINDS:
            for how in (SCORE, ATTENTION, RANDOM):
                each = [of["ablation"][kind] for of in checkpoints.values()]
                cells = [[found["none"][number][0] for found in each]]
                cells += [[found[how][str(size)][number][0] for found in each] for size in SIZES]
                rows[f"{NAMES[kind]}, {how}"] = [_cell([sum(c) / len(c), min(c), max(c)]) for c in cells]
        tables.append(markdown(["none", *map(str, SIZES)], rows, corner))
    return "\n\n".join(tables)


def _overlap_cells(found: Measured, n_heads: int) -> list[str]:
    best = [" ".join(found["heads"][kind]) for kind in KINDS]
    return [_cell(found["share"]), f"{found['chance']:.2f} ({TOP} of {n_heads})", *best]


def _cell(interval: Sequence[float]) -> str:
    mean, low, high = (f"{round(x, 2) + 0.0:.2f}" for x in interval)  # no minus before a zero
    return f"{mean} ({low} to {high})"


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, repetitions=1)
    parser.add_argument(
        "--n", type=int, default=_N, help=f"questions of each kind to rank by, and to ask (default {_N})"
    )
    parser.add_argument(
        "--checkpoints", type=Path, nargs="+", default=embedded(), help="folders; all embedded by default"
    )
    options = start(parser, argv)
    seeds = _SEEDS
    if options.quick:
        options.n, options.checkpoints, seeds = min(options.n, 4), options.checkpoints[:1], 2
    checkpoints = {}
    for folder in options.checkpoints:
        checkpoints[folder.name] = measure(HookedLLaVA.from_pretrained(folder), options.n, seeds)
    print(f"\n{table(checkpoints)}")
    path = write("top_heads", options, n=options.n, seeds=seeds, sizes=SIZES, checkpoints=checkpoints)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
