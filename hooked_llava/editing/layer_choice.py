"""Which layer to edit: a number, or where a causal trace says that the answer is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from hooked_llava.editing.request import Prepared
from hooked_llava.errors import InputError

if TYPE_CHECKING:
    from hooked_llava.model import HookedLLaVA

_LEAST_LOWERED = 0.1
_LEAST_RESTORED = 0.01
Layer: TypeAlias = Any
"""A layer, "auto", or the dataset that `analysis.causal_trace` returns."""


def choose_layer(model: HookedLLaVA, prepared: Sequence[Prepared], layer: Layer) -> int:
    """The layer to edit, checked against the model.

    From a trace it is the layer whose MLP output, restored at the edited position of the first request, has the largest
    indirect effect. Raises `InputError` for a layer out of range, a trace that lacks "mlp" or the position, and one in which
    no layer restores anything there.
    """
    if isinstance(layer, str):
        if layer != "auto":
            raise InputError(f"layer={layer!r}; expected a number, 'auto', or the result of causal_trace.")
        layer = _trace(model, prepared[0])
    if hasattr(layer, "data_vars"):
        request = prepared[0]
        at = request.from_end[0] + request.inputs.shape[1] - request.inputs.token_maps[0].real.start
        layer = layer_of_trace(layer, at)
    n_layers = model.cfg.n_layers
    if isinstance(layer, bool) or not isinstance(layer, int) or not -n_layers <= layer < n_layers:
        raise InputError(f"layer={layer!r} is out of range; this model has layers 0..{n_layers - 1}.")
    return layer % n_layers


def layer_of_trace(trace: Any, at: int) -> int:
    """The layer whose MLP restores most at a position."""
    if "mlp" not in trace.kind.values or at not in trace.position.values:
        raise InputError(
            f"The trace has kinds {trace.kind.values.tolist()} at positions {trace.position.values.tolist()}; choosing a "
            f"layer needs 'mlp' at position {at}. Trace it with these, or give the layer as a number."
        )
    p_clean, p_corrupted = float(trace.p_clean), float(trace.p_corrupted)
    if float(trace.lowered_by) < _LEAST_LOWERED:
        raise InputError(
            f"The trace's corruption hardly lowers the answer (P {p_clean:.3g} -> {p_corrupted:.3g}), so nothing is known "
            "about where it is stored: it does not hang on the constraint's words. Trace with another corruption, such as "
            "OtherImage(picture), and give that as layer=; or give a number."
        )
    effects = trace.indirect_effect.sel(kind="mlp", position=at).values
    if not effects.max() > _LEAST_RESTORED * (p_clean - p_corrupted):
        raise InputError(
            f"The trace finds no layer to edit: of the {p_clean - p_corrupted:.2g} of probability that the corruption took, "
            f"no MLP restores {100 * _LEAST_RESTORED:.0f} % at position {at} (best: {effects.max():.2g}). The answer does "
            "not pass through there: edit at another position, such as 'last', or give the layer as a number."
        )
    return int(trace.layer.values[int(effects.argmax())])


def _trace(model: HookedLLaVA, request: Prepared) -> Any:
    from hooked_llava.analysis import causal_trace

    constraint = request.words["constraint"]
    constraint = constraint if isinstance(constraint, str) else constraint[0]
    if constraint is None:
        raise InputError("layer='auto' traces the constraint, and the request has none; give constraint=, or a layer.")
    return causal_trace(model, request.inputs[0], constraint, kinds=("mlp",))
