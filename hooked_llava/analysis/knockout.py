"""Which edges does the answer's information travel along?

Attention knockout (Geva et al. 2023; Zhang et al. 2024, arXiv 2411.18620): in a window of layers, target positions may
not attend to source positions (their scores become minus infinity before the softmax, which spreads what is left over
the other keys), and the answer's probability is compared with what it was. One run for each edge and each center of the
window; Replay does them together, re-running only what an edge can reach.

The paper's released code has image, question and last position, but not the text around them (instruction, "ASSISTANT:").
Blocking "image->question" and "image->last" there leaves the way image -> rest -> last open. Here that text is the span
`rest`; "image->question|rest|last" closes every way.

A position whose every key is blocked attends to nothing: its row of the pattern is zero, and its heads add only the output
bias. The released code adds the dtype's most negative number to the scores and not minus infinity, so that such a row comes
out uniform: there the position reads the average of what it was to be kept from.

An answer of several tokens is appended to the prompt, and `last` then stands for every position that predicts one of its
tokens (see `experiments.edges`): "image->last" keeps the image from wherever the answer is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, SupportsFloat

import numpy as np
import xarray as xr

from hooked_llava.errors import InputError
from hooked_llava.experiments.edges import Edges, Missing, edges_of
from hooked_llava.experiments.knockout_runs import Window, knocked_out
from hooked_llava.options.knockout_metrics import MetricName
from hooked_llava.readout.answer_tokens import Target
from hooked_llava.readout.metrics import Metric
from hooked_llava.replay.intervention import as_factor

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.prepare import InputsLike

PAPER_EDGES = ("question->last", "image->last", "last->last", "image->question")
"""What Zhang et al. block in every prompt."""
OBJECT_EDGES = ("object->question", "other->question", "random->question")
"""What they block where the object is known, and as many random patches for comparison."""
CLOSED_EDGES = ("image->question|rest|last", "question|rest->last")
"""What the released grouping leaves open: with the text around the question included."""


def attention_knockout(
    model: HookedLLaVA,
    inputs: InputsLike,
    edges: Edges = PAPER_EDGES,
    window: Window = None,
    *,
    centers: int | Sequence[int] | None = None,
    answer: Target = None,
    baseline: Target = None,
    metric: MetricName | Metric = "relative_change",
    total: bool = False,
    missing: Missing = "raise",
    factor: SupportsFloat = 0.0,
    seed: int = 0,
    batch_size: int | None = None,
) -> xr.Dataset:
    """What blocking attention from source to target positions, in a window of layers, does to the answer.

    Args:
        model: the model.
        inputs: anything `model.as_inputs` takes; a batch gives a first axis prompt.
        edges: one or several, each "source->target" or a pair (source, target) of spans (joined by |, & and -) or positions;
            a mapping gives them names. `other` is the image less the span `object` (see `inputs.with_boxes`), `random` as many
            other patches. A position left without a key attends to nothing (in the released code, uniformly).
        window: how many layers around the center, clipped at the ends as the paper clips them; "all" blocks all layers
            at once; by default the paper's share of the layers (9 of 40), at least 3.
        centers: centers of the window, all layers by default.
        answer: text, a token id, or a list with one for each prompt (in it also lists of ids), measured as a whole under
            teacher forcing; by default what the inputs have appended (`teacher_forced`), else the model's own first token.
        baseline: for "logit_difference", the token whose logit is subtracted; both must be single tokens.
        metric: "relative_change" is 100 (P - P_before) / P_before; the others, and any function of logits [..., d_vocab]
            (of an appended answer [..., position, d_vocab], where its tokens are predicted), are given as their change.
        total: also block every layer at once, once for each edge.
        missing: "skip" gives NaN for edges of known spans that a prompt does not have, "raise" an error.
        factor: what the attention of target to source is multiplied by, each row of the pattern divided by its sum again: 0
            blocks the edge, below 1 it is weakened, above 1 strengthened.
        seed: of the random patches.
        batch_size: rows at once; by free memory if not given.

    Returns `effect` and `answer_kept` (1 where each of the answer's tokens still comes first) [edge, layer], or [edge] for
    window="all"; with `total` also `total_effect` and `total_answer_kept` [edge]; and the metric before, `base`. Attributes:
    `answer`, `answer_tokens`, `measured` ("whole answer" or "first token"), and `last_is`, what `last` means. Raises
    `SpanError` for spans that are not there, and `InputError` for what does not fit.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> result = attention_knockout(model, model.prepare("Who made the star?"), ["question->last", "last->last"])
    >>> dict(result["effect"].sizes) == {"edge": 2, "layer": model.cfg.n_layers}
    True
    """
    how = {"missing": missing, "seed": seed, "batch_size": batch_size, "total": total, "centers": centers}
    how |= {"factor": as_factor(factor)}
    asked = (answer, baseline, metric)
    return knocked_out("attention_knockout", model, inputs, edges_of(edges), window, asked, **how)


def flow_summary(result: xr.Dataset | xr.DataArray, *, least: float | None = None) -> xr.Dataset:
    """Knockout curves as numbers, for every edge (and kind of question).

    Args:
        result: what `attention_knockout` gives, or `by_kind` of a study (its means are taken).
        least: a curve that falls by less than this nowhere has a peak; by default 1 where effects are percentages, else 0.

    Returns, without the axis layer: `peak_layer`, where the drop is largest; `depth`, the effect there; `half_width`,
    the number of layers around it in which the effect is at least half as deep; `stages`, how many separate stretches of
    layers are that deep ("two stages" as a number). An edge whose blocking lowers the metric by less than `least`
    everywhere has no peak (NaN), and half-width and stages 0. Raises `InputError` for a result without the axes edge and
    layer.

    >>> curve = xr.DataArray([[0.0, -8.0, -10.0, -1.0, -6.0]], dims=("edge", "layer"), coords={"layer": range(5)})
    >>> {name: float(v[0]) for name, v in flow_summary(curve).items()}
    {'peak_layer': 2.0, 'depth': -10.0, 'half_width': 2.0, 'stages': 2.0}
    """
    curves = result["effect"] if isinstance(result, xr.Dataset) else result
    if not {"edge", "layer"} <= set(curves.dims):
        raise InputError(
            f"flow_summary needs the axes edge and layer; this result has {', '.join(map(str, curves.dims))}."
        )
    if "statistic" in curves.dims:
        curves = curves.sel(statistic="mean", drop=True)
    curves = curves.transpose(..., "layer")
    layers = curves["layer"].values if "layer" in curves.coords else np.arange(curves.sizes["layer"])
    if least is None:
        least = 1.0 if str(curves.attrs.get("units", "")).startswith("%") else 0.0
    found = np.apply_along_axis(_peak, -1, curves.values.astype(float), layers, least)
    dims = curves.dims[:-1]
    coords = {name: c for name, c in curves.coords.items() if "layer" not in c.dims}
    names = ("peak_layer", "depth", "half_width", "stages")
    return xr.Dataset({name: (dims, found[..., i]) for i, name in enumerate(names)}, coords, result.attrs)


def _peak(curve: np.ndarray, layers: np.ndarray, least: float) -> np.ndarray:
    """Layer and depth of the deepest point, the width at half its depth, and the number of stretches that deep."""
    if not np.isfinite(curve).all():
        return np.full(4, np.nan)
    at = int(curve.argmin())
    if not curve[at] < 0 or -curve[at] < least:
        return np.array([np.nan, curve[at], 0, 0], dtype=float)
    deep = curve <= curve[at] / 2
    starts = np.flatnonzero(deep & ~np.concatenate([[False], deep[:-1]]))
    stretch = np.cumsum(np.isin(np.arange(len(curve)), starts)) * deep  # 0 outside, else the stretch's number
    return np.array([layers[at], curve[at], (stretch == stretch[at]).sum(), len(starts)], dtype=float)
