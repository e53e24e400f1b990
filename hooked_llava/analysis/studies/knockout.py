"""Attention knockout of every question of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, SupportsFloat

import xarray as xr

from hooked_llava.analysis.knockout import OBJECT_EDGES, PAPER_EDGES, attention_knockout
from hooked_llava.datasets.rows import StudyRow
from hooked_llava.datasets.study import study
from hooked_llava.errors import InputError
from hooked_llava.experiments.edges import Edges, study_edges
from hooked_llava.experiments.knockout_runs import Window, windows_of
from hooked_llava.options.knockout_metrics import OF_THE_ANSWER, MetricName
from hooked_llava.replay.intervention import as_factor

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs


def knockout_study(
    model: HookedLLaVA,
    rows: Sequence[StudyRow],
    edges: Edges = (*PAPER_EDGES, *OBJECT_EDGES),
    window: Window = None,
    *,
    metric: MetricName = "relative_change",
    total: bool = True,
    factor: SupportsFloat = 0.0,
    seed: int = 0,
    **options: Any,
) -> xr.Dataset:
    """`attention_knockout` of every question of a table, side by side on an axis `question`; see `datasets.study`.

    Zhang et al. ask LLaVA-1.5 as its older code did: with template="vicuna-v1" and tail=GQA_TAIL (of
    `hooked_llava.datasets`) their prompts are the same token by token; the default template has no system prompt.

    Args:
        model: the model.
        rows: the questions.
        edges: as for `attention_knockout`, between spans; NaN where a question does not have one (no object in the
            image).
        window: likewise.
        metric: a named one that needs no further word: "relative_change", "probability" or "log_probability", of the
            model's own answer.
        total: also block all layers at once; with window="all" that is done anyway, and not done twice.
        factor: what the attention along an edge is multiplied by, as for `attention_knockout`.
        seed: of the random patches.
        options: of `datasets.study`: `images`, `out`, `only_correct`, `match`, `batch_size`, `template`, `tail`, `coverage`.

    `datasets.by_kind` averages the result, and `flow_summary` turns the curves into numbers. Raises as both functions, for
    misspelt spans and for edges of numbered positions before anything is asked.

    >>> from hooked_llava import HookedLLaVA
    >>> row = StudyRow(id="1", question="Who made the star?", answer="?", kind="fact")
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> knockout_study(model, [row], ["question->last"], only_correct=False).effect.dims
    ('question', 'edge', 'layer')
    """
    about = study_settings(model, edges, window, metric, seed, factor)
    about |= {"total": total, "analysis": "attention_knockout"}

    def run(inputs: Inputs, _: Sequence[StudyRow]) -> xr.Dataset:
        how = {"metric": metric, "total": total and window != "all", "missing": "skip", "seed": seed, "factor": factor}
        return attention_knockout(model, inputs, edges, window, **how)

    return study(model, rows, run, about=about, **options)


def study_settings(
    model: HookedLLaVA, edges: Edges, window: Window, metric: MetricName, seed: int, factor: SupportsFloat
) -> dict[str, Any]:
    """How a study blocks and measures, in plain values and checked before it begins; raises as `knockout_study`."""
    named = study_edges(edges)
    windows_of(window, None, model.cfg.n_layers)
    if metric not in OF_THE_ANSWER:
        raise InputError(
            f"metric={metric!r}; expected {', '.join(OF_THE_ANSWER)}, which need no word but the model's answer."
        )
    ends = [[edge.name, edge.source, edge.target] for edge in named]
    weight = {"factor": as_factor(factor)} if factor else {}  # without it, edges are blocked
    return {"edges": ends, "window": window, "metric": metric, "seed": seed, **weight}
