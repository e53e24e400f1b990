"""Which layer to edit: a number, or where a causal trace says that the answer is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex, TypeAlias

import xarray as xr

from hooked_llava.analysis.causal_trace import causal_trace, was_lowered
from hooked_llava.checks import whole_number
from hooked_llava.editing.request import EditRequest, Prepared, prepare_request
from hooked_llava.errors import InputError
from hooked_llava.experiments.corruptions import Constraint, Corruption, MeanEmbedding, Noise
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.options.edit_places import AUTO
from hooked_llava.prompt.inputs import Inputs

_LEAST_RESTORED = 0.01
Layer: TypeAlias = SupportsIndex | str | xr.Dataset
"""A layer, "auto", or the dataset that `analysis.causal_trace` returns."""


def choose_place(
    model: HookedLLaVA, requests: Sequence[EditRequest], layer: Layer, position: str, trace: xr.Dataset | None = None
) -> tuple[list[Prepared], int]:
    """The requests, prepared at the position that is edited, and the layer.

    With position "auto" it is the constraint's last token or the last position, whichever MLP's output restores more in the
    trace (in that layer, if it is a number); the last position where a request has no constraint. `trace` is that of the
    first request's constraint, if there is one already. Raises as `choose_layer` and `prepare_request` do.
    """
    number = choose_number(model, layer)
    layer = trace if trace is not None and number is None else layer
    if position != AUTO:
        prepared = [prepare_request(model, request, position) for request in requests]
        return prepared, choose_layer(model, prepared, layer)
    at_last = [prepare_request(model, request, "last") for request in requests]
    if any(request.constraint is None for request in requests):
        return at_last, choose_layer(model, at_last, layer)
    at_constraint = [prepare_request(model, request, "constraint") for request in requests]
    trace = trace if trace is not None else _trace_of(model, layer, at_last[0])
    both = {_position_in(trace, prepared[0]): prepared for prepared in (at_constraint, at_last)}
    traced = [at for at in both if at in trace.position.values] or list(both)
    chosen, where = best_of_trace(trace, traced, number)
    return both[where], chosen


def choose_layer(model: HookedLLaVA, prepared: Sequence[Prepared], layer: Layer) -> int:
    """The layer to edit, checked against the model.

    From a trace it is the layer whose MLP output, restored at the edited position of the first request, has the largest
    indirect effect; "auto" traces its constraint with noise, or with the mean embedding if noise does not lower the answer.
    Raises `InputError` for a layer out of range, a trace of another prompt, one that lacks "mlp" or the position, and one in
    which no layer restores anything there.
    """
    number = choose_number(model, layer)
    if number is not None:
        return number
    trace = _trace_of(model, layer, prepared[0])
    return layer_of_trace(trace, _position_in(trace, prepared[0]))


def choose_number(model: HookedLLaVA, layer: Layer) -> int | None:
    """A layer given as a number, checked and counted from 0; None where a trace chooses; raises `InputError` otherwise."""
    if isinstance(layer, xr.Dataset):
        return None
    if isinstance(layer, str):
        if layer != AUTO:
            raise InputError(f"layer={layer!r}; expected a number, 'auto', or the result of causal_trace.")
        return None
    n_layers, number = model.cfg.n_layers, whole_number(layer, "layer")
    if not -n_layers <= number < n_layers:
        raise InputError(f"layer={layer!r} is out of range; this model has layers 0..{n_layers - 1}.")
    return number % n_layers


def layer_of_trace(trace: xr.Dataset, at: int) -> int:
    """The layer whose MLP restores most at a position."""
    return best_of_trace(trace, [at])[0]


def best_of_trace(trace: xr.Dataset, places: Sequence[int], layer: int | None = None) -> tuple[int, int]:
    """The layer and the position whose MLP restores most, among some positions, and in one layer if that is settled."""
    at = " or ".join(map(str, places))
    if "mlp" not in trace.kind.values or not set(places) <= set(trace.position.values.tolist()):
        raise InputError(
            f"The trace has kinds {trace.kind.values.tolist()} at positions {trace.position.values.tolist()}; choosing a "
            f"layer needs 'mlp' at position {at}. Trace it with these, or give the layer as a number."
        )
    p_clean, p_corrupted = float(trace.p_clean), float(trace.p_corrupted)
    if not was_lowered(trace):
        raise InputError(
            f"The trace's corruption hardly lowers the answer (P {p_clean:.3g} -> {p_corrupted:.3g}), so nothing is known "
            "about where it is stored: it does not depend on the constraint's words. Trace with another corruption, such as "
            "OtherImage(image) or Replace(words), and give that trace as layer=; or choose both yourself: layer=, a "
            "number, and position='constraint' or 'last'."
        )
    effects = trace.indirect_effect.sel(kind="mlp", position=list(places)).transpose("layer", "position")
    effects = effects.values if layer is None else effects.sel(layer=[layer]).values
    if not effects.max() > _LEAST_RESTORED * (p_clean - p_corrupted):
        raise InputError(
            f"The trace finds no layer to edit: of the {p_clean - p_corrupted:.2g} of probability that the corruption took, "
            f"no MLP restores {100 * _LEAST_RESTORED:.0f} % at position {at} (best: {effects.max():.2g}). The answer does "
            "not pass through there: edit at another position, such as 'last', or choose both yourself: layer=, a number, and "
            "position='constraint' or 'last'."
        )
    row, column = divmod(int(effects.argmax()), len(places))
    return int(trace.layer.values[row]) if layer is None else layer, places[column]


def lowering_trace(
    model: HookedLLaVA,
    inputs: Inputs,
    constraint: Constraint,
    corruptions: Sequence[Corruption] = (Noise(), MeanEmbedding()),
    **options: Any,
) -> xr.Dataset:
    """The trace under the first corruption that lowers the answer, or under the last; `options` are those of `causal_trace`."""
    for corruption in corruptions:
        trace = causal_trace(model, inputs, constraint, corruption=corruption, **options)
        if was_lowered(trace):
            break
    return trace


def _trace_of(model: HookedLLaVA, layer: Layer, request: Prepared) -> xr.Dataset:
    """The trace that was given, or one of the request's constraint: with noise, or with the mean if noise does too little."""
    if isinstance(layer, xr.Dataset):
        return layer
    constraint = request.words["constraint"]
    constraint = constraint if isinstance(constraint, str) else constraint[0]
    if constraint is None:
        raise InputError("layer='auto' traces the constraint, and the request has none; give constraint=, or a layer.")
    return lowering_trace(model, request.inputs[0], constraint, kinds=("mlp",))


def _position_in(trace: xr.Dataset, request: Prepared) -> int:
    """Where the edited position of the request's first prompt is in a trace, whose prompt may be padded otherwise."""
    labels, end = request.inputs.token_maps[0].labels, trace.attrs["last"] + 1
    places = [position - end for position in trace.position.values.tolist()]  # from the end, which is the same in both
    if [labels[p] if -len(labels) <= p < 0 else None for p in places] != trace.label.values.tolist():
        raise InputError(
            f"The trace is of another prompt ({trace.attrs['prompt']!r}) than the request's first "
            f"({request.words['prompts'][0]!r}); trace that one, or give the layer as a number."
        )
    return end + request.from_end[0]
