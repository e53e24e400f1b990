"""How answers travel through the embedded models: `python -m benchmarks.information_flow`.

For every checkpoint: held-out questions of the six kinds of GQA that Zhang et al. (arXiv 2411.18620) use, asked of the
embedded world; those answered correctly are measured. Attention knockout of every edge in windows of layers and in all
layers, with as many random patches as control for the object's, and the answer's probability by layer; means and 95%
bootstrap intervals by kind. With --keep the result of every question goes to a file as well, from which an interrupted
run goes on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from benchmarks._measure import arguments, markdown, start, write
from hooked_llava.analysis import flow_study, flow_summary
from hooked_llava.analysis.knockout import CLOSED_EDGES, OBJECT_EDGES, PAPER_EDGES
from hooked_llava.datasets import GQA_KINDS, by_kind
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.toy.evaluate import embedded
from hooked_llava.toy.gqa_tables import gqa_rows

EDGES = (*PAPER_EDGES, *OBJECT_EDGES, *CLOSED_EDGES, "rest->last", "image->question|last")
"""The paper's edges, the control, the ways that the released grouping leaves open, and the grouping itself."""
WINDOW = 3
_N, _FEW = 200, 4

Measured = dict[str, Any]


def measure(name: str, n: int, keep: Path | None) -> tuple[Measured, xr.Dataset]:
    """One checkpoint: averages by kind as plain numbers, and as a dataset."""
    begin = time.perf_counter()
    out = None if keep is None else keep / f"information_flow.{name}.safetensors"
    model = HookedLLaVA.from_pretrained(f"tiny-shapes-{name}")
    found = flow_study(model, gqa_rows(n), EDGES, WINDOW, out=out, progress=True)
    means = by_kind(found)
    summary = flow_summary(means)
    report: Measured = {
        "asked": found.attrs["asked"],
        "correct": found.attrs["correct"],
        "window": WINDOW,
        "kinds": means.kind.values.tolist(),
        "edges": means.edge.values.tolist(),
        "statistics": means.statistic.values.tolist(),
        "seconds": round(time.perf_counter() - begin, 1),
    }
    report |= {str(name): rounded(means[name]) for name in means.data_vars if name != "n"}
    report["summary"] = {str(name): rounded(values) for name, values in summary.items()}
    return report, means


def rounded(values: xr.DataArray) -> list[Any]:
    """As nested lists; None for what is not there."""
    table = np.round(values.values, 4)
    return np.where(np.isfinite(table), table, np.array(None)).tolist()


def totals(checkpoints: Mapping[str, Measured]) -> str:
    """Percent of the answer's probability that is lost with an edge blocked in every layer, by kind of question."""
    first = next(iter(checkpoints.values()))
    rows = {edge: [_cell(checkpoints, edge, kind) for kind in first["kinds"]] for edge in first["edges"]}
    return markdown(first["kinds"], {f"`{edge}`": cells for edge, cells in rows.items()}, "blocked in every layer")


def _cell(checkpoints: Mapping[str, Measured], edge: str, kind: str) -> str:
    """Mean over the checkpoints, and the lowest and highest of them."""
    values = []
    for measured in checkpoints.values():
        value = measured["total_effect"][measured["kinds"].index(kind)][0][measured["edges"].index(edge)]
        if value is not None:
            values.append(value)
    if not values:
        return "-"
    mean, ends = sum(values) / len(values), (min(values), max(values))
    whole = [round(value) for value in (mean, *ends)]  # whole numbers have no -0
    return f"{whole[0]}" + ("" if whole[1] == whole[2] else f" ({whole[1]} to {whole[2]})")


def stages(checkpoints: Mapping[str, Measured]) -> str:
    """For each checkpoint the layer in which each edge matters most, and how deep the curve of windows is there."""
    rows = {}
    for edge in next(iter(checkpoints.values()))["edges"]:
        cells = []
        for measured in checkpoints.values():
            at = measured["edges"].index(edge)
            depth, layer, width = (measured["summary"][s][-1][at] for s in ("depth", "peak_layer", "half_width"))
            shown = depth is not None and depth <= -1
            cells.append(f"{depth:.0f} at layer {layer:.0f}, {width:.0f} wide" if shown else "none")
        rows[f"`{edge}`"] = cells
    return markdown(list(checkpoints), rows, f"windows of {WINDOW} layers, all kinds")


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--n", type=int, default=_N, help=f"questions of each kind (default {_N})")
    parser.add_argument("--keep", type=Path, help="folder for the result of every question")
    options = start(parser, argv)
    names = [folder.name for folder in embedded()]
    if options.quick:
        options.n, names = _FEW, names[:1]
    checkpoints = {}
    for name in names:
        checkpoints[name], _ = measure(name, options.n, options.keep)
        print(f"{name}: {checkpoints[name]['seconds']} s")
    print(f"\n{totals(checkpoints)}\n\n{stages(checkpoints)}")
    path = write("information_flow", options, n=options.n, question_kinds=GQA_KINDS, checkpoints=checkpoints)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
