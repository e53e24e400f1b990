"""Edges, or outputs of components, blocked in windows of layers: the runs, and what they do to the answer."""

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
from hooked_llava.errors import InputError
from hooked_llava.experiments.edges import Edge, Missing, marked
from hooked_llava.experiments.windows import centered_window, paper_width, widest_window
from hooked_llava.machine.devices import to_device
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

Window = int | Literal["all"] | None
_OTHER = "change of the metric"


def knocked_out(
    analysis: str,
    model: HookedLLaVA,
    inputs: InputsLike,
    named: Sequence[Edge],
    window: Window,
    asked: tuple[Target, Target, MetricName | Metric],
    *,
    centers: int | Sequence[int] | None,
    total: bool,
    missing: Missing,
    seed: int,
    batch_size: int | None,
    factor: float = 0.0,
) -> xr.Dataset:
    """What blocking (or weighting by `factor`) each of `named` in every window does to the answer, on axes edge and layer.

    `asked` is the answer, the baseline and the metric; all as `analysis.attention_knockout` takes them, which also says what
    comes back and what is raised.
    """
    (answer, baseline, metric), windows = asked, windows_of(window, centers, model.cfg.n_layers)
    reading = read_answer(model, inputs, answer)
    with_ends, present = marked(reading.inputs, named, missing=missing, seed=seed)
    against = None if baseline is None else read_answer(model, inputs, baseline, "baseline")
    _check_metric(metric, reading, against)
    plan = [(edge, layers) for edge in named for layers in windows.values()]
    plan += [(edge, range(model.cfg.n_layers)) for edge in named if total]
    how = {"window": window or paper_width(model.cfg.n_layers), "metric": _named(metric), "seed": seed}
    how |= {"factor": factor} if factor else {}  # without it, edges were blocked
    with provenance(analysis, model, with_ends, n_forward=1, **how) as made:
        replay = Replay(model, with_ends)
        scores = _Scores.of(replay, reading, against, metric)
        result = _labelled(_run(replay, plan, scores, batch_size, factor), scores, named, windows, present)
        return result.assign_attrs(made.attrs(**scores.attrs(model), work=replay.work.forwards, runs=len(plan)))


def windows_of(window: Window, centers: int | Sequence[int] | None, n_layers: int) -> dict[int | None, range]:
    """Layers that are blocked together, by the center of their window; raises `InputError` for what is none."""
    if window == "all":
        if centers is not None:
            raise InputError("window='all' blocks every layer at once and has no center; leave centers= out.")
        return {None: range(n_layers)}
    if window is None:
        width = paper_width(n_layers)
    else:
        widest = widest_window(n_layers)
        expected = f"a number of layers from 1 to {widest}, or 'all'"
        width = whole_number(window, "window", least=1, most=widest, expected=expected)
    centers = range(n_layers) if centers is None else as_indices(centers, n_layers, "layers, as centers")
    return {center: centered_window(center, width, n_layers) for center in centers}


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
    replay: Replay, plan: Sequence[tuple[Edge, range]], scores: _Scores, batch_size: int | None, factor: float
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
    runs = [by_name[name].weighted(window, factor) for name, window in distinct]
    values = replay.run(runs, scores, reading.positions, batch_size)
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
