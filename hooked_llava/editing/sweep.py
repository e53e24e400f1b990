"""The same edit at every layer and position: where does it work, and did the trace say so?"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import xarray as xr

from hooked_llava.editing.evaluate import Probe, evaluate_edit, summary
from hooked_llava.editing.multedit import multedit
from hooked_llava.editing.prompts import KeptPrompts, keep_prompts
from hooked_llava.editing.request import EditRequest, Prepared, prepare_request
from hooked_llava.editing.values import TargetNotReached
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.results.provenance import Provenance

EDITED = "the edited question"
"""Name of the probe that asks what the edit was made for."""


def edit_sweep(
    model: HookedLLaVA,
    request: EditRequest,
    probes: Sequence[Probe] = (),
    *,
    positions: Sequence[str] = ("constraint", "last"),
    trace: xr.Dataset | None = None,
    **options: Any,
) -> xr.Dataset:
    """One `multedit` at each layer and position, measured: where does the edit work, and did the trace say so?

    Args:
        model: the model; its weights are afterwards as they were.
        request: what to change.
        probes: what to ask besides the edited question itself, as for `evaluate_edit`.
        positions: places to edit, as for `multedit`.
        trace: what `causal_trace` gives for the request's first prompt, with the MLPs at these positions.
        options: further ones of `multedit`.

    Returns a dataset over `position` and `layer`: `probability` and `efficacy` (P(target) and whether it is the answer to the
    edited question), as far as probed `generalisation`, `specificity` (1 less the drop in the share of
    right answers) and `locality_kl`, and with a trace the `indirect_effect` of the layer's MLP output. NaN where the
    position does not reach the whole answer from the layer. Raises as `multedit` and `evaluate_edit` do.

    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> edit_sweep(model, EditRequest("Who made the star?", "Boris"), positions=["last"]).efficacy.sel(layer=3).values
    array([1.])
    """
    n_layers = model.cfg.n_layers
    made = {position: prepare_request(model, request, position) for position in positions}
    if not made:
        raise InputError("There are no positions to edit at; give at least one, such as 'last'.")
    first = next(iter(made.values()))
    about = Provenance.of("edit_sweep", model, first.inputs, target=first.words["target"], **options)
    every = [own_probe(first.inputs, first), *probes]
    every = [_kept(model, probe, range(n_layers)) for probe in every]
    rows: list[dict[str, Any]] = []
    for position, one in made.items():
        # In the last layer an edit reaches the answer's first token only, and only from the last position.
        reaches = one.n_target == 1 and all(place == -1 for place in one.from_end)
        for layer in range(n_layers if reaches else n_layers - 1):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", TargetNotReached)  # that is what is measured here
                edit = multedit(model, request, layer=layer, position=position, **options)
            found = evaluate_edit(model, edit, every)
            place = {"position": position, "layer": layer}
            rows.append({**place, "probability": float(found.probability[0]), **summary(found)})
            if trace is not None:
                where = one.positions[0] - one.inputs.token_maps[0].real.start
                rows[-1]["indirect_effect"] = _effect(trace, layer, where)
    table = pd.DataFrame(rows).set_index(["position", "layer"]).to_xarray()
    if "specificity_drop" in table:
        table = table.assign(specificity=1 - table.specificity_drop / 100).drop_vars("specificity_drop")
    return table.reindex(position=list(made), layer=range(n_layers)).assign_attrs(about.attrs())


def _kept(model: HookedLLaVA, probe: Probe, layers: Sequence[int]) -> Probe:
    """Its prompts run up to every layer, since they are asked under many edits."""
    if isinstance(probe.prompts, KeptPrompts):
        return probe
    return replace(probe, prompts=keep_prompts(model, probe.prompts, layers))


def _effect(trace: xr.Dataset, layer: int, position: int) -> float:
    if "mlp" not in trace.kind.values or position not in trace.position.values:
        raise InputError(
            f"The trace has kinds {trace.kind.values.tolist()} at positions {trace.position.values.tolist()}; expected "
            f"'mlp' at position {position}. Trace it with these."
        )
    return float(trace.indirect_effect.sel(kind="mlp", layer=layer, position=position))


def own_probe(prompt: Inputs, made: Prepared) -> Probe:
    """The question that an edit was made for, which is to get the target."""
    return Probe(EDITED, "efficacy", prompt, list(made.targets))
