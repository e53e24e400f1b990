"""Where does the answer to a constraint live?

Causal tracing (Meng et al. 2022; for images Basu et al. 2024, arXiv 2406.04236): a clean run, a corrupted run in which
the constraint ("this place", "Paris") is replaced while the image stays, and corrupted runs into which one clean
output is restored, at one position and a window of layers. IE(t, l, kind) = P_restored(answer) - P_corrupted(answer).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from hooked_llava.checks import as_indices, one_of, whole_number
from hooked_llava.errors import InputError
from hooked_llava.experiments.corruptions import (
    Constraint,
    Corrupted,
    Corruption,
    Noise,
    corrupt,
    describe,
    find_constraints,
)
from hooked_llava.experiments.windows import widest_window
from hooked_llava.model.requirements import supported_inputs
from hooked_llava.options.trace_kinds import TRACE_KINDS
from hooked_llava.options.window_readings import WINDOW_READINGS, WindowReading
from hooked_llava.prompt.positions import Positions
from hooked_llava.prompt.where import PositionsLike, resolve_positions
from hooked_llava.readout.answer import AnswerReading, read_answer
from hooked_llava.readout.answer_tokens import AnswerLike
from hooked_llava.readout.metric_names import about_metric
from hooked_llava.readout.metrics import Metric, value_of
from hooked_llava.readout.vocabulary import decode_text
from hooked_llava.replay.intervention import Intervention
from hooked_llava.replay.replay import Replay
from hooked_llava.results.arrays import n_tied, position_coords, to_numpy
from hooked_llava.results.provenance import Provenance, provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs
    from hooked_llava.prompt.prepare import InputsLike
    from hooked_llava.prompt.token_map import TokenMap

ROLES = (
    "image",
    "before",
    "constraint first",
    "constraint middle",
    "constraint last",
    "rest of question",
    "rest",
    "last",
    "answer",
)
"""What a position is to the trace; `by_role`, `average_traces` and `trace_study` sum up by it."""
LOWERED = 0.1
"""Share of the answer's probability that a corruption must take, or it is said not to have lowered the answer."""


@dataclass(frozen=True)
class _Plan:
    """What is restored, checked before anything runs."""

    model: HookedLLaVA
    reading: AnswerReading
    constraints: list[Positions]
    positions: list[int]
    kinds: tuple[str, ...]
    layers: list[int]
    windows: list[range]


def causal_trace(
    model: HookedLLaVA,
    inputs: InputsLike,
    constraint: Constraint | Sequence[Constraint],
    *,
    corruption: Corruption = Noise(),  # noqa: B008 (it is frozen)
    kinds: Sequence[str] = tuple(TRACE_KINDS),
    window: int = 1,
    window_reading: WindowReading = "centered",
    layers: int | Sequence[int] | None = None,
    positions: PositionsLike | None = None,
    answer: AnswerLike | None = None,
    metric: Metric | None = None,
    batch_size: int | None = None,
) -> xr.Dataset:
    """How far one clean output restores the answer of a corrupted run, by kind, layer and position.

    Args:
        model: the model.
        inputs: one prompt, anything `model.as_inputs` takes.
        constraint: words of the question, positions, or a list of several constraints, corrupted together.
        corruption: words that replace the constraint ("the ring"), `Replace(...)`, `Noise(...)`, `MeanEmbedding()` or
            `OtherImage(...)`, from `hooked_llava.experiments.corruptions`.
        kinds: of "mlp", "attn" and "resid", each in turn.
        window: how many layers, centered on each layer and clipped at the ends, are restored together.
        window_reading: "centered", or "released" for 2 `window` + 1 layers, as the code of 2406.04236 has it.
        layers: centers of the windows; all layers by default.
        positions: where to restore, each in turn; by default from the last image position to the prompt's end.
        answer: measured as a whole, under teacher forcing; by default what the inputs have appended
            (`metrics.teacher_forced`), else the clean run's own first token.
        metric: from logits [..., d_vocab] to one number each (of an appended answer [..., position, d_vocab], where its
            tokens are predicted); by default P(answer).
        batch_size: rows at once; chosen from the free memory by default.

    Returns a dataset with `restored` (the metric) and `indirect_effect` [kind, layer, position], the probabilities `p_clean`
    and `p_corrupted` of the answer, `lowered_by` = (p_clean - p_corrupted) / p_clean, and for each position its `role` and
    `constraint_index` (-1 outside); attributes `answer`, `answer_tokens`, `measured` ("whole answer" or "first token").
    Positions before the first changed embedding have effect exactly 0 and are not run. Raises `InputError` and `SpanError`
    for what does not fit, before anything is computed but the clean run.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> trace = causal_trace(model, model.prepare("Who made the star?"), "star", corruption="ring")
    >>> trace["indirect_effect"].dims, float(trace["lowered_by"]) > 0.9
    (('kind', 'layer', 'position'), True)
    """
    prompt = supported_inputs("causal_trace", model, inputs)
    reading = read_answer(model, prompt, answer)
    plan = _plan(model, reading, constraint, kinds, (window, window_reading), layers, positions)
    how: dict[str, Any] = {"corruption": describe(corruption), "corruption_kind": describe(corruption, words=False)}
    how |= {"window": window, "window_reading": window_reading}
    with provenance("causal_trace", model, prompt, n_forward=1, **how) as made:
        return _traced(plan, corruption, metric, batch_size, made)


