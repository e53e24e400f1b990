"""Figures of an edit: what the model says to the edited question, what to others, and at which layers an edit works."""

from __future__ import annotations

from itertools import cycle

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hooked_llava.editing.roles import PROBE_ROLES
from hooked_llava.errors import InputError
from hooked_llava.viz.kinds import check_array, check_axes, check_dataset
from hooked_llava.viz.style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PAGE_WIDTH,
    PURPLE,
    add_heading,
    format_small,
    legend_below,
    name_bars,
    plot,
    require_dims,
    tick_every,
    token_label,
    value_lines,
)

_BEFORE, _AFTER = "#b8c1cb", ORANGE


def role_colors() -> dict[str, str]:
    """A color for each role of a probe: warm where answers are to change, cold where they are to stay."""
    warm, cold = cycle((ORANGE, "#b98a5c")), cycle((BLUE, GREEN))
    return {name: next(warm if role.to_change else cold) for name, role in PROBE_ROLES.items()}


def answer_shift(answers: xr.DataArray, *, title: str | None = None) -> Figure:
    """Probabilities of an answer's first token, [state, token], two bars for each token: before the edit and after it.

    Raises `InputError` for other axes, and for other states than "before" and "after".

    >>> names = {"state": ["before", "after"], "token": ["Clara", "Boris"]}
    >>> figure = answer_shift(xr.DataArray([[0.9, 0.1], [0.0, 1.0]], dims=("state", "token"), coords=names))
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['Clara', 'Boris']
    """
    answers = require_dims(check_array(answers, "answer_shift", "edit_page(...).results['answers']"), "state", "token")
    if set(answers["state"].values.tolist()) != {"before", "after"}:
        raise InputError(
            f"The states are {answers['state'].values.tolist()}; expected before and after, as edit_page returns."
        )
    tokens = [str(token) for token in answers["token"].values]
    at = np.arange(len(tokens))
    with plot(PAGE_WIDTH, 0.9 + 0.42 * len(tokens)) as figure:
        axes = figure.add_subplot()
        for state, side, color in (("before", -0.2, _BEFORE), ("after", 0.2, _AFTER)):
            values = answers.sel(state=state).values
            axes.barh(at + side, values, 0.38, color=color, label=state)
            for y, value in zip(at + side, values, strict=True):
                axes.text(value + 0.012, y, f"{value:.3f}", va="center", fontsize=7.5, color=MUTED)
        name_bars(axes, [token_label(token) for token in tokens])
        axes.set_xlim(0, 1.1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.set_xlabel("probability of the answer's first token")
        value_lines(axes, "x")
        legend_below(figure, axes, handlelength=1.2)
        if title:
            axes.set_title(title)
    return figure


def probe_bars(probes: xr.Dataset, *, title: str | None = None) -> Figure:
    """How many prompts of each probe are answered as they should be: a bar after the edit, a line where it was before.

    `probes` come from `evaluate_edit`; bars are colored by role, with the mean KL(before || after) beside each, in
    nats. Raises `InputError` for other results.

    >>> values = {name: ("probe", [0.5]) for name in ("accuracy_before", "accuracy", "kl", "n")}
    >>> data = xr.Dataset(values, coords={"probe": ["other images"], "role": ("probe", ["generalisation"])})
    >>> [float(bar.get_width()) for bar in probe_bars(data).axes[0].patches]
    [0.5]
    """
    check_dataset(probes, ("accuracy_before", "accuracy", "kl", "n", "role"), "probe_bars", "evaluate_edit")
    at = np.arange(probes.sizes["probe"])
    colors, roles = role_colors(), [str(role) for role in probes.role.values]
    with plot(PAGE_WIDTH, 0.8 + 0.34 * len(at)) as figure:
        axes = figure.add_subplot()
        axes.barh(at, probes.accuracy.values, 0.62, color=[colors[role] for role in roles])
        before = probes.accuracy_before.values
        line = axes.vlines(before, at - 0.42, at + 0.42, color=INK, linewidth=1.6, label="before the edit")
        for y, (kl, n) in enumerate(zip(probes.kl.values, probes.n.values, strict=True)):
            axes.text(1.03, y, f"n {int(n)}, KL {format_small(float(kl))}", va="center", fontsize=7.5, color=MUTED)
        name_bars(axes, [str(name) for name in probes.probe.values])
        axes.set_xlim(-0.015, 1.26)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
        axes.set_xlabel("answered as they should be")
        value_lines(axes, "x")
        keys = [Patch(color=colors[role], label=f"{role}: {PROBE_ROLES[role].wanted}") for role in dict.fromkeys(roles)]
        legend_below(figure, [line, *keys], handlelength=1.2)
        if title:
            axes.set_title(title)
    return figure


def edit_by_layer(sweep: xr.Dataset, *, title: str | None = None) -> Figure:
    """Where an edit works: its measures by the layer that is edited, a panel for each position.

    `sweep` comes from `edit_sweep`, or is the mean of several. Where it has the trace's `indirect_effect`, that is drawn
    dashed, on the same axis: the share of the answer's probability that the layer's MLP output gives back. Raises
    `InputError` for other results.

    >>> values = {"efficacy": (("position", "layer"), [[0.0, 1.0]])}
    >>> figure = edit_by_layer(xr.Dataset(values, coords={"position": ["last"], "layer": [0, 1]}))
    >>> figure.axes[0].lines[0].get_ydata().tolist()
    [0.0, 1.0]
    """
    check_dataset(sweep, ("efficacy",), "edit_by_layer", "edit_sweep")
    colors, shown = role_colors(), [name for name in PROBE_ROLES if name in sweep]
    for name in shown:
        check_axes(sweep[name], "position", "layer")
    positions, layers = sweep["position"].values.tolist(), sweep["layer"].values
    with plot(PAGE_WIDTH, 2.5) as figure:
        panels = figure.subplots(1, len(positions), sharey=True, squeeze=False)[0]
        for axes, position in zip(panels, positions, strict=True):
            one = sweep.sel(position=position)
            for name in shown:
                look = {"color": colors[name], "linewidth": 1.6, "marker": "."}
                axes.plot(layers, one[name].values, label=PROBE_ROLES[name].asks, **look)
            if "indirect_effect" in sweep:
                effect = one.indirect_effect.values
                axes.plot(layers, effect, color=PURPLE, linewidth=1.3, linestyle=(0, (4, 1.6)), label="trace's effect")
            axes.set_title(f"position: {position}")
            axes.set_xticks(layers[:: tick_every(len(layers), 8)])
            axes.set_xlabel("edited layer")
            value_lines(axes, "y")
        panels[0].set_ylim(min(-0.04, 1.1 * _lowest(sweep)), 1.06)
        panels[0].set_ylabel("share")
        legend_below(figure, panels[0], handlelength=1.8)
        add_heading(figure, title or "")
    return figure


def _lowest(sweep: xr.Dataset) -> float:
    """How far below zero the trace's effect goes."""
    return float(sweep["indirect_effect"].min()) if "indirect_effect" in sweep else 0.0
