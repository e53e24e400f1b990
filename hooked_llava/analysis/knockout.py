"""Which edges does the answer's information travel along?

Attention knockout (Geva et al. 2023; Zhang et al. 2024, arXiv 2411.18620): in a window of layers, target positions may
not attend to source positions (their scores become minus infinity before the softmax, which spreads what is left over
the other keys), and the answer's probability is compared with what it was. One run for each edge and each centre of the
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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from hooked_llava.checks import as_indices, whole_number
from hooked_llava.devices import to_device
from hooked_llava.errors import InputError
from hooked_llava.experiments.edges import Edge, Edges, Missing, edges_of, marked
from hooked_llava.experiments.windows import centred_window, paper_width, widest_window
from hooked_llava.options.knockout_metrics import KNOCKOUT_METRICS, MetricName
from hooked_llava.readout.answer import AnswerReading, answer_is_first, read_answer
from hooked_llava.readout.answer_tokens import Target
from hooked_llava.readout.metrics import Metric, logit_difference, measured
from hooked_llava.replay.replay import Replay
from hooked_llava.results.arrays import to_numpy
from hooked_llava.results.provenance import provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.prepare import InputsLike

PAPER_EDGES = ("question->last", "image->last", "last->last", "image->question")
"""What Zhang et al. block in every prompt."""
OBJECT_EDGES = ("object->question", "other->question", "random->question")
"""What they block where the object is known, and as many random patches for comparison."""
CLOSED_EDGES = ("image->question|rest|last", "question|rest->last")
"""What the released grouping leaves open: with the text around the question included."""
Window = int | Literal["all"] | None
_OTHER = "change of the metric"


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
        window: how many layers around the centre, clipped at the ends as the paper clips them; "all" blocks all layers
            at once; by default the paper's share of the layers (9 of 40), at least 3.
        centers: centres of the window, all layers by default.
        answer: text, a token id, or a list with one for each prompt (in it also lists of ids), measured as a whole under
            teacher forcing; by default what the inputs have appended (`teacher_forced`), else the model's own first token.
        baseline: for "logit_difference", the token whose logit is subtracted; both must be single tokens.
        metric: "relative_change" is 100 (P - P_before) / P_before; the others, and any function of logits [..., d_vocab]
            (of an appended answer [..., position, d_vocab], where its tokens are predicted), are given as their change.
        total: also block every layer at once, once for each edge.
        missing: "skip" gives NaN for edges of known spans that a prompt does not have, "raise" an error.
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
    named, windows = edges_of(edges), windows_of(window, centers, model.cfg.n_layers)
    reading = read_answer(model, inputs, answer)
    with_ends, present = marked(reading.inputs, named, missing=missing, seed=seed)
    against = None if baseline is None else read_answer(model, inputs, baseline, "baseline")
    _check_metric(metric, reading, against)
    plan = [(edge, layers) for edge in named for layers in windows.values()]
    plan += [(edge, range(model.cfg.n_layers)) for edge in named if total]
    how = {"window": window or paper_width(model.cfg.n_layers), "metric": _named(metric), "seed": seed}
    with provenance("attention_knockout", model, with_ends, n_forward=1, **how) as made:
        replay = Replay(model, with_ends)
        scores = _Scores.of(replay, reading, against, metric)
        result = _labelled(_run(replay, plan, scores, batch_size), scores, named, windows, present)
        return result.assign_attrs(made.attrs(**scores.attrs(model), work=replay.work.forwards, runs=len(plan)))


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


def windows_of(window: Window, centers: int | Sequence[int] | None, n_layers: int) -> dict[int | None, range]:
    """Layers that are blocked together, by the centre of their window; raises `InputError` for what is none."""
    if window == "all":
        if centers is not None:
            raise InputError("window='all' blocks every layer at once and has no centre; leave centers= out.")
        return {None: range(n_layers)}
    if window is None:
        width = paper_width(n_layers)
    else:
        widest = widest_window(n_layers)
        expected = f"a number of layers from 1 to {widest}, or 'all'"
        width = whole_number(window, "window", least=1, most=widest, expected=expected)
    centres = range(n_layers) if centers is None else as_indices(centers, n_layers, "layers, as centers")
    return {centre: centred_window(centre, width, n_layers) for centre in centres}


def _named(metric: MetricName | Metric) -> str:
    return metric if isinstance(metric, str) else "custom"


def _check_metric(metric: MetricName | Metric, reading: AnswerReading, baseline: AnswerReading | None) -> None:
    if not callable(metric) and metric not in KNOCKOUT_METRICS:
        raise InputError(
            f"metric={metric!r}; expected {', '.join(KNOCKOUT_METRICS)}, or a function of logits [..., d_vocab]."
        )
    if (metric == "logit_difference") != (baseline is not None):
        raise InputError(
            f"metric={metric!r} {'without' if baseline is None else 'with'} baseline=; expected metric='logit_difference' "
            "with baseline=, the token whose logit is subtracted, or another metric without it."
        )
    several = [one.texts for one in (reading, baseline) if one is not None and one.logit_positions.shape[1] > 1]
    if metric == "logit_difference" and several:
        raise InputError(
            f"metric='logit_difference' compares the logits of two single tokens, and {several[0]} has several after its "
            "prompt. Give token ids, or take metric='log_probability'."
        )


@dataclass(frozen=True)
class _Scores:
    """What is read off the logits: the metric's change, and whether the answer still comes first.

    Attributes:
        base (Float[Tensor, " prompt"]): The metric before.
    """

    reading: AnswerReading
    baseline: AnswerReading | None
    metric: MetricName | Metric
    base: Float[Tensor, " prompt"]

    @classmethod
    def of(
        cls, replay: Replay, reading: AnswerReading, baseline: AnswerReading | None, metric: MetricName | Metric
    ) -> _Scores:
        logits = reading.shaped(replay.logits(reading.positions))
        own = reading.with_own(replay.model, logits)
        unmeasured = cls(own, baseline, metric, logits.new_zeros(len(logits)))
        return replace(unmeasured, base=unmeasured.value(logits))

    def value(self, logits: Float[Tensor, "*run prompt read d_vocab"]) -> Float[Tensor, "*run prompt"]:
        """The metric; of "relative_change", the probability."""
        if not isinstance(self.metric, str):
            last = self.reading.positions == "last"
            return measured(self.metric, logits[..., 0, :] if last else logits, logits.ndim - 2, one_number=True)
        if self.metric == "logit_difference":
            assert self.baseline is not None
            pairs = zip(self.reading.as_answers(), self.baseline.as_answers(), strict=True)
            parts = [logit_difference(*pair)(logits[..., i, 0, :]) for i, pair in enumerate(pairs)]
            return torch.stack(parts, -1)
        log_p = self.reading.log_probability(logits)
        return log_p if self.metric == "log_probability" else log_p.exp()

    def change(self, logits: Float[Tensor, "run prompt read d_vocab"]) -> Float[Tensor, "run prompt"]:
        """What the metric has changed by."""
        difference = self.value(logits) - self.base
        return 100 * difference / self.base if self.metric == "relative_change" else difference

    @property
    def own_axes(self) -> tuple[int, ...]:
        """Two numbers are read off each row of logits, which has an axis prompt also for one."""
        return (1, 2) if len(self.base) == 1 else (2,)

    def attrs(self, model: HookedLLaVA) -> dict[str, Any]:
        """What a result says of the answers, and of `last`."""
        several = self.reading.logit_positions.shape[1] > 1
        last = "the positions that predict the answer's tokens" if several else "the prompt's last position"
        against = {} if self.baseline is None else {"baseline": self.baseline.attrs(model)["answer"]}
        return {**self.reading.attrs(model), **against, "last_is": last}

    @property
    def units(self) -> str:
        """What the effect is measured in."""
        return KNOCKOUT_METRICS[self.metric].units if isinstance(self.metric, str) else _OTHER

    def __call__(self, logits: Float[Tensor, "..."]) -> Float[Tensor, "run prompt 2"]:
        rows, ids = self.reading.shaped(logits, len(logits)), self.reading.ids
        assert ids is not None
        changes = self.change(rows)
        return torch.stack([changes, answer_is_first(rows, ids).to(changes.dtype)], dim=-1)


def _run(
    replay: Replay, plan: Sequence[tuple[Edge, range]], scores: _Scores, batch_size: int | None
) -> Float[Tensor, "run prompt 2"]:
    """The scores of every planned run; runs that are the same are done once."""
    n_layers, reading = replay.model.cfg.n_layers, scores.reading
    predicting = reading.logit_positions.tolist()
    keys = []
    for edge, window in plan:
        # In the last layer only the positions that predict the answer still feed it.
        feeds = any(m[edge.ends[1]] & read for m, read in zip(replay.inputs.token_maps, predicting, strict=True))
        stop = n_layers if feeds else n_layers - 1
        keys.append((edge.name, range(window.start, min(window.stop, stop))))
    by_name = {edge.name: edge for edge, _ in plan}
    distinct = list(dict.fromkeys(keys))
    values = replay.run(
        [by_name[name].blocked(window) for name, window in distinct], scores, reading.positions, batch_size
    )
    index = {key: i for i, key in enumerate(distinct)}
    return values.index_select(0, to_device([index[key] for key in keys], values.device))


def _labelled(
    values: Float[Tensor, "run prompt 2"],
    scores: _Scores,
    edges: Sequence[Edge],
    windows: Mapping[int | None, range],
    present: np.ndarray,
) -> xr.Dataset:
    names = [edge.name for edge in edges]
    table = to_numpy(values).astype(float) + 0.0  # no -0.0
    n = len(edges) * len(windows)
    parts = {"": table[:n].reshape(len(edges), len(windows), *table.shape[1:])}
    if None in windows:
        parts = {"": table[:n]}
    if len(table) > n:
        parts["total_"] = table[n:]
    found: dict[str, Any] = {"base": ("prompt", to_numpy(scores.base).astype(float))}
    for prefix, part in parts.items():
        part = np.moveaxis(part, -2, 0)  # (prompt, edge, [layer], number)
        part = np.where(present.reshape(*present.shape, *[1] * (part.ndim - 2)), part, np.nan)
        dims = ("prompt", "edge", "layer")[: part.ndim - 1]
        found[f"{prefix}effect"] = (dims, part[..., 0], {"units": scores.units})
        found[f"{prefix}answer_kept"] = (dims, part[..., 1])
    coords = {"edge": names, "prompt": range(len(present))}
    if None not in windows:
        coords["layer"] = list(windows)
    result = xr.Dataset(found, coords=coords)
    return result.isel(prompt=0, drop=True) if len(present) == 1 else result
