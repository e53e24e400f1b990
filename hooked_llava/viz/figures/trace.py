"""Figures of a causal trace: where restoring one output brings the answer back, and what attention heads write there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hooked_llava.datasets.study import as_kinds
from hooked_llava.errors import InputError
from hooked_llava.options.trace_kinds import TRACE_KINDS
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.viz.figures.knockout import kinds_in_order
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
    Plot,
    add_heading,
    label_across,
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
    """Mean indirect effect by layer, a line for each role and a panel for each output; bands where there are intervals.

    `effects` come from `by_role` (one question), `average_traces` (many) or `trace_means` (a table: a row of panels for each
    kind of question of which some were lowered). Roles with hardly any effect are left out. Raises `InputError` for other
    results, and where no question was lowered.

    >>> import numpy as np
    >>> data = xr.Dataset(
    ...     {"indirect_effect": (("kind", "layer", "role"), np.ones((2, 3, 1)))},
    ...     coords={"kind": ["mlp", "attn"], "layer": range(3), "role": ["last"]},
    ... )
    >>> len(role_curves(data).axes)
    2
    """
    effect = _by_output(effects)
    kinds, outputs = kinds_in_order(effect), effect.output.values.tolist()
    means = {role: effect.sel(role=role, statistic="mean") for role in effect.role.values.tolist()}
    curves = apart({role: of_role.values for role, of_role in means.items()})
    height = 2.4 if len(kinds) == 1 else 0.5 + 1.35 * len(kinds)
    with plot(PAGE_WIDTH, height) as figure:
        panels = figure.subplots(len(kinds), len(outputs), sharex=True, sharey=True, squeeze=False)
        for row, kind in zip(panels, kinds, strict=True):
            for axes, output in zip(row, outputs, strict=True):
                _draw_roles(axes, effect.sel(kind=kind, output=output), curves)
            row[0].set_ylabel(kind)
        for axes, output in zip(panels[0], outputs, strict=True):
            axes.set_title(TRACE_KINDS[output].title)
        for axes in panels[-1]:
            axes.set_xlabel("layer")
        legend_below(figure, panels[0, 0])
        _name_effect(figure, panels, f"indirect effect ({_unit(effects, 'indirect_effect')})")
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


def _by_output(effects: xr.Dataset) -> xr.DataArray:
    """The effects as [kind, statistic, output, layer, role], without roles and kinds of question that show nothing."""
    if "output" in getattr(effects, "dims", ()):
        effect = check_dataset(effects, ("indirect_effect",), "role_curves", "trace_means").indirect_effect
        check_axes(
            effect, "output", "layer", "role", optional=("kind", "statistic"), advice=" trace_means returns it so."
        )
    else:
        _check(effects, "role_curves", "by_role(trace) or average_traces", "kind", "layer", "role")
        parts = {"mean": effects.indirect_effect} | {end: effects[end] for end in ("low", "high") if end in effects}
        effect = xr.concat(parts.values(), xr.Variable("statistic", list(parts))).rename(kind="output")
    effect = as_kinds(effect).sortby("layer").transpose("kind", "statistic", "output", "layer", "role")
    sizes = abs(effect.sel(statistic="mean"))
    by_role, by_kind = (sizes.max([d for d in sizes.dims if d != kept]).values for kept in ("role", "kind"))
    if not np.isfinite(by_kind).any():
        raise InputError("No question's answer was lowered, so there is no effect to draw; corrupt harder.")
    seen = {
        "role": np.flatnonzero(by_role >= _FAINT * np.nanmax(by_role)),
        "kind": np.flatnonzero(np.isfinite(by_kind)),
    }
    return effect.isel(seen)


def _draw_roles(axes: Axes, effect: xr.DataArray, curves: Sequence[Curve]) -> None:
    layers, roles = effect.layer.values, effect.role.values.tolist()
    axes.axhline(0, color=RULE, linewidth=0.8)
    for curve in curves:
        one, color = effect.sel(role=curve.first), _ROLE_COLORS.get(curve.first, INK)
        band = (one.sel(statistic="low"), one.sel(statistic="high")) if one.sizes["statistic"] > 1 else None
        draw_curve(axes, layers, one.sel(statistic="mean"), curve, color, roles.index(curve.first), band=band)
    name_layers(axes, layers, [str(layer) for layer in layers], 8)
    value_lines(axes, "y")


def _name_effect(figure: Plot, panels: np.ndarray, label: str) -> None:
    """What the vertical axes show: beside the only row of panels, or beside all of them, which say their kind of question."""
    if len(panels) == 1:
        panels[0, 0].set_ylabel(label)
        return
    label_across(figure, label)


def _unit(effects: xr.Dataset, value: str) -> str:
    return str(effects.attrs.get("units") or ("probability" if value != "restored" else "value"))


def _check(effects: xr.Dataset, figure: str, maker: str, *dims: str) -> None:
    effect = check_dataset(effects, ("indirect_effect",), figure, maker).indirect_effect
    check_axes(effect, *dims, advice=f" {maker} returns it so.")
