"""Is this a result that the figure draws? If not, which figure does?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import xarray as xr

from hooked_llava.errors import InputError, a_type


class Kind(NamedTuple):
    """How the result of an analysis is shown.

    Attributes:
        figure (str | None): Which function of `hooked_llava.viz` draws it, where there is one of its own.
        title (str | None): What it is called, where the names of its arrays say less.
    """

    figure: str | None = None
    title: str | None = None


KINDS = {
    "ablate_heads": Kind("ablation_curves", "Answer without heads"),
    "activation_patching": Kind("plot_patching"),
    "answer_maps": Kind("answer_strip"),
    "answer_probability": Kind("probability_curves", "Answer probability"),
    "attention_contribution": Kind("contribution_maps", "Attention contributions"),
    "attention_knockout": Kind("knockout_curves", "Attention knockout"),
    "attribution_patching": Kind("plot_patching"),
    "causal_trace": Kind("trace_maps (or role_curves(by_role(trace)))", "Causal trace"),
    "edge_attribution": Kind("edge_map", "Edges"),
    "edit_sweep": Kind(title="The edit at each layer and position"),
    "evaluate_edit": Kind("probe_bars", "The edit, asked"),
    "feature_attribution": Kind("feature_overlays", "Feature attribution"),
    "head_scores": Kind("layer_head_map"),
    "heads_by_attention": Kind("layer_head_map"),
    "image_attention": Kind("patch_overlays"),
    "faithfulness_curve": Kind("faithfulness_curves", "Faithfulness of circuits"),
    "information_storage": Kind("storage_curves", "Information storage"),
    "layer_scores": Kind("contribution_bars"),
    "lens_kl": Kind("lens_curves", "What a lens reads against what the model says"),
    "logit_attribution": Kind("plot_contributions"),
    "logit_lens": Kind("lens_table, answer_curve or patch_words", "Logit lens"),
    "neuron_scores": Kind("neuron_bars", "Neurons"),
    "output_knockout": Kind("knockout_curves", "Output knockout"),
    "patch_importance": Kind("patch_overlay"),
    "patchscope": Kind("lens_table", "Patchscope"),
    "path_patching": Kind("plot_patching"),
    "pope_scores": Kind("pope_bars", "Is the object there?"),
    "pope_study": Kind("pope_bars(pope_scores(study, n_boot=1000))"),
    "probe_linear": Kind("probe_curves", "Linear probe"),
    "sink_positions": Kind("sink_scatter", "Image sinks"),
    "steering_sweep": Kind("dose_response", "Steering"),
}
"""By the name of the analysis, which its result says."""


def kind_of(result: object) -> Kind:
    """What is known of the analysis that a result says it is of.

    >>> kind_of(xr.Dataset(attrs={"analysis": "logit_lens"})).title
    'Logit lens'
    """
    return KINDS.get(str(getattr(result, "attrs", {}).get("analysis")), Kind())


def check_array(result: object, figure: str, maker: str) -> xr.DataArray:
    """The result, if it is one array; raises `InputError` that names what `figure` draws and what draws this instead.

    >>> check_array(xr.DataArray([1.0], dims="layer"), "layer_head_map", "head_scores").dims
    ('layer',)
    """
    if isinstance(result, xr.DataArray):
        return result
    raise InputError(
        f"{figure} draws one array, as {maker} returns it; got {described(result)}.{_instead(result, figure)}"
    )


def check_dataset(result: object, names: Sequence[str], figure: str, maker: str) -> xr.Dataset:
    """The result, if it is a dataset that holds arrays of these names; raises `InputError` as `check_array` does.

    >>> result = xr.Dataset({"effect": ("layer", [1.0])})
    >>> check_dataset(result, ["effect"], "knockout_curves", "attention_knockout") is result
    True
    """
    lacking = [name for name in names if not isinstance(result, xr.Dataset) or name not in result]
    if isinstance(result, xr.Dataset) and not lacking:
        return result
    raise InputError(
        f"{figure} draws {', '.join(map(repr, names))} of the dataset that {maker} returns; got {described(result)}, which "
        f"lacks {', '.join(map(repr, lacking))}.{_instead(result, figure)}"
    )


def check_axes(values: xr.DataArray, *axes: str, optional: Sequence[str] = (), advice: str = "") -> xr.DataArray:
    """The array, if it has these axes in any order, and besides only optional ones; raises `InputError` otherwise.

    >>> check_axes(xr.DataArray([1.0], dims="layer"), "layer").dims
    ('layer',)
    """
    if set(axes) <= set(values.dims) <= {*axes, *optional}:
        return values
    name = repr(str(values.name)) if values.name else "The result"
    also = f", and {' and '.join(optional)} or not" if optional else ""
    given = ", ".join(map(str, values.dims)) or "none"
    raise InputError(f"{name} has the axes {given}; expected {', '.join(axes)}{also}.{advice}")


def check_not_another(result: object, figures: Sequence[str]) -> None:
    """Raises `InputError` for a dataset of an analysis that has a figure of its own, which is none of `figures`.

    >>> check_not_another(xr.Dataset(attrs={"analysis": "attribution_patching"}), ["plot_patching"])
    """
    own = kind_of(result).figure
    if isinstance(result, xr.Dataset) and own and own not in figures:
        raise InputError(f"{figures[0]} does not draw {described(result)}.{_instead(result, figures[0])}")


def described(result: object) -> str:
    """What a result is, in a few words for an error.

    >>> described(xr.DataArray([[1.0]], dims=("layer", "head"), name="metric", attrs={"analysis": "activation_patching"}))
    "the array 'metric' [layer, head] of activation_patching"
    """
    if not isinstance(result, (xr.DataArray, xr.Dataset)):
        return a_type(result)
    made = f" of {result.attrs['analysis']}" if "analysis" in result.attrs else ""
    if isinstance(result, xr.DataArray):
        name = f" {result.name!r}" if result.name else ""
        return f"the array{name} [{', '.join(map(str, result.dims))}]{made}"
    parts = ", ".join(f"{name} [{', '.join(map(str, v.dims))}]" for name, v in result.data_vars.items())
    return f"a dataset{made} with {parts or 'nothing'}"


def _instead(result: object, figure: str) -> str:
    """Which figure to take, where another one draws the result."""
    own = kind_of(result).figure
    return f" Draw it with viz.{own}." if own and figure not in own else ""
