"""How the answers to a table of questions travel: attention knockout and the answer's probability by layer, together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, SupportsFloat

import xarray as xr

from hooked_llava.analysis.knockout import CLOSED_EDGES, OBJECT_EDGES, PAPER_EDGES, attention_knockout
from hooked_llava.analysis.studies.knockout import study_settings
from hooked_llava.analysis.studies.probability import probability_of_rows
from hooked_llava.datasets.rows import StudyRow
from hooked_llava.datasets.study import study
from hooked_llava.experiments.edges import Edges
from hooked_llava.experiments.knockout_runs import Window
from hooked_llava.options.knockout_metrics import MetricName

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs


def flow_study(
    model: HookedLLaVA,
    rows: Sequence[StudyRow],
    edges: Edges = (*PAPER_EDGES, *OBJECT_EDGES, *CLOSED_EDGES),
    window: Window = None,
    *,
    metric: MetricName = "relative_change",
    factor: SupportsFloat = 0.0,
    seed: int = 0,
    **options: Any,
) -> xr.Dataset:
    """Knockout and the answer's probability by layer of every question of a table; `viz.study_page` shows them.

    The probabilities are `answer_probability` [question, norm, resid, form], where resid l is the residual stream that enters
    layer l; the rest is what `knockout_study` gives, which also says what `metric` and `factor` may be and how to ask as the
    paper does. `options` are those of `datasets.study`; raises as these functions.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> row = StudyRow(id="1", question="Who made the star?", answer="Clara", kind="fact")
    >>> sorted(map(str, flow_study(model, [row], ["question->last"]).dims))
    ['edge', 'form', 'layer', 'norm', 'question', 'resid']
    """
    about = study_settings(model, edges, window, metric, seed, factor) | {"analysis": "flow_study"}

    def run(inputs: Inputs, asked: Sequence[StudyRow]) -> xr.Dataset:
        how = {"metric": metric, "total": True, "missing": "skip", "seed": seed, "factor": factor}
        found = attention_knockout(model, inputs, edges, window, **how)
        probability = probability_of_rows(model, inputs, asked)
        found["answer_probability"] = probability.rename(layer="resid").drop_attrs()
        return found.assign_attrs(
            {name: found.attrs[name] + probability.attrs[name] for name in ("n_forward", "seconds")}
        )

    return study(model, rows, run, about=about, **options)