def _traced(
    plan: _Plan, corruption: Corruption, metric: Metric | None, batch_size: int | None, made: Provenance
) -> xr.Dataset:
    model, clean = plan.model, Replay(plan.model, plan.reading.inputs)
    own = clean.logits(plan.reading.positions)
    reading = plan.reading.with_own(model, plan.reading.shaped(own))
    p_answer = reading.probability
    measure = p_answer if metric is None else metric
    value = value_of(measure, own)  # before anything else is run
    corrupted = corrupt(model, clean, plan.constraints, corruption)
    made.n_forward = 1 + corrupted.n_forward
    logits = [replay.logits(reading.positions) for replay in corrupted.replays]
    baseline = [value_of(measure, each) for each in logits]
    effects, n_runs = _effects(clean, corrupted, baseline, plan, measure, batch_size)
    about = {"clean": value, "corrupted": float(np.mean(baseline)), "runs": n_runs, **reading.attrs(model)}
    about |= _about(model, clean, corrupted, plan) | {"metric": about_metric(model, measure)["metric"]}
    about |= {} if metric else {"units": "probability"}
    ends = value_of(p_answer, own), [value_of(p_answer, each) for each in logits]
    return _labelled(reading.inputs, corrupted, plan, effects, ends, made.attrs(**about))


def was_lowered(trace: xr.Dataset) -> bool:
    """Whether the corruption lowered the answer, so that there is something to restore."""
    return float(trace.lowered_by) >= LOWERED


def best_cells(trace: xr.Dataset, *, by_layer: bool = False) -> list[xr.Dataset]:
    """For each kind (and layer) the cell with the largest indirect effect, with coordinates `kind`, `layer`, `position`, ...

    Of several with the same effect (but for a thousandth of it) it is the first; its `n_tied` counts the others.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> trace = causal_trace(model, model.prepare("Who made the star?"), "the star", corruption="the ring")
    >>> [str(cell.kind.values) for cell in best_cells(trace)]
    ['mlp', 'attn', 'resid']
    """
    best = []
    layers = [[i] for i in range(trace.sizes["layer"])] if by_layer else [slice(None)]
    for one in (trace.isel(kind=kind, layer=layer) for kind in range(trace.sizes["kind"]) for layer in layers):
        effects = one.indirect_effect.transpose("layer", "position").values
        layer, position = divmod(int(effects.argmax()), effects.shape[1])
        best.append(one.isel(layer=layer, position=position).assign(n_tied=n_tied(effects)))
    return best


