"""Figures of a causal trace: where restoring one output brings the answer back, and what attention heads write there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hooked_llava.options.trace_kinds import TRACE_KINDS
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.viz.figures.positions import layer_position_maps
from hooked_llava.viz.kinds import check_axes, check_dataset
from hooked_llava.viz.lines import Curve, apart, draw_curve, name_layers
from hooked_llava.viz.style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PAGE_WIDTH,
    PURPLE,
    RULE,
    SKY,
    add_heading,
    legend_below,
    plot,
    value_lines,
)
from hooked_llava.viz.titles import add_note, shown_title

_ROLE_COLORS = {
    "constraint last": ORANGE,
    "constraint middle": "#e0a27e",
    "constraint first": "#b98a5c",
    "rest of question": BLUE,
    "rest": GREEN,
    "last": PURPLE,
    "before": MUTED,
    "image": SKY,
}
_FAINT = 0.01  # of the largest effect


def trace_maps(
    trace: xr.Dataset, inputs: Inputs | None = None, *, value: str = "indirect_effect", note: bool = True
) -> Figure:
    """A cell for every layer and token, a panel for each kind, on one scale; the constraint's tokens are orange.

    With `inputs` the patches of each image stand side by side, named together. A `note` below says what was traced.
    Raises `InputError` for what is no causal trace.

    >>> import numpy as np
    >>> data = xr.Dataset(
    ...     {"indirect_effect": (("kind", "layer", "position"), np.ones((1, 2, 1)))},
    ...     coords={"kind": ["mlp"], "layer": [0, 1], "position": [5], "role": ("position", ["constraint last"])},
    ... )
    >>> trace_maps(data).axes[0].get_title(loc="left")
    'MLP output restored'
    """
    _check(trace, "trace_maps", "causal_trace", "kind", "layer", "position")
    effect = trace[value].assign_attrs(units=_unit(trace, value))
    panels = {
        f"{TRACE_KINDS[kind].title} restored": effect.sel(kind=kind, drop=True) for kind in trace.kind.values.tolist()
    }
    asked = [
        int(p)
        for p, role in zip(trace.position.values, trace.role.values, strict=True)
        if role.startswith("constraint")
    ]
    return layer_position_maps(panels, inputs, marked=asked, about=trace.attrs if note else {})


def role_curves(effects: xr.Dataset, *, title: str | None = None) -> Figure:
    """Mean indirect effect by layer, a line for each role and a panel for each kind; bands where there are intervals.

    `effects` come from `by_role` (one question) or `average_traces` (many). Roles with hardly any effect are left out.
    Raises `InputError` for other results.

    >>> import numpy as np
    >>> data = xr.Dataset(
    ...     {"indirect_effect": (("kind", "layer", "role"), np.ones((2, 3, 1)))},
    ...     coords={"kind": ["mlp", "attn"], "layer": range(3), "role": ["last"]},
    ... )
    >>> len(role_curves(data).axes)
    2
    """
    _check(effects, "role_curves", "by_role(trace) or average_traces", "kind", "layer", "role")
    kinds = effects.kind.values.tolist()
    sizes = abs(effects.indirect_effect).max(("kind", "layer"))
    effects = effects.isel(role=np.flatnonzero((sizes >= _FAINT * sizes.max()).values))
    effects = effects.sortby("layer")
    curves = apart({str(role): effects.indirect_effect.sel(role=role).values for role in effects.role.values})
    with plot(PAGE_WIDTH, 2.4) as figure:
        panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        for axes, kind in zip(panels, kinds, strict=True):
            _draw_roles(axes, effects.sel(kind=kind), curves)
            axes.set_title(TRACE_KINDS[kind].title)
        panels[0].set_ylabel(f"indirect effect ({_unit(effects, 'indirect_effect')})")
        legend_below(figure, panels[0])
        add_heading(figure, shown_title(effects, title))
        add_note(figure, effects.attrs, title)
    return figure


def contribution_maps(contribution: xr.Dataset) -> Figure:
    """Head outputs from the constraint's tokens to the last position, by layer; heads are added up where they are apart.

    Raises `InputError` for what is no attention contribution.
    """
    check_dataset(contribution, ("constraint_to_last",), "contribution_maps", "attention_contribution")
    values = contribution.constraint_to_last
    values = values.sum("head", keep_attrs=True) if "head" in values.dims else values
    return layer_position_maps({"From the constraint to the last position": values.rename(source="position")})


def _draw_roles(axes: Axes, effects: xr.Dataset, curves: Sequence[Curve]) -> None:
    layers, roles = effects.layer.values, effects.role.values.tolist()
    axes.axhline(0, color=RULE, linewidth=0.8)
    for curve in curves:
        one, color = effects.sel(role=curve.first), _ROLE_COLORS.get(curve.first, INK)
        band = (one.low, one.high) if "low" in one else None
        draw_curve(axes, layers, one.indirect_effect, curve, color, roles.index(curve.first), band=band)
    name_layers(axes, layers, [str(layer) for layer in layers], 8)
    axes.set_xlabel("layer")
    value_lines(axes, "y")


def _unit(effects: xr.Dataset, value: str) -> str:
    return str(effects.attrs.get("units") or ("probability" if value != "restored" else "value"))


def _check(effects: xr.Dataset, figure: str, maker: str, *dims: str) -> None:
    effect = check_dataset(effects, ("indirect_effect",), figure, maker).indirect_effect
    check_axes(effect, *dims, advice=f" {maker} returns it so.")
