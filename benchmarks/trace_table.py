"""What `hooked-llava trace --dataset tiny-shapes` finds, by kind of question: `python -m benchmarks.trace_table`.

Every kind of question of the embedded world's own table, with another shape's name in the constraint's place. `--keep FILE` goes
on from the study's file.
"""

from __future__ import annotations

import numpy as np

from benchmarks._measure import arguments, markdown, start, write
from benchmarks.causal_trace_study import BEST, CORRUPTIONS, Measured, best_cell, cell_words, lowered_words
from hooked_llava.analysis import best_effects, trace_means, trace_study
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.toy.constraint_tables import constraint_rows


def by_kind(n: int, keep: str | None) -> Measured:
    """For each kind how many answers are lowered, and where each output restores most."""
    model, corrupt = HookedLLaVA.from_pretrained("tiny-shapes"), CORRUPTIONS["another shape's name"]
    means = trace_means(trace_study(model, constraint_rows(n), corruption=corrupt, out=keep))
    best = best_effects(means)
    return {
        kind: {
            "traced": int(means.n.sel(kind=kind)),
            "left_out": int((means.n - means.n_lowered).sel(kind=kind)),
            "lowered": np.round(means.lowered.sel(kind=kind).values, 4).tolist(),
            "best": {output: best_cell(best.sel(kind=kind, output=output)) for output in best.output.values.tolist()},
        }
        for kind in means.kind.values.tolist()
    }


def table(kinds: Measured) -> str:
    """The largest mean effects by kind of question."""
    cells = {kind: [lowered_words(of), *(cell_words(one) for one in of["best"].values())] for kind, of in kinds.items()}
    return markdown(["lowered", *BEST], cells, "kind")


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--n", type=int, default=50, help="questions of each kind (default 50)")
    parser.add_argument("--keep", metavar="FILE", help="keep the study here, and go on from it")
    options = start(parser, argv)
    kinds = by_kind(1 if options.quick else options.n, options.keep)
    print(f"\n{table(kinds)}")
    print(f"\nwritten to {write('trace_table', options, n=options.n, kinds=kinds)}")


if __name__ == "__main__":
    main()