def by_role(trace: xr.Dataset) -> xr.Dataset:
    """A trace averaged over the positions of each role, [kind, layer, role], with `n_positions` [role].

    Roles: `image`; text `before` the first constraint; `constraint first`, `middle` and `last` token (a single token is
    the last); `rest of question`; `rest` (template); `last`, the prompt's last position, which predicts the answer's first
    token; `answer`, an appended answer's own.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> trace = causal_trace(model, model.prepare("Who made the star?"), "the star", corruption="the ring")
    >>> by_role(trace).role.values.tolist()
    ['before', 'constraint first', 'constraint last', 'rest of question', 'rest', 'last']
    """
    present = [role for role in ROLES if role in trace.role.values]
    parts = [trace.isel(position=np.flatnonzero(trace.role.values == role)) for role in present]
    means = [part[["restored", "indirect_effect"]].mean("position") for part in parts]
    joined = xr.concat(means, dim=xr.Variable("role", present))
    found = joined.transpose("kind", "layer", "role").assign_attrs(trace.attrs)
    return found.assign(n_positions=("role", [part.sizes["position"] for part in parts])).assign(
        {name: trace[name] for name in ("p_clean", "p_corrupted", "lowered_by")}
    )


def _about(model: HookedLLaVA, clean: Replay, corrupted: Corrupted, plan: _Plan) -> dict[str, Any]:
    """What was asked, what was said, and what it cost, for the attributes."""
    token_map = clean.inputs.token_map
    return {
        "corrupted_answer": decode_text(model, [int(corrupted.replays[0].logits().argmax())]),
        "constraint": [" ".join(token_map.labels[p].strip() for p in where) for where in plan.constraints],
        "constraint_positions": [where.tolist() for where in plan.constraints],
        "constraint_last": plan.constraints[-1][-1],
        "last": token_map["last"][0],
        "work": sum(replay.work.forwards for replay in (clean, *corrupted.replays)),
    }


def restored_windows(
    model: HookedLLaVA,
    kinds: Sequence[str],
    window: int,
    window_reading: str,
    layers: int | Sequence[int] | None,
) -> tuple[tuple[str, ...], list[int], list[range]]:
    """The kinds, the centers of the windows and the layers in each; raises `InputError` as `causal_trace` does."""
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if not kinds or set(kinds) - set(TRACE_KINDS):
        raise InputError(f"kinds={kinds!r}; expected some of {', '.join(map(repr, TRACE_KINDS))}.")
    n_layers = model.cfg.n_layers
    counted = WINDOW_READINGS[one_of(window_reading, WINDOW_READINGS, "window_reading")]
    width = whole_number(window, "window", least=1, most=widest_window(n_layers))
    centers = list(range(n_layers)) if layers is None else as_indices(layers, n_layers, "layers")
    return kinds, centers, [counted.window(center, width, n_layers) for center in centers]


def _plan(
    model: HookedLLaVA,
    reading: AnswerReading,
    constraint: Constraint | Sequence[Constraint],
    kinds: Sequence[str],
    window: tuple[int, str],
    layers: int | Sequence[int] | None,
    positions: PositionsLike | None,
) -> _Plan:
    kinds, centers, windows = restored_windows(model, kinds, *window, layers)
    token_map = reading.inputs.token_map
    if positions is None:
        first = max(token_map["image"]) if "image" in token_map else token_map.real.start
        where = list(range(first, token_map.own.stop))
    else:
        where = sorted(set(resolve_positions(positions, reading.inputs)[0].tolist()))
    return _Plan(model, reading, find_constraints(token_map, constraint), where, kinds, centers, windows)


def _effects(
    clean: Replay,
    corrupted: Corrupted,
    baseline: list[float],
    plan: _Plan,
    metric: Metric,
    batch_size: int | None,
) -> tuple[Float[np.ndarray, "kind layer position"], int]:
    """What each restored output adds to the corrupted runs' metric, averaged over them, and the number of runs."""
    cells = _cells(plan, corrupted.first, plan.reading.logit_positions[0].tolist(), clean.model.cfg.n_layers)
    table = np.zeros((len(baseline), len(plan.kinds), len(plan.layers), len(plan.positions)))
    if not cells:
        return table.mean(0), 0
    first = min(plan.positions[p] for _, _, p in cells)
    there = _clean_activations(clean, [TRACE_KINDS[kind].hook for kind in plan.kinds], first)
    runs = [_restoration(there, plan, first, *cell) for cell in cells]
    for effects, replay, without in zip(table, corrupted.replays, baseline, strict=True):
        effects[tuple(np.array(cells).T)] = (
            to_numpy(replay.run(runs, metric, plan.reading.positions, batch_size)) - without
        )
    return table.mean(0), len(runs) * len(baseline)


def _cells(plan: _Plan, first: int | None, read: list[int], n_layers: int) -> list[tuple[int, int, int]]:
    """Indices of kind, layer and position where restoring can change anything.

    Before the first changed embedding both runs are the same; and from the last layer no position reaches another, so that
    only those count that predict the answer.
    """
    if first is None:
        return []
    return [
        (kind, layer, i)
        for kind in range(len(plan.kinds))
        for layer, window in enumerate(plan.windows)
        for i, position in enumerate(plan.positions)
        if position >= first and (position in read or window[0] < n_layers - 1)
    ]


def _clean_activations(clean: Replay, names: list[str], first: int) -> dict[str, Float[Tensor, "position d_model"]]:
    """Outputs of the clean run from a position on, recomputed from what it kept."""
    same = Intervention("hook_embed", positions=[first], scale=1.0)  # changes nothing, but makes a run start there
    _, (seen,) = clean.run_with_cache([[same]], names, positions=list(range(first, clean.kept.n_positions)))
    return {name: tensor[0] for name, tensor in seen.items()}


def _restoration(
    there: dict[str, Tensor], plan: _Plan, first: int, kind: int, layer: int, index: int
) -> list[Intervention]:
    position = plan.positions[index]
    names = [plan.model.hooks_table.name(TRACE_KINDS[plan.kinds[kind]].hook, i) for i in plan.windows[layer]]
    return [Intervention(name, positions=[position], value=there[name][position - first]) for name in names]


def _labelled(
    prompt: Inputs,
    corrupted: Corrupted,
    plan: _Plan,
    effects: np.ndarray,
    ends: tuple[float, list[float]],
    attrs: dict[str, Any],
) -> xr.Dataset:
    dims, token_map = ("kind", "layer", "position"), prompt.token_map
    p_clean, p_corrupted = ends[0], float(np.mean(ends[1]))
    owner = {p: i for i, where in enumerate(plan.constraints) for p in where}
    return xr.Dataset(
        {
            "indirect_effect": (dims, effects),
            "restored": (dims, effects + attrs["corrupted"]),
            "p_clean": p_clean,
            "p_corrupted": p_corrupted,
            "lowered_by": (p_clean - p_corrupted) / p_clean,
        },
        coords={
            "kind": list(plan.kinds),
            "layer": plan.layers,
            **position_coords(token_map, plan.positions),
            "corrupted_label": ("position", [corrupted.labels[p] for p in plan.positions]),
            "role": ("position", [_role(token_map, plan.constraints, p) for p in plan.positions]),
            "constraint_index": ("position", [owner.get(p, -1) for p in plan.positions]),
        },
        attrs=attrs,
    )


def _role(token_map: TokenMap, constraints: list[Positions], position: int) -> str:
    for where in constraints:
        if position in where:
            place = "last" if position == where[-1] else "first" if position == where[0] else "middle"
            return f"constraint {place}"
    if position not in token_map.own:
        return "answer"
    if position in token_map["last"]:
        return "last"
    spans = token_map.spans
    if position in spans.get("image", ()):
        return "image"
    if position < min(where[0] for where in constraints):
        return "before"
    return "rest of question" if position in spans.get("question", ()) else "rest"
